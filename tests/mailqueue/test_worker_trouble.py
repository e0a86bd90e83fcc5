"""What a worker must not let happen to others: by a death, a hang, a slow receiver, a busy neighbour, a late expiry."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, connections
from django.db.backends.signals import connection_created

from anymail_retry.delivery import Delivery
from anymail_retry.mailqueue import enqueue as enqueueing
from anymail_retry.mailqueue import gate, schedule
from anymail_retry.mailqueue.claim import Claimer, Wanted
from anymail_retry.mailqueue.clock import DatabaseClock
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.schedule import Policy
from anymail_retry.mailqueue.sending import Sender
from anymail_retry.mailqueue.worker import Totals, Worker, WorkerStuck
from anymail_retry.models import Attempt, MailerState, QueuedMessage
from anymail_retry.signals import message_failed, message_sent

from .engine import (
    AMBIGUOUS,
    BLOCKED,
    DELIVERED,
    KEYED,
    PATIENCE,
    PERMANENT,
    PLAIN,
    REFUSED,
    Script,
    change,
    end_leases,
    future,
    in_threads,
    mail,
    make_due,
    past,
    queue,
    states,
)
from .test_worker import Running, Stall, break_connection, claim_and_die, drain, running, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

T = TypeVar("T")

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("script")]


def broken_once(function: Callable[..., T]) -> Callable[..., T]:
    """A function, before whose first call the connection breaks."""
    breaks = iter([True])

    def broken(*args: Any, **kwargs: Any) -> T:
        if next(breaks, False):
            break_connection()
        return function(*args, **kwargs)

    return broken


# --- deaths ---


@pytest.mark.parametrize("limit", [1, 2, None])
def test_what_a_dead_worker_had_claimed_is_sent_whatever_its_claims_and_its_age(
    script: Script, settings: SettingsWrapper, limit: int | None
) -> None:
    """It may have claimed a hundred rows and begun none; and mail may have waited over a weekend without workers."""
    settings.EMAIL_QUEUE_MAX_ATTEMPTS = limit
    queue("a", "b")
    QueuedMessage.objects.update(created_at=past(4 * 86400))
    claim_and_die(2)
    claim_and_die(2)
    assert drain() == Totals(sent=2)


def test_a_message_that_was_there_each_time_a_worker_died_is_held(script: Script) -> None:
    (row,) = queue()
    claim_and_die()
    change(row, lost_count=schedule.HELD_AFTER - 1)
    assert drain() == Totals(held=1)
    assert script.sends == []
    row.refresh_from_db()
    assert row.reason == schedule.LOST_TOO_OFTEN


def test_a_result_ends_the_suspicion(script: Script) -> None:
    (row,) = queue()
    claim_and_die()
    claim_and_die()
    script.by_subject({"Subject": BLOCKED})
    drain(limit=1)
    row.refresh_from_db()
    assert (row.state, row.lost_count) == ("deferred", 0)


def suspects(*subjects: str) -> None:
    for row in queue(*subjects):
        change(row, state="sending", lease=1, claimed_at=past(), due_at=past(), lost_count=schedule.SUSPECT_AFTER)


def claim(rows: int = 10, **wanted: Any) -> list[int]:
    claimer = Claimer("default", DatabaseClock("default"), lease=60)
    return [job.id for job in claimer.claim(PLAIN, Wanted(rows, 10**9, rows, **wanted), Policy()).jobs]


def test_what_may_have_killed_its_workers_is_claimed_one_at_a_time() -> None:
    """Or the neighbours would die with it each time."""
    suspects("suspect 1", "suspect 2")
    queue("a", "b")
    assert len(claim()) == 3
    assert len(claim(suspects=False)) == 0
    assert len(claim()) == 1


def test_a_worker_has_one_suspect_at_a_time(script: Script) -> None:
    stall = Stall(script, only="suspect")
    suspects("suspect 1", "suspect 2")
    queue("a", "b")
    with running() as one:
        until(lambda: [states()[name] for name in "ab"] == ["sent", "sent"])
        assert stall.began == 1
        stall.go.set()
        until(lambda: set(states().values()) == {"sent"})
        assert one.stop().sent == 4


# --- hangs ---


@pytest.fixture
def impatient(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_LEASE, settings.EMAIL_QUEUE_SEND_MAX = 0.6, 0.3


@pytest.mark.usefixtures("impatient")
def test_a_worker_whose_threads_all_hang_gives_back_what_waits_and_ends(script: Script) -> None:
    """Else it would renew the leases of what it can never send."""
    stall = Stall(script, only="hangs")
    queue("hangs 1", "hangs 2", priority="high")
    queue("a", "b")
    one = Running(threads=1)
    one.thread.join(PATIENCE)
    try:
        assert isinstance(one.result, WorkerStuck)
        assert {states()[name] for name in "ab"} <= {"queued", "sent"}
        QueuedMessage.objects.filter(subject__startswith="hangs").update(due_at=None)
        drain(threads=1)
        assert [states()[name] for name in "ab"] == ["sent", "sent"]
    finally:
        stall.go.set()


@pytest.mark.usefixtures("impatient")
def test_a_thread_that_comes_back_is_no_longer_made_up_for(script: Script) -> None:
    stall = Stall(script, only="hangs")
    queue("hangs")
    with running(threads=2) as one:
        until(lambda: one.worker.inbox.threads == 3)
        stall.go.set()
        until(lambda: one.worker.inbox.threads == 2)
        until(lambda: states()["hangs"] == "sent")


# --- slow receivers ---


def test_results_do_not_wait_for_all_receivers_of_earlier_ones(script: Script) -> None:
    stall = Stall(script, only="later")
    queue("1", "2", "later")
    told: list[tuple[str, str]] = []

    def receiver(queued_message: QueuedMessage, **kwargs: Any) -> None:
        told.append((queued_message.subject, states()["later"]))
        if len(told) == 1:
            stall.go.set()
            until(lambda: worker.inbox.is_idle() and bool(worker._reports))

    message_sent.connect(receiver)
    worker = Worker()
    try:
        assert worker.drain() == Totals(sent=3)
    finally:
        message_sent.disconnect(receiver)
    assert told[0][1] == "sending"
    assert [state for _, state in told[1:]] == ["sent", "sent"]


def test_leases_do_not_wait_for_all_receivers(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_LEASE, settings.EMAIL_QUEUE_SEND_MAX = 0.9, 0.8
    stall = Stall(script, only="later")
    queue("1", "2", "later")
    events: list[str] = []

    def receiver(queued_message: QueuedMessage, **kwargs: Any) -> None:
        assert worker.in_database_since is None  # the watchdog must not take this for the database's trouble
        events.append("told")
        time.sleep(worker.lease / 3)
        if events.count("told") == 2:
            stall.go.set()

    worker = Worker()
    renew = worker._claimer.renew

    def noted(jobs: Any) -> Any:
        events.append("renewed")
        return renew(jobs)

    worker._claimer.renew = noted  # type: ignore[method-assign]  # to see when
    message_sent.connect(receiver)
    try:
        assert worker.drain() == Totals(sent=3)
    finally:
        message_sent.disconnect(receiver)
    assert events[:3] == ["told", "renewed", "told"]


def test_receivers_hear_though_the_connection_broke_after_the_results_were_written(script: Script) -> None:
    script.behaviour = lambda message, delivery: PERMANENT
    heard: list[str] = []

    def receiver(queued_message: QueuedMessage, **kwargs: Any) -> None:
        heard.append(queued_message.subject)

    worker = Worker()
    worker._settler.announce = broken_once(worker._settler.announce)  # type: ignore[method-assign]  # at a known moment
    queue("a", "b")
    message_failed.connect(receiver)
    try:
        assert worker.drain().failed == 2
    finally:
        message_failed.disconnect(receiver)
    assert sorted(heard) == ["a", "b"]


def test_a_mailer_pauses_though_the_connection_broke(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "pause", broken_once(gate.pause))  # at a moment that the test can foresee
    script.behaviour = lambda message, delivery: BLOCKED
    queue("a")
    drain()
    assert MailerState.objects.get().paused_until is not None


# --- expiry ---


def test_nothing_is_begun_after_its_expiry_though_it_was_claimed_before(script: Script) -> None:
    stall = Stall(script, only="slow")
    queue("slow")
    (code,) = queue("code", expires_at=timedelta(seconds=0.3))
    with running(threads=1) as one:
        until(lambda: stall.began == 1 and states()["code"] == "sending")
        until(lambda: code.expires_at is not None and code.expires_at < past(0.2))
        stall.go.set()
        until(lambda: states()["code"] == "failed")
        assert one.stop() == Totals(sent=1, failed=1)
    code.refresh_from_db()
    assert code.reason == schedule.EXPIRED
    assert "code" not in script.subjects


def test_what_has_expired_takes_no_slot_of_a_rate(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_RATE = 0.5
    queue(*map(str, range(8)), expires_at=timedelta(hours=1))
    QueuedMessage.objects.update(expires_at=past(1), due_at=past())
    queue("live")
    assert drain() == Totals(sent=1, failed=8)
    next_slot = MailerState.objects.get().next_slot
    assert next_slot is not None
    assert next_slot < future(gate.SLOT_WIDTH / 0.5 + 0.1)


def test_what_has_expired_is_no_probe(script: Script) -> None:
    queue("dead", expires_at=timedelta(hours=1))
    QueuedMessage.objects.update(expires_at=past(1), due_at=past())
    queue("live")
    MailerState.objects.create(alias=PLAIN, paused_until=past(1), pause_seconds=60)
    assert drain() == Totals(sent=1, failed=1)
    assert MailerState.objects.get().paused_until is None


# --- claims that are not sends ---


def test_what_may_be_held_is_claimed_when_its_slot_has_come(script: Script, settings: SettingsWrapper) -> None:
    """Ahead of it, a worker that dies would have it held for nothing."""
    settings.EMAIL_QUEUE_RATE, settings.EMAIL_QUEUE_ON_AMBIGUOUS = 5, "hold"
    stall = Stall(script)
    queue(*map(str, range(5)))
    with running():
        until(lambda: stall.began == 1)
        assert list(states().values()).count("sending") == 1
        stall.go.set()


def test_what_is_given_back_has_its_old_place() -> None:
    (old,) = queue("old")
    change(old, due_at=past(1000))
    claimer = Claimer("default", DatabaseClock("default"), lease=60)
    claimer.give_back(claimer.claim(PLAIN, Wanted(1, 10**9, 1), Policy()).jobs)
    before = old.due_at
    old.refresh_from_db()
    assert old.due_at == before


def test_a_probe_whose_claim_was_interrupted_ends_the_pause_all_the_same(script: Script) -> None:
    queue(*map(str, range(5)))
    MailerState.objects.create(alias=PLAIN, paused_until=past(1), pause_seconds=60)
    worker = Worker(threads=2)
    worker._claimer._load = broken_once(worker._claimer._load)  # type: ignore[method-assign]  # at a known moment
    assert worker.drain() == Totals(sent=5)
    assert MailerState.objects.get().paused_until is None


def test_slots_of_an_interrupted_claim_are_kept_to(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_RATE = 5
    queue("1", "2")
    began: list[datetime] = []

    def send(message: Any, delivery: Any) -> Any:
        began.append(datetime.now(timezone.utc))
        return DELIVERED

    script.behaviour = send
    worker = Worker(threads=5)
    worker._claimer._load = broken_once(worker._claimer._load)  # type: ignore[method-assign]  # at a known moment
    assert worker.drain() == Totals(sent=2)
    next_slot = MailerState.objects.get().next_slot
    assert next_slot is not None
    slot = next_slot - timedelta(seconds=gate.SLOT_WIDTH / 5)
    assert max(began) >= slot - timedelta(seconds=0.02)  # what two readings of a clock may differ by


# --- ends ---


def test_a_drain_goes_on_after_a_probe_that_took_its_time(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_POLL = 0.02
    stall = Stall(script)
    queue(*map(str, range(10)))
    MailerState.objects.create(alias=PLAIN, paused_until=past(1), pause_seconds=60)
    worker = Worker()
    looks: list[bool] = []
    refresh = worker._lanes.refresh

    def noted() -> None:
        refresh()
        looks.append(True)
        if len(looks) == 50:  # it has found the mailer paused by then
            stall.go.set()

    worker._lanes.refresh = noted  # type: ignore[method-assign]  # to know when
    assert worker.drain() == Totals(sent=10)


def test_a_drain_finds_what_was_committed_late(script: Script, settings: SettingsWrapper) -> None:
    """Mail that was stored before other mail, in a transaction that ended after it."""
    settings.EMAIL_QUEUE_BATCH_SIZE = 2
    queue(*map(str, range(12)))
    begun = threading.Lock()
    stored = threading.Event()

    def store() -> None:
        (row,) = queue("late")
        change(row, due_at=past(500))

    def send(message: Any, delivery: Any) -> Any:
        if begun.acquire(blocking=False):  # the first
            in_threads(store)
            stored.set()
        assert stored.wait(PATIENCE)
        return DELIVERED

    script.behaviour = send
    assert drain(threads=2).sent == 13


def test_the_first_signal_after_max_time_is_the_first(script: Script) -> None:
    stall = Stall(script)
    queue("a")
    one = Running(max_time=0.01)
    until(lambda: stall.began == 1)
    until(lambda: one.worker._ending)
    one.worker.stop()
    assert not one.worker.was_interrupted
    stall.go.set()
    assert one.stop(again=False) == Totals(sent=1)


@pytest.fixture
def kept_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Connections that Django keeps open, and those that were opened by threads of the worker."""
    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", 600)
    opened: list[Any] = []

    def note(connection: Any, **kwargs: Any) -> None:
        if isinstance(threading.current_thread(), Sender):
            opened.append(connection)

    connection_created.connect(note)
    yield opened
    connection_created.disconnect(note)


