"""Postal (self-hosted), with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.postal

from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.postal.EmailBackend):
    """Anymail's Postal back end with retries and the fallback queue."""

    # Postal itself always answers 200, and never "later": postalserver/postal,
    # app/controllers/legacy_api/base_controller.rb (read 2026-11). All else comes from the proxy in front of it. Its
    # 429 refuses. Its 503 may not: Envoy's also means that the connection to Postal broke after the request
    # (https://github.com/envoyproxy/envoy/issues/6190).
    refused_statuses = frozenset({429})
    answers = (
        AnswerRule(
            Verdict.BLOCKED,
            status=200,
            path="data.code",
            values=frozenset({"AccessDenied", "InvalidServerAPIKey", "ServerSuspended"}),
            reason="account",
        ),
        AnswerRule(Verdict.PERMANENT, status=200, path="status", unless=frozenset({"success"}), reason="refused"),
    )
    # The proxy is the user's own choice; Apache closes idle connections after 5 seconds:
    # https://httpd.apache.org/docs/2.4/mod/core.html#keepalivetimeout
    connection_max_idle = 4.0


RetryablePostalEmailBackend = EmailBackend
