"""Whether a mailer may send now: its pause, the one probe that ends it, and the slots of its rate limit.

All workers on all hosts share this through :class:`~anymail_retry.models.MailerState`. Every change is a
compare-and-set, so whoever comes second notices. Times are the database's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.models import Q

from ..exceptions import CircuitOpen
from ..models import MailerState
from ..verdict import Outcome, Phase, Verdict
from .database import storable

#: Seconds of the first pause, and the longest while no second message was blocked.
FIRST_PAUSE = 60.0
#: Seconds of the longest pause that the workers make.
LONGEST_PAUSE = 3600.0

#: Send slots are reserved at most this far ahead, in seconds.
SLOT_HORIZON = 1.0
#: Slots are this much wider than 1/rate, for what jitters between a worker's clock and the ESP's.
SLOT_WIDTH = 1.05


def read(alias: str) -> dict[str, MailerState]:
    """The state of every mailer that has one, by name."""
    return {state.alias: state for state in MailerState.objects.using(alias).all()}


def ensure(alias: str, mailer: str) -> None:
    """Have a state for this mailer."""
    MailerState.objects.using(alias).bulk_create([MailerState(alias=mailer)], ignore_conflicts=True)


# --- pauses ---


@dataclass(frozen=True)
class Block:
    """Why a mailer should pause.

    :param seconds: for how long at least.
    :param grows: each further message that meets it doubles the pause.
    """

    reason: str
    seconds: float
    grows: bool = False


def block(outcome: Outcome) -> Block | None:
    """Whether this outcome speaks of the mailer as a whole: its account is blocked, its breaker is open, or the ESP
    said for how long it wants to be left alone."""
    wanted = outcome.retry_after or 0.0
    words = f": {storable(outcome.answer, 200)}" if outcome.answer else ""
    if outcome.verdict is Verdict.BLOCKED:
        return Block(f"blocked ({outcome.reason or outcome.http_status}){words}"[:200], wanted, grows=True)
    if isinstance(outcome.error, CircuitOpen):
        return Block("circuit breaker open", max(wanted, outcome.error.retry_after))
    if outcome.verdict is Verdict.REFUSED and wanted:
        return Block(f"asked to wait{words}"[:200], wanted)
    return None


def proves_nothing(outcome: Outcome | None) -> bool:
    """Whether a probe's outcome leaves open if the mailer works: nobody answered, or nobody was asked."""
    if outcome is None or outcome.verdict is None:
        return True
    if outcome.verdict is Verdict.DELIVERED or outcome.http_status is not None:
        return False
    return not any(attempt.phase is Phase.ANSWERED for attempt in outcome.attempts)


def ends_pause(outcome: Outcome | None) -> bool:
    """Whether a probe with this outcome ends the pause."""
    return outcome is not None and block(outcome) is None and not proves_nothing(outcome)


def pause(alias: str, mailer: str, why: Block, *, by: int, now: datetime) -> datetime | None:
    """Pause a mailer that is running. Until when.

    None: it was paused already, or this message caused the last pause, which others ended: then the trouble is its own,
    and no reason to keep the others waiting again and again.
    """
    ensure(alias, mailer)
    seconds = min(why.seconds, FIRST_PAUSE) if why.seconds else FIRST_PAUSE
    until = now + timedelta(seconds=seconds)
    running = MailerState.objects.using(alias).filter(
        Q(paused_by=None) | ~Q(paused_by=by), alias=mailer, paused_until=None
    )
    paused = running.update(paused_until=until, pause_reason=why.reason, pause_seconds=math.ceil(seconds), paused_by=by)
    return until if paused else None


def begin_probe(alias: str, state: MailerState, *, now: datetime, lease: float) -> datetime | None:
    """Take the one probe of a pause that has ended, for one lease. The fence to end it with; None: another has it."""
    fence = now + timedelta(seconds=lease)
    won = (
        MailerState.objects.using(alias)
        .filter(alias=state.alias, paused_until=state.paused_until)
        .update(paused_until=fence)
    )
    return fence if won else None


def end_probe(
    alias: str, state: MailerState, fence: datetime, outcome: Outcome | None, *, by: int, now: datetime
) -> bool:
    """What a probe came to: the end of the pause, a longer one, or a further probe. False: the fence had fallen."""
    mine = MailerState.objects.using(alias).filter(alias=state.alias, paused_until=fence)
    why = block(outcome) if outcome is not None else None
    if why is not None:
        seconds = min(why.seconds, FIRST_PAUSE) if why.seconds else FIRST_PAUSE
        if state.paused_by not in (None, by):
            # A second message: so it is not the first one's own trouble.
            growing = 2.0 * state.pause_seconds if why.grows else 0.0
            seconds = min(max(seconds, why.seconds, growing), LONGEST_PAUSE)
        return bool(
            mine.update(
                paused_until=now + timedelta(seconds=seconds),
                pause_reason=why.reason,
                pause_seconds=math.ceil(seconds),
                paused_by=by,
            )
        )
    if proves_nothing(outcome):
        tried = outcome is not None and outcome.verdict in (Verdict.REFUSED, Verdict.AMBIGUOUS)
        return bool(mine.update(paused_until=now + timedelta(seconds=state.pause_seconds if tried else 0)))
    return bool(mine.update(paused_until=None, pause_reason="", pause_seconds=0))


# --- rate ---


def slots(
    next_slot: datetime | None, *, rate: float, wanted: int, now: datetime, horizon: float = SLOT_HORIZON
) -> list[datetime]:
    """The next free send slots within the horizon, at most as many as wanted.

    :param rate: sends per second.
    """
    width = timedelta(seconds=SLOT_WIDTH / rate)
    first = max(now, next_slot) if next_slot else now
    free = (now + timedelta(seconds=horizon) - first) // width + 1
    return [first + width * number for number in range(max(0, min(free, wanted)))]


def reserve(
    alias: str,
    mailer: str,
    state: MailerState | None,
    *,
    rate: float,
    wanted: int,
    now: datetime,
    horizon: float = SLOT_HORIZON,
) -> list[datetime]:
    """Reserve send slots, for all workers to see. Fewer than wanted, or none: they are taken within the horizon, or
    another worker was faster."""
    if state is None:
        ensure(alias, mailer)
    next_slot = state.next_slot if state else None
    reserved = slots(next_slot, rate=rate, wanted=wanted, now=now, horizon=horizon)
    if not reserved:
        return []
    after = reserved[-1] + timedelta(seconds=SLOT_WIDTH / rate)
    rows = MailerState.objects.using(alias).filter(alias=mailer, next_slot=next_slot)
    return reserved if rows.update(next_slot=after) else []