def test_connections_of_the_threads_end_with_them(script: Script, kept_connections: list[Any]) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite in memory is shared with the threads")

    def send(message: Any, delivery: Any) -> Any:
        QueuedMessage.objects.count()  # as a receiver may
        return DELIVERED

    script.behaviour = send
    queue(*map(str, range(10)))
    drain(threads=3)
    assert kept_connections
    until(lambda: all(opened.connection is None for opened in kept_connections))


def test_the_death_of_a_worker_stands_in_the_history(script: Script) -> None:
    queue()
    claim_and_die()
    drain()
    assert list(Attempt.objects.order_by("number").values_list("number", "reason")) == [
        (1, "its worker died or lost it"),
        (2, ""),
    ]
    end_leases()


# --- history ---


def test_the_send_that_failed_before_the_queue_stands_in_the_history(script: Script) -> None:
    """Once a worker has something to add: the caller's transaction is to have two INSERTs, not three."""
    outcome = replace(REFUSED, answer="try later")
    enqueue([mail()], mailer=PLAIN, origin="fallback", delivery=Delivery(), outcome=outcome)
    make_due()
    claim_and_die()
    drain()
    attempts = Attempt.objects.order_by("number")
    assert list(attempts.values_list("number", "verdict", "http_status", "answer")) == [
        (1, "refused", 503, "try later"),
        (2, "ambiguous", None, ""),
        (3, "delivered", 200, ""),
    ]


