"""Mailtrap, with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.mailtrap

from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.mailtrap.EmailBackend):
    """Anymail's Mailtrap back end with retries and the fallback queue.

    A batch is answered with 200 even if every message in it failed, and then raises nothing in Anymail.
    """

    # https://docs.mailtrap.io/developers/rate-limits (read 2026-11).
    refused_statuses = frozenset({429})
    answers = (
        # A 429 may also mean that the billing plan's limit is used up: mailtrap/mailtrap-openapi,
        # specs/sandbox-sending.openapi.yml (read 2026-11). Which, only the text tells: "The email limit is reached.
        # Please upgrade your plan", as users quote it, or the specification's own words.
        AnswerRule(Verdict.BLOCKED, status=429, text="limit is reached", reason="quota"),
        AnswerRule(Verdict.BLOCKED, status=429, text="plan limit", reason="quota"),
    )


RetryableMailtrapEmailBackend = EmailBackend
