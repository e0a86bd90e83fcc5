"""Sockets: a listener that can go away and come back on its port, and a thread per connection.

Nothing here polls: whatever waits is woken. Every thread and socket is gone when :meth:`Server.close` returns.
"""

from __future__ import annotations

import contextlib
import enum
import selectors
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator

from anymail_retry.testing.wire import Answer, RawRequest, parse_head

#: Connections that the kernel completes ahead of us.
BACKLOG = 1024
#: How long a connect must hang before the backlog counts as full, in seconds.
FULL = 0.25


class ServerClosed(OSError):
    """The server was closed while its thread waited."""


class State(enum.Enum):
    """What a connection is doing; only an idle one may be closed without harm to a request."""

    BUSY = enum.auto()  # in the handshake, or between a request's first byte and its answer
    ANSWERING = enum.auto()
    IDLE = enum.auto()


class Connection:
    """One accepted connection, driven by its own thread; others may only call :meth:`retire`."""

    def __init__(self, server: Server, sock: socket.socket, number: int) -> None:
        self.number = number
        #: Requests read so far.
        self.requests = 0
        #: Whether the connection stays open after the answer.
        self.keep_alive = True
        #: Seconds after which it is closed when idle; None: never.
        self.idle_limit: float | None = None
        self.closed = threading.Event()
        self.thread: threading.Thread | None = None
        self._server = server
        self._sock = sock
        self._state = State.BUSY
        self._buffer = b""
        self._answered = False

    # --- by its own thread ---

    def handshake(self, context: ssl.SSLContext) -> None:
        """Turn to TLS; raises ``OSError``."""
        # Not in one go with the handshake: shut_down() must reach the new socket meanwhile.
        self._sock = context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
        with self._server.changed:
            if self._server.closing.is_set():  # shut_down() may have met neither the old nor the new one
                raise ServerClosed("closed before the handshake")
        self._sock.do_handshake()

    def serve(self, on_request: Callable[[Connection, RawRequest], None]) -> None:
        """Read and handle requests until either side ends it; raises ``OSError``."""
        while self.keep_alive:
            self._become(State.IDLE)
            request = self._read_request()
            if request is None:
                return
            self.requests += 1
            self._answered = False
            if request.headers.get("connection", "").lower() == "close":
                self.keep_alive = False
            on_request(self, request)
            if not self._answered:
                return

    def _become(self, state: State) -> None:
        with self._server.changed:
            self._state = state
            if state is State.IDLE and not self.keep_alive:
                raise ServerClosed("retired")

    def _read_request(self) -> RawRequest | None:
        if not self._buffer:
            if self.idle_limit is not None and not self._readable_within(self.idle_limit):
                return None
            self._buffer = self._sock.recv(65536)
            if not self._buffer:
                return None
        with self._server.changed:
            if not self.keep_alive:
                return None  # closed as idle in this very moment, and to its client it was idle
            self._state = State.BUSY
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            self._buffer += self._receive()
        head, rest = self._buffer[:end], self._buffer[end + 4 :]
        try:
            method, path, _, headers = parse_head(head)
            length = int(headers.get("content-length", 0))
        except ValueError as error:
            raise OSError(f"this is not HTTP: {error}") from error
        parts = [rest]
        missing = length - len(rest)
        while missing > 0:
            parts.append(self._receive())
            missing -= len(parts[-1])
        body = b"".join(parts) if len(parts) > 1 else rest
        self._buffer = body[length:]
        return RawRequest(method, path, headers, head, body[:length])

    def _receive(self) -> bytes:
        more = self._sock.recv(65536)
        if not more:
            raise OSError("the client left in the middle of a request")
        return more

    def _readable_within(self, seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def answer(self, answer: Answer) -> None:
        """Send a whole answer."""
        self._become(State.ANSWERING)
        self._answered = True
        self.write(answer.head(close=not self.keep_alive) + answer.body)

    def write(self, data: bytes) -> None:
        """Send bytes, inside TLS where there is TLS."""
        self._sock.sendall(data)

    def write_beneath_tls(self, data: bytes) -> None:
        """Send bytes as they are."""
        socket.socket.sendall(self._sock, data)

    def discard_input(self) -> bool:
        """Take the client's next bytes off the wire unread, so that a close is a FIN; False: the client has left."""
        try:
            return bool(socket.socket.recv(self._sock, 65536))
        except OSError:  # by a RST
            return False

    def stall(self) -> bool:
        """Wait in silence. True: released; False: the client has left, or the server closes."""
        waker, woken = socket.socketpair()
        with waker, woken, selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            with self._server.stalling(waker):
                while True:
                    ready = {key.fileobj for key, _ in selector.select()}
                    # What has come is taken off the wire first, or a close would be a RST.
                    if self._sock in ready and not self.discard_input():
                        return False
                    if woken in ready:
                        return not self._server.closing.is_set()

    def reset(self) -> None:
        """Close with a RST."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Close."""
        self.keep_alive = False
        self._sock.close()

    # --- by others, under the server's lock ---

    def retire(self, states: set[State]) -> State | None:
        """Close the connection if it is in one of these states: at once if idle, else after its answer.

        :returns: the state it was in; None: in none of them.
        """
        if self._state not in states:
            return None
        self.keep_alive = False
        if self._state is State.IDLE:
            self.shut_down()
        return self._state

    def shut_down(self) -> None:
        """Send a FIN and wake the connection's thread."""
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:  # the client was first
            pass


class Server:
    """Accepts connections and hands requests over.

    :param changed: the lock of all shared state; notified of every change that someone may wait for.
    :param on_connect: before a connection's handshake; False ends the connection.
    :param on_request: handles one request, in the connection's thread.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        changed: threading.Condition,
        on_connect: Callable[[Connection], bool],
        on_request: Callable[[Connection, RawRequest], None],
    ) -> None:
        self.changed = changed
        #: Set for good when the server closes.
        self.closing = threading.Event()
        #: Connections accepted so far.
        self.accepted = 0
        self._address = (host, port)
        self._context = context
        self._on_connect = on_connect
        self._on_request = on_request
        self._connections: set[Connection] = set()
        self._threads: list[threading.Thread] = []
        self._stalls: set[socket.socket] = set()
        self._waiting_for_release = 0
        self._releases = 0
        self._switch = threading.RLock()  # listening or not; taken before `changed`
        self._bound: socket.socket | None = None  # holds the port, listening or not
        self._acceptor: threading.Thread | None = None
        self._waker: socket.socket | None = None
        self._hole: list[socket.socket] = []

    @property
    def port(self) -> int:
        """The port, once it has listened."""
        return self._address[1]

    # --- listening ---

    def start_listening(self) -> None:
        """Accept connections. Does nothing if it does, or if the server is closed."""
        with self._switch:
            if self._acceptor is not None or self.closing.is_set():
                return
            if self._hole:
                self._let_go()
            listener = self._bound or self._bind()
            listener.listen(BACKLOG)
            listener.setblocking(False)
            self._waker, woken = socket.socketpair()
            self._acceptor = threading.Thread(
                target=self._accept, args=(listener, woken), name=f"local-esp:{self.port}", daemon=True
            )
            self._acceptor.start()

    def stop_listening(self) -> None:
        """Refuse connections; close those that are idle now, the others after their answer."""
        with self._switch:
            if self._acceptor is None:
                return
            assert self._waker is not None
            self._waker.close()
            self._acceptor.join()
            self._waker = self._acceptor = None
            self._let_go()
            # Bound but not listening, the port refuses, and the kernel gives it to nobody else.
            if not self.closing.is_set():
                self._bind()
        self._retire(set(State))

    def black_hole(self) -> None:
        """Let connects hang until they time out: a full backlog, in which the kernel drops what comes.

        Ends with :meth:`start_listening`. Raises ``OSError`` where the kernel does otherwise.
        """
        self.stop_listening()
        with self._switch:
            if self._bound is None or self._hole:
                return
            self._bound.listen(0)
            for _ in range(64):
                filler = socket.socket(self._bound.family)
                self._hole.append(filler)
                filler.settimeout(FULL)
                try:
                    filler.connect(self._bound.getsockname())
                except TimeoutError:
                    return
            self._let_go()
            self._bind()
            raise OSError("this kernel does not drop connects to a full backlog")

    def _bind(self) -> socket.socket:
        host = self._address[0]
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            # Connections of before may linger in TIME_WAIT.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(self._address)
        except OSError:
            sock.close()
            raise
        self._address = (host, sock.getsockname()[1])
        self._bound = sock
        return sock

    def _let_go(self) -> None:
        for sock in self._hole:
            sock.close()
        self._hole.clear()
        if self._bound is not None:
            self._bound.close()
            self._bound = None

    def _accept(self, listener: socket.socket, woken: socket.socket) -> None:
        with woken, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while woken not in {key.fileobj for key, _ in selector.select()}:
                try:
                    sock, _ = listener.accept()
                except OSError:  # the client was gone before
                    continue
                sock.setblocking(True)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._start(sock)

    # --- connections ---

    def _start(self, sock: socket.socket) -> None:
        with self.changed:
            self.accepted += 1
            connection = Connection(self, sock, self.accepted)
            self._connections.add(connection)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            thread = threading.Thread(
                target=self._run,
                args=(connection,),
                name=f"local-esp:{self.port}/{connection.number}",
                daemon=True,
            )
            connection.thread = thread
            thread.start()
            self._threads.append(thread)
            self.changed.notify_all()

    def _run(self, connection: Connection) -> None:
        try:
            if self._on_connect(connection):
                if self._context is not None:
                    connection.handshake(self._context)
                connection.serve(self._on_request)
        except OSError:  # the client has left, or the server closes
            pass
        finally:
            connection.close()
            with self.changed:
                self._connections.discard(connection)
                self.changed.notify_all()
            connection.closed.set()

    @property
    def open_connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    def close_idle_connections(self) -> int:
        """Close every kept-alive connection that waits for a request; how many it were.

        When it returns the FINs are sent. A connection whose client has its answer counts as waiting.
        """
        return self._retire({State.IDLE, State.ANSWERING})

    def _retire(self, states: set[State]) -> int:
        with self.changed:
            retired = [(connection, state) for connection in self._connections if (state := connection.retire(states))]
        for connection, state in retired:
            # One that is busy ends when its request does; its own thread may be the one that asks.
            if state is not State.BUSY and connection.thread is not threading.current_thread():
                connection.closed.wait()
        return len(retired)

    # --- waiting ---

    @property
    def stalled(self) -> int:
        """How many connections and requests wait for :meth:`release`."""
        return len(self._stalls) + self._waiting_for_release

    @contextlib.contextmanager
    def stalling(self, waker: socket.socket) -> Iterator[None]:
        """Context of a stall: in it, :meth:`release` writes to the waker."""
        with self.changed:
            self._stalls.add(waker)
            if self.closing.is_set():  # the last release() has passed
                waker.send(b"!")
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self._stalls.discard(waker)
                self.changed.notify_all()

    def wait_for_release(self) -> None:
        """Wait for :meth:`release`; raises :class:`ServerClosed` when the server closes."""
        with self.changed:
            releases = self._releases
            self._waiting_for_release += 1
            self.changed.notify_all()
            try:
                self.changed.wait_for(lambda: self._releases != releases or self.closing.is_set())
            finally:
                self._waiting_for_release -= 1
        if self.closing.is_set():
            raise ServerClosed("closed while it waited")

    def release(self) -> None:
        """Wake all that stalls now."""
        with self.changed:
            self._releases += 1
            for waker in self._stalls:
                waker.send(b"!")
            self.changed.notify_all()

    def sleep(self, seconds: float) -> None:
        """Wait so long; raises :class:`ServerClosed` when the server closes."""
        if seconds > 0 and self.closing.wait(seconds):
            raise ServerClosed("closed while it waited")

    def close(self) -> None:
        """End everything; returns when all threads have ended and all sockets are closed."""
        self.closing.set()
        self.stop_listening()
        with self._switch:
            self._let_go()
        self.release()
        with self.changed:
            for connection in self._connections:
                connection.shut_down()
            threads = list(self._threads)
        for thread in threads:
            thread.join()
