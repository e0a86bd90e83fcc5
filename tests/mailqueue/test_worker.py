"""The worker: the life of a row from the queue to the ESP, and what may go wrong on the way."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from django.core.mail import EmailMessage
from django.db import Error as DatabaseTrouble
from django.db import connection, connections, transaction

from anymail_retry.delivery import Delivery
from anymail_retry.mailqueue import worker as module
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.worker import Totals, Worker
from anymail_retry.models import AttachmentBody, Attempt, MailerState, MessageContent, QueuedMessage
from anymail_retry.signals import message_sent
from anymail_retry.verdict import Outcome

from .engine import (
    AMBIGUOUS,
    BLOCKED,
    BROKEN,
    CANCELLED,
    DELIVERED,
    KEYED,
    OTHER,
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("script")]


def drain(**options: Any) -> Totals:
    return Worker(**options).drain()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


class Running:
    """A worker that runs in a thread of its own."""

    def __init__(self, **options: Any) -> None:
        self.worker = Worker(**options)
        self.result: Any = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self.worker.run()
        except BaseException as error:
            self.result = error
        finally:
            connections.close_all()

    def stop(self, *, again: bool = True) -> Totals:
        if again:
            self.worker.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@contextlib.contextmanager
def running(**options: Any) -> Iterator[Running]:
    one = Running(**options)
    try:
        yield one
    finally:
        one.worker.stop()
        one.thread.join(PATIENCE)


class Stall:
    """Sends that last until they are let go."""

    def __init__(self, script: Script, outcome: Outcome = DELIVERED, only: str = "") -> None:
        self.go = threading.Event()
        self.outcome = outcome
        self.only = only
        self.began = 0
        self.lock = threading.Lock()
        script.behaviour = self

    def __call__(self, message: EmailMessage, delivery: Delivery) -> Outcome:
        if not str(message.subject).startswith(self.only):
            return DELIVERED
        with self.lock:
            self.began += 1
        assert self.go.wait(PATIENCE)
        return self.outcome


# --- the life of a row ---


def test_due_mail_is_sent_once(script: Script) -> None:
    queue(*map(str, range(250)))
    assert drain() == Totals(sent=250)
    assert drain() == Totals()
    assert sorted(script.subjects, key=int) == list(map(str, range(250)))
    assert set(states().values()) == {"sent"}
    assert Attempt.objects.count() == 250
    assert not MessageContent.objects.exists()


def test_each_outcome_brings_its_row_to_a_state(script: Script) -> None:
    outcomes = {"sent": DELIVERED, "deferred": REFUSED, "maybe": AMBIGUOUS, "failed": PERMANENT, "cancelled": CANCELLED}
    script.by_subject(outcomes)
    queue(*outcomes)
    assert drain(limit=5) == Totals(sent=1, deferred=2, failed=1, cancelled=1)
    assert states() == {name: name if name != "maybe" else "deferred" for name in outcomes}


def test_deferred_mail_is_sent_when_it_is_due(script: Script) -> None:
    script.by_subject({"Subject": REFUSED})
    (row,) = queue()
    drain(limit=1)
    change(row, due_at=future())
    script.by_subject({})
    assert drain().sent == 0
    make_due()
    assert drain().sent == 1
    row.refresh_from_db()
    assert row.attempt_count == 2
    assert list(Attempt.objects.order_by("number").values_list("number", "verdict")) == [
        (1, "refused"),
        (2, "delivered"),
    ]


def test_same_key_is_used_for_every_attempt(script: Script) -> None:
    script.by_subject({"Subject": AMBIGUOUS})
    (row,) = queue(mailer=KEYED)
    for _ in range(3):
        make_due()
        drain(limit=1)
    assert {send.key for send in script.sends} == {row.key}


def test_mail_is_not_sent_before_its_time_nor_after_its_end(script: Script) -> None:
    queue("early", not_before=timedelta(hours=1))
    (late,) = queue("late", expires_at=timedelta(minutes=10))
    change(late, expires_at=past(1))
    queue("in time", expires_at=timedelta(minutes=10))
    assert drain() == Totals(sent=1, failed=1)
    assert script.subjects == ["in time"]
    late.refresh_from_db()
    assert (late.state, late.reason, late.attempt_count) == ("failed", "expired", 0)


def test_expired_mail_is_found_though_it_waits_for_later(script: Script) -> None:
    (row,) = queue(not_before=timedelta(hours=5), expires_at=timedelta(hours=1))
    change(row, due_at=past(1), expires_at=past(1))
    assert drain() == Totals(failed=1)


@pytest.mark.parametrize(("not_before", "became"), [(None, "failed"), (60, "deferred")])
def test_the_age_of_mail_counts_from_when_it_may_go(script: Script, not_before: float | None, became: str) -> None:
    script.behaviour = lambda message, delivery: REFUSED
    (row,) = queue()
    scheduled = None if not_before is None else past(not_before)
    change(row, created_at=past(30 * 86400), not_before=scheduled)
    drain()
    row.refresh_from_db()
    assert row.state == became


def test_high_priority_goes_first(script: Script) -> None:
    for subject, priority in [("low", "low"), ("medium", "medium"), ("high", "high")]:
        queue(subject, priority=priority)
    drain(threads=1)
    assert script.subjects == ["high", "medium", "low"]


def test_mail_is_sent_with_its_attachments_and_they_are_gone_then(script: Script) -> None:
    message = mail()
    message.attach("a.bin", b"\0\1\2", "application/octet-stream")
    enqueue([message], mailer=PLAIN, origin="queued")
    drain()
    assert script.sends[0].message.attachments == [("a.bin", b"\0\1\2", "application/octet-stream")]
    assert not AttachmentBody.objects.exists()


def test_content_is_kept_where_the_settings_say_so(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_KEEP_CONTENT = True
    queue()
    drain()
    assert MessageContent.objects.count() == 1


def test_fallback_row_is_as_pre_send_left_it(script: Script) -> None:
    enqueue([mail("fallback")], mailer=PLAIN, origin="fallback", delivery=Delivery(), outcome=REFUSED)
    queue("first")
    make_due()
    drain()
    assert {send.subject: send.pre_send_done for send in script.sends} == {"fallback": True, "first": False}


# --- which mail ---


def test_worker_works_for_the_mailers_that_it_is_told() -> None:
    queue("a")
    queue("b", mailer=OTHER)
    assert drain(only=[OTHER]) == Totals(sent=1)
    assert states() == {"a": "queued", "b": "sent"}


def test_worker_ends_at_its_limit() -> None:
    queue(*map(str, range(20)))
    assert drain(limit=7).sent == 7
    assert QueuedMessage.objects.filter(state="queued").count() == 13


def test_worker_ends_at_its_time(script: Script) -> None:
    stall = Stall(script)
    queue(*map(str, range(50)))
    worker = Worker(max_time=0.2, threads=2)
    threading.Timer(1.0, stall.go.set).start()
    totals = worker.run()
    assert 0 < totals.sent < 50
    assert QueuedMessage.objects.filter(state="sending").count() == 0


def test_mail_of_a_mailer_that_is_gone_is_held_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    queue("gone", mailer="newsletter")
    queue("gone too", mailer="no.such.Backend")
    queue("here")
    assert drain() == Totals(sent=1, held=2)
    reasons = dict(QueuedMessage.objects.filter(state="held").values_list("subject", "reason"))
    assert "add it to MAILERS" in reasons["gone"]
    assert "no.such.Backend" in reasons["gone too"]
    assert MessageContent.objects.count() == 2
    assert "newsletter" in caplog.text


def test_mail_of_a_mailer_that_cannot_be_set_up_waits(caplog: pytest.LogCaptureFixture) -> None:
    queue("broken", mailer=BROKEN)
    queue("here")
    assert drain().sent == 1
    row = QueuedMessage.objects.get(subject="broken")
    assert (row.state, row.verdict, row.reason) == ("deferred", "blocked", "configuration")
    assert MailerState.objects.get(alias=BROKEN).paused_until is not None


# --- poison ---


@pytest.mark.parametrize("poison", ["payload", "content", "attachment", "back end"])
def test_bad_row_costs_only_itself(script: Script, poison: str) -> None:
    message = mail("bad")
    message.attach("a.bin", b"1", "application/octet-stream")
    queue("a", "b")
    (row,) = enqueue([message], mailer=PLAIN, origin="queued")
    queue("c", "d")
    if poison == "payload":
        MessageContent.objects.filter(message=row).update(payload='{"v": 1, "class": "Nonsense"}')
    elif poison == "content":
        MessageContent.objects.filter(message=row).delete()
    elif poison == "attachment":
        AttachmentBody.objects.all().delete()
    else:

        def fail(message: EmailMessage, delivery: Delivery) -> Outcome:
            if message.subject == "bad":
                raise ValueError("what nobody thought of")
            return DELIVERED

        script.behaviour = fail
    assert drain() == Totals(sent=4, held=1)
    row.refresh_from_db()
    assert row.state == "held"
    assert row.reason
    assert MessageContent.objects.filter(message=row).exists() == (poison != "content")


# --- recovery ---


def claim_and_die(number: int = 1) -> None:
    """A worker claims, and is never heard of again."""
    worker = Worker()
    worker._lanes.refresh()
    for lane in worker._lanes:
        worker._claimer.claim(lane.name, module.Wanted(rows=number, size=10**9, at_once=number), lane.policy)
    end_leases()


def test_row_of_a_dead_worker_is_sent_again_under_the_same_key(script: Script) -> None:
    (row,) = queue()
    claim_and_die()
    assert drain() == Totals(sent=1)
    assert script.sends[0].key == row.key
    assert list(Attempt.objects.order_by("number").values_list("number", "verdict")) == [
        (1, "ambiguous"),
        (2, "delivered"),
    ]


def test_row_of_a_dead_worker_is_held_where_the_policy_says_so(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_ON_AMBIGUOUS = "hold"
    queue("plain")
    queue("keyed", mailer=KEYED)
    claim_and_die()
    assert drain() == Totals(sent=1, held=1)
    assert states() == {"plain": "held", "keyed": "sent"}
    row = QueuedMessage.objects.get(subject="plain")
    assert (row.reason, row.attempt_count) == ("maybe taken", 1)
    assert Attempt.objects.get(message=row).verdict == "ambiguous"


MAY_ARRIVE_TWICE = (logging.WARNING, "without a key that protects it: it may arrive twice")


@pytest.mark.parametrize(
    ("mailer", "taken", "told"),
    [
        pytest.param(KEYED, ["maybe_taken_since", "key_used_since"], (logging.INFO, "under its key"), id="live key"),
        pytest.param(KEYED, ["maybe_taken_since"], MAY_ARRIVE_TWICE, id="another key than before"),
        pytest.param(PLAIN, ["maybe_taken_since", "key_used_since"], MAY_ARRIVE_TWICE, id="an ESP without keys"),
        pytest.param(PLAIN, [], None, id="surely not taken"),
    ],
)
def test_each_resend_of_what_may_have_been_taken_is_logged(
    script: Script, caplog: pytest.LogCaptureFixture, mailer: str, taken: list[str], told: tuple[int, str] | None
) -> None:
    caplog.set_level(logging.INFO, "anymail_retry.queue")
    since = past(300)
    (row,) = queue("Your secret link", mailer=mailer)
    change(row, state="deferred", attempt_count=1, **dict.fromkeys(taken, since))
    what = f"{mailer}: message {row.pk} may have been taken at {since:%Y-%m-%d %H:%M:%S} UTC; sending it again"
    expected = [(told[0], f"{what} {told[1]}")] if told else []
    script.behaviour = lambda message, delivery: AMBIGUOUS if told else REFUSED
    for _ in range(2):
        caplog.clear()
        make_due()
        assert drain() == Totals(deferred=1)
        lines = [(record.levelno, record.getMessage()) for record in caplog.records]
        assert [line for line in lines if "sending it again" in line[1]] == expected
        assert not any("secret" in text for _, text in lines)


def test_resend_of_a_dead_workers_row_is_logged(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    (row,) = queue()
    claim_and_die()
    drain()
    (line,) = [line for line in caplog.messages if "sending it again" in line]
    assert line.startswith(f"{PLAIN}: message {row.pk} may have been taken at ")


def test_key_that_died_while_its_row_waited_leads_to_a_hold(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_ON_AMBIGUOUS = "hold"
    (row,) = queue(mailer=KEYED)
    change(row, state="deferred", attempt_count=1, maybe_taken_since=past(7200), key_used_since=past(7200))
    assert drain() == Totals(held=1)
    assert script.sends == []


def test_row_whose_key_is_replaced_remembers_that_it_may_have_been_taken(
    script: Script, settings: SettingsWrapper
) -> None:
    (row,) = queue(mailer=KEYED)
    since, old = past(7200), row.key
    change(row, state="deferred", attempt_count=1, maybe_taken_since=since, key_used_since=since)
    script.behaviour = lambda message, delivery: REFUSED
    assert drain() == Totals(deferred=1)
    row.refresh_from_db()
    assert row.key == script.sends[0].key != old
    assert (row.maybe_taken_since, row.key_used_since) == (since, None)
    settings.EMAIL_QUEUE_ON_AMBIGUOUS = "hold"
    make_due()
    assert drain() == Totals(held=1)
    assert len(script.sends) == 1


# --- leases ---


def test_lease_is_renewed_while_a_send_lasts(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_LEASE = 0.9
    stall = Stall(script)
    (row,) = queue()
    with running() as one:
        until(lambda: stall.began == 1)
        row.refresh_from_db()
        first = row.due_at

        def renewed() -> bool:
            row.refresh_from_db()
            return row.due_at is not None and first is not None and row.due_at > first + timedelta(seconds=0.9)

        until(renewed)
        stall.go.set()
        assert one.stop().sent == 1
    assert stall.began == 1


def test_send_that_never_ends_is_written_off_and_its_row_sent_by_another(
    script: Script, settings: SettingsWrapper, caplog: pytest.LogCaptureFixture
) -> None:
    settings.EMAIL_QUEUE_LEASE = 0.6
    settings.EMAIL_QUEUE_SEND_MAX = 0.3
    stall = Stall(script)
    (row,) = queue()
    assert drain() == Totals()  # it ends, though its thread does not
    assert "EMAIL_QUEUE_SEND_MAX" in caplog.text
    row.refresh_from_db()
    assert row.state == "sending"
    script.behaviour = lambda message, delivery: DELIVERED
    assert drain() == Totals(sent=1)
    stall.go.set()


def test_thread_that_never_comes_back_is_replaced(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_LEASE = 0.6
    settings.EMAIL_QUEUE_SEND_MAX = 0.3
    settings.EMAIL_QUEUE_ON_AMBIGUOUS = "hold"
    stall = Stall(script, only="hangs")
    queue("hangs", priority="high")
    queue("a", "b", "c")
    assert drain(threads=1).sent == 3
    stall.go.set()


# --- ambiguous: only what was begun may be held ---


def test_under_hold_no_row_is_claimed_that_is_not_begun(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_ON_AMBIGUOUS = "hold"
    stall = Stall(script)
    queue(*map(str, range(30)))
    with running(threads=4) as one:
        until(lambda: stall.began == 4)
        assert QueuedMessage.objects.filter(state="sending").count() == 4
        stall.go.set()
        until(lambda: QueuedMessage.objects.filter(state="sent").count() == 30)
        assert one.stop().sent == 30


def test_under_resend_the_worker_looks_ahead(script: Script) -> None:
    stall = Stall(script)
    queue(*map(str, range(30)))
    with running(threads=4) as one:
        until(lambda: stall.began == 4)
        assert QueuedMessage.objects.filter(state="sending").count() == 30
        stall.go.set()
        until(lambda: QueuedMessage.objects.filter(state="sent").count() == 30)
        one.stop()


# --- stopping ---


def test_stopped_worker_finishes_what_it_sends_and_gives_back_the_rest(script: Script) -> None:
    stall = Stall(script)
    queue(*map(str, range(30)))
    one = Running(threads=4)
    until(lambda: stall.began == 4)
    one.worker.stop()
    until(lambda: QueuedMessage.objects.filter(state="queued").count() == 26)
    assert one.thread.is_alive()
    stall.go.set()
    assert one.stop(again=False).sent == 4
    assert QueuedMessage.objects.filter(state="queued", attempt_count=0, lease=None).count() == 26
    assert stall.began == 4


def test_worker_that_is_stopped_twice_does_not_wait(script: Script) -> None:
    stall = Stall(script)
    queue(*map(str, range(9)))
    one = Running(threads=2)
    until(lambda: stall.began == 2)
    one.worker.stop()
    one.worker.stop()
    one.thread.join(PATIENCE)
    assert not one.thread.is_alive()
    assert one.worker.was_interrupted
    assert QueuedMessage.objects.filter(state="sending").count() == 2
    stall.go.set()


def test_exception_in_the_main_thread_gives_back_what_waits(script: Script) -> None:
    stall = Stall(script)
    queue(*map(str, range(9)))
    worker = Worker(threads=2)

    def interrupt(totals: Totals) -> None:
        raise KeyboardInterrupt

    worker.on_progress = interrupt
    stall.only = "x"  # the first results come at once
    stall.go.set()
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    assert QueuedMessage.objects.filter(state="sending").count() <= 2


# --- the database ---


@pytest.mark.django_db(transaction=False)
def test_worker_runs_inside_a_test_case(script: Script) -> None:
    assert connection.in_atomic_block
    queue("a", "b")
    assert drain() == Totals(sent=2)


def test_worker_refuses_somebody_elses_transaction() -> None:
    queue()
    with transaction.atomic(), pytest.raises(RuntimeError, match="durable"):
        drain()


def break_connection() -> None:
    """The calling thread's connection ends, and Django does not know."""
    connection.ensure_connection()
    connection.connection.close()


