"""From settings to a policy, and from a policy to what is tried again."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from anymail_retry import RetryPolicy
from anymail_retry.conf import UNSET
from anymail_retry.delivery import Delivery
from anymail_retry.idempotency import IdempotencyKey
from anymail_retry.transport.retry import Call, retry_for
from anymail_retry.verdict import EspFacts

from .clock import FakeClock


class Facts(EspFacts):
    refused_statuses = frozenset({429, 503})
    ambiguous_statuses = frozenset({500, 502})


class WithKeys(Facts):
    idempotency = IdempotencyKey(place="header", name="Idempotency-Key", window=3600, grammar=".+")


#: Setting, what a user may write, the policy's field, its value there.
FIELDS = [
    ("EMAIL_TOTAL_RETRIES", 7, "total", 7),
    ("EMAIL_TOTAL_RETRIES", None, "total", None),
    ("EMAIL_CONNECT_RETRIES", 7, "connect", 7),
    ("EMAIL_READ_RETRIES", 7, "read", 7),
    ("EMAIL_READ_RETRIES", None, "read", None),
    ("EMAIL_READ_RETRIES", False, "read", False),
    ("EMAIL_HTTP_STATUS_RETRIES", 7, "status", 7),
    ("EMAIL_OTHER_RETRIES", 7, "other", 7),
    ("EMAIL_OTHER_RETRIES", None, "other", None),
    ("EMAIL_HTTP_STATUS_RETRYABLE", [503, 429, 503], "status_forcelist", frozenset({429, 503})),
    ("EMAIL_HTTP_STATUS_RETRYABLE", [], "status_forcelist", frozenset()),
    ("EMAIL_HTTP_STATUS_RETRYABLE", None, "status_forcelist", frozenset()),
    ("EMAIL_RETRY_BACKOFF_FACTOR", 7, "backoff_factor", 7.0),
    ("EMAIL_RETRY_BACKOFF_MAX", timedelta(minutes=1), "backoff_max", 60.0),
    ("EMAIL_RETRY_BACKOFF_JITTER", 0, "backoff_jitter", 0.0),
    ("EMAIL_RETRY_AFTER_MAX", 7, "retry_after_max", 7.0),
    ("EMAIL_RETRY_DEADLINE", 7, "deadline", 7.0),
    ("EMAIL_RETRY_DEADLINE", None, "deadline", None),
    ("EMAIL_CONNECT_TIMEOUT", 0.5, "connect_timeout", 0.5),
]


@pytest.mark.parametrize(("name", "written", "field", "value"), FIELDS)
def test_a_setting_is_one_field(settings: Any, name: str, written: Any, field: str, value: Any) -> None:
    setattr(settings, name, written)
    assert RetryPolicy.from_settings() == dataclasses.replace(RetryPolicy(), **{field: value})


def test_every_field_has_its_setting() -> None:
    assert {field for _, _, field, _ in FIELDS} == {field.name for field in dataclasses.fields(RetryPolicy)}


def test_without_settings_the_policy_is_the_default() -> None:
    assert RetryPolicy.from_settings() == RetryPolicy()


def test_each_esp_may_have_its_own(settings: Any) -> None:
    settings.EMAIL_TOTAL_RETRIES = 1
    settings.ANYMAIL = {"UNISENDER_GO_TOTAL_RETRIES": 2}
    assert RetryPolicy.from_settings("Unisender Go").total == 2
    assert RetryPolicy.from_settings("Mandrill").total == 1
    assert RetryPolicy.from_settings("Unisender Go", {"total_retries": 3}).total == 3


@pytest.mark.parametrize("name", ["EMAIL_TOTAL_RETRIES", "EMAIL_CONNECT_RETRIES"])
@pytest.mark.parametrize("wrong", [False, True, -1, 1.5, "3"])
def test_what_would_let_errors_of_urllib3s_own_escape_is_refused(settings: Any, name: str, wrong: Any) -> None:
    """``False`` is legal in urllib3, and raises there what no caller of requests expects."""
    setattr(settings, name, wrong)
    with pytest.raises(ImproperlyConfigured, match=name):
        RetryPolicy.from_settings()


def test_a_policy_does_not_change() -> None:
    policy = RetryPolicy()
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.total = 1  # type: ignore[misc]  # that is the point
    assert policy == RetryPolicy()
    assert hash(policy) == hash(RetryPolicy())


@pytest.mark.parametrize(
    ("read", "without_key", "under_key"),
    [
        pytest.param(UNSET, False, None, id="unset: none, or bounded by total"),
        pytest.param(0, 0, 0, id="0 is 0"),
        pytest.param(False, False, False, id="False is False"),
        pytest.param(2, 2, 2, id="a count is that count"),
        pytest.param(None, None, None, id="None is a value"),
    ],
)
def test_reads(read: Any, without_key: Any, under_key: Any) -> None:
    policy = RetryPolicy(read=read)
    assert policy.reads(key_is_live=False) is without_key
    assert policy.reads(key_is_live=True) is under_key


@pytest.mark.parametrize(
    ("forcelist", "without_key", "under_key"),
    [
        pytest.param(UNSET, {429, 503}, {429, 500, 502, 503}, id="unset: what this ESP means by them"),
        pytest.param(frozenset({418}), {418}, {418}, id="a list is that list"),
        pytest.param(frozenset(), set(), set(), id="none is a list too"),
    ],
)
def test_statuses(forcelist: Any, without_key: set[int], under_key: set[int]) -> None:
    policy = RetryPolicy(status_forcelist=forcelist)
    assert policy.statuses(Facts, key_is_live=False) == without_key
    assert policy.statuses(Facts, key_is_live=True) == under_key


@pytest.mark.parametrize(
    ("read", "waits"), [(UNSET, False), (0, False), (False, False), (1, True), (None, True)], ids=str
)
def test_waits_for_reads(read: Any, waits: bool) -> None:
    assert RetryPolicy(read=read).waits_for_reads is waits


def retry(facts: type[EspFacts], policy: RetryPolicy, delivery: Delivery | None = None) -> Any:
    return retry_for(Call(delivery or Delivery(), policy, facts, "ESP", FakeClock()))


def test_the_policy_is_urllib3s_retry() -> None:
    policy = RetryPolicy(
        total=1,
        connect=2,
        read=3,
        status=4,
        other=5,
        status_forcelist=frozenset({418}),
        backoff_factor=6.0,
        backoff_max=7.0,
        backoff_jitter=8.0,
    )
    made = retry(Facts, policy)
    assert (made.total, made.connect, made.read, made.status, made.other) == (1, 2, 3, 4, 5)
    assert (made.backoff_factor, made.backoff_max, made.backoff_jitter) == (6.0, 7.0, 8.0)
    assert made.status_forcelist == {418}
    assert made.is_retry("POST", 418)


def test_ambiguous_failures_are_tried_again_under_a_live_key_only() -> None:
    none, live = retry(Facts, RetryPolicy()), retry(WithKeys, RetryPolicy())
    assert (none.read, live.read) == (False, None)
    assert (none.is_retry("POST", 500), live.is_retry("POST", 500)) == (False, True)
    assert (none.is_retry("POST", 503), live.is_retry("POST", 503)) == (True, True)


def test_a_key_that_the_esp_has_forgotten_is_not_live() -> None:
    from datetime import datetime, timezone

    delivery = Delivery(key_used_since=datetime.now(timezone.utc) - timedelta(seconds=3601))
    assert retry(WithKeys, RetryPolicy(), delivery).read is False
