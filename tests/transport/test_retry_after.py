"""``Retry-After`` in every legal and illegal form: what it parses to, and what a call then does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from anymail.exceptions import AnymailRequestsAPIError

from anymail_retry.delivery import Delivery
from anymail_retry.testing import LocalEsp, Rule, Status
from anymail_retry.transport.retry import LONGEST_RETRY_AFTER, parse_retry_after
from anymail_retry.verdict import Verdict

from .clock import RFC_MOMENT, FakeClock
from .mail import backend, failure, message, send

if TYPE_CHECKING:
    from collections.abc import Callable

FORMS = [
    pytest.param(None, None, id="no header"),
    pytest.param("0", 0.0, id="at once"),
    pytest.param("7", 7.0, id="whole seconds"),
    pytest.param("007", 7.0, id="leading zeros"),
    pytest.param("0.5", 0.5, id="decimal: not legal, and sent all the same"),
    pytest.param("2.", 2.0, id="decimal point alone"),
    pytest.param(" 7 ", 7.0, id="spaces around it"),
    pytest.param("\t7", 7.0, id="a tab before it"),
    pytest.param("3600", 3600.0, id="an hour"),
    pytest.param("9" * 400, LONGEST_RETRY_AFTER, id="more than a float holds"),
    pytest.param("Sun, 06 Nov 1994 08:49:47 GMT", 10.0, id="IMF-fixdate, in 10 s"),
    pytest.param("Sunday, 06-Nov-94 08:49:47 GMT", 10.0, id="RFC 850 date, in 10 s"),
    pytest.param("Sun Nov  6 08:49:47 1994", 10.0, id="asctime date, in 10 s: it is in UTC too"),
    pytest.param("Sun, 06 Nov 1994 10:49:47 +0200", 10.0, id="a date with an offset: not legal, and clear"),
    pytest.param("Sun, 06 Nov 1994 08:49:47 -0000", 10.0, id="a date of unknown zone"),
    pytest.param("Sun, 06 Nov 1994 08:49:37 GMT", 0.0, id="a date that is now"),
    pytest.param("Sun, 06 Nov 1994 08:00:00 GMT", 0.0, id="a date that is past"),
    pytest.param("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_RETRY_AFTER, id="the end of the calendar"),
    pytest.param("Fri, 31 Dec 99999 23:59:59 GMT", None, id="beyond the calendar"),
    pytest.param("Sun, 06 Foo 1994 08:49:47 GMT", None, id="no such month"),
    pytest.param("-5", None, id="negative"),
    pytest.param("+5", None, id="signed"),
    pytest.param("1e3", None, id="exponent"),
    pytest.param("0x10", None, id="hexadecimal"),
    pytest.param("1,5", None, id="decimal comma"),
    pytest.param("5, 5", None, id="sent twice"),
    pytest.param("5 seconds", None, id="with a unit"),
    pytest.param(".5", None, id="no digit before the point"),
    pytest.param("\N{ARABIC-INDIC DIGIT FIVE}", None, id="digits of another script"),
    pytest.param("nan", None, id="not a number"),
    pytest.param("inf", None, id="infinite"),
    pytest.param("soon", None, id="garbage"),
    pytest.param("", None, id="empty"),
    pytest.param("   ", None, id="blank"),
]


@pytest.mark.parametrize(("value", "seconds"), FORMS)
def test_form(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, RFC_MOMENT) == seconds


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
def test_a_date_means_the_same_in_every_time_zone(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert parse_retry_after("Sun Nov  6 08:49:47 1994", RFC_MOMENT) == 10.0
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        pytest.param(3, 3.0, id="whole seconds"),
        pytest.param("0.25", 0.25, id="decimal"),
        pytest.param("Sun, 06 Nov 1994 08:49:43 GMT", 6.0, id="date"),
        pytest.param("0", 0.0, id="at once: urllib3's formula, which does not wait the first time"),
        pytest.param("Sun, 06 Nov 1994 08:00:00 GMT", 0.0, id="past: the same"),
        pytest.param("soon", 4.0, id="garbage: as if there were none"),
        pytest.param(None, 4.0, id="none: one factor"),
        pytest.param(10, 10.0, id="the longest that is waited for"),
    ],
)
def test_the_wait_is_what_the_esp_asked_for(esp: LocalEsp, clock: FakeClock, value: str | None, wait: float) -> None:
    esp.script(Status(429, retry_after=value))
    sent = send(backend(esp, clock, retry_backoff_factor=4, retry_backoff_jitter=0))
    assert [attempt.waited for attempt in sent.retry_history] == [wait, None]
    assert len(esp.requests) == 2


def test_a_wait_of_nothing_is_not_repeated_at_once_for_ever(esp: LocalEsp, clock: FakeClock) -> None:
    """``Retry-After: 0`` on every answer would have all tries made in an instant; urllib3 backs off, and so do we."""
    esp.script(Rule(Status(429, retry_after=0)))
    options = {"total_retries": 3, "retry_backoff_factor": 1, "retry_backoff_jitter": 0, "retry_deadline": None}
    outcome = backend(esp, clock, **options).deliver(message(), Delivery())
    assert [attempt.waited for attempt in outcome.attempts] == [0.0, 2.0, 4.0, None]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("3600", id="an hour"),
        pytest.param("10.5", id="just too long"),
        pytest.param("Sun, 06 Nov 1994 09:49:37 GMT", id="a date in an hour"),
    ],
)
def test_a_longer_wait_ends_the_call_at_once(esp: LocalEsp, clock: FakeClock, value: str) -> None:
    esp.script(Rule(Status(429, body={"name": "RequestLimitExceeded"}, retry_after=value)))
    error = failure(backend(esp, clock))
    assert clock.waits == []
    assert len(esp.requests) == 1
    assert isinstance(error, AnymailRequestsAPIError)
    assert error.status_code == 429
    assert error.response.json() == {"name": "RequestLimitExceeded"}


def test_a_longer_wait_is_the_outcomes_retry_after(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Rule(Status(429, body={"name": "RequestLimitExceeded"}, retry_after=3600)))
    outcome = backend(esp, clock).deliver(message(), Delivery())
    assert (outcome.verdict, outcome.http_status, outcome.retry_after) == (Verdict.REFUSED, 429, 3600.0)
    assert "RequestLimitExceeded" in outcome.answer


def test_a_wait_that_the_deadline_has_no_room_for_ends_the_call_at_once(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Rule(Status(429, retry_after=9)))
    outcome = backend(esp, clock, retry_deadline=9.5).deliver(message(), Delivery())
    assert clock.waits == []
    assert (outcome.verdict, outcome.retry_after) == (Verdict.REFUSED, 9.0)


def test_the_limit_is_a_setting(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Status(429, retry_after=60))
    send(backend(esp, clock, retry_after_max=60, retry_deadline=None))
    assert clock.waits == [60.0]


@pytest.mark.parametrize("status", [413, 429, 503])
def test_a_list_of_the_users_is_urllib3s_list(esp: LocalEsp, clock: FakeClock, status: int) -> None:
    """urllib3 also tries these three again, though not listed, where they come with a Retry-After."""
    esp.script(Status(status, retry_after=1))
    send(backend(esp, clock, http_status_retryable=[500]))
    assert clock.waits == [1.0]


@pytest.mark.parametrize("status", [413, 503])
def test_a_list_of_ours_is_meant_as_it_stands(esp: LocalEsp, clock: FakeClock, status: int) -> None:
    """A Retry-After says nothing of whether the message was taken."""
    esp.script(Status(status, retry_after=1))
    assert failure(backend(esp, clock)).status_code == status
    assert len(esp.requests) == 1


def test_retry_after_is_parsed_in_every_try(local_esp: Callable[..., LocalEsp], clock: FakeClock) -> None:
    esp = local_esp("mandrill")
    esp.script(Status(429, retry_after=1), Status(429, retry_after="0.5"), Status(429, retry_after=2))
    sent = send(backend(esp, clock))
    assert clock.waits == [1.0, 0.5, 2.0]
    assert [(attempt.retry_after, attempt.waited) for attempt in sent.retry_history] == [
        (1.0, 1.0),
        (0.5, 0.5),
        (2.0, 2.0),
        (None, None),
    ]
