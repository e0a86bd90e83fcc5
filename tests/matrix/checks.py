"""What has to hold of every cell, by the ESP's own ledger and log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anymail.exceptions import AnymailError, AnymailRequestsAPIError

from anymail_retry.delivery import SECRETS
from anymail_retry.testing import Rule, Status
from anymail_retry.testing.wire import json_answer

from .cases import KEYED, QUEUED, WrongKey

if TYPE_CHECKING:
    import pytest

    from anymail_retry.models import QueuedMessage

    from .cases import Case, Ends
    from .cell import Cell

PHASES = {"c": "connect", "t": "certificate", "s": "sent", "a": "answered"}


def answer(cell: Cell, case: Case, ends: Ends) -> bytes | None:
    """The body of the ESP's last answer; None: it has none, or none that the case tells."""
    fault = case.fault.fault if isinstance(case.fault, Rule) else case.fault
    provider = cell.esp.provider
    if isinstance(fault, WrongKey):
        return provider.wrong_api_key().body
    if not isinstance(fault, Status) or fault.code != ends.status:
        return None
    if fault.body is None:
        return provider.error(fault.code, fault.kind).body
    return fault.body.encode() if isinstance(fault.body, str) else json_answer(fault.code, fault.body).body


def check_on_the_wire(cell: Cell, case: Case, ends: Ends, message: Any) -> None:
    """Requests by the ESP's log, what it took by its ledger, waits by the clock."""
    reached = sum(ends.phase(n) in "sa" for n in range(ends.tries)) if ends.requests is None else ends.requests
    taken = int(case.taken or ends.verdict == "delivered")
    cell.esp.wait_for(requests=reached, accepted=taken)  # a client that gave up may be ahead of it
    assert len(cell.esp.requests) == reached
    assert cell.accepted(message) == taken
    bounds = [(low, high) for low, high in ends.waits if high > 0]
    assert len(cell.clock.waits) == len(bounds)
    for wait, (low, high) in zip(cell.clock.waits, bounds, strict=True):
        assert low <= wait <= high


def check_history(cell: Cell, ends: Ends, message: Any) -> None:
    """``message.retry_history`` is what happened."""
    history = message.retry_history
    assert [attempt.phase.value for attempt in history] == [PHASES[ends.phase(n)] for n in range(ends.tries)]
    assert [attempt.waited for attempt in history if attempt.waited] == cell.clock.waits
    assert history[-1].waited is None
    if ends.status is not None:
        assert history[-1].status == ends.status
    if ends.retry_after is not None:
        assert history[-1].retry_after == ends.retry_after


def check_log(cell: Cell, ends: Ends, message: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One warning for each retry, of ours and not of urllib3's, and nothing that is secret, at any level."""
    retries = [record.getMessage() for record in caplog.records if "before try" in record.getMessage()]
    assert len(retries) == len([attempt for attempt in message.retry_history if attempt.waited is not None])
    for number, line in enumerate(retries, start=2):
        assert line.startswith(f"{cell.esp.provider.name}: ")
        assert line.endswith(f"before try {number} of 4")
    assert not [record for record in caplog.records if record.name.startswith("urllib3") and record.levelno > 10]
    blocked = [record.levelname for record in caplog.records if "the account is blocked" in record.getMessage()]
    assert blocked == (["ERROR"] if ends.verdict == "blocked" and ends.caller == QUEUED else [])
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name != "anymail_retry.testing")
    for name, value in cell.esp.provider.credentials.items():
        assert name not in SECRETS or value not in logged
    assert message.body not in logged


def check_error(cell: Cell, case: Case, ends: Ends, error: Any) -> None:
    """What can be caught, and what it carries: the ESP's status and words."""
    if ends.error is None:
        assert error is None
        return
    assert isinstance(error, ends.error)
    assert isinstance(error, AnymailError)
    if ends.status is None:
        return
    # Where the body broke, Anymail's error leaves the response with the network's, its cause.
    responses = [getattr(one, "response", None) for one in (error, error.__cause__)]
    assert ends.status in [response.status_code for response in responses if response is not None]
    body = answer(cell, case, ends)
    if body is not None:
        assert error.response.content == body
        if isinstance(error, AnymailRequestsAPIError):
            assert error.status_code == ends.status


def check_row(cell: Cell, case: Case, ends: Ends, row: QueuedMessage) -> None:
    """What an operator sees of it."""
    row.refresh_from_db()
    assert (row.verdict, row.http_status, row.attempt_count) == (ends.verdict, ends.status, 1)
    body = answer(cell, case, ends)
    if body is not None:
        assert row.answer == body.decode()[:500]
    if ends.retry_after is not None and row.due_at is not None:
        assert (row.due_at - row.created_at).total_seconds() >= ends.retry_after


def copies_when_over(cell: Cell, case: Case) -> int:
    """How often a message that was kept has to have arrived when the fault is over: once, and a second time only if
    the ESP took it, did not say so, and has no keys to recognise it by."""
    return 1 + int(case.taken and cell.esp.esp not in KEYED)
