"""The local ESP as a server: its port, its connections, its log, many clients at once."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import requests

from anymail_retry.testing import (
    ESPS,
    AcceptThenDrop,
    Garbage200,
    LocalEsp,
    Rule,
    Stall,
    Status,
)

from .client import MANDRILL, Client, mandrill

if TYPE_CHECKING:
    from collections.abc import Callable


def post(esp: LocalEsp, session: requests.Session | None = None, timeout: float = 30) -> requests.Response:
    with requests.Session() as own:
        return (session or own).post(esp.url + "/messages/send.json", mandrill(), timeout=timeout)


# --- listening ---


@pytest.mark.parametrize("tls", [True, False], ids=["https", "http"])
def test_dead_refuses_and_recovered_serves_on_the_same_port(local_esp: Callable[..., LocalEsp], tls: bool) -> None:
    esp = local_esp(tls=tls)
    port = esp.port
    for number in range(1, 4):
        assert post(esp).ok
        esp.stop_listening()
        with pytest.raises(requests.ConnectionError) as caught:
            post(esp)
        assert "refused" in str(caught.value)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):  # the port is kept meanwhile
            other.bind(("127.0.0.1", port))
        esp.start_listening()
        assert len(esp.ledger) == number
    assert post(esp).ok
    assert esp.port == port


def test_listening_switches_may_be_thrown_twice(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)
    esp.start_listening()
    esp.stop_listening()
    esp.stop_listening()
    esp.start_listening()
    assert post(esp).ok


def test_dead_closes_idle_connections_and_lets_busy_ones_finish(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp()
    esp.script(Stall())
    with Client(esp) as busy, Client(esp) as idle:
        busy.send(mandrill(), MANDRILL)
        esp.wait_for(stalled=1)
        idle.send(mandrill(), MANDRILL)
        assert idle.receive_answer()[0] == 200
        esp.stop_listening()
        assert idle.receive() == b""
        assert esp.counts.stalled == 1
        esp.release()
        assert busy.receive() == b""


def test_answer_under_way_when_it_dies_is_the_connections_last(local_esp: Callable[..., LocalEsp]) -> None:
    from anymail_retry.testing import Latency

    esp = local_esp()
    esp.script(Latency(None))
    with Client(esp) as client:
        client.send(mandrill(), MANDRILL)
        esp.wait_for(stalled=1)
        esp.stop_listening()
        esp.release()
        assert client.receive_all().startswith(b"HTTP/1.1 200 OK\r\n")
    assert len(esp.ledger) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels refuse when the backlog is full")
def test_black_hole_lets_connects_time_out(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp()
    for _ in range(2):
        esp.black_hole()
        esp.black_hole()  # no deeper
        with pytest.raises(requests.ConnectTimeout):
            post(esp, timeout=0.2)
        esp.start_listening()
        assert post(esp).ok
    esp.stop_listening()
    esp.black_hole()
    with pytest.raises(requests.ConnectTimeout):
        post(esp, timeout=0.2)


def test_port_may_be_chosen(local_esp: Callable[..., LocalEsp]) -> None:
    with LocalEsp(tls=False) as first:
        port = first.port
    esp = local_esp(tls=False, port=port)
    assert esp.url == f"http://127.0.0.1:{port}/api/1.0"
    with pytest.raises(OSError, match="in use"):
        LocalEsp(tls=False, port=port).start()


def test_ipv6(local_esp: Callable[..., LocalEsp]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    esp = local_esp(host="::1")
    assert esp.url.startswith("https://[::1]:")
    assert post(esp).ok


def test_name_of_the_host_is_in_the_certificate(local_esp: Callable[..., LocalEsp]) -> None:
    assert post(local_esp(host="localhost")).ok


def test_certificate_is_trusted_only_with_the_ca_file(
    local_esp: Callable[..., LocalEsp], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = local_esp(), local_esp("resend")
    assert first.ca_file == second.ca_file  # one bundle for all
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(requests.exceptions.SSLError):
        post(first)
    with requests.Session() as session:
        session.verify = first.ca_file
        assert post(first, session).ok
    assert first.environ == {"REQUESTS_CA_BUNDLE": first.ca_file}
    assert LocalEsp(tls=False).environ == {}


def test_tls_without_trustme_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    with pytest.raises(ImportError, match=r'pip install "django-anymail-retry\[testing\]"'):
        LocalEsp().start()
    with LocalEsp(tls=False) as esp:
        assert post(esp).ok


def test_unknown_esp_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no ESP 'madrill': one of brevo, "):
        LocalEsp("madrill")


def test_esp_that_does_not_run_says_so() -> None:
    esp = LocalEsp()
    with pytest.raises(RuntimeError, match="not running"):
        esp.stop_listening()
    esp.close()


# --- connections ---


def test_kept_alive_connection_is_used_again(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp()
    with requests.Session() as session:
        for _ in range(3):
            post(esp, session)
    post(esp)
    assert [request.connection for request in esp.requests] == [1, 1, 1, 2]
    assert [request.reused for request in esp.requests] == [False, True, True, False]
    assert esp.counts.connections == 2


def test_idle_connections_are_closed_on_demand(local_esp: Callable[..., LocalEsp]) -> None:
    """By the time it returns the client can see it: no request is ever sent into the closed one."""
    esp = local_esp()
    with requests.Session() as session:
        for number in range(1, 31):
            assert post(esp, session).ok
            assert esp.close_idle_connections() == 1
            assert esp.counts.connections == number
            assert esp.counts.open_connections == 0
    assert len(esp.ledger) == 30


def test_busy_connections_are_not_idle(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp()
    esp.script(Stall())
    with Client(esp) as client:
        client.send(mandrill(), MANDRILL)
        esp.wait_for(stalled=1)
        assert esp.close_idle_connections() == 0
        assert esp.counts.open_connections == 1


def test_client_that_asks_for_close_gets_it(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp()
    with Client(esp) as client:
        client.send(mandrill(), MANDRILL, "Connection: close\r\n")
        assert b"\r\nConnection: close\r\n" in client.receive_all()


def test_requests_in_one_segment_are_told_apart(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)
    with socket.create_connection((esp.host, esp.port), timeout=30) as sock:
        one = b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (MANDRILL.encode(), len(mandrill()), mandrill())
        sock.sendall(one * 3)
        esp.wait_for(accepted=3)
    assert [request.body for request in esp.requests] == [mandrill()] * 3


def test_request_in_many_segments_is_put_together(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)
    body = mandrill(marker="m" * 50)
    request = b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (MANDRILL.encode(), len(body), body)
    with socket.create_connection((esp.host, esp.port), timeout=30) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(request), 7):
            sock.sendall(request[start : start + 7])
        esp.wait_for(accepted=1)
    assert esp.requests[0].body == body
    assert esp.ledger[0].marker == "m" * 50


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST",
        b"\x16\x03\x01\x00\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
    ],
    ids=["nothing", "a beginning", "no HTTP", "no length", "no body"],
)
@pytest.mark.parametrize("tls", [True, False], ids=["https", "http"])
def test_client_that_talks_nonsense_harms_nobody(local_esp: Callable[..., LocalEsp], tls: bool, data: bytes) -> None:
    esp = local_esp(tls=tls)
    with socket.create_connection((esp.host, esp.port), timeout=30) as sock:
        sock.sendall(data)
    assert post(esp).ok
    assert len(esp.requests) == 1


def test_many_clients_at_once(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(latency=0.001)
    esp.script(Rule(Status(503), every=5), Rule(AcceptThenDrop(), every=7))

    def run(worker: int) -> list[str]:
        got = []
        with requests.Session() as session:
            for number in range(25):
                marker = f"{worker}-{number}"
                try:
                    response = session.post(esp.origin + MANDRILL, mandrill(marker), timeout=60)
                except requests.ConnectionError:
                    got.append("dropped")
                else:
                    got.append(str(response.status_code))
        return got

    with ThreadPoolExecutor(20) as pool:
        results = [result for got in pool.map(run, range(20)) for result in got]
    assert [request.number for request in esp.requests] == list(range(1, 501))
    assert [accepted.number for accepted in esp.ledger] == list(range(1, len(esp.ledger) + 1))
    refused, dropped = 500 // 5, len([n for n in range(1, 501) if n % 7 == 0 and n % 5])
    assert (results.count("503"), results.count("dropped")) == (refused, dropped)
    assert len(esp.ledger) == 500 - refused
    assert esp.ledger.duplicates() == {}
    ids = [message_id for accepted in esp.ledger for message_id in accepted.message_ids]
    assert len(set(ids)) == len(ids)


# --- what it saw ---


def test_log_has_the_bytes_of_the_wire(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp()
    with Client(esp) as client:
        client.send(mandrill(), MANDRILL + "?q=1", "X-Mixed-Case: Value\r\n")
        client.receive_answer()
    (request,) = esp.requests
    assert (request.method, request.path) == ("POST", MANDRILL + "?q=1")
    assert (
        request.head
        == (
            f"POST {MANDRILL}?q=1 HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(mandrill())}\r\n"
            "X-Mixed-Case: Value"
        ).encode()
    )
    assert request.body == mandrill()
    assert request.headers["x-mixed-case"] == "Value"
    assert request.json()["message"]["subject"] == "Subject"
    assert (request.status, request.accepted, request.fault, request.replayed) == (200, 1, None, False)
    assert str(request) == f"#1 POST {MANDRILL}?q=1: 200, accepted as 1"


def test_log_is_a_copy(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)
    post(esp)
    requests_before, ledger_before = esp.requests, esp.ledger
    post(esp)
    assert (len(requests_before), len(ledger_before)) == (1, 1)
    assert (len(esp.requests), len(esp.ledger)) == (2, 2)


def test_each_request_is_logged_when_it_is_over(
    local_esp: Callable[..., LocalEsp], caplog: pytest.LogCaptureFixture
) -> None:
    esp = local_esp(tls=False)
    esp.script(Garbage200(accepted=False))
    with caplog.at_level(logging.DEBUG, "anymail_retry.testing"):
        post(esp)
        esp.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"#1 POST {MANDRILL}: fault Garbage200(accepted=False, body=b'<html>OK</html>'), 200"
    ]


def test_bodies_need_not_be_kept(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False, keep_bodies=False)
    esp.script(Rule(Status(503), contains="m-2"))
    with Client(esp) as client:
        for marker in ("m-1", "m-2"):
            client.send(mandrill(marker), MANDRILL)
            client.receive_answer()
    esp.close()
    assert [(request.body, request.head, request.headers) for request in esp.requests] == [(b"", b"", {})] * 2
    assert [request.status for request in esp.requests] == [200, 503]
    assert [(accepted.body, accepted.marker) for accepted in esp.ledger] == [(b"", "m-1")]


def test_waiting_for_what_happens(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)
    waiting = threading.Thread(target=esp.wait_for, args=(2,))
    waiting.start()
    post(esp)
    assert waiting.is_alive()
    post(esp)
    waiting.join()
    esp.wait_for(2, accepted=2, connections=2, timeout=0)


def test_waiting_in_vain_says_what_there_is(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)
    post(esp)
    with pytest.raises(TimeoutError, match=r"requests=2 .*Counts\(requests=1, accepted=1, connections=1"):
        esp.wait_for(2, timeout=0.01)


def test_reset_is_as_new(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp("resend", tls=False)
    headers = {"Idempotency-Key": "k"}
    body = {"to": ["to@example.com"]}
    requests.post(esp.url + "emails", json=body, headers=headers, timeout=30)
    esp.script(Rule(Status(503)))
    esp.advance(1000)
    esp.stop_listening()
    esp.reset()
    assert (esp.ledger, esp.requests) == ([], [])
    assert esp.counts == (0, 0, 0, 0, 0)
    assert requests.post(esp.url + "emails", json=body, headers=headers, timeout=30).ok
    assert [accepted.number for accepted in esp.ledger] == [1]
    assert [request.number for request in esp.requests] == [1]
    assert not esp.requests[0].replayed
    assert esp.counts.connections == 1


def test_reset_lets_go_what_stalls(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp(tls=False)
    esp.script(Stall())
    with Client(esp) as client:
        client.send(mandrill(), MANDRILL)
        esp.wait_for(stalled=1)
        esp.reset()
        assert client.receive() == b""


def test_every_back_end_of_anymail_on_requests_is_here() -> None:
    import pkgutil

    import anymail.backends
    from anymail.backends.base_requests import AnymailRequestsBackend
    from django.utils.module_loading import import_string

    own = {"base", "base_requests", "sendinblue"}  # sendinblue is brevo's old name
    names = {module.name for module in pkgutil.iter_modules(anymail.backends.__path__)} - own
    on_requests = {
        name
        for name in names
        if issubclass(import_string(f"anymail.backends.{name}.EmailBackend"), AnymailRequestsBackend)
    }
    assert on_requests == set(ESPS)
