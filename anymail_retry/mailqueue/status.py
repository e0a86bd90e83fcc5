"""How the queue stands: for people, for health views and for monitoring.

What is asked often reads the claims' index ``(mailer, priority, due_at)``, and so costs the same whether a thousand
rows lie in the table or a million: :func:`glance` reads a few entries for each mailer, :func:`remaining` a bounded
number. How many rows are in which state no index tells, since each further one would be paid for at every claim and
settle: :func:`status` reads the whole table, once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import Count, Min, Q

from ..models import MailerState, QueuedMessage
from . import gate
from .claim import mailers_with_rows
from .clock import clock_of
from .database import queue_database
from .states import WAITING, Priority, State

#: How many due messages :func:`remaining` counts, and how many others; then it says that there are more.
COUNTED = 10_000

#: But of each mailer and priority it reads so many that are not due: those that are being sent are the first of them.
READ = 1000


@dataclass(frozen=True)
class Glance:
    """One mailer, as far as the index tells."""

    mailer: str
    #: The database's time.
    read_at: datetime
    #: Since when the mail is due that no worker has taken for the longest time; None: none is due.
    oldest_due_at: datetime | None
    #: When mail that waits will be due next; None: none waits for its time.
    next_due_at: datetime | None
    #: None: running. A time that has passed: the next message is a probe, which ends the pause or prolongs it.
    paused_until: datetime | None
    pause_reason: str

    @property
    def oldest_due_seconds(self) -> float:
        """For how long the oldest due mail has been due; 0: none is."""
        return 0.0 if self.oldest_due_at is None else (self.read_at - self.oldest_due_at).total_seconds()

    @property
    def is_paused(self) -> bool:
        return self.paused_until is not None and self.paused_until > self.read_at


@dataclass(frozen=True)
class MailerStatus(Glance):
    """One mailer, with how many of its messages are in which state."""

    #: By state; each of them is there.
    counts: Mapping[str, int]
    #: That a worker may take now, those whose lease ended included.
    due: int
    #: Whose worker died, or lost them.
    lease_ended: int


@dataclass(frozen=True)
class Remaining:
    """What is left to send."""

    #: Messages that no worker has, due or not.
    waiting: int
    #: Of these, those that are due.
    due: int
    #: Messages that a worker has now.
    being_sent: int
    #: When the next of those will be due that are not.
    next_due_at: datetime | None
    #: The database's time.
    read_at: datetime
    #: False: there are more than the numbers say, and no more were counted.
    is_exact: bool


def glance(only: Collection[str] | None = None, *, alias: str | None = None) -> list[Glance]:
    """How late the mail of each mailer is, and whether it pauses. Cheap at any size of the queue.

    :param only: names of mailers; None: all that have rows, or pause.
    :param alias: of the database; default: the queue's.
    """
    alias = alias or queue_database()
    now = clock_of(alias).now()
    states = gate.read(alias)
    return [_glance(alias, name, states.get(name), now) for name in _names(alias, states.values(), only)]


def status(only: Collection[str] | None = None, *, alias: str | None = None) -> list[MailerStatus]:
    """The same as :func:`glance`, and how many messages are in which state. Reads the whole table.

    :param only: names of mailers; None: all that have rows, or pause.
    :param alias: of the database; default: the queue's.
    """
    alias = alias or queue_database()
    found = glance(only, alias=alias)
    if not found:
        return []
    counts = {one.mailer: dict.fromkeys(State.values, 0) for one in found}
    due, lease_ended = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    for mailer, state, number, number_due in _counted(alias, found[0].read_at):
        if mailer in counts:
            counts[mailer][state] = number
            due[mailer] += number_due
            lease_ended[mailer] += number_due if state == State.SENDING else 0
    return [
        MailerStatus(**vars(one), counts=counts[one.mailer], due=due[one.mailer], lease_ended=lease_ended[one.mailer])
        for one in found
    ]


def remaining(only: Collection[str] | None = None, *, alias: str | None = None) -> Remaining:
    """What is left to send, counted up to :data:`COUNTED`. Cheap at any size of the queue.

    :param only: names of mailers; None: all.
    :param alias: of the database; default: the queue's.
    """
    alias = alias or queue_database()
    now = clock_of(alias).now()
    due = later = being_sent = 0
    nexts: list[datetime] = []
    for name in _names(alias, (), only):
        for rows in _by_priority(alias, name):
            due += _due(rows, now)[: COUNTED + 1 - due].count()
            found = _later(rows, now)[: max(COUNTED + 1 - later, READ)].aggregate(
                number=Count("pk"),
                sending=Count("pk", filter=Q(state=State.SENDING)),
                next=Min("due_at", filter=Q(state__in=WAITING)),
            )
            later += found["number"]
            being_sent += found["sending"]
            nexts += [found["next"]] if found["next"] else []
    return Remaining(
        waiting=due + later - being_sent,
        due=due,
        being_sent=being_sent,
        next_due_at=min(nexts, default=None),
        read_at=now,
        is_exact=max(due, later) <= COUNTED,
    )


def _names(alias: str, states: Iterable[MailerState], only: Collection[str] | None) -> list[str]:
    names = {*mailers_with_rows(alias), *(state.alias for state in states if state.paused_until is not None)}
    return sorted(names if only is None else names.intersection(only))


def _glance(alias: str, mailer: str, state: MailerState | None, now: datetime) -> Glance:
    return Glance(
        mailer,
        now,
        _oldest_due(alias, mailer, now),
        _next_due(alias, mailer, now),
        state.paused_until if state else None,
        state.pause_reason if state else "",
    )


def _oldest_due(alias: str, mailer: str, now: datetime) -> datetime | None:
    return _first(_due(rows, now) for rows in _by_priority(alias, mailer))


def _next_due(alias: str, mailer: str, now: datetime) -> datetime | None:
    # Reads the rows that are being sent too, whose leases end soon; they are no more than the workers hold.
    return _first(_later(rows, now).filter(state__in=WAITING) for rows in _by_priority(alias, mailer))


def _first(queries: Iterable[Any]) -> datetime | None:
    return min((found for found in (rows.first() for rows in queries) if found is not None), default=None)


def _by_priority(alias: str, mailer: str) -> Iterator[Any]:
    """One query for each priority, without which the index is not in the order of ``due_at``."""
    rows = QueuedMessage.objects.using(alias).filter(mailer=mailer).order_by("due_at").values_list("due_at", flat=True)
    return (rows.filter(priority=priority) for priority in Priority.values)


def _due(rows: Any, now: datetime) -> Any:
    return rows.filter(due_at__lte=now)


def _later(rows: Any, now: datetime) -> Any:
    return rows.filter(due_at__gt=now)


def _counted(alias: str, now: datetime) -> Iterator[tuple[str, str, int, int]]:
    """Mailer, state, how many rows there are of these, and how many of them are due."""
    grouped = QueuedMessage.objects.using(alias).order_by().values_list("mailer", "state")
    counted: Any = grouped.annotate(number=Count("pk"), due=Count("pk", filter=Q(due_at__lte=now)))
    return iter(counted)
