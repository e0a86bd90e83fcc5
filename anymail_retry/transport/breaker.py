"""The circuit breaker: when an ESP is down, say so at once instead of waiting for each message's timeouts.

One per process, mailer and API host. Closed, it counts attempts that failed as an outage does: connections that did
not stand, read timeouts, 502, 503 and 504. A 429 is not one (``Retry-After`` is its remedy), nor is a 500 (which may
be this message's own). After ``EMAIL_BREAKER_FAILURES`` of them in a row within a minute it opens: nothing is tried
until the reset time is over. Then exactly one thread sends one attempt; any answer that is not counted closes the
breaker again, and a failure doubles the reset time.
"""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from django.core.signals import setting_changed

from ..exceptions import CircuitOpen
from ..log import get_logger
from ..signals import breaker_changed
from ..verdict import Attempt, Phase
from .clock import SYSTEM_CLOCK, Clock

logger = get_logger("transport")

#: Seconds in which the failures have to come to open the breaker.
WITHIN = 60.0
#: Seconds from opening to the first probe, and at most between two probes; each is spread by a quarter both ways.
RESET_FIRST, RESET_MAX = 30.0, 300.0
SPREAD = 0.25

OUTAGE_STATUSES = frozenset({502, 503, 504})


def is_outage(attempt: Attempt) -> bool:
    """Whether an attempt failed the way an outage makes it fail."""
    if attempt.phase is Phase.ANSWERED:
        return attempt.status in OUTAGE_STATUSES
    return attempt.phase is Phase.CONNECT or attempt.error == "ReadTimeoutError"


@dataclass(frozen=True)
class BreakerState:
    """What :func:`breakers` tells of one breaker of this process."""

    mailer: str
    host: str
    #: ``closed``, ``open`` or ``half-open`` (a probe is on its way).
    state: str
    #: Failures in a row.
    failures: int
    #: When it opened, and when the next probe may go; None while it is closed.
    since: datetime | None = None
    until: datetime | None = None


class Breaker:
    """One circuit breaker. Thread-safe.

    :param failures: failures in a row that open it.
    """

    def __init__(self, mailer: str, host: str, failures: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self.mailer = mailer
        self.host = host
        self.limit = failures
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: list[float] = []
        self._opened_at: float | None = None
        self._probe_at = 0.0
        self._reset = RESET_FIRST
        self._probing = False

    def admit(self) -> bool:
        """Ask before a send. True: this send is the probe, one attempt and no retries. False: send as usual.

        :raises CircuitOpen: not now; says since when and until when.
        """
        with self._lock:
            if self._opened_at is None:
                return False
            if not self._probing and self._clock.monotonic() >= self._probe_at:
                self._probing = True
                return True
            state = self._snapshot()
            wait = max(self._probe_at - self._clock.monotonic(), 0.0)
        assert state.since is not None
        assert state.until is not None
        raise CircuitOpen(
            f"Not tried: {self.host} has not answered since {state.since:%H:%M:%S} UTC, and is tried again after"
            f" {state.until:%H:%M:%S} UTC (circuit breaker of {self.mailer})",
            retry_after=wait,
        )

    @property
    def is_open(self) -> bool:
        """Whether a send that began before should give up."""
        return self._opened_at is not None

    def count(self, attempt: Attempt) -> None:
        """Count what a send met, as soon as it met it."""
        with self._lock:
            was_open = self.is_open
            if is_outage(attempt):
                self._fail()
            elif attempt.phase is Phase.ANSWERED:
                self._close()
            after = self._snapshot()
        if was_open != (after.state != "closed"):
            self._tell(after)

    def end_probe(self, *, tried: bool) -> None:
        """Has to be called at the end of every probe, whatever became of it.

        :param tried: it came as far as an attempt; if not, the next send is the probe.
        """
        with self._lock:
            self._probing = False
            if tried and self._opened_at is not None:
                self._reset = min(self._reset * 2, RESET_MAX)
                self._schedule_probe()

    def _fail(self) -> None:
        now = self._clock.monotonic()
        self._failures = [*(at for at in self._failures if at > now - WITHIN), now][-self.limit :]
        if self._opened_at is None and len(self._failures) >= self.limit:
            self._opened_at = now
            self._reset = RESET_FIRST
            self._schedule_probe()

    def _close(self) -> None:
        self._failures = []
        self._opened_at = None

    def _schedule_probe(self) -> None:
        spread = random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311  # keeps processes apart, guards no secret
        self._probe_at = self._clock.monotonic() + self._reset * spread

    def state(self) -> BreakerState:
        with self._lock:
            return self._snapshot()

    def _snapshot(self) -> BreakerState:
        if self._opened_at is None:
            return BreakerState(self.mailer, self.host, "closed", len(self._failures))
        return BreakerState(
            self.mailer,
            self.host,
            "half-open" if self._probing else "open",
            len(self._failures),
            since=self._wall(self._opened_at),
            until=self._wall(self._probe_at),
        )

    def _wall(self, at: float) -> datetime:
        return datetime.fromtimestamp(self._clock.time() + at - self._clock.monotonic(), timezone.utc)

    def _tell(self, state: BreakerState) -> None:
        if state.state == "closed":
            logger.warning("%s: %s answers again; circuit breaker closed", self.mailer, self.host)
        else:
            logger.error(
                "%s: %s failed %d times in a row; circuit breaker open, next try after %s",
                self.mailer,
                self.host,
                state.failures,
                f"{state.until:%H:%M:%S} UTC",
            )
        breaker_changed.send_robust(type(self), state=state)


_breakers: dict[tuple[int, str, str, int], Breaker] = {}


def breaker(mailer: str, host: str, failures: int, clock: Clock = SYSTEM_CLOCK) -> Breaker:
    """This process's breaker for a mailer and host. A forked child starts with closed ones."""
    key = (os.getpid(), mailer, host, failures)
    return _breakers.get(key) or _breakers.setdefault(key, Breaker(mailer, host, failures, clock))


def breakers() -> list[BreakerState]:
    """The state of every circuit breaker of this process."""
    return [found.state() for key, found in list(_breakers.items()) if key[0] == os.getpid()]


def reset_breakers(**kwargs: Any) -> None:
    """Forget every breaker of this process: all are closed."""
    _breakers.clear()


# Tests that change settings must not meet the outage of the test before.
setting_changed.connect(reset_breakers, dispatch_uid="anymail_retry.reset_breakers")
