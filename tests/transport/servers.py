"""Servers that a local ESP cannot play: a proxy, one that reads late."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def serving(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """Have every connection handled, each in its own thread; gives the port. All is over when this is left."""
    threads: list[threading.Thread] = []
    open_sockets: set[socket.socket] = set()

    def run(sock: socket.socket) -> None:
        try:
            handle(sock)
        except OSError:  # the client has left
            pass
        finally:
            sock.close()

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # closed
                return
            open_sockets.add(sock)
            thread = threading.Thread(target=run, args=(sock,), daemon=True)
            threads.append(thread)
            thread.start()

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the acceptor, which close() alone does not
            acceptor.join()
            for sock in open_sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:  # it was over
                    pass
            for thread in threads:
                thread.join()


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    """A request's head, and what came of its body with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            raise ConnectionError("the client left in the middle of a head")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def read_request(sock: socket.socket) -> bytes:
    """Read one request to its end; its head."""
    head, rest = read_head(sock)
    missing = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(rest)
    while missing > 0:
        more = sock.recv(65536)
        if not more:
            raise ConnectionError("the client left in the middle of a body")
        missing -= len(more)
    return head


class ConnectProxy:
    """A proxy that tunnels, or refuses to.

    :param status: what it answers to CONNECT; anything but 200 refuses.
    :param answer: bytes in place of any answer.
    """

    def __init__(self, status: int = 200, answer: bytes | None = None) -> None:
        self.status = status
        self.answer = answer
        #: The heads of the CONNECTs so far.
        self.connects: list[bytes] = []

    def __call__(self, client: socket.socket) -> None:
        head, _ = read_head(client)
        self.connects.append(head)
        if self.answer is not None or self.status != 200:
            client.sendall(self.answer or f"HTTP/1.1 {self.status} No\r\nContent-Length: 0\r\n\r\n".encode())
            return
        host, _, port = head.split(b" ")[1].decode().rpartition(":")
        with socket.create_connection((host, int(port))) as server:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            tunnel(client, server)


def forward_proxy(client: socket.socket) -> None:
    """A proxy for plain HTTP: takes the first request on a connection, and passes it on."""
    head, rest = read_head(client)
    method, url, line = head.split(b" ", 2)
    host, _, path = url.removeprefix(b"http://").partition(b"/")
    name, _, port = host.decode().rpartition(":")
    with socket.create_connection((name, int(port))) as server:
        server.sendall(b"%b /%b %b\r\n\r\n%b" % (method, path, line, rest))
        tunnel(client, server)


def tunnel(client: socket.socket, server: socket.socket) -> None:
    """Pass on bytes until either side ends, and that it ended with a reset."""
    other = {client: server, server: client}
    with selectors.DefaultSelector() as selector:
        for sock in other:
            selector.register(sock, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                try:
                    data = key.fileobj.recv(65536)
                except ConnectionResetError:
                    other[key.fileobj].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                if not data:
                    return
                other[key.fileobj].sendall(data)
