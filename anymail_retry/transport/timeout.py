"""How long each part of an attempt may take: what the user allows, cut to what the deadline leaves."""

from __future__ import annotations

import urllib3

from .clock import Clock

#: Seconds below which no attempt is begun: a shorter one could only fail.
SHORTEST_ATTEMPT = 1.0

#: Seconds that a part of an attempt gets even where the one before it overran its own (a host of many addresses).
SHORTEST_PART = SHORTEST_ATTEMPT / 4


class ConnectSeconds(float):
    """A connect timeout, in seconds, that leads on to the rest of its attempt."""

    attempt: DeadlineTimeout


class DeadlineTimeout(urllib3.Timeout):
    """The timeouts of one attempt; urllib3 clones it for each.

    Every part (connecting, sending, waiting for the answer) gets what the user allows it, and leaves to the parts
    after it a second of the time that is left, or half of it if that is less. So their sum never passes the deadline,
    and no request is sent only to hang up on the answer.

    :param connect: seconds per address and for the TLS handshake; None: no limit.
    :param read: seconds for sending, and again between two pieces of the answer; None: no limit.
    :param ends_at: when the call has to end, by the clock's ``monotonic()``; None: never. An attempt that is begun too
        late has :data:`SHORTEST_ATTEMPT` all the same.
    """

    def __init__(self, connect: float | None, read: float | None, ends_at: float | None, clock: Clock) -> None:
        super().__init__(connect=connect, read=read)
        self._allowed = connect, read
        self._deadline = ends_at
        self._clock = clock
        self._ends_at = None if ends_at is None else max(ends_at, clock.monotonic() + SHORTEST_ATTEMPT)

    def clone(self) -> DeadlineTimeout:
        return DeadlineTimeout(*self._allowed, self._deadline, self._clock)

    @property
    def pool_timeout(self) -> float | None:
        """Seconds to wait for a connection to get free, where all are busy."""
        if self._deadline is None:
            return None
        return max(self._deadline - self._clock.monotonic() - SHORTEST_ATTEMPT, 0.0)

    @property
    def connect_timeout(self) -> ConnectSeconds | None:
        seconds = self._cut(self._allowed[0])
        if seconds is None:
            return None
        seconds = ConnectSeconds(seconds)
        seconds.attempt = self
        return seconds

    @property
    def send_timeout(self) -> float | None:
        """Seconds for sending the request. urllib3 itself sends under the connect timeout."""
        return self._cut(self._allowed[1])

    @property
    def read_timeout(self) -> float | None:
        return self._cut(self._allowed[1], is_last=True)

    def _cut(self, allowed: float | None, *, is_last: bool = False) -> float | None:
        if self._ends_at is None:
            return allowed
        left = max(self._ends_at - self._clock.monotonic(), SHORTEST_PART)
        if not is_last:
            left = max(left - SHORTEST_ATTEMPT, left / 2)
        return left if allowed is None else min(allowed, left)
