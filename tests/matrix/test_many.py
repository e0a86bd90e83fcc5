"""``send_messages()`` of many: a verdict for each, and none abandoned for another's trouble."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from anymail.exceptions import AnymailRequestsAPIError
from anymail.signals import pre_send
from django.core.mail import EmailMessage

from anymail_retry import breakers
from anymail_retry.models import QueuedMessage
from anymail_retry.testing import AcceptThenDrop, Rule, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .cell import Cell

pytestmark = [
    pytest.mark.parametrize("esp", ["mandrill"], indirect=True),
    # Anymail's own word to those who pass it.
    pytest.mark.filterwarnings("ignore:Anymail will drop support for fail_silently:DeprecationWarning"),
]


def messages(count: int = 6) -> list[Any]:
    return [EmailMessage(f"Number {n}", "Body", "from@example.com", ["to@example.com"]) for n in range(1, count + 1)]


def at(number: int, fault: Any) -> Rule:
    """A fault that the message of this number meets."""
    return Rule(fault, contains=f'"Number {number}"')


def connection(cell: Cell, **options: Any) -> Any:
    return cell.site.connection(**options)


def queued() -> dict[str, str]:
    """The verdict on each row, by subject."""
    return dict(QueuedMessage.objects.order_by("pk").values_list("subject", "verdict"))


def arrived(cell: Cell) -> list[str]:
    return [accepted.subject for accepted in cell.esp.ledger]


# --- With the queue on ---


def test_each_message_has_a_verdict_of_its_own(cell: Cell) -> None:
    cell.esp.script(
        at(2, Status(503)), at(3, AcceptThenDrop()), at(4, Status(401)), at(5, Status(429, retry_after=3600))
    )
    sent = messages()
    assert connection(cell).send_messages(sent) == 6
    assert queued() == {
        "Number 2": "refused",
        "Number 3": "ambiguous",
        "Number 4": "blocked",
        "Number 5": "refused",
    }
    assert arrived(cell) == ["Number 1", "Number 3", "Number 6"]
    assert [message.anymail_status.status for message in sent] == [
        {"sent"} if n in (1, 6) else {"queued"} for n in range(1, 7)
    ]
    assert [len(message.retry_history) for message in sent] == [1, 4, 1, 1, 1, 1]


def test_one_that_can_never_go_is_raised_when_all_are_tried(cell: Cell) -> None:
    cell.esp.script(at(2, Status(400)), at(3, Status(503)), at(4, Status(422)))
    sent = messages()
    with pytest.raises(AnymailRequestsAPIError) as caught:
        connection(cell).send_messages(sent)
    assert caught.value.status_code == 400  # the first
    assert arrived(cell) == ["Number 1", "Number 5", "Number 6"]
    assert queued() == {"Number 3": "refused"}
    assert [message.subject for message in sent if hasattr(message, "send_error")] == [
        "Number 2",
        "Number 3",
        "Number 4",
    ]
    assert [sent[n].send_error.status_code for n in (1, 2, 3)] == [400, 503, 422]


def test_failing_silently_counts_what_was_sent_or_kept(cell: Cell) -> None:
    cell.esp.script(at(2, Status(400)), at(3, Status(503)))
    sent = messages()
    assert connection(cell, fail_silently=True).send_messages(sent) == 5
    assert sent[1].send_error.status_code == 400
    assert queued() == {"Number 3": "refused"}


@pytest.fixture
def third_is_a_mistake() -> Iterator[None]:
    def receiver(message: Any, **kwargs: Any) -> None:
        if message.subject == "Number 3":
            raise LookupError("a mistake in a receiver")

    pre_send.connect(receiver)
    yield
    pre_send.disconnect(receiver)


@pytest.mark.parametrize("silently", [False, True])
def test_mistake_of_the_programmer_is_raised_at_once(cell: Cell, third_is_a_mistake: None, silently: bool) -> None:
    sent = messages()
    with pytest.raises(LookupError, match="a mistake in a receiver"):
        connection(cell, fail_silently=silently).send_messages(sent)
    assert arrived(cell) == ["Number 1", "Number 2"]
    assert not queued()


def test_all_go_over_one_connection(cell: Cell) -> None:
    before = cell.esp.counts.connections
    assert connection(cell).send_messages(messages()) == 6
    assert cell.esp.counts.connections == before + 1


def test_nothing_to_send_is_nothing(cell: Cell) -> None:
    nobody = EmailMessage("Subject", "Body", "from@example.com", [])
    assert connection(cell).send_messages([]) == 0
    assert connection(cell).send_messages([nobody]) == 0
    assert cell.esp.requests == []


# --- In an outage ---


def test_after_the_breaker_opened_the_rest_is_queued_without_a_try(cell: Cell) -> None:
    cell.settings.EMAIL_TOTAL_RETRIES = 0
    cell.esp.script(Rule(Status(502)))
    sent = messages(12)
    assert connection(cell).send_messages(sent) == 12
    assert [len(message.retry_history) for message in sent] == [1] * 5 + [0] * 7
    assert len(cell.esp.requests) == 5
    assert list(queued().values()) == ["ambiguous"] * 5 + ["refused"] * 7
    assert set(QueuedMessage.objects.filter(verdict="refused").values_list("reason", flat=True)) == {"circuit open"}
    (breaker,) = breakers()
    assert breaker.state == "open"


def test_retries_of_one_message_count_towards_the_breaker(cell: Cell) -> None:
    cell.esp.stop_listening()
    sent = messages(4)
    assert connection(cell).send_messages(sent) == 4
    # Each try is one failure; the fifth opens it, and there the second message stops trying.
    assert [len(message.retry_history) for message in sent] == [4, 1, 0, 0]


def test_what_was_queued_in_an_outage_arrives_once_after_it(cell: Cell) -> None:
    cell.esp.stop_listening()
    sent = messages(12)
    assert connection(cell).send_messages(sent) == 12
    cell.esp.start_listening()
    rows = [message.queued_message for message in sent]
    cell.pass_time(7200)  # the breaker's reset time, and every row's delay
    for row in rows:
        cell.wait_until_due(row)
    assert cell.drain().sent == 12
    assert sorted(arrived(cell)) == sorted(message.subject for message in sent)
    (breaker,) = breakers()
    assert breaker.state == "closed"


# --- With the queue off: as Anymail does it ---


def test_without_the_queue_the_first_error_ends_it(cell: Cell) -> None:
    cell.settings.EMAIL_FALLBACK_QUEUE = False
    cell.esp.script(at(2, Status(400)))
    with pytest.raises(AnymailRequestsAPIError):
        connection(cell).send_messages(messages())
    assert arrived(cell) == ["Number 1"]


def test_without_the_queue_a_silent_failure_is_not_counted(cell: Cell) -> None:
    cell.settings.EMAIL_FALLBACK_QUEUE = False
    cell.esp.script(at(2, Status(400)))
    assert connection(cell, fail_silently=True).send_messages(messages()) == 5
    assert "Number 2" not in arrived(cell)


def test_without_the_queue_there_is_no_breaker(cell: Cell) -> None:
    cell.settings.EMAIL_FALLBACK_QUEUE = False
    cell.settings.EMAIL_TOTAL_RETRIES = 0
    cell.esp.script(Rule(Status(502)))
    assert connection(cell, fail_silently=True).send_messages(messages(8)) == 0
    assert len(cell.esp.requests) == 8
