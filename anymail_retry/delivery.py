"""One message's way to the ESP: the record that its attempts share, and the one function that makes an attempt."""

from __future__ import annotations

import os
import smtplib
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

from anymail.backends.base import AnymailBaseBackend

from . import signals
from .log import get_logger, is_reporting, reporting
from .verdict import (
    IN_PROGRESS,
    Answer,
    Attempt,
    EspFacts,
    Outcome,
    Phase,
    Verdict,
    excerpt,
    is_of_the_system,
    judge_delivery,
    phase_of,
    with_the_past,
)

if TYPE_CHECKING:
    from django.core.mail import EmailMessage
    from django.core.mail.backends.base import BaseEmailBackend


logger = get_logger("transport")


#: Where Anymail's back ends keep the options that are secret.
SECRETS = ("api_key", "api_token", "password", "secret_key", "server_token")

#: Seconds before the end of its window in which a key is no longer relied on: a request takes time to arrive (twice the
#: default connect timeout), and clocks differ.
KEY_MARGIN = 10.0

#: The reason where a back end said that it sent nothing, and not why.
NOTHING_SENT = "says it sent nothing"


def new_key() -> str:
    """A UUID4 in text: the one form that suits the grammar of every ESP that takes keys.

    Not by ``uuid.uuid4()``, which tests replace to foresee the ids that Anymail makes.
    """
    return str(uuid.UUID(bytes=os.urandom(16), version=4))


def utc_now() -> datetime:
    """This host's time."""
    return datetime.now(timezone.utc)


class Circuit(Protocol):
    """What a delivery needs to know of a circuit breaker."""

    @property
    def is_open(self) -> bool: ...

    def count(self, attempt: Attempt) -> None: ...


