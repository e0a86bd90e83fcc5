"""Mailgun, with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.mailgun

from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.mailgun.EmailBackend):
    """Anymail's Mailgun back end with retries and the fallback queue."""

    # https://documentation.mailgun.com/docs/mailgun/quickstart-guide/responses (read 2026-11). It advises to retry a
    # 500 too, but users report mail that arrived in spite of one: https://feedback.mailgun.com/users/921341509
    # Its 404 "can be temporal", for a domain made a moment ago; for any other it is a wrong sender domain or region.
    refused_statuses = frozenset({429})
    # 420 "recipient limit exceeded, try again after ...": https://github.com/mailgun/mailgun-java/issues/50 (2025-08).
    blocked_statuses = frozenset({401, 402, 420})
    answers = (
        # Mailgun's greeting, with which it answers to a URL that it does not know (anymail/backends/mailgun.py, 15.2).
        AnswerRule(Verdict.BLOCKED, status=200, text="Mailgun Magnificent API", reason="wrong URL"),
        # A sandbox domain sends to its authorized recipients only: this is about the recipient.
        AnswerRule(Verdict.PERMANENT, text="authorized recipients", reason="sandbox"),
        # "Domain ... is not allowed to send:" an account that is disabled, not activated or over its limits; also with
        # 403: https://github.com/glotcode/glot/issues/66 (2026-06).
        AnswerRule(Verdict.BLOCKED, text="is not allowed to send", reason="account"),
    )


RetryableMailgunEmailBackend = EmailBackend
