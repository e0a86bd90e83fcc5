"""PostgreSQL's notifications: who sends one, and the worker that sleeps until one comes."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connection, connections, transaction
from django.test import TestCase

from anymail_retry.mailqueue import operations, wakeup
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.states import State
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import QueuedMessage

from .engine import OTHER, PATIENCE, PLAIN, REFUSED, Script, change, future, in_threads, mail, past, queue, statements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("_postgresql")]

NEVER = 3600


@pytest.fixture
def _postgresql() -> None:
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL notifies")


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


# --- who sends a notification ---


@pytest.fixture
def heard() -> Iterator[Callable[[], list[str]]]:
    """The payloads of all notifications since the last call."""
    ears = connections["default"].copy()
    ears.connect()
    raw: Any = ears.connection
    raw.execute("LISTEN anymail_retry")

    def listen() -> list[str]:
        with connection.cursor() as cursor:
            cursor.execute("NOTIFY anymail_retry, 'that is all'")
        payloads: list[str] = []
        while "that is all" not in payloads:
            arrived = [notification.payload for notification in raw.notifies(timeout=PATIENCE, stop_after=1)]
            assert arrived
            payloads += arrived
        return payloads[:-1]

    yield listen
    ears.close()


class Undone(Exception):
    """Rolls back."""


@contextmanager
def undone() -> Iterator[None]:
    try:
        with transaction.atomic():
            yield
            raise Undone
    except Undone:
        pass


def one_transaction() -> None:
    with transaction.atomic():
        for _ in range(3):
            queue()


def two_mailers() -> None:
    with transaction.atomic():
        for mailer in (PLAIN, OTHER, PLAIN, OTHER):
            queue(mailer=mailer)


def savepoints() -> None:
    with transaction.atomic():
        for _ in range(3):
            with transaction.atomic():
                queue()


def first_savepoint_is_undone() -> None:
    with transaction.atomic():
        with undone():
            queue()
        queue()


def last_savepoint_is_undone() -> None:
    with transaction.atomic():
        queue()
        with undone():
            queue()


def only_what_is_undone() -> None:
    with transaction.atomic():
        with undone():
            queue()
        QueuedMessage.objects.count()


def synchronous_commit() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SHOW synchronous_commit")
        return str(cursor.fetchone()[0])


def test_only_the_notification_is_not_waited_for_to_be_on_disk(heard: Callable[[], list[str]]) -> None:
    with statements() as found:
        queue()
    (notification,) = [sql for sql in found if "pg_notify" in sql]
    assert "'synchronous_commit', 'off'" in notification
    assert synchronous_commit() == "on"
    with transaction.atomic(), TestCase.captureOnCommitCallbacks(execute=True):
        queue()
        assert synchronous_commit() == "on"
    assert heard() == [PLAIN, PLAIN]


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        pytest.param(queue, [PLAIN], id="a message"),
        pytest.param(lambda: queue(*map(str, range(500))), [PLAIN], id="500 in one call: once"),
        pytest.param(one_transaction, [PLAIN], id="several calls in one transaction: once"),
        pytest.param(lambda: [queue(), queue()], [PLAIN, PLAIN], id="two transactions: each"),
        pytest.param(two_mailers, [PLAIN, OTHER], id="two mailers in one transaction: each"),
        pytest.param(savepoints, [PLAIN], id="savepoints of one transaction: once"),
        pytest.param(undone()(queue), [], id="rolled back: nobody is woken"),
        pytest.param(only_what_is_undone, [], id="savepoint rolled back: nobody is woken"),
        pytest.param(first_savepoint_is_undone, [PLAIN], id="another savepoint rolled back before"),
        pytest.param(last_savepoint_is_undone, [PLAIN], id="another savepoint rolled back after"),
        pytest.param(lambda: queue(not_before=future()), [], id="not due yet"),
        pytest.param(
            lambda: enqueue([mail()], mailer=PLAIN, origin="fallback", outcome=REFUSED), [], id="fallback: due later"
        ),
    ],
)
def test_storing_due_mail_notifies_once_it_is_committed(
    heard: Callable[[], list[str]], store: Callable[[], object], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.9)  # a fallback's delay, which could be none at all
    store()
    assert heard() == expected


def everything() -> Any:
    return QueuedMessage.objects.all()


@pytest.mark.parametrize(
    ("operate", "expected"),
    [
        pytest.param(lambda: operations.retry_now(everything()), [wakeup.ANY], id="retried"),
        pytest.param(lambda: operations.retry_now(everything(), [State.QUEUED]), [], id="nothing to retry"),
        pytest.param(lambda: operations.release(everything()), [wakeup.ANY], id="released"),
        pytest.param(lambda: operations.send_again(everything().get(state="failed")), [PLAIN], id="sent again"),
        pytest.param(lambda: operations.cancel(everything()), [], id="cancelled"),
        pytest.param(lambda: operations.resume(PLAIN), [wakeup.ANY], id="resumed"),
        pytest.param(lambda: operations.resume(OTHER), [], id="was not paused"),
    ],
)
def test_operator_who_makes_mail_due_notifies(
    heard: Callable[[], list[str]], operate: Callable[[], object], expected: list[str]
) -> None:
    for state in ("deferred", "held", "failed"):
        (row,) = queue(not_before=future())
        change(row, state=state, due_at=future() if state == "deferred" else None)
    operations.pause(PLAIN)
    operate()
    assert heard() == expected


@pytest.mark.parametrize("inside", [False, True], ids=["after the commit", "in a transaction, as tests run hooks"])
def test_notification_that_fails_harms_nobody(
    django_capture_on_commit_callbacks: Any, inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if "pg_notify" in sql:
            tried.append(params)
            sql, params = "SELECT 1/0", None
        return execute(sql, params, many, context)

    with connection.execute_wrapper(fail):
        if inside:
            with transaction.atomic():
                with django_capture_on_commit_callbacks(execute=True):
                    queue("kept")
                queue("usable")
        else:
            queue("kept")
    assert tried
    assert caplog.records == []  # nothing was lost
    assert QueuedMessage.objects.filter(subject="kept").exists()
    assert QueuedMessage.objects.filter(subject="usable").exists() is inside


# --- who is woken by one ---


def listeners() -> list[int]:
    """The server's processes for connections that listen, and were found to hear."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'UNLISTEN anymail%'"
        )
        return [pid for (pid,) in cursor.fetchall()]


