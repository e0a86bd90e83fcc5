"""Scaleway Transactional Email, with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.scaleway

from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.scaleway.EmailBackend):
    """Anymail's Scaleway back end with retries and the fallback queue."""

    # Types of errors, and their statuses: scaleway/scaleway-sdk-js, packages/client/src/scw/errors/standard (read
    # 2026-11).
    refused_statuses = frozenset({429})
    answers = (
        # 403 both: what the organization may send is used up, or the API key may not send.
        AnswerRule(Verdict.BLOCKED, path="type", values=frozenset({"quotas_exceeded"}), reason="quota"),
        AnswerRule(Verdict.BLOCKED, path="type", values=frozenset({"permissions_denied"}), reason="api key"),
        # 409: what the request is about is being changed at this moment.
        AnswerRule(Verdict.REFUSED, status=409, path="type", values=frozenset({"transient_state"})),
    )


RetryableScalewayEmailBackend = EmailBackend
