"""Idempotency keys on the wire: whose they are, where they stand, and what they hold together."""

from __future__ import annotations

import hashlib
import re
import uuid
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import requests
from anymail.exceptions import AnymailAPIError
from django.utils.module_loading import import_string

from anymail_retry import RetryMixin, close_connections, reset_breakers
from anymail_retry.delivery import Delivery, deliver, new_key
from anymail_retry.exceptions import BodyChanged, InvalidIdempotencyKey
from anymail_retry.idempotency import IdempotencyKey
from anymail_retry.models import QueuedMessage
from anymail_retry.testing import ESPS, AcceptThenDrop, LocalEsp, Redirect, Rule, Stall, Status
from anymail_retry.testing.pytest import local_esp
from anymail_retry.verdict import Verdict
from tests.sites import message
from tests.transport.clock import FakeClock, Takes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp"]  # a fixture

BACKENDS = {esp: import_string(f"anymail_retry.backends.{esp}.EmailBackend") for esp in ESPS}
WITH_KEYS = [esp for esp, backend in BACKENDS.items() if backend.idempotency is not None]
COMPARING = [esp for esp in WITH_KEYS if BACKENDS[esp].idempotency.compares_body]

#: A key that each of them takes.
USERS_KEY = "0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d"


@pytest.fixture(autouse=True)
def once(settings: SettingsWrapper) -> Iterator[None]:
    """Sends are tried once; breakers and connections are nobody else's."""
    settings.EMAIL_TOTAL_RETRIES = 0
    settings.EMAIL_FALLBACK_QUEUE = False
    reset_breakers()
    yield
    close_connections()
    reset_breakers()


@pytest.fixture
def esp(request: pytest.FixtureRequest, local_esp: Callable[..., LocalEsp]) -> LocalEsp:
    return local_esp(request.param)


on_each = pytest.mark.parametrize("esp", WITH_KEYS, indirect=True)
on_comparing = pytest.mark.parametrize("esp", COMPARING, indirect=True)


def backend(esp: LocalEsp, **options: Any) -> Any:
    return BACKENDS[esp.esp](**esp.options(), **options)


def test_there_are_four() -> None:
    assert set(WITH_KEYS) == {"brevo", "resend", "sparkpost", "unisender_go"}
    assert set(COMPARING) == {"resend", "sparkpost"}


# --- A key of our own ---


@on_each
def test_request_carries_the_deliverys_key(esp: LocalEsp) -> None:
    delivery = Delivery()
    assert deliver(backend(esp), message(), delivery).verdict is Verdict.DELIVERED
    assert [request.idempotency_key for request in esp.requests] == [delivery.key]
    assert not delivery.key_from_user


@pytest.mark.parametrize("esp", WITH_KEYS)
def test_own_key_is_in_every_grammar_and_new_each_time(esp: str) -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        BACKENDS[esp].idempotency.check(key)
        assert uuid.UUID(key).version == 4


@on_each
def test_one_message_object_sent_three_times_is_three_mails(esp: LocalEsp) -> None:
    """A key that stayed on the object would swallow the second and the third."""
    sent = message()
    for number in (1, 2, 3):
        sent.to, sent.subject = [f"{number}@example.com"], f"for {number}"
        assert backend(esp).send_messages([sent]) == 1
    assert [accepted.recipients for accepted in esp.ledger] == [(f"{number}@example.com",) for number in (1, 2, 3)]
    assert not hasattr(sent, "idempotency_key")


@on_each
def test_one_message_object_sent_twice_unchanged_is_two_mails(esp: LocalEsp) -> None:
    sent = message()
    assert backend(esp).send_messages([sent]) == backend(esp).send_messages([sent]) == 1
    assert len(esp.ledger) == 2


@on_each
def test_next_attempt_of_a_delivery_is_no_second_mail(esp: LocalEsp) -> None:
    delivery = Delivery()
    esp.script(AcceptThenDrop())
    assert deliver(backend(esp), message(), delivery).verdict is Verdict.AMBIGUOUS
    assert deliver(backend(esp), message(), delivery).verdict is Verdict.DELIVERED
    assert len(esp.ledger) == 1
    assert len(esp.requests) == 2


