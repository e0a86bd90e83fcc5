"""What a worker knows of each mailer: whether it may send, how, and when to look for its mail again."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from ..log import get_logger
from ..models import MailerState
from . import gate, mailers
from .claim import Claimer, mailers_with_rows
from .clock import DatabaseClock
from .mailers import Mailer, MailerGone
from .schedule import Policy
from .wakeup import ANY

logger = get_logger("queue")

#: Claimed mail that waits should be begun within so many seconds, for what is more urgent to find its place.
LOOK_AHEAD = 2.0

#: Mail is claimed when so much of the look-ahead is left.
LOW_MARK = 0.6


@dataclass
class Lane:
    """One mailer, for one worker."""

    name: str
    #: None: there is none of this name any more, and ``gone`` says what to do.
    mailer: Mailer | None
    gone: str = ""
    policy: Policy = field(default_factory=Policy)
    #: Sends per second, over all workers; None: no limit.
    rate: float | None = None
    #: What all workers share; None: nothing yet.
    state: MailerState | None = None
    #: When to look for due mail again, by the steady clock.
    poll_at: float = 0.0
    #: Somebody said that there is due mail, and it was not looked for since.
    called: bool = False
    #: The last look found nothing that may be sent now.
    empty: bool = False
    #: Rows that the last claim left, because no thread would have begun them at once.
    left: int = 0
    #: How long a send lasts, as a moving average; 0: not known yet.
    seconds: float = 0.0

    @classmethod
    def of(cls, name: str) -> Lane:
        try:
            mailer = mailers.find(name)
            return cls(name, mailer, policy=mailer.policy, rate=mailer.rate)
        except MailerGone as gone:
            logger.error("%s", gone)
            return cls(name, None, gone=str(gone), policy=Policy())
        except Exception as error:  # its module, or one of its options: the other mailers must not suffer
            logger.exception("mailer %r cannot be used", name)
            gone_reason = f"mailer {name!r} cannot be used: {type(error).__name__}"
            return cls(name, None, gone=gone_reason[:200], policy=Policy())

    def look_ahead(self, threads: int, batch: int) -> int:
        """How many rows may be claimed and wait: what the threads begin within :data:`LOOK_AHEAD`."""
        if not self.seconds:
            return batch
        return max(threads, min(batch, int(threads * LOOK_AHEAD / self.seconds)))

    def learn(self, seconds: float) -> None:
        """How long one more send lasted."""
        self.seconds = 0.8 * self.seconds + 0.2 * seconds if self.seconds else seconds


class Lanes:
    """The lanes of one worker, by name.

    :param only: names of the mailers to work for; None: all that have mail.
    :param poll: seconds between two looks at what the database says.
    """

    def __init__(
        self,
        claimer: Claimer,
        clock: DatabaseClock,
        *,
        poll: float,
        only: Collection[str] | None,
        steady: Callable[[], float],
    ) -> None:
        self.poll = poll
        self.only = only
        #: For the sender threads.
        self.mailers: dict[str, Mailer] = {}
        self._claimer = claimer
        self._clock = clock
        self._steady = steady
        self._lanes: dict[str, Lane] = {}
        self._names_read_at: float | None = None
        self._states_read_at: float | None = None

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes.values()))

    def __getitem__(self, name: str) -> Lane:
        return self._lanes[name]

    def refresh(self) -> None:
        """Learn which mailers have mail, and which of them pause; at most once per poll."""
        now = self._steady()
        if self._names_read_at is None or now - self._names_read_at >= self.poll:
            for name in mailers_with_rows(self._claimer.alias):
                if name not in self._lanes and (self.only is None or name in self.only):
                    lane = self._lanes[name] = Lane.of(name)
                    if lane.mailer is not None:
                        self.mailers[name] = lane.mailer
            self._names_read_at = now
        if self._states_read_at is None or now - self._states_read_at >= self.poll:
            states = gate.read(self._claimer.alias)
            for lane in self._lanes.values():
                lane.state = states.get(lane.name)
            self._states_read_at = now

    def look_now(self, names: Collection[str]) -> None:
        """There is due mail of these mailers; :data:`~.wakeup.ANY` of them: look at everything anew."""
        self._states_read_at = None
        if any(name not in self._lanes for name in names if self.only is None or name in {ANY, *self.only}):
            self._names_read_at = None
        for lane in self._lanes.values():
            if lane.name in names or ANY in names:
                lane.called, lane.poll_at = True, 0.0

    def forget_states(self) -> None:
        """Have what all workers share read again before it is used."""
        self._states_read_at = None

    def are_empty(self) -> bool:
        """Whether the last look at each of them found nothing to send."""
        return self._names_read_at is not None and all(lane.empty for lane in self._lanes.values())

    def is_paused(self, lane: Lane) -> bool:
        until = lane.state.paused_until if lane.state else None
        return until is not None and until > self._clock.now()

    def may_claim(self, lane: Lane) -> bool:
        """Whether it is time to look for due mail, and some could be sent."""
        if lane.poll_at > self._steady():
            return False
        if self.is_paused(lane):
            self.found_nothing(lane)
            return False
        if lane.rate is not None and lane.state is not None and lane.state.next_slot is not None:
            opens_at = self._clock.moment(lane.state.next_slot) - gate.SLOT_HORIZON
            if opens_at > self._steady():
                lane.poll_at = opens_at
                return False
        return True

    def found_nothing(self, lane: Lane) -> None:
        """Nothing to send now: look again after a while, not at the same moment as other workers."""
        lane.empty = True
        lane.poll_at = self._steady() + self.poll * random.uniform(0.75, 1.25)  # noqa: S311  # keeps workers apart

    def next_look(self) -> float | None:
        """When the next lane is to be looked at, by the steady clock."""
        now = self._steady()
        return min((lane.poll_at for lane in self._lanes.values() if lane.poll_at > now), default=None)
