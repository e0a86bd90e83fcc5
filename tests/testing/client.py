"""A client so close to the wire that a FIN differs from a RST, and a request for it."""

from __future__ import annotations

import json
import socket
import ssl
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anymail_retry.testing import ScriptedEsp

PATIENCE = 30.0  # seconds, for what happens at once unless the machine is busy


class Client:
    """One connection, so close to the wire that a FIN differs from a RST."""

    def __init__(self, esp: ScriptedEsp) -> None:
        self._esp = esp
        sock = socket.create_connection((esp.host, esp.port), timeout=PATIENCE)
        self._sock = sock
        if esp.tls:
            context = ssl.create_default_context(cafile=esp.ca_file)
            try:
                # A FIN without TLS's own good-bye is what a crash looks like: read as the end, as urllib3 does.
                self._sock = context.wrap_socket(sock, server_hostname=esp.host, suppress_ragged_eofs=True)
            except BaseException:
                sock.close()
                raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._sock.close()

    def send(self, body: bytes, path: str, headers: str = "") -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: {self._esp.host}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        self._sock.sendall(head.encode() + body)

    def timeout(self, seconds: float) -> None:
        self._sock.settimeout(seconds)

    def receive(self) -> bytes:
        """The next bytes; empty: a FIN. A RST raises ``ConnectionResetError``."""
        return self._sock.recv(65536)

    def receive_reset(self) -> None:
        """The next thing must be a RST."""
        try:
            data = self.receive()
        except ConnectionResetError:
            return
        # The ssl module of before takes a RST for an end of file (seen with 3.10.13, 3.11.7 and 3.12.1).
        assert data == b""
        assert self._esp.tls
        assert sys.version_info < (3, 13)

    def receive_all(self) -> bytes:
        """What comes until the FIN."""
        parts = []
        while part := self.receive():
            parts.append(part)
        return b"".join(parts)

    def receive_answer(self) -> tuple[int, bytes]:
        """Status and body of one answer, the connection being kept."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += self._more()
        return int(head.split(b" ")[1]), body

    def _more(self) -> bytes:
        data = self.receive()
        if not data:
            raise EOFError("closed before the answer was complete")
        return data


MANDRILL = "/api/1.0/messages/send.json"


def mandrill(marker: str = "m-1", to: str = "to@example.com", key: str = "k") -> bytes:
    """A request body as Mandrill takes it."""
    message = {
        "subject": "Subject",
        "to": [{"email": to, "type": "to"}],
        "headers": {"X-Message-Marker": marker},
    }
    return json.dumps({"key": key, "message": message}).encode()
