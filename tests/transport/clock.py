"""A clock that only moves when it is told to, and what moves it on the wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anymail_retry.testing import Fault

if TYPE_CHECKING:
    from anymail_retry.testing import Exchange

#: Sunday, 6 November 1994, 08:49:37 UTC: the moment that RFC 9110 writes in all its forms.
RFC_MOMENT = 784111777.0


@dataclass
class FakeClock:
    """Waits take no time, and are kept."""

    now: float = 0.0
    epoch: float = RFC_MOMENT
    waits: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.epoch + self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@dataclass(frozen=True)
class Takes(Fault):
    """A fault before which the client's clock moves on: the ESP was so slow. Only in the client's own process."""

    seconds: float
    clock: FakeClock
    then: Fault

    def apply(self, exchange: Exchange) -> None:
        self.clock.now += self.seconds
        self.then.apply(exchange)


@dataclass(frozen=True)
class Meanwhile(Fault):
    """A fault before which something happens on the client's side."""

    do: Callable[[], object]
    then: Fault

    def apply(self, exchange: Exchange) -> None:
        self.do()
        self.then.apply(exchange)
