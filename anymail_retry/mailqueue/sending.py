"""The threads that send. They decode, rebuild and send, and touch no database of ours."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from django.core.mail.backends.base import BaseEmailBackend
from django.db import connections

from ..delivery import deliver
from ..exceptions import PayloadError
from ..log import get_logger, reporting
from ..verdict import Outcome, Verdict
from . import gate
from .claim import Job
from .encryption import CannotDecrypt, Cipher, decrypted
from .mailers import Mailer
from .serialization import unpack
from .states import Priority

logger = get_logger("queue")

#: No mailer takes more than this part of the threads while another has mail.
LARGEST_SHARE = 0.75

#: Seconds for which a mailer counts as having mail after its last.
ACTIVE_FOR = 600.0

#: Seconds without work after which a thread closes its connections, and without work for a mailer the one to it: a
#: server that has closed it meanwhile would make an ambiguous failure of the next send.
IDLE = 10.0


class Inbox:
    """Claimed rows that wait for a thread, and the choice of the next one.

    The mailer with the fewest sends under way comes first, and of these the one that waits for longest. None takes more
    than three quarters of the threads while another has mail: an ESP that answers slowly must not starve a healthy one.
    """

    def __init__(self, threads: int, steady: Callable[[], float]) -> None:
        #: How many threads may send at a time.
        self.threads = threads
        self._steady = steady
        self._changed = threading.Condition()
        self._waiting: dict[str, dict[int, deque[Job]]] = {}
        self._in_flight: dict[str, int] = {}
        self._waiting_of: Counter[str] = Counter()
        self._all_waiting = self._all_in_flight = 0
        self._turns = itertools.count(1)
        self._last_turn: dict[str, int] = {}
        self._active_at: dict[str, float] = {}
        self._stopped: set[str] = set()
        self._closed = False

    def put(self, jobs: Collection[Job]) -> None:
        with self._changed:
            for job in jobs:
                lanes = self._waiting.setdefault(job.mailer, {})
                lane = lanes.setdefault(0 if job.at_once else job.priority, deque())
                lane.append(job)
                self._waiting_of[job.mailer] += 1
                self._all_waiting += 1
                self._active_at[job.mailer] = self._steady()
            self._changed.notify(len(jobs))

    def take(self, timeout: float) -> Job | None:
        """The next job, and count it as under way; None if there is none within the timeout.

        :raises Closed: there will be none any more.
        """
        end = self._steady() + timeout
        with self._changed:
            while True:
                if self._closed:
                    raise Closed
                job, next_start = self._choose()
                if job is not None:
                    return job
                now = self._steady()
                if now >= end:
                    return None
                self._changed.wait(min(end, next_start or end) - now)

    def done(self, job: Job) -> None:
        """The job is no longer under way."""
        with self._changed:
            self._in_flight[job.mailer] -= 1
            self._all_in_flight -= 1
            self._active_at[job.mailer] = self._steady()
            # Nobody is woken: the thread that is done takes the next job itself.

    def stop(self, mailer: str) -> None:
        """Give out nothing more of this mailer's, until :meth:`resume`."""
        with self._changed:
            self._stopped.add(mailer)

    def resume(self, mailer: str) -> None:
        with self._changed:
            self._stopped.discard(mailer)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def remove(self, unwanted: Callable[[Job], bool] = lambda job: True) -> list[Job]:
        """Take out those that wait, without counting them as under way."""
        removed: list[Job] = []
        with self._changed:
            for lanes in self._waiting.values():
                for priority, lane in lanes.items():
                    removed += [job for job in lane if unwanted(job)]
                    lanes[priority] = deque(job for job in lane if not unwanted(job))
            for job in removed:
                self._waiting_of[job.mailer] -= 1
                self._all_waiting -= 1
        return removed

    def remove_of(self, mailer: str) -> list[Job]:
        """Take out what waits for a mailer that pauses, save the probe that may end the pause."""
        return self.remove(lambda job: job.mailer == mailer and job.probe is None)

    # These three are asked after every send, so they take no lock: twenty threads would wait for it.

    def waiting(self, mailer: str | None = None) -> int:
        return self._all_waiting if mailer is None else self._waiting_of[mailer]

    def in_flight(self) -> int:
        return self._all_in_flight

    def is_idle(self) -> bool:
        # In the order in which a job goes, so that one that is just being taken is not missed.
        return not self._all_waiting and not self._all_in_flight

    def free(self, mailer: str) -> int:
        """How many more jobs of this mailer threads would begin at once."""
        with self._changed:
            free = self.threads - self._all_in_flight - self._all_waiting
            own = self._in_flight.get(mailer, 0) + self._waiting_of[mailer]
            return max(0, min(free, self._share(mailer) - own))

    def _share(self, mailer: str) -> int:
        """How many threads this mailer may take now."""
        since = self._steady() - ACTIVE_FOR
        if any(name != mailer and at >= since for name, at in self._active_at.items()):
            return max(1, int(self.threads * LARGEST_SHARE))
        return self.threads

    def _choose(self) -> tuple[Job | None, float | None]:
        """The next job that may begin now; or when the first of the others may."""
        now = self._steady()
        next_start: float | None = None
        for mailer in sorted(
            self._waiting, key=lambda name: (self._in_flight.get(name, 0), self._last_turn.get(name, 0))
        ):
            if mailer in self._stopped or self._in_flight.get(mailer, 0) >= self._share(mailer):
                continue
            lanes = self._waiting[mailer]
            for priority in (0, *Priority.values):
                lane = lanes.get(priority)
                if not lane:
                    continue
                if lane[0].starts_at > now:
                    next_start = min(lane[0].starts_at, next_start or lane[0].starts_at)
                    continue
                job = lane.popleft()
                self._in_flight[mailer] = self._in_flight.get(mailer, 0) + 1
                self._all_in_flight += 1
                self._waiting_of[mailer] -= 1
                self._all_waiting -= 1
                self._last_turn[mailer] = next(self._turns)
                job.began_at = now
                return job, None
        return None, next_start


