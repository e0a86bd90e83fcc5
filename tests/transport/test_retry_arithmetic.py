"""How often, how long, until when: for any settings and any faults, by a clock that only moves when it is told to.

urllib3's own pool drives our ``Retry`` and timeouts here; only the connection is not a socket's: it takes as long as
the example says, up to the timeout that it is given. What the wire itself shows is at the end.
"""

from __future__ import annotations

import io
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
import urllib3
from hypothesis import example, given
from hypothesis import strategies as st
from urllib3.connection import HTTPConnection
from urllib3.exceptions import EmptyPoolError, HTTPError, NewConnectionError
from urllib3.response import HTTPResponse

from anymail_retry.conf import UNSET, Unset
from anymail_retry.delivery import Delivery
from anymail_retry.idempotency import IdempotencyKey
from anymail_retry.testing import Latency, LocalEsp, Ok, Redirect, ResetAfterRequest, Rule, Stall, Status
from anymail_retry.testing.certificate import authority
from anymail_retry.transport.policy import RetryPolicy
from anymail_retry.transport.pools import _pool_class
from anymail_retry.transport.retry import Call, retry_for
from anymail_retry.transport.timeout import SHORTEST_ATTEMPT, DeadlineTimeout
from anymail_retry.verdict import Answer, EspFacts, Verdict

from .clock import FakeClock, Takes
from .mail import Retrying, backend, failure, message, network_error, send
from .servers import read_request, serving

NEVER = 1000.0  # seconds, where no timeout is set
EPSILON = 1e-6  # what floats lose


class WithKeys(EspFacts):
    idempotency = IdempotencyKey(place="header", name="Idempotency-Key", window=3600, grammar=".+")


# --- any settings, any faults ---


@dataclass(frozen=True)
class Try:
    """What one attempt meets, and which part of its timeouts it takes."""

    #: ``busy``: no socket gets free; ``connect``: no connection; ``timeout``: the connect timeout; ``send``: the upload
    #: hangs; ``reset``; ``tls``: TLS breaks after the request; ``stall``: the read timeout; a status, 307: another hop.
    fault: str | int
    queueing: float = 0.0
    connecting: float = 0.0
    sending: float = 0.0
    reading: float = 0.0
    #: Seconds from the status line to the end of the body, which no timeout bounds.
    ending: float = 0.0
    retry_after: float | None = None


@dataclass
class Script:
    """The attempts that are made, in order; when they are used up, a success."""

    clock: FakeClock
    tries: Iterator[Try]
    #: When the tries began that came as far as a socket.
    began: list[float] = field(default_factory=list)
    #: What they met, hop by hop.
    hops: list[list[Try]] = field(default_factory=list)
    present: Try = field(default_factory=lambda: Try(200))

    @property
    def met(self) -> list[Try]:
        return [met for hop in self.hops for met in hop]

    def take(self, part: float, timeout: float | None) -> None:
        assert timeout is None or timeout >= 0
        self.clock.now += part * (NEVER if timeout is None else timeout)


class ScriptedConnection(HTTPConnection):
    """Never touches a socket; takes its time by the script."""

    script: Script

    def connect(self) -> None:
        script = self.script
        script.began.append(script.clock.now)
        self.met = script.present
        assert self.timeout is None or self.timeout > 0
        script.hops[-1].append(self.met)
        if self.met.fault == "timeout":
            script.take(1.0, self.timeout)
            raise TimeoutError
        script.take(self.met.connecting, self.timeout)
        if self.met.fault == "connect":
            raise NewConnectionError(self, "refused")

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.met.fault == "send":
            self.script.take(1.0, self.timeout)
            raise TimeoutError
        self.script.take(self.met.sending, self.timeout)

    @property
    def is_closed(self) -> bool:
        return False

    def getresponse(self) -> HTTPResponse:
        if self.met.fault == "stall":
            self.script.take(1.0, self.timeout)
            raise TimeoutError
        self.script.take(self.met.reading, self.timeout)
        if self.met.fault == "reset":
            raise ConnectionResetError
        if self.met.fault == "tls":
            raise ssl.SSLError("bad record")
        assert isinstance(self.met.fault, int)
        headers = {} if self.met.retry_after is None else {"Retry-After": f"{self.met.retry_after:.3f}"}
        return HTTPResponse(SlowBody(self.script, self.met.ending), headers, self.met.fault, preload_content=False)