def test_stale_connection_is_replaced(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    queue(*map(str, range(300)))
    worker = Worker(threads=4)
    breaks = iter([True, True])

    def break_it(totals: Totals) -> None:
        if next(breaks, False):
            break_connection()

    worker.on_progress = break_it
    assert worker.drain() == Totals(sent=300)
    assert len(script.sends) == 300
    assert "trying again" in caplog.text


def test_failed_settle_is_tried_again_and_nothing_sent_twice(script: Script) -> None:
    queue("a", "b", "c")
    worker = Worker(threads=1)
    settle, fails = worker._settler.settle, iter([True] * 2)

    def settle_later(*args: Any, **kwargs: Any) -> Any:
        if next(fails, False):
            break_connection()
        return settle(*args, **kwargs)

    worker._settler.settle = settle_later  # type: ignore[method-assign]  # the database goes away at the worst moment
    assert worker.drain() == Totals(sent=3)
    assert sorted(script.subjects) == ["a", "b", "c"]
    assert Attempt.objects.count() == 3


def test_claim_that_was_interrupted_is_finished(script: Script) -> None:
    """The rows are ours, and the connection breaks before they are read."""
    queue(*map(str, range(20)))
    worker = Worker(threads=2)
    load, breaks = worker._claimer._load, iter([True])

    def load_later(*args: Any) -> Any:
        if next(breaks, False):
            break_connection()
        return load(*args)

    worker._claimer._load = load_later  # type: ignore[method-assign]  # the database goes away at the worst moment
    assert worker.drain() == Totals(sent=20)
    assert set(QueuedMessage.objects.values_list("attempt_count", "maybe_taken_since")) == {(1, None)}


def test_server_that_ends_the_connection_is_asked_again(script: Script) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has no server")
    queue(*map(str, range(200)))
    victims: list[int] = []
    lock = threading.Lock()

    def kill(message: EmailMessage, delivery: Delivery) -> Outcome:
        with lock:
            if victims and message.subject in ("50", "120"):
                with connection.cursor() as cursor:
                    statement = "SELECT pg_terminate_backend(%s)" if connection.vendor == "postgresql" else "KILL %s"
                    cursor.execute(statement, [victims.pop()])
        return DELIVERED

    script.behaviour = kill
    worker = Worker(threads=4)

    def remember(totals: Totals) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()" if connection.vendor == "postgresql" else "SELECT CONNECTION_ID()")
            victims[:] = [cursor.fetchone()[0]]

    worker.on_progress = remember
    remember(Totals())
    assert worker.drain() == Totals(sent=200)
    assert len(script.sends) == 200


def test_drain_says_so_when_the_database_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueuedMessage._meta, "db_table", "no_such_table")
    with pytest.raises(DatabaseTrouble):
        drain()


