"""Postmark, with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.postmark

from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict

# ErrorCodes are no HTTP statuses: 500, 501 and 503 are errors of sender signatures
# (https://postmarkapp.com/developer/api/overview#error-codes, read 2026-11).
# 100: maintenance. 429: rate limit.
_REFUSED = frozenset({"100", "429"})
# 405: out of credits. 412: account pending approval. 413: account may not send.
_BLOCKED = frozenset({"405", "412", "413"})


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.postmark.EmailBackend):
    """Anymail's Postmark back end with retries and the fallback queue.

    Idempotency keys are not supported, in words: https://postmarkapp.com/support/article/what-is-an-idempotency-key
    """

    # 503: planned outage (same page as the ErrorCodes).
    refused_statuses = frozenset({429, 503})
    answers = (
        AnswerRule(Verdict.REFUSED, path="ErrorCode", values=_REFUSED),
        AnswerRule(Verdict.BLOCKED, path="ErrorCode", values=_BLOCKED, reason="account"),
        # A 200 with an ErrorCode is a refusal. 0 is none; where it is missing, the mail is only late
        # (https://github.com/anymail/django-anymail/issues/392).
        AnswerRule(Verdict.PERMANENT, status=200, path="ErrorCode", unless=frozenset({"0"}), reason="refused"),
        # A batch of which nothing was taken. Of a mixed one Anymail's parser tells, or raises in the middle.
        AnswerRule(Verdict.REFUSED, status=200, path="*.ErrorCode", values=_REFUSED),
        AnswerRule(Verdict.BLOCKED, status=200, path="*.ErrorCode", values=_REFUSED | _BLOCKED, reason="account"),
        AnswerRule(Verdict.PERMANENT, status=200, path="*.ErrorCode", unless=frozenset({"0"}), reason="refused"),
    )


RetryablePostmarkEmailBackend = EmailBackend
