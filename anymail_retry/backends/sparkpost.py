"""SparkPost (Bird), with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.sparkpost

from ..idempotency import IdempotencyKey
from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import IN_PROGRESS, AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.sparkpost.EmailBackend):
    """Anymail's SparkPost back end with retries, idempotency keys and the fallback queue."""

    # Statuses: SparkPost/developers.sparkpost.com, content/api/index.apib (read 2026-11). 409 is here for
    # "in progress"; the rules below take the others out.
    refused_statuses = frozenset({409, 429, 503})
    # 420: over the limit of the day, the month or the sandbox; nothing of the request was sent.
    blocked_statuses = frozenset({401, 402, 420})
    answers = (
        # The plan or the API key lacks the right, which is said in this word alone and without a code:
        # https://github.com/SparkPost/php-sparkpost/issues/64, https://github.com/darrencauthon/csharp-sparkpost/issues/159
        AnswerRule(
            Verdict.BLOCKED, status=403, path="errors.0.message", values=frozenset({"Forbidden."}), reason="api key"
        ),
        AnswerRule(Verdict.REFUSED, status=409, path="errors.0.code", values=frozenset({"1601"}), reason=IN_PROGRESS),
        AnswerRule(Verdict.PERMANENT, status=409, path="errors.0.code"),
    )
    # An equal request gets the first answer again, with "X-Idempotent-Replayed": the same repository's pull request 590
    # (2026-08). A scheduled message is remembered until 24 hours after it was due.
    idempotency = IdempotencyKey(
        place="header",
        name="Idempotency-Key",
        window=24 * 3600,
        grammar=r"[A-Za-z0-9._-]{1,255}",
        compares_body=True,
        conflict=AnswerRule(Verdict.PERMANENT, status=409, path="errors.0.code", values=frozenset({"1600"})),
    )


RetryableSparkPostEmailBackend = EmailBackend