class Closed(Exception):  # a message between threads, not an error
    """The inbox gives out no more jobs."""


@dataclass(frozen=True, eq=False)
class Sent:
    """What a thread has to say about a job.

    :param outcome: None: not begun, because too little of the lease was left, or it has expired.
    :param began_at: by the steady clock.
    """

    job: Job
    outcome: Outcome | None
    began_at: float
    seconds: float


class Sender(threading.Thread):
    """One thread that sends until the inbox is closed.

    It keeps a back end open for each mailer, and shares none with another thread.

    :param report: takes what each job came to; called in this thread.
    :param lease_needed: seconds that have to be left of a row's lease when it is begun.
    :param cipher: of what is encrypted; None: nothing should be.
    """

    def __init__(
        self,
        inbox: Inbox,
        mailers: Mapping[str, Mailer],
        report: Callable[[Sent], None],
        *,
        steady: Callable[[], float],
        lease_needed: float,
        cipher: Cipher | None = None,
    ) -> None:
        super().__init__(name="anymail-retry-sender", daemon=True)
        self.inbox = inbox
        self.mailers = mailers
        self.report = report
        self.steady = steady
        self.lease_needed = lease_needed
        self.cipher = cipher
        self._backends: dict[str, BaseEmailBackend] = {}
        self._used_at: dict[str, float] = {}

    def run(self) -> None:
        try:
            while True:
                job = self.inbox.take(timeout=IDLE)
                if job is None:
                    self._close_everything()
                    continue
                began = self.steady()
                outcome = None
                if job.leased_until - began >= self.lease_needed and not job.is_expired(began):
                    outcome = self._send(job)
                    if gate.block(outcome) is not None:
                        self.inbox.stop(job.mailer)  # the others that wait would only meet the same
                self.inbox.done(job)
                self.report(Sent(job, outcome, began, self.steady() - began))
        except Closed:
            self._close_everything()

    def _send(self, job: Job) -> Outcome:
        """Send one message. Whatever goes wrong is this message's own outcome."""
        with reporting(job.is_report):
            return self._try_to_send(job)

    def _try_to_send(self, job: Job) -> Outcome:
        try:
            assert job.payload is not None
            message = unpack(*decrypted(self.cipher, job.payload, job.bodies))
        except CannotDecrypt as error:
            return Outcome(None, f"cannot be decrypted: {error}", hold=True, error=error)
        except PayloadError as error:
            return Outcome(None, f"cannot be decoded: {error}"[:200], hold=True, error=error)
        except Exception as error:
            logger.exception("%s: message %s cannot be decoded", job.mailer, job.id)
            return Outcome(None, f"cannot be decoded: {type(error).__name__}", hold=True, error=error)
        if self.cipher is not None:
            job.delivery.digest_forms = self.cipher.request_digests
        try:
            backend = self._backend(job.mailer)
        except Exception as error:  # a constructor raises anything; the mailer pauses, with its words
            return Outcome(
                Verdict.BLOCKED, "configuration", error=error, answer=f"{type(error).__name__}: {error}"[:500]
            )
        try:
            _log_resend(job, self.mailers[job.mailer].key_window)
            outcome = deliver(backend, message, job.delivery)
            if not isinstance(outcome, Outcome):
                raise TypeError(f"{type(backend).__module__}: deliver() returned {type(outcome).__name__}")
            return outcome
        except BaseException as error:  # nothing may end this thread, a receiver's sys.exit() neither
            logger.exception("%s: message %s: %s", job.mailer, job.id, type(error).__name__)
            self._drop_backend(job.mailer)
            return Outcome(Verdict.AMBIGUOUS, f"error: {type(error).__name__}", hold=True)
        finally:
            _close_connections()

    def _backend(self, mailer: str) -> BaseEmailBackend:
        now = self.steady()
        if now - self._used_at.get(mailer, now) > IDLE:
            self._drop_backend(mailer)
        self._used_at[mailer] = now
        if mailer not in self._backends:
            backend = self.mailers[mailer].make()
            if hasattr(backend, "deliver"):
                backend.open()  # once for many messages; deliver() opens the others, as their failing says something
            self._backends[mailer] = backend
        return self._backends[mailer]

    def _drop_backend(self, mailer: str) -> None:
        _close(self._backends.pop(mailer, None))

    def _close_everything(self) -> None:
        for mailer in list(self._backends):
            self._drop_backend(mailer)
        connections.close_all()  # this thread's own, which a receiver may have opened


def _log_resend(job: Job, key_window: float | None) -> None:
    """A second copy is explained by a line, whatever becomes of the send."""
    since = job.delivery.maybe_taken_since
    if since is None:
        return
    protected = job.delivery.is_protected(key_window)
    logger.log(
        logging.INFO if protected else logging.WARNING,
        "%s: message %s may have been taken at %s UTC; sending it again %s",
        job.mailer,
        job.id,
        f"{since:%Y-%m-%d %H:%M:%S}",
        "under its key" if protected else "without a key that protects it: it may arrive twice",
    )


def _close(backend: Any) -> None:
    if backend is None:
        return
    try:
        backend.close()
    except Exception as error:  # it is not needed any more
        logger.debug("closing %s: %s", type(backend).__module__, error)


def _close_connections() -> None:
    """End what a receiver's use of the ORM opened in this thread, as Django does at the end of a request."""
    for connection in connections.all(initialized_only=True):
        connection.close_if_unusable_or_obsolete()
