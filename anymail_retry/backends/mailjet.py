"""Mailjet, with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.mailjet

from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.mailjet.EmailBackend):
    """Anymail's Mailjet back end with retries and the fallback queue.

    A 4xx in JSON may be a partial success, so none is ever tried again; one that accepted no recipient raises nothing
    in Anymail.
    """

    # https://dev.mailjet.com/docs/email-api/email_api_overview/status_codes (read 2026-11). Its body is HTML:
    # https://github.com/mailjet/mailjet-apiv3-nodejs/issues/178
    refused_statuses = frozenset({429})
    answers = (
        # Merge data with a null, refused in the status line alone: anymail tests/test_mailjet_backend.py (15.2).
        AnswerRule(Verdict.PERMANENT, status=500, text="Cannot convert data from Null value", reason="merge data"),
        # Each message of the request failed at Mailjet's end, the one kind that may be sent again:
        # https://github.com/mailjet/mailjet-apiv3-nodejs/issues/271 (read 2026-11).
        AnswerRule(
            Verdict.REFUSED,
            path="Messages.*.Errors.*.StatusCode",
            values=frozenset({"500", "502", "503", "504"}),
            reason="no recipient accepted",
        ),
    )


RetryableMailjetEmailBackend = EmailBackend
