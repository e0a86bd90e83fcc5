"""Idempotency keys, end to end: with one, an ESP that may have the message is asked again, and takes it once.

By the ledgers of the four ESPs that have keys. Each of them remembers, compares and refuses keys as it does in truth.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest
from anymail.exceptions import AnymailRequestsAPIError
from anymail.message import AnymailMessage
from django.core.mail import EmailMessage

from anymail_retry.exceptions import InvalidIdempotencyKey
from anymail_retry.models import MessageContent, QueuedMessage
from anymail_retry.testing import AcceptThenDrop, AcceptThenStall, Latency, LocalEsp, Rule, Status
from anymail_retry.verdict import Verdict
from tests.transport.clock import Takes

from .cases import KEYED

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cell import Cell

WINDOW = {"brevo": 15 * 60, "resend": 24 * 3600, "sparkpost": 24 * 3600, "unisender_go": 60}
COMPARES_BODIES = ["resend", "sparkpost"]
REPEATS_NOTHING = ["brevo", "unisender_go"]  # says "duplicate" to a second request, in place of its first answer

at_each = pytest.mark.parametrize("esp", sorted(KEYED), indirect=True)
at_those_that_compare_bodies = pytest.mark.parametrize("esp", COMPARES_BODIES, indirect=True)

DROPS = Rule(AcceptThenDrop())


def message(subject: str = "Subject", to: str = "to@example.com") -> Any:
    """``Any``, because Anymail and this package hang attributes on it."""
    return EmailMessage(subject, "Body", "from@example.com", [to])


def rich_message() -> Any:
    """A message with what could come out different when it is built again."""
    sent: Any = AnymailMessage(
        "Påminnelse", "Hej,\n\nboken", '"Bibliotek, Södra" <from@example.com>', ["Zoë <to@example.com>"]
    )
    sent.attach_alternative("<p>Boken</p>", "text/html")
    sent.attach("lån.pdf", b"%PDF-1.7 \x00\xff", "application/pdf")
    sent.attach("lån.txt", "Måndag\n", "text/plain")
    sent.extra_headers = {"X-Zebra": "1", "X-Apple": "2"}
    sent.metadata = {"zebra": "1", "apple": 2}
    sent.tags = ["påminnelse"]
    return sent


def keys(esp: LocalEsp) -> list[str | None]:
    """The key of each request, in order."""
    return [request.idempotency_key for request in esp.requests]


def drain_when_due(cell: Cell, row: QueuedMessage) -> str:
    """Have a worker send a message when it is due; its state then."""
    cell.wait_until_due(row)
    cell.drain()
    row.refresh_from_db()
    return row.state


# --- A key belongs to one delivery ---


@at_each
def test_one_object_sent_to_three_people_arrives_three_times(cell: Cell) -> None:
    sent = message()
    for person in ("anna", "bo", "cleo"):
        sent.to, sent.subject = [f"{person}@example.com"], f"For {person}"
        assert sent.send() == 1
    assert [accepted.recipients for accepted in cell.esp.ledger] == [
        ("anna@example.com",),
        ("bo@example.com",),
        ("cleo@example.com",),
    ]
    assert len(set(keys(cell.esp))) == 3


@at_each
def test_one_object_sent_twice_unchanged_arrives_twice(cell: Cell) -> None:
    sent = message()
    assert (sent.send(), sent.send()) == (1, 1)
    assert cell.accepted(sent) == 2


@at_each
def test_one_object_sent_twice_through_the_queue_arrives_twice(cell: Cell) -> None:
    cell.esp.script(DROPS)
    sent = message()
    sent.send()
    first = sent.queued_message
    sent.send()
    cell.esp.script()
    cell.wait_until_due(first)
    cell.wait_until_due(sent.queued_message)
    assert first != sent.queued_message
    assert cell.drain().sent == 2
    assert cell.accepted(sent) == 2
    assert len(set(keys(cell.esp))) == 2


@at_each
def test_automatic_key_is_not_left_on_the_message(cell: Cell) -> None:
    sent = message()
    before = set(vars(sent))
    sent.send()
    (key,) = keys(cell.esp)
    assert str(uuid.UUID(key)) == key
    assert "idempotency_key" not in set(vars(sent)) - before
    assert key not in repr(vars(sent))


# --- An answer is not lost twice ---


@at_each
def test_lost_answer_is_asked_for_again_in_the_same_call(cell: Cell) -> None:
    cell.esp.script(AcceptThenDrop())
    sent = message()
    assert sent.send() == 1
    assert not hasattr(sent, "queued_message")
    assert cell.accepted(sent) == 1
    (first, second) = keys(cell.esp)
    assert first == second
    assert sent.retry_history[0].verdict is Verdict.AMBIGUOUS


@at_those_that_compare_bodies
def test_replayed_answer_has_the_first_ones_id(cell: Cell) -> None:
    cell.esp.script(AcceptThenDrop())
    sent = message()
    sent.send()
    assert cell.esp.requests[-1].replayed
    assert (sent.anymail_status.message_id,) == cell.esp.ledger[0].message_ids


@pytest.mark.parametrize("esp", REPEATS_NOTHING, indirect=True)
def test_duplicate_answer_is_success_without_an_id(cell: Cell) -> None:
    cell.esp.script(AcceptThenDrop())
    sent = message()
    assert sent.send() == 1
    assert cell.esp.requests[-1].status == 400
    status = sent.anymail_status
    assert (status.status, status.message_id) == ({"queued"}, None)
    assert status.esp_response.status_code == 400
    assert not QueuedMessage.objects.exists()


@pytest.mark.parametrize("esp", REPEATS_NOTHING, indirect=True)
def test_duplicate_answer_at_a_drain_is_success(cell: Cell) -> None:
    cell.esp.script(DROPS)
    sent = message()
    sent.send()
    cell.esp.script()
    assert drain_when_due(cell, sent.queued_message) == "sent"
    assert cell.esp.requests[-1].status == 400
    assert cell.accepted(sent) == 1


@at_each
def test_answers_that_never_come_are_waited_for_until_the_deadline_and_one_mail_arrives(cell: Cell) -> None:
    """At 0, 11 and 23 of 25 seconds; then from the queue."""
    cell.settings.ANYMAIL_REQUESTS_TIMEOUT = (10.0, 0.3)
    cell.esp.script(Rule(Takes(11, cell.clock, AcceptThenStall())))
    sent = message()
    assert sent.send() == 1
    assert [attempt.error for attempt in sent.retry_history] == ["ReadTimeoutError"] * 3
    assert len(cell.esp.requests) == 3
    assert sent.queued_message.verdict == "ambiguous"
    assert cell.accepted(sent) == 1
    del cell.settings.ANYMAIL_REQUESTS_TIMEOUT
    cell.esp.script()
    cell.esp.release()
    assert drain_when_due(cell, sent.queued_message) == "sent"
    assert len(set(keys(cell.esp))) == 1
    assert cell.accepted(sent) == 1


@at_each
def test_request_still_in_progress_is_waited_for(cell: Cell) -> None:
    """The first try times out while the ESP works on it. What asks again meanwhile is told so, and takes nothing."""
    cell.settings.ANYMAIL_REQUESTS_TIMEOUT = (10.0, 1.0)
    cell.esp.script(Latency())
    sent = message()
    assert sent.send() == 1
    assert len(set(keys(cell.esp))) == 1
    del cell.settings.ANYMAIL_REQUESTS_TIMEOUT
    cell.esp.release()
    cell.esp.wait_for(accepted=1)
    if cell.esp.esp in COMPARES_BODIES:
        assert [request.status for request in cell.esp.requests[1:]] == [409, 409, 409]
        assert sent.queued_message.verdict == "ambiguous"
        assert drain_when_due(cell, sent.queued_message) == "sent"
        assert len(set(keys(cell.esp))) == 1
    assert cell.accepted(sent) == 1


# --- The user's own key ---


def give_key(sent: Any, key: Any) -> None:
    sent.idempotency_key = key


def give_key_to_brevo(sent: Any, key: str) -> None:
    sent.extra_headers["idempotencyKey"] = key


def give_key_to_unisender_go(sent: Any, key: str) -> None:
    sent.esp_extra = {"idempotence_key": key}


ways_to_give_a_key = pytest.mark.parametrize(
    ("esp", "give"),
    [
        *[pytest.param(esp, give_key, id=esp) for esp in sorted(KEYED)],
        pytest.param("brevo", give_key_to_brevo, id="brevo, extra_headers"),
        pytest.param("unisender_go", give_key_to_unisender_go, id="unisender_go, esp_extra"),
    ],
    indirect=["esp"],
)

OWN_KEY = "11111111-2222-3333-4444-555555555555"


@ways_to_give_a_key
def test_users_key_makes_two_sends_one_mail(cell: Cell, give: Callable[[Any, str], None]) -> None:
    for _ in range(2):
        sent = message()
        give(sent, OWN_KEY)
        assert sent.send() == 1
    assert keys(cell.esp) == [OWN_KEY, OWN_KEY]
    assert cell.accepted(sent) == 1


@ways_to_give_a_key
def test_users_key_stays_through_a_refusal_and_the_queue(cell: Cell, give: Callable[[Any, str], None]) -> None:
    cell.esp.script(Rule(Status(429)))
    sent = message()
    give(sent, OWN_KEY)
    assert sent.send() == 1
    row = sent.queued_message
    assert (row.key, row.key_from_user) == (OWN_KEY, True)
    cell.esp.script()
    assert drain_when_due(cell, row) == "sent"
    assert set(keys(cell.esp)) == {OWN_KEY}
    assert cell.accepted(sent) == 1


@at_each
def test_users_key_of_another_type_is_taken_as_text(cell: Cell) -> None:
    sent = message()
    sent.idempotency_key = uuid.UUID(OWN_KEY)
    sent.send()
    assert keys(cell.esp) == [OWN_KEY]


@pytest.mark.parametrize(
    ("esp", "key"),
    [
        pytest.param("brevo", "order-17", id="brevo: no UUID"),
        pytest.param("resend", "", id="resend: empty"),
        pytest.param("resend", "x" * 257, id="resend: too long"),
        pytest.param("resend", "a\r\nX-Header: b", id="resend: more than a header holds"),
        pytest.param("sparkpost", "order 17", id="sparkpost: a space"),
        pytest.param("sparkpost", "x" * 256, id="sparkpost: too long"),
        pytest.param("unisender_go", "x" * 65, id="unisender_go: too long"),
    ],
    indirect=["esp"],
)
def test_key_that_the_esp_would_not_take_is_an_error_before_the_request(cell: Cell, key: str) -> None:
    sent = message()
    sent.idempotency_key = key
    with pytest.raises(InvalidIdempotencyKey, match="idempotency_key") as caught:
        sent.send()
    assert repr(key) in str(caught.value)
    assert cell.esp.requests == []
    assert not QueuedMessage.objects.exists()


# --- One key, two bodies ---


@at_those_that_compare_bodies
def test_users_key_with_another_body_is_an_error_that_says_so(cell: Cell) -> None:
    for subject in ("First", "Second"):
        sent = message(subject)
        sent.idempotency_key = OWN_KEY
        if subject == "First":
            sent.send()
            continue
        with pytest.raises(AnymailRequestsAPIError, match=r"(?is)idempotency key .* different .*payload") as caught:
            sent.send()
    assert caught.value.status_code == 409
    assert len(cell.esp.requests) == 2
    assert [accepted.subject for accepted in cell.esp.ledger] == ["First"]
    assert not QueuedMessage.objects.exists()


@at_those_that_compare_bodies
def test_another_body_at_a_re_send_is_held_and_not_sent(cell: Cell) -> None:
    cell.esp.script(DROPS)
    sent = message()
    sent.send()
    row = sent.queued_message
    requests = len(cell.esp.requests)
    content = MessageContent.objects.get(message=row)
    content.payload = content.payload.replace('"Body"', '"Another body"')
    content.save()
    cell.esp.script()
    assert drain_when_due(cell, row) == "held"
    assert (row.reason, row.verdict) == ("body changed", "ambiguous")
    assert len(cell.esp.requests) == requests
    assert MessageContent.objects.filter(message=row).exists()


@at_those_that_compare_bodies
def test_refusal_of_another_body_at_a_re_send_is_held(cell: Cell) -> None:
    """It proves that the ESP has had an earlier request under this key."""
    cell.esp.script(DROPS)
    sent = message()
    sent.send()
    cell.esp.script(Rule(Status(409)))
    assert drain_when_due(cell, sent.queued_message) == "held"
    assert sent.queued_message.reason == "key conflict"
    cell.esp.script()
    cell.pass_time(30 * 86400)
    assert cell.drain().done == 0
    assert cell.accepted(sent) == 1


@at_each
@pytest.mark.parametrize("first", ["sent directly", "queued first"])
def test_re_sends_are_equal(cell: Cell, first: str) -> None:
    """Byte for byte where the ESP compares bodies; the same key everywhere."""
    cell.esp.script(DROPS)
    sent = rich_message()
    if first == "sent directly":
        sent.send()
        row = sent.queued_message
    else:
        row = cell.queue(sent)
        assert drain_when_due(cell, row) == "deferred"
    assert drain_when_due(cell, row) == "deferred"
    cell.esp.script()
    assert drain_when_due(cell, row) == "sent"
    assert len(cell.esp.requests) == 4 + 4 + 1
    assert len(set(keys(cell.esp))) == 1
    if cell.esp.esp in COMPARES_BODIES:
        assert len({request.body for request in cell.esp.requests}) == 1
    assert cell.accepted(sent) == 1


# --- How long a key is kept ---


@at_each
def test_key_is_kept_inside_the_window(cell: Cell) -> None:
    """An ambiguous row comes up again while the ESP still knows its key, though that may be sooner than the backoff."""
    cell.settings.EMAIL_QUEUE_BACKOFF = 86400
    cell.settings.EMAIL_QUEUE_BACKOFF_MAX = 86400
    cell.esp.script(DROPS)
    sent = message()
    sent.send()
    row = sent.queued_message
    assert (row.due_at - row.created_at).total_seconds() <= WINDOW[cell.esp.esp] / 3
    assert drain_when_due(cell, row) == "deferred"
    cell.esp.script()
    assert drain_when_due(cell, row) == "sent"
    assert len(set(keys(cell.esp))) == 1
    assert cell.accepted(sent) == 1


@at_each
def test_key_is_renewed_after_the_window(cell: Cell) -> None:
    """Nobody can know any more then, so the policy decides: here to send again."""
    cell.esp.script(DROPS)
    sent = message()
    sent.send()
    row = sent.queued_message
    old = row.key
    cell.pass_time(2 * WINDOW[cell.esp.esp])
    cell.esp.script()
    assert drain_when_due(cell, row) == "sent"
    assert row.key != old
    assert keys(cell.esp) == [old] * 4 + [row.key]
    assert cell.accepted(sent) == 2


@at_each
def test_row_is_held_after_the_window_if_the_policy_says_so(cell: Cell) -> None:
    cell.settings.EMAIL_QUEUE_ON_AMBIGUOUS = "hold"
    cell.esp.script(DROPS)
    sent = message()
    sent.send()
    assert sent.queued_message.state == "deferred"
    cell.pass_time(2 * WINDOW[cell.esp.esp])
    cell.esp.script()
    assert drain_when_due(cell, sent.queued_message) == "held"
    assert cell.accepted(sent) == 1


@at_each
def test_key_is_renewed_after_a_refusal(cell: Cell) -> None:
    """An ESP may count a refused request as the use of its key; nothing was taken, so another key is safe."""
    cell.esp.script(Rule(Status(429, uses_key=True), times=1), Rule(Status(429)))
    sent = message()
    sent.send()
    row = sent.queued_message
    cell.esp.script()
    assert drain_when_due(cell, row) == "sent"
    *before, last = keys(cell.esp)
    assert last not in before
    assert cell.accepted(sent) == 1


@at_those_that_compare_bodies
def test_key_is_kept_while_the_esp_works_on_it(cell: Cell) -> None:
    """Under another one the ESP would take the message a second time."""
    cell.esp.script(Rule(Status(409, kind="in progress")))
    sent = message()
    sent.send()
    row = sent.queued_message
    assert (row.verdict, row.key) == ("refused", keys(cell.esp)[0])
    cell.esp.script()
    assert drain_when_due(cell, row) == "sent"
    assert len(set(keys(cell.esp))) == 1


@at_each
def test_key_is_kept_where_a_refusal_follows_an_ambiguous_try(cell: Cell) -> None:
    cell.esp.script(AcceptThenDrop(), Rule(Status(429)))
    sent = message()
    sent.send()
    row = sent.queued_message
    assert row.verdict == "ambiguous"
    cell.esp.script()
    assert drain_when_due(cell, row) == "sent"
    assert len(set(keys(cell.esp))) == 1
    assert cell.accepted(sent) == 1


@at_each
def test_worker_that_dies_in_a_send_leaves_its_key(cell: Cell) -> None:
    """What it had begun is taken once, whoever sends it then."""
    cell.esp.script(AcceptThenStall())
    row = cell.queue(sent := message())
    cell.settings.ANYMAIL_REQUESTS_TIMEOUT = (10.0, 0.15)
    cell.settings.EMAIL_TOTAL_RETRIES = 0
    assert drain_when_due(cell, row) == "deferred"
    # As it stands in the database while it is being sent.
    QueuedMessage.objects.filter(pk=row.pk).update(state="sending", lease=1, claimed_at=cell.now(), due_at=cell.now())
    QueuedMessage.objects.filter(pk=row.pk).update(maybe_taken_since=None, key_used_since=None)
    del cell.settings.ANYMAIL_REQUESTS_TIMEOUT
    assert drain_when_due(cell, row) == "sent"
    assert len(set(keys(cell.esp))) == 1
    assert cell.accepted(sent) == 1