# --- A key of the user's ---


@on_each
def test_users_key_is_used_and_stays(esp: LocalEsp) -> None:
    sent = message()
    sent.idempotency_key = USERS_KEY
    delivery = Delivery()
    deliver(backend(esp), sent, delivery)
    assert [request.idempotency_key for request in esp.requests] == [USERS_KEY]
    assert (delivery.key, delivery.key_from_user) == (USERS_KEY, True)
    assert sent.idempotency_key == USERS_KEY


@on_each
def test_users_key_may_be_a_uuid(esp: LocalEsp) -> None:
    sent = message()
    sent.idempotency_key = uuid.UUID(USERS_KEY)
    backend(esp).send_messages([sent])
    assert [request.idempotency_key for request in esp.requests] == [USERS_KEY]


@on_each
def test_users_key_makes_one_mail_of_two_sends(esp: LocalEsp) -> None:
    """As of a job that is run again: the second send is a success, though the ESP may call it a duplicate."""
    for _ in range(2):
        sent = message()
        sent.idempotency_key = USERS_KEY
        assert backend(esp).send_messages([sent]) == 1
        assert sent.anymail_status.status <= {"queued", "sent"}
    assert len(esp.ledger) == 1


ANYMAILS_WAYS = [
    pytest.param("brevo", {"headers": {"idempotencyKey": USERS_KEY}}, {}, id="brevo-header"),
    pytest.param("brevo", {"headers": {"idempotencykey": USERS_KEY}}, {}, id="brevo-header of another spelling"),
    pytest.param("brevo", {}, {"headers": {"idempotencyKey": USERS_KEY}}, id="brevo-esp_extra"),
    pytest.param("unisender_go", {}, {"idempotence_key": USERS_KEY}, id="unisender_go-esp_extra"),
]


@pytest.mark.parametrize(("esp", "fields", "extra"), ANYMAILS_WAYS, indirect=["esp"])
def test_key_given_in_anymails_own_way_is_the_users(
    esp: LocalEsp, fields: dict[str, Any], extra: dict[str, Any]
) -> None:
    sent = message(**fields)
    sent.esp_extra = extra
    delivery = Delivery()
    assert deliver(backend(esp), sent, delivery).verdict is Verdict.DELIVERED
    assert [request.idempotency_key for request in esp.requests] == [USERS_KEY]
    assert (delivery.key, delivery.key_from_user) == (USERS_KEY, True)


@pytest.mark.parametrize(("esp", "fields", "extra"), ANYMAILS_WAYS, indirect=["esp"])
def test_key_on_the_message_goes_before_one_given_in_anymails_way(
    esp: LocalEsp, fields: dict[str, Any], extra: dict[str, Any]
) -> None:
    sent = message(**fields)
    sent.esp_extra = extra
    sent.idempotency_key = other = str(uuid.uuid4())
    backend(esp).send_messages([sent])
    assert [request.idempotency_key for request in esp.requests] == [other]


@pytest.mark.parametrize("esp", ["brevo"], indirect=True)
def test_other_headers_keep_their_place_beside_the_key(esp: LocalEsp) -> None:
    backend(esp).send_messages([message(headers={"X-A": "1"})])
    headers = esp.requests[0].json()["headers"]
    assert headers["X-A"] == "1"
    assert set(headers) == {"X-A", "idempotencyKey"}


@pytest.mark.parametrize("esp", ["mandrill"], indirect=True)
def test_esp_without_keys_takes_the_message_as_ever(esp: LocalEsp) -> None:
    sent = message()
    sent.idempotency_key = "order 17"
    assert backend(esp).send_messages([sent]) == 1
    assert b"order 17" not in esp.requests[0].body + esp.requests[0].head


