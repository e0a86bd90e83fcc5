"""The circuit breaker, by a clock that only moves when it is told to; and on the wire."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
import requests
from anymail.exceptions import AnymailAPIError, AnymailRequestsAPIError
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from anymail_retry import RetryMixin, breakers, reset_breakers
from anymail_retry.backends.mandrill import EmailBackend as WithQueue
from anymail_retry.exceptions import CircuitOpen
from anymail_retry.signals import breaker_changed
from anymail_retry.testing import AcceptThenStall, LocalEsp, Ok, Rule, ScriptedEsp, Stall, Status
from anymail_retry.transport.breaker import RESET_FIRST, RESET_MAX, SPREAD, WITHIN, Breaker, breaker, is_outage
from anymail_retry.verdict import Attempt, Phase, Verdict

from .clock import RFC_MOMENT, FakeClock
from .mail import backend, failure, message, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

    from anymail_retry.transport.breaker import BreakerState

DOWN = Attempt(Phase.CONNECT, Verdict.REFUSED, error="NewConnectionError")
HEALTHY = Attempt(Phase.ANSWERED, Verdict.DELIVERED, status=200)

#: Seconds that surely bring the first probe, and that surely do not.
SURELY_DUE, SURELY_EARLY = RESET_FIRST * (1 + SPREAD), RESET_FIRST * (1 - SPREAD) - 0.001


@pytest.fixture(autouse=True)
def own_breakers() -> Iterator[None]:
    reset_breakers()
    yield
    reset_breakers()


@pytest.fixture
def changes() -> Iterator[list[BreakerState]]:
    """What the signal told."""
    told: list[BreakerState] = []

    def receiver(state: BreakerState, **kwargs: Any) -> None:
        told.append(state)

    breaker_changed.connect(receiver)
    yield told
    breaker_changed.disconnect(receiver)


@pytest.fixture
def circuit(clock: FakeClock) -> Breaker:
    return Breaker("default", "api.example.com", 5, clock)


def fail(circuit: Breaker, times: int = 5) -> None:
    for _ in range(times):
        circuit.count(DOWN)


# --- What counts ---


@pytest.mark.parametrize(
    ("attempt", "counts"),
    [
        pytest.param(DOWN, True, id="no connection"),
        pytest.param(Attempt(Phase.SENT, Verdict.AMBIGUOUS, error="ReadTimeoutError"), True, id="read timeout"),
        *[
            pytest.param(Attempt(Phase.ANSWERED, Verdict.AMBIGUOUS, status=status), True, id=f"{status}")
            for status in (502, 503, 504)
        ],
        pytest.param(Attempt(Phase.SENT, Verdict.AMBIGUOUS, error="ProtocolError"), False, id="reset: one message's"),
        pytest.param(Attempt(Phase.CERTIFICATE, Verdict.BLOCKED, error="SSLError"), False, id="certificate: no outage"),
        pytest.param(Attempt(Phase.ANSWERED, Verdict.REFUSED, status=429), False, id="429: has its Retry-After"),
        pytest.param(Attempt(Phase.ANSWERED, Verdict.AMBIGUOUS, status=500), False, id="500: may be one message's"),
        pytest.param(Attempt(Phase.ANSWERED, Verdict.BLOCKED, status=401), False, id="401: the account's"),
        pytest.param(Attempt(Phase.ANSWERED, Verdict.PERMANENT, status=422), False, id="422: one message's"),
        pytest.param(HEALTHY, False, id="success"),
    ],
)
def test_outages_count_and_nothing_else(circuit: Breaker, attempt: Attempt, counts: bool) -> None:
    assert is_outage(attempt) is counts
    for _ in range(5):
        circuit.count(attempt)
    assert (circuit.state().state == "open") is counts


def test_opens_after_five_in_a_row(circuit: Breaker) -> None:
    fail(circuit, 4)
    assert (circuit.state().state, circuit.state().failures) == ("closed", 4)
    assert circuit.admit() is False
    fail(circuit, 1)
    assert (circuit.state().state, circuit.state().failures) == ("open", 5)


@pytest.mark.parametrize("status", [200, 401, 422, 429, 500])
def test_any_answer_begins_the_count_anew(circuit: Breaker, status: int) -> None:
    fail(circuit, 4)
    circuit.count(Attempt(Phase.ANSWERED, Verdict.DELIVERED, status=status))
    fail(circuit, 4)
    assert circuit.state().state == "closed"


def test_failures_that_are_spread_out_do_not_open_it(circuit: Breaker, clock: FakeClock) -> None:
    for _ in range(20):
        fail(circuit, 1)
        clock.now += WITHIN / 4 + 0.1
    assert circuit.state().state == "closed"


# --- While it is open ---


def test_says_since_when_and_until_when(circuit: Breaker, clock: FakeClock) -> None:
    fail(circuit)
    state = circuit.state()
    assert state.since == datetime.fromtimestamp(RFC_MOMENT, timezone.utc)
    assert state.until is not None
    with pytest.raises(CircuitOpen) as caught:
        circuit.admit()
    for part in ("api.example.com", "since 08:49:37 UTC", f"after {state.until:%H:%M:%S} UTC", "default"):
        assert part in str(caught.value)
    assert RESET_FIRST * (1 - SPREAD) <= caught.value.retry_after <= RESET_FIRST * (1 + SPREAD)
    clock.now += 10
    with pytest.raises(CircuitOpen) as later:
        circuit.admit()
    assert later.value.retry_after == pytest.approx(caught.value.retry_after - 10)


def test_resets_are_spread(clock: FakeClock) -> None:
    def retry_after() -> float:
        circuit = Breaker("default", "api.example.com", 1, clock)
        fail(circuit, 1)
        with pytest.raises(CircuitOpen) as caught:
            circuit.admit()
        return caught.value.retry_after

    waits = [retry_after() for _ in range(200)]
    assert RESET_FIRST * (1 - SPREAD) <= min(waits) < RESET_FIRST < max(waits) <= RESET_FIRST * (1 + SPREAD)


def test_failures_while_it_is_open_do_not_move_the_probe(circuit: Breaker, clock: FakeClock) -> None:
    """Sends that had begun before it opened still come to their ends."""
    fail(circuit)
    until = circuit.state().until
    clock.now += 5
    fail(circuit, 3)
    assert circuit.state().until == until


# --- Half open ---


def test_one_thread_of_many_is_the_probe(circuit: Breaker, clock: FakeClock) -> None:
    fail(circuit)
    clock.now += SURELY_EARLY
    with pytest.raises(CircuitOpen):
        circuit.admit()
    clock.now = SURELY_DUE
    admitted: list[bool] = []
    refused: list[CircuitOpen] = []
    start = threading.Barrier(16)

    def ask() -> None:
        start.wait(30)
        try:
            admitted.append(circuit.admit())
        except CircuitOpen as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert admitted == [True]
    assert len(refused) == 15
    assert circuit.state().state == "half-open"


@pytest.mark.parametrize("status", [200, 401, 422, 429, 500])
def test_any_answer_to_the_probe_closes_it(circuit: Breaker, clock: FakeClock, status: int) -> None:
    fail(circuit)
    clock.now += SURELY_DUE
    assert circuit.admit() is True
    circuit.count(Attempt(Phase.ANSWERED, Verdict.DELIVERED, status=status))
    circuit.end_probe(tried=True)
    assert (circuit.state().state, circuit.state().failures) == ("closed", 0)
    assert circuit.admit() is False


def test_answer_to_a_send_that_began_before_closes_it(circuit: Breaker) -> None:
    fail(circuit)
    circuit.count(HEALTHY)
    assert circuit.admit() is False


def test_each_failed_probe_doubles_the_reset_up_to_five_minutes(circuit: Breaker, clock: FakeClock) -> None:
    fail(circuit)
    for expected in (60.0, 120.0, 240.0, RESET_MAX, RESET_MAX):
        clock.now += RESET_MAX * (1 + SPREAD)
        assert circuit.admit() is True
        circuit.count(DOWN)
        circuit.end_probe(tried=True)
        with pytest.raises(CircuitOpen) as caught:
            circuit.admit()
        assert expected * (1 - SPREAD) <= caught.value.retry_after <= expected * (1 + SPREAD)


def test_reset_starts_small_again_after_a_recovery(circuit: Breaker, clock: FakeClock) -> None:
    fail(circuit)
    clock.now += SURELY_DUE
    circuit.admit()
    circuit.count(DOWN)
    circuit.end_probe(tried=True)
    clock.now += 2 * SURELY_DUE
    circuit.admit()
    circuit.count(HEALTHY)
    circuit.end_probe(tried=True)
    fail(circuit)
    with pytest.raises(CircuitOpen) as caught:
        circuit.admit()
    assert caught.value.retry_after <= SURELY_DUE


def test_probe_that_tells_nothing_makes_room_for_another(circuit: Breaker, clock: FakeClock) -> None:
    """Its message was cancelled, say, before anything was sent."""
    fail(circuit)
    clock.now += SURELY_DUE
    circuit.admit()
    until = circuit.state().until
    circuit.end_probe(tried=False)
    assert (circuit.state().state, circuit.state().until) == ("open", until)
    assert circuit.admit() is True


# --- What is seen of it ---


def test_each_change_is_told_once(
    circuit: Breaker, clock: FakeClock, changes: list[BreakerState], caplog: pytest.LogCaptureFixture
) -> None:
    fail(circuit, 7)
    clock.now += SURELY_DUE
    circuit.admit()
    circuit.count(DOWN)
    circuit.end_probe(tried=True)
    clock.now += 2 * SURELY_DUE
    circuit.admit()
    circuit.count(HEALTHY)
    circuit.end_probe(tried=True)
    circuit.count(HEALTHY)
    assert [(change.mailer, change.host, change.state) for change in changes] == [
        ("default", "api.example.com", "open"),
        ("default", "api.example.com", "closed"),
    ]
    opened, closed = (record for record in caplog.records if record.name == "anymail_retry.transport")
    assert (opened.levelno, closed.levelno) == (logging.ERROR, logging.WARNING)
    assert "api.example.com failed 5 times in a row; circuit breaker open, next try after" in opened.getMessage()
    assert "api.example.com answers again; circuit breaker closed" in closed.getMessage()


def test_receiver_that_raises_changes_nothing(circuit: Breaker) -> None:
    def receiver(**kwargs: Any) -> None:
        raise LookupError("a mistake in a receiver")

    breaker_changed.connect(receiver)
    try:
        fail(circuit)
    finally:
        breaker_changed.disconnect(receiver)
    assert circuit.state().state == "open"


def test_receiver_may_ask_the_breaker(circuit: Breaker) -> None:
    asked: list[str] = []

    def receiver(**kwargs: Any) -> None:
        asked.append(circuit.state().state)

    breaker_changed.connect(receiver)
    try:
        fail(circuit)
    finally:
        breaker_changed.disconnect(receiver)
    assert asked == ["open"]


def test_breakers_are_by_mailer_and_host(clock: FakeClock) -> None:
    fail(breaker("default", "api.example.com", 5, clock))
    breaker("default", "eu.example.com", 5, clock)
    breaker("bulk", "api.example.com", 5, clock)
    assert sorted((state.mailer, state.host, state.state) for state in breakers()) == [
        ("bulk", "api.example.com", "closed"),
        ("default", "api.example.com", "open"),
        ("default", "eu.example.com", "closed"),
    ]


def test_changed_settings_close_all(clock: FakeClock) -> None:
    """A test must not meet the outage of the one before."""
    fail(breaker("default", "api.example.com", 5, clock))
    with override_settings(EMAIL_TOTAL_RETRIES=1):
        assert breakers() == []


@pytest.mark.parametrize("start", [LocalEsp, LocalEsp.spawn], ids=["in this process", "in its own"])
def test_a_local_esp_leaves_no_outage_to_the_next_test(
    start: Callable[..., ScriptedEsp], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states() -> list[str]:
        return [state.state for state in breakers()]

    with start("mandrill") as esp:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", esp.ca_file)
        esp.script(Rule(Status(502)))
        failure(backend(esp, clock, total_retries=0, breaker_failures=1))
        assert states() == ["open"]
        esp.reset()
        assert states() == []
        esp.script(Rule(Status(502)))
        failure(backend(esp, clock, total_retries=0, breaker_failures=1))
        assert states() == ["open"]
    assert states() == []


FORKING = """
import os
from anymail_retry.transport.breaker import breaker, breakers
from anymail_retry.verdict import Attempt, Phase, Verdict