def test_a_worker_that_hangs_ends_its_command(script: Script, impatient: None) -> None:
    """With the exit code by which a service manager knows that it should be started anew."""
    stall = Stall(script)
    queue("hangs 1", "hangs 2")
    try:
        with pytest.raises(CommandError, match="start it anew") as caught:
            call_command("send_mail", threads=1)
    finally:
        stall.go.set()
    assert caught.value.returncode == 75


# --- clocks ---


def behind(seconds: float) -> DatabaseClock:
    """The clock of a database, on a host whose own is that much ahead."""
    return DatabaseClock("default", read=lambda alias: past(seconds))


def test_when_a_message_may_have_been_taken_is_told_by_the_databases_clock(script: Script) -> None:
    """The worker that compares it with a key's window may be another host's."""
    script.behaviour = lambda message, delivery: AMBIGUOUS
    (row,) = queue(mailer=KEYED)
    change(row, due_at=past(1000))
    Worker(clock=behind(120), limit=1).drain()
    row.refresh_from_db()
    assert row.maybe_taken_since is not None
    assert past(130) < row.maybe_taken_since < past(110)
    assert row.key_used_since == row.maybe_taken_since


def test_whether_a_key_lives_is_told_by_the_databases_clock(script: Script) -> None:
    """By its own, a host that is ahead would take it for dead, and send under a new one."""
    live: list[bool] = []

    def send(message: Any, delivery: Delivery) -> Any:
        live.append(delivery.key_is_live(60.0))
        return DELIVERED

    script.behaviour = send
    (row,) = queue(mailer=KEYED)
    since = past(120 + 20)
    change(row, state="deferred", due_at=past(1000), maybe_taken_since=since, key_used_since=since)
    Worker(clock=behind(120), limit=1).drain()
    assert live == [True]


def test_a_direct_sends_times_are_stored_by_the_databases_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enqueueing, "clock_of", lambda alias: behind(120))
    now = past(0)
    delivery = Delivery(maybe_taken_since=now, key_used_since=now)
    (row,) = enqueue([mail()], mailer=KEYED, origin="fallback", delivery=delivery, outcome=AMBIGUOUS)
    assert row.maybe_taken_since is not None
    assert abs(row.maybe_taken_since - past(120)) < timedelta(seconds=10)
    assert row.key_used_since == row.maybe_taken_since


# --- what the log says ---


def test_the_log_says_until_when_a_mailer_pauses_and_when_that_is_over(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.by_subject({"blocked": BLOCKED})
    queue("blocked")
    drain()
    state = MailerState.objects.get()
    assert state.paused_until is not None
    assert f"{PLAIN} pauses until {state.paused_until:%H:%M:%S} UTC: blocked (bad key): Invalid API key" in caplog.text
    queue("good")
    MailerState.objects.update(paused_until=past(1))
    drain()
    assert f"{PLAIN} works again: its pause is over" in caplog.text