@dataclass
class Delivery:
    """One ``send()`` and the queue row that it may leave.

    The fields of the first group are what a row keeps from one attempt to the next.
    """

    #: The idempotency key in force. Whether the ESP takes one is its back end's matter.
    key: str = field(default_factory=new_key)
    key_from_user: bool = False
    #: Since when the ESP may have the message: the start of the first AMBIGUOUS attempt, whatever its key was.
    maybe_taken_since: datetime | None = None
    #: Since when the ESP may know this key: the start of the first AMBIGUOUS attempt under it.
    key_used_since: datetime | None = None
    #: SHA-256 of the first request body, where the ESP compares bodies; in the first of ``digest_forms``.
    body_digest: str | None = None

    #: What a SHA-256 may look like in ``body_digest``, first as it is written now; None: as it is. Whoever encrypts
    #: what is stored gives this.
    digest_forms: Callable[[str], tuple[str, ...]] | None = field(default=None, repr=False, compare=False)
    #: What its times go by. The queue brings the database's clock, which all hosts share.
    now: Callable[[], datetime] = field(default=utc_now, repr=False, compare=False)
    #: The message is as ``pre_send`` left it: do not fire ``pre_send`` again.
    pre_send_done: bool = False
    #: Every attempt of the present call.
    attempts: list[Attempt] = field(default_factory=list)
    #: The answer to the present call's last attempt, if a status line arrived.
    answer: Answer | None = None
    #: When the present call began to send, by the transport's clock; None: it has not.
    began_at: float | None = None
    #: When the present call has to end, by the transport's clock; None: never.
    ends_at: float | None = None
    #: The request that carries the message is under way.
    is_posting: bool = False
    #: The present call finds out whether an outage is over: one attempt, no retries.
    is_probe: bool = False
    #: What is told of each attempt of the present call, and says whether another is worth making; None: nothing.
    circuit: Circuit | None = None

    def key_is_live(self, window: float | None, now: datetime | None = None) -> bool:
        """Whether the ESP would still recognise the key: it takes keys, and nothing was taken under it longer ago
        than ``window`` seconds, by the time a request begun now arrives."""
        if window is None:
            return False
        return self.key_used_since is None or self.key_age(now) + KEY_MARGIN < window

    def key_age(self, now: datetime | None = None) -> float:
        """Seconds since when the ESP may know the key; 0 if it cannot."""
        if self.key_used_since is None:
            return 0.0
        return ((now or self.now()) - self.key_used_since).total_seconds()

    def is_protected(self, window: float | None, now: datetime | None = None) -> bool:
        """Whether sending it once more cannot make it arrive twice: the key is live, and whatever may have been taken
        was taken under it."""
        return self.key_is_live(window, now) and not self.was_taken_under_another_key

    @property
    def was_taken_under_another_key(self) -> bool:
        """Whether the first attempt that may have been taken was made under a key that has been replaced since."""
        return self.maybe_taken_since is not None and self.maybe_taken_since != self.key_used_since

    @property
    def was_taken_before(self) -> bool:
        """Whether an earlier attempt under this key may have been taken, or the key is the user's and says so."""
        return (
            self.key_from_user
            or self.key_used_since is not None
            or any(attempt.verdict is Verdict.AMBIGUOUS for attempt in self.attempts)
        )

    def renew_key(self) -> None:
        """Take a new key, under which nothing has been taken yet. A key of the user's stays."""
        if not self.key_from_user:
            self.key = new_key()
            self.key_used_since = None
            self.body_digest = None

    def remember(self, began: datetime) -> None:
        """An attempt that began then may have been taken."""
        self.maybe_taken_since = self.maybe_taken_since or began
        self.key_used_since = self.key_used_since or began

    @contextmanager
    def call(self, facts: type[EspFacts] | EspFacts) -> Iterator[None]:
        """One call of a back end: everything below it, down to the HTTP adapter, finds this delivery by
        :func:`current_delivery`."""
        spec = facts.idempotency
        if spec is not None and not self.key_is_live(spec.window):
            self.renew_key()
        self.attempts, self.answer, self.began_at, self.ends_at = [], None, None, None
        self.is_probe, self.is_posting, self.circuit = False, False, None
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def judge(
        self,
        facts: type[EspFacts] | EspFacts,
        *,
        error: Exception | None,
        statuses: list[str | None] | None,
        began: datetime,
        secrets: Collection[str] = (),
    ) -> Outcome:
        """The outcome of the call that just ended. Leaves in this record what the next attempt has to know."""
        spec = facts.idempotency
        taken_under_another_key = self.was_taken_under_another_key
        ambiguous_now = any(attempt.verdict is Verdict.AMBIGUOUS for attempt in self.attempts)
        outcome = judge_delivery(
            facts,
            error=error,
            answer=self.answer,
            statuses=statuses,
            attempts=tuple(self.attempts),
            maybe_taken=ambiguous_now or self.key_used_since is not None,
            key_is_live=self.key_is_live(spec.window if spec else None),
            key_from_user=self.key_from_user,
            secrets=secrets,
        )
        if outcome.verdict is Verdict.AMBIGUOUS:
            self.remember(began)
        elif (
            outcome.verdict in (Verdict.REFUSED, Verdict.BLOCKED)
            and outcome.http_status is not None
            and outcome.reason != IN_PROGRESS
        ):
            # An ESP may count a refused request as the use of its key; nothing was taken, so a new one is safe,
            # unless another request under this key is still being worked on.
            self.renew_key()
        return with_the_past(outcome, taken_under_another_key, key_is_live=False)


_current: ContextVar[Delivery | None] = ContextVar("anymail_retry_delivery", default=None)


def current_delivery() -> Delivery | None:
    """The delivery that this thread is in the middle of."""
    return _current.get()


