"""Writing down what sending came to: which results count, and with how many statements."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from django.db import DatabaseError, OperationalError, connection

from anymail_retry import signals
from anymail_retry.mailqueue import settle
from anymail_retry.mailqueue.claim import Claimer, Job, Wanted
from anymail_retry.mailqueue.clock import DatabaseClock, steady
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.schedule import Fate, Policy, fate
from anymail_retry.mailqueue.settle import Result, Settler
from anymail_retry.mailqueue.states import State
from anymail_retry.models import AttachmentBody, Attempt, MessageAttachment, MessageContent, QueuedMessage

from .engine import (
    AMBIGUOUS,
    CANCELLED,
    DELIVERED,
    PERMANENT,
    PLAIN,
    REFUSED,
    end_leases,
    future,
    mail,
    queue,
    statements,
    states,
)

if TYPE_CHECKING:
    from anymail_retry.verdict import Outcome

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)
BEGAN = NOW - timedelta(seconds=2)


def settler(*, keep_content: bool = False) -> Settler:
    return Settler("default", worker="host:1", keep_content=keep_content, steady=steady)


def claim() -> list[Job]:
    claimer = Claimer("default", DatabaseClock("default"), lease=60)
    return claimer.claim(PLAIN, Wanted(rows=1000, size=10**9, at_once=1000), Policy()).jobs


def result(job: Job, outcome: Outcome) -> Result:
    return Result(job, fate(outcome, job.delivery, job.row, Policy(), NOW), outcome, BEGAN, 2.0)


def settled(job: Job, outcome: Outcome, **options: Any) -> bool:
    return bool(settler(**options).settle([result(job, outcome)], NOW))


# --- what is written ---


def test_delivered_message_is_sent_and_its_content_gone() -> None:
    (row,) = queue()
    (job,) = claim()
    assert settled(job, DELIVERED)
    row.refresh_from_db()
    assert (row.state, row.due_at, row.lease, row.ended_at, row.verdict) == ("sent", None, None, NOW, "delivered")
    assert not MessageContent.objects.exists()


def test_content_is_kept_where_wanted() -> None:
    message = mail()
    message.attach("a.bin", b"1", "application/octet-stream")
    enqueue([message], mailer=PLAIN, origin="queued")
    (job,) = claim()
    settled(job, DELIVERED, keep_content=True)
    assert MessageContent.objects.count() == MessageAttachment.objects.count() == AttachmentBody.objects.count() == 1


@pytest.mark.parametrize(
    ("outcome", "state", "ended"),
    [
        (REFUSED, "deferred", False),
        (AMBIGUOUS, "deferred", False),
        (PERMANENT, "failed", True),
        (CANCELLED, "cancelled", True),
        (replace(AMBIGUOUS, hold=True, reason="accepted?"), "held", False),
    ],
)
def test_other_outcomes_keep_the_content(outcome: Outcome, state: str, ended: bool) -> None:
    (row,) = queue()
    (job,) = claim()
    assert settled(job, outcome)
    row.refresh_from_db()
    assert (row.state, row.lease, row.attempt_count) == (state, None, 1)
    assert (row.ended_at == NOW) == ended
    assert (row.due_at is not None) == (state == "deferred")
    assert (row.verdict, row.reason, row.http_status, row.answer) == (
        str(outcome.verdict or ""),
        outcome.reason,
        outcome.http_status,
        outcome.answer,
    )
    assert row.content


def test_every_attempt_is_a_row() -> None:
    (row,) = queue()
    (job,) = claim()
    settled(job, PERMANENT)
    attempt = Attempt.objects.get()
    assert (attempt.message_id, attempt.number, attempt.started_at, attempt.duration_ms) == (row.pk, 1, BEGAN, 2000)
    assert (attempt.verdict, attempt.reason, attempt.http_status, attempt.answer, attempt.worker) == (
        "permanent",
        "bad address",
        422,
        "no such address",
        "host:1",
    )


def test_attempt_whose_worker_died_is_a_row_too() -> None:
    (row,) = queue()
    claim()
    row.refresh_from_db()
    end_leases()
    (job,) = claim()
    settled(job, DELIVERED)
    first, second = Attempt.objects.order_by("number")
    assert (first.number, first.verdict, first.started_at, first.duration_ms) == (1, "ambiguous", row.claimed_at, None)
    assert (second.number, second.verdict) == (2, "delivered")


def test_what_the_next_attempt_has_to_know_is_stored() -> None:
    (row,) = queue()
    (job,) = claim()
    job.delivery.key, job.delivery.key_from_user = "order-7", True
    job.delivery.maybe_taken_since, job.delivery.key_used_since = BEGAN, NOW
    job.delivery.body_digest = "d" * 64
    settled(job, AMBIGUOUS)
    row.refresh_from_db()
    assert (row.key, row.key_from_user, row.body_digest) == ("order-7", True, "d" * 64)
    assert (row.maybe_taken_since, row.key_used_since) == (BEGAN, NOW)


def test_row_that_was_not_begun_is_no_attempt() -> None:
    (row,) = queue()
    (job,) = claim()
    settler().settle([Result(job, Fate(State.HELD, "the mailer is gone"))], NOW)
    row.refresh_from_db()
    assert (row.state, row.reason, row.attempt_count) == ("held", "the mailer is gone", 0)
    assert not Attempt.objects.exists()


def test_many_results_keep_their_own_values() -> None:
    rows = queue(*map(str, range(120)))
    outcomes = [REFUSED, PERMANENT, DELIVERED, CANCELLED]
    jobs = claim()
    results = [
        replace(result(job, replace(outcomes[place % 4], reason=f"reason {job.id}"))) for place, job in enumerate(jobs)
    ]
    assert len(settler().settle(results, NOW)) == 120
    stored = QueuedMessage.objects.in_bulk([row.pk for row in rows])
    for one in results:
        row = stored[one.job.id]
        assert (row.state, row.due_at, row.key) == (one.fate.state, one.fate.due_at, one.job.delivery.key)
        assert row.reason == ("" if row.state == "sent" else f"reason {row.pk}")


# --- whose result counts ---


def test_delivered_counts_over_any_state() -> None:
    (row,) = queue()
    (late,) = claim()
    end_leases()
    (other,) = claim()
    assert settled(late, DELIVERED)
    assert not settled(other, REFUSED)
    row.refresh_from_db()
    assert (row.state, row.due_at) == ("sent", None)
    assert Attempt.objects.filter(verdict="delivered").count() == 1


@pytest.mark.parametrize("outcome", [REFUSED, PERMANENT, AMBIGUOUS, CANCELLED])
def test_other_results_count_only_under_their_lease(outcome: Outcome) -> None:
    (row,) = queue()
    (late,) = claim()
    end_leases()
    (other,) = claim()
    assert not settled(late, outcome)
    row.refresh_from_db()
    assert (row.state, row.lease) == ("sending", other.lease)
    assert row.content


def test_batch_knows_which_of_its_results_counted() -> None:
    queue("a", "b", "c")
    jobs = claim()
    lost = jobs[1]
    QueuedMessage.objects.filter(pk=lost.id).update(lease=1)
    results = [result(job, outcome) for job, outcome in zip(jobs, [REFUSED, REFUSED, PERMANENT], strict=True)]
    written = settler().settle(results, NOW)
    assert {one.job.id for one in written} == {jobs[0].id, jobs[2].id}


def test_row_that_is_gone_harms_nobody() -> None:
    (gone, _) = queue("gone", "here")
    jobs = claim()
    gone.delete()
    settler().settle([result(job, outcome) for job, outcome in zip(jobs, [DELIVERED, REFUSED], strict=True)], NOW)
    assert states() == {"here": "deferred"}


# --- batches ---


def test_pending_results_are_due_a_moment_after_the_first() -> None:
    queue("a", "b")
    moment = 100.0
    mine = Settler("default", worker="w", keep_content=False, steady=lambda: moment)
    first, second = claim()
    assert mine.due_at is None
    mine.add(result(first, DELIVERED))
    assert mine.due_at == pytest.approx(100.0 + settle.INTERVAL)
    moment = 100.01
    mine.add(result(second, DELIVERED))
    assert mine.due_at == pytest.approx(100.0 + settle.INTERVAL)
    results, written = mine.flush(NOW)
    assert len(results) == len(written) == 2
    assert mine.due_at is None
    assert settle.INTERVAL < 0.05


@pytest.mark.django_db(transaction=True)
def test_result_that_the_database_refuses_costs_only_its_words(caplog: pytest.LogCaptureFixture) -> None:
    queue("a", "bad", "c")
    bad = replace(PERMANENT, http_status=-1)  # no database takes it in this column
    mine = settler()
    for job, outcome in zip(claim(), [DELIVERED, bad, REFUSED], strict=True):
        mine.add(result(job, outcome))
    for _ in range(settle.BATCH_TRIES - 1):
        with pytest.raises(DatabaseError):
            mine.flush(NOW)
    _, written = mine.flush(NOW)
    assert len(written) == 3
    assert states() == {"a": "sent", "bad": "failed", "c": "deferred"}
    assert Attempt.objects.count() == 2


@pytest.mark.django_db(transaction=True)
def test_database_that_is_away_is_looked_for_a_few_times_and_not_once_per_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each look may take as long as a connection takes to fail; nobody may wait for a hundred of them."""
    queue(*map(str, range(50)))
    mine = settler()
    for job in claim():
        mine.add(result(job, DELIVERED))
    looks = 0

    def away(*args: object) -> None:
        nonlocal looks
        looks += 1
        raise OperationalError("nobody is there")

    with monkeypatch.context() as patch:
        patch.setattr(connection, "ensure_connection", away)
        for _ in range(settle.BATCH_TRIES + 2):
            with pytest.raises(OperationalError, match="nobody is there"):
                mine.flush(NOW)
    assert looks <= 3 * (settle.BATCH_TRIES + 2)
    _, written = mine.flush(NOW)
    assert len(written) == QueuedMessage.objects.filter(state="sent").count() == 50
    assert Attempt.objects.count() == 50


