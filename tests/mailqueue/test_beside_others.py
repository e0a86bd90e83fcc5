"""The worker beside others: other workers, web requests, readers with an old snapshot, and people."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import Group
from django.db import connection, connections, transaction

from anymail_retry.mailqueue import gate, operations
from anymail_retry.mailqueue.claim import Claimer, Job, Wanted
from anymail_retry.mailqueue.clock import DatabaseClock
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.operations import Change
from anymail_retry.mailqueue.schedule import Policy
from anymail_retry.mailqueue.worker import Totals, Worker
from anymail_retry.models import QueuedMessage

from .engine import DELIVERED, PATIENCE, PLAIN, Script, in_threads, mail, queue, states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from django.core.mail import EmailMessage
    from pytest_django.fixtures import SettingsWrapper

    from anymail_retry.delivery import Delivery
    from anymail_retry.verdict import Outcome

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("script")]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def everything_is_sent(rows: int) -> bool:
    return QueuedMessage.objects.filter(state="sent").count() == rows


# --- other isolation levels ---


@pytest.fixture
def repeatable_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every connection that is opened from now on."""
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has no isolation levels")
    level: Any = "repeatable read"
    if connection.vendor == "postgresql":
        from django.db.backends.postgresql.psycopg_any import IsolationLevel

        level = IsolationLevel.REPEATABLE_READ
    monkeypatch.setitem(connections.settings["default"]["OPTIONS"], "isolation_level", level)


@pytest.mark.usefixtures("repeatable_read")
def test_whole_site_under_repeatable_read_sends_everything_once_and_no_request_fails(script: Script) -> None:
    requests, workers = 3, [Worker(threads=2) for _ in range(3)]

    def request() -> None:
        for number in range(25):
            with transaction.atomic():  # a deadlock or a conflict of its own would end it, and the test
                Group.objects.create(name=f"{threading.get_ident()} {number}")
                queue(f"{threading.get_ident()} {number}")

    def stop() -> None:
        try:
            until(lambda: everything_is_sent(requests * 25))
        finally:
            for worker in workers:
                worker.stop()

    in_threads(*[request] * requests, *[worker.run for worker in workers], stop)
    assert len(script.subjects) == len(set(script.subjects)) == requests * 25


class Slow(Claimer):
    """Requests are stored while its transaction is open: after it has read, and after it has written."""

    def _take(self, *args: Any, **kwargs: Any) -> int:
        in_threads(lambda: request("after the read"))
        won = super()._take(*args, **kwargs)
        in_threads(lambda: request("after the write"))
        return won


def request(subject: str) -> None:
    if connection.vendor == "mysql":
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 1")  # an error then, instead of a minute
    queue(subject)


@pytest.mark.usefixtures("repeatable_read")
@pytest.mark.parametrize("rows", [1, 100, 1000])
def test_no_request_waits_for_a_claim_under_repeatable_read(rows: int) -> None:
    queue(*map(str, range(rows)))

    def claim() -> list[Job]:
        slow = Slow("default", DatabaseClock("default"), lease=60)
        return slow.claim(PLAIN, Wanted(rows=100, size=10**9, at_once=100), Policy()).jobs

    (jobs,) = in_threads(claim)
    assert len(jobs) == min(rows, 100)
    assert QueuedMessage.objects.count() == rows + 2


# --- a transaction that somebody keeps open ---


def with_attachment(subject: str) -> EmailMessage:
    message = mail(subject)
    message.attach("a.txt", subject.encode(), "text/plain")
    return message


class Impatient(Worker):
    """Tries nothing a second time."""

    def _at_database(self, work: Callable[[], None], forever: bool) -> None:
        work()


def drain_without_waiting() -> Totals:
    if connection.vendor == "mysql":
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 1")
    return Impatient(threads=2).drain()


def send_beside_an_open_transaction(rows: int) -> None:
    enqueue([with_attachment(str(number)) for number in range(rows)], mailer=PLAIN, origin="queued")
    with transaction.atomic():
        enqueue([with_attachment("not committed")], mailer=PLAIN, origin="queued")
        (totals,) = in_threads(drain_without_waiting)
        assert totals.sent == rows
    assert QueuedMessage.objects.filter(state="queued").count() == 1


@pytest.mark.parametrize("rows", [1, 30])
def test_worker_does_not_wait_for_a_request_that_stores_mail(rows: int) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    send_beside_an_open_transaction(rows)


@pytest.mark.usefixtures("repeatable_read")
@pytest.mark.parametrize("rows", [1, 30])
def test_worker_does_not_wait_for_it_under_repeatable_read_either(rows: int) -> None:
    in_threads(lambda: send_beside_an_open_transaction(rows))


# --- a snapshot that somebody holds open ---