class SlowBody(io.BytesIO):
    """Takes its time to end."""

    def __init__(self, script: Script, seconds: float) -> None:
        super().__init__(b"{}")
        self._script = script
        self._seconds = seconds

    def read(self, size: int | None = -1) -> bytes:
        self._script.clock.now += self._seconds
        self._seconds = 0.0
        return super().read(size)


class ScriptedPool(urllib3.HTTPConnectionPool):
    """As for TLS, where urllib3 has the connection stand before it makes the request; and where others are busy too."""

    def _get_conn(self, timeout: float | None = None) -> Any:
        script: Script = self.ConnectionCls.script  # type: ignore[attr-defined]  # of ScriptedConnection
        script.present = next(script.tries, Try(200))
        if script.present.fault == "busy":
            script.take(1.0, timeout)
            raise EmptyPoolError(self, "busy")
        script.take(script.present.queueing, timeout)
        return super()._get_conn(timeout)

    def _validate_conn(self, conn: Any) -> None:
        conn.connect()


@dataclass
class Made:
    """What came of one call."""

    script: Script
    #: The last hop's.
    call: Call
    answer: Any
    error: HTTPError | None

    @property
    def ended(self) -> float:
        return self.script.clock.now

    @property
    def is_busy(self) -> bool:
        """It ended because no socket got free."""
        return self.script.present.fault == "busy"


def make(
    policy: RetryPolicy, requests_timeout: tuple[float | None, float | None], tries: list[Try], *, has_key: bool = False
) -> Made:
    clock = FakeClock()
    deadline = policy.deadline
    assert deadline is None or isinstance(deadline, float)
    delivery = Delivery()
    script = Script(clock, iter(tries))
    connection = type("Connection", (ScriptedConnection,), {"script": script})
    pool = _pool_class(ScriptedPool, connection, 15.0)("esp.example")
    while True:
        call = Call(delivery, policy, WithKeys if has_key else EspFacts, "ESP", clock, deadline)
        script.hops.append([])
        answer = error = None
        try:
            answer = pool.urlopen(
                "POST",
                "/",
                retries=retry_for(call),
                timeout=DeadlineTimeout(*requests_timeout, call.ends_at, clock),
                redirect=False,
                assert_same_host=False,
                preload_content=False,
            )
            call.answered(answer, Answer(answer.status), answer.headers)  # as the adapter does
        except HTTPError as raised:
            error = raised
        if answer is None or answer.status != 307:
            return Made(script, call, answer, error)


def seconds(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False).map(lambda value: round(value, 3))


counts = st.none() | st.integers(0, 5)
policies = st.builds(
    RetryPolicy,
    total=counts,
    connect=counts,
    read=st.just(UNSET) | st.just(False) | counts,
    status=counts,
    other=counts,
    status_forcelist=st.just(UNSET) | st.frozensets(st.sampled_from([413, 429, 500, 503])),
    backoff_factor=seconds(0, 10),
    backoff_max=seconds(0, 30),
    backoff_jitter=seconds(0, 5),
    retry_after_max=seconds(0, 60),
    deadline=st.none() | seconds(0.1, 90),
)
timeouts = st.tuples(st.none() | seconds(0.1, 40), st.none() | seconds(0.1, 40))
parts = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
attempts = st.builds(
    Try,
    fault=st.sampled_from(
        ["busy", "connect", "timeout", "send", "reset", "tls", "stall", 307, 413, 429, 500, 503, 422, 200]
    ),
    queueing=parts,
    connecting=parts,
    sending=parts,
    reading=parts,
    ending=st.just(0.0) | seconds(0, 20),
    retry_after=st.none() | seconds(0, 90),
)
calls = st.tuples(policies, timeouts, st.lists(attempts, max_size=12), st.booleans())


@given(calls)
@example((RetryPolicy(total=None, connect=None, deadline=2.0), (5.0, 30.0), [Try("timeout")] * 9, False))
@example((RetryPolicy(deadline=25.0, read=None), (5.0, 30.0), [Try("stall", 1.0, 1.0)] * 9, False))
@example((RetryPolicy(deadline=0.1), (5.0, 30.0), [Try("stall", 1.0, 1.0)], False))
def test_waits_and_attempts_together_never_pass_the_deadline(example: Any) -> None:
    policy, requests_timeout, tries, has_key = example
    made = make(policy, requests_timeout, tries, has_key=has_key)
    if policy.deadline is not None:
        # The first attempt of a hop has its second, however little is left; and bodies end when they end.
        bodies = sum(met.ending for met in made.script.met)
        hops = (len(made.script.hops) - 1) * SHORTEST_ATTEMPT
        assert made.ended <= max(policy.deadline, SHORTEST_ATTEMPT) + hops + bodies + EPSILON


