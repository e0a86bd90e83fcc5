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

from .. import conf
from ..conf import Unset
from ..delivery import current_delivery
from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.clock import SYSTEM_CLOCK, Clock
from ..transport.mixins import DeliveryMixin
from ..transport.policy import RetryPolicy
from ..verdict import PHASE_VERDICT, Answer, AnswerRule, Attempt, Phase, Verdict, judge_answer, phase_of

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
    """Retries by botocore's own mechanism, from the settings that the other back ends use.

    ``EMAIL_TOTAL_RETRIES`` (in place of ``AWS_MAX_ATTEMPTS``), ``EMAIL_CONNECT_TIMEOUT`` and the deadline become a
    botocore ``Config``; what the user gives in ``AMAZON_SES_CLIENT_PARAMS["config"]`` goes over it. botocore counts
    retries of all kinds together, and its waits are its own.

    botocore would also try again what SES may have taken: after a read timeout, a dropped connection, a 500. SES knows
    no idempotency keys, so here that ends the call, unless ``EMAIL_READ_RETRIES`` or ``EMAIL_HTTP_STATUS_RETRYABLE``
    ask for it, or the user's own ``Config`` has ``retries``, which then are obeyed as they stand.

    :raises ImproperlyConfigured: a setting has the wrong type; names it and the line to write.
    """

    #: What deadlines go by.
    retry_clock: Clock = SYSTEM_CLOCK

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = conf.take_options(conf.TRANSPORT_SETTINGS, kwargs)
        self.retry_policy = RetryPolicy.from_settings(self.esp_name, options)
        super().__init__(*args, **kwargs)
        self._users_config: Config = self.client_params["config"]

    def default_deadline(self) -> float | None:
        """Seconds that one send may take where the user did not say: None, as in botocore."""
        return None

    def _deadline(self) -> float | None:
        deadline = self.retry_policy.deadline
        if not isinstance(deadline, Unset):
            return deadline
        return None if self.retry_policy.waits_for_reads else self.default_deadline()

    def _config(self) -> Config:
        options: dict[str, Any] = {"connect_timeout": self.retry_policy.connect_timeout}
        if self.retry_policy.total is not None:
            options["retries"] = {"mode": "standard", "total_max_attempts": self.retry_policy.total + 1}
        deadline = self._deadline()
        if deadline is not None:
            options["read_timeout"] = min(deadline, READ_TIMEOUT)
        merged: Config = Config(**options).merge(self._users_config)
        return merged

    def open(self) -> bool:
        self.client_params = {**self.client_params, "config": self._config()}
        opened = bool(super().open())
        if self.client is not None and opened:
            # botocore asks here after every attempt; whoever raises has the last word.
            self.client.meta.events.register_first("needs-retry.sesv2", self._after_attempt)
        return opened

    def post_to_esp(self, payload: Any, message: EmailMessage) -> Any:
        delivery = current_delivery()
        if delivery is None:  # called by someone's own _send
            return super().post_to_esp(payload, message)
        deadline = self._deadline()
        delivery.ends_at = None if deadline is None else self.retry_clock.monotonic() + deadline
        try:
            response = super().post_to_esp(payload, message)
        except Exception as error:
            delivery.answer = Answer.of(getattr(error, "response", None))
            raise
        delivery.answer = Answer.of(response) or Answer(200)  # boto3 raises for every other status
        return response

    def _after_attempt(self, *, response: Any, caught_exception: Exception | None, operation: Any, **_: Any) -> None:
        """Record the attempt that just ended; raise its error where there must not be another."""
        delivery = current_delivery()
        if delivery is None:
            return
        answer = Answer.of(response[1]) if response is not None else None
        if answer is not None:
            attempt = Attempt(Phase.ANSWERED, judge_answer(answer, self)[0], status=answer.status)
        else:
            phase = (phase_of(caught_exception) if caught_exception is not None else None) or Phase.SENT
            attempt = Attempt(phase, PHASE_VERDICT[phase], error=type(caught_exception).__name__)
        delivery.attempts.append(attempt)
        if attempt.verdict is Verdict.DELIVERED or self._may_be_tried_again(attempt, delivery.ends_at):
            return
        if caught_exception is not None:
            raise caught_exception
        parsed = response[1]
        assert self.client is not None  # it is the client that asks
        raise self.client.exceptions.from_code(parsed.get("Error", {}).get("Code"))(parsed, operation.name)

    def _may_be_tried_again(self, attempt: Attempt, ends_at: float | None) -> bool:
        policy = self.retry_policy
        if getattr(self._users_config, "retries", None) is not None:
            return True
        if ends_at is not None and self.retry_clock.monotonic() >= ends_at:
            return False
        if attempt.phase is Phase.SENT:
            return policy.waits_for_reads
        if attempt.status is not None and not isinstance(policy.status_forcelist, Unset):
            return attempt.status in policy.status_forcelist or attempt.verdict is Verdict.REFUSED
        return attempt.verdict is Verdict.REFUSED


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
