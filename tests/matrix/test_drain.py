"""Every fault at every ESP, met by a message in the queue; and the policies for what nobody can know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from anymail_retry.models import MailerState, MessageContent

from .cases import KEYED, QUEUED
from .cell import cells, make, send
from .checks import check_on_the_wire, check_row, copies_when_over

if TYPE_CHECKING:
    from .cases import Case, Ends
    from .cell import Cell
    from .conftest import Record

pytestmark = pytest.mark.filterwarnings("ignore::anymail.exceptions.AnymailNotSupportedWarning")  # Anymail's: SendGrid


@cells()
def test_drain(cell: Cell, case: Case, ends: Ends, record: Record) -> None:
    """Sent by a worker, from the queue."""
    message = make(case)
    row = cell.queue(message)
    with cell.fault(case):
        assert cell.drain().done == 1
        check_on_the_wire(cell, case, ends, message)
    row.refresh_from_db()
    assert row.state == ends.row
    if row.state == "sent":
        record("drain", message, told=False)
        return
    check_row(cell, case, ends, row)
    (attempt,) = row.attempts.all()
    assert (attempt.verdict, attempt.http_status) == (ends.verdict, ends.status)
    paused = MailerState.objects.filter(alias=row.mailer, paused_until__isnull=False).exists()
    assert paused == (ends.verdict == "blocked" or ends.retry_after is not None)
    if row.state in ("failed", "held"):
        assert row.due_at is None
        if row.state == "held":
            assert row.reason == "accepted?"
        assert MessageContent.objects.filter(message=row).exists()  # for a person to look at
        record("drain", message, told=True)
        return

    cell.wait_until_due(row)
    assert cell.drain().sent == 1
    assert cell.accepted(message) == copies_when_over(cell, case)
    record("drain", message, told=False)


@cells(lambda case, ends: ends.verdict == "ambiguous" and ends.caller == QUEUED)
def test_on_ambiguous_hold(cell: Cell, case: Case, ends: Ends, record: Record) -> None:
    """Where nobody can know, it is left to a person; under a key it is not."""
    message = make(case)
    message.on_ambiguous = "hold"
    with cell.fault(case):
        assert send(message) is None
    row = message.queued_message
    if cell.esp.esp in KEYED:
        assert row.state == "deferred"
        cell.wait_until_due(row)
        assert cell.drain().sent == 1
        assert cell.accepted(message) == 1
    else:
        assert (row.state, row.due_at) == ("held", None)
        cell.pass_time(30 * 86400)
        assert cell.drain().done == 0
        assert cell.accepted(message) == int(case.taken)
    record("hold", message, told=True)
