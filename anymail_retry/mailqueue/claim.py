"""Taking due rows: a read, and one guarded UPDATE that says whose they are.

A claim reads the due rows of one mailer, one priority after the other, and takes them with an UPDATE that repeats the
conditions: whoever comes second wins nothing. ``due_at`` is all there is to it, for a row that waits (not before) as
for one whose worker died (end of its lease), so recovering is claiming and needs no reaper.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from django.db import connections, transaction
from django.db.models import Case, CharField, F, Q, Value, When
from django.db.models.functions import Coalesce

from ..delivery import Delivery, new_key
from ..models import QueuedMessage
from . import bodies
from .clock import DatabaseClock
from .database import may_skip_locked, own_transaction
from .fields import UTCDateTimeField
from .schedule import SUSPECT_AFTER, Policy, Row, is_expired
from .states import WAITING, Origin, Priority, State

#: Seconds for which a scan starts where the last claim found its first row; then it starts at the beginning again,
#: for rows that were committed late.
FLOOR_AGE = 5.0

#: Seconds after which the connection's isolation level is asked for again.
ISOLATION_AGE = 60.0


@dataclass(frozen=True)
class DirectSend:
    """The send of the caller's that failed, as its row has it. Its attempt is written with that of the first claim: a
    row of its own would cost the caller a third INSERT."""

    at: datetime
    verdict: str
    reason: str
    http_status: int | None
    answer: str


@dataclass(eq=False)
class Job:
    """One claimed row: what sending and settling it need to know."""

    id: int
    lease: int
    mailer: str
    priority: int
    number: int
    #: The last so many claims before this one ended without a result.
    lost: int
    origin: str
    #: Since when it may be sent.
    waits_since: datetime
    expires_at: datetime | None
    on_ambiguous: str
    delivery: Delivery
    size: int
    attachment_count: int
    #: None: the row has no content.
    payload: str | None
    #: Until when the row is ours, by the steady clock. Moves on when the lease is renewed.
    leased_until: float
    #: By when it is to be looked at if it is given back: what it was claimed by.
    due_at: datetime
    #: When it expires, by the steady clock.
    expires_at_moment: float | None = None
    #: It had expired when its claim asked for admission, and has none: nothing is to be sent.
    claimed_expired: bool = False
    #: Its last worker died, or lost it, and may have begun to send it.
    recovered: bool = False
    #: When that worker claimed it.
    recovered_from: datetime | None = None
    #: Nothing is told of it.
    is_report: bool = False
    #: What the send came to that left it in the queue, if the history has that still to be told.
    direct: DirectSend | None = None
    attachments: list[tuple[int, str | None, bytes]] = field(default_factory=list)
    #: Not to be begun before this moment of the steady clock: its slot under a rate limit.
    starts_at: float = 0.0
    #: Its result decides about the mailer's pause that has this fence.
    probe: datetime | None = None
    #: To be begun at once: nothing but what was begun may be held as ambiguous.
    at_once: bool = False
    #: When sending it began, by the steady clock.
    began_at: float | None = None
    #: Its thread is done with it.
    is_answered: bool = False

    def is_expired(self, now: float) -> bool:
        """Whether it is too late to begin, by the steady clock."""
        return self.expires_at_moment is not None and self.expires_at_moment <= now

    def lasts_too_long(self, now: float, send_max: float) -> bool:
        """Whether it has been under way for longer than any send may be."""
        return self.began_at is not None and not self.is_answered and now - self.began_at > send_max

    @property
    def row(self) -> Row:
        return Row(self.number, self.waits_since, self.expires_at, self.on_ambiguous, self.lost)

    @property
    def is_whole(self) -> bool:
        return self.payload is not None and len(self.attachments) == self.attachment_count

    @property
    def bodies(self) -> list[bytes]:
        return [data for _, _, data in self.attachments]

    @property
    def private_bodies(self) -> list[int]:
        return [body for body, digest, _ in self.attachments if digest is None]


def mailers_with_rows(alias: str) -> list[str]:
    """The names of all mailers that have rows: one short index look-up for each."""
    rows = QueuedMessage.objects.using(alias)
    names: list[str] = []
    while True:
        following = rows.filter(mailer__gt=names[-1]) if names else rows
        name = following.order_by("mailer").values_list("mailer", flat=True).first()
        if name is None:
            return names
        names.append(name)


class Candidate(NamedTuple):
    """A due row, as it was read and not yet won."""

    id: int
    due_at: datetime
    state: str
    size: int
    on_ambiguous: str
    maybe_taken_since: datetime | None
    key_used_since: datetime | None
    claimed_at: datetime | None
    expires_at: datetime | None
    lost_count: int

    @property
    def is_lapsed(self) -> bool:
        """Its lease has ended without a result."""
        return self.state == State.SENDING

    @property
    def is_suspect(self) -> bool:
        """It was there when several workers died, and may be why: what is claimed with it could die again."""
        return self.is_lapsed and self.lost_count >= SUSPECT_AFTER

    def may_be_held(self, policy: Policy, now: datetime) -> bool:
        """Whether its next ambiguous attempt would leave it to a person, so that it must be begun once claimed."""
        if not policy.wants_hold(self.on_ambiguous):
            return False
        delivery = Delivery("?", maybe_taken_since=self.maybe_taken_since, key_used_since=self.key_used_since)
        if self.is_lapsed and self.claimed_at is not None:
            delivery.remember(self.claimed_at)
        return policy.holds(self.on_ambiguous, delivery, now)


@dataclass(frozen=True)
class Wanted:
    """How much a claim may take.

    :param rows: at most so many.
    :param size: and so many bytes, but always one row.
    :param at_once: how many threads would begin at once; bounds the rows that may be held.
    :param without: ids not to take.
    :param suspects: whether a message may be among them that is suspected of killing its workers. One at a time.
    """

    rows: int
    size: int
    at_once: int
    without: Collection[int] = ()
    suspects: bool = True


@dataclass(frozen=True)
class _Won:
    """What is needed to load the rows of a claim, of which some were won."""

    mailer: str
    candidates: dict[int, Candidate]
    lease: int
    moment: float
    policy: Policy
    prepare: Callable[[Sequence[Job]], None]
    #: Those that no admission was asked for.
    expired: Collection[int] = ()


@dataclass
class Claim:
    """What a claim came to."""

    jobs: list[Job]
    #: Rows were due, whether or not any was won: ask again.
    found: int
    #: Rows were left because nobody would begin them at once.
    left: int = 0


class Claimer:
    """Claims rows for one worker.

    :param lease: seconds for which a claimed row is ours.
    """

    def __init__(self, alias: str, clock: DatabaseClock, *, lease: float) -> None:
        self.alias = alias
        self.clock = clock
        self.lease = lease
        self._floors: dict[tuple[str, int], datetime] = {}
        self._floors_since = clock.steady()
        self._skip_locked = False
        self._isolation_read_at: float | None = None
        self._unfinished: _Won | None = None

    @property
    def rows(self) -> Any:
        return QueuedMessage.objects.using(self.alias)

    def claim(
        self,
        mailer: str,
        wanted: Wanted,
        policy: Policy,
        *,
        admit: Callable[[int], int] | None = None,
        prepare: Callable[[Sequence[Job]], None] = lambda jobs: None,
    ) -> Claim:
        """Take due rows of one mailer, of high priority first.

        :param admit: called in the claim's transaction with the number of rows that were found and have not expired;
            says how many of them may be taken. What it wrote is undone if none is won.
        :param prepare: called with the jobs once they are loaded, which after a connection broke is later.
        """
        if self._may_skip_locked():
            with own_transaction(self.alias):
                candidates, left = self._choose(mailer, wanted, policy, lock=True)
                won = self._take(mailer, candidates, policy, admit, prepare)
        else:
            candidates, left = self._choose(mailer, wanted, policy, lock=False)
            with own_transaction(self.alias) if candidates else nullcontext():
                won = self._take(mailer, candidates, policy, admit, prepare)
        if not won:
            self._unfinished = None
        _, jobs = self.finish()
        return Claim(jobs, found=len(candidates) + left, left=left)

    @property
    def is_unfinished(self) -> bool:
        """A claim was interrupted after it may have won rows: the connection broke."""
        return self._unfinished is not None

    def finish(self) -> tuple[str, list[Job]]:
        """Load the rows that a claim won, with their content. The mailer's name, and the jobs."""
        if self._unfinished is None:
            return "", []
        won = self._unfinished
        jobs = self._load(won)
        self._renew_keys(jobs, won.policy, self.clock.at(won.moment))
        won.prepare(jobs)
        self._unfinished = None
        return won.mailer, jobs

    def _choose(self, mailer: str, wanted: Wanted, policy: Policy, *, lock: bool) -> tuple[list[Candidate], int]:
        """The due rows to take, and how many were left because nobody would begin them at once."""
        now = self.clock.now()
        chosen: list[Candidate] = []
        left = 0
        size = 0
        suspects = wanted.suspects
        for priority in Priority.values:
            for candidate in self._read(mailer, priority, now, wanted.rows - len(chosen), wanted.without, lock):
                if candidate.id in wanted.without:
                    continue
                if len(chosen) >= wanted.rows:
                    break
                if chosen and size + candidate.size > wanted.size:
                    return chosen, left
                beyond_the_threads = candidate.may_be_held(policy, now) and len(chosen) >= wanted.at_once
                if beyond_the_threads or (candidate.is_suspect and not suspects):
                    left += 1
                    continue
                suspects = suspects and not candidate.is_suspect
                chosen.append(candidate)
                size += candidate.size
            if len(chosen) >= wanted.rows:
                break
        return chosen, left

    def _read(
        self, mailer: str, priority: int, now: datetime, rows: int, without: Collection[int], lock: bool
    ) -> list[Candidate]:
        due = self.due(mailer, priority, now)
        if lock:
            due = due.select_for_update(skip_locked=True)
        candidates = [Candidate._make(values) for values in due[: rows + len(without)]]
        # Not at what is left out: a worker whose own hung row is due would always have a floor to look before.
        first = next((candidate for candidate in candidates if candidate.id not in without), None)
        if first is not None:
            self._floors[mailer, priority] = first.due_at
        return candidates

    def due(self, mailer: str, priority: int, now: datetime) -> Any:
        """The query that every claim begins with."""
        due = self.rows.filter(priority=priority, due_at__lte=now)
        floor = self._floor(mailer, priority)
        if floor is not None:
            due = due.filter(due_at__gte=floor)
        if connections[self.alias].vendor == "mysql":
            # By equality, once many rows are due, it would look up mailer and priority alone, and pass over every row
            # that was ever sent.
            due = due.filter(mailer__gte=mailer, mailer__lte=mailer).order_by("mailer", "priority", "due_at")
        else:
            # By due_at and nothing after it: or all rows of one bulk send would be sorted.
            due = due.filter(mailer=mailer).order_by("due_at")
        return due.values_list(*Candidate._fields)

    def _floor(self, mailer: str, priority: int) -> datetime | None:
        """Where to begin the scan: dead index entries before it (a snapshot held open elsewhere keeps them) cost
        nothing then."""
        if self.clock.steady() - self._floors_since >= FLOOR_AGE:
            self.forget_floors()
        return self._floors.get((mailer, priority))

    def has_floor(self, mailer: str) -> bool:
        """Whether a scan of this mailer's rows would not begin at the first."""
        return any(name == mailer for name, _ in self._floors)

    def forget_floors(self) -> None:
        self._floors.clear()
        self._floors_since = self.clock.steady()

    def _take(
        self,
        mailer: str,
        candidates: Sequence[Candidate],
        policy: Policy,
        admit: Callable[[int], int] | None,
        prepare: Callable[[Sequence[Job]], None],
    ) -> int:
        """Make them ours, as far as nobody else was faster; how many that were."""
        if not candidates:
            return 0
        expired: set[int] = set()
        if admit is not None:
            now = self.clock.now()
            expired = {candidate.id for candidate in candidates if is_expired(candidate.expires_at, now)}
            live = [candidate for candidate in candidates if candidate.id not in expired]
            admitted = live[: admit(len(live))] if live else []
            candidates = [*(candidate for candidate in candidates if candidate.id in expired), *admitted]
        waiting = [candidate.id for candidate in candidates if not candidate.is_lapsed]
        lapsed = [candidate.id for candidate in candidates if candidate.is_lapsed]
        lease = random.getrandbits(62) + 1  # tells claims apart, guards nothing secret
        moment = self.clock.steady()
        now = self.clock.at(moment)
        ours = {
            "state": State.SENDING,
            "lease": lease,
            "claimed_at": now,
            "due_at": now + timedelta(seconds=self.lease),
            "attempt_count": F("attempt_count") + 1,
        }
        self._unfinished = _Won(
            mailer, {candidate.id: candidate for candidate in candidates}, lease, moment, policy, prepare, expired
        )
        won = 0
        if waiting:
            due = self.rows.filter(id__in=waiting, due_at__lte=now, state__in=WAITING)
            won += due.update(**ours)
        if lapsed:
            due = self.rows.filter(id__in=lapsed, due_at__lte=now, state=State.SENDING)
            # Before claimed_at, because MySQL assigns from left to right.
            taken = {name: Coalesce(name, "claimed_at") for name in ("maybe_taken_since", "key_used_since")}
            won += due.update(**taken, **ours, lost_count=F("lost_count") + 1)
        if not won:
            transaction.set_rollback(True, using=self.alias)  # nothing was written, save by admit()
        return won

    def _load(self, won: _Won) -> list[Job]:
        """The rows that were won, with their content; also tells which of the candidates they are."""
        loaded = self.rows.filter(id__in=list(won.candidates), lease=won.lease).values_list(
            "id",
            "priority",
            "attempt_count",
            "lost_count",
            "origin",
            "is_report",
            "created_at",
            "not_before",
            "expires_at",
            "on_ambiguous",
            "key",
            "key_from_user",
            "maybe_taken_since",
            "key_used_since",
            "body_digest",
            "size",
            "attachment_count",
            "verdict",
            "reason",
            "http_status",
            "answer",
            "content__payload",
        )
        jobs: dict[int, Job] = {}
        for (
            id_,
            priority,
            number,
            lost,
            origin,
            is_report,
            created,
            not_before,
            expires,
            hold,
            key,
            users,
            taken,
            used,
            digest,
            size,
            count,
            verdict,
            reason,
            status,
            answer,
            payload,
        ) in loaded:
            was = won.candidates[id_]
            recovered = was.is_lapsed and taken is not None
            jobs[id_] = Job(
                id=id_,
                lease=won.lease,
                mailer=won.mailer,
                priority=priority,
                number=number,
                lost=lost,
                origin=origin,
                is_report=is_report,
                waits_since=max(created, not_before or created),
                expires_at=expires,
                on_ambiguous=hold,
                delivery=Delivery(
                    key=key,
                    key_from_user=users,
                    maybe_taken_since=taken,
                    key_used_since=used,
                    body_digest=digest,
                    now=self.clock.from_any_thread,
                    pre_send_done=origin == Origin.FALLBACK,
                ),
                size=size,
                attachment_count=count,
                payload=payload,
                leased_until=won.moment + self.lease,
                due_at=was.due_at,
                expires_at_moment=None if expires is None else self.clock.moment(expires),
                claimed_expired=id_ in won.expired,
                recovered=recovered,
                recovered_from=was.claimed_at if recovered else None,
                direct=DirectSend(created, verdict, reason, status, answer)
                if origin == Origin.FALLBACK and number - lost == 2
                else None,
            )
        with_attachments = [job.id for job in jobs.values() if job.attachment_count]
        if with_attachments:
            for id_, attachments in bodies.load(self.alias, with_attachments).items():
                jobs[id_].attachments = attachments
        return [jobs[id_] for id_ in won.candidates if id_ in jobs]

    def _renew_keys(self, jobs: Iterable[Job], policy: Policy, now: datetime) -> None:
        """Give a new key to those whose key no longer protects them, and store it before it is used."""
        renewed = [job for job in jobs if self._needs_key(job, policy, now)]
        if not renewed:
            return
        for job in renewed:
            job.delivery.key = new_key()
            job.delivery.key_used_since = None
            job.delivery.body_digest = None
        with own_transaction(self.alias):
            self.rows.filter(id__in=[job.id for job in renewed], lease=renewed[0].lease).update(
                key=Case(
                    *[When(id=job.id, then=Value(job.delivery.key)) for job in renewed],
                    default=F("key"),
                    output_field=CharField(),
                ),
                key_used_since=None,
                body_digest=None,
            )

    def _needs_key(self, job: Job, policy: Policy, now: datetime) -> bool:
        if not job.delivery.key:
            return True
        if policy.key_window is None or job.delivery.key_from_user:
            return False
        return not job.delivery.key_is_live(policy.key_window, now) and not policy.holds(
            job.on_ambiguous, job.delivery, now
        )

    def renew(self, jobs: Collection[Job]) -> list[Job]:
        """Move the end of the leases on. The jobs that were lost to another worker meanwhile."""
        moment = self.clock.steady()
        ours = Q(id__in=[job.id for job in jobs], lease__in={job.lease for job in jobs}, state=State.SENDING)
        with own_transaction(self.alias):
            renewed = self.rows.filter(ours).update(due_at=self.clock.at(moment) + timedelta(seconds=self.lease))
        lost: list[Job] = []
        if renewed < len(jobs):
            kept = set(self.rows.filter(ours).values_list("id", "lease"))
            lost = [job for job in jobs if (job.id, job.lease) not in kept]
        for job in {*jobs}.difference(lost):
            job.leased_until = moment + self.lease
        return lost

    def give_back(self, jobs: Collection[Job]) -> None:
        """Return rows that were not begun, in one UPDATE, each to its old place in the queue."""
        if not jobs:
            return
        with own_transaction(self.alias):
            self.rows.filter(
                id__in=[job.id for job in jobs], lease__in={job.lease for job in jobs}, state=State.SENDING
            ).update(
                # Before attempt_count, because MySQL assigns from left to right.
                state=Case(
                    When(attempt_count__lte=1, then=Value(State.QUEUED)),
                    default=Value(State.DEFERRED),
                    output_field=CharField(),
                ),
                attempt_count=F("attempt_count") - 1,
                lease=None,
                due_at=Case(
                    *[When(id=job.id, then=Value(job.due_at, output_field=UTCDateTimeField())) for job in jobs],
                    output_field=UTCDateTimeField(),
                ),
            )

    def _may_skip_locked(self) -> bool:
        moment = self.clock.steady()
        if self._isolation_read_at is None or moment - self._isolation_read_at >= ISOLATION_AGE:
            self._skip_locked = may_skip_locked(self.alias)
            self._isolation_read_at = moment
        return self._skip_locked
