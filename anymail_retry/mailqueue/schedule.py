"""What becomes of a row after an attempt, and when it is tried again: arithmetic, without clock or database."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from .. import conf
from ..delivery import KEY_MARGIN, Delivery
from ..verdict import Outcome, Verdict
from .states import OnAmbiguous, State

#: Reasons by which a row tells that it was given up, or by whom it is waited for.
EXPIRED = "expired"
TOO_OLD = "too old"
TOO_MANY_ATTEMPTS = "too many attempts"
AMBIGUOUS = "maybe taken"
LOST_TOO_OFTEN = "its worker died each time"

#: Claims in a row that ended without a result, after which a message is suspected of killing its workers.
SUSPECT_AFTER, HELD_AFTER = 1, 6

#: Seconds of the longest Retry-After that is believed: 30 days.
LONGEST_WAIT = 30 * 86400.0

#: Doublings after which a delay is at its maximum whatever the settings; keeps 2**n from growing without end.
MAX_DOUBLINGS = 60


@dataclass(frozen=True)
class Policy:
    """When a mailer's rows are tried again, and when no more. Times in seconds.

    :param backoff: the first delay, doubled with each further attempt.
    :param max_age: a row that waits for longer is not tried again; None: no limit.
    :param max_attempts: nor one with this many attempts; None: no limit.
    :param on_ambiguous: for rows that the ESP may have taken and no key protects.
    :param key_window: for how long the ESP remembers an idempotency key; None: it takes none.
    """

    backoff: float = 60.0
    backoff_max: float = 3600.0
    max_age: float | None = 3 * 86400.0
    max_attempts: int | None = None
    on_ambiguous: str = OnAmbiguous.RESEND
    key_window: float | None = None

    @classmethod
    def from_settings(
        cls, *, esp_name: str | None = None, options: Mapping[str, Any] | None = None, key_window: float | None = None
    ) -> Policy:
        """The policy of one mailer: ``EMAIL_QUEUE_*``, and what its OPTIONS say instead."""
        return cls(
            backoff=conf.get("QUEUE_BACKOFF"),
            backoff_max=conf.get("QUEUE_BACKOFF_MAX"),
            max_age=conf.get("QUEUE_MAX_AGE"),
            max_attempts=conf.get("QUEUE_MAX_ATTEMPTS"),
            on_ambiguous=conf.get("QUEUE_ON_AMBIGUOUS", esp_name=esp_name, options=options),
            key_window=key_window,
        )

    def delay(self, attempts: int, rng: Callable[[], float] = random.random) -> float:
        """Seconds until the next attempt after this many: exponential with full jitter, so that what failed together
        does not come back together.

        With the defaults up to 60, 120, 240, ... 3600, each time drawn evenly between 0 and that.
        """
        doublings = min(max(attempts - 1, 0), MAX_DOUBLINGS)
        return min(self.backoff * 2.0**doublings, self.backoff_max) * rng()

    def holds(self, on_ambiguous: str, delivery: Delivery, now: datetime) -> bool:
        """Whether an ambiguous row of this mailer has to wait for a person.

        :param on_ambiguous: what the message says for itself; empty: as the mailer says.
        """
        return self.wants_hold(on_ambiguous) and not delivery.is_protected(self.key_window, now)

    def wants_hold(self, on_ambiguous: str) -> bool:
        """Whether a row that says this waits for a person once it is ambiguous and no key protects it."""
        return (on_ambiguous or self.on_ambiguous) == OnAmbiguous.HOLD


@dataclass(frozen=True)
class Row:
    """What deciding needs to know of a row.

    :param attempts: claims so far, the present one included.
    :param lost: the last so many of those before it ended without a result.
    """

    attempts: int
    waits_since: datetime
    expires_at: datetime | None = None
    on_ambiguous: str = ""
    lost: int = 0


@dataclass(frozen=True)
class Fate:
    """What a row becomes. ``due_at`` is None where no worker need look at it again."""

    state: State
    reason: str = ""
    due_at: datetime | None = None


def due_at(not_before: datetime, expires_at: datetime | None) -> datetime:
    """When a worker has to look at a waiting row: when it may be sent or, if sooner, when it expires."""
    return not_before if expires_at is None else min(not_before, expires_at)


def is_expired(expires_at: datetime | None, now: datetime) -> bool:
    return expires_at is not None and expires_at <= now


def fate(
    outcome: Outcome,
    delivery: Delivery,
    row: Row,
    policy: Policy,
    now: datetime,
    rng: Callable[[], float] = random.random,
) -> Fate:
    """What a row becomes after an attempt with this outcome.

    :param delivery: as the attempt left it.
    """
    reason = outcome.reason
    if outcome.verdict is Verdict.DELIVERED:
        return Fate(State.SENT, reason)
    if outcome.hold:
        return Fate(State.HELD, reason or str(outcome.verdict))
    if outcome.verdict is None:
        return Fate(State.CANCELLED, reason or "cancelled")
    if outcome.verdict is Verdict.PERMANENT:
        return Fate(State.FAILED, reason or str(outcome.verdict))
    if outcome.verdict is Verdict.AMBIGUOUS and policy.holds(row.on_ambiguous, delivery, now):
        return Fate(State.HELD, AMBIGUOUS)
    given_up = _given_up(row, policy, now)
    if given_up:
        return Fate(State.FAILED, given_up)
    delay = max(policy.delay(row.attempts, rng), min(outcome.retry_after or 0.0, LONGEST_WAIT))
    if outcome.verdict is Verdict.AMBIGUOUS:
        delay = _while_key_lives(delay, delivery, policy, now)
    return Fate(State.DEFERRED, reason, due_at(now + timedelta(seconds=delay), row.expires_at))


def fate_of_recovered(delivery: Delivery, row: Row, policy: Policy, now: datetime) -> Fate | None:
    """What a row becomes whose worker died and may have begun to send it; None: it is sent now.

    A worker that dies may have claimed a hundred rows and begun none of them, so neither age nor attempts count here;
    but a message that was there each time a worker died is kept from the next one.
    """
    if policy.holds(row.on_ambiguous, delivery, now):
        return Fate(State.HELD, AMBIGUOUS)
    return Fate(State.HELD, LOST_TOO_OFTEN) if row.lost >= HELD_AFTER else None


def _given_up(row: Row, policy: Policy, now: datetime) -> str:
    if policy.max_attempts is not None and row.attempts - row.lost >= policy.max_attempts:
        return TOO_MANY_ATTEMPTS
    if policy.max_age is not None and now - row.waits_since >= timedelta(seconds=policy.max_age):
        return TOO_OLD
    return ""


def _while_key_lives(delay: float, delivery: Delivery, policy: Policy, now: datetime) -> float:
    """Under a live key an ambiguous row can be settled without a duplicate, but only while the key lives."""
    since = delivery.key_used_since
    if policy.key_window is None or since is None:
        return delay
    left = policy.key_window - KEY_MARGIN - (now - since).total_seconds()
    return min(delay, left / 3) if left > 0 else delay
