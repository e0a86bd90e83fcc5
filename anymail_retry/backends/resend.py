"""Resend, with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.resend

from ..idempotency import IdempotencyKey
from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import IN_PROGRESS, AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.resend.EmailBackend):
    """Anymail's Resend back end with retries, idempotency keys and the fallback queue."""

    # 409 is here for "in progress"; the rules below take the others out.
    refused_statuses = frozenset({409, 429})
    # Names of errors: https://resend.com/docs/api-reference/errors (read 2026-11).
    answers = (
        AnswerRule(
            Verdict.REFUSED,
            status=409,
            path="name",
            values=frozenset({"concurrent_idempotent_requests"}),
            reason=IN_PROGRESS,
        ),
        AnswerRule(Verdict.PERMANENT, status=409, path="name"),
        AnswerRule(
            Verdict.BLOCKED,
            status=429,
            path="name",
            values=frozenset({"daily_quota_exceeded", "monthly_quota_exceeded"}),
            reason="quota",
        ),
        # A wrong key is a 403 by the documentation, and has been seen as a 400 and a 401 with another name; the text is
        # the same (https://github.com/resend/resend-node/pull/617). Any other 403 is about the From address.
        AnswerRule(Verdict.BLOCKED, path="name", values=frozenset({"invalid_api_key"}), reason="api key"),
        AnswerRule(Verdict.BLOCKED, path="name", text="API key is invalid", reason="api key"),
    )
    # An equal request gets the first answer again: https://resend.com/docs/dashboard/emails/idempotency-keys
    # (read 2026-11). The grammar is what an HTTP header can carry of its 1 to 256 characters.
    idempotency = IdempotencyKey(
        place="header",
        name="Idempotency-Key",
        window=24 * 3600,
        grammar=r"[!-~](?:[ -~]{0,254}[!-~])?",
        compares_body=True,
        conflict=AnswerRule(
            Verdict.PERMANENT, status=409, path="name", values=frozenset({"invalid_idempotent_request"})
        ),
    )


RetryableResendEmailBackend = EmailBackend
