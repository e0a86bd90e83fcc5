"""The worker's loop: when it wakes, what it leaves alone, and what it still writes when it is ended."""

from __future__ import annotations

import queue as queues
import threading
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connections

from anymail_retry.mailqueue.clock import DatabaseClock, steady
from anymail_retry.mailqueue.worker import Totals, Worker
from anymail_retry.models import QueuedMessage
from anymail_retry.signals import message_sent

from .engine import OTHER, PATIENCE, PlainBackend, Script, change, future, past, queue, states
from .test_worker import Stall, running, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

    from anymail_retry.mailqueue.claim import Claim

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("script")]

THIRD = "tests.mailqueue.test_worker_loop.ThirdBackend"

LEASE = 60.0


class ThirdBackend(PlainBackend):
    """A third mailer."""


class Wakes(queues.SimpleQueue[None]):
    """Notes for how long the worker means to sleep."""

    def __init__(self) -> None:
        self.timeouts: list[float] = []

    def get(self, block: bool = True, timeout: float | None = None) -> None:
        assert timeout is not None
        self.timeouts.append(timeout)
        super().get(block, timeout)


class Watched(Worker):
    """Goes by clocks that a test moves on, and notes its sleeps and its claims."""

    def __init__(self, time: Time, **options: Any) -> None:
        super().__init__(steady=time.steady, clock=time.clock, **options)
        self.wakes = self._wake = Wakes()
        self.claims: list[Claim] = []
        claim = self._claimer.claim

        def noted(*args: Any, **kwargs: Any) -> Claim:
            found = claim(*args, **kwargs)
            self.claims.append(found)
            return found

        self._claimer.claim = noted  # type: ignore[method-assign]  # watched, not replaced

    def is_done(self) -> bool:
        """It has looked for mail at this very moment, found no more, and will look again at a later one."""
        lanes = list(self._lanes)
        return bool(lanes) and all(lane.poll_at > self.steady() for lane in lanes)


class Time:
    """A steady clock that stands still until a test moves it on, and the database's, which goes with it."""

    def __init__(self) -> None:
        self.moment = steady()
        self.clock = DatabaseClock("default", steady=self.steady, max_age=float("inf"))
        self.clock.at(0.0)  # read by the test's own connection

    def steady(self) -> float:
        return self.moment


class Started:
    """A worker in a thread of its own, until the end of the test."""

    def __init__(self, worker: Worker, work: Callable[[], Totals]) -> None:
        self.worker = worker
        self.result: Any = None
        self.thread = threading.Thread(target=self._run, args=(work,))
        self.thread.start()

    def _run(self, work: Callable[[], Totals]) -> None:
        try:
            self.result = work()
        except BaseException as error:
            self.result = error
        finally:
            connections.close_all()

    def end(self) -> Any:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.result


@pytest.fixture
def time(settings: SettingsWrapper) -> Time:
    settings.EMAIL_QUEUE_LEASE, settings.EMAIL_QUEUE_SEND_MAX = LEASE, LEASE / 2
    settings.EMAIL_QUEUE_POLL = 0.05  # for as long it sleeps where the clock stands still
    return Time()


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    made: list[Started] = []

    def started(worker: Worker, *, drain: bool = False) -> Started:
        made.append(Started(worker, worker.drain if drain else worker.run))
        return made[-1]

    yield started
    for one in made:
        one.worker.stop()
        one.worker.stop()
        one.thread.join(PATIENCE)


# --- results ---


def test_result_is_written_within_50_ms_though_nothing_else_happens(
    script: Script, settings: SettingsWrapper, time: Time, start: Callable[..., Started]
) -> None:
    """While another send lasts nothing wakes the worker, save that the result has to be written."""
    settings.EMAIL_QUEUE_POLL = 10_000.0
    stall = Stall(script, only="slow")
    queue("slow", priority="high")
    queue("quick")
    worker = Watched(time, threads=2)
    start(worker)
    try:
        until(lambda: any(timeout < 0.05 for timeout in worker.wakes.timeouts))
        assert states() == {"slow": "sending", "quick": "sending"}  # not at once: others may be written with it
        time.moment += 0.05
        until(lambda: states() == {"slow": "sending", "quick": "sent"})
        assert stall.began == 1
    finally:
        stall.go.set()


def test_worker_that_is_ended_writes_what_it_knows(script: Script) -> None:
    """By whatever a receiver raises, here. What was sent would be sent again."""
    stall = Stall(script, only="later")
    queue("1", "later")

    def receiver(queued_message: QueuedMessage, **kwargs: Any) -> None:
        stall.go.set()
        until(lambda: worker.inbox.is_idle() and bool(worker._reports))
        raise KeyboardInterrupt

    message_sent.connect(receiver)
    worker = Worker(threads=2)
    watched: list[bool] = []
    flush = worker._settler.flush

    def noted(now: datetime) -> Any:
        watched.append(worker.in_database_since is not None)
        return flush(now)

    worker._settler.flush = noted  # type: ignore[method-assign]  # watched, not replaced
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.drain()
    finally:
        message_sent.disconnect(receiver)
    assert states() == {"1": "sent", "later": "sent"}
    assert watched == [True, True]  # a database that hangs now must not keep the process
    assert worker.in_database_since is None


