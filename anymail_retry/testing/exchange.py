"""One request and what becomes of it: the primitives that faults are made of."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from anymail_retry.testing.ledger import Request
from anymail_retry.testing.wire import Answer

if TYPE_CHECKING:
    from anymail_retry.testing.local import LocalEsp
    from anymail_retry.testing.server import Connection, Server

# What a body of the wrong shape raises when it is read.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)


class Exchange:
    """One request on its connection."""

    def __init__(self, esp: LocalEsp, server: Server, connection: Connection, request: Request) -> None:
        self.esp = esp
        self.server = server
        self.connection = connection
        self.request = request
        self._keys = esp.key_store
        self._data: Any = None
        self._read_error: Answer | None = None
        self._read()

    def _read(self) -> None:
        request, provider = self.request, self.esp.provider
        path = provider.paths.fullmatch(request.path.partition("?")[0])
        if path is None or request.method != "POST":
            self._read_error = provider.error(404 if path is None else 405)
            return
        self._endpoint = path[1]
        try:
            self._data = provider.parse(request)
            request.api_key = provider.api_key(request, self._data)
            request.idempotency_key = provider.idempotency_key(request, self._data)
        except MALFORMED:
            self._read_error = provider.error(400)

    @property
    def url(self) -> str:
        """The URL that was asked for."""
        return self.esp.origin + self.request.path

    # --- the ESP's own doing ---

    def process(self, latency: float | None = 0.0) -> Answer:
        """What the healthy ESP does with the request, all but sending the answer that is returned.

        It looks at the API key, then at the idempotency key; is in progress for the ESP's latency and for
        ``latency`` seconds (None: until released); and accepts.
        """
        esp, request = self.esp, self.request
        if self._read_error is not None:
            return self._read_error
        if not esp.knows_api_key(request.api_key):
            return esp.provider.wrong_api_key()
        decided = self._begin_key()
        if decided is not None:
            return decided
        answer = None
        try:
            self.delay(latency)
            answer = esp.accept(request, self._endpoint, self._data)
        except MALFORMED:
            return esp.provider.error(400)
        finally:
            self._end_key(answer)
        return answer

    def delay(self, latency: float | None = 0.0) -> None:
        """Be in progress: the ESP's latency and so many seconds more, or until released."""
        self.sleep(self.esp.latency + (latency or 0.0))
        if latency is None:
            self.server.wait_for_release()

    def error(self, status: int, kind: str | None = None) -> Answer:
        """The ESP's own error answer."""
        return self.esp.provider.error(status, kind)

    def use_key(self, answer: Answer) -> None:
        """The idempotency key counts as used, with this answer."""
        if self._begin_key() is None:
            self._end_key(answer)

    def _begin_key(self) -> Answer | None:
        store, request = self._keys, self.request
        if store is None or request.idempotency_key is None:
            return None
        digest = hashlib.sha256(request.body).digest()
        with self.esp.changed:
            decided = store.begin(request.api_key, request.idempotency_key, digest)
            request.replayed = decided is not None and decided.status < 300
        return decided

    def _end_key(self, answer: Answer | None) -> None:
        store, request = self._keys, self.request
        if store is None or request.idempotency_key is None:
            return
        with self.esp.changed:
            if answer is None:
                store.forget(request.api_key, request.idempotency_key)
            else:
                store.finish(request.api_key, request.idempotency_key, answer)

    # --- the wire ---

    def answer(self, answer: Answer) -> None:
        """Send the answer and keep the connection, if the client wants to."""
        self.request.status = answer.status
        self.connection.answer(answer)

    def answer_partly(self, answer: Answer, length: int) -> None:
        """Send the head and the first bytes of the body; the connection will be closed."""
        self.request.status = answer.status
        self.connection.keep_alive = False
        self.connection.write(answer.head(close=True) + answer.body[:length])

    def write(self, data: bytes) -> None:
        """Send bytes, inside TLS where there is TLS."""
        self.connection.write(data)

    def write_beneath_tls(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.connection.write_beneath_tls(data)

    def stall(self) -> bool:
        """Be silent. True: released; False: the client has left."""
        return self.connection.stall()

    def reset(self) -> None:
        """Close with a RST."""
        self.connection.reset()

    def sleep(self, seconds: float) -> None:
        """Wait; ends early, with ``OSError``, when the ESP is closed."""
        self.server.sleep(seconds)