circuit = breaker("default", "api.example.com", 1)
circuit.count(Attempt(Phase.CONNECT, Verdict.REFUSED))
if (child := os.fork()) == 0:
    circuit = breaker("default", "api.example.com", 1)
    print("child:", circuit.state().state, len(breakers()), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent:", *(state.state for state in breakers()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child_starts_closed() -> None:
    ended = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.stdout.splitlines(), ended.stderr.splitlines()[1:]) == (["child: closed 1", "parent: open"], [])


# --- On the wire ---


def test_is_off_without_the_queue(esp: LocalEsp, clock: FakeClock) -> None:
    sender = backend(esp, clock, total_retries=0)
    esp.script(Rule(Status(503)))
    for _ in range(8):
        assert isinstance(failure(sender), AnymailRequestsAPIError)
    assert len(esp.requests) == 8
    assert breakers() == []


def test_open_one_refuses_before_the_request(esp: LocalEsp, clock: FakeClock) -> None:
    sender = backend(esp, clock, total_retries=0, breaker_failures=3)
    esp.script(Rule(Status(502)))
    for _ in range(3):
        failure(sender)
    error = failure(sender)
    assert isinstance(error, CircuitOpen)
    assert isinstance(error, AnymailAPIError)
    assert "since" in str(error)
    assert len(esp.requests) == 3
    (state,) = breakers()
    assert state.host == f"127.0.0.1:{esp.port}"
    assert (state.state, state.failures) == ("open", 3)