@given(calls)
def test_no_more_tries_than_total_and_one(example: Any) -> None:
    policy, requests_timeout, tries, has_key = example
    made = make(policy, requests_timeout, tries, has_key=has_key)
    for hop in made.script.hops:
        assert len(hop) <= (len(tries) if policy.total is None else policy.total) + 1


@given(calls)
@example((RetryPolicy(deadline=None, read=9, total=9), (5.0, 30.0), [Try("tls")] * 9, True))
def test_each_kind_of_failure_is_tried_again_no_more_often_than_its_own_count(example: Any) -> None:
    policy, requests_timeout, tries, has_key = example
    made = make(policy, requests_timeout, tries, has_key=has_key)
    unset = None if has_key else 0
    kinds = [
        (policy.connect, ("connect", "timeout")),
        (policy.status, (413, 429, 500, 503)),
        (policy.other, ("tls",)),
        (unset if isinstance(policy.read, Unset) else policy.read, ("send", "reset", "stall")),
    ]
    for hop in made.script.hops:
        faults = [met.fault for met in hop[: len(hop) if made.is_busy and hop is made.script.hops[-1] else -1]]
        for limit, kind in kinds:
            if limit is not None:
                assert sum(fault in kind for fault in faults) <= limit


@given(calls)
@example((RetryPolicy(deadline=None), (5.0, 30.0), [Try(429)] * 9, False))
@example((RetryPolicy(deadline=None), (5.0, 30.0), [Try(429, retry_after=7.5)] * 9, False))
@example((RetryPolicy(deadline=None), (5.0, 30.0), [Try(429, retry_after=0.0)] * 9, False))
@example((RetryPolicy(deadline=None), (5.0, 30.0), [Try("connect")] * 9, False))
@example((RetryPolicy(deadline=None), (5.0, 30.0), [Try(429), Try("busy")], False))
@example((RetryPolicy(deadline=None), (5.0, 30.0), [Try(429), Try(307), Try(429), Try("timeout")], False))
def test_every_wait_is_as_long_as_it_has_to_be_and_is_followed_by_a_try(example: Any) -> None:
    policy, requests_timeout, tries, has_key = example
    made = make(policy, requests_timeout, tries, has_key=has_key)
    attempts = iter(made.call.delivery.attempts)
    for hop in made.script.hops:
        *retried, last = [next(attempts) for _ in hop] or [None]
        if made.is_busy and hop is made.script.hops[-1]:
            retried.append(last)  # it waited, and then there was no socket
        elif last is not None:
            assert last.waited is None, "it waited, and then gave up"
        for number, attempt in enumerate(retried):
            if attempt is None:  # there was no socket for the first try
                continue
            assert attempt.waited is not None
            if attempt.retry_after:
                assert attempt.waited == attempt.retry_after <= policy.retry_after_max
                continue
            at_once = number == 0 and (attempt.status is None or attempt.retry_after == 0)
            factor = 0.0 if at_once else policy.backoff_factor * 2**number
            jitter = 0.0 if at_once else policy.backoff_jitter
            assert min(policy.backoff_max, factor) <= attempt.waited <= min(policy.backoff_max, factor + jitter)
    assert next(attempts, None) is None
    waits = [attempt.waited for attempt in made.call.delivery.attempts if attempt.waited]
    assert made.script.clock.waits == waits


@given(calls)
def test_only_the_first_try_of_a_hop_may_be_shorter_than_a_second(example: Any) -> None:
    policy, requests_timeout, tries, has_key = example
    made = make(policy, requests_timeout, tries, has_key=has_key)
    began = iter(made.script.began)
    for hop in made.script.hops:
        for _, at in list(zip(hop, began, strict=False))[1:]:
            assert policy.deadline is None or policy.deadline - at >= SHORTEST_ATTEMPT - EPSILON


