"""The local ESP: a scripted server with a ledger, in threads of this process."""

from __future__ import annotations

import abc
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from anymail_retry.testing.certificate import Authority, authority
from anymail_retry.testing.esps import PROVIDERS, Provider
from anymail_retry.testing.exchange import Exchange
from anymail_retry.testing.faults import Fault, Rule, Script
from anymail_retry.testing.keys import KeyStore
from anymail_retry.testing.ledger import Accepted, Ledger, Request, find_marker
from anymail_retry.testing.server import Connection, Server

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from anymail_retry.testing.process import SpawnedEsp
    from anymail_retry.testing.wire import Answer, RawRequest

logger = logging.getLogger("anymail_retry.testing")


class Counts(NamedTuple):
    """How much has happened so far, or is the case now."""

    requests: int
    accepted: int
    #: Connections accepted so far.
    connections: int
    #: Connections open now.
    open_connections: int
    #: Connections and requests that wait in silence now.
    stalled: int


def forget(*, connections: bool = False) -> None:
    """Close the circuit breakers of this process, which remember what an ESP did before; and, asked, its idle
    connections."""
    if "anymail_retry.transport" not in sys.modules:  # a process that only serves has none, and need not import it
        return
    from anymail_retry import close_connections, reset_breakers

    reset_breakers()
    if connections:
        close_connections()


