"""How the queue stands: what is found, and at what cost."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connection

from anymail_retry.mailqueue import operations
from anymail_retry.mailqueue import status as queue_status
from anymail_retry.mailqueue.claim import mailers_with_rows
from anymail_retry.mailqueue.clock import DatabaseClock
from anymail_retry.mailqueue.status import glance, remaining, status
from anymail_retry.models import MailerState, QueuedMessage

from .engine import OTHER, PLAIN, change, future, past, queue, statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_django.fixtures import SettingsWrapper

pytestmark = pytest.mark.django_db(transaction=True)

NOBODY: dict[str, int] = dict.fromkeys(("queued", "deferred", "sending", "held", "failed", "sent", "cancelled"), 0)


def near(moment: datetime | None, seconds: float) -> bool:
    """Whether a moment is so many seconds from now, give or take what a busy machine needs."""
    assert moment is not None
    return abs((moment - datetime.now(timezone.utc)).total_seconds() - seconds) < 20


def fill(mailer: str = PLAIN) -> None:
    """One row of each kind, at several priorities."""
    rows: list[tuple[str, datetime | None, str]] = [
        ("queued", past(100), "low"),
        ("queued", past(50), "high"),
        ("deferred", past(10), "medium"),
        ("deferred", future(500), "high"),
        ("deferred", future(300), "low"),
        ("sending", future(60), "medium"),
        ("sending", past(30), "medium"),
        ("held", None, "medium"),
        ("failed", None, "medium"),
        ("sent", None, "medium"),
        ("cancelled", None, "medium"),
    ]
    for state, due_at, priority in rows:
        (row,) = queue(mailer=mailer, priority=priority)
        change(row, state=state, due_at=due_at)


# --- one mailer ---


def test_status_counts_each_state() -> None:
    fill()
    (mailer,) = status()
    assert mailer.mailer == PLAIN
    assert mailer.counts == NOBODY | {
        "queued": 2,
        "deferred": 3,
        "sending": 2,
        "held": 1,
        "failed": 1,
        "sent": 1,
        "cancelled": 1,
    }
    assert (mailer.due, mailer.lease_ended) == (4, 1)


def test_oldest_and_next_are_found_over_all_priorities() -> None:
    fill()
    for (mailer,) in (glance(), status()):
        assert near(mailer.oldest_due_at, -100)
        assert 100 <= mailer.oldest_due_seconds < 120
        assert near(mailer.next_due_at, 300)  # not the one that is being sent, whose lease ends sooner
        assert mailer.read_at.tzinfo is not None


def test_a_lease_that_ended_is_mail_that_is_due() -> None:
    (row,) = queue()
    change(row, state="sending", due_at=past(70))
    (mailer,) = status()
    assert near(mailer.oldest_due_at, -70)
    assert (mailer.due, mailer.lease_ended) == (1, 1)


def test_nothing_due_is_no_age() -> None:
    (row,) = queue()
    change(row, due_at=future())
    (mailer,) = glance()
    assert mailer.oldest_due_at is None
    assert mailer.oldest_due_seconds == 0.0


def test_an_empty_queue_has_no_mailers() -> None:
    assert glance() == status() == mailers_with_rows("default") == []


def test_mailers_are_told_apart_and_chosen() -> None:
    queue("a", "b")
    queue("c", mailer=OTHER)
    assert {mailer.mailer: mailer.counts["queued"] for mailer in status()} == {PLAIN: 2, OTHER: 1}
    assert [mailer.mailer for mailer in status([OTHER])] == [mailer.mailer for mailer in glance([OTHER])] == [OTHER]
    assert mailers_with_rows("default") == sorted([PLAIN, OTHER])


# --- pauses ---


def test_a_pause_is_told_of_a_mailer_without_mail_too() -> None:
    operations.pause(PLAIN, "moving house")
    (mailer,) = status()
    assert mailer.is_paused
    assert mailer.paused_until == operations.FOR_EVER
    assert mailer.pause_reason == "moving house"
    assert mailer.counts == NOBODY


def test_a_pause_that_is_over_awaits_its_probe() -> None:
    MailerState.objects.create(alias=PLAIN, paused_until=past(10), pause_reason="blocked")
    (mailer,) = glance()
    assert not mailer.is_paused
    assert near(mailer.paused_until, -10)


def test_a_mailer_that_was_never_paused_and_has_no_mail_is_not_told() -> None:
    MailerState.objects.create(alias=PLAIN)
    assert glance() == []


# --- what remains ---


def test_what_remains_is_added_up() -> None:
    fill()
    fill(OTHER)
    left = remaining()
    assert (left.waiting, left.due, left.being_sent, left.is_exact) == (12, 8, 2, True)
    assert near(left.next_due_at, 300)
    assert remaining([OTHER]).waiting == 6


def test_nothing_remains() -> None:
    left = remaining()
    assert (left.waiting, left.due, left.being_sent, left.next_due_at, left.is_exact) == (0, 0, 0, None, True)


@pytest.mark.parametrize("due_at", [past, future])
def test_no_more_is_counted_than_it_takes(due_at: Callable[[float], datetime], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_status, "COUNTED", 3)
    monkeypatch.setattr(queue_status, "READ", 1)
    for mailer in (OTHER, PLAIN):
        for row in queue(*"abcde", mailer=mailer):
            change(row, due_at=due_at(5000 if mailer == OTHER else 4000))
    left = remaining()
    assert (left.waiting, left.is_exact) == (4 if due_at is past else 5, False)
    assert near(left.next_due_at, 4000) if due_at is future else left.next_due_at is None


# --- which clock, which database ---


def test_ages_go_by_the_clock_of_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    queue()
    ahead = DatabaseClock("default", read=lambda alias: future(5 * 3600))
    monkeypatch.setattr(queue_status, "clock_of", lambda alias: ahead)
    (mailer,) = glance()
    assert near(mailer.read_at, 5 * 3600)
    assert mailer.oldest_due_seconds >= 5 * 3600


@pytest.mark.django_db(transaction=True, databases=["default", "queue"])
def test_the_queue_may_live_in_another_database(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_DATABASE = "queue"
    queue()
    assert remaining().waiting == 1
    assert [mailer.counts["queued"] for mailer in status()] == [1]
    assert QueuedMessage.objects.using("default").count() == 0


# --- what it costs ---


@pytest.fixture
def many() -> None:
    """So many rows that a plan says something."""
    now = datetime.now(timezone.utc)
    rows = [
        QueuedMessage(
            mailer=(PLAIN, OTHER)[number % 2],
            priority=1 + number % 3,
            state="sent" if number % 4 == 3 else "queued",
            due_at=None if number % 4 == 3 else now + timedelta(seconds=number * (1 if number % 4 == 2 else -1)),
            origin="queued",
            created_at=now,
        )
        for number in range(10_000)
    ]
    QueuedMessage.objects.bulk_create(rows, batch_size=2000)
    analyze = {"mysql": "ANALYZE TABLE anymail_retry_queuedmessage", "postgresql": "VACUUM ANALYZE"}
    with connection.cursor() as cursor:
        cursor.execute(analyze.get(connection.vendor, "ANALYZE"))


def plans(look: Callable[[], Any]) -> list[str]:
    """The plan of each statement about messages that it makes."""
    with statements() as found:
        look()
    explain = "EXPLAIN QUERY PLAN " if connection.vendor == "sqlite" else "EXPLAIN "
    made = []
    for statement in found:
        if "due_at" in statement:
            with connection.cursor() as cursor:
                cursor.execute(explain + statement.replace("%", "%%"))
                made.append("\n".join(" ".join(map(str, line)) for line in cursor.fetchall()))
    return made


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("look", [glance, remaining])
def test_what_is_asked_often_reads_the_index_in_order(look: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COUNTED", "READ"):
        monkeypatch.setattr(queue_status, name, 100)  # fewer than there are
    found = plans(look)
    assert len(found) >= 6
    for plan in found:
        assert "anymail_retry_claim" in plan
        assert not any(word in plan for word in ("Seq Scan", "Sort", "TEMP B-TREE", "filesort"))


@pytest.mark.usefixtures("many")
def test_the_oldest_due_mail_is_read_from_the_index_alone() -> None:
    alone = {"sqlite": "COVERING INDEX", "postgresql": "Index Only Scan", "mysql": "Using index"}[connection.vendor]
    found = plans(lambda: queue_status._oldest_due("default", PLAIN, datetime.now(timezone.utc)))
    assert len(found) == 3
    assert all(alone in plan for plan in found)


def test_a_status_with_counts_scans_the_table_once() -> None:
    fill()
    with statements() as found:
        status()
    assert sum("GROUP BY" in statement for statement in found) == 1
