"""What is mixed into an Anymail back end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from anymail.backends.base import AnymailBaseBackend
from anymail.backends.base_requests import AnymailRequestsBackend
from anymail.exceptions import AnymailError
from anymail.message import AnymailRecipientStatus
from anymail.utils import parse_address_list

from .. import conf, idempotency
from ..conf import Unset
from ..delivery import Delivery, conclude, current_delivery, deliver, deliver_by_anymail
from ..verdict import Answer, EspFacts, Outcome, causes
from .adapter import RetryAdapter
from .breaker import Breaker, breaker
from .clock import SYSTEM_CLOCK, Clock
from .policy import RetryPolicy
from .session import follow_as_post, read_environment_once

if TYPE_CHECKING:
    import requests
    from django.core.mail import EmailMessage

    _Base = AnymailBaseBackend
    _RequestsBase = AnymailRequestsBackend
else:
    _Base = _RequestsBase = object


class DeliveryMixin(EspFacts, _Base):
    """Turns Anymail's ``_send``, which succeeds or raises, into one that also says what a failure means."""

    retry_policy: RetryPolicy
    #: What waits and deadlines go by.
    retry_clock: Clock = SYSTEM_CLOCK

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        before = [base for base in mro[1 : mro.index(DeliveryMixin)] if issubclass(base, AnymailBaseBackend)]
        if any(not issubclass(base, DeliveryMixin) for base in before):
            raise TypeError(
                f"{cls.__name__} lists the Anymail back end before the retrying mixin, which would do nothing there."
                f" Write: class {cls.__name__}(RetryMixin, EmailBackend)"
            )

    def deliver(self, message: EmailMessage, delivery: Delivery) -> Outcome:
        """Send one message, and say what came of it. Never raises for a send that failed."""
        return deliver_by_anymail(self, super()._send, message, delivery, facts=self)

    def _send(self, message: EmailMessage) -> bool:
        return conclude(self, message, deliver(self, message, Delivery()))

    def default_deadline(self) -> float | None:
        """Seconds that one send may take where the user did not say; None: no limit."""
        return None

    def _deadline(self) -> float | None:
        deadline = self.retry_policy.deadline
        if not isinstance(deadline, Unset):
            return deadline
        if self.retry_policy.waits_for_reads:
            # The first read timeout alone would use up a deadline of ours; the user asked for more than one.
            return None
        return self.default_deadline()

    def run_pre_send(self, message: EmailMessage) -> bool:
        delivery = current_delivery()
        if delivery is not None and delivery.pre_send_done:
            return True
        return bool(super().run_pre_send(message))


class RetryMixin(DeliveryMixin, _RequestsBase):
    """Retries for an Anymail back end that uses requests, by the ``EMAIL_*`` settings.

    List it before the back end::

        class EmailBackend(RetryMixin, anymail.backends.mandrill.EmailBackend):
            pass

    The ready-made back ends in :mod:`anymail_retry.backends` also know what each ESP means by its answers; derive
    from those where you can.

    :raises ImproperlyConfigured: a setting has the wrong type; names it and the line to write.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = conf.take_options(conf.TRANSPORT_SETTINGS, kwargs)
        self.retry_policy = RetryPolicy.from_settings(self.esp_name, options)
        self._breaker_failures = conf.get("BREAKER_FAILURES", esp_name=self.esp_name, options=options)
        self._connection_max_idle = conf.get("CONNECTION_MAX_IDLE", esp_name=self.esp_name, options=options)
        super().__init__(*args, **kwargs)

    def create_session(self) -> requests.Session:
        session: requests.Session = super().create_session()
        max_idle = self._connection_max_idle
        if self.connection_max_idle is not None:
            max_idle = min(max_idle, self.connection_max_idle)
        adapter = RetryAdapter(
            self.retry_policy, facts=type(self), esp_name=self.esp_name, max_idle=max_idle, clock=self.retry_clock
        )
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        follow_as_post(session)
        read_environment_once(session)
        return session

    def default_deadline(self) -> float | None:
        """Anymail's ``requests_timeout``."""
        if isinstance(self.timeout, tuple):
            return None if None in self.timeout else sum(self.timeout)
        timeout: float | None = self.timeout
        return timeout

    def breaker_is_on_by_default(self) -> bool:
        """Whether an open circuit breaker costs nothing here: with a queue to fall back on."""
        return False

    def _breaker(self) -> Breaker | None:
        failures = self._breaker_failures
        if isinstance(failures, Unset):
            failures = 5 if self.breaker_is_on_by_default() else None
        if failures is None:
            return None
        cls = type(self)
        mailer = getattr(self, "alias", None) or f"{cls.__module__}.{cls.__qualname__}"
        return breaker(mailer, urlsplit(self.api_url).netloc, failures, self.retry_clock)

    def post_to_esp(self, payload: Any, message: EmailMessage) -> requests.Response:
        delivery = current_delivery()
        response: requests.Response
        if delivery is None:  # called by someone's own _send
            response = super().post_to_esp(payload, message)
            return response
        if self.idempotency is not None:
            idempotency.apply(self.idempotency, payload, message, delivery)
        circuit = self._breaker()
        if circuit is not None:
            delivery.is_probe = circuit.admit()
            delivery.circuit = circuit
        deadline = self.retry_policy.connect_timeout if delivery.is_probe else self._deadline()
        delivery.began_at = self.retry_clock.monotonic()
        delivery.ends_at = None if deadline is None else delivery.began_at + deadline
        try:
            return self._post(payload, message, delivery)
        finally:
            if circuit is not None and delivery.is_probe:
                circuit.end_probe(tried=bool(delivery.attempts))

    def _post(self, payload: Any, message: EmailMessage, delivery: Delivery) -> requests.Response:
        response: requests.Response
        delivery.is_posting = True
        try:
            response = super().post_to_esp(payload, message)
        except AnymailError as error:
            responses = (_response(cause) for cause in causes(error))
            answered: requests.Response | None = next((found for found in responses if found is not None), None)
            delivery.answer = delivery.answer or Answer.of(answered)
            if answered is not None and self._is_duplicate(delivery):
                return answered
            raise
        finally:
            delivery.is_posting = False
        delivery.answer = delivery.answer or Answer.of(response)
        return response

    def _is_duplicate(self, delivery: Delivery) -> bool:
        """Whether this refusal says that an earlier attempt of this delivery was accepted."""
        spec = self.idempotency
        if spec is None or spec.duplicate is None or delivery.answer is None:
            return False
        return spec.duplicate.matches(delivery.answer) and delivery.was_taken_before

    def parse_recipient_status(self, response: Any, payload: Any, message: EmailMessage) -> Any:
        delivery = current_delivery()
        if delivery is not None and self._is_duplicate(delivery):
            # The ESP has the message and does not repeat its id.
            recipients = parse_address_list(message.recipients())
            return {recipient.addr_spec: AnymailRecipientStatus(None, "queued") for recipient in recipients}
        return super().parse_recipient_status(response, payload, message)


def _response(error: BaseException) -> Any:
    """The HTTP response that hangs on an error. One of a 4xx or 5xx is false, so its truth says nothing."""
    return getattr(error, "response", None)