@contextmanager
def open_snapshot() -> Iterator[Callable[[], int]]:
    """A report or a backup, which still sees what was there when it began. Counts the messages that are due."""
    count = "SELECT COUNT(*) FROM anymail_retry_queuedmessage WHERE due_at IS NOT NULL"
    if connection.vendor == "sqlite":
        other = sqlite3.connect(connection.settings_dict["NAME"], isolation_level=None)
        other.execute("BEGIN")
    else:
        other = connection.copy().get_new_connection(connection.get_connection_params())
        begin = {
            "postgresql": "BEGIN ISOLATION LEVEL REPEATABLE READ",
            "mysql": "START TRANSACTION WITH CONSISTENT SNAPSHOT",
        }
        if connection.vendor == "mysql":
            other.cursor().execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.cursor().execute(begin[connection.vendor])

    def counted() -> int:
        cursor = other.cursor()
        cursor.execute(count)
        number: int = cursor.fetchone()[0]
        return number

    try:
        counted()
        yield counted
    finally:
        other.close()


def test_open_snapshot_keeps_nothing_from_being_sent(script: Script) -> None:
    queue(*map(str, range(300)))
    with open_snapshot() as seen:
        assert Worker(threads=4).drain().sent == 300
        queue("later")
        assert Worker(threads=4).drain().sent == 1
        assert seen() == 300
    assert len(script.subjects) == 301


def test_claim_does_not_read_past_what_an_open_snapshot_keeps() -> None:
    """What was sent stays in the index for as long as somebody may look at it; each claim starts after it."""
    if connection.vendor != "postgresql":
        pytest.skip("PostgreSQL alone says what a query read")
    queue(*map(str, range(1300)))
    with connection.cursor() as cursor:
        cursor.execute(  # in another order than on disk
            "UPDATE anymail_retry_queuedmessage SET due_at = now() - interval '1 second' * (1 + id * 1009 % 1300)"
        )
        cursor.execute("VACUUM ANALYZE anymail_retry_queuedmessage")
        cursor.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")  # as among many more rows
    moment = time.monotonic()
    claimer = Claimer("default", DatabaseClock("default", steady=lambda: moment), lease=60)  # the floor stays
    with open_snapshot():
        for _ in range(12):
            claimer.claim(PLAIN, Wanted(rows=100, size=10**9, at_once=100), Policy())
            QueuedMessage.objects.filter(state="sending").update(state="sent", due_at=None)
        with_floor = pages_read(claimer)
        claimer.forget_floors()
        without = pages_read(claimer)
    connection.close()
    assert without > 1200
    assert with_floor < without / 3


def pages_read(claimer: Claimer) -> int:
    due = claimer.due(PLAIN, 2, claimer.clock.now())[:100]
    sql, params = due.query.sql_with_params()
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", params)
        found = cursor.fetchone()[0][0]["Plan"]
    assert found["Actual Rows"] == 100
    return int(found["Shared Hit Blocks"] + found["Shared Read Blocks"])


# --- a rate that four workers keep together ---


@pytest.mark.parametrize(("rate", "messages"), [(2, 5), (10, 15), (50, 50)])
def test_four_workers_never_send_more_than_the_rate(
    script: Script, settings: SettingsWrapper, monkeypatch: pytest.MonkeyPatch, rate: int, messages: int
) -> None:
    """No two of the slots that they reserve, all together, are closer than the rate allows, and no send begins before
    its own. By the queue's two clocks, so a machine that is busy can only make it later."""
    settings.EMAIL_QUEUE_RATE = rate
    slots: list[datetime] = []
    starts: dict[str, float] = {}
    begins: dict[str, float] = {}
    reserve, start = gate.reserve, Worker._start

    def reserved(*args: Any, **kwargs: Any) -> list[datetime]:
        found = reserve(*args, **kwargs)
        slots.extend(found)
        return found

    def started(worker: Worker, lane: Any, jobs: Sequence[Job]) -> None:
        for job in jobs:
            starts[subjects[job.id]] = job.starts_at
        start(worker, lane, jobs)

    def begun(message: EmailMessage, delivery: Delivery) -> Outcome:
        begins[str(message.subject)] = workers[0].steady()
        return DELIVERED

    monkeypatch.setattr(gate, "reserve", reserved)
    monkeypatch.setattr(Worker, "_start", started)
    script.behaviour = begun
    subjects = {row.pk: row.subject for row in queue(*map(str, range(messages)))}
    workers = [Worker(threads=3) for _ in range(4)]

    def stop() -> None:
        try:
            until(lambda: everything_is_sent(messages))
        finally:
            for worker in workers:
                worker.stop()

    in_threads(*[worker.run for worker in workers], stop)
    assert len(script.subjects) == len(set(script.subjects)) == messages
    slots.sort()
    assert len(slots) >= messages
    assert all(later - sooner >= timedelta(seconds=1 / rate) for sooner, later in pairwise(slots))
    for slot in slots:
        assert len([other for other in slots if slot <= other < slot + timedelta(seconds=1)]) <= rate
    assert all(starts[subject] > 0 and begins[subject] >= starts[subject] for subject in subjects.values())


# --- people ---


def test_message_that_is_being_sent_cannot_be_cancelled(script: Script) -> None:
    (row,) = queue("being sent")
    answers: list[Change] = []

    def cancelled_meanwhile(message: EmailMessage, delivery: Delivery) -> Outcome:
        answers.extend(in_threads(lambda: operations.cancel(QueuedMessage.objects.filter(pk=row.pk))))
        return DELIVERED

    script.behaviour = cancelled_meanwhile
    assert Worker().drain().sent == 1
    assert answers == [Change(0, being_sent=1)]
    assert states() == {"being sent": "sent"}