WRONG_KEYS = [
    *((esp, "a\nb", "a line break") for esp in WITH_KEYS),
    *((esp, "k" * 257, "too long") for esp in WITH_KEYS),
    ("brevo", "order-17", "no UUID"),
    ("brevo", USERS_KEY + "0", "more than a UUID"),
    ("unisender_go", "k" * 65, "more than 64 characters"),
    ("sparkpost", "order 17", "a blank"),
    ("resend", "Örder-17", "what no HTTP header carries"),
    ("resend", " order-17", "a blank that HTTP would drop"),
]


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("esp", "key"),
    [pytest.param(esp, key, id=f"{esp}-{why}") for esp, key, why in WRONG_KEYS],
    indirect=["esp"],
)
def test_key_that_the_esp_would_not_take_is_an_error_before_the_request(
    esp: LocalEsp, key: str, settings: SettingsWrapper
) -> None:
    settings.EMAIL_FALLBACK_QUEUE = True
    settings.ANYMAIL = esp.settings()
    sent = message()
    sent.idempotency_key = key
    with pytest.raises(InvalidIdempotencyKey) as caught:
        BACKENDS[esp.esp]().send_messages([sent])
    assert repr(key) in str(caught.value)
    assert BACKENDS[esp.esp].idempotency.grammar in str(caught.value).replace("\\\\", "\\")
    assert esp.requests == []
    assert QueuedMessage.objects.count() == 0


@pytest.mark.parametrize("esp", WITH_KEYS)
def test_grammar_is_a_regular_expression_that_takes_a_uuid(esp: str) -> None:
    assert re.fullmatch(BACKENDS[esp].idempotency.grammar, USERS_KEY)


@pytest.mark.parametrize("esp", ["unisender_go"], indirect=True)
def test_users_key_of_another_type_is_still_the_same_at_the_next_attempt(esp: LocalEsp) -> None:
    """As given in Anymail's own way, where it stands in the payload as a number each time."""
    delivery = Delivery()
    sent = message()
    sent.esp_extra = {"idempotence_key": 17}
    esp.script(AcceptThenDrop())
    assert deliver(backend(esp), sent, delivery).verdict is Verdict.AMBIGUOUS
    since = delivery.key_used_since
    assert since is not None
    esp.script(AcceptThenDrop())
    assert deliver(backend(esp), sent, delivery).verdict is Verdict.AMBIGUOUS
    assert (delivery.key, delivery.key_used_since) == ("17", since)


@on_comparing
def test_new_key_of_the_users_has_no_past(esp: LocalEsp) -> None:
    """What was taken, was taken under another: neither its age nor its body are this one's."""
    delivery = Delivery()
    esp.script(AcceptThenDrop())
    deliver(backend(esp), message("first"), delivery)
    sent = message("second")
    sent.idempotency_key = USERS_KEY
    esp.script(Status(429))
    deliver(backend(esp), sent, delivery)
    assert (delivery.key, delivery.key_used_since) == (USERS_KEY, None)
    assert delivery.body_digest == hashlib.sha256(esp.requests[-1].body).hexdigest()
    assert not delivery.is_protected(3600)


# --- Only while the ESP remembers it ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of the transport."""
    clock = FakeClock()
    monkeypatch.setattr(RetryMixin, "retry_clock", clock)
    return clock


def patient(esp: LocalEsp) -> Any:
    """A back end that would try for an hour."""
    return backend(esp, total_retries=9, retry_deadline=3600, retry_backoff_factor=0, retry_backoff_jitter=0)


def old(seconds: float) -> Delivery:
    """A delivery that may have been taken so long ago."""
    since = datetime.now(timezone.utc) - timedelta(seconds=seconds)
    return Delivery(maybe_taken_since=since, key_used_since=since)


@pytest.mark.parametrize("esp", ["unisender_go"], indirect=True)
@pytest.mark.parametrize(
    ("age", "lasts", "requests"),
    [
        pytest.param(None, 20, 3, id="a new key: at 0, 20 and 40 of 60 seconds"),
        pytest.param(None, 49, 2, id="a request that is begun at 49 arrives in time"),
        pytest.param(None, 50, 1, id="one that is begun at 50 may not"),
        pytest.param(20, 20, 2, id="a key of an earlier call: at 20 and 40"),
        pytest.param(45, 8, 1, id="a key of an earlier call: at 45, and not at 53"),
    ],
)
def test_key_is_relied_on_only_until_shortly_before_the_esp_forgets_it(
    esp: LocalEsp, clock: FakeClock, age: float | None, lasts: float, requests: int
) -> None:
    """Counted from its first use, which may have been in an earlier call."""
    esp.script(Rule(Takes(lasts, clock, AcceptThenDrop())))
    delivery = Delivery() if age is None else old(age)
    key = delivery.key
    assert deliver(patient(esp), message(), delivery).verdict is Verdict.AMBIGUOUS
    assert [request.idempotency_key for request in esp.requests] == [key] * requests
    assert len(esp.ledger) == 1


