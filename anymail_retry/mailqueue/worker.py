"""The worker: claims due mail, has it sent by threads, and writes down what came of it.

The thread that calls :meth:`Worker.drain` or :meth:`Worker.run` does all the database work; the sender threads only
send. So a worker runs in a TestCase and on SQLite in memory, and a database connection is never shared.
"""

from __future__ import annotations

import os
import queue
import random
import socket
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from django.db import connections

from .. import conf
from ..log import get_logger, reporting
from ..verdict import Outcome
from . import gate, retention, schedule
from .claim import Claim, Claimer, Job, Wanted
from .clock import DatabaseClock, steady
from .database import disconnect, errors_of, first_line, queue_database
from .encryption import cipher
from .lanes import LOW_MARK, Lane, Lanes
from .schedule import Fate
from .sending import LARGEST_SHARE, Inbox, Sender, Sent
from .settle import Result, Settler
from .states import OnAmbiguous, State
from .wakeup import listening

logger = get_logger("queue")

#: Bytes of the messages that a worker holds at a time.
LARGEST_LOAD = 32 * 1024 * 1024

#: The part of a lease that has to be left when a send begins, where the longest send would not fit. Renewed every
#: third of a lease, more than that is left unless something is wrong.
LEASE_NEEDED = 0.6

#: Seconds between two tries after the database failed: the first, doubling up to the last.
TROUBLE_FIRST, TROUBLE_MAX = 0.1, 5.0

#: Failures in a row after which a worker that would lose nothing ends.
TROUBLE_TRIES = 3

#: Seconds between two rounds of tidying up.
TIDY_EVERY = 900.0

#: Seconds given to idle threads to close their connections at the end.
FAREWELL = 2.0


@dataclass
class Totals:
    """How many messages a worker brought to which state."""

    sent: int = 0
    deferred: int = 0
    failed: int = 0
    held: int = 0
    cancelled: int = 0

    def count(self, state: State) -> None:
        setattr(self, state.value, getattr(self, state.value) + 1)

    @property
    def done(self) -> int:
        return self.sent + self.deferred + self.failed + self.held + self.cancelled


class WorkerStuck(RuntimeError):
    """Every thread of a worker hangs in a send, so it can deliver nothing more. The process should be started anew."""


