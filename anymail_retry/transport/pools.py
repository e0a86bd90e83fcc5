"""Connection pools that outlive sessions: one set per process.

Plain Anymail makes a session, and so a TLS connection, for every ``send_mail()``. Here sessions come and go over
pools that stay. They are found by process id, so a forked child starts empty and leaves its parent's alone. (urllib3
closes every pool when a process exits, under a lock of the pool's: a child that was forked in the microseconds in which
another thread of its parent held that lock hangs at its exit. That is so for any requests session held open.)

Nothing here takes a lock: one held by another thread at the moment of a fork would stay locked in the child for ever.
"""

from __future__ import annotations

import functools
import os
import queue
import ssl
from dataclasses import dataclass, field
from http.client import HTTPException
from time import monotonic
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    EmptyPoolError,
    MaxRetryError,
    NewConnectionError,
    ProtocolError,
    SSLError,
)

from .timeout import ConnectSeconds, DeadlineTimeout

#: Sockets per host, idle and busy ones together; a thread beyond them waits for one that gets free.
MAX_SOCKETS = 64

#: Hosts whose pools are kept; beyond them the one that was not used for longest is dropped.
MAX_HOSTS = 32

#: Bytes of the largest body that travels with the head of its request: a larger one would be copied for nothing.
LARGEST_JOINED = 64 * 1024


@dataclass
class Pools:
    """The pools for one idle limit."""

    max_idle: float
    manager: urllib3.PoolManager
    #: As requests keeps them: by the proxy's URL.
    proxies: dict[str, Any] = field(default_factory=dict)

    def adopt(self, manager: Any) -> Any:
        """Have a manager that holds no pool yet make its pools of our kind. Returns it."""
        manager.pool_classes_by_scheme = {
            scheme: _pool_class(pool, pool.ConnectionCls, self.max_idle)
            for scheme, pool in manager.pool_classes_by_scheme.items()
        }
        return manager

    def close_idle(self) -> None:
        """Close the connections that carry no request now."""
        for manager in (self.manager, *self.proxies.values()):
            for key in manager.pools.keys():  # noqa: SIM118  # not a dict: it cannot be iterated
                pool = manager.pools.get(key)
                if pool is not None:  # dropped by another thread meanwhile
                    pool.close_idle()


_pools: dict[tuple[Any, ...], Pools] = {}


def shared(max_idle: float) -> Pools:
    """This process's pools for connections that may idle ``max_idle`` seconds."""
    # urllib3's present connection classes are part of the key, so that tools that replace them (vcrpy) are obeyed.
    bases = urllib3.HTTPConnectionPool.ConnectionCls, urllib3.HTTPSConnectionPool.ConnectionCls
    key = (os.getpid(), *bases, max_idle)
    return _pools.get(key) or _pools.setdefault(key, make(max_idle))


def make(max_idle: float) -> Pools:
    """New pools that nobody else uses."""
    pools = Pools(max_idle, urllib3.PoolManager(num_pools=MAX_HOSTS, maxsize=MAX_SOCKETS, block=True))
    pools.adopt(pools.manager)
    return pools


def close_connections() -> None:
    """Close this process's idle connections to all ESPs. Those that carry a request now end as they would have."""
    for (owner, *_), pools in list(_pools.items()):
        if owner == os.getpid():
            pools.close_idle()


@functools.cache
def _pool_class(base: type[urllib3.HTTPConnectionPool], connection: Any, max_idle: float) -> type[Any]:
    """urllib3's pool class for connections of ours."""

    class Pool(base):  # type: ignore[valid-type,misc]  # the base is urllib3's present class, known at run time only
        ConnectionCls = _connection_class(connection, max_idle)

        def urlopen(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
            timeout = kwargs.get("timeout")
            if isinstance(timeout, DeadlineTimeout):
                kwargs["pool_timeout"] = timeout.pool_timeout
            try:
                return super().urlopen(method, url, *args, **kwargs)
            except EmptyPoolError as error:
                # Nothing was sent. As it is, requests would let this one through to a caller who expects its own.
                busy = ConnectTimeoutError(self, f"All {MAX_SOCKETS} connections to {self.host} stayed busy")
                raise MaxRetryError(self, url, busy) from error

        def close_idle(self) -> None:
            """Close the connections that carry no request now."""
            places = 0
            try:
                while self.pool is not None:
                    connection = self.pool.get(block=False)
                    places += 1
                    if connection is not None:
                        connection.close()
            except queue.Empty:
                pass
            for _ in range(places):  # a place without a connection makes a new one when it is next taken
                self.pool.put(None)

    Pool.__name__ = base.__name__  # it stands in messages
    return Pool


@functools.cache
def _connection_class(base: type[HTTPConnection], max_idle: float) -> type[HTTPConnection]:
    """urllib3's connection class, with an idle limit, and with errors that tell before from after the request."""

    class Connection(base):  # type: ignore[valid-type,misc]  # as above
        timeout: float | None
        _last_answer: float | None = None
        #: The head of a request whose body is still to come; empty: that is next; None: there is no request.
        _head: bytes | None = None

        def connect(self) -> None:
            # Whatever fails before this returns was surely not sent. urllib3 takes a dropped or stalled TLS
            # handshake for a read error; a certificate that is not trusted keeps its own error.
            try:
                super().connect()
            except ssl.SSLCertVerificationError:
                raise
            except TimeoutError as error:
                raise ConnectTimeoutError(self, f"No connection to {self.host} in time: {error}") from error
            except (OSError, HTTPException, SSLError) as error:
                raise NewConnectionError(self, f"No connection to {self.host}: {error}") from error
            if self._begin_to_send() and self.sock is not None:
                self.sock.settimeout(self.timeout)

        def request(self, *args: Any, **kwargs: Any) -> None:
            if not self.is_closed:  # else connect() comes first, in the middle of this
                self._begin_to_send()
            self._head = b""
            try:
                super().request(*args, **kwargs)
                head, self._head = self._head, None
                if head:  # there was no body
                    self.send(head)
            finally:
                self._head = None

        def send(self, data: Any) -> None:
            # http.client sends the head of a request by itself. With its body, that is one TLS record and one packet
            # less for every message.
            if self._head == b"":
                self._head = data
                return
            head, self._head = self._head or b"", None
            if isinstance(data, bytes) and len(data) <= LARGEST_JOINED:
                data = head + data
            elif head:
                super().send(head)
            super().send(data)

        def _begin_to_send(self) -> bool:
            if not isinstance(self.timeout, ConnectSeconds):
                return False
            self.timeout = self.timeout.attempt.send_timeout
            return True

        def getresponse(self) -> Any:
            try:
                response = super().getresponse()
            except ConnectionError as error:
                # http.client has closed the connection, and so urllib3 would say that it never reached its proxy.
                raise ProtocolError("Connection aborted.", error) from error
            self._last_answer = monotonic()
            return response

        @property
        def is_connected(self) -> bool:
            # A server closes a connection that idles too long, and a request sent into that is an ambiguous failure.
            idle_since = self._last_answer
            if idle_since is not None and monotonic() - idle_since > max_idle:
                return False
            return bool(super().is_connected)

    Connection.__name__ = base.__name__
    return Connection
