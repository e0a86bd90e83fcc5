"""Mandrill (Mailchimp Transactional), with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.mandrill

from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict

# Names of errors: mailchimp/mailchimp-client-lib-codegen, spec/transactional.openapi.json (read 2026-11). Until 2023
# each came with a 500, so the name is asked before the status:
# https://mailchimp.com/developer/release-notes/changing-api-server-response-for-client-errors/
_REFUSED = frozenset({"RequestLimitExceeded", "ServiceUnavailable"})
_BLOCKED = frozenset({"Invalid_Key", "PaymentRequired"})
_UNKNOWN = frozenset({"GeneralError"})


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.mandrill.EmailBackend):
    """Anymail's Mandrill back end with retries and the fallback queue. The API key travels in the request's body."""

    refused_statuses = frozenset({429, 503})
    answers = (
        AnswerRule(Verdict.REFUSED, path="name", values=_REFUSED),
        AnswerRule(Verdict.BLOCKED, path="name", values=_BLOCKED, reason="account"),
        AnswerRule(Verdict.PERMANENT, status=500, path="name", unless=_UNKNOWN),
    )


RetryableMandrillEmailBackend = EmailBackend
