"""Deleting what nobody needs any more, and never what still waits."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connection, transaction

from anymail_retry.mailqueue import bodies, retention
from anymail_retry.mailqueue.clock import clock_of
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.states import TERMINAL, State
from anymail_retry.mailqueue.worker import TIDY_EVERY, Worker
from anymail_retry.models import AttachmentBody, Attempt, MessageAttachment, MessageContent, QueuedMessage

from .engine import PLAIN, Script, change, in_threads, mail, past, queue

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("script")]

FOR_EVER = datetime(9999, 1, 1, tzinfo=timezone.utc)
PENDING = sorted({state.value for state in State} - {state.value for state in TERMINAL})


def purge(**options: Any) -> int:
    return sum(retention.purge("default", **{"before": FOR_EVER, **options}))


def attached(*contents: bytes) -> QueuedMessage:
    message = mail()
    for data in contents:
        message.attach("a.bin", data, "application/octet-stream")
    (row,) = enqueue([message], mailer=PLAIN, origin="queued")
    return row


def ended(row: QueuedMessage, state: str = "failed", days: float = 10) -> QueuedMessage:
    change(row, state=state, due_at=None, ended_at=past(days * 86400))
    Attempt.objects.create(message=row, number=1, started_at=past())
    return row


@pytest.mark.parametrize("state", PENDING)
def test_what_waits_is_never_deleted(state: str) -> None:
    row = attached(b"1")
    change(row, state=state, created_at=past(86400 * 999), ended_at=past(86400 * 999))
    assert purge() == 0
    assert MessageContent.objects.count() == AttachmentBody.objects.count() == 1


@pytest.mark.parametrize("state", PENDING)
def test_asking_for_what_waits_is_refused(state: str) -> None:
    with pytest.raises(ValueError, match="life has ended"):
        purge(states=[State(state)])


@pytest.mark.parametrize("state", [state.value for state in TERMINAL])
def test_what_has_ended_is_deleted_with_all_that_belongs_to_it(state: str) -> None:
    ended(attached(b"1", b"2"), state)
    kept = attached(b"3")
    assert purge() == 1
    assert QueuedMessage.objects.get() == kept
    assert MessageContent.objects.get().message == kept
    assert MessageAttachment.objects.count() == AttachmentBody.objects.filter(digest=None).count() == 1
    assert not Attempt.objects.exists()


def test_what_ended_lately_stays() -> None:
    ended(attached(), days=10)
    ended(attached(), days=2)
    assert purge(before=past(3 * 86400)) == 1
    assert QueuedMessage.objects.count() == 1


def test_states_are_chosen() -> None:
    for state in TERMINAL:
        ended(attached(), state.value)
    assert purge(states=[State.SENT]) == 1
    assert set(QueuedMessage.objects.values_list("state", flat=True)) == {"failed", "cancelled"}


def test_batches_are_bounded() -> None:
    for _ in range(7):
        ended(attached(b"1"))
    assert list(retention.purge("default", before=FOR_EVER, batch=3)) == [3, 3, 1]


def test_row_that_a_person_took_back_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the ids and deleting, the dead letter is sent again."""
    row = ended(attached(b"1"))
    delete = retention._delete

    def late(alias: str, ids: Any, *args: Any) -> int:
        in_threads(lambda: change(row, state="deferred", due_at=past(), ended_at=None))
        return delete(alias, ids, *args)

    monkeypatch.setattr(retention, "_delete", late)
    assert purge() == 0
    assert MessageContent.objects.count() == AttachmentBody.objects.count() == Attempt.objects.count() == 1
    assert Worker().drain().sent == 1


# --- attachments that no message carries ---


def shared(age: timedelta) -> AttachmentBody:
    return AttachmentBody.objects.create(digest="d" * 64, created_at=clock_of("default").now() - age, data=b"1")


