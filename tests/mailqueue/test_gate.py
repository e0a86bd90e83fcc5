"""Whether a mailer may send now: pauses, their one probe, and the slots of a rate limit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anymail_retry.exceptions import CircuitOpen
from anymail_retry.mailqueue import gate
from anymail_retry.models import MailerState
from anymail_retry.verdict import Outcome, Verdict

from .engine import (
    AMBIGUOUS,
    BLOCKED,
    CANCELLED,
    DELIVERED,
    PERMANENT,
    PLAIN,
    REFUSED,
    UNREACHABLE,
    in_threads,
)

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)
LEASE = 120.0


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def state() -> MailerState:
    return MailerState.objects.get(alias=PLAIN)


def pause(outcome: Outcome = BLOCKED, *, by: int = 1, now: datetime = NOW) -> bool:
    why = gate.block(outcome)
    assert why is not None
    return gate.pause("default", PLAIN, why, by=by, now=now) is not None


def probe(outcome: Outcome | None, *, by: int) -> MailerState:
    """The pause ends, a probe is sent, and this comes of it."""
    before = state()
    assert before.paused_until is not None
    now = before.paused_until
    fence = gate.begin_probe("default", before, now=now, lease=LEASE)
    assert fence is not None
    assert gate.end_probe("default", before, fence, outcome, by=by, now=now)
    found = state()
    found.paused_for = None if found.paused_until is None else (found.paused_until - now).total_seconds()  # type: ignore[attr-defined]  # for the tests
    return found


# --- what pauses a mailer ---


@pytest.mark.parametrize(
    ("outcome", "pauses"),
    [
        pytest.param(BLOCKED, True, id="blocked"),
        pytest.param(replace(REFUSED, retry_after=7.0), True, id="asked to wait"),
        pytest.param(Outcome(Verdict.REFUSED, error=CircuitOpen("open", retry_after=30.0)), True, id="circuit breaker"),
        pytest.param(REFUSED, False, id="refused"),
        pytest.param(replace(AMBIGUOUS, retry_after=7.0), False, id="ambiguous"),
        pytest.param(PERMANENT, False, id="permanent"),
        pytest.param(DELIVERED, False, id="delivered"),
        pytest.param(CANCELLED, False, id="nothing to send"),
    ],
)
def test_what_speaks_of_the_mailer_pauses_it(outcome: Outcome, pauses: bool) -> None:
    assert (gate.block(outcome) is not None) == pauses


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("outcome", "seconds"),
    [
        pytest.param(BLOCKED, 60, id="a minute"),
        pytest.param(replace(BLOCKED, retry_after=7.0), 7, id="as long as the ESP says"),
        pytest.param(replace(BLOCKED, retry_after=7200.0), 60, id="no longer than a minute for one message"),
    ],
)
def test_first_pause_is_short(outcome: Outcome, seconds: float) -> None:
    assert pause(outcome)
    found = state()
    assert (found.paused_until, found.paused_by) == (after(seconds), 1)
    assert "Invalid API key" in found.pause_reason


@pytest.mark.django_db
def test_mailer_that_pauses_is_not_paused_again() -> None:
    assert pause(by=1)
    assert not pause(by=2, now=after(30))
    assert (state().paused_until, state().paused_by) == (after(60), 1)


@pytest.mark.django_db(transaction=True)
def test_eight_workers_begin_one_pause() -> None:
    works: list[Callable[[], bool]] = [lambda by=by: pause(by=by) for by in range(8)]  # type: ignore[misc]  # bound now
    assert sum(in_threads(*works)) == 1
    assert MailerState.objects.count() == 1


# --- the probe ---


@pytest.mark.django_db(transaction=True)
def test_eight_workers_one_probe() -> None:
    for _ in range(5):
        MailerState.objects.all().delete()
        pause()
        seen = state()
        fences = in_threads(*[lambda seen=seen: gate.begin_probe("default", seen, now=after(60), lease=LEASE)] * 8)
        assert len([fence for fence in fences if fence is not None]) == 1
        assert state().paused_until == after(60 + LEASE)


@pytest.mark.django_db
@pytest.mark.parametrize("outcome", [DELIVERED, REFUSED, PERMANENT, replace(AMBIGUOUS, http_status=500)])
def test_any_answer_ends_the_pause(outcome: Outcome) -> None:
    pause()
    found = probe(outcome, by=2)
    assert (found.paused_until, found.pause_reason) == (None, "")


@pytest.mark.django_db
def test_message_whose_pause_others_ended_does_not_begin_another() -> None:
    pause(by=1)
    probe(DELIVERED, by=2)
    assert not pause(by=1)
    assert state().paused_until is None
    assert pause(by=3)
    probe(DELIVERED, by=4)
    assert pause(by=1)


@pytest.mark.django_db
def test_blocked_second_message_makes_the_pause_longer_and_longer() -> None:
    pause(by=1)
    lengths = [probe(BLOCKED, by=number).paused_for for number in range(2, 10)]  # type: ignore[attr-defined]
    assert lengths == [120, 240, 480, 960, 1920, 3600, 3600, 3600]


@pytest.mark.django_db
def test_message_that_is_blocked_alone_does_not_make_it_longer() -> None:
    pause(by=1)
    assert [probe(BLOCKED, by=1).paused_for for _ in range(3)] == [60, 60, 60]  # type: ignore[attr-defined]


@pytest.mark.django_db
def test_second_message_is_believed_how_long_to_wait() -> None:
    pause(by=1)
    assert probe(replace(BLOCKED, retry_after=1800.0), by=2).paused_for == 1800  # type: ignore[attr-defined]


@pytest.mark.django_db
def test_waiting_that_the_esp_asks_for_does_not_grow_by_itself() -> None:
    wait = replace(REFUSED, retry_after=5.0)
    pause(wait, by=1)
    assert [probe(wait, by=number).paused_for for number in range(2, 5)] == [5, 5, 5]  # type: ignore[attr-defined]


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("outcome", "seconds"),
    [
        pytest.param(UNREACHABLE, 60, id="nobody answered"),
        pytest.param(AMBIGUOUS, 60, id="nobody answered in time"),
        pytest.param(CANCELLED, 0, id="nothing was sent"),
        pytest.param(None, 0, id="it was not begun"),
        pytest.param(replace(PERMANENT, http_status=None), 0, id="it never left this machine"),
    ],
)
def test_probe_that_proves_nothing_is_followed_by_another(outcome: Outcome | None, seconds: float) -> None:
    pause()
    found = probe(outcome, by=2)
    assert found.paused_for == seconds  # type: ignore[attr-defined]
    assert found.paused_by == 1


@pytest.mark.django_db
def test_late_probe_does_not_end_the_next_ones_turn() -> None:
    pause()
    seen = state()
    fence = gate.begin_probe("default", seen, now=after(60), lease=LEASE)
    assert fence is not None
    second = gate.begin_probe("default", state(), now=fence, lease=LEASE)
    assert second is not None
    assert not gate.end_probe("default", seen, fence, DELIVERED, by=2, now=after(200))
    assert state().paused_until == second


@pytest.mark.django_db
def test_reason_of_a_pause_is_short() -> None:
    assert pause(replace(BLOCKED, answer="\0\ud83d😀" * 1000))
    assert len(state().pause_reason) == 200


# --- rate ---

rates = st.floats(min_value=0.01, max_value=1000)


@given(rates, st.integers(min_value=0, max_value=5000), st.none() | st.floats(min_value=-100, max_value=100))
def test_slots_keep_their_distance_and_the_horizon(rate: float, wanted: int, next_slot: float | None) -> None:
    found = gate.slots(None if next_slot is None else after(next_slot), rate=rate, wanted=wanted, now=NOW)
    assert len(found) <= wanted
    width = 1.05 / rate
    assert all(slot >= NOW for slot in found)
    if next_slot is not None:
        assert all(slot >= after(next_slot) for slot in found)
    for one, following in itertools.pairwise(found):
        assert (following - one).total_seconds() >= width - 2e-6
    assert all(slot <= after(1.0) for slot in found)
    if wanted and (next_slot is None or next_slot <= 1.0):
        assert found
    if len(found) < wanted and found:
        assert (after(1.0) - found[-1]).total_seconds() < width + 2e-6  # not one more would fit


@pytest.mark.django_db
@pytest.mark.parametrize(("rate", "within_a_second"), [(2.0, 2), (10.0, 10), (50.0, 48)])
def test_no_more_is_reserved_than_may_begin(rate: float, within_a_second: int) -> None:
    found = gate.reserve("default", PLAIN, None, rate=rate, wanted=1000, now=NOW)
    assert len(found) == within_a_second
    assert gate.reserve("default", PLAIN, state(), rate=rate, wanted=1000, now=NOW) == []
    following = gate.reserve("default", PLAIN, state(), rate=rate, wanted=1, now=after(1.0))
    assert (following[0] - found[-1]).total_seconds() == pytest.approx(1.05 / rate, abs=1e-5)


@pytest.mark.django_db
def test_slots_that_nobody_took_are_gone() -> None:
    gate.reserve("default", PLAIN, None, rate=2, wanted=1, now=NOW)
    assert gate.reserve("default", PLAIN, state(), rate=2, wanted=9, now=after(100))[0] == after(100)


@pytest.mark.django_db(transaction=True)
def test_workers_never_share_a_slot() -> None:
    gate.ensure("default", PLAIN)

    def take() -> list[datetime]:
        taken: list[datetime] = []
        for _ in range(30):
            taken += gate.reserve("default", PLAIN, state(), rate=100, wanted=3, now=NOW)
        return taken

    slots: list[Any] = sorted(slot for mine in in_threads(*[take] * 4) for slot in mine)
    assert len(slots) > 3
    for one, following in itertools.pairwise(slots):
        assert following - one >= timedelta(seconds=1.05 / 100) - timedelta(microseconds=2)
