"""Our ``urllib3.Retry``: the same rules, plus a record of every attempt, a deadline, and waits by an injected clock."""

from __future__ import annotations

import email.utils
import io
import logging
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import urllib3
from urllib3.connectionpool import ConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError, MaxRetryError, ProtocolError, ResponseError
from urllib3.response import BaseHTTPResponse, HTTPResponse

from ..conf import Unset
from ..delivery import KEY_MARGIN, Delivery
from ..log import get_logger
from ..verdict import PHASE_VERDICT, Answer, Attempt, EspFacts, Phase, Verdict, judge_answer, phase_of
from .clock import Clock
from .policy import RetryPolicy
from .timeout import SHORTEST_ATTEMPT

if TYPE_CHECKING:
    from typing_extensions import Self

logger = get_logger("transport")

#: Seconds; no Retry-After means more than this (it also keeps the arithmetic finite).
LONGEST_RETRY_AFTER = 366 * 24 * 3600.0


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a ``Retry-After`` header: a number, also a decimal one, or an HTTP date.

    RFC 9110, 10.2.3 knows whole seconds and dates; decimals are sent all the same, and urllib3 loses the answer over
    them. None for whatever is neither.

    :param now: seconds since the epoch.
    """
    if value is None:
        return None
    if re.fullmatch(r"\s*[0-9]+(\.[0-9]*)?\s*", value, re.ASCII):
        seconds = float(value)
    else:
        parsed = email.utils.parsedate_tz(value)
        if parsed is None:
            return None
        try:
            seconds = email.utils.mktime_tz(parsed) - now  # a date without a zone is taken for UTC, as RFC 9110 has it
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


@dataclass
class Call:
    """What all tries of one request share."""

    delivery: Delivery
    policy: RetryPolicy
    facts: type[EspFacts] | EspFacts
    esp_name: str
    clock: Clock
    #: By the clock's ``monotonic()``; None: no deadline.
    ends_at: float | None = None
    #: Seconds without which no further attempt is begun.
    shortest_attempt: float = SHORTEST_ATTEMPT
    #: The response whose attempt was recorded last, and its body as it came if it had to be read to judge it.
    last_response: BaseHTTPResponse | None = None
    last_body: bytes | None = None

    def __post_init__(self) -> None:
        spec, delivery, now = self.facts.idempotency, self.delivery, self.clock.monotonic()
        self.key_is_live = spec is not None and delivery.key_is_live(spec.window)
        # A redirect makes a call of its own, and the key is as old as the first.
        began_at = now if delivery.began_at is None else delivery.began_at
        #: Since when the ESP may know the key, by the clock's ``monotonic()``.
        self.key_since = min(began_at, now - delivery.key_age())

    def end(self) -> None:
        """Let go of the response, which by its ``Retry`` knows this call: a circle would keep both until the garbage
        collector comes by."""
        self.last_response = self.last_body = None

    def time_left(self) -> float | None:
        return None if self.ends_at is None else max(self.ends_at - self.clock.monotonic(), 0.0)

    def outlives_its_key(self, wait: float) -> bool:
        """Whether, after a wait, the ESP may no longer recognise a message that it may have taken."""
        spec = self.facts.idempotency
        if spec is None or not self.key_is_live or self.policy.waits_for_reads:
            return False
        maybe_taken = self.delivery.key_used_since is not None or any(
            attempt.verdict is Verdict.AMBIGUOUS for attempt in self.delivery.attempts
        )
        return maybe_taken and self.clock.monotonic() + wait + KEY_MARGIN - self.key_since >= spec.window

    @property
    def statuses_are_the_users(self) -> bool:
        return not isinstance(self.policy.status_forcelist, Unset)

    def failed(self, error: BaseException) -> Attempt:
        """Add an attempt that got no answer to the delivery."""
        phase = phase_of(error) or Phase.SENT
        return self._add(Attempt(phase, PHASE_VERDICT[phase], error=type(error).__name__))

    def answered(self, response: BaseHTTPResponse, answer: Answer, headers: Mapping[str, str]) -> Attempt:
        """Add an attempt that got this answer to the delivery, if it is not there already."""
        if response is self.last_response:
            return self.delivery.attempts[-1]
        self.last_response = response
        return self._add(
            Attempt(
                Phase.ANSWERED,
                judge_answer(answer, self.facts)[0],
                status=answer.status,
                retry_after=parse_retry_after(headers.get("Retry-After"), self.clock.time()),
            )
        )

    def _add(self, attempt: Attempt) -> Attempt:
        self.delivery.attempts.append(attempt)
        if self.delivery.circuit is not None:
            self.delivery.circuit.count(attempt)
        return attempt

    @property
    def is_hopeless(self) -> bool:
        """Others have met the same trouble often enough to say that there is an outage."""
        return self.delivery.circuit is not None and self.delivery.circuit.is_open

    def read(self, response: BaseHTTPResponse) -> Answer:
        """Read an answer that may be tried again to its end.

        Before it is decided whether to go on, so that an end that is slow to come counts against the deadline.
        """
        self.last_body = None
        try:
            self.last_body = response.read(decode_content=False)
            return Answer(response.status, _with_body(response, self.last_body).read(decode_content=True))
        except HTTPError:
            return Answer(response.status)  # a body that breaks says nothing; the status line counts

    def readable(self, response: BaseHTTPResponse) -> BaseHTTPResponse:
        """The response, with its body still to be read even if it was read to judge it."""
        if response is self.last_response and self.last_body is not None:
            self.last_response = _with_body(response, self.last_body)
            return self.last_response
        return response

    def wait(self, seconds: float, tries: int) -> None:
        """Wait before the next try, and say so."""
        attempts = self.delivery.attempts
        attempts[-1] = replace(attempts[-1], waited=seconds)
        logger.warning(
            "%s: %s; waiting %.1f s before try %d%s",
            self.esp_name,
            f"HTTP {attempts[-1].status}" if attempts[-1].status else attempts[-1].error,
            seconds,
            tries + 1,
            "" if self.policy.total is None else f" of {self.policy.total + 1}",
        )
        if seconds > 0:
            self.clock.sleep(seconds)


def _with_body(response: BaseHTTPResponse, body: bytes) -> BaseHTTPResponse:
    """The same response with this body to be read."""
    return HTTPResponse(
        body=io.BytesIO(body),
        headers=response.headers,
        status=response.status,
        version=response.version,
        reason=response.reason,
        preload_content=False,
        retries=response.retries,
    )


class Retry(urllib3.Retry):
    """``urllib3.Retry`` that carries a :class:`Call`. Made per request by :func:`retry_for`."""

    call: Call
    #: Seconds to wait before the next try, drawn when the last one failed.
    next_wait: float = 0.0

    def new(self, **kw: Any) -> Self:
        retry = super().new(**kw)
        retry.call = self.call
        return retry

    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        # urllib3 also tries again 413, 429 and 503 with a Retry-After though the list does not name them. That is
        # what a user who wrote the list may count on; a list of ours is meant as it stands.
        return super().is_retry(method, status_code, has_retry_after and self.call.statuses_are_the_users)

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: BaseHTTPResponse | None = None,
        error: Exception | None = None,
        _pool: ConnectionPool | None = None,
        _stacktrace: TracebackType | None = None,
    ) -> Self:
        if response is None:
            attempt = self.call.failed(error or HTTPError())
        else:
            by_hand = _pool is None  # by a test tool, which reads the answer itself
            answer = Answer(response.status) if by_hand else self.call.read(response)
            attempt = self.call.answered(response, answer, response.headers)
        return self._next(attempt, method, url, response, error, _pool, _stacktrace)

    def after(self, attempt: Attempt) -> Self | None:
        """What is left after an attempt that was not made by urllib3's pool; None: there is to be no other."""
        response: BaseHTTPResponse | None = None
        error: Exception | None = None
        if attempt.status is not None:
            refused = attempt.verdict is Verdict.REFUSED and not self.call.statuses_are_the_users
            if not refused and not self.is_retry("POST", attempt.status, attempt.retry_after is not None):
                return None
            response = HTTPResponse(status=attempt.status)
        elif attempt.phase is Phase.SENT:
            error = ProtocolError(attempt.error)
        elif attempt.phase is Phase.CONNECT:
            error = ConnectTimeoutError(attempt.error)
        else:
            return None
        try:
            return self._next(attempt, "POST", None, response, error)
        except HTTPError:
            return None

    def _next(
        self,
        attempt: Attempt,
        method: str | None,
        url: str | None,
        response: BaseHTTPResponse | None,
        error: Exception | None,
        pool: ConnectionPool | None = None,
        stacktrace: TracebackType | None = None,
    ) -> Self:
        """urllib3's own ``increment()``, for an attempt that is recorded."""
        retry = super().increment(method, url, response, error, pool, stacktrace)
        retry.next_wait = attempt.retry_after or retry.get_backoff_time()
        if retry._ends_here(attempt):
            reason = error or ResponseError(ResponseError.SPECIFIC_ERROR.format(status_code=attempt.status))
            raise MaxRetryError(pool, url, reason) from reason  # type: ignore[arg-type]  # as urllib3 itself does
        return retry

    def _ends_here(self, attempt: Attempt) -> bool:
        """Whether to give up though the counts would allow another try."""
        if attempt.retry_after is not None and attempt.retry_after > self.call.policy.retry_after_max:
            return True
        hopeless = attempt.phase is Phase.ANSWERED and attempt.verdict in (Verdict.BLOCKED, Verdict.PERMANENT)
        if hopeless and not self.call.statuses_are_the_users:
            return True  # the body said what the status did not
        if self.call.outlives_its_key(self.next_wait) or self.call.is_hopeless:
            return True
        left = self.call.time_left()
        return left is not None and left < self.next_wait + self.call.shortest_attempt

    def get_backoff_time(self) -> float:
        """urllib3's formula, but for the first wait after an answer without a Retry-After: one factor and jitter.

        urllib3 tries again at once the first time. That suits a broken connection; an ESP that just said "too many
        requests" would only say it again.
        """
        if len(self.history) == 1 and self.history[0].status and self.call.delivery.attempts[-1].retry_after is None:
            jitter = random.random() * self.backoff_jitter  # noqa: S311  # spreads load, guards no secret
            return min(self.backoff_max, self.backoff_factor + jitter)
        return super().get_backoff_time()

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        self.call.wait(self.next_wait, len(self.history))


def retry_for(call: Call) -> Retry:
    """The ``Retry`` of one request."""
    policy = call.policy
    retry = Retry(
        total=policy.total,
        connect=policy.connect,
        read=policy.reads(key_is_live=call.key_is_live),
        status=policy.status,
        other=policy.other,
        redirect=0,  # redirects are followed above, by requests
        allowed_methods=None,  # any: the default leaves out POST, which is the only one here
        status_forcelist=policy.statuses(call.facts, key_is_live=call.key_is_live),
        backoff_factor=policy.backoff_factor,
        backoff_max=policy.backoff_max,
        backoff_jitter=policy.backoff_jitter,
        raise_on_status=False,  # else the ESP's own words are lost
    )
    retry.call = call
    return retry


def _not_ours(record: logging.LogRecord) -> bool:
    """Drops urllib3's own warning of a retry of ours, which says less than the one that we log."""
    return not (isinstance(record.args, tuple) and record.args and isinstance(record.args[0], Retry))


logging.getLogger("urllib3.connectionpool").addFilter(_not_ours)
