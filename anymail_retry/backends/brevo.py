"""Brevo, with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.brevo

from ..idempotency import IdempotencyKey
from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.brevo.EmailBackend):
    """Anymail's Brevo back end with retries, idempotency keys and the fallback queue."""

    # 429: https://developers.brevo.com/docs/limit-headers (read 2026-11).
    refused_statuses = frozenset({429})
    answers = (
        # Codes: getbrevo/brevo-python, brevo_python/models/error_model.py (read 2026-11). The status that comes with
        # them is not documented. An account that may not send yet says "permission_denied":
        # https://github.com/WPManageNinja/fluent-smtp/issues/157
        AnswerRule(
            Verdict.BLOCKED,
            path="code",
            values=frozenset({"not_enough_credits", "account_under_validation", "permission_denied"}),
            reason="account",
        ),
    )
    # In the body's headers, with exactly this spelling; as an HTTP header it does nothing. Measured, with the answer
    # to a second request, in https://github.com/getbrevo/brevo-node/issues/94 (2026-08).
    # Remembered for 30 minutes by https://developers.brevo.com/docs/heterogenous-versions-batch-emails, for 15 by
    # https://developers.brevo.com/changelog/email-api-now-supports-idempotency (read 2026-11): the shorter is safe.
    idempotency = IdempotencyKey(
        place="body",
        name="headers.idempotencyKey",
        window=15 * 60,
        grammar=r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
        duplicate=AnswerRule(
            Verdict.DELIVERED,
            status=400,
            path="code",
            values=frozenset({"duplicate_parameter"}),
            text="idempotency key",
        ),
    )


RetryableBrevoEmailBackend = EmailBackend