# --- leases ---


def test_send_that_outlasts_its_lease_is_the_only_one_though_another_worker_looks_for_mail(
    script: Script, settings: SettingsWrapper, time: Time, start: Callable[..., Started]
) -> None:
    settings.EMAIL_QUEUE_SEND_MAX = 10 * LEASE
    stall = Stall(script)
    (row,) = queue()
    one, other = Watched(time, threads=2), Watched(time, threads=2)
    start(one)
    try:
        until(lambda: stall.began == 1)
        start(other)
        until(other.is_done)
        first_end = row_due_at(row)
        for _ in range(9):
            end = row_due_at(row)
            time.moment += LEASE / 3 + 0.1
            until(lambda end=end: row_due_at(row) > end)  # type: ignore[misc]  # bound now
            until(lambda: one.is_done() and other.is_done())
        assert time.clock.now() > first_end
        stall.go.set()
        until(lambda: states() == {"Subject": "sent"})
    finally:
        stall.go.set()
    row.refresh_from_db()
    assert (stall.began, row.attempt_count) == (1, 1)


def row_due_at(row: QueuedMessage) -> Any:
    return QueuedMessage.objects.values_list("due_at", flat=True).get(pk=row.pk)


def test_worker_does_not_claim_what_its_own_thread_is_still_sending(
    script: Script, time: Time, start: Callable[..., Started]
) -> None:
    """Between the end of a lease that is not renewed any more and the moment at which the send is written off."""
    stall = Stall(script)
    queue()
    worker = Watched(time, threads=3)
    start(worker)
    try:
        until(lambda: stall.began == 1 and worker.is_done())
        began = time.moment
        for seconds in (20.1, 45, 66):  # renewed until 80.1, then under way for too long to be renewed
            time.moment = began + seconds
            until(lambda: worker._renewed_at == time.moment and worker.is_done())
        for seconds in (81, 82, 83):
            claims = len(worker.claims)
            time.moment = began + seconds
            until(worker.is_done)
            assert 1 <= len(worker.claims) - claims <= 2  # it does not ask again and again
        assert stall.began == 1
        time.moment = began + 101
        until(lambda: stall.began == 2)
    finally:
        stall.go.set()


def test_what_another_worker_took_over_is_not_begun(
    script: Script, time: Time, start: Callable[..., Started], caplog: pytest.LogCaptureFixture
) -> None:
    """Though by this worker's own idea of its lease there would be time enough."""
    stall = Stall(script, only="slow")
    queue("slow", priority="high")
    (row,) = queue("lost")
    worker = Watched(time, threads=1)
    drain = start(worker, drain=True)
    try:
        until(lambda: stall.began == 1 and states()["lost"] == "sending")
        change(row, lease=1, due_at=future())
        time.moment += LEASE / 3 + 0.1
        until(lambda: f"leases lost to another worker: messages [{row.pk}]" in caplog.text)
        until(lambda: worker.inbox.waiting() == 0)
    finally:
        stall.go.set()
    assert drain.end() == Totals(sent=1)
    row.refresh_from_db()
    assert (script.subjects, row.state, row.lease) == (["slow"], "sending", 1)


# --- claims ---


def test_what_was_given_back_goes_before_what_is_due_later(settings: SettingsWrapper, time: Time) -> None:
    settings.EMAIL_QUEUE_BATCH_SIZE = 2
    for subject, age in [("a", 400), ("b", 300), ("c", 200), ("d", 100), ("e", 50)]:
        (row,) = queue(subject)
        change(row, due_at=past(age))
    worker = Worker(steady=time.steady, clock=time.clock)
    worker._lanes.refresh()
    (lane,) = worker._lanes
    first, second = worker._claim(lane).jobs, worker._claim(lane).jobs
    worker._held.update({job.id: job for job in [*first, *second]})
    worker._returned += first
    worker._give_back()
    third = worker._claim(lane).jobs
    assert len(second) == 2
    assert [job.id for job in third] == [job.id for job in first]


# --- one mailer beside others ---


def test_hung_mailer_beside_two_healthy_ones_has_not_all_of_three_threads(script: Script) -> None:
    stall = Stall(script, only="hangs")
    queue(*[f"hangs {number}" for number in range(20)])
    queue(*[f"healthy {number}" for number in range(10)], mailer=OTHER)
    queue(*[f"healthy too {number}" for number in range(10)], mailer=THIRD)

    def healthy_are_sent() -> bool:
        return not QueuedMessage.objects.filter(mailer__in=[OTHER, THIRD]).exclude(state="sent").exists()

    with running(threads=3) as one:
        try:
            for number in range(3):
                until(healthy_are_sent)
                until(lambda: stall.began == 2)  # as many as it may
                queue(f"healthy again {number}", mailer=OTHER)
                queue(f"healthy too again {number}", mailer=THIRD)
            until(healthy_are_sent)
            assert stall.began == 2
        finally:
            stall.go.set()
        until(lambda: not QueuedMessage.objects.exclude(state="sent").exists())
        assert one.stop().sent == 46