@pytest.mark.parametrize("esp", ["unisender_go"], indirect=True)
def test_refusal_under_a_key_of_an_earlier_call_is_not_tried_again_after_its_window(
    esp: LocalEsp, clock: FakeClock
) -> None:
    """Whatever this call met: the ESP may have the message since before, and would not recognise it."""
    esp.script(Rule(Takes(8, clock, Status(429))))
    delivery = old(45)
    assert deliver(patient(esp), message(), delivery).verdict is Verdict.AMBIGUOUS
    assert len(esp.requests) == 1


@pytest.mark.parametrize("esp", ["unisender_go"], indirect=True)
def test_redirect_makes_no_key_younger(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Takes(20, clock, AcceptThenDrop()), Takes(20, clock, Redirect(307)), Rule(Takes(15, clock, Stall())))
    deliver(
        backend(esp, total_retries=9, retry_deadline=3600, retry_backoff_factor=0, requests_timeout=(10, 0.3)),
        message(),
        Delivery(),
    )
    assert len(esp.requests) == 3, "at 0, 20 and 40 seconds, and not at 55"
    assert len(esp.ledger) == 1


@pytest.mark.parametrize("esp", ["unisender_go"], indirect=True)
def test_call_that_begins_shortly_before_the_esp_forgets_the_key_takes_a_new_one(esp: LocalEsp) -> None:
    delivery = old(55)
    key = delivery.key
    assert not delivery.is_protected(60)
    deliver(backend(esp), message(), delivery)
    assert [request.idempotency_key for request in esp.requests] == [delivery.key]
    assert delivery.key != key


# --- A request without any ---


def own_send(backend: Any) -> None:
    """As in a subclass whose ``_send`` does it in its own way."""
    sent = message()
    backend.open()
    try:
        backend.post_to_esp(backend.build_message_payload(sent, backend.send_defaults), sent)
    finally:
        backend.close()


def own_request(backend: Any) -> None:
    """As by hand, over the session that Anymail documents."""
    sent = message()
    payload = backend.build_message_payload(sent, backend.send_defaults)
    with backend.create_session() as session:
        session.request(**payload.get_request_params(backend.api_url)).raise_for_status()


@on_each
@pytest.mark.parametrize("post", [own_send, own_request])
@pytest.mark.parametrize("fault", [AcceptThenDrop(), Status(500, accepted=True)], ids=["dropped", "500"])
def test_request_that_carries_no_key_is_not_sent_again_after_an_ambiguous_failure(
    esp: LocalEsp, post: Callable[[Any], None], fault: Any
) -> None:
    esp.script(fault)
    with pytest.raises((AnymailAPIError, requests.RequestException)):
        post(backend(esp, total_retries=3, retry_backoff_factor=0, retry_backoff_jitter=0))
    assert [request.idempotency_key for request in esp.requests] == [None]
    assert len(esp.ledger) == 1


# --- The same body ---


@on_comparing
def test_first_body_is_remembered_by_its_digest(esp: LocalEsp) -> None:
    delivery = Delivery()
    esp.script(AcceptThenDrop())
    deliver(backend(esp), message(), delivery)
    assert delivery.body_digest == hashlib.sha256(esp.requests[0].body).hexdigest()


@on_comparing
def test_digest_is_kept_in_the_form_that_the_delivery_says_and_compared_in_all(esp: LocalEsp) -> None:
    """As where the queue is encrypted, and its key was changed between two attempts."""
    delivery = Delivery(digest_forms=lambda digest: (f"new {digest}", f"old {digest}"))
    esp.script(AcceptThenDrop(), AcceptThenDrop())
    deliver(backend(esp), message("first"), delivery)
    digest = hashlib.sha256(esp.requests[0].body).hexdigest()
    assert delivery.body_digest == f"new {digest}"
    delivery.body_digest = f"old {digest}"
    assert deliver(backend(esp), message("first"), delivery).reason != "body changed"
    assert delivery.body_digest == f"new {digest}"
    assert deliver(backend(esp), message("second"), delivery).reason == "body changed"