def test_open_one_leaves_a_history_of_no_attempts(esp: LocalEsp, clock: FakeClock) -> None:
    sender = backend(esp, clock, total_retries=0, breaker_failures=1)
    esp.script(Rule(Status(502)))
    failure(sender)
    sent = message()
    with pytest.raises(CircuitOpen):
        sender.send_messages([sent])
    assert sent.retry_history == ()


def test_send_gives_up_as_soon_as_it_is_open(esp: LocalEsp, clock: FakeClock) -> None:
    sender = backend(esp, clock, breaker_failures=2, total_retries=9, http_status_retryable=[503])
    esp.script(Rule(Status(503)))
    error = failure(sender)
    assert isinstance(error, AnymailRequestsAPIError)  # the ESP's, as if the retries had been used up
    assert error.status_code == 503
    assert len(esp.requests) == 2


def test_probe_is_one_attempt_and_its_success_closes(esp: LocalEsp, clock: FakeClock) -> None:
    sender = backend(esp, clock, breaker_failures=4)
    esp.script(Rule(Status(503), times=5))
    failure(backend(esp, clock, breaker_failures=4, http_status_retryable=[503]))
    assert len(esp.requests) == 4
    clock.now += SURELY_DUE
    failure(sender)  # the probe, which has no retries
    assert len(esp.requests) == 5
    assert [state.state for state in breakers()] == ["open"]
    clock.now += 2 * SURELY_DUE
    send(sender)
    assert len(esp.requests) == 6
    assert [state.state for state in breakers()] == ["closed"]