class Worker:
    """Delivers what is due.

    Any number of workers may run at the same time, on any number of hosts. One object is for one thread and one run.

    :param only: names of the mailers to work for; default: all.
    :param threads: that send at a time; default ``EMAIL_QUEUE_THREADS``.
    :param limit: end after so many messages.
    :param max_time: end after so many seconds.
    :param alias: of the database; default: the queue's.
    :raises ImproperlyConfigured: a setting has the wrong type.
    """

    def __init__(
        self,
        *,
        only: Collection[str] | None = None,
        threads: int | None = None,
        limit: int | None = None,
        max_time: float | None = None,
        alias: str | None = None,
        clock: DatabaseClock | None = None,
        steady: Callable[[], float] = steady,
    ) -> None:
        self.alias = alias or queue_database()
        self.threads: int = threads or conf.get("QUEUE_THREADS")
        self.lease: float = conf.get("QUEUE_LEASE")
        self.send_max: float = conf.get("QUEUE_SEND_MAX")
        self.batch: int = conf.get("QUEUE_BATCH_SIZE")
        self.poll: float = conf.get("QUEUE_POLL")
        self.cipher = cipher()
        self.only = only
        self.limit = limit
        self.max_time = max_time
        self.steady = steady
        self.clock = clock or DatabaseClock(self.alias, steady=steady)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.totals = Totals()
        #: Called after each batch of results that was written.
        self.on_progress: Callable[[Totals], None] = lambda totals: None
        #: Since when the calling thread has been at the database, by the steady clock; None: it is not.
        self.in_database_since: float | None = None
        self.inbox = Inbox(self.threads, steady)

        self._claimer = Claimer(self.alias, self.clock, lease=self.lease)
        self._settler = Settler(
            self.alias, worker=self.name, keep_content=conf.get("QUEUE_KEEP_CONTENT"), steady=steady
        )
        self._lanes = Lanes(self._claimer, self.clock, poll=self.poll, only=only, steady=steady)
        self._senders: list[Sender] = []
        self._held: dict[int, Job] = {}  # claimed and not settled, by id
        self._returned: list[Job] = []  # to be given back
        self._aftermath: deque[Callable[[], None]] = deque()  # what is still to do about results that are written
        self._announcements: deque[Callable[[], None]] = deque()  # receivers that are still to be called
        self._hung: set[Job] = set()  # written off, and still under way
        self._reports: deque[Sent] = deque()
        self._heard: queue.SimpleQueue[Collection[str]] = queue.SimpleQueue()  # mailers that have due mail
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put() may be called in a signal handler
        self._claimed = 0
        self._renewed_at = steady()
        self._tidied_at = steady()
        self._trouble = 0
        self._trouble_until = 0.0
        self._ending = False
        self._stop_asked = False
        self._stop_now = False

    # --- for callers ---

    def drain(self) -> Totals:
        """Deliver until nothing is due.

        :raises django.db.Error: the database does not work, and nothing would be lost by giving up.
        :raises WorkerStuck: every thread hangs.
        """
        return self._work(forever=False)

    def run(self) -> Totals:
        """Deliver until stopped. A database that fails is tried again for ever.

        Looks for mail every ``EMAIL_QUEUE_POLL`` seconds and, on PostgreSQL, when it is notified of some.

        :raises WorkerStuck: every thread hangs.
        """
        with listening(self.alias, self._hear):
            return self._work(forever=True)

    def stop(self) -> None:
        """Finish what is being sent, give back the rest, and end. The second time: do not wait for what is being sent.

        May be called from a signal handler, and from any thread.
        """
        self._stop_now = self._stop_asked
        self._stop_asked = self._ending = True
        self._wake.put(None)

    @property
    def was_interrupted(self) -> bool:
        """It was stopped a second time, and did not wait for what was being sent."""
        return self._stop_now

    # --- the loop ---

    def _work(self, *, forever: bool) -> Totals:
        ends_at = None if self.max_time is None else self.steady() + self.max_time
        try:
            while True:
                self._collect()
                if ends_at is not None and self.steady() >= ends_at:
                    self._ending, ends_at = True, None
                if self.steady() >= self._trouble_until:
                    self._at_database(self._round, forever)
                self._call_receivers()
                if self._stop_now:
                    self._leave()
                    return self.totals
                if self._is_finished(forever):
                    return self.totals
                self._sleep(ends_at)
        except BaseException:
            self._leave()
            raise
        finally:
            self._dismiss()

    def _round(self) -> None:
        """Whatever there is to do at the database now."""
        self._settle()
        while self._aftermath:
            self._aftermath[0]()
            self._aftermath.popleft()  # not before it is done: a connection may break
        self._renew()
        self._finish_claim()
        if self._ending:
            self._returned += self.inbox.remove()
        self._give_back()
        if not self._ending:
            self._refill()
            self._give_back()
            self._tidy()

    def _is_finished(self, forever: bool) -> bool:
        if self._held or self._reports or self._aftermath or self._announcements or self._settler.due_at is not None:
            return False
        if self._claimer.is_unfinished:
            return False
        if self._ending:
            return True
        return not forever and (self._is_at_limit() or self._lanes.are_empty())

    def _at_database(self, work: Callable[[], None], forever: bool) -> None:
        """Do database work; if it fails, wait a little and go on: a server may be restarted, a connection be stale."""
        self.in_database_since = self.steady()
        try:
            work()
        except errors_of(self.alias) as error:
            connection = connections[self.alias]
            self._trouble += 1
            nothing_to_lose = not forever and not self._held and self._settler.due_at is None
            if connection.in_atomic_block or (nothing_to_lose and self._trouble >= TROUBLE_TRIES):
                raise
            wait = min(TROUBLE_FIRST * 2.0 ** min(self._trouble - 1, 10), TROUBLE_MAX)
            self._trouble_until = self.steady() + wait * random.uniform(0.5, 1.0)  # noqa: S311  # keeps workers apart
            logger.warning("database: %s: %s; trying again", type(error).__name__, first_line(error))
            self._claimer.forget_floors()
            disconnect(self.alias)
        else:
            self._trouble = 0
        finally:
            self.in_database_since = None

    def _call_receivers(self) -> None:
        """Tell what became of messages, one receiver after the other: leases and results do not wait for them all."""
        while self._announcements:
            self._announcements.popleft()()
            self._collect()
            if self._is_settling_due() or self._is_renewing_due() or self._stop_now:
                return

    def _sleep(self, ends_at: float | None) -> None:
        """Until there is something to do, or something to look at."""
        if self._announcements:
            return
        now = self.steady()
        if self._trouble_until > now:
            until = self._trouble_until
        else:
            moments = (self._renewed_at + self.lease / 3, self._settler.due_at, self._lanes.next_look(), ends_at)
            until = min([now + self.poll, *(moment for moment in moments if moment is not None)])
        try:
            self._wake.get(timeout=max(until - now, 0.001))
            while True:
                self._wake.get_nowait()
        except queue.Empty:
            pass

    def _leave(self) -> None:
        """End in the middle of things; others should not have to wait for these leases to end."""
        connection = connections[self.alias]
        if connection.in_atomic_block and connection.needs_rollback:
            return
        self.in_database_since = self.steady()  # for the watchdog
        try:
            self._returned += self.inbox.remove()
            self._collect()
            if self._settler.due_at is not None:
                self._settler.flush(self.clock.now())
            self._give_back()
        except Exception as error:  # the first exception is the one to raise
            logger.error("rows cannot be given back: %s: %s", type(error).__name__, first_line(error))
        finally:
            self.in_database_since = None

    def _dismiss(self) -> None:
        self.inbox.close()
        patience = self.steady() + FAREWELL
        for sender in self._senders:
            if not self._stop_now:
                sender.join(timeout=max(patience - self.steady(), 0))

    # --- results ---

    def _report(self, sent: Sent) -> None:
        """Called by the sender threads."""
        self._reports.append(sent)
        if len(self._reports) == 1 or self._is_low(self._lanes[sent.job.mailer]) or self.inbox.is_idle():
            self._wake.put(None)

    def _hear(self, names: Collection[str]) -> None:
        """Called by the thread that listens."""
        self._heard.put(names)
        self._wake.put(None)

    def _collect(self) -> None:
        """Take over what the threads report. No database work."""
        while not self._heard.empty():
            self._lanes.look_now(self._heard.get())
        while self._reports:
            sent = self._reports.popleft()
            job, outcome = sent.job, sent.outcome
            job.is_answered = True
            if job in self._hung:
                self._hung.discard(job)
                self.inbox.threads -= 1
            if outcome is None:
                self._returned.append(job)
                continue
            lane = self._lanes[job.mailer]
            lane.learn(sent.seconds)
            answered_at = self.clock.at(sent.began_at + sent.seconds)
            fate = schedule.fate(outcome, job.delivery, job.row, lane.policy, answered_at)
            self._settler.add(Result(job, fate, outcome, self.clock.at(sent.began_at), sent.seconds))

    def _is_settling_due(self) -> bool:
        due_at = self._settler.due_at
        return due_at is not None and (due_at <= self.steady() or self.inbox.is_idle() or self._ending)

    def _settle(self) -> None:
        """Write results, if it is time."""
        if not self._is_settling_due():
            return
        results, written = self._settler.flush(self.clock.now())
        for result in results:
            self._forget(result.job)
        for result in written:
            self.totals.count(result.fate.state)
        if len(written) < len(results):
            lost = {result.job.id for result in results}.difference(result.job.id for result in written)
            logger.warning("results that came after their lease are dropped: messages %s", sorted(lost))
        self._aftermath.append(partial(self._announce, written))
        for result in filter(self._concerns_the_gate, results):
            self._aftermath.append(partial(self._tell_the_gate, result))
        self.on_progress(self.totals)

    def _announce(self, results: Sequence[Result]) -> None:
        self._announcements += self._settler.announce(results)

    def _concerns_the_gate(self, result: Result) -> bool:
        return result.job.probe is not None or (result.outcome is not None and gate.block(result.outcome) is not None)

    def _tell_the_gate(self, result: Result) -> None:
        """Pause the mailer, or end its pause, as this result says."""
        job, outcome = result.job, result.outcome
        why = gate.block(outcome) if outcome is not None else None
        try:
            if job.probe is not None:
                self._end_probe(job, outcome)
            elif why is not None:
                until = gate.pause(self.alias, job.mailer, why, by=job.id, now=self.clock.now())
                if until is not None:
                    logger.error("%s pauses until %s UTC: %s", job.mailer, f"{until:%H:%M:%S}", why.reason)
                self._lanes.forget_states()
                self._lanes.refresh()
                if self._lanes.is_paused(self._lanes[job.mailer]):
                    self._returned += self.inbox.remove_of(job.mailer)
        finally:
            if why is not None:
                self.inbox.resume(job.mailer)  # the thread that met it had stopped it

    def _end_probe(self, job: Job, outcome: Outcome | None) -> None:
        lane = self._lanes[job.mailer]
        if (
            lane.state is not None
            and job.probe is not None
            and gate.end_probe(self.alias, lane.state, job.probe, outcome, by=job.id, now=self.clock.now())
        ):
            if gate.ends_pause(outcome):
                logger.warning("%s works again: its pause is over", job.mailer)
            else:
                logger.info("%s: probe with message %s: %s", job.mailer, job.id, outcome.verdict if outcome else None)
        lane.empty, lane.poll_at = False, 0.0  # there may be mail that waited for this
        self._lanes.forget_states()

    # --- leases ---

    def _is_renewing_due(self) -> bool:
        return self.steady() - self._renewed_at >= self.lease / 3

    def _renew(self) -> None:
        """Move the leases on every third of one, of what waits and of what may still be under way."""
        if not self._is_renewing_due():
            return
        now = self.steady()
        renewable = []
        for job in list(self._held.values()):
            if not job.lasts_too_long(now, self.send_max):
                renewable.append(job)
            elif job.leased_until <= now:
                self._write_off(job)
        lost = self._claimer.renew(renewable) if renewable else []
        if lost:
            logger.warning("leases lost to another worker: messages %s", sorted(job.id for job in lost))
            for job in self.inbox.remove(lost.__contains__):
                self._forget(job)
        self._renewed_at = now

    def _write_off(self, job: Job) -> None:
        """A send that lasts longer than any may: its row is left to whoever claims it, its thread replaced.

        :raises WorkerStuck: so many hang that no thread is left to send.
        """
        with reporting(job.is_report):
            logger.error(
                "%s: message %s has been under way for more than EMAIL_QUEUE_SEND_MAX (%g s); given up waiting for it",
                job.mailer,
                job.id,
                self.send_max,
            )
        self._forget(job)
        self._hung.add(job)
        if len(self._hung) >= 2 * self.threads:
            raise WorkerStuck(f"{len(self._hung)} sends hang, and no thread is left")
        self.inbox.threads += 1

    def _give_back(self) -> None:
        """Return what was not begun, for any worker to claim again."""
        jobs = [job for job in self._returned if self._held.get(job.id) is job]
        self._claimer.give_back(jobs)
        if jobs:
            self._claimer.forget_floors()  # they are due again, before what was claimed last
        self._returned.clear()
        self._claimed -= len(jobs)
        for job in jobs:
            self._forget(job)
            if job.probe is not None:
                self._aftermath.append(partial(self._end_probe, job, None))

    def _forget(self, job: Job) -> None:
        if self._held.get(job.id) is job:
            del self._held[job.id]

    # --- claiming ---

    def _finish_claim(self) -> None:
        """Take over the rows of a claim that was interrupted, if there was one."""
        mailer, jobs = self._claimer.finish()
        if jobs:
            self._start(self._lanes[mailer], jobs)

    def _refill(self) -> None:
        """Claim for every mailer that has too little waiting."""
        self._lanes.refresh()
        for lane in self._lanes:
            if self._lanes.is_paused(lane):
                # Another worker found out.
                self._returned += self.inbox.remove_of(lane.name)
            if self._is_at_limit() or not self._is_low(lane) or self._room(lane) <= 0:
                continue
            if not self._lanes.may_claim(lane):
                continue
            claim = self._claim(lane)
            lane.left = claim.left
            if claim.found == 0:
                if lane.called or self._claimer.has_floor(lane.name):
                    self._look_again(lane)
                else:
                    self._lanes.found_nothing(lane)
                continue
            lane.empty = False
            self._start(lane, claim.jobs)
            if not claim.jobs and claim.found > claim.left:
                self._wake.put(None)  # lost every row to another worker: that is not the end, so ask again

    def _look_again(self, lane: Lane) -> None:
        """Once more from the beginning, for mail that was stored earlier than other mail and committed later."""
        lane.called = False
        self._claimer.forget_floors()
        self._wake.put(None)

    def _is_low(self, lane: Lane) -> bool:
        """Whether so little of this mailer's mail waits that more should be claimed. Also called by the threads."""
        if lane.left or lane.rate is not None:
            return self.inbox.free(lane.name) > 0
        return self.inbox.waiting(lane.name) <= LOW_MARK * lane.look_ahead(self.threads, self.batch)

    def _room(self, lane: Lane) -> int:
        """How many bytes more of this mailer's mail may be held; a slow one must leave some to the others."""
        held = sum(job.size for job in self._held.values())
        own = sum(job.size for job in self._held.values() if job.mailer == lane.name)
        return min(LARGEST_LOAD - held, int(LARGEST_LOAD * LARGEST_SHARE) - own)

    def _is_at_limit(self) -> bool:
        return self.limit is not None and self._claimed >= self.limit

    def _claim(self, lane: Lane) -> Claim:
        free = self.inbox.free(lane.name)
        rows = lane.look_ahead(self.threads, self.batch)
        if self.limit is not None:
            rows = min(rows, self.limit - self._claimed)
        wanted = Wanted(
            rows=rows,
            size=self._room(lane),
            at_once=free,
            without={job.id for job in self._held.values() if job.leased_until <= self.steady()},
            suspects=all(job.lost <= schedule.SUSPECT_AFTER for job in self._held.values()),
        )
        if lane.state is not None and lane.state.paused_until is not None:
            return self._claim_probe(lane, wanted)
        if lane.rate is not None:
            return self._claim_slots(lane, replace(wanted, rows=min(rows, free)))
        return self._claimer.claim(lane.name, wanted, lane.policy)

    def _claim_probe(self, lane: Lane, wanted: Wanted) -> Claim:
        """A pause is over: one message, of one worker, tells whether the mailer works again."""
        state = lane.state
        assert state is not None
        fence: datetime | None = None

        def admit(found: int) -> int:
            nonlocal fence
            fence = gate.begin_probe(self.alias, state, now=self.clock.now(), lease=self.lease)
            return 0 if fence is None else 1

        def prepare(jobs: Sequence[Job]) -> None:
            for job in jobs:
                job.probe = None if job.claimed_expired else fence

        # Not the message that was blocked, while another is due.
        others = replace(wanted, rows=1, without={*wanted.without, state.paused_by or 0})
        claim = self._claimer.claim(lane.name, others, lane.policy, admit=admit, prepare=prepare)
        if not claim.found and state.paused_by is not None:
            one = replace(wanted, rows=1)
            claim = self._claimer.claim(lane.name, one, lane.policy, admit=admit, prepare=prepare)
        if claim.jobs and fence is not None:
            state.paused_until = fence
        else:
            self._lanes.forget_states()
        return claim

    def _claim_slots(self, lane: Lane, wanted: Wanted) -> Claim:
        """Claim no more than may begin under the rate limit, each at its own moment."""
        assert lane.rate is not None
        rate, starts = lane.rate, list[datetime]()
        # What is claimed and not begun could be held for nothing.
        horizon = 0.0 if lane.policy.on_ambiguous == OnAmbiguous.HOLD else gate.SLOT_HORIZON

        def admit(found: int) -> int:
            self._lanes.forget_states()
            now = self.clock.now()
            starts[:] = gate.reserve(
                self.alias, lane.name, lane.state, rate=rate, wanted=found, now=now, horizon=horizon
            )
            return len(starts)

        def prepare(jobs: Sequence[Job]) -> None:
            live = [job for job in jobs if not job.claimed_expired]
            for job, start in zip(live, starts, strict=False):  # slots of rows that were lost are lost too
                job.starts_at = self.clock.moment(start)

        return self._claimer.claim(lane.name, wanted, lane.policy, admit=admit, prepare=prepare)

    def _start(self, lane: Lane, jobs: Collection[Job]) -> None:
        """Hand claimed rows to the threads, save those about which there is nothing to send. No database work."""
        now = self.clock.at(self.steady())
        self._claimed += len(jobs)
        ready = []
        for job in jobs:
            self._held[job.id] = job
            fate = self._fate_without_sending(lane, job, now)
            if fate is not None:
                self._settler.add(Result(job, fate))
                continue
            job.at_once = job.probe is not None or lane.policy.holds(job.on_ambiguous, job.delivery, now)
            ready.append(job)
        if ready:
            self.inbox.put(ready)
            self._hire()

    def _fate_without_sending(self, lane: Lane, job: Job, now: datetime) -> Fate | None:
        if lane.mailer is None:
            return Fate(State.HELD, lane.gone)
        if job.claimed_expired or schedule.is_expired(job.expires_at, now):
            return Fate(State.FAILED, schedule.EXPIRED)
        if not job.is_whole:
            return Fate(State.HELD, "content or attachments are missing")
        if job.recovered:
            return schedule.fate_of_recovered(job.delivery, job.row, lane.policy, now)
        if job.delivery.maybe_taken_since and lane.policy.holds(job.on_ambiguous, job.delivery, now):
            return Fate(State.HELD, schedule.AMBIGUOUS)
        return None

    def _hire(self) -> None:
        """Have as many threads as there is work, up to the limit."""
        needed = min(self.inbox.threads, self.inbox.in_flight() + self.inbox.waiting())
        while len(self._senders) < needed:
            sender = Sender(
                self.inbox,
                self._lanes.mailers,
                self._report,
                steady=self.steady,
                lease_needed=min(self.send_max, LEASE_NEEDED * self.lease),
                cipher=self.cipher,
            )
            self._senders.append(sender)
            sender.start()

    def _tidy(self) -> None:
        """Now and then, when nothing is being sent: delete shared attachments that no message needs."""
        now = self.steady()
        if now - self._tidied_at >= TIDY_EVERY and self.inbox.is_idle():
            self._tidied_at = now
            retention.delete_unlinked_bodies(self.alias, self.clock.now())
