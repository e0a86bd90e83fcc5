"""Falling back: what a send leaves in the queue when it fails in a way that time may cure."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from anymail.backends.base import AnymailBaseBackend
from anymail.exceptions import AnymailError, AnymailInvalidAddress
from anymail.message import AnymailRecipientStatus, AnymailStatus
from anymail.utils import parse_address_list
from django.conf import settings

from .. import conf
from ..delivery import Delivery, conclude, deliver
from ..exceptions import MessageNotQueueable
from ..log import get_logger
from ..verdict import Outcome, Verdict
from .database import first_line
from .mailers import find, path_of

if TYPE_CHECKING:
    from django.core.mail import EmailMessage
    from django.core.mail.backends.base import BaseEmailBackend
    from typing_extensions import Self

    from ..models import QueuedMessage

    _Base = AnymailBaseBackend
else:
    _Base = object

logger = get_logger("queue")

#: Seconds that one send may take with the queue on: gunicorn ends a worker at 30, and the row has to be written first.
DEADLINE = 25.0


class Fallback:
    """Sends messages one by one, and keeps in the queue those that may be delivered later.

    :param mailer: the name by which the worker finds the back end again: a ``MAILERS`` alias or a dotted path.
    :param own_options: names of the options that this connection alone was made with. It cannot be made again without
        storing them, and they may be secrets; so its messages are not queued.
    """

    def __init__(self, mailer: str, own_options: Iterable[str] = ()) -> None:
        self.mailer = mailer
        self.own_options = sorted(own_options)

    def send(self, backend: BaseEmailBackend, message: EmailMessage) -> bool:
        """Send one message, or keep it. True if sent or kept, False if there was nothing to send.

        :raises Exception: what sending raised, if keeping it would not help or did not work.
        """
        forget_earlier_send(message)
        delivery = Delivery()
        outcome = deliver(backend, message, delivery)
        wrong_key_in_development = settings.DEBUG and outcome.http_status == 401
        if outcome.error is None or not outcome.may_be_queued or wrong_key_in_development:
            return conclude(backend, message, outcome)
        why_not = self._keep(backend, message, delivery, outcome)
        if why_not is None:
            return True
        logger.error("%s: %s", self.mailer, why_not)
        _add_note(outcome.error, why_not)
        raise outcome.error

    def send_all(
        self,
        messages: Iterable[EmailMessage],
        send: Callable[[EmailMessage], bool],
        *,
        fail_silently: bool,
        anticipated: tuple[type[Exception], ...],
    ) -> int:
        """Try every message; then raise the first failure that could not be kept, or count what was sent or kept.

        :param anticipated: the errors of the back end's own; any other is a programming error, and raised at once.
        """
        count = 0
        first: Exception | None = None
        for message in messages:
            try:
                count += bool(send(message))
            except anticipated as error:
                message.send_error = error  # type: ignore[attr-defined]  # ours, documented
                first = first or error
                status = getattr(error, "status_code", None)
                what = f"{type(error).__name__}{f' (HTTP {status})' if status else ''}"
                logger.error("%s: a send failed and is not queued: %s", self.mailer, what)
        if first is not None and not fail_silently:
            raise first
        return count

    def _keep(
        self, backend: BaseEmailBackend, message: EmailMessage, delivery: Delivery, outcome: Outcome
    ) -> str | None:
        """Store the message; why that was not possible, or None."""
        try:
            from .enqueue import enqueue  # here, because it needs the app registry, and a back end is made without it

            self._check_can_be_made_again(backend)
            status = queued_status(message)
            (row,) = enqueue(
                [message],
                mailer=self.mailer,
                origin="fallback",
                delivery=delivery,
                outcome=outcome,
                close_connection=True,
            )
        except Exception as error:  # whatever it is, the caller is owed the ESP's error and not ours
            return f"The message was not kept in the queue either: {why_not_stored(error)}"
        if outcome.verdict is Verdict.BLOCKED:
            logger.error(
                "%s: the account is blocked (%s): %s",
                self.mailer,
                outcome.http_status or outcome.reason,
                outcome.answer,
            )
        message.send_error = outcome.error  # type: ignore[attr-defined]  # ours, documented
        tell_queued(message, status, row)
        return None

    def _check_can_be_made_again(self, backend: BaseEmailBackend) -> None:
        """See to it that the worker will send by this account, and no other.

        :raises MessageNotQueueable: it would not.
        """
        if self.own_options:
            raise MessageNotQueueable(", ".join(self.own_options), OWN_OPTIONS)
        again = find(self.mailer).make()
        if type(again) is not type(backend):
            why = "the back end of this name is another one. Give this one a name of its own"
            raise MessageNotQueueable(self.mailer, why)
        mine, others = identity(backend), identity(again)
        different = sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name))
        if different:
            raise MessageNotQueueable(", ".join(different), OWN_OPTIONS)


def discreet(what: str) -> str:
    """A part of a message by its name, without the keys on the way to it: they may be addresses."""
    return re.sub(r"\[(?!\d+\]).*\]", "[...]", what)


def why_not_stored(error: Exception) -> str:
    """What an exception of storing says, as a log may hold it."""
    if isinstance(error, MessageNotQueueable):
        return f"{type(error).__name__}: {discreet(error.what)}: {error.why}"
    return f"{type(error).__name__}: {first_line(error)}"


def identity(backend: BaseEmailBackend) -> dict[str, str]:
    """The texts that a back end holds: whom it sends as (accounts, keys), and where to (hosts, URLs)."""
    return dict(_texts({name: value for name, value in vars(backend).items() if not name.startswith("_")}))


def _texts(values: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """The texts in a mapping, and in the mappings in it: boto3's parameters are one."""
    for name, value in values.items():
        if isinstance(value, str):
            yield f"{within}{name}", value
        elif isinstance(value, Mapping):
            yield from _texts(value, f"{within}{name}.")


