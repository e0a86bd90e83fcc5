"""A small SMTP server that misbehaves by script, for back ends that no ESP stands behind."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

#: In place of a reply: the connection is closed, or nothing is ever said.
DROP = "drop"
STALL = "stall"

REPLIES = {
    "CONNECT": "220 local.example.com",
    "EHLO": "250-local.example.com\r\n250 AUTH PLAIN",
    "HELO": "250 local.example.com",
    "AUTH": "235 welcome",
    "MAIL": "250 sender",
    "RCPT": "250 recipient",
    "DATA": "354 go on",
    "BODY": "250 taken",
    "RSET": "250 reset",
    "QUIT": "221 bye",
}


@dataclass(frozen=True)
class Taken:
    """One message that the server took."""

    sender: str
    recipients: tuple[str, ...]
    data: bytes
    #: Who had logged in.
    user: str | None

    @property
    def subject(self) -> str:
        (line,) = (line for line in self.data.splitlines() if line.startswith(b"Subject: "))
        return line.removeprefix(b"Subject: ").decode()


class SmtpServer:
    """Takes every message, or does what the script says. ``with`` starts and ends it."""

    def __init__(self) -> None:
        self.ledger: list[Taken] = []
        #: Connections accepted so far.
        self.connections = 0
        self._changed = threading.Condition()
        self._script: dict[str, list[str]] = {}
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_listening()
        with self._changed:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def script(self, **replies: str) -> None:
        """What is said next, and once, after a command (or at ``CONNECT``, and after the ``BODY``); then all is well.

        :data:`DROP` after the body: the message is taken.
        """
        with self._changed:
            self._script = {command: [reply] for command, reply in replies.items()}

    def stop_listening(self) -> None:
        """Refuse connections from now on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()

    def wait_until_nobody_is_connected(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: not self._open, timeout=30), "somebody stays"

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                sock, _ = self._listener.accept()
                with self._changed:
                    self.connections += 1
                    self._open.add(sock)
                self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, sock.makefile("rwb") as stream, contextlib.suppress(OSError):
                self._converse(stream)
        finally:
            with self._changed:
                self._open.discard(sock)
                self._changed.notify_all()

    def _converse(self, stream: BinaryIO) -> None:
        user: str | None = None
        sender, recipients = "", []
        reply = self._reply(stream, "CONNECT")
        while reply not in (DROP, STALL) and (line := stream.readline().decode().strip()):
            command, _, rest = line.partition(" ")
            command = command.upper()
            if command == "AUTH":
                user = base64.b64decode(rest.partition(" ")[2]).split(b"\0")[1].decode()
            elif command == "MAIL":
                sender, recipients = _address(rest), []
            elif command == "RCPT":
                recipients.append(_address(rest))
            reply = self._reply(stream, command)
            if command == "QUIT":
                return
            if command == "DATA" and reply.startswith("354"):
                data = b"".join(iter(stream.readline, b".\r\n"))
                reply = self._reply(stream, "BODY", Taken(sender, tuple(recipients), data, user))

    def _reply(self, stream: BinaryIO, command: str, taken: Taken | None = None) -> str:
        with self._changed:
            scripted = self._script.get(command)
            reply = scripted.pop() if scripted else REPLIES[command]
            if taken is not None and (reply.startswith("2") or reply == DROP):
                self.ledger.append(taken)
        if reply == STALL:
            stream.read()  # until the client has had enough
        elif reply != DROP:
            stream.write(f"{reply}\r\n".encode())
            stream.flush()
        return reply


def _address(rest: str) -> str:
    return rest.partition("<")[2].partition(">")[0]
