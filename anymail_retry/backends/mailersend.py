"""MailerSend, with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.mailersend

from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.mailersend.EmailBackend):
    """Anymail's MailerSend back end with retries and the fallback queue."""

    # 421 and 503 announce maintenance: https://developers.mailersend.com/general.html (read 2026-08).
    refused_statuses = frozenset({421, 429, 503})
    answers = (
        # A 429 is a limit per minute (MS42903) or the daily quota (MS42901), which waiting does not cure:
        # https://www.mailersend.com/help/rate-limits-how-to-reduce-403-422-429-errors (read 2026-11).
        AnswerRule(Verdict.BLOCKED, status=429, text="#MS42901", reason="quota"),
        # The quota of a trial domain, and a token without the right to send: texts as users quote them (2026-11).
        AnswerRule(Verdict.BLOCKED, status=422, text="#MS42222", reason="quota"),
        AnswerRule(Verdict.BLOCKED, status=403, text="#MS40301", reason="api key"),
    )
    # Suppressed recipients are "rejected"; "failed" is what Anymail makes of a 2xx with neither an id nor a warning,
    # such as a proxy's page (anymail/backends/mailersend.py, 15.2).
    none_accepted = Verdict.AMBIGUOUS


RetryableMailerSendEmailBackend = EmailBackend