@on_comparing
def test_body_that_changed_after_it_may_have_been_taken_is_held_and_not_sent(esp: LocalEsp) -> None:
    """The ESP would refuse it, and nobody could tell whether the first was taken."""
    delivery = Delivery()
    esp.script(AcceptThenDrop())
    deliver(backend(esp), message("first"), delivery)
    key, digest = delivery.key, delivery.body_digest
    outcome = deliver(backend(esp), message("second"), delivery)
    assert (outcome.verdict, outcome.reason, outcome.hold) == (Verdict.AMBIGUOUS, "body changed", True)
    assert isinstance(outcome.error, BodyChanged)
    assert not outcome.may_be_queued
    assert len(esp.requests) == 1
    assert (delivery.key, delivery.body_digest) == (key, digest)


@on_comparing
def test_body_may_change_while_nothing_was_taken(esp: LocalEsp) -> None:
    delivery = Delivery()
    esp.stop_listening()
    assert deliver(backend(esp), message("first"), delivery).verdict is Verdict.REFUSED
    esp.start_listening()
    assert deliver(backend(esp), message("second"), delivery).verdict is Verdict.DELIVERED
    assert [accepted.subject for accepted in esp.ledger] == ["second"]


@pytest.mark.parametrize("esp", sorted(set(WITH_KEYS) - set(COMPARING)), indirect=True)
def test_body_may_change_where_nobody_compares(esp: LocalEsp) -> None:
    delivery = Delivery()
    esp.script(AcceptThenDrop())
    deliver(backend(esp), message("first"), delivery)
    assert deliver(backend(esp), message("second"), delivery).verdict is Verdict.DELIVERED
    assert [accepted.subject for accepted in esp.ledger] == ["first"]


@on_comparing
def test_users_key_with_another_body_is_an_error_that_says_so(esp: LocalEsp) -> None:
    for subject in ("first", "second"):
        sent = message(subject)
        sent.idempotency_key = USERS_KEY
        outcome = deliver(backend(esp), sent, Delivery())
    assert (outcome.verdict, outcome.reason) == (Verdict.PERMANENT, "key conflict")
    assert outcome.http_status == 409
    assert [accepted.subject for accepted in esp.ledger] == ["first"]


@pytest.mark.parametrize("esp", ["brevo"], indirect=True)
def test_refusal_that_used_up_the_key_is_followed_by_a_new_one(esp: LocalEsp) -> None:
    """Else "duplicate" would be said of a message that nobody took."""
    delivery = Delivery()
    esp.script(Status(429, uses_key=True))
    assert deliver(backend(esp), message(), delivery).verdict is Verdict.REFUSED
    assert deliver(backend(esp), message(), delivery).verdict is Verdict.DELIVERED
    assert len(esp.ledger) == 1


# --- Where it stands ---


def payload(**data: Any) -> Any:
    return SimpleNamespace(headers={}, data=data)


def test_key_in_a_header_is_put_there() -> None:
    spec, made = IdempotencyKey("header", "Idempotency-Key", window=60, grammar=".+"), payload()
    assert spec.given(made) is None
    spec.put(made, "key")
    assert (made.headers, made.data) == ({"Idempotency-Key": "key"}, {})
    assert spec.given(made) == "key"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({}, {"a": {"b": {"key": "k"}}}, id="nothing on the way"),
        pytest.param({"a": {"c": 1}}, {"a": {"c": 1, "b": {"key": "k"}}}, id="half of the way"),
        pytest.param({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 1, "key": "k"}}}, id="all of the way"),
    ],
)
def test_key_in_the_body_is_put_at_its_path(before: dict[str, Any], after: dict[str, Any]) -> None:
    spec, made = IdempotencyKey("body", "a.b.key", window=60, grammar=".+"), payload(**before)
    assert spec.given(made) is None
    assert made.data == before  # to look is not to make
    spec.put(made, "k")
    assert made.data == after
    assert spec.given(made) == "k"
