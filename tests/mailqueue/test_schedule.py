"""What becomes of a row after an attempt, and when it is tried again."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anymail_retry.delivery import KEY_MARGIN, Delivery
from anymail_retry.mailqueue import schedule
from anymail_retry.mailqueue.schedule import Policy, Row, fate, fate_of_recovered
from anymail_retry.verdict import Outcome, Verdict

NOW = datetime(2026, 10, 25, 0, 30, tzinfo=timezone.utc)

RETRIED = (Verdict.REFUSED, Verdict.AMBIGUOUS, Verdict.BLOCKED)

attempts = st.integers(min_value=0, max_value=10_000)
seconds = st.floats(min_value=0, max_value=1e6)
fractions = st.floats(min_value=0, max_value=1, exclude_max=True)


def row(**facts: Any) -> Row:
    return Row(**{"attempts": 1, "waits_since": NOW, **facts})


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


# --- delays ---


@given(attempts, seconds, seconds, fractions)
def test_delay_lies_between_nothing_and_its_bound(number: int, base: float, maximum: float, jitter: float) -> None:
    delay = Policy(backoff=base, backoff_max=maximum).delay(number, lambda: jitter)
    assert 0 <= delay <= maximum
    assert delay <= base * 2.0 ** max(number - 1, 0) * jitter if number < 100 else True


def test_delay_doubles_up_to_its_maximum() -> None:
    policy = Policy(backoff=60, backoff_max=3600)
    assert [policy.delay(number, lambda: 1.0) for number in range(1, 10)] == [
        60,
        120,
        240,
        480,
        960,
        1920,
        3600,
        3600,
        3600,
    ]


def test_delay_is_fully_jittered() -> None:
    policy = Policy()
    assert policy.delay(1, lambda: 0.0) == 0
    assert policy.delay(1, lambda: 0.5) == 30


# --- fates ---


@pytest.mark.parametrize(
    ("outcome", "state", "reason"),
    [
        pytest.param(Outcome(Verdict.DELIVERED), "sent", "", id="delivered"),
        pytest.param(Outcome(None, "cancelled"), "cancelled", "cancelled", id="nothing to send"),
        pytest.param(Outcome(Verdict.PERMANENT, "bad address"), "failed", "bad address", id="permanent"),
        pytest.param(Outcome(Verdict.PERMANENT), "failed", "permanent", id="permanent without a reason"),
        pytest.param(Outcome(Verdict.AMBIGUOUS, "accepted?", hold=True), "held", "accepted?", id="not understood"),
        pytest.param(Outcome(Verdict.PERMANENT, "error: X", hold=True), "held", "error: X", id="unknown error"),
        pytest.param(Outcome(None, "cannot be decoded", hold=True), "held", "cannot be decoded", id="undecodable"),
        pytest.param(Outcome(Verdict.REFUSED, "busy"), "deferred", "busy", id="refused"),
        pytest.param(Outcome(Verdict.AMBIGUOUS, "sent"), "deferred", "sent", id="ambiguous, resend"),
        pytest.param(Outcome(Verdict.BLOCKED, "bad key"), "deferred", "bad key", id="blocked"),
    ],
)
def test_each_outcome_has_its_fate(outcome: Outcome, state: str, reason: str) -> None:
    found = fate(outcome, Delivery(), row(), Policy(), NOW)
    assert (found.state, found.reason) == (state, reason)
    assert (found.due_at is not None) == (state == "deferred")


@given(st.sampled_from(RETRIED), attempts, seconds, fractions)
def test_retry_after_is_a_not_before(verdict: Verdict, number: int, wanted: float, jitter: float) -> None:
    found = fate(Outcome(verdict, retry_after=wanted), Delivery(), row(attempts=number), Policy(), NOW, lambda: jitter)
    assert found.due_at is not None
    assert found.due_at >= NOW + timedelta(seconds=wanted)


@pytest.mark.parametrize("wanted", [1e300, float("inf"), float("nan"), -5.0])
def test_retry_after_beyond_belief_does_no_harm(wanted: float) -> None:
    found = fate(Outcome(Verdict.REFUSED, retry_after=wanted), Delivery(), row(), Policy(), NOW)
    assert found.due_at is not None
    assert NOW <= found.due_at <= NOW + timedelta(days=30)


@given(st.sampled_from(RETRIED), seconds, st.floats(min_value=-1e6, max_value=1e6))
def test_deferred_row_is_looked_at_when_it_expires(verdict: Verdict, retry_after: float, left: float) -> None:
    expires_at = NOW + timedelta(seconds=left)
    found = fate(Outcome(verdict, retry_after=retry_after), Delivery(), row(expires_at=expires_at), Policy(), NOW)
    assert found.due_at is not None
    assert found.due_at <= expires_at


@pytest.mark.parametrize("verdict", RETRIED)
@pytest.mark.parametrize(
    ("facts", "policy", "reason"),
    [
        pytest.param({"attempts": 3}, Policy(max_attempts=3), schedule.TOO_MANY_ATTEMPTS, id="attempts"),
        pytest.param({"waits_since": ago(100)}, Policy(max_age=100), schedule.TOO_OLD, id="age"),
        pytest.param({"attempts": 2}, Policy(max_attempts=3), "", id="one attempt left"),
        pytest.param({"waits_since": ago(99)}, Policy(max_age=100), "", id="not too old yet"),
        pytest.param({"attempts": 9999, "waits_since": ago(1e9)}, Policy(max_age=None), "", id="no limits"),
    ],
)
def test_row_is_given_up_in_the_end(verdict: Verdict, facts: dict[str, Any], policy: Policy, reason: str) -> None:
    found = fate(Outcome(verdict, "busy"), Delivery(), row(**facts), policy, NOW)
    assert (found.state, found.reason) == (("failed", reason) if reason else ("deferred", "busy"))


# --- the ambiguous ---


def maybe_taken(since: float) -> Delivery:
    return Delivery(maybe_taken_since=ago(since), key_used_since=ago(since))


@pytest.mark.parametrize(
    ("mailers", "messages", "window", "since", "state"),
    [
        pytest.param("resend", "", None, 0, "deferred", id="resend"),
        pytest.param("hold", "", None, 0, "held", id="hold"),
        pytest.param("hold", "resend", None, 0, "deferred", id="the message wants a resend"),
        pytest.param("resend", "hold", None, 0, "held", id="the message wants to be held"),
        pytest.param("hold", "", 900, 0, "deferred", id="hold, under a live key"),
        pytest.param("hold", "", 900, 889, "deferred", id="hold, under a key that lives long enough for one more"),
        pytest.param("hold", "", 900, 899, "held", id="hold, the key is dead before a request arrives"),
        pytest.param("hold", "", 900, 900, "held", id="hold, the key is dead"),
        pytest.param("resend", "", 900, 900, "deferred", id="resend, the key is dead"),
    ],
)
def test_ambiguous_row_follows_its_policy(
    mailers: str, messages: str, window: float | None, since: float, state: str
) -> None:
    policy = Policy(on_ambiguous=mailers, key_window=window)
    found = fate(Outcome(Verdict.AMBIGUOUS), maybe_taken(since), row(on_ambiguous=messages), policy, NOW)
    assert found.state == state
    recovered = fate_of_recovered(maybe_taken(since), row(on_ambiguous=messages), policy, NOW)
    assert (recovered.state if recovered else "deferred") == state


@given(attempts, fractions, st.floats(min_value=0, max_value=86400), st.floats(min_value=1, max_value=86400))
def test_ambiguous_row_is_due_while_its_key_lives(number: int, jitter: float, since: float, window: float) -> None:
    left = window - KEY_MARGIN - since
    assume(left > 0.001)  # a datetime holds microseconds
    policy = Policy(key_window=window, max_age=None)
    found = fate(Outcome(Verdict.AMBIGUOUS), maybe_taken(since), row(attempts=number), policy, NOW, lambda: jitter)
    assert found.due_at is not None
    delay = (found.due_at - NOW).total_seconds()
    assert delay <= left / 3 + 1e-6
    assert delay <= policy.delay(number, lambda: jitter) + 1e-6


@pytest.mark.parametrize(("on_ambiguous", "state"), [("hold", "held"), ("resend", "deferred")])
def test_live_key_does_not_protect_what_was_taken_under_the_one_before_it(on_ambiguous: str, state: str) -> None:
    policy = Policy(on_ambiguous=on_ambiguous, key_window=900)
    for used in (None, ago(60)):
        delivery = Delivery(maybe_taken_since=ago(2000), key_used_since=used)
        assert policy.holds("", delivery, NOW) is (on_ambiguous == "hold")
        assert fate(Outcome(Verdict.AMBIGUOUS), delivery, row(), policy, NOW).state == state


def test_row_is_due_while_the_key_that_it_has_now_lives() -> None:
    delivery = Delivery(maybe_taken_since=ago(2000), key_used_since=ago(600))
    found = fate(Outcome(Verdict.AMBIGUOUS), delivery, row(attempts=9), Policy(key_window=900), NOW, lambda: 1.0)
    assert found.due_at == NOW + timedelta(seconds=(900 - KEY_MARGIN - 600) / 3)


def test_refused_row_does_not_hurry_for_its_key() -> None:
    policy = Policy(key_window=60)
    found = fate(Outcome(Verdict.REFUSED), maybe_taken(0), row(attempts=7), policy, NOW, lambda: 1.0)
    assert found.due_at == NOW + timedelta(seconds=3600)


@pytest.mark.parametrize(
    ("facts", "policy", "reason"),
    [
        pytest.param({}, {}, None, id="sent now"),
        pytest.param({"attempts": 9, "lost": 1}, {"max_attempts": 3}, None, id="its worker may have begun nothing"),
        pytest.param({"waits_since": NOW - timedelta(days=9)}, {}, None, id="nor does age count before it was sent"),
        pytest.param({"lost": schedule.HELD_AFTER - 1}, {}, None, id="there when workers died, and perhaps why"),
        pytest.param({"lost": schedule.HELD_AFTER}, {}, schedule.LOST_TOO_OFTEN, id="there each time"),
        pytest.param({}, {"on_ambiguous": "hold"}, schedule.AMBIGUOUS, id="may have been taken"),
    ],
)
def test_recovered_row_is(facts: dict[str, Any], policy: dict[str, Any], reason: str | None) -> None:
    found = fate_of_recovered(maybe_taken(0), row(**facts), Policy(**policy), NOW)
    assert (found and (found.state, found.reason)) == (reason and ("held", reason))


@pytest.mark.parametrize(("lost", "state"), [(0, "failed"), (1, "deferred")])
def test_claims_without_a_result_are_no_attempts(lost: int, state: str) -> None:
    facts = row(attempts=3, lost=lost)
    assert fate(Outcome(Verdict.REFUSED), Delivery(), facts, Policy(max_attempts=3), NOW).state == state
