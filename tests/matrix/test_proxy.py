"""What happens behind a proxy once it has let the request through: as anywhere, the message may have been taken.

urllib3 says "cannot connect to proxy" of a connection that is dropped before the status line. Believing it would send
again what the ESP has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.core.mail import EmailMessage

from anymail_retry import close_connections, reset_breakers
from anymail_retry.testing import AcceptThenDrop, AcceptThenStall, Fault, LocalEsp, Rule
from anymail_retry.testing.pytest import local_esp
from tests.settings import MAIL_SETTINGS
from tests.transport.servers import ConnectProxy, forward_proxy, serving

from .cases import KEYED
from .cell import Cell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp"]  # a fixture

WAYS = {"https": ConnectProxy(), "http": forward_proxy}
FAULTS: dict[str, Fault] = {
    "dropped": AcceptThenDrop(),
    "reset": AcceptThenDrop(reset=True),
    "silent": AcceptThenStall(),
}

at_each = pytest.mark.parametrize("name", ["mandrill", *sorted(KEYED)])
with_each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


@pytest.fixture(params=WAYS)
def cell(
    request: pytest.FixtureRequest,
    name: str,
    local_esp: Callable[..., LocalEsp],
    db: None,
    settings: SettingsWrapper,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Cell]:
    """An ESP that is reached through a proxy, by a tunnel or by forwarding."""
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    reset_breakers()
    settings.ANYMAIL_REQUESTS_TIMEOUT = (10.0, 1.0)
    with serving(WAYS[request.param]) as port:
        monkeypatch.setenv(f"{request.param}_proxy", f"http://127.0.0.1:{port}")
        yield Cell(local_esp(name, tls=request.param == "https"), settings, monkeypatch, MAIL_SETTINGS, "")
        close_connections()
    reset_breakers()


def message() -> Any:
    return EmailMessage("Subject", "Body", "from@example.com", ["to@example.com"])


def has_keys(cell: Cell) -> bool:
    return cell.esp.esp in KEYED


@at_each
@with_each_fault
def test_lost_answer_to_a_direct_send_is_ambiguous(cell: Cell, fault: Fault) -> None:
    cell.esp.script(fault)
    sent = message()
    assert sent.send() == 1
    assert sent.retry_history[0].phase == "sent"
    assert [attempt.verdict.value for attempt in sent.retry_history] == (
        ["ambiguous", sent.retry_history[-1].verdict.value] if has_keys(cell) else ["ambiguous"]
    )
    assert hasattr(sent, "queued_message") is not has_keys(cell)
    assert cell.accepted(sent) == 1


@at_each
@with_each_fault
def test_lost_answer_at_a_drain_is_ambiguous(cell: Cell, fault: Fault) -> None:
    cell.esp.script(fault)
    row = cell.queue(sent := message())
    cell.drain()
    row.refresh_from_db()
    assert (row.state, row.verdict) == (("sent", "delivered") if has_keys(cell) else ("deferred", "ambiguous"))
    assert cell.accepted(sent) == 1


@at_each
def test_answers_that_are_always_lost_never_make_two_mails_of_one_under_a_key(cell: Cell) -> None:
    cell.esp.script(Rule(AcceptThenDrop()))
    sent = message()
    sent.send()
    assert (sent.queued_message.verdict, cell.accepted(sent)) == ("ambiguous", 1)
    assert len(cell.esp.requests) == (4 if has_keys(cell) else 1)
    assert len({request.idempotency_key for request in cell.esp.requests}) == 1
