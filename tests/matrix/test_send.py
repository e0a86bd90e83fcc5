"""Every fault at every ESP, met by a message that is sent directly.

What is expected of each stands in ``cases.py``. What has to hold for all: a message arrives, or somebody is told; and
it arrives twice only where nobody could have known.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from anymail_retry.models import QueuedMessage
from anymail_retry.signals import message_failed

from .cases import QUEUED, RAISED, WARNED
from .cell import cells, fresh, make, send
from .checks import check_error, check_history, check_log, check_on_the_wire, check_row, copies_when_over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .cases import Case, Ends
    from .cell import Cell
    from .conftest import Record

pytestmark = pytest.mark.filterwarnings("ignore::anymail.exceptions.AnymailNotSupportedWarning")  # Anymail's: SendGrid

#: Where the queue is off too: back ends that treat errors in a way of their own, and one with keys.
WITHOUT_QUEUE = ("mailgun", "mailjet", "mandrill", "postmark", "resend")

#: Where we raise something else than Anymail does: it follows a 302, and a body that breaks hides the status from it.
UNLIKE_ANYMAIL = {"302", "429, half a body", "500, half a body"}


@pytest.fixture
def failed() -> Iterator[list[Any]]:
    """The messages of which ``message_failed`` told."""
    told: list[Any] = []

    def receiver(message: Any, **kwargs: Any) -> None:
        told.append(message)

    message_failed.connect(receiver)
    yield told
    message_failed.disconnect(receiver)


@cells()
def test_send(
    cell: Cell, case: Case, ends: Ends, record: Record, failed: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Sent directly, with the queue on."""
    caplog.set_level(logging.DEBUG)
    message = make(case)
    with cell.fault(case):
        error = send(message)
        check_on_the_wire(cell, case, ends, message)
    check_history(cell, ends, message)
    check_log(cell, ends, message, caplog)
    check_error(cell, case, ends, error or getattr(message, "send_error", None))
    assert (error is not None) == (ends.caller == RAISED)
    assert failed == ([message] if ends.caller == WARNED else [])
    assert ("accepted the message for no recipient" in caplog.text) == (ends.caller == WARNED)
    row = QueuedMessage.objects.first()
    if ends.caller != QUEUED:
        assert row is None
        record("send", message, told=ends.caller in (RAISED, WARNED))
        return
    assert row is not None
    assert message.queued_message == row
    assert message.anymail_status.status == {"queued"}
    assert row.state == "deferred"
    check_row(cell, case, ends, row)

    cell.wait_until_due(row)
    assert cell.drain().sent == 1
    assert cell.accepted(message) == copies_when_over(cell, case)
    record("send", message, told=False)


@cells(lambda case, ends: not case.hangs, esps=WITHOUT_QUEUE)
def test_send_without_queue(cell: Cell, case: Case, ends: Ends, record: Record) -> None:
    """Sent directly, with the queue off: what is raised is what Anymail raises."""
    cell.settings.EMAIL_FALLBACK_QUEUE = False
    message = make(case)
    with cell.fault(case):
        error = send(message)
        check_on_the_wire(cell, case, ends, message)
    check_history(cell, ends, message)
    check_error(cell, case, ends, error)
    assert not QueuedMessage.objects.exists()
    record("send, no queue", message, told=error is not None or ends.caller == WARNED)

    if case.id in UNLIKE_ANYMAIL or error is None:
        return
    fresh(cell.esp)
    with cell.fault(case):
        error_of_anymail = send(make(case), anymails_own(cell))
    assert kind(error) == kind(error_of_anymail)


def anymails_own(cell: Cell) -> Any:
    backend = import_module(f"anymail.backends.{cell.esp.esp}").EmailBackend
    return backend(**{**cell.esp.options(), "api_url": cell.url})


def kind(error: Any) -> list[type]:
    """What an error can be caught as. Anymail makes a class for each of the network's errors."""
    return [base for base in type(error).__mro__ if base.__module__ != "anymail.backends.base_requests"]