def test_hung_database_is_seen_from_outside(script: Script) -> None:
    worker = Worker()
    seen: list[Any] = []
    worker.on_progress = lambda totals: seen.append(worker.in_database_since)
    queue()
    worker.drain()
    assert seen[0] is not None
    assert worker.in_database_since is None


# --- many workers ---


def test_workers_together_send_everything_once(script: Script) -> None:
    queue(*map(str, range(400)))
    totals = in_threads(*[lambda: drain(threads=3)] * 4)
    left = drain()
    assert sum(total.sent for total in totals) + left.sent == 400
    assert len(script.subjects) == len(set(script.subjects)) == 400


# --- one mailer beside another ---


def test_hung_mailer_does_not_starve_a_healthy_one(script: Script) -> None:
    stall = Stall(script, only="slow")
    queue(*[f"slow {number}" for number in range(60)])
    queue(*[f"quick {number}" for number in range(40)], mailer=OTHER)
    with running(threads=8) as one:
        until(lambda: QueuedMessage.objects.filter(mailer=OTHER, state="sent").count() == 40)
        assert stall.began <= 6
        queue("quick again", mailer=OTHER)
        until(lambda: states()["quick again"] == "sent")
        stall.go.set()
        until(lambda: not QueuedMessage.objects.exclude(state="sent").exists())
        one.stop()