@given(calls)
def test_what_may_have_been_taken_is_tried_again_only_where_it_is_allowed(example: Any) -> None:
    policy, requests_timeout, tries, has_key = example
    made = make(policy, requests_timeout, tries, has_key=has_key)
    attempts = made.call.delivery.attempts
    for attempt in attempts if made.is_busy else attempts[:-1]:
        assert attempt.verdict is not Verdict.DELIVERED
        if attempt.error == "SSLError":
            assert policy.other != 0
        elif attempt.verdict is Verdict.AMBIGUOUS and not has_key:
            asked_for = policy.read if attempt.status is None else policy.status_forcelist
            assert asked_for is not UNSET


@given(calls)
def test_an_answer_always_comes_through(example: Any) -> None:
    """Used-up retries lose neither the status line nor the rest."""
    policy, requests_timeout, tries, has_key = example
    made = make(policy, requests_timeout, tries, has_key=has_key)
    fault = made.script.present.fault
    if isinstance(fault, int):
        assert made.error is None
        assert made.answer.status == fault
    else:
        assert made.error is not None


# --- examples of the same ---


def test_every_part_of_an_attempt_leaves_time_for_the_next() -> None:
    clock = FakeClock()
    timeout = DeadlineTimeout(5.0, 30.0, 10.0, clock)
    assert timeout.connect_timeout == 5.0
    assert timeout.send_timeout == 9.0
    assert timeout.read_timeout == 10.0
    clock.now = 8.0
    assert timeout.connect_timeout == 1.0
    assert timeout.send_timeout == 1.0
    assert timeout.read_timeout == 2.0


def test_an_attempt_that_begins_too_late_has_its_second_all_the_same() -> None:
    clock = FakeClock()
    timeout = DeadlineTimeout(5.0, 30.0, 0.1, clock)
    assert (timeout.connect_timeout, timeout.send_timeout, timeout.read_timeout) == (0.5, 0.5, 1.0)
    clock.now = 60.0
    assert timeout.clone().read_timeout == 1.0


def test_a_connection_is_not_waited_for_beyond_the_last_second() -> None:
    clock = FakeClock()
    timeout = DeadlineTimeout(5.0, 30.0, 10.0, clock)
    assert timeout.pool_timeout == 9.0
    clock.now = 9.5
    assert timeout.pool_timeout == 0.0


def test_without_a_deadline_the_timeouts_are_the_users() -> None:
    timeout = DeadlineTimeout(5.0, None, None, FakeClock())
    assert (timeout.connect_timeout, timeout.send_timeout, timeout.read_timeout, timeout.pool_timeout) == (
        5.0,
        None,
        None,
        None,
    )


def test_each_try_starts_with_fresh_timeouts() -> None:
    clock = FakeClock()
    timeout = DeadlineTimeout(5.0, 30.0, 40.0, clock)
    first = timeout.clone()
    clock.now = 35.0
    assert first.clone().read_timeout == 5.0


@pytest.mark.parametrize("wrong", [0, -1, True, "5"])
def test_a_wrong_timeout_is_refused_as_urllib3_refuses_it(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"[Tt]imeout"):
        DeadlineTimeout(wrong, 30.0, None, FakeClock())


def test_an_answer_that_is_slow_to_end_counts_against_the_deadline() -> None:
    """Between its status line and its last byte eight of nine seconds pass: no wait may begin then."""
    made = make(RetryPolicy(deadline=9.0), (5.0, 30.0), [Try(429, ending=8.0)])
    assert made.script.clock.waits == []
    assert made.answer.status == 429


def test_an_upload_has_the_read_timeout_and_not_the_short_connect_timeout() -> None:
    made = make(RetryPolicy(deadline=None), (5.0, 30.0), [Try("send")])
    assert made.ended == 30.0


# --- on the wire ---


def test_a_stalled_esp_is_given_up_at_the_deadline(esp: LocalEsp) -> None:
    esp.script(Rule(Stall()))
    began = time.monotonic()
    sender = backend(esp, retry_deadline=1.5, read_retries=50, total_retries=50, requests_timeout=600)
    assert network_error(sender) is requests.ReadTimeout
    assert time.monotonic() - began < 300


def test_the_users_read_retries_have_no_deadline_of_ours(esp: LocalEsp, clock: FakeClock) -> None:
    """One read timeout would use it up."""
    esp.script(*[Takes(40, clock, ResetAfterRequest())] * 3)
    sent = send(backend(esp, clock, read_retries=3))
    assert [attempt.error for attempt in sent.retry_history] == ["ProtocolError"] * 3 + [""]