@pytest.mark.parametrize(
    ("age", "linked", "deleted"),
    [
        pytest.param(bodies.KEPT_FOR + timedelta(seconds=5), False, True, id="old, without a message"),
        pytest.param(bodies.KEPT_FOR + timedelta(days=99), True, False, id="old, with a message"),
        pytest.param(bodies.KEPT_FOR - timedelta(seconds=30), False, False, id="young"),
    ],
)
def test_shared_attachment_is_deleted_when_old_and_unlinked(age: timedelta, linked: bool, deleted: bool) -> None:
    body = shared(age)
    if linked:
        MessageAttachment.objects.create(message=attached(), body=body, position=0)
    assert retention.delete_unlinked_bodies("default", clock_of("default").now()) == deleted
    assert AttachmentBody.objects.exists() != deleted


def test_shared_attachment_outlives_the_messages_it_was_sent_with() -> None:
    enqueue([_with_logo(), _with_logo()], mailer=PLAIN, origin="queued")
    assert Worker().drain().sent == 2
    assert AttachmentBody.objects.count() == 1
    assert not MessageAttachment.objects.exists()
    AttachmentBody.objects.update(created_at=past(3 * 3600))
    assert retention.delete_orphans("default", clock_of("default").now()) == 1


def _with_logo() -> Any:
    message = mail()
    message.attach("logo.png", b"logo", "image/png")
    return message


def test_ages_leave_room_for_a_slow_transaction() -> None:
    assert timedelta(minutes=100) <= bodies.KEPT_FOR - bodies.SHARED_FOR


def test_collector_does_not_take_what_an_open_transaction_is_about_to_carry() -> None:
    """The body, which no other message carries, is found when it is nearly too old for that; the collector runs while
    the caller still works, 100 minutes later; the caller commits."""
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    enqueue([_with_logo(), _with_logo()], mailer=PLAIN, origin="queued")
    assert Worker().drain().sent == 2
    now = clock_of("default").now()
    AttachmentBody.objects.update(created_at=now - bodies.SHARED_FOR + timedelta(minutes=1))
    with transaction.atomic():
        (row,) = enqueue([_with_logo()], mailer=PLAIN, origin="queued")
        assert AttachmentBody.objects.count() == 1
        in_threads(lambda: retention.delete_orphans("default", now + timedelta(minutes=100)))
    assert [data for _, _, data in bodies.load("default", [row.pk])[row.pk]] == [b"logo"]
    assert Worker().drain().sent == 1


def test_caller_that_took_too_long_loses_nothing_in_silence(script: Script) -> None:
    """Its shared body was deleted before it committed: the message is held, and says why."""
    enqueue([_with_logo(), _with_logo()], mailer=PLAIN, origin="queued")
    AttachmentBody.objects.all().delete()
    queue("fine")
    totals = Worker().drain()
    assert (totals.sent, totals.held) == (1, 2)
    assert set(QueuedMessage.objects.filter(state="held").values_list("reason", flat=True)) == {
        "content or attachments are missing"
    }


# --- history without a message ---


def test_history_of_deleted_messages_is_deleted() -> None:
    gone, here = attached(), attached()
    for row in (gone, here):
        Attempt.objects.create(message=row, number=1, started_at=past())
    QueuedMessage.objects.filter(pk=gone.pk).delete()
    Attempt.objects.create(message_id=gone.pk, number=2, started_at=past())  # its result came later
    assert retention.delete_orphans("default", clock_of("default").now()) == 1
    assert Attempt.objects.get().message == here


def test_idle_worker_tidies_up() -> None:
    shared(bodies.KEPT_FOR + timedelta(hours=1))
    worker = Worker()
    worker._tidied_at -= TIDY_EVERY
    worker.drain()
    assert not AttachmentBody.objects.exists()


def test_purge_ends_where_others_add_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Callable[[], Any]] = [lambda: ended(attached())] * 3
    for make in done:
        make()
    seen = 0
    for number in retention.purge("default", before=FOR_EVER, batch=1):
        seen += number
        if seen < 5:
            ended(attached())
    assert seen <= 8