def deliver(backend: BaseEmailBackend, message: EmailMessage, delivery: Delivery) -> Outcome:
    """Send one message through any Django e-mail back end, once, and say what came of it.

    Never raises for a send that failed: the exception is ``outcome.error``. Sets ``message.retry_history``: every
    :class:`~anymail_retry.verdict.Attempt` of this call.
    """
    own = getattr(backend, "deliver", None)
    if own is not None:
        outcome: Outcome = own(message, delivery)
    elif isinstance(backend, AnymailBaseBackend):
        outcome = _deliver_by_plain_anymail(backend, message, delivery)
    else:
        outcome = _deliver_foreign(backend, message, delivery)
    message.retry_history = outcome.attempts  # type: ignore[attr-defined]  # ours, documented
    return outcome


def conclude(backend: Any, message: EmailMessage, outcome: Outcome) -> bool:
    """What the direct path gives its caller: True if sent, False if there was nothing to send.

    :raises Exception: whatever sending raised.
    """
    if outcome.error is not None:
        raise outcome.error
    if outcome.reason == NOTHING_SENT:
        logger.warning("%s %s, and not why", _name(backend), NOTHING_SENT)
        return False
    if outcome.verdict not in (None, Verdict.DELIVERED):
        # Anymail raises nothing here, and returns 1, so neither do we; but silent it is not.
        logger.warning("%s accepted the message for no recipient: %s", _name(backend), outcome.reason)
        if not is_reporting():
            with reporting():
                signals.message_failed.send_robust(type(backend), message=message, queued_message=None, outcome=outcome)
    return outcome.verdict is not None


def _name(backend: Any) -> str:
    return str(getattr(backend, "esp_name", None) or type(backend).__module__)


def deliver_by_anymail(
    backend: AnymailBaseBackend,
    send: Callable[[EmailMessage], bool],
    message: EmailMessage,
    delivery: Delivery,
    *,
    facts: type[EspFacts] | EspFacts = EspFacts,
) -> Outcome:
    """Send through an Anymail back end, by its ``_send``; see :func:`deliver`."""
    began = delivery.now()
    error: Exception | None = None
    sent: bool = False
    opened = False
    status_before = getattr(message, "anymail_status", None)
    with delivery.call(facts):
        try:
            opened = bool(backend.open())
            sent = send(message)
        except Exception as caught:
            error = caught
        finally:
            if opened:
                backend.close()
    if error is None and not sent:
        return Outcome(None, "cancelled")
    status = getattr(message, "anymail_status", None)
    # Anymail makes a new one for each send; one that was there before speaks of an earlier send.
    recipients = None
    if status is not None and status is not status_before and status.status is not None:
        recipients = status.recipients
    if delivery.answer is None:  # no adapter of ours took part
        delivery.answer = Answer.of(getattr(error, "response", None))
        if delivery.answer is None and recipients is not None:
            delivery.answer = Answer.of(getattr(status, "esp_response", None))
        if delivery.answer is None and (error is None or recipients is not None):
            delivery.answer = Answer(200)  # whatever it was that answered, Anymail understood it
    statuses = None if recipients is None else [recipient.status for recipient in recipients.values()]
    return delivery.judge(facts, error=error, statuses=statuses, began=began, secrets=secrets_of(backend))


def secrets_of(backend: Any) -> list[str]:
    """What rows and logs must not quote of a back end."""
    options = getattr(backend, "__dict__", {})  # of somebody else's too, whose properties are not to be run
    values = [options.get(name) for name in SECRETS]
    return [value for value in values if isinstance(value, str) and value]


def _deliver_by_plain_anymail(backend: AnymailBaseBackend, message: EmailMessage, delivery: Delivery) -> Outcome:
    """Send through an Anymail back end that is not one of ours."""
    if not delivery.pre_send_done:
        return deliver_by_anymail(backend, backend._send, message, delivery)
    backend.run_pre_send = lambda message: True  # type: ignore[method-assign]  # for this send of this object alone
    try:
        return deliver_by_anymail(backend, backend._send, message, delivery)
    finally:
        del backend.run_pre_send


