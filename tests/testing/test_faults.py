"""Every fault does on the wire what it says: seen by a bare socket, over TLS and without."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import requests

from anymail_retry.testing import (
    AcceptThenDrop,
    AcceptThenStall,
    CloseIdle,
    DropInHandshake,
    Exchange,
    Fault,
    Garbage200,
    HalfBody,
    Latency,
    LocalEsp,
    Ok,
    Redirect,
    Refuse,
    ResetAfterRequest,
    Rule,
    Stall,
    StallInBody,
    StallInHandshake,
    Status,
    TlsErrorAfterRequest,
)

from .client import MANDRILL, Client, mandrill

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(params=[True, False], ids=["https", "http"])
def esp(request: pytest.FixtureRequest, local_esp: Callable[..., LocalEsp]) -> LocalEsp:
    return local_esp("mandrill", tls=request.param)


def ask(client: Client) -> None:
    client.send(mandrill(), MANDRILL)


def answer(esp: LocalEsp) -> int:
    """The status that a new client gets."""
    with Client(esp) as client:
        ask(client)
        return client.receive_answer()[0]


def test_no_fault_is_a_success_and_keeps_the_connection(esp: LocalEsp) -> None:
    with Client(esp) as client:
        for number in (1, 2):
            ask(client)
            status, body = client.receive_answer()
            assert status == 200
            assert b'"status": "sent"' in body
            assert esp.counts.accepted == number
    assert [(request.connection, request.nth_on_connection) for request in esp.requests] == [(1, 1), (1, 2)]


# --- in the handshake ---


def test_drop_in_handshake_is_a_fin_before_any_request(esp: LocalEsp) -> None:
    esp.script(DropInHandshake())
    if esp.tls:
        with pytest.raises(ssl.SSLError, match="EOF"):
            Client(esp)
    else:
        with Client(esp) as client:
            ask(client)
            assert client.receive() == b""
    assert esp.requests == []
    assert answer(esp) == 200


def test_drop_in_handshake_by_a_reset(esp: LocalEsp) -> None:
    esp.script(DropInHandshake(reset=True))
    if esp.tls:
        with pytest.raises(ConnectionResetError):
            Client(esp)
    else:
        with Client(esp) as client:
            ask(client)
            client.receive_reset()
    assert esp.requests == []
    assert answer(esp) == 200


def test_stall_in_handshake_is_silent_until_the_client_leaves(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=True)
    esp.script(StallInHandshake())
    with requests.Session() as session, pytest.raises(requests.ReadTimeout):
        session.post(esp.url + "/messages/send.json", mandrill(), timeout=(0.2, 30))
    esp.wait_for(connections=1)
    wait_until_nothing_stalls(esp)
    assert esp.requests == []
    assert answer(esp) == 200


def test_stall_in_handshake_ends_when_released(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)
    esp.script(StallInHandshake())
    with Client(esp) as client:
        ask(client)
        esp.wait_for(stalled=1)
        esp.release()
        assert client.receive() == b""
    assert esp.requests == []


def wait_until_nothing_stalls(esp: LocalEsp) -> None:
    with esp.changed:
        assert esp.changed.wait_for(lambda: esp.counts.stalled == 0, timeout=30)


# --- no answer ---


@pytest.mark.parametrize("accepted", [False, True])
def test_refuse_takes_the_esp_down(esp: LocalEsp, accepted: bool) -> None:
    port = esp.port
    esp.script(Refuse(accepted=accepted))
    with Client(esp) as client, Client(esp) as idle:
        esp.wait_for(connections=2)  # the kernel resets what nobody has accepted yet
        ask(client)
        client.receive_reset()
        assert idle.receive() == b""
    with pytest.raises(ConnectionRefusedError):
        Client(esp)
    assert esp.counts.accepted == accepted
    esp.start_listening()
    assert esp.port == port
    assert answer(esp) == 200


def test_refuse_ends_by_itself_after_its_time(esp: LocalEsp) -> None:
    esp.script(Refuse(seconds=0.05))
    with Client(esp) as client:
        ask(client)
        client.receive_reset()
    with esp.changed:  # the connection of the fault lives until it listens again
        assert esp.changed.wait_for(lambda: esp.counts.open_connections == 0, timeout=30)
    assert answer(esp) == 200


@pytest.mark.parametrize(
    ("fault", "reset", "accepted"),
    [
        pytest.param(ResetAfterRequest(), True, False, id="ResetAfterRequest"),
        pytest.param(AcceptThenDrop(), False, True, id="AcceptThenDrop"),
        pytest.param(AcceptThenDrop(reset=True), True, True, id="AcceptThenDrop by a reset"),
    ],
)
def test_end_without_an_answer(esp: LocalEsp, fault: Fault, reset: bool, accepted: bool) -> None:
    esp.script(fault)
    with Client(esp) as client:
        ask(client)
        if reset:
            client.receive_reset()
        else:
            assert client.receive() == b""
    (request,) = esp.requests
    assert (request.status, request.accepted, request.fault) == (None, 1 if accepted else None, repr(fault))
    assert len(esp.ledger) == accepted
    assert answer(esp) == 200


@pytest.mark.parametrize(
    ("fault", "accepted"),
    [pytest.param(Stall(), False, id="Stall"), pytest.param(AcceptThenStall(), True, id="AcceptThenStall")],
)
def test_stall_is_silent_until_the_client_leaves(esp: LocalEsp, fault: Fault, accepted: bool) -> None:
    esp.script(fault)
    with Client(esp) as client:
        ask(client)
        esp.wait_for(1, stalled=1)
        assert len(esp.ledger) == accepted
        client.timeout(0.1)
        with pytest.raises(TimeoutError):
            client.receive()
    wait_until_nothing_stalls(esp)
    assert answer(esp) == 200


def test_released_stall_closes_and_released_acceptance_answers(esp: LocalEsp) -> None:
    esp.script(Stall(), AcceptThenStall())
    with Client(esp) as stalled, Client(esp) as accepted:
        ask(stalled)
        esp.wait_for(1)
        ask(accepted)
        esp.wait_for(2, stalled=2)
        esp.release()
        assert stalled.receive() == b""
        assert accepted.receive_answer()[0] == 200
        ask(accepted)  # and its connection is kept
        assert accepted.receive_answer()[0] == 200
    assert len(esp.ledger) == 2


@pytest.mark.parametrize(
    "fault",
    [StallInHandshake(), Stall(), AcceptThenStall(), StallInBody(), Latency(None), Latency(3600), Refuse(3600)],
    ids=repr,
)
def test_closing_the_esp_ends_what_stalls(fault: Fault) -> None:
    """``nothing_is_left`` looks for its thread."""
    with LocalEsp(tls=False) as esp:
        esp.script(fault)
        with Client(esp) as client:
            ask(client)
            esp.wait_for(connections=1)
            if not isinstance(fault, StallInHandshake):
                esp.wait_for(1)
            esp.close()
    with LocalEsp(tls=False, latency=3600) as esp, Client(esp) as client:
        ask(client)
        esp.wait_for(1)
        esp.close()


@pytest.mark.parametrize("accepted", [False, True])
def test_tls_error_after_request(local_esp: Callable[..., LocalEsp], accepted: bool) -> None:
    esp = local_esp(tls=True)
    esp.script(TlsErrorAfterRequest(accepted=accepted))
    with Client(esp) as client:
        ask(client)
        with pytest.raises(ssl.SSLError, match=r"WRONG_VERSION_NUMBER|BAD_RECORD|RECORD_LAYER"):
            client.receive_all()
    assert len(esp.ledger) == accepted
    assert answer(esp) == 200


def test_tls_error_over_plain_http_is_garbage(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)
    esp.script(TlsErrorAfterRequest())
    with Client(esp) as client:
        ask(client)
        assert not client.receive_all().startswith(b"HTTP/")
    assert esp.ledger == []


# --- another answer ---


@pytest.mark.parametrize("accepted", [False, True])
def test_status_is_an_answer_and_keeps_the_connection(esp: LocalEsp, accepted: bool) -> None:
    esp.script(Status(500, accepted=accepted))
    with Client(esp) as client:
        ask(client)
        status, body = client.receive_answer()
        assert status == 500
        assert b"GeneralError" in body
        assert len(esp.ledger) == accepted
        ask(client)
        assert client.receive_answer()[0] == 200
    assert [request.status for request in esp.requests] == [500, 200]


@pytest.mark.parametrize(
    ("fault", "body", "headers"),
    [
        pytest.param(Status(429, retry_after=2), None, {"Retry-After": "2"}, id="Retry-After: integer"),
        pytest.param(Status(429, retry_after=0.5), None, {"Retry-After": "0.5"}, id="Retry-After: decimal"),
        pytest.param(
            Status(503, retry_after="Wed, 21 Oct 2026 07:28:00 GMT"),
            None,
            {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"},
            id="Retry-After: date",
        ),
        pytest.param(Status(429, retry_after="soon"), None, {"Retry-After": "soon"}, id="Retry-After: garbage"),
        pytest.param(Status(418, b"tea"), b"tea", {"Content-Type": "text/html; charset=utf-8"}, id="body: bytes"),
        pytest.param(Status(418, "tée"), "tée".encode(), {}, id="body: text"),
        pytest.param(Status(200, [1]), b"[1]", {"Content-Type": "application/json"}, id="body: JSON"),
        pytest.param(Status(418, "", {"X-A": "b"}), b"", {"X-A": "b"}, id="body: empty, a header"),
        pytest.param(Status(429, kind=None), None, {"Content-Type": "application/json"}, id="body: the ESP's own"),
        pytest.param(Status(502), None, {"Content-Type": "text/html; charset=utf-8"}, id="body: a proxy's page"),
    ],
)
def test_status_as_scripted(
    local_esp: Callable[..., LocalEsp], fault: Status, body: bytes | None, headers: dict[str, str]
) -> None:
    esp = local_esp(tls=False)
    esp.script(fault)
    response = requests.post(esp.url + "/messages/send.json", mandrill(), timeout=30)
    assert response.status_code == fault.code
    assert {name: response.headers[name] for name in headers} == headers
    assert response.content == body if body is not None else response.content
    assert esp.ledger == []


def test_garbage_200_is_accepted_and_no_json(esp: LocalEsp) -> None:
    esp.script(Garbage200(), Garbage200(accepted=False))
    with Client(esp) as client:
        for _ in range(2):
            ask(client)
            assert client.receive_answer() == (200, b"<html>OK</html>")
    assert len(esp.ledger) == 1


@pytest.mark.parametrize(
    ("fault", "status", "accepted"),
    [
        pytest.param(HalfBody(), 200, True, id="HalfBody"),
        pytest.param(HalfBody(accepted=False), 500, False, id="HalfBody not accepted"),
        pytest.param(HalfBody(status=503, accepted=False), 503, False, id="HalfBody of a 503"),
        pytest.param(HalfBody(status=500), 500, True, id="HalfBody of a 500, accepted"),
        pytest.param(StallInBody(), 200, True, id="StallInBody"),
    ],
)
def test_body_is_cut_short_of_its_length(esp: LocalEsp, fault: Fault, status: int, accepted: bool) -> None:
    esp.script(fault)
    with Client(esp) as client:
        ask(client)
        data = client.receive()
        if isinstance(fault, StallInBody):
            esp.wait_for(stalled=1)
        else:
            data += client.receive_all()
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        promised = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
        assert len(body) == promised // 2
    assert len(esp.ledger) == accepted
    assert esp.requests[0].status == status


def test_released_body_is_whole(esp: LocalEsp) -> None:
    esp.script(StallInBody())
    with Client(esp) as client:
        ask(client)
        esp.wait_for(stalled=1)
        esp.release()
        assert client.receive_answer()[0] == 200


@pytest.mark.parametrize("name", ["sendgrid", "mailersend"])
def test_answer_without_a_body_is_given_one_to_cut(local_esp: Callable[..., LocalEsp], name: str) -> None:
    esp = local_esp(name, tls=False)
    esp.script(HalfBody())
    body = {"sendgrid": {"personalizations": []}, "mailersend": {"to": []}}[name]
    path = {"sendgrid": "mail/send", "mailersend": "email"}[name]
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.post(esp.url + path, json=body, timeout=30)
    assert len(esp.ledger) == 1


@pytest.mark.parametrize(
    ("fault", "method"),
    [pytest.param(Redirect(302), "GET", id="302"), pytest.param(Redirect(307), "POST", id="307")],
)
def test_redirect_leads_back_by_default(local_esp: Callable[..., LocalEsp], fault: Redirect, method: str) -> None:
    """And requests turns the POST of a 302 into a GET."""
    esp = local_esp(tls=False)
    esp.script(fault)
    response = requests.post(esp.url + "/messages/send.json", mandrill(), timeout=30)
    assert [request.method for request in esp.requests] == ["POST", method]
    assert esp.requests[0].path == esp.requests[1].path
    assert response.status_code == (200 if method == "POST" else 405)
    assert len(esp.ledger) == (method == "POST")


def test_redirect_leads_where_it_says(local_esp: Callable[..., LocalEsp]) -> None:
    esp, other = local_esp(tls=False), local_esp(tls=False)
    esp.script(Redirect(307, location=other.url + "/messages/send.json"))
    requests.post(esp.url + "/messages/send.json", mandrill(), timeout=30)
    assert (len(esp.ledger), len(other.ledger)) == (0, 1)


# --- a success ---


def test_ok_holds_a_place_in_a_script(esp: LocalEsp) -> None:
    esp.script(Ok(), Status(503), Ok(), Status(502))
    with Client(esp) as client:
        statuses = []
        for _ in range(5):
            ask(client)
            statuses.append(client.receive_answer()[0])
    assert statuses == [200, 503, 200, 502, 200]


def test_latency_is_in_progress_until_released(esp: LocalEsp) -> None:
    esp.script(Latency(None))
    with Client(esp) as client:
        ask(client)
        esp.wait_for(1, stalled=1)
        assert esp.ledger == []
        esp.release()
        assert client.receive_answer()[0] == 200
    assert len(esp.ledger) == 1


def test_slow_success_of_a_client_that_left_is_a_success(esp: LocalEsp) -> None:
    """The ESP does not notice: this is how a read timeout becomes a second mail."""
    esp.script(Latency(None))
    with Client(esp) as client:
        ask(client)
        esp.wait_for(stalled=1)
    assert esp.ledger == []
    esp.release()
    esp.wait_for(accepted=1)


def test_latency_delays_the_answer(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False, latency=0.05)
    esp.script(Latency(0.1), Ok(), Status(503))
    waits = []
    for _ in range(3):
        start = time.monotonic()
        answer(esp)
        waits.append(time.monotonic() - start)
    assert waits[0] >= 0.15
    assert min(waits) >= 0.05
    esp.latency = 0.1
    start = time.monotonic()
    answer(esp)
    assert time.monotonic() - start >= 0.1


def test_close_idle_follows_the_answer(esp: LocalEsp) -> None:
    esp.script(CloseIdle())
    with Client(esp) as client:
        ask(client)
        assert client.receive_answer()[0] == 200
        assert client.receive() == b""
    assert len(esp.ledger) == 1


def test_close_idle_waits_for_its_time(esp: LocalEsp) -> None:
    esp.script(CloseIdle(after=30), CloseIdle(after=0.01))
    with Client(esp) as client:
        for _ in range(2):
            ask(client)
            assert client.receive_answer()[0] == 200
        assert client.receive() == b""
    assert len(esp.ledger) == 2


# --- your own ---


@dataclass(frozen=True)
class Teapot(Fault):
    """A fault as a user writes it."""

    def apply(self, exchange: Exchange) -> None:
        exchange.process()
        exchange.answer(exchange.error(418))


def test_fault_of_your_own(esp: LocalEsp) -> None:
    esp.script(Teapot())
    assert answer(esp) == 418
    assert esp.requests[0].fault == "Teapot()"
    assert len(esp.ledger) == 1


# --- rules ---


FAULT = Status(503)


@pytest.mark.parametrize(
    ("rules", "statuses"),
    [
        pytest.param([], "200 200 200 200 200 200", id="none"),
        pytest.param([Rule(FAULT)], "503 503 503 503 503 503", id="always"),
        pytest.param([FAULT], "503 200 200 200 200 200", id="a bare fault once"),
        pytest.param([FAULT, Status(502)], "503 502 200 200 200 200", id="bare faults in a row"),
        pytest.param([Rule(FAULT, nth=3)], "200 200 503 200 200 200", id="nth"),
        pytest.param([Rule(FAULT, nth=range(2, 4))], "200 503 503 200 200 200", id="several nth"),
        pytest.param([Rule(FAULT, every=3)], "200 200 503 200 200 503", id="every"),
        pytest.param([Rule(FAULT, times=2)], "503 503 200 200 200 200", id="times"),
        pytest.param([Rule(FAULT, every=2, times=2)], "200 503 200 503 200 200", id="every and times"),
        pytest.param(
            [Rule(FAULT, nth=1), Rule(Status(502), nth=2)], "503 502 200 200 200 200", id="numbers are absolute"
        ),
        pytest.param([Rule(FAULT, every=2), Rule(Status(502))], "502 503 502 503 502 503", id="the first rule wins"),
        pytest.param([Rule(FAULT, contains="m-4")], "200 200 200 503 200 200", id="contains"),
        pytest.param([Rule(FAULT, reused=False)], "503 200 200 200 200 200", id="new connections only"),
        pytest.param([Rule(FAULT, reused=True)], "200 503 503 503 503 503", id="kept-alive ones only"),
        pytest.param([Rule(FAULT, when=lambda request: request.number == 5)], "200 200 200 200 503 200", id="when"),
        pytest.param(
            [Rule(FAULT, reused=True, nth=1)], "200 503 200 200 200 200", id="nth of those that fulfil the rest"
        ),
        pytest.param([Rule(FAULT, probability=0.0)], "200 200 200 200 200 200", id="never"),
        pytest.param([Rule(FAULT, probability=1.0)], "503 503 503 503 503 503", id="surely"),
    ],
)
def test_rule_says_when(local_esp: Callable[..., LocalEsp], rules: list[Any], statuses: str) -> None:
    esp = local_esp(tls=False)
    esp.script(*rules)
    got = []
    with Client(esp) as client:
        for number in range(1, 7):
            client.send(mandrill(f"m-{number}"), MANDRILL)
            got.append(str(client.receive_answer()[0]))
    assert " ".join(got) == statuses


def test_probability_is_seeded(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)

    def run(seed: int) -> list[int]:
        esp.script(Rule(FAULT, probability=0.5, seed=seed))
        with Client(esp) as client:
            return [(ask(client), client.receive_answer()[0])[1] for _ in range(40)]

    first = run(1)
    assert run(1) == first
    assert run(2) != first
    assert set(first) == {200, 503}


def test_handshake_faults_count_connections(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=True)
    esp.script(Rule(DropInHandshake(), nth=2), Rule(FAULT, nth=2))
    with Client(esp) as client:
        ask(client)
        assert client.receive_answer()[0] == 200
        with pytest.raises(ssl.SSLError):
            Client(esp)
        ask(client)
        assert client.receive_answer()[0] == 503


@pytest.mark.parametrize("condition", [{"contains": "x"}, {"reused": False}, {"when": bool}], ids=str)
def test_handshake_fault_cannot_ask_for_a_request(condition: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="asks for a request"):
        Rule(StallInHandshake(), **condition)


def test_new_script_replaces_the_old(esp: LocalEsp) -> None:
    esp.script(Rule(FAULT))
    assert answer(esp) == 503
    esp.script()
    assert answer(esp) == 200
