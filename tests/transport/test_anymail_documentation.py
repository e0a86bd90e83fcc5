"""Anymail's documentation shows how to retry: a ``urllib3.Retry`` made from seven settings, on an adapter of requests'.

Whoever has that in their project keeps the settings and changes the back end's path. So each setting, by its name,
has to do here what it does there: that many requests meet the same faults, and the waits are the same formula.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import anymail.backends.mandrill
import pytest
import requests
import urllib3
from django.conf import settings

from anymail_retry.delivery import Delivery
from anymail_retry.testing import (
    Fault,
    LocalEsp,
    ResetAfterRequest,
    Rule,
    Stall,
    Status,
    TlsErrorAfterRequest,
)

from .clock import FakeClock
from .mail import Retrying, backend, failure, message, send

if TYPE_CHECKING:
    from collections.abc import Iterator


class AsDocumented(anymail.backends.mandrill.EmailBackend):  # type: ignore[misc]  # Anymail has no annotations
    """What the documentation means."""

    def create_session(self) -> requests.Session:
        session: requests.Session = super().create_session()
        retry = urllib3.Retry(
            total=settings.EMAIL_TOTAL_RETRIES,
            connect=settings.EMAIL_CONNECT_RETRIES,
            read=settings.EMAIL_READ_RETRIES,
            status=settings.EMAIL_HTTP_STATUS_RETRIES,
            other=settings.EMAIL_OTHER_RETRIES,
            allowed_methods=None,
            status_forcelist=settings.EMAIL_HTTP_STATUS_RETRYABLE,
            backoff_factor=settings.EMAIL_RETRY_BACKOFF_FACTOR,
        )
        session.mount("https://", requests.adapters.HTTPAdapter(max_retries=retry))
        return session


class Refused(NamedTuple):
    """Stands in for a fault: nobody listens."""


class Untrusted(NamedTuple):
    """Stands in for a fault: nobody vouches for the ESP."""


CASES: dict[str, Any] = {
    "everything bounded by total alone": {},
    "total 0": {"EMAIL_TOTAL_RETRIES": 0},
    "total 1": {"EMAIL_TOTAL_RETRIES": 1},
    "total None, each kind bounded by itself": {
        "EMAIL_TOTAL_RETRIES": None,
        "EMAIL_CONNECT_RETRIES": 1,
        "EMAIL_READ_RETRIES": 2,
        "EMAIL_HTTP_STATUS_RETRIES": 3,
        "EMAIL_OTHER_RETRIES": 1,
    },
    "connect 0": {"EMAIL_CONNECT_RETRIES": 0},
    "connect 2": {"EMAIL_CONNECT_RETRIES": 2},
    "connect more than total": {"EMAIL_CONNECT_RETRIES": 9},
    "read False": {"EMAIL_READ_RETRIES": False},
    "read 0": {"EMAIL_READ_RETRIES": 0},
    "read 2": {"EMAIL_READ_RETRIES": 2},
    "status 0": {"EMAIL_HTTP_STATUS_RETRIES": 0},
    "status 1": {"EMAIL_HTTP_STATUS_RETRIES": 1},
    "other 0": {"EMAIL_OTHER_RETRIES": 0},
    "other 2": {"EMAIL_OTHER_RETRIES": 2},
    "503 not listed": {"EMAIL_HTTP_STATUS_RETRYABLE": [429, 500]},
    "no status listed": {"EMAIL_HTTP_STATUS_RETRYABLE": []},
    "listed as a set": {"EMAIL_HTTP_STATUS_RETRYABLE": {503}},
}

ALWAYS = [
    pytest.param([Rule(ResetAfterRequest())], id="reset"),
    pytest.param([Rule(Status(503))], id="503"),
    pytest.param([Rule(Status(503, retry_after=1))], id="503 with Retry-After"),
    pytest.param([Rule(Status(422))], id="422"),
    pytest.param([Refused()], id="refused"),
    pytest.param([Untrusted()], id="untrusted certificate"),
    pytest.param([Rule(Stall())], id="read timeout"),
    pytest.param([Rule(TlsErrorAfterRequest())], id="TLS error"),
    pytest.param([Status(503), ResetAfterRequest(), Status(503), TlsErrorAfterRequest()], id="one after the other"),
]


@pytest.fixture
def connects() -> Iterator[list[Any]]:
    """The addresses to which sockets were connected, refused or not."""
    seen: list[Any] = []
    _watching.append(seen)
    yield seen
    _watching.remove(seen)


_watching: list[list[Any]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        for seen in _watching:
            seen.append(args[1])


sys.addaudithook(_audit)  # there is no way to take one off again


@pytest.mark.parametrize("faults", ALWAYS)
@pytest.mark.parametrize("changed", CASES.values(), ids=CASES)
def test_each_setting_makes_as_many_tries_as_in_the_documentation(
    changed: dict[str, Any],
    faults: list[Any],
    esp: LocalEsp,
    settings: Any,
    connects: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {
        "EMAIL_TOTAL_RETRIES": 3,
        "EMAIL_CONNECT_RETRIES": None,
        "EMAIL_READ_RETRIES": None,
        "EMAIL_HTTP_STATUS_RETRIES": None,
        "EMAIL_OTHER_RETRIES": None,
        "EMAIL_HTTP_STATUS_RETRYABLE": [503],
        "EMAIL_RETRY_BACKOFF_FACTOR": 0,
        **changed,
    }
    for name, value in given.items():
        setattr(settings, name, value)
    # Short where every answer stalls, so that a busy machine's slowness changes nothing.
    options = {**esp.options(), "requests_timeout": (30, 0.05 if faults == [Rule(Stall())] else 30)}
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the waits of the documented way

    def tries(sender: Any) -> int:
        esp.reset()
        # Where nothing is answered, a busy server may see a try only after its client has given it up.
        not_answered = isinstance(faults[0], Refused | Untrusted) or faults == [Rule(Stall())]
        if isinstance(faults[0], Refused):
            esp.stop_listening()
        elif isinstance(faults[0], Untrusted):
            monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
        else:
            esp.script(*faults)
        connects.clear()
        try:
            send(sender)
        except Exception:  # which one is for another test
            pass
        return connects.count((esp.host, esp.port)) if not_answered else len(esp.requests)

    retrying = Retrying(**options, retry_deadline=None)
    retrying.retry_clock = FakeClock()
    documented = tries(AsDocumented(**options))
    assert documented > 0
    assert tries(retrying) == documented


FACTORS = [0, 0.1, 1, 7]
WAITS = [
    pytest.param([ResetAfterRequest()] * 5, id="errors"),
    pytest.param([TlsErrorAfterRequest()] * 5, id="TLS errors"),
    pytest.param([ResetAfterRequest(), *[Status(503)] * 4], id="an error first"),
]


def documented_waits(count: int, **options: Any) -> list[float]:
    retry = urllib3.Retry(total=None, allowed_methods=None, **options)
    waits = []
    for _ in range(count):
        retry = retry.increment("POST", "/", error=urllib3.exceptions.ProtocolError())
        waits.append(retry.get_backoff_time())
    return waits


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("faults", WAITS)
def test_the_waits_are_urllib3s_formula(esp: LocalEsp, clock: FakeClock, faults: list[Fault], factor: float) -> None:
    esp.script(*faults)
    retries = {"total_retries": 9, "read_retries": None, "other_retries": None, "http_status_retryable": [503]}
    sender = backend(esp, clock, **retries, retry_backoff_factor=factor, retry_backoff_max=20, retry_backoff_jitter=0)
    waited = [attempt.waited for attempt in send(sender).retry_history]
    assert waited == [*documented_waits(5, backoff_factor=factor, backoff_max=20), None]


@pytest.mark.parametrize("factor", FACTORS)
def test_but_after_an_answer_without_retry_after_the_first_wait_is_one_factor(
    esp: LocalEsp, clock: FakeClock, factor: float
) -> None:
    """The one difference: urllib3 asks an ESP that just refused again at once."""
    esp.script(*[Status(503)] * 5)
    retries = {"total_retries": 9, "http_status_retryable": [503], "retry_deadline": None}
    sender = backend(esp, clock, **retries, retry_backoff_factor=factor, retry_backoff_max=20, retry_backoff_jitter=0)
    waited = [attempt.waited for attempt in send(sender).retry_history]
    at_once, *others = documented_waits(5, backoff_factor=factor, backoff_max=20)
    assert at_once == 0
    assert waited == [factor, *others, None]


def test_the_jitter_is_urllib3s(esp: LocalEsp, clock: FakeClock) -> None:
    faults = [ResetAfterRequest()] * 5
    esp.script(*faults)
    options = {"backoff_factor": 1, "backoff_max": 100, "backoff_jitter": 3}
    random.seed(17)
    expected = documented_waits(5, **options)
    random.seed(17)
    sender = backend(
        esp,
        clock,
        total_retries=9,
        read_retries=None,
        retry_deadline=None,
        **{f"retry_{name}": value for name, value in options.items()},
    )
    waited = [attempt.waited for attempt in send(sender).retry_history]
    assert waited == [*expected, None]
    assert waited[0] == 0
    assert waited[1] > 2


def test_the_esps_words_reach_the_caller_when_the_retries_are_used_up(esp: LocalEsp, clock: FakeClock) -> None:
    """The second difference: as documented, they end in a ``RetryError`` without status and body."""
    esp.script(Rule(Status(503)))
    error = failure(backend(esp, clock, http_status_retryable=[503]))
    assert error.status_code == 503
    assert error.response.json()["name"] == "ServiceUnavailable"


def test_unset_settings_are_not_urllib3s_defaults(esp: LocalEsp, clock: FakeClock) -> None:
    """Ten retries of anything, as ``Retry()`` has it, would send the ambiguous twice."""
    sender = backend(esp, clock)
    for fault, tries in ((ResetAfterRequest(), 1), (TlsErrorAfterRequest(), 1), (Status(500), 1), (Status(429), 4)):
        esp.script(Rule(fault))
        before = len(esp.requests)
        sender.deliver(message(), Delivery())
        assert len(esp.requests) - before == tries