def others() -> int:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return int(cursor.fetchone()[0])


def at_work(run: Callable[[], None], worker: Worker | None = None) -> None:
    """Run a block while a worker works in a thread of its own, which has to end at once afterwards."""
    worker = worker or Worker()

    def block() -> None:
        try:
            run()
        finally:
            worker.stop()

    in_threads(worker.run, block)


def sent() -> set[str]:
    return set(QueuedMessage.objects.filter(state="sent").values_list("subject", flat=True))


def send(*subjects: str, mailer: str = PLAIN) -> None:
    """One after the other, so that each has to wake a worker that found nothing more to do."""
    for subject in subjects:
        queue(subject, mailer=mailer)
        until(lambda wanted=subject: wanted in sent())  # type: ignore[misc]  # bound now


@pytest.fixture
def never_polls(settings: SettingsWrapper, script: Script) -> None:
    settings.EMAIL_QUEUE_POLL = NEVER


@pytest.mark.usefixtures("never_polls")
def test_sleeping_worker_is_woken() -> None:
    worker = Worker()

    def is_known_to_pause() -> bool:
        state = worker._lanes[PLAIN].state
        return state is not None and state.paused_until is not None

    def block() -> None:
        until(listeners)
        send("first", "second", "third")
        send("another mailer's", mailer=OTHER)
        (later,) = queue("later", not_before=future())
        operations.retry_now(QueuedMessage.objects.filter(pk=later.pk), [State.QUEUED])
        until(lambda: "later" in sent())
        operations.pause(PLAIN)
        send("of the other", mailer=OTHER)
        until(is_known_to_pause)
        queue("kept back")
        send("of the other, again", mailer=OTHER)
        assert "kept back" not in sent()
        operations.resume(PLAIN)
        until(lambda: "kept back" in sent())

    at_work(block, worker)


@pytest.mark.usefixtures("never_polls")
def test_woken_worker_finds_what_was_stored_before_other_mail_and_committed_after_it() -> None:
    def block() -> None:
        until(listeners)
        with transaction.atomic():
            (slow,) = queue("slow")
            in_threads(partial(send, "quick"))
            QueuedMessage.objects.filter(pk=slow.pk).update(due_at=past(2))
        until(lambda: "slow" in sent())

    at_work(block)


@pytest.mark.usefixtures("never_polls")
def test_listener_comes_back_when_its_connection_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeup, "RETRY_FIRST", 0.05)

    def block() -> None:
        until(listeners)
        for turn in ("first", "second"):
            (before,) = listeners()
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s)", [before])
            until(lambda gone=before: set(listeners()) - {gone})  # type: ignore[misc]  # bound now
            send(f"{turn}, once", f"{turn}, twice")

    at_work(block)


def test_many_notifications_are_passed_on_together() -> None:
    calls: list[set[str]] = []
    listener = wakeup.Listener("default", lambda names: calls.append(set(names)))
    listener.start()
    try:
        until(lambda: {wakeup.ANY} in calls)
        names = {f"mailer {number}" for number in range(200)}
        with transaction.atomic():
            for name in names:
                wakeup.wake("default", name)
        until(lambda: set().union(*calls) == {wakeup.ANY, *names})
    finally:
        listener.close()
    assert not listener.is_alive()
    assert len(calls) < 50


@pytest.mark.usefixtures("never_polls")
def test_worker_that_ends_leaves_no_connection() -> None:
    connections.close_all()
    at_work(lambda: until(listeners))
    until(lambda: others() == 0)


def test_worker_that_hears_nothing_polls_and_says_so(
    script: Script, settings: SettingsWrapper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Deaf(wakeup.Listener):
        """Behind a pooler that passes nothing on."""

        def _try(self, channel: str) -> None:
            super()._try(f"{channel}_elsewhere")

    monkeypatch.setattr(wakeup, "Listener", partial(Deaf, patience=0.05))
    monkeypatch.setattr(wakeup, "RECHECK", 0.01)
    settings.EMAIL_QUEUE_POLL = 0.05
    caplog.set_level(logging.INFO, "anymail_retry.queue")

    def block() -> None:
        until(lambda: "do not arrive" in caplog.text)
        send("first", "second")

    at_work(block)
    (line,) = [line for line in caplog.messages if "notifications" in line]
    assert "do not arrive, as behind a pooler (pgbouncer)" in line
    assert line.endswith("mail is found by polling")


@pytest.mark.parametrize("version", ["2.9.10 (dt dec pq3 ext lo64)", "3.1.20"])
def test_driver_that_cannot_wait_for_notifications_is_named_once(
    script: Script,
    settings: SettingsWrapper,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
) -> None:
    monkeypatch.setattr(connection.Database, "__version__", version)
    settings.EMAIL_QUEUE_POLL = 0.05
    caplog.set_level(logging.INFO, "anymail_retry.queue")
    at_work(lambda: send("by polling"))
    assert listeners() == []
    (line,) = [line for line in caplog.messages if "by polling" in line]
    assert line.endswith(f"takes psycopg 3.2, this is psycopg {version.split(maxsplit=1)[0]}")
