"""The local ESP in a process of its own, with its script and ledger at the other end of two pipes.

It shares no interpreter lock with what is measured, and outlives the workers that a test kills. When the process that
spawned it ends, however it ends, so does the ESP.
"""

from __future__ import annotations

import os
import pickle  # between this process and its own child, over their private pipes
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from typing import IO, TYPE_CHECKING, Any

from anymail_retry.testing.certificate import authority
from anymail_retry.testing.faults import Fault, Rule
from anymail_retry.testing.ledger import Ledger, Request
from anymail_retry.testing.local import Counts, LocalEsp, ScriptedEsp, forget

if TYPE_CHECKING:
    from typing_extensions import Self

#: How long the child may take to end by itself, in seconds.
PATIENCE = 30.0
#: Length of one wait in the child, so that other calls get their turn, in seconds.
TURN = 0.2


class SpawnedEsp(ScriptedEsp):
    """A local ESP in a process of its own.

    ::

        with LocalEsp.spawn("sparkpost", latency=0.05) as esp:
            ...

    Same interface as :class:`~anymail_retry.testing.LocalEsp`. Rules and faults travel by pickle: functions in them
    (``Rule(when=...)``) and faults of your own must be importable in the child, which has this process's ``sys.path``;
    others raise ``TypeError``.
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
        super().__init__(
            esp, tls=tls, latency=latency, host=host, port=port, api_keys=api_keys, keep_bodies=keep_bodies
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()  # one call at a time
        self._reading = threading.Lock()  # the ledger's copy
        self._seen = Ledger()

    # --- life ---

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running.pid

    def start(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603  # this very module
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            self._port = self._call(
                "start",
                self.esp,
                {
                    "tls": self.tls,
                    "latency": self._latency,
                    "host": self.host,
                    "port": self._port,
                    "api_keys": self.api_keys,
                    "keep_bodies": self._keep_bodies,
                    "authority": authority() if self.tls else None,
                },
            )
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with process:
            assert process.stdin is not None
            try:
                process.stdin.close()  # its signal to end
            except BrokenPipeError:
                pass
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # it is the caller's process that must go on
                process.kill()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("this local ESP is not running: use it in `with`, or start() it")
        return self._process

    def _call(self, name: str, *args: Any) -> Any:
        process = self._running
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            message = pickle.dumps((name, args))
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise TypeError(f"a spawned ESP takes only what can be imported in its process: {error}") from error
        with self._turn:
            try:
                _write(process.stdin, message)
                failure, value = pickle.loads(_read(process.stdout))  # noqa: S301  # from our own child
            except (EOFError, BrokenPipeError):
                raise RuntimeError(f"the local ESP's process has ended, status {process.poll()}") from None
        if failure is not None:
            raise failure
        return value

    # --- what it does ---

    @property
    def latency(self) -> float:
        return self._latency

    @latency.setter
    def latency(self, seconds: float) -> None:
        self._call("set_latency", seconds)
        self._latency = seconds

    def script(self, *rules: Rule | Fault) -> None:
        self._call("script", *rules)

    def release(self) -> None:
        self._call("release")

    def stop_listening(self) -> None:
        self._call("stop_listening")

    def start_listening(self) -> None:
        self._call("start_listening")

    def black_hole(self) -> None:
        self._call("black_hole")

    def close_idle_connections(self) -> int:
        closed: int = self._call("close_idle_connections")
        return closed

    def advance(self, seconds: float) -> None:
        self._call("advance", seconds)

    def reset(self) -> None:
        with self._reading:
            self._call("reset")
            self._seen.clear()
        forget()

    # --- what it saw ---

    @property
    def ledger(self) -> Ledger:
        # Entries never change, so each travels once.
        with self._reading:
            self._seen.extend(self._call("ledger_from", len(self._seen)))
            return Ledger(self._seen)

    @property
    def requests(self) -> list[Request]:
        requests: list[Request] = self._call("requests")
        return requests

    @property
    def counts(self) -> Counts:
        counts: Counts = self._call("counts")
        return counts

    def wait_for(
        self,
        requests: int = 0,
        *,
        accepted: int = 0,
        connections: int = 0,
        stalled: int = 0,
        timeout: float = 30.0,
    ) -> None:
        end = time.monotonic() + timeout
        while True:
            turn = min(TURN, end - time.monotonic())
            try:
                self._call("wait_for", requests, accepted, connections, stalled, max(turn, 0.0))
            except TimeoutError:
                if time.monotonic() >= end:
                    raise TimeoutError(
                        f"waited {timeout} s for {requests=} {accepted=} {connections=} {stalled=}: {self.counts}"
                    ) from None
            else:
                return


def _write(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(struct.pack("!Q", len(message)) + message)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError
    (length,) = struct.unpack("!Q", head)
    return pipe.read(int(length))


def main() -> None:
    """The child: a local ESP that does what its standard input says, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything here prints must not get among the answers
    esp: LocalEsp | None = None
    try:
        while True:
            try:
                message = _read(sys.stdin.buffer)
            except EOFError:
                break
            try:
                name, args = _load(message)
                if name == "start":
                    esp = LocalEsp(args[0], **args[1]).start()
                    value: Any = esp.port
                else:
                    assert esp is not None
                    value = _do(esp, name, args)
                answer = pickle.dumps((None, value))
            except Exception as error:  # it is the parent's to raise
                answer = pickle.dumps((error, None))
            _write(answers, answer)
    finally:
        if esp is not None:
            esp.close()
        answers.close()


def _load(message: bytes) -> Any:
    try:
        return pickle.loads(message)  # noqa: S301  # from our own parent
    except (AttributeError, ImportError) as error:
        raise TypeError(f"a spawned ESP takes only what can be imported in its process: {error}") from error


def _do(esp: LocalEsp, name: str, args: tuple[Any, ...]) -> Any:
    if name == "set_latency":
        (esp.latency,) = args
        return None
    if name == "wait_for":
        requests, accepted, connections, stalled, timeout = args
        esp.wait_for(requests, accepted=accepted, connections=connections, stalled=stalled, timeout=timeout)
        return None
    value = getattr(esp, name)
    return value(*args) if callable(value) else value