def test_probe_waits_no_longer_than_the_connect_timeout(esp: LocalEsp, clock: FakeClock) -> None:
    """Not for the 30 seconds of a read timeout: a sync worker would be blocked for most of an outage."""
    failing = backend(esp, clock, total_retries=0, breaker_failures=1)
    esp.script(Status(502), Rule(Stall()))
    failure(failing)
    clock.now += SURELY_DUE
    error = failure(backend(esp, clock, breaker_failures=1, connect_timeout=1))
    assert isinstance(error, requests.ReadTimeout)
    assert "read timeout=1.0)" in str(error)
    esp.release()


def test_probe_that_closes_the_breaker_is_one_attempt_all_the_same(esp: LocalEsp, clock: FakeClock) -> None:
    failing = backend(esp, clock, total_retries=0, breaker_failures=1)
    esp.script(Status(502), Rule(Status(429)))
    failure(failing)
    clock.now += SURELY_DUE
    sender = backend(esp, clock, breaker_failures=1, retry_backoff_factor=0, retry_backoff_jitter=0)
    assert failure(sender).status_code == 429
    assert [state.state for state in breakers()] == ["closed"]
    assert len(esp.requests) == 2
    failure(sender)
    assert len(esp.requests) == 2 + 4, "no probe any more"


def test_sends_beside_the_probe_are_refused(esp: LocalEsp, clock: FakeClock) -> None:
    failing = backend(esp, clock, total_retries=0, breaker_failures=1)
    esp.script(Status(502), AcceptThenStall(), Rule(Ok()))
    failure(failing)
    clock.now += SURELY_DUE
    probe = threading.Thread(target=send, args=(backend(esp, clock, breaker_failures=1, connect_timeout=30), "probe"))
    probe.start()
    esp.wait_for(stalled=1)
    assert [state.state for state in breakers()] == ["half-open"]
    assert isinstance(failure(backend(esp, clock, breaker_failures=1)), CircuitOpen)
    esp.release()
    probe.join(30)
    assert [state.state for state in breakers()] == ["closed"]
    send(backend(esp, clock, breaker_failures=1))
    assert len(esp.ledger) == 2


