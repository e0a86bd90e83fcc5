"""Connections outlive sessions, and nobody gets one that was not made for them."""

from __future__ import annotations

import io
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import trustme
from requests import exceptions

from anymail_retry import close_connections
from anymail_retry.delivery import Delivery, deliver
from anymail_retry.testing import (
    AcceptThenDrop,
    Fault,
    HalfBody,
    Latency,
    LocalEsp,
    ScriptedEsp,
    SpawnedEsp,
    Stall,
    Status,
)
from anymail_retry.testing.certificate import Authority, authority
from anymail_retry.transport import pools
from anymail_retry.verdict import Phase, Verdict

from .mail import Plain, Retrying, backend, failure, message, network_error, send
from .servers import ConnectProxy, serving, tunnel

if TYPE_CHECKING:
    from collections.abc import Callable


#: As in pyproject.toml: the legacy half of the matrix on Django 6.1.
LEGACY_MAIL = ("-W", "ignore:The EMAIL_BACKEND setting is deprecated:PendingDeprecationWarning")


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what happens in another thread or process."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited 30 s"
        time.sleep(0.01)


def connections(esp: ScriptedEsp) -> list[int]:
    """The connection of each request, in order."""
    return [request.connection for request in esp.requests]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time by which connections idle."""
    time = [1000.0]
    monkeypatch.setattr(pools, "monotonic", lambda: time[0])
    return time


# --- On the wire ---


@pytest.mark.parametrize(
    ("body", "framing", "end"),
    [
        pytest.param(lambda: b"of bytes", b"Content-Length: 8", b"\r\n\r\nof bytes", id="bytes"),
        pytest.param(lambda: "of text", b"Content-Length: 7", b"\r\n\r\nof text", id="text"),
        pytest.param(lambda: b"." * 100_000, b"Content-Length: 100000", b"\r\n\r\n" + b"." * 100_000, id="many bytes"),
        pytest.param(lambda: None, b"Content-Length: 0", b"\r\n\r\n", id="none"),
        pytest.param(lambda: io.BytesIO(b"of a file"), b"Content-Length: 9", b"\r\n\r\nof a file", id="a file"),
        pytest.param(lambda: memoryview(b"of a view"), b"Content-Length: 9", b"\r\n\r\nof a view", id="a view"),
        pytest.param(
            lambda: iter([b"in", b"two"]), b"chunked", b"\r\n\r\n2\r\nin\r\n3\r\ntwo\r\n0\r\n\r\n", id="an iterator"
        ),
    ],
)
def test_whatever_is_sent_arrives_whole(esp: LocalEsp, body: Callable[[], Any], framing: bytes, end: bytes) -> None:
    wire: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        while not b"".join(wire).endswith(end):
            wire.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")

    with serving(answer) as port, backend(esp).create_session() as session:
        assert session.post(f"http://127.0.0.1:{port}/", data=body(), timeout=30).status_code == 204
    assert framing in b"".join(wire)
    if framing in (b"Content-Length: 8", b"Content-Length: 7"):
        assert len(wire) == 1  # in one piece: the head does not travel by itself


# --- Kept open ---


@pytest.mark.parametrize("tls", [True, False], ids=["https", "http"])
def test_many_sends_are_one_connection(local_esp: Callable[..., LocalEsp], tls: bool) -> None:
    """Each of Django's ``send_mail()`` makes a new back end, and so a new session."""
    esp = local_esp("mandrill", tls=tls)
    for _ in range(5):
        send(backend(esp))
    assert connections(esp) == [1, 1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore::anymail.exceptions.AnymailNotSupportedWarning")  # SendGrid
@pytest.mark.parametrize("name", ["sendgrid", "mailersend"])
def test_an_answer_without_a_body_gives_its_connection_back(
    local_esp: Callable[..., LocalEsp], settings: Any, name: str
) -> None:
    from django.utils.module_loading import import_string

    settings.EMAIL_FALLBACK_QUEUE = False
    esp = local_esp(name)
    for _ in range(3):
        send(import_string(f"anymail_retry.backends.{name}.EmailBackend")(**esp.options()))
    assert connections(esp) == [1, 1, 1]


def test_closing_a_session_closes_no_connection(esp: LocalEsp) -> None:
    session = backend(esp).create_session()
    session.post(esp.url)
    session.close()
    with backend(esp).create_session() as another:
        another.post(esp.url)
    assert connections(esp) == [1, 1]


def test_policies_and_accounts_share_connections(esp: LocalEsp) -> None:
    """A connection knows no key and no policy: both are the request's."""
    send(backend(esp, total_retries=0))
    send(Retrying(**{**esp.options(), "api_key": "another"}))
    assert connections(esp) == [1, 1]


def test_tries_share_a_connection(esp: LocalEsp) -> None:
    esp.script(Status(429), Status(429))
    send(backend(esp, retry_backoff_factor=0, retry_backoff_jitter=0))
    assert connections(esp) == [1, 1, 1]


def test_a_connection_is_not_used_again_after_an_answer_that_broke_off(esp: LocalEsp) -> None:
    esp.script(HalfBody(status=429, accepted=False))
    send(backend(esp, retry_backoff_factor=0, retry_backoff_jitter=0))
    assert connections(esp) == [1, 2]


# --- Until they idle too long ---


def test_a_connection_that_idled_too_long_is_replaced_before_use(esp: LocalEsp, now: list[float]) -> None:
    """A server closes it at some time, and a request sent into that may or may not have been taken."""
    send(backend(esp))
    now[0] += 15
    send(backend(esp))
    now[0] += 15.001
    send(backend(esp))
    assert connections(esp) == [1, 1, 2]
    eventually(lambda: esp.counts.open_connections == 1)


def test_the_idle_limit_is_a_setting(esp: LocalEsp, now: list[float]) -> None:
    for _ in range(2):
        send(backend(esp, connection_max_idle=60))
        now[0] += 60
    send(backend(esp, connection_max_idle=60))
    assert connections(esp) == [1, 1, 1]


def test_an_esp_that_closes_sooner_has_a_lower_limit(esp: LocalEsp, now: list[float]) -> None:
    class Impatient(Retrying):
        connection_max_idle = 4.0

    for _ in range(2):
        send(Impatient(**esp.options()))
        now[0] += 4.001
    send(Impatient(**esp.options(), connection_max_idle=60))
    assert connections(esp) == [1, 2, 3]


def test_a_connection_that_the_esp_closed_is_replaced_before_use(esp: LocalEsp) -> None:
    send(backend(esp))
    assert esp.close_idle_connections() == 1
    sent = send(backend(esp))
    assert connections(esp) == [1, 2]
    assert len(sent.retry_history) == 1


def test_a_limit_of_0_is_a_connection_for_each_session(esp: LocalEsp) -> None:
    """As requests has it."""
    kept = [send(backend(esp, connection_max_idle=0)) for _ in range(3)]
    assert connections(esp) == [1, 2, 3]
    eventually(lambda: esp.counts.open_connections == 0)
    assert backend(esp, connection_max_idle=0).send_messages([message(), message()]) == 2
    assert connections(esp) == [1, 2, 3, 4, 4]
    assert all(sent.anymail_status.esp_response for sent in kept)


def test_with_a_limit_of_0_none_is_taken_from_the_shared_ones(esp: LocalEsp) -> None:
    send(backend(esp))
    send(backend(esp, connection_max_idle=0))
    send(backend(esp))
    assert connections(esp) == [1, 2, 1]


# --- Until they are closed ---


def test_close_connections_closes_what_is_idle(esp: LocalEsp) -> None:
    sent = send(backend(esp))
    close_connections()
    eventually(lambda: esp.counts.open_connections == 0)
    send(backend(esp))
    assert connections(esp) == [1, 2]
    assert sent.anymail_status.esp_response is not None  # it holds on to urllib3's pool, and so to what is in it


def test_close_connections_leaves_a_request_alone_that_is_under_way(esp: LocalEsp) -> None:
    esp.script(Latency())
    with ThreadPoolExecutor() as threads:
        sending = threads.submit(send, backend(esp))
        esp.wait_for(stalled=1)
        close_connections()
        esp.release()
        assert sending.result().anymail_status.status == {"sent"}


def test_other_threads_may_send_while_connections_are_closed(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp("mandrill")
    done = threading.Event()

    def close_again_and_again() -> None:
        while not done.is_set():
            close_connections()

    with ThreadPoolExecutor() as threads:
        threads.submit(close_again_and_again)
        try:
            sent = list(threads.map(lambda _: send(backend(esp)), range(100)))
        finally:
            done.set()
    assert len(sent) == esp.counts.accepted == 100


# --- Processes ---


def test_a_forked_child_has_connections_of_its_own(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp("mandrill")
    process = subprocess.run(
        [sys.executable, "-W", "error", *LEGACY_MAIL, "-m", "tests.transport.forking", esp.url],
        env={**os.environ, **esp.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, b"")
    whose = [(accepted.subject, connection) for accepted, connection in zip(esp.ledger, connections(esp), strict=True)]
    assert whose == [("parent", 1), ("child", 2), ("child", 2), ("child", 3), *[("parent", 1)] * 5]


# --- Threads ---


def test_many_threads(spawned_esp: Callable[..., SpawnedEsp], caplog: pytest.LogCaptureFixture) -> None:
    esp = spawned_esp("mandrill", keep_bodies=False)

    def forty(_: int) -> int:
        return sum(backend(esp).send_messages([message()]) for _ in range(40))

    with ThreadPoolExecutor(32) as threads:
        assert sum(threads.map(forty, range(32))) == 32 * 40
    assert esp.counts.accepted == 32 * 40
    assert esp.counts.connections <= 32
    assert caplog.records == []


def test_more_threads_than_sockets_wait_for_one(
    spawned_esp: Callable[..., SpawnedEsp], caplog: pytest.LogCaptureFixture
) -> None:
    esp = spawned_esp("mandrill", latency=0.05, keep_bodies=False)
    with ThreadPoolExecutor(100) as threads:
        assert sum(threads.map(lambda _: backend(esp).send_messages([message()]), range(300))) == 300
    assert esp.counts.connections <= pools.MAX_SOCKETS == 64
    assert caplog.records == []


@pytest.fixture
def one_socket(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a back end that shares one socket with others of the kind."""
    monkeypatch.setattr(pools, "MAX_SOCKETS", 1)
    return {"connection_max_idle": 12.34}  # nobody else's, so that the pool is a new one


def test_a_socket_that_stays_busy_is_waited_for_no_longer_than_the_deadline(
    esp: LocalEsp, one_socket: dict[str, Any]
) -> None:
    esp.script(Stall())
    with ThreadPoolExecutor() as threads:
        stalled = threads.submit(failure, backend(esp, **one_socket, requests_timeout=600))
        esp.wait_for(stalled=1)
        outcome = backend(esp, **one_socket, retry_deadline=1.2).deliver(message(), Delivery())
        esp.release()
        stalled.result()
    assert isinstance(outcome.error, exceptions.ConnectTimeout)
    assert outcome.verdict is Verdict.REFUSED, "nothing was sent"
    assert len(esp.requests) == 1


def test_a_socket_that_gets_free_is_used(esp: LocalEsp, one_socket: dict[str, Any]) -> None:
    esp.script(Latency())
    with ThreadPoolExecutor() as threads:
        first = threads.submit(send, backend(esp, **one_socket))
        esp.wait_for(stalled=1)
        second = threads.submit(send, backend(esp, **one_socket, requests_timeout=600))
        esp.release()
        first.result(), second.result()
    assert connections(esp) == [1, 1]


# --- Whom they trust ---


class Lax(Retrying):
    """Takes any certificate."""

    verify: Any = False

    def create_session(self) -> requests.Session:
        session = super().create_session()
        session.verify = self.verify
        return session


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
@pytest.mark.parametrize("verify", [False, None, 0, ""])
def test_a_lax_mailer_does_not_make_a_strict_one_lax(
    esp: LocalEsp, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    """By one pool for both, as before requests 2.32.4, and for None in any, the strict one would send over the lax
    one's connection."""
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    monkeypatch.setattr(Lax, "verify", verify)
    send(Lax(**esp.options()))
    assert network_error(backend(esp)) is exceptions.SSLError
    send(Lax(**esp.options()))
    assert network_error(backend(esp)) is exceptions.SSLError
    assert len(esp.requests) == 2
    assert len(set(connections(esp))) == 1


def test_requests_ca_bundle_is_obeyed_at_every_send(esp: LocalEsp, monkeypatch: pytest.MonkeyPatch) -> None:
    send(backend(esp))
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert network_error(backend(esp)) is exceptions.SSLError, "not over the connection that another CA vouched for"
    monkeypatch.setenv("CURL_CA_BUNDLE", esp.ca_file)
    send(backend(esp))
    assert connections(esp) == [1, 1]


def test_a_ca_bundle_of_the_sessions_own(esp: LocalEsp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")

    class Trusting(Retrying):
        def create_session(self) -> requests.Session:
            session = super().create_session()
            session.verify = esp.ca_file
            return session

    send(Trusting(**esp.options()))
    assert network_error(backend(esp)) is exceptions.SSLError


class AsksWho(Authority):
    """Its servers want a certificate of the client's."""

    def server_context(self, host: str) -> ssl.SSLContext:
        context = super().server_context(host)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.file)
        return context


@pytest.fixture
def client_certificate(tmp_path: Path) -> Path:
    ca = trustme.CA.from_pem(authority().certificate, authority().private_key)
    file = tmp_path / "client.pem"
    ca.issue_cert("client@example.com").private_key_and_cert_chain_pem.write_to_path(str(file))
    return file


def test_a_client_certificate_is_its_own_mailers(local_esp: Callable[..., LocalEsp], client_certificate: Path) -> None:
    ours = authority()
    esp = local_esp("mandrill", authority=AsksWho(ours.certificate, ours.private_key, ours.file))

    class Known(Retrying):
        def create_session(self) -> requests.Session:
            session = super().create_session()
            session.cert = str(client_certificate)
            return session

    send(Known(**esp.options()))
    assert issubclass(network_error(backend(esp)), exceptions.ConnectionError), "not over the other's connection"
    send(Known(**esp.options()))
    assert len(esp.requests) == 2
    assert len(set(connections(esp))) == 1


# --- Through a proxy ---


@pytest.fixture
def https_proxy(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda url: monkeypatch.setenv("HTTPS_PROXY", url)


def test_a_tunnel_is_kept_open_too(esp: LocalEsp, https_proxy: Callable[[str], None], now: list[float]) -> None:
    proxy = ConnectProxy()
    with serving(proxy) as port:
        https_proxy(f"http://user:word@127.0.0.1:{port}")
        for _ in range(5):
            send(backend(esp))
        assert len(proxy.connects) == 1
        assert b"Proxy-Authorization: Basic dXNlcjp3b3Jk" in proxy.connects[0]
        now[0] += 15.001
        send(backend(esp))
        assert len(proxy.connects) == 2
        close_connections()
        eventually(lambda: esp.counts.open_connections == 0)


def test_threads_that_meet_a_proxy_for_the_first_time_share_their_tunnels(
    esp: LocalEsp, https_proxy: Callable[[str], None]
) -> None:
    proxy = ConnectProxy()
    start = threading.Barrier(8)

    def first(_: int) -> None:
        start.wait(30)
        send(backend(esp))

    with serving(proxy) as port:
        https_proxy(f"http://127.0.0.1:{port}")
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(first, range(8)))
            assert len(proxy.connects) <= 8
            opened = len(proxy.connects)
            send(backend(esp))
            assert len(proxy.connects) == opened
        close_connections()
        eventually(lambda: esp.counts.open_connections == 0)


def no_proxy_at_all(sock: socket.socket) -> None:
    """Hangs up."""


REFUSALS = {
    "forbidden": ConnectProxy(403),
    "wants a password": ConnectProxy(407),
    "cannot reach the ESP": ConnectProxy(502),
    "answers garbage": ConnectProxy(answer=b"\x00\x00\r\n\r\n"),
    "hangs up": no_proxy_at_all,
}


@pytest.mark.parametrize("proxy", REFUSALS.values(), ids=REFUSALS)
def test_a_proxy_that_opens_no_tunnel_has_surely_sent_nothing(
    esp: LocalEsp, https_proxy: Callable[[str], None], proxy: Any
) -> None:
    with serving(proxy) as port:
        https_proxy(f"http://127.0.0.1:{port}")
        plain = network_error(Plain(**esp.options()))
        assert network_error(backend(esp, total_retries=0)) is plain
        sender = backend(esp, total_retries=2, retry_backoff_factor=0, retry_backoff_jitter=0)
        outcome = sender.deliver(message(), Delivery())
    assert isinstance(outcome.error, plain)
    assert outcome.verdict is Verdict.REFUSED
    assert [attempt.phase for attempt in outcome.attempts] == [Phase.CONNECT] * 3


def test_no_proxy_where_one_should_be_is_a_proxy_error(esp: LocalEsp, https_proxy: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    https_proxy(f"http://127.0.0.1:{port}")
    assert network_error(Plain(**esp.options())) is exceptions.ProxyError
    outcome = backend(esp, total_retries=0).deliver(message(), Delivery())
    assert isinstance(outcome.error, exceptions.ProxyError)
    assert outcome.verdict is Verdict.REFUSED


@pytest.mark.parametrize("fault", [AcceptThenDrop(), AcceptThenDrop(reset=True)], ids=["dropped", "reset"])
def test_plain_anymails_lost_answer_behind_a_proxy_is_ambiguous_too(
    esp: LocalEsp, https_proxy: Callable[[str], None], fault: Fault
) -> None:
    """urllib3 says that it cannot connect to the proxy, of a message that the ESP has."""
    esp.script(fault)
    with serving(ConnectProxy()) as port:
        https_proxy(f"http://127.0.0.1:{port}")
        outcome = deliver(Plain(**esp.options()), message(), Delivery())
    assert isinstance(outcome.error, exceptions.ProxyError)
    assert outcome.verdict is Verdict.AMBIGUOUS
    assert len(esp.ledger) == 1


@pytest.mark.parametrize("proxy", [ConnectProxy(403), ConnectProxy(502)], ids=["forbidden", "cannot reach the ESP"])
def test_plain_anymail_has_surely_sent_nothing_where_a_proxy_opens_no_tunnel(
    esp: LocalEsp, https_proxy: Callable[[str], None], proxy: Any
) -> None:
    with serving(proxy) as port:
        https_proxy(f"http://127.0.0.1:{port}")
        assert deliver(Plain(**esp.options()), message(), Delivery()).verdict is Verdict.REFUSED
    assert deliver(Plain(**esp.options()), message(), Delivery()).verdict is Verdict.REFUSED, "nor where none listens"


def socks_proxy(client: socket.socket) -> None:
    """RFC 1928, CONNECT to an IPv4 address without a password."""
    client.recv(1 + 1 + client.recv(1)[0])
    client.sendall(b"\x05\x00")
    request = client.recv(10)
    with socket.create_connection((socket.inet_ntoa(request[4:8]), int.from_bytes(request[8:10], "big"))) as server:
        client.sendall(b"\x05\x00\x00\x01" + b"\0" * 6)
        tunnel(client, server)


def test_a_socks_proxy(esp: LocalEsp, https_proxy: Callable[[str], None], now: list[float]) -> None:
    with serving(socks_proxy) as port:
        https_proxy(f"socks5://127.0.0.1:{port}")
        for _ in range(3):
            send(backend(esp))
        now[0] += 15.001
        send(backend(esp))
        assert connections(esp) == [1, 1, 1, 2]
        close_connections()
        eventually(lambda: esp.counts.open_connections == 0)
