"""What the tests of the queue's engine share: back ends that do as they are told, and rows to work on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from django.core.mail import EmailMessage
from django.core.mail.backends.base import BaseEmailBackend
from django.db import connection, connections
from django.test.utils import CaptureQueriesContext

from anymail_retry.idempotency import IdempotencyKey
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.models import QueuedMessage
from anymail_retry.verdict import Attempt, Outcome, Phase, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anymail_retry.delivery import Delivery

T = TypeVar("T")

#: Seconds that a test waits for what should happen at once, on a machine that is busy with other things.
PATIENCE = 60.0

#: Mailers, by the dotted paths of the back ends below; such names mean the same with and without MAILERS.
PLAIN = "tests.mailqueue.engine.PlainBackend"
OTHER = "tests.mailqueue.engine.OtherBackend"
KEYED = "tests.mailqueue.engine.KeyedBackend"
BROKEN = "tests.mailqueue.engine.BrokenBackend"

DELIVERED = Outcome(Verdict.DELIVERED, http_status=200)
REFUSED = Outcome(Verdict.REFUSED, "busy", http_status=503, attempts=(Attempt(Phase.ANSWERED, Verdict.REFUSED),))
UNREACHABLE = Outcome(Verdict.REFUSED, "connect", attempts=(Attempt(Phase.CONNECT, Verdict.REFUSED),))
AMBIGUOUS = Outcome(Verdict.AMBIGUOUS, "sent", attempts=(Attempt(Phase.SENT, Verdict.AMBIGUOUS),))
BLOCKED = Outcome(Verdict.BLOCKED, "bad key", http_status=401, answer="Invalid API key")
PERMANENT = Outcome(Verdict.PERMANENT, "bad address", http_status=422, answer="no such address")
CANCELLED = Outcome(None, "cancelled")

Behaviour = Callable[[EmailMessage, "Delivery"], Outcome]


@dataclass
class Send:
    """One send, as a back end saw it."""

    subject: str
    key: str
    thread: str
    backend: BaseEmailBackend
    pre_send_done: bool
    message: EmailMessage


@dataclass
class Script:
    """What the back ends below do, and what they did."""

    sends: list[Send] = field(default_factory=list)
    opened: list[BaseEmailBackend] = field(default_factory=list)
    closed: list[BaseEmailBackend] = field(default_factory=list)
    behaviour: Behaviour = lambda message, delivery: DELIVERED
    lock: Any = field(default_factory=threading.Lock)

    def by_subject(self, outcomes: dict[str, Outcome], default: Outcome = DELIVERED) -> None:
        """Outcomes by the first word of the subject."""
        self.behaviour = lambda message, delivery: outcomes.get(str(message.subject).split()[0], default)

    def deliver(self, backend: BaseEmailBackend, message: EmailMessage, delivery: Delivery) -> Outcome:
        send = Send(
            str(message.subject),
            delivery.key,
            threading.current_thread().name,
            backend,
            delivery.pre_send_done,
            message,
        )
        with self.lock:
            self.sends.append(send)
        outcome = self.behaviour(message, delivery)
        if outcome.verdict is Verdict.AMBIGUOUS:
            delivery.remember(delivery.now())
        return outcome

    @property
    def subjects(self) -> list[str]:
        return [send.subject for send in self.sends]


#: Set anew for each test, by a fixture.
script = Script()


class PlainBackend(BaseEmailBackend):
    def open(self) -> bool:
        script.opened.append(self)
        return True

    def close(self) -> None:
        script.closed.append(self)

    def deliver(self, message: EmailMessage, delivery: Delivery) -> Outcome:
        return script.deliver(self, message, delivery)


class OtherBackend(PlainBackend):
    """A second mailer."""


class KeyedBackend(PlainBackend):
    """An ESP that takes idempotency keys, for an hour."""

    idempotency = IdempotencyKey("header", "Idempotency-Key", window=3600, grammar=".+")


class BrokenBackend(PlainBackend):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this account is not set up")


# --- rows ---


def mail(subject: str = "Subject", to: str = "to@example.com", **attributes: Any) -> EmailMessage:
    message = EmailMessage(subject, "Body", "from@example.com", [to])
    for name, value in attributes.items():
        setattr(message, name, value)
    return message


def queue(*subjects: str, mailer: str = PLAIN, **attributes: Any) -> list[QueuedMessage]:
    """Queue one message per subject; attributes are the messages' own."""
    return enqueue(
        [mail(subject, **attributes) for subject in subjects or ("Subject",)], mailer=mailer, origin="queued"
    )


def change(row: QueuedMessage, **values: Any) -> QueuedMessage:
    """Write to a row behind the engine's back."""
    QueuedMessage.objects.filter(pk=row.pk).update(**values)
    row.refresh_from_db()
    return row


def past(seconds: float = 3600.0) -> datetime:
    return datetime.now(timezone.utc) - timedelta(seconds=seconds)


def future(seconds: float = 3600.0) -> datetime:
    return past(-seconds)


def make_due() -> None:
    """Everything that waits, at once."""
    QueuedMessage.objects.filter(state__in=("queued", "deferred")).update(due_at=past())


def end_leases() -> None:
    """As if every worker had died a while ago."""
    QueuedMessage.objects.filter(state="sending").update(due_at=past(1))


def states() -> dict[str, str]:
    """The state of each row, by subject."""
    return dict(QueuedMessage.objects.values_list("subject", "state"))


# --- statements ---


@contextmanager
def statements() -> Iterator[list[str]]:
    """The SQL statements of a block, without those that begin and end transactions."""
    found: list[str] = []
    with CaptureQueriesContext(connection) as captured:
        yield found
    control = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "SET ")
    found += [query["sql"] for query in captured.captured_queries if not query["sql"].upper().startswith(control)]


# --- threads with connections of their own ---


def in_threads(*work: Callable[[], T]) -> list[T]:
    """Run each in a thread of its own, all at the same time, and give back what they return."""
    results: list[Any] = [None] * len(work)
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(place: int) -> None:
        try:
            start.wait(PATIENCE)
            results[place] = work[place]()
        except BaseException as error:
            errors.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 4)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results