@pytest.mark.django_db(transaction=True)
def test_delivered_message_is_written_whatever_its_words_are() -> None:
    queue("a")
    (job,) = claim()
    mine = settler()
    mine.add(result(job, replace(DELIVERED, http_status=-1)))
    for _ in range(settle.BATCH_TRIES - 1):
        with pytest.raises(DatabaseError):
            mine.flush(NOW)
    mine.flush(NOW)
    assert states() == {"a": "sent"}


@pytest.mark.parametrize("words", ["\0NUL", "\ud83d surrogate", "😀" * 1000, "x" * 100_000])
def test_words_of_every_kind_are_stored(words: str) -> None:
    queue()
    (job,) = claim()
    assert settled(job, replace(PERMANENT, answer=words, reason=words))
    assert 0 < len(Attempt.objects.get().answer) <= 500
    assert states() == {"Subject": "failed"}


# --- what it costs ---


def test_flush_is_three_statements() -> None:
    queue(*map(str, range(50)))
    results = [result(job, DELIVERED) for job in claim()]
    with statements() as found:
        settler().settle(results, NOW)
    assert [sql.split()[0] for sql in found] == ["UPDATE", "INSERT", "DELETE"]


def test_attachments_are_two_statements_more() -> None:
    messages = [mail() for _ in range(5)]
    for message in messages:
        message.attach("a.bin", b"1", "application/octet-stream")
        message.attach("b.bin", str(id(message)).encode(), "application/octet-stream")
    enqueue(messages, mailer=PLAIN, origin="queued")
    results = [result(job, DELIVERED) for job in claim()]
    with statements() as found:
        settler().settle(results, NOW)
    assert len(found) == 5
    assert not MessageAttachment.objects.exists()
    assert not AttachmentBody.objects.filter(digest=None).exists()
    assert AttachmentBody.objects.exclude(digest=None).count() == 1  # shareable: left to the collector


