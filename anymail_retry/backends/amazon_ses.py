"""Amazon SES (API version 2, by boto3), with retries and the fallback queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anymail.backends.amazon_ses
from botocore.config import Config
from botocore.exceptions import (
    CredentialRetrievalError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)
from requests.structures import CaseInsensitiveDict

from .. import conf
from ..delivery import Delivery, current_delivery
from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import DeliveryMixin
from ..transport.policy import RetryPolicy
from ..transport.retry import Call, Retry, retry_for
from ..verdict import Answer, AnswerRule, Verdict

if TYPE_CHECKING:
    from django.core.mail import EmailMessage

    _Base = anymail.backends.amazon_ses.EmailBackend
else:
    _Base = object

#: Seconds; botocore's own, which a deadline may cut.
READ_TIMEOUT = 60.0

# Codes: botocore/data/sesv2/2019-09-27/service-2.json and botocore/retries/standard.py (1.44), and the errors common to
# all actions, https://docs.aws.amazon.com/ses/latest/APIReference-V2/CommonErrors.html (read 2026-11).
_THROTTLED = frozenset(
    {
        "LimitExceededException",
        "RequestLimitExceeded",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "TooManyRequestsException",
    }
)
_UNAVAILABLE = frozenset({"ServiceUnavailable", "ServiceUnavailableException"})
_ACCOUNT = frozenset({"AccountSuspendedException", "SendingPausedException", "OptInRequired"})
_CREDENTIALS = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "NotAuthorized",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
# The status of each entry of a bulk request, same sources.
_BULK_REFUSED = frozenset({"ACCOUNT_THROTTLED", "TRANSIENT_FAILURE"})
_BULK_BLOCKED = frozenset(
    {
        "ACCOUNT_DAILY_QUOTA_EXCEEDED",
        "ACCOUNT_SENDING_PAUSED",
        "ACCOUNT_SUSPENDED",
        "CONFIGURATION_SET_SENDING_PAUSED",
    }
)
_BULK = "BulkEmailEntryResults.*.Status"


class BotocoreRetryMixin(DeliveryMixin, _Base):
    """Retries in botocore's own loop, from the settings that the other back ends use.

    botocore asks after every attempt whether to make another, and is told what the other back ends would do: by the
    same counts, statuses, waits and deadline. On its own it would try again what SES may have taken: after a read
    timeout, a dropped connection, a 500. SES knows no idempotency keys, so here that ends the call, unless
    ``EMAIL_READ_RETRIES`` or ``EMAIL_HTTP_STATUS_RETRYABLE`` ask for it.

    What the user gives in ``AMAZON_SES_CLIENT_PARAMS["config"]`` goes over the timeouts; ``retries`` there are obeyed
    as they stand, and botocore decides. botocore's connections are its own, and there is no circuit breaker, so
    ``EMAIL_CONNECTION_MAX_IDLE``, ``EMAIL_BREAKER_FAILURES`` and ``EMAIL_OTHER_RETRIES`` mean nothing here. Timeouts
    are the client's, and not cut to what is left of the deadline: an attempt that might pass it is not begun.

    :raises ImproperlyConfigured: a setting has the wrong type; names it and the line to write.
    """

    #: What the message that is being sent may still do; None: none is.
    _retry: Retry | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = conf.take_options(conf.TRANSPORT_SETTINGS, kwargs)
        self.retry_policy = RetryPolicy.from_settings(self.esp_name, options)
        super().__init__(*args, **kwargs)
        self._users_config: Config = self.client_params["config"]

    def _config(self) -> Config:
        total, deadline = self.retry_policy.total, self._deadline()
        connect, read = self.retry_policy.connect_timeout, READ_TIMEOUT
        if deadline is not None:
            connect = min(connect, deadline / 2)
            read = min(read, (deadline - connect) / (1 if total == 0 else 2))  # a second try has to fit in, too
        retries: dict[str, Any] = {"mode": "standard"}  # the one that never raises where we want another attempt
        if total is not None:
            retries["total_max_attempts"] = total + 1
        merged: Config = Config(connect_timeout=connect, read_timeout=read, retries=retries).merge(self._users_config)
        return merged

    def open(self) -> bool:
        self.client_params = {**self.client_params, "config": self._config()}
        opened = bool(super().open())
        if self.client is not None and opened:
            # botocore asks here after every attempt. The first answer counts, and whoever raises has the last word.
            self.client.meta.events.register_first("needs-retry.sesv2", self._after_attempt)
        return opened

    def post_to_esp(self, payload: Any, message: EmailMessage) -> Any:
        delivery = current_delivery() or Delivery()  # there is none where someone's own _send calls
        now, deadline = self.retry_clock.monotonic(), self._deadline()
        delivery.began_at, delivery.ends_at = now, None if deadline is None else now + deadline
        call = Call(delivery, self.retry_policy, self, self.esp_name, self.retry_clock, delivery.ends_at)
        if self.client is not None:
            config = self.client.meta.config
            call.shortest_attempt = (config.connect_timeout or 0.0) + (config.read_timeout or 0.0)
        self._retry = retry_for(call)
        try:
            response = super().post_to_esp(payload, message)
        except Exception as error:
            delivery.answer = Answer.of(getattr(error, "response", None))
            raise
        finally:
            self._retry = None
        delivery.answer = Answer.of(response) or Answer(200)  # boto3 raises for every other status
        return response

    def _after_attempt(
        self, *, response: Any, caught_exception: Exception | None, operation: Any, **_: Any
    ) -> float | None:
        """Record the attempt that just ended. Wait, and have botocore make another at once; or raise its error where
        there must not be another."""
        retry = self._retry
        if retry is None:
            return None
        if caught_exception is not None:
            attempt = retry.call.failed(caught_exception)
        else:
            http, parsed = response
            answer = Answer.of(parsed) or Answer(http.status_code)
            attempt = retry.call.answered(http, answer, CaseInsensitiveDict(http.headers))
            if answer.is_2xx:
                return None
        if getattr(self._users_config, "retries", None) is not None:
            return None
        self._retry = retry.after(attempt)
        if self._retry is not None:
            self._retry.sleep()
            return 0.0
        if caught_exception is not None:
            raise caught_exception
        assert self.client is not None  # it is the client that asks
        raise self.client.exceptions.from_code(parsed.get("Error", {}).get("Code"))(parsed, operation.name)


class EmailBackend(FallbackQueueMixin, BotocoreRetryMixin, anymail.backends.amazon_ses.EmailBackend):
    """Anymail's Amazon SES back end with botocore's retries and the fallback queue."""

    # SES answers with codes; its statuses say little (400 for throttling and for a bad request alike).
    refused_statuses = frozenset({429})
    answers = (
        # The quota of the day comes as throttling, which no waiting in the call cures:
        # https://docs.aws.amazon.com/ses/latest/dg/manage-sending-quotas-errors.html (read 2026-11).
        AnswerRule(Verdict.BLOCKED, path="Error.Code", values=_THROTTLED, text="Daily message quota", reason="quota"),
        AnswerRule(Verdict.REFUSED, path="Error.Code", values=_THROTTLED),
        AnswerRule(Verdict.REFUSED, path="Error.Code", values=_UNAVAILABLE),
        AnswerRule(Verdict.BLOCKED, path="Error.Code", values=_ACCOUNT, reason="account"),
        AnswerRule(Verdict.BLOCKED, path="Error.Code", values=_CREDENTIALS, reason="credentials"),
        # A bulk request of which nothing was taken, entry by entry.
        AnswerRule(Verdict.REFUSED, status=200, path=_BULK, values=_BULK_REFUSED, reason="no recipient accepted"),
        AnswerRule(Verdict.BLOCKED, status=200, path=_BULK, values=_BULK_REFUSED | _BULK_BLOCKED, reason="account"),
        AnswerRule(
            Verdict.PERMANENT, status=200, path=_BULK, unless=frozenset({"SUCCESS"}), reason="no recipient accepted"
        ),
    )
    # Where credentials come from did not answer; nothing was sent to SES.
    refused_errors = (CredentialRetrievalError, MetadataRetrievalError, TokenRetrievalError)
    configuration_errors = (NoCredentialsError, PartialCredentialsError)


RetryableAmazonSESEmailBackend = EmailBackend
