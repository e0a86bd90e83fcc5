"""What a person may do with rows, and with mailers."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db.models import QuerySet

from anymail_retry.mailqueue import operations
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.operations import Change
from anymail_retry.mailqueue.states import State
from anymail_retry.mailqueue.worker import Totals, Worker
from anymail_retry.models import AttachmentBody, MailerState, MessageContent, QueuedMessage
from tests.sites import MANDRILL, Site, site

from .engine import KEYED, PLAIN, Script, change, future, mail, past, queue

__all__ = ["site"]  # a fixture

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("script")]

EVERY_STATE = [state.value for state in State]


@pytest.fixture
def rows() -> dict[str, QueuedMessage]:
    """A row in each state, by the state."""
    made = {}
    for state in EVERY_STATE:
        (row,) = queue(state)
        due = {"queued": future(), "deferred": future(), "sending": future()}.get(state)
        ended = past() if state in ("sent", "failed", "cancelled") else None
        made[state] = change(row, state=state, due_at=due, ended_at=ended)
    return made


def everything() -> QuerySet[QueuedMessage]:
    return QueuedMessage.objects.all()


def changed(rows: dict[str, QueuedMessage]) -> set[str]:
    """Which of the rows are not as they were."""
    now = QueuedMessage.objects.in_bulk()
    return {state for state, row in rows.items() if (now[row.pk].state, now[row.pk].due_at) != (state, row.due_at)}


# --- which states ---


@pytest.mark.parametrize(
    ("operation", "touches"),
    [
        pytest.param(operations.retry_now, {"deferred"}, id="retry"),
        pytest.param(
            lambda rows: operations.retry_now(rows, [State.QUEUED, State.DEFERRED, State.HELD, State.FAILED]),
            {"queued", "deferred", "held", "failed"},
            id="retry everything",
        ),
        pytest.param(operations.hold, {"queued", "deferred"}, id="hold"),
        pytest.param(operations.release, {"held"}, id="release"),
        pytest.param(operations.cancel, {"queued", "deferred", "held", "failed"}, id="cancel"),
    ],
)
def test_only_rows_in_the_right_state_are_touched(
    rows: dict[str, QueuedMessage], operation: Any, touches: set[str]
) -> None:
    assert operation(everything()) == Change(len(touches), being_sent=1)
    assert changed(rows) == touches


@pytest.mark.parametrize("state", [State.SENT, State.CANCELLED, State.SENDING])
def test_what_was_sent_is_never_retried(state: State) -> None:
    with pytest.raises(ValueError, match="send_again"):
        operations.retry_now(everything(), [state])


# --- retry, hold, release, cancel ---


def test_retried_row_is_sent_at_once() -> None:
    (row,) = queue(not_before=timedelta(days=1))
    change(row, state="deferred")
    operations.retry_now(everything())
    assert Worker().drain() == Totals(sent=1)


def test_deferred_row_keeps_its_key() -> None:
    (row,) = queue(mailer=KEYED)
    since = past(60)
    change(row, state="deferred", maybe_taken_since=since, due_at=future())
    operations.retry_now(everything())
    kept = QueuedMessage.objects.get()
    assert (kept.key, kept.maybe_taken_since) == (row.key, since)


def ended(state: str, *, key_age: float = 60, **values: Any) -> QueuedMessage:
    """A row that a person may send again, of a mailer whose ESP remembers keys for an hour."""
    (row,) = queue(mailer=KEYED, on_ambiguous="hold")
    since = past(key_age)
    taken = {"maybe_taken_since": since, "key_used_since": since, "body_digest": "d" * 64}
    return change(row, **{"state": state, "due_at": None, "ended_at": past(), **taken, **values})


@pytest.mark.parametrize("state", ["held", "failed"])
def test_row_that_a_person_sends_again_keeps_a_key_that_lives(script: Script, state: str) -> None:
    """By which the ESP tells a second copy from a first one."""
    row = ended(state)
    operations.retry_now(everything(), [State.HELD, State.FAILED])
    assert Worker().drain() == Totals(sent=1)
    assert script.sends[0].key == row.key
    assert QueuedMessage.objects.get().maybe_taken_since == row.maybe_taken_since


@pytest.mark.parametrize("state", ["held", "failed"])
@pytest.mark.parametrize(
    ("values", "keeps_key"),
    [
        pytest.param({"key_age": 7200}, False, id="the key is dead"),
        pytest.param({"key_age": 7200, "key_from_user": True}, True, id="the key is the user's"),
        pytest.param({"reason": "key conflict"}, False, id="the ESP knows the key with another body"),
        pytest.param({"reason": "body changed"}, False, id="so it would"),
    ],
)
def test_row_that_a_person_sends_again_begins_anew_where(
    script: Script, caplog: pytest.LogCaptureFixture, state: str, values: dict[str, Any], keeps_key: bool
) -> None:
    row = ended(state, **values)
    operations.retry_now(everything(), [State.HELD, State.FAILED])
    assert Worker().drain() == Totals(sent=1)
    assert (script.sends[0].key == row.key) == keeps_key
    sent = QueuedMessage.objects.get()
    assert (sent.maybe_taken_since, sent.key_used_since, sent.body_digest) == (None, None, None)
    assert f"may arrive twice: message {row.pk}" in caplog.text


def test_held_row_keeps_its_expiry(script: Script) -> None:
    """A one-time code that a person releases too late is worth nothing."""
    ended("held", expires_at=past())
    operations.release(everything())
    assert Worker().drain() == Totals(failed=1)
    assert QueuedMessage.objects.get().reason == "expired"


def test_row_that_expired_is_sent_if_a_person_says_so(script: Script) -> None:
    ended("failed", expires_at=past(), reason="expired")
    operations.retry_now(everything(), [State.FAILED])
    assert Worker().drain() == Totals(sent=1)


def test_held_row_is_not_sent_until_released() -> None:
    queue("now")
    queue("later", not_before=timedelta(hours=1))
    operations.hold(everything(), "the link in it is wrong")
    assert Worker().drain() == Totals()
    assert set(QueuedMessage.objects.values_list("reason", flat=True)) == {"the link in it is wrong"}
    operations.release(everything())
    assert Worker().drain() == Totals(sent=1)
    later = QueuedMessage.objects.get(subject="later")
    assert (later.state, later.due_at) == ("deferred", later.not_before)


def test_cancelled_row_is_never_sent() -> None:
    (row,) = queue()
    operations.cancel(everything())
    assert Worker().drain() == Totals()
    row.refresh_from_db()
    assert (row.state, row.reason) == ("cancelled", "cancelled by an operator")
    assert row.ended_at is not None


# --- send again ---


def test_message_is_sent_again_as_a_new_one(script: Script) -> None:
    message = mail("again", priority="high")
    message.attach("a.bin", b"\0\1", "application/octet-stream")
    (row,) = enqueue([message], mailer=PLAIN, origin="queued")
    change(row, state="failed", due_at=None, ended_at=past())
    new = operations.send_again(row)
    assert new.pk != row.pk
    assert new.key != row.key
    assert Worker().drain() == Totals(sent=1)
    assert script.sends[0].message.attachments == [("a.bin", b"\0\1", "application/octet-stream")]
    row.refresh_from_db()
    assert row.state == "failed"
    assert row.content  # its own copy is still there
    assert AttachmentBody.objects.count() >= 1


@pytest.mark.parametrize("state", ["queued", "deferred", "sending", "held"])
def test_message_that_may_still_be_sent_is_not_sent_again(rows: dict[str, QueuedMessage], state: str) -> None:
    with pytest.raises(ValueError, match=f"is {state}"):
        operations.send_again(rows[state])


def test_message_whose_content_is_gone_cannot_be_sent_again() -> None:
    (row,) = queue()
    Worker().drain()
    with pytest.raises(ValueError, match="EMAIL_QUEUE_KEEP_CONTENT"):
        operations.send_again(row)


def test_message_that_was_purged_meanwhile_cannot_be_sent_again() -> None:
    (row,) = queue()
    QueuedMessage.objects.all().delete()
    with pytest.raises(ValueError, match="not in the queue any more"):
        operations.send_again(row)


# --- look ---


def test_stored_message_is_rebuilt() -> None:
    message = mail("look", cc=["cc@example.com"])
    message.attach("a.bin", b"\0\1", "application/octet-stream")
    (row,) = enqueue([message], mailer=PLAIN, origin="queued")
    stored = operations.stored_message(row)
    assert (stored.subject, stored.cc) == ("look", ["cc@example.com"])
    assert stored.attachments == [("a.bin", b"\0\1", "application/octet-stream")]


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        pytest.param(None, "is not kept any more", id="gone"),
        pytest.param("gAAAAA", "cannot be decrypted", id="no key"),
        pytest.param('{"v": 99}', "cannot be decoded: .*version 99", id="of a newer release"),
        pytest.param("{", "cannot be decoded: .*not JSON", id="damaged"),
    ],
)
def test_content_that_cannot_be_read_says_why(payload: str | None, why: str) -> None:
    (row,) = queue()
    content = MessageContent.objects.all()
    content.delete() if payload is None else content.update(payload=payload)
    with pytest.raises(ValueError, match=why):
        operations.stored_message(row)


# --- mailers ---


def test_mailers_are_those_of_the_settings_and_those_of_rows(site: Site) -> None:
    site.behind("queued", MANDRILL)
    queue(mailer="one.that.is.gone")
    assert operations.mailers() == sorted(["one.that.is.gone", site.mailer])


def test_mailer_has_the_name_that_its_rows_have(site: Site) -> None:
    backend = "anymail_retry.backends.RetryableMandrillEmailBackend"
    site.behind("", backend)
    assert operations.mailers() == ["default" if site.way == "mailers" else MANDRILL]


def test_mailer_that_cannot_be_used_is_left_out(site: Site) -> None:
    site.behind("", "no.such.Backend")
    assert operations.mailers() == []


def test_paused_mailer_sends_nothing_until_resumed() -> None:
    queue()
    operations.pause(PLAIN, "the account is being moved")
    assert Worker().drain() == Totals()
    state = MailerState.objects.get()
    assert state.pause_reason == "the account is being moved"
    assert state.paused_until is not None
    assert state.paused_until > datetime.now(state.paused_until.tzinfo) + timedelta(days=365)
    assert operations.resume(PLAIN)
    assert not operations.resume(PLAIN)
    assert Worker().drain() == Totals(sent=1)


def test_only_the_rows_that_are_meant_are_touched() -> None:
    (first, second) = queue("a", "b")
    assert operations.cancel(QueuedMessage.objects.filter(pk=first.pk)).changed == 1
    second.refresh_from_db()
    assert second.state == "queued"