def test_mixed_flush_is_one_statement_more() -> None:
    queue(*map(str, range(40)))
    outcomes = [REFUSED, PERMANENT, DELIVERED, AMBIGUOUS]
    results = [result(job, outcomes[place % 4]) for place, job in enumerate(claim())]
    with statements() as found:
        settler().settle(results, NOW)
    assert [sql.split()[0] for sql in found] == ["UPDATE", "UPDATE", "INSERT", "DELETE"]


# --- who hears of it ---


@pytest.mark.parametrize(
    ("name", "outcome", "level"),
    [
        ("sent", DELIVERED, logging.INFO),
        ("deferred", REFUSED, logging.INFO),
        ("failed", PERMANENT, logging.ERROR),
        ("held", replace(AMBIGUOUS, hold=True), logging.WARNING),
    ],
)
def test_receivers_and_the_log_hear_of_it(
    name: str, outcome: Outcome, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "anymail_retry.queue")
    heard: list[Any] = []

    def hear(sender: Any, queued_message: QueuedMessage, outcome: Outcome, **kwargs: Any) -> None:
        heard.append((sender, queued_message.pk, queued_message.state, outcome))

    (row,) = queue("Secret", to="secret@example.com")
    (job,) = claim()
    mine = settler()
    signal = getattr(signals, f"message_{name}")
    signal.connect(hear)
    caplog.clear()
    try:
        written = mine.settle([result(job, replace(outcome, answer="secret@example.com"))], NOW)
        for call in mine.announce(written):
            call()
    finally:
        signal.disconnect(hear)
    assert heard == [(QueuedMessage, row.pk, name, replace(outcome, answer="secret@example.com"))]
    (record,) = caplog.records
    assert record.levelno == level
    assert f"message {row.pk} {name}" in record.getMessage()
    assert "ecret" not in record.getMessage()


def test_nobody_listening_costs_nothing() -> None:
    queue()
    (job,) = claim()
    mine = settler()
    written = mine.settle([result(job, REFUSED)], NOW)
    with statements() as found:
        assert mine.announce(written) == []
    assert found == []


def test_due_time_is_that_of_the_fate() -> None:
    (row,) = queue()
    (job,) = claim()
    later = future()
    settler().settle([Result(job, Fate(State.DEFERRED, "busy", later), REFUSED, BEGAN, 0.1)], NOW)
    row.refresh_from_db()
    assert row.due_at == later