def test_is_on_where_what_fails_is_queued(
    esp: LocalEsp, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, settings: SettingsWrapper
) -> None:
    monkeypatch.setattr(RetryMixin, "retry_clock", clock)
    settings.ANYMAIL = esp.settings()
    assert WithQueue()._breaker().limit == 5
    assert WithQueue(fallback_queue=False)._breaker() is None
    assert WithQueue(**esp.options())._breaker() is None  # an account of its own


@pytest.mark.parametrize(("value", "limit"), [(2, 2), (None, None)])
def test_setting_says_how_many_failures(
    esp: LocalEsp, settings: SettingsWrapper, value: Any, limit: int | None
) -> None:
    settings.EMAIL_BREAKER_FAILURES = value
    found = WithQueue(**esp.options())._breaker()
    assert (found and found.limit) == limit


@pytest.mark.parametrize("value", [0, -1, "5", True])
def test_wrong_setting_is_named(esp: LocalEsp, settings: SettingsWrapper, value: Any) -> None:
    settings.EMAIL_BREAKER_FAILURES = value
    with pytest.raises(ImproperlyConfigured, match="EMAIL_BREAKER_FAILURES"):
        backend(esp)


def test_probe_that_fails_before_its_request_leaves_its_place_to_the_next(esp: LocalEsp, clock: FakeClock) -> None:
    failing = backend(esp, clock, total_retries=0, breaker_failures=1)
    esp.script(Status(502))
    failure(failing)
    clock.now += SURELY_DUE
    broken = message()
    broken.attach("name.txt", "text", "text/plain")
    broken.metadata = {"what": object()}  # cannot be put into the request
    with pytest.raises(Exception, match="serializ"):
        backend(esp, clock, breaker_failures=1).send_messages([broken])
    send(backend(esp, clock, breaker_failures=1))
    assert [state.state for state in breakers()] == ["closed"]