# --- pauses ---


def test_blocked_account_pauses_its_mailer_and_costs_no_attempts(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.behaviour = lambda message, delivery: BLOCKED
    queue(*map(str, range(200)))
    drain(threads=2)
    assert len(script.sends) <= 2 * 2  # what was under way when the first answer came
    state = MailerState.objects.get(alias=PLAIN)
    assert state.paused_until is not None
    assert "Invalid API key" in state.pause_reason
    assert QueuedMessage.objects.filter(attempt_count=0, state="queued").count() >= 196
    assert QueuedMessage.objects.filter(state="sending").count() == 0
    sent = len(script.sends)
    assert drain() == Totals()
    assert len(script.sends) == sent
    assert "pauses" in caplog.text


def end_pause() -> None:
    MailerState.objects.update(paused_until=past(1))


def test_one_probe_ends_the_pause(script: Script) -> None:
    script.by_subject({"blocked": BLOCKED})
    queue("blocked")
    drain(limit=1)
    queue(*map(str, range(5)))
    make_due()
    end_pause()
    first = len(script.sends)
    drain(threads=4)
    assert script.subjects[first] != "blocked"  # not the one that caused it, while another is due
    assert {name for name, state in states().items() if state == "sent"} == set(map(str, range(5)))
    assert script.subjects.count("blocked") == 2


def test_probe_that_is_blocked_too_leaves_the_others_alone(script: Script) -> None:
    script.behaviour = lambda message, delivery: BLOCKED
    queue(*map(str, range(50)))
    drain(threads=1, limit=1)
    end_pause()
    before = len(script.sends)
    drain(threads=8)
    assert len(script.sends) == before + 1
    state = MailerState.objects.get(alias=PLAIN)
    assert state.pause_seconds == 120
    assert QueuedMessage.objects.filter(state="sending").count() == 0


def test_only_message_of_a_mailer_is_its_own_probe(script: Script) -> None:
    script.behaviour = lambda message, delivery: BLOCKED
    queue()
    drain(limit=1)
    make_due()
    end_pause()
    script.behaviour = lambda message, delivery: DELIVERED
    assert drain() == Totals(sent=1)
    assert MailerState.objects.get(alias=PLAIN).paused_until is None


def test_eight_workers_send_one_probe(script: Script) -> None:
    script.behaviour = lambda message, delivery: BLOCKED
    queue(*map(str, range(100)))
    drain(threads=1, limit=1)
    end_pause()
    before = len(script.sends)
    in_threads(*[lambda: drain(threads=2)] * 8)
    assert len(script.sends) == before + 1


def test_stopped_worker_gives_back_its_probe(script: Script) -> None:
    queue("a")
    MailerState.objects.create(alias=PLAIN, paused_until=past(1), pause_seconds=60, paused_by=-1)
    worker = Worker()
    worker._lanes.refresh()
    (lane,) = worker._lanes
    worker._lanes.mailers.clear()
    claim = worker._claim(lane)
    (job,) = claim.jobs
    assert job.probe is not None
    worker._held[job.id] = job
    worker._returned.append(job)
    worker.stop()
    worker.run()
    assert drain() == Totals(sent=1)


def test_pause_of_one_mailer_is_not_anothers(script: Script) -> None:
    script.by_subject({"blocked": BLOCKED})
    queue("blocked")
    queue("fine", mailer=OTHER)
    assert drain().sent == 1


# --- rate ---


def test_rate_is_kept(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_RATE = 50
    begins: list[float] = []

    def note(message: EmailMessage, delivery: Delivery) -> Outcome:
        begins.append(time.monotonic())
        return DELIVERED

    script.behaviour = note
    queue(*map(str, range(30)))
    began = time.monotonic()
    assert drain(threads=4) == Totals(sent=30)
    # Thirty slots of 21 ms each; a busy machine makes it longer, never shorter.
    assert max(begins) - began >= 29 * 0.021 - 0.005


def test_rate_is_kept_by_workers_together(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_RATE = 50
    queue(*map(str, range(40)))
    began = time.monotonic()
    totals = in_threads(*[lambda: drain(threads=2)] * 3)
    assert sum(total.sent for total in totals) == 40
    assert time.monotonic() - began >= 39 * 0.021 - 0.005


def test_one_mailers_rate_is_not_anothers(script: Script, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_RATE = 0.01
    queue("a", "b")
    worker = Worker()
    worker._lanes.refresh()
    (lane,) = worker._lanes
    lane.rate = None
    assert worker.drain() == Totals(sent=2)


def test_idle_worker_uses_up_no_slots(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_RATE = 2
    (row,) = queue()
    change(row, due_at=future())
    drain()
    assert not MailerState.objects.filter(next_slot__isnull=False).exists()


# --- who hears of it ---


def test_receiver_hears_of_each_message_when_it_is_settled() -> None:
    heard: list[str] = []

    def hear(queued_message: QueuedMessage, **kwargs: Any) -> None:
        heard.append(f"{queued_message.subject} {queued_message.state}")

    message_sent.connect(hear)
    try:
        queue("a", "b")
        drain()
    finally:
        message_sent.disconnect(hear)
    assert sorted(heard) == ["a sent", "b sent"]


def test_raising_receiver_costs_nothing(script: Script) -> None:
    def hear(**kwargs: Any) -> None:
        raise RuntimeError("receiver")

    message_sent.connect(hear)
    try:
        queue("a", "b")
        assert drain() == Totals(sent=2)
    finally:
        message_sent.disconnect(hear)
    assert drain() == Totals()
    assert len(script.sends) == 2


# --- running for long ---


def test_running_worker_finds_new_mail(script: Script) -> None:
    with running(threads=2) as one:
        queue("a")
        until(lambda: states() == {"a": "sent"})
        queue("b", mailer=OTHER)
        until(lambda: states() == {"a": "sent", "b": "sent"})
        assert one.stop() == Totals(sent=2)


def test_running_worker_survives_a_database_that_is_away(
    script: Script, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TROUBLE_MAX", 0.05)
    with running(threads=2) as one:
        queue("a")
        until(lambda: states() == {"a": "sent"})
        with monkeypatch.context() as away:
            away.setattr(QueuedMessage._meta, "db_table", "no_such_table")
            until(lambda: caplog.text.count("trying again") >= 3)
        queue("b")
        until(lambda: states() == {"a": "sent", "b": "sent"})
        assert one.stop() == Totals(sent=2)


def test_memory_is_bounded_by_bytes(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_LOAD", 100_000)
    messages = []
    for _ in range(20):
        message = mail()
        message.body = "x" * 40_000
        messages.append(message)
    enqueue(messages, mailer=PLAIN, origin="queued")
    worker = Worker(threads=4)
    loads: list[int] = []
    claim = worker._claimer.claim

    def watch(*args: Any, **kwargs: Any) -> Any:
        claimed = claim(*args, **kwargs)
        loads.append(sum(job.size for job in [*worker._held.values(), *claimed.jobs]))
        return claimed

    worker._claimer.claim = watch  # type: ignore[method-assign]  # watched, not replaced
    assert worker.drain().sent == 20
    assert max(loads) <= 100_000


def test_slow_mailer_leaves_memory_to_others(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_LOAD", 100_000)
    stall = Stall(script, only="slow")
    for number in range(20):
        message = mail(f"slow {number}")
        message.body = "x" * 20_000
        enqueue([message], mailer=PLAIN, origin="queued")
    with running(threads=8) as one:
        until(lambda: stall.began >= 3)
        queue("quick", mailer=OTHER)
        until(lambda: states()["quick"] == "sent")
        stall.go.set()
        until(lambda: not QueuedMessage.objects.exclude(state="sent").exists())
        one.stop()


def test_answer_that_waits_for_the_database_keeps_its_lease(script: Script, settings: SettingsWrapper) -> None:
    """The database is away for longer than a send may last; what was answered is not taken for a hung send."""
    settings.EMAIL_QUEUE_LEASE = 0.6
    settings.EMAIL_QUEUE_SEND_MAX = 0.3
    queue()
    worker = Worker(threads=1)
    settle, away_until = worker._settler.settle, time.monotonic() + 1.5

    def settle_later(*args: Any, **kwargs: Any) -> Any:
        if time.monotonic() < away_until:
            break_connection()
        return settle(*args, **kwargs)

    worker._settler.settle = settle_later  # type: ignore[method-assign]  # the database is away
    assert worker.drain() == Totals(sent=1)
    assert worker.inbox.threads == 1
    assert len(script.sends) == 1
