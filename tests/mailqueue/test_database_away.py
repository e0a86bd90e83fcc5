"""A database that hangs, refuses connections, or only reads: on real servers, through a proxy where need be."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from anymail.exceptions import AnymailRequestsAPIError
from django.db import connection, connections

from anymail_retry.mailqueue.database import errors_of
from anymail_retry.mailqueue.watchdog import EX_TEMPFAIL
from anymail_retry.models import QueuedMessage
from anymail_retry.testing import LocalEsp, Rule, Status
from anymail_retry.testing.pytest import local_esp
from tests.sites import Site, message, site, words

from .engine import PATIENCE, in_threads, queue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp", "site"]  # fixtures

pytestmark = pytest.mark.django_db(transaction=True)

LOCMEM = "django.core.mail.backends.locmem.EmailBackend"

PORTS = {"postgresql": "PGPORT", "mysql": "MYSQL_PORT"}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@pytest.fixture
def server() -> tuple[str, int]:
    """Where the tests' database server listens."""
    if connection.vendor not in PORTS:
        pytest.skip(f"{connection.vendor} has no server")
    settings = connection.settings_dict
    return settings["HOST"], int(settings["PORT"])


# --- a connection that broke ---


@pytest.mark.parametrize("messages", [1, 2])
def test_after_a_connection_broke_the_next_message_is_stored(server: tuple[str, int], messages: int) -> None:
    queue("before")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()" if connection.vendor == "postgresql" else "SELECT CONNECTION_ID()")
        (process,) = cursor.fetchone()
    other = connection.copy()
    with contextlib.closing(other), other.cursor() as cursor:
        statement = "SELECT pg_terminate_backend(%s)" if connection.vendor == "postgresql" else "KILL %s"
        cursor.execute(statement, [process])
    with pytest.raises(errors_of("default")):
        queue(*["lost, and said so"] * messages)
    queue("after")
    assert list(QueuedMessage.objects.order_by("id").values_list("subject", flat=True)) == ["before", "after"]


# --- a database that hangs ---


class Proxy(threading.Thread):
    """Forwards to a server, until it is to be a black hole: it still accepts then, and reads and answers nothing."""

    def __init__(self, server: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.is_silent = False
        self.is_over = False
        self.connections = 0
        self.sockets: list[socket.socket] = []
        self.peers: dict[socket.socket, socket.socket] = {}

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.listener, selectors.EVENT_READ)
            while not self.is_over:
                for key, _ in selector.select(timeout=0.05):
                    if key.fileobj is self.listener:
                        self._accept(selector)
                    elif not self.is_silent:
                        self._forward(selector, key.fileobj)  # type: ignore[arg-type]  # a socket, as all of them
                if self.is_silent:
                    time.sleep(0.05)  # what is not read stays readable

    def _accept(self, selector: selectors.BaseSelector) -> None:
        client, _ = self.listener.accept()
        self.connections += 1
        self.sockets.append(client)
        if not self.is_silent:
            server = socket.create_connection(self.server)
            self.sockets.append(server)
            self.peers.update({client: server, server: client})
            for one in (client, server):
                selector.register(one, selectors.EVENT_READ)

    def _forward(self, selector: selectors.BaseSelector, source: socket.socket) -> None:
        if source.fileno() < 0:
            return  # closed a moment ago, with its peer
        try:
            data = source.recv(65536)
            self.peers[source].sendall(data)
        except OSError:
            data = b""
        if not data:
            for one in (source, self.peers[source]):
                with contextlib.suppress(KeyError):
                    selector.unregister(one)
                one.close()

    def close(self) -> None:
        self.is_over = True
        self.join(PATIENCE)
        for one in (self.listener, *self.sockets):
            one.close()


@pytest.fixture
def proxy(server: tuple[str, int]) -> Iterator[Proxy]:
    made = Proxy(server)
    made.start()
    yield made
    made.close()


@pytest.fixture
def start(process_env: Mapping[str, str], proxy: Proxy) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a worker whose way to the database is the proxy, and whose lease is short."""
    made: list[subprocess.Popen[str]] = []

    def started(command: str, *args: str) -> subprocess.Popen[str]:
        env = {
            **process_env,
            "DJANGO_SETTINGS_MODULE": "tests.mailqueue.worker_settings",
            "TEST_ANYMAIL": "{}",
            "TEST_QUEUE": json.dumps({"LEASE": 1.5, "SEND_MAX": 1, "POLL": 0.1}),
            PORTS[connection.vendor]: str(proxy.port),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "django", command, *args],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        made.append(process)
        return process

    yield started
    for process in made:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_process_whose_database_hangs_ends_to_be_started_anew(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy
) -> None:
    """Nothing else would end it: the connection gives no answer, and no error."""
    queue("a", mailer=LOCMEM)
    process = start("runmailer")
    until(lambda: QueuedMessage.objects.filter(state="sent").count() == 1)
    assert process.poll() is None
    proxy.is_silent = True
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == EX_TEMPFAIL == 75, out
    assert "the database has not answered for 3 s; this worker ends" in out


def test_drain_whose_database_hangs_ends_too(start: Callable[..., subprocess.Popen[str]], proxy: Proxy) -> None:
    """Cron would start one after the other, and all would hang."""
    queue(*map(str, range(2000)), mailer=LOCMEM)
    process = start("send_mail", "-v0", "--threads=1")
    until(lambda: QueuedMessage.objects.filter(state="sent").exists())
    proxy.is_silent = True
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == EX_TEMPFAIL, out


# --- a database that does not take what could not be sent ---


@pytest.fixture
def down(local_esp: Callable[..., LocalEsp], settings: SettingsWrapper, site: Site) -> LocalEsp:
    """An ESP that answers 503."""
    settings.EMAIL_TOTAL_RETRIES = 0
    esp = local_esp("mandrill")
    esp.script(*[Rule(Status(503))] * 9)
    site.esp(esp)
    return esp


def fail_to_send() -> AnymailRequestsAPIError:
    """Send a message, over a new connection to the database; the ESP's error, which says that nothing was kept."""
    with pytest.raises(AnymailRequestsAPIError) as caught:
        message().send()
    assert caught.value.status_code == 503
    assert "not kept in the queue" in words(caught.value)
    return caught.value


def test_server_that_refuses_connections_brings_the_esps_error(
    server: tuple[str, int], down: LocalEsp, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with monkeypatch.context() as patch:
        patch.setitem(connections.settings["default"], "PORT", str(port))
        (error,) = in_threads(fail_to_send)
    assert "OperationalError" in words(error)
    assert str(port) in words(error) or "Can't connect" in words(error)
    assert not QueuedMessage.objects.exists()
    assert len(down.requests) == 1


READ_ONLY = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
}


def test_session_that_may_only_read_brings_the_esps_error(server: tuple[str, int], down: LocalEsp) -> None:
    """As on a standby to which a failover has led the site."""

    def send() -> AnymailRequestsAPIError:
        with connection.cursor() as cursor:
            cursor.execute(READ_ONLY[connection.vendor])
        return fail_to_send()

    (error,) = in_threads(send)
    assert "read-only" in words(error).lower() or "READ ONLY" in words(error)
    assert not QueuedMessage.objects.exists()