def _deliver_foreign(backend: BaseEmailBackend, message: EmailMessage, delivery: Delivery) -> Outcome:
    """Send through a back end that knows nothing of us.

    ``open()`` is called here, because a failure before the connection stands is the one phase that can be told
    apart; and the connection is closed after any failure, because Django's SMTP back end stays broken otherwise.
    """
    began = delivery.now()
    opened = False
    error: Exception | None = None
    sent: Any = None
    delivery.attempts, delivery.answer = [], None
    try:
        backend.open()
        opened = True
        sent = backend.send_messages([message])
    except Exception as caught:
        error = caught
        _close(backend)
    if error is None:
        if sent is None or sent:  # a back end that says nothing is taken at its word
            return Outcome(Verdict.DELIVERED)
        if not message.recipients():
            return Outcome(None, "cancelled")
        # Without an error there is nothing to go by; only a person can find out.
        return Outcome(Verdict.AMBIGUOUS, NOTHING_SENT, hold=True)
    taken_before = delivery.maybe_taken_since is not None
    delivery.answer = Answer.of(getattr(error, "response", None))  # of an HTTP API, by requests or boto3
    attempt = _foreign_attempt(error, opened=opened) if delivery.answer is None else None
    if attempt is None:
        return delivery.judge(EspFacts, error=error, statuses=None, began=began, secrets=secrets_of(backend))
    delivery.attempts.append(attempt)
    if attempt.verdict is Verdict.AMBIGUOUS:
        delivery.remember(began)
    outcome = Outcome(
        attempt.verdict,
        reason=attempt.error,
        error=error,
        answer=excerpt(_smtp_words(error), secrets_of(backend)),
        attempts=(attempt,),
    )
    return with_the_past(outcome, taken_before, key_is_live=False)


def _foreign_attempt(error: Exception, *, opened: bool) -> Attempt | None:
    """The attempt that ended in this error of smtplib's, the network's or this machine's; None if it is of neither.

    A drop at MAIL and a drop after DATA raise the same ``SMTPServerDisconnected``, so whatever ended the send
    without a reply code may have been taken.
    """
    name = type(error).__name__
    if not is_of_the_system(error):
        return None
    codes: list[int]
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
    elif isinstance(error, smtplib.SMTPResponseException):
        codes = [error.smtp_code]
    elif opened and isinstance(error, smtplib.SMTPNotSupportedError):
        return Attempt(Phase.CONNECT, Verdict.PERMANENT, error=name)
    elif opened and phase_of(error) in (Phase.SENT, None):
        return Attempt(Phase.SENT, Verdict.AMBIGUOUS, error=name)
    else:
        verdict = Verdict.BLOCKED if phase_of(error) is Phase.CERTIFICATE else Verdict.REFUSED
        return Attempt(Phase.CONNECT, verdict, error=name)
    if opened and not all(400 <= code < 600 for code in codes):
        return Attempt(Phase.SENT, Verdict.AMBIGUOUS, error=name)  # smtplib's -1: no code could be read
    phase = Phase.ANSWERED if opened else Phase.CONNECT
    status = codes[0] if codes else None
    if isinstance(error, smtplib.SMTPAuthenticationError) and not all(400 <= code < 500 for code in codes):
        return Attempt(phase, Verdict.BLOCKED, status, name)
    if not opened or any(400 <= code < 500 for code in codes):
        # RFC 5321, 4.2.1: 4yz is a transient negative reply. One recipient's is enough: nobody was accepted.
        return Attempt(phase, Verdict.REFUSED, status, name)
    return Attempt(phase, Verdict.PERMANENT, status, name)


def _smtp_words(error: Exception) -> str:
    reply = getattr(error, "smtp_error", None)
    return reply.decode("ascii", "replace") if isinstance(reply, bytes) else str(error)


def _close(backend: BaseEmailBackend) -> None:
    try:
        backend.close()
    except Exception:  # noqa: S110  # the failure that led here is the one to report
        pass