def test_the_deadline_is_anymails_timeout_where_there_is_no_queue(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Rule(Takes(12, clock, Status(429))))
    failure(backend(esp, clock, total_retries=9))
    assert len(esp.requests) == 3, "30 s"
    esp.script(Rule(Takes(12, clock, Status(429))))
    failure(backend(esp, clock, total_retries=9, requests_timeout=(4, 12)))
    assert len(esp.requests) == 3 + 2, "4 + 12 s"
    esp.script(Rule(Takes(12, clock, Status(429))))
    failure(backend(esp, clock, total_retries=4, requests_timeout=None))
    assert len(esp.requests) == 3 + 2 + 5, "none"
    esp.script(Rule(Takes(12, clock, Status(429))))
    failure(backend(esp, clock, total_retries=4, requests_timeout=(4, None)))
    assert len(esp.requests) == 3 + 2 + 5 + 5, "none: an answer may take for ever"


@pytest.mark.parametrize("code", [307, 308])
def test_a_redirect_is_no_new_deadline(esp: LocalEsp, clock: FakeClock, code: int) -> None:
    esp.script(Takes(8, clock, Redirect(code)), Rule(Status(429)))
    failure(backend(esp, clock, retry_deadline=9.5))
    assert [request.status for request in esp.requests] == [code, 429]


def test_a_connect_timeout_is_not_the_read_timeout(esp: LocalEsp) -> None:
    began = time.monotonic()
    esp.black_hole()
    sender = backend(esp, connect_timeout=0.2, total_retries=0, requests_timeout=600)
    assert network_error(sender) is requests.ConnectTimeout
    assert time.monotonic() - began < 300
    esp.start_listening()
    esp.script(Latency(1.5))
    send(backend(esp, connect_timeout=1, total_retries=9, requests_timeout=600))
    assert len(esp.requests) == 1


@pytest.mark.parametrize("requests_timeout", [pytest.param((0.2, 600), id="a pair"), pytest.param(0.2, id="shorter")])
def test_anymails_timeout_may_be_the_connect_timeout(esp: LocalEsp, requests_timeout: Any) -> None:
    """A pair names its own; and a whole attempt in so short a time does not connect for longer."""
    began = time.monotonic()
    esp.black_hole()
    sender = backend(esp, connect_timeout=600, total_retries=0, requests_timeout=requests_timeout, retry_deadline=None)
    assert network_error(sender) is requests.ConnectTimeout
    assert time.monotonic() - began < 300


def test_no_timeout_of_anymails_still_has_a_connect_timeout(esp: LocalEsp) -> None:
    began = time.monotonic()
    esp.black_hole()
    sender = backend(esp, connect_timeout=0.2, total_retries=0, requests_timeout=None)
    assert network_error(sender) is requests.ConnectTimeout
    assert time.monotonic() - began < 60, "Linux gives up after two minutes by itself"


@pytest.mark.parametrize("requests_timeout", [600, (600, 600), None, (None, 600), (600, None)])
def test_every_form_of_anymails_timeout_sends(esp: LocalEsp, requests_timeout: Any) -> None:
    esp.script(Status(429, retry_after=0), Ok())
    send(backend(esp, requests_timeout=requests_timeout))
    assert len(esp.requests) == 2


def test_a_slow_upload_is_not_cut_off_by_the_connect_timeout(esp: LocalEsp) -> None:
    """urllib3 sends under the connect timeout, and a large attachment over a slow line takes longer than ours."""

    def read_late(sock: socket.socket) -> None:
        with authority().server_context("127.0.0.1").wrap_socket(sock, server_side=True) as connection:
            time.sleep(2.5)  # the connect timeout and more, in which the sockets' buffers stay full
            read_request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 48\r\n\r\n")
            connection.sendall(b'[{"email":"to@example.com","status":"sent"}]    ')

    large = message()
    large.attach("large.bin", b"\0" * 20_000_000, "application/octet-stream")
    with serving(read_late) as port:
        options = {**esp.options(), "api_url": f"https://127.0.0.1:{port}/"}
        sender = Retrying(**options, connect_timeout=1, total_retries=0, requests_timeout=600)
        assert sender.send_messages([large]) == 1
