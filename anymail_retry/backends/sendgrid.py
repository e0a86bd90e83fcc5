"""SendGrid, with retries and the fallback queue. Anymail no longer maintains its own part."""

from __future__ import annotations

import anymail.backends.sendgrid

from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.sendgrid.EmailBackend):
    """Anymail's SendGrid back end with retries and the fallback queue."""

    # https://www.twilio.com/docs/sendgrid/api-reference/how-to-use-the-sendgrid-v3-api/rate-limits (read 2026-11).
    # "Maximum credits exceeded" is a 401: https://github.com/sendgrid/sendgrid-nodejs/issues/1032
    refused_statuses = frozenset({429})
    answers = (
        # An API key without the right to send: https://github.com/sendgrid/sendgrid-ruby/issues/393. Any other 403 is
        # about the From address.
        AnswerRule(Verdict.BLOCKED, status=403, text="access forbidden", reason="api key"),
    )


RetryableSendGridEmailBackend = EmailBackend