class ScriptedEsp(abc.ABC):
    """What a local ESP is to its user, wherever it runs.

    Left by ``with``, it leaves nothing to the test after it: no circuit breaker of this process is open, and no idle
    connection kept.

    :param esp: the name of Anymail's back end module: ``"mandrill"``, ``"unisender_go"``, ... (13 of them).
    :param tls: HTTPS with a certificate of this process's own authority, or plain HTTP.
    :param latency: seconds between the end of a request and its answer.
    :param port: 0: any free one; it stays the same until :meth:`close`.
    :param api_keys: the keys it knows, all others get the ESP's answer to a wrong key; empty: it takes any.
    :param keep_bodies: False: bodies and headers are dropped once handled, for many or large messages.
    """

    def __init__(
        self,
        esp: str = "mandrill",
        *,
        tls: bool = True,
        latency: float = 0.0,
        host: str = "127.0.0.1",
        port: int = 0,
        api_keys: Collection[str] = (),
        keep_bodies: bool = True,
    ) -> None:
        if esp not in PROVIDERS:
            raise ValueError(f"no ESP {esp!r}: one of {', '.join(PROVIDERS)}")
        self.esp = esp
        self.provider: Provider = PROVIDERS[esp]()
        self.tls = tls
        self.host = host
        self.api_keys = tuple(dict.fromkeys(api_keys))
        self._port = port
        self._latency = latency
        self._keep_bodies = keep_bodies

    # --- life ---

    @abc.abstractmethod
    def start(self) -> Self:
        """Start to listen. ``with`` does it."""

    @abc.abstractmethod
    def close(self) -> None:
        """End everything: no thread, socket or process is left."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        forget(connections=True)

    # --- how to reach it ---

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    @property
    def origin(self) -> str:
        """Scheme, host and port: ``https://127.0.0.1:8025``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    @property
    def url(self) -> str:
        """What Anymail wants as this ESP's ``api_url``."""
        return self.origin + self.provider.api_path

    @property
    def ca_file(self) -> str:
        """Path of the CA bundle to trust: ``REQUESTS_CA_BUNDLE``, or requests' ``verify``."""
        return authority().file

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables with which requests trusts it: for ``os.environ`` or a subprocess."""
        return {"REQUESTS_CA_BUNDLE": self.ca_file} if self.tls else {}

    def options(self) -> dict[str, str]:
        """Keyword options for the back end, or ``MAILERS[...]["OPTIONS"]``: URL, API key, what else it requires."""
        options = {"api_url": self.url, **self.provider.credentials}
        if self.api_keys:
            options[next(iter(self.provider.credentials))] = self.api_keys[0]
        return options

    def settings(self) -> dict[str, str]:
        """The same as items of ``settings.ANYMAIL``."""
        prefix = self.provider.name.upper().replace(" ", "_")
        return {f"{prefix}_{name.upper()}": value for name, value in self.options().items()}

    # --- what it does ---

    @property
    @abc.abstractmethod
    def latency(self) -> float:
        """Seconds between the end of a request and its answer; may be set."""

    @latency.setter
    @abc.abstractmethod
    def latency(self, seconds: float) -> None: ...

    @abc.abstractmethod
    def script(self, *rules: Rule | Fault) -> None:
        """Set the rules, in place of those before; none: healthy. See :class:`~anymail_retry.testing.Rule`.

        The first that applies decides. Bare faults meet one request each, in order.

        :raises ValueError: a fault asks for an answer that this ESP does not have.
        """

    @abc.abstractmethod
    def release(self) -> None:
        """Let go all that stalls now."""

    @abc.abstractmethod
    def stop_listening(self) -> None:
        """Die: connections are refused. Idle ones are closed before this returns, busy ones after their answer."""

    @abc.abstractmethod
    def start_listening(self) -> None:
        """Recover, on the same port."""

    @abc.abstractmethod
    def black_hole(self) -> None:
        """Let connects hang until they time out; ended by :meth:`start_listening`.

        :raises OSError: this kernel does otherwise with a full backlog (Linux drops, as needed).
        """

    @abc.abstractmethod
    def close_idle_connections(self) -> int:
        """Close the kept-alive connections on which no request is under way; how many it were."""

    @abc.abstractmethod
    def advance(self, seconds: float) -> None:
        """Move its clock: ``time`` in the ledger, and how long idempotency keys are remembered."""

    @abc.abstractmethod
    def reset(self) -> None:
        """As new: healthy and listening, nothing accepted or requested, no keys known, counts at 0.

        Open connections stay, and connections are numbered on. This process's circuit breakers are closed.
        """

    # --- what it saw; each request is logged too, at DEBUG to "anymail_retry.testing", when it is over ---

    @property
    @abc.abstractmethod
    def ledger(self) -> Ledger:
        """What it accepted, as of now."""

    @property
    @abc.abstractmethod
    def requests(self) -> list[Request]:
        """Every request it read, and what it did with it, as of now."""

    @property
    @abc.abstractmethod
    def counts(self) -> Counts:
        """How much so far; cheaper than the ledger."""

    @abc.abstractmethod
    def wait_for(
        self,
        requests: int = 0,
        *,
        accepted: int = 0,
        connections: int = 0,
        stalled: int = 0,
        timeout: float = 30.0,
    ) -> None:
        """Wait until it has read so many requests in all (and accepted so many, ...).

        :param stalled: so many connections and requests wait in silence at the same time.
        :param timeout: seconds.
        :raises TimeoutError: it has not; says what it has.
        """


class LocalEsp(ScriptedEsp):
    """A local ESP in threads of this process.

    ::

        with LocalEsp("resend") as esp:
            ...  # settings.ANYMAIL = esp.settings(); os.environ.update(esp.environ)
            esp.script(Status(503), AcceptThenDrop())
            ...  # send
            assert esp.ledger.duplicates() == {}

    Where the code under test forks, or shall not share this process's interpreter lock, use :meth:`spawn`.

    :param clock: seconds; what :meth:`~ScriptedEsp.advance` moves is an offset to it.

    Raises ``ImportError`` at :meth:`start` where ``tls`` is wanted and trustme is missing.
    """

    def __init__(
        self,
        esp: str = "mandrill",
        *,
        tls: bool = True,
        latency: float = 0.0,
        host: str = "127.0.0.1",
        port: int = 0,
        api_keys: Collection[str] = (),
        keep_bodies: bool = True,
        clock: Callable[[], float] = time.time,
        authority: Authority | None = None,
    ) -> None:
        super().__init__(
            esp, tls=tls, latency=latency, host=host, port=port, api_keys=api_keys, keep_bodies=keep_bodies
        )
        #: The lock of all that threads share; notified of every change.
        self.changed = threading.Condition()
        self._clock = clock
        self._authority = authority
        self._server: Server | None = None
        self._connections_before = 0
        self._fresh()

    @staticmethod
    def spawn(esp: str = "mandrill", **options: Any) -> SpawnedEsp:
        """The same in a process of its own; options as of :class:`ScriptedEsp`."""
        from anymail_retry.testing.process import SpawnedEsp

        return SpawnedEsp(esp, **options)

    def _fresh(self) -> None:
        self._script = Script()
        self._ledger: list[Accepted] = []
        self._requests: list[Request] = []
        self._ids = 0
        self._offset = 0.0
        self.key_store = KeyStore(self.provider.keys, self.now) if self.provider.keys else None

    # --- life ---

    def start(self) -> Self:
        context = (self._authority or authority()).server_context(self.host) if self.tls else None
        server = Server(self.host, self._port, context, self.changed, self._on_connect, self._on_request)
        self._server = server
        try:
            server.start_listening()
        except OSError:
            self._server = None
            raise
        self._port = server.port
        return self

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    @property
    def _running(self) -> Server:
        if self._server is None:
            raise RuntimeError("this local ESP is not running: use it in `with`, or start() it")
        return self._server

    # --- what it does ---

    @property
    def latency(self) -> float:
        return self._latency

    @latency.setter
    def latency(self, seconds: float) -> None:
        self._latency = seconds

    def script(self, *rules: Rule | Fault) -> None:
        script = Script(rules)
        script.check(self.provider)
        with self.changed:
            self._script = script

    def release(self) -> None:
        self._running.release()

    def stop_listening(self) -> None:
        self._running.stop_listening()

    def start_listening(self) -> None:
        self._running.start_listening()

    def black_hole(self) -> None:
        self._running.black_hole()

    def close_idle_connections(self) -> int:
        return self._running.close_idle_connections()

    def now(self) -> float:
        """The time by its clock, in seconds."""
        return self._clock() + self._offset

    def advance(self, seconds: float) -> None:
        with self.changed:
            self._offset += seconds

    def reset(self) -> None:
        server = self._running
        server.release()
        with self.changed:
            self._connections_before = server.accepted
            self._fresh()
        server.start_listening()
        forget()

    # --- in the connections' threads ---

    def _on_connect(self, connection: Connection) -> bool:
        with self.changed:
            fault = self._script.for_connection()
        if fault is not None:
            fault.meet(connection)
        return fault is None

    def _on_request(self, connection: Connection, raw: RawRequest) -> None:
        request = Request(
            0, 0.0, connection.number, connection.requests, raw.method, raw.path, raw.headers, raw.head, raw.body
        )
        exchange = Exchange(self, self._running, connection, request)
        with self.changed:
            self._requests.append(request)
            request.number = len(self._requests)
            request.time = self.now()
            fault = self._script.for_request(request)
            request.fault = None if fault is None else repr(fault)
            self.changed.notify_all()
        try:
            if fault is None:
                exchange.answer(exchange.process())
            else:
                fault.apply(exchange)
        finally:
            if not self._keep_bodies:
                request.head = request.body = b""
                request.headers = {}
            logger.debug("%s", request)

    def knows_api_key(self, api_key: str | None) -> bool:
        """Whether requests with this key are served."""
        return not self.api_keys or api_key in self.api_keys

    def accept(self, request: Request, endpoint: str, data: Any) -> Answer:
        """Take a request into the ledger; the ESP's answer to it. Raises what a malformed body makes it raise."""
        with self.changed:
            taken = self.provider.take(endpoint, data, self._new_id)
            accepted = Accepted(
                number=len(self._ledger) + 1,
                time=self.now(),
                esp=self.provider.name,
                recipients=tuple(taken.recipients),
                subject=taken.subject,
                marker=find_marker(data, taken.subject, request.body),
                idempotency_key=request.idempotency_key,
                api_key=request.api_key,
                message_ids=tuple(taken.message_ids),
                request=request.number,
                body=request.body if self._keep_bodies else b"",
            )
            self._ledger.append(accepted)
            request.accepted = accepted.number
            self.changed.notify_all()
        return taken.answer

    def _new_id(self) -> uuid.UUID:
        self._ids += 1
        return uuid.UUID(int=self._ids)

    # --- what it saw ---

    @property
    def ledger(self) -> Ledger:
        return self.ledger_from(0)

    def ledger_from(self, start: int) -> Ledger:
        """What it accepted after the first so many."""
        with self.changed:
            return Ledger(self._ledger[start:])

    @property
    def requests(self) -> list[Request]:
        with self.changed:
            return list(self._requests)

    @property
    def counts(self) -> Counts:
        server = self._running
        with self.changed:
            return Counts(
                requests=len(self._requests),
                accepted=len(self._ledger),
                connections=server.accepted - self._connections_before,
                open_connections=server.open_connections,
                stalled=server.stalled,
            )

    def wait_for(
        self,
        requests: int = 0,
        *,
        accepted: int = 0,
        connections: int = 0,
        stalled: int = 0,
        timeout: float = 30.0,
    ) -> None:
        def reached() -> bool:
            now = self.counts
            return (
                now.requests >= requests
                and now.accepted >= accepted
                and now.connections >= connections
                and now.stalled >= stalled
            )

        with self.changed:
            if not self.changed.wait_for(reached, timeout):
                raise TimeoutError(
                    f"waited {timeout} s for {requests=} {accepted=} {connections=} {stalled=}: {self.counts}"
                )