#: Why a connection with options of its own is not queued for.
OWN_OPTIONS = (
    "this connection was made with options of its own, which are not stored because they may be secrets. Give that"
    " account an alias in MAILERS, or a subclass of the back end that is made for it in every process alike"
)


#: What parsing would only give back as it is, for a fifth of the time that storing takes.
PLAIN_ADDRESS = re.compile(r"[a-zA-Z0-9_+-]+(\.[a-zA-Z0-9_+-]+)*@[a-zA-Z0-9-]+(\.[a-zA-Z0-9-]+)+")


def queued_status(message: EmailMessage) -> AnymailStatus:
    """What Anymail's users read after a send: "queued" for each recipient."""
    recipients = [str(address) for address in message.recipients()]
    try:
        if all(map(PLAIN_ADDRESS.fullmatch, recipients)):
            addresses = recipients
        else:
            addresses = [str(address.addr_spec) for address in parse_address_list(recipients)]
    except AnymailInvalidAddress:  # a local mailbox ("root"), which Anymail has no use for and SMTP has
        addresses = recipients
    status = AnymailStatus()
    status.set_recipient_status({address: AnymailRecipientStatus(None, "queued") for address in addresses})
    return status


def forget_earlier_send(message: EmailMessage) -> None:
    """Take off a message what an earlier send of the same object left on it."""
    for name in ("queued_message", "send_error"):
        message.__dict__.pop(name, None)


def tell_queued(message: EmailMessage, status: AnymailStatus, row: QueuedMessage) -> None:
    """Leave on the caller's message that it waits in the queue, and nothing else."""
    message.anymail_status = status  # type: ignore[attr-defined]  # Anymail's
    message.queued_message = row  # type: ignore[attr-defined]  # ours, documented


class FallbackQueueMixin(_Base):
    """Keeps in the queue what an Anymail back end could not send. List it before every other mixin.

    On if ``"anymail_retry"`` is in INSTALLED_APPS and ``EMAIL_FALLBACK_QUEUE`` is not ``False``. A good send costs no
    SQL at all.

    :raises ImproperlyConfigured: ``EMAIL_FALLBACK_QUEUE = True`` without the app; says what line to add.
    """

    #: None: off. The worker switches it off on the back ends it makes, so that a drain never makes a row.
    fallback: Fallback | None = None
    #: Names of the options that this object alone was made with. A subclass's own are the same each time.
    own_options: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        if AnymailBaseBackend not in mro:
            return  # a mixin's mixin
        after = mro[mro.index(FallbackQueueMixin) :]
        before = [base for base in mro[1 : len(mro) - len(after)] if not issubclass(base, FallbackQueueMixin)]
        # What delivers has to come after: it asks the mixins and back ends that follow it, and not the queue.
        if any(hasattr(base, "deliver") or issubclass(base, AnymailBaseBackend) for base in before) or not any(
            hasattr(base, "deliver") for base in after
        ):
            raise TypeError(
                f"{cls.__name__} needs its bases in this order:"
                f" class {cls.__name__}(FallbackQueueMixin, RetryMixin, EmailBackend)"
            )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Before __init__, in which a subclass adds options.
        backend = super().__new__(cls)
        backend.own_options = options_of_its_own(kwargs)
        return backend

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = conf.take_options(conf.MAILER_SETTINGS, kwargs)
        self._queue_is_on = conf.fallback_is_on(esp_name=self.esp_name, options=options)
        super().__init__(*args, **kwargs)
        if self._queue_is_on:
            self.fallback = Fallback(mailer_name(self), self.own_options)

    def default_deadline(self) -> float | None:
        """Seconds that one send may take where the user did not say: 25 with the queue on."""
        if self.fallback is not None:
            return DEADLINE
        deadline: float | None = super().default_deadline()  # type: ignore[misc]  # of the mixin that retries
        return deadline

    def breaker_is_on_by_default(self) -> bool:
        """Also in the worker, whose mailer then pauses."""
        return self._queue_is_on and not self.own_options  # whose messages are not queued

    def send_messages(self, email_messages: Iterable[EmailMessage]) -> int:
        if self.fallback is None or not email_messages:
            return int(super().send_messages(email_messages))
        opened = self.open()
        try:
            return self.fallback.send_all(
                email_messages, self._send, fail_silently=self.fail_silently, anticipated=(AnymailError, OSError)
            )
        finally:
            if opened:
                self.close()

    def _send(self, message: EmailMessage) -> bool:
        if self.fallback is None:
            return bool(super()._send(message))
        return self.fallback.send(self, message)


#: Options that say how this object tries, and not who it is: the worker's way of trying does as well.
_HOW_TO_TRY = frozenset({"fail_silently", "fallback_queue", *(setting.option for setting in conf.TRANSPORT_SETTINGS)})


def options_of_its_own(kwargs: Mapping[str, Any]) -> frozenset[str]:
    """The names of the keywords that only this connection was made with, and that make another of it.

    What stands in ``MAILERS`` can be read again there. Django's ``send_mail()`` passes a username and a password of
    None before 6.1.
    """
    return frozenset(
        name
        for name in conf.own_keywords(kwargs) - _HOW_TO_TRY
        if not (name in ("username", "password") and kwargs.get(name) is None)
    )


def mailer_name(backend: BaseEmailBackend) -> str:
    """The name by which the worker finds this back end: its ``MAILERS`` alias, or its class's dotted path."""
    alias = getattr(backend, "alias", None)
    return alias if alias is not None else path_of(type(backend))


def _add_note(error: BaseException, note: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.args = (*error.args, note)
