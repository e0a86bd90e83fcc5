"""The record that the attempts of one delivery share: its key, its past, and whose it is."""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import smtplib
import threading
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
import requests
from anymail.exceptions import AnymailAPIError
from anymail.signals import post_send, pre_send
from django.core.mail.backends.base import BaseEmailBackend
from django.utils.module_loading import import_string
from hypothesis import given
from hypothesis import strategies as st

from anymail_retry import close_connections, reset_breakers
from anymail_retry.backends.brevo import EmailBackend as Brevo
from anymail_retry.backends.mandrill import EmailBackend as Mandrill
from anymail_retry.backends.resend import EmailBackend as Resend
from anymail_retry.backends.unisender_go import EmailBackend as UnisenderGo
from anymail_retry.delivery import KEY_MARGIN, Delivery, conclude, current_delivery, deliver
from anymail_retry.idempotency import IdempotencyKey
from anymail_retry.mailqueue.fallback import Fallback
from anymail_retry.models import QueuedMessage
from anymail_retry.signals import message_failed
from anymail_retry.testing import AcceptThenDrop, LocalEsp, Rule, Status
from anymail_retry.testing.pytest import local_esp
from anymail_retry.verdict import Attempt, EspFacts, Phase, Verdict
from tests.sites import WAYS, Site, message, site
from tests.smtp import SmtpServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp", "site"]  # fixtures

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=timezone.utc)
WINDOW = 900.0

#: What Brevo says of a key that it knows.
DUPLICATE = {"code": "duplicate_parameter", "message": "Email for the idempotency key has already been processed"}


class WithKeys(EspFacts):
    """An ESP that remembers a key for a quarter of an hour."""

    idempotency = IdempotencyKey("header", "Idempotency-Key", window=WINDOW, grammar=".+")


@pytest.fixture(autouse=True)
def once(settings: SettingsWrapper) -> Iterator[None]:
    """Sends are tried once, and without the queue; breakers and connections are nobody else's."""
    settings.EMAIL_TOTAL_RETRIES = 0
    settings.EMAIL_FALLBACK_QUEUE = False
    reset_breakers()
    yield
    close_connections()
    reset_breakers()


@pytest.fixture
def resend(local_esp: Callable[..., LocalEsp]) -> LocalEsp:
    return local_esp("resend")


# --- How long a key lives ---


@given(st.floats(0.001, 1e7), st.floats(0, 1e7))
def test_key_lives_for_its_window_from_the_first_ambiguous_attempt(window: float, age: float) -> None:
    since = NOW - timedelta(seconds=age)
    delivery = Delivery(key_used_since=since)
    assert delivery.key_is_live(window, NOW) is ((NOW - since).total_seconds() + KEY_MARGIN < window)
    assert not delivery.key_is_live(window, since + timedelta(seconds=window))
    assert delivery.key_is_live(window + KEY_MARGIN, since)


@given(st.none() | st.datetimes(timezones=st.just(timezone.utc)))
def test_without_a_window_no_key_lives(since: datetime | None) -> None:
    assert not Delivery(key_used_since=since).key_is_live(None, NOW)
    assert not Delivery(key_used_since=since).is_protected(None, NOW)


def test_key_under_which_nothing_was_taken_lives() -> None:
    assert Delivery().key_is_live(0.001, NOW)


def test_age_is_counted_until_now() -> None:
    now = datetime.now(timezone.utc)
    assert Delivery(key_used_since=now - timedelta(seconds=60)).key_is_live(3600)
    assert not Delivery(key_used_since=now - timedelta(seconds=3600)).key_is_live(60)


def ago(seconds: float | None) -> datetime | None:
    return None if seconds is None else NOW - timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("taken", "used", "live", "protected"),
    [
        pytest.param(None, None, True, True, id="new"),
        pytest.param(60, 60, True, True, id="taken under this key"),
        pytest.param(WINDOW, WINDOW, False, False, id="which is forgotten"),
        pytest.param(WINDOW - 10, WINDOW - 10, False, False, id="which is forgotten before the next request arrives"),
        pytest.param(WINDOW - 11, WINDOW - 11, True, True, id="which is not yet forgotten"),
        pytest.param(WINDOW * 2, None, True, False, id="taken under the key before it"),
        pytest.param(WINDOW * 2, 60, True, False, id="and again under this one"),
        pytest.param(WINDOW * 3, WINDOW, False, False, id="which is forgotten, too"),
    ],
)
def test_key_protects_against_what_was_taken_under_it(
    taken: float | None, used: float | None, live: bool, protected: bool
) -> None:
    delivery = Delivery(maybe_taken_since=ago(taken), key_used_since=ago(used))
    assert delivery.key_is_live(WINDOW, NOW) is live
    assert delivery.is_protected(WINDOW, NOW) is protected


@given(st.lists(st.tuples(st.floats(0, 1e5), st.booleans()), max_size=20))
def test_first_moment_at_which_it_may_have_been_taken_outlives_every_key(events: list[tuple[float, bool]]) -> None:
    """Attempts that may have been taken, and renewals of the key, in any order."""
    delivery, now, attempts, under_key = Delivery(), NOW, list[datetime](), list[datetime]()
    for seconds, renewed in events:
        now += timedelta(seconds=seconds)
        if renewed:
            delivery.renew_key()
            under_key = []
        else:
            delivery.remember(now)
            attempts.append(now)
            under_key.append(now)
        assert delivery.maybe_taken_since == (attempts[0] if attempts else None)
        assert delivery.key_used_since == (under_key[0] if under_key else None)
        assert not delivery.was_taken_under_another_key or delivery.maybe_taken_since not in under_key


# --- When it is renewed ---


def past(age: float, *, key_from_user: bool = False) -> Delivery:
    since = datetime.now(timezone.utc) - timedelta(seconds=age)
    return Delivery("old", key_from_user, maybe_taken_since=since, key_used_since=since, body_digest="digest")


def test_live_key_is_used_again() -> None:
    delivery = past(age=WINDOW / 2)
    with delivery.call(WithKeys):
        assert (delivery.key, delivery.body_digest) == ("old", "digest")
        assert delivery.maybe_taken_since is not None


def test_dead_key_is_replaced() -> None:
    """The ESP has forgotten it, and with it the body that it compared. It may have the message all the same."""
    delivery = past(age=WINDOW * 2)
    with delivery.call(WithKeys):
        assert delivery.key != "old"
        assert (delivery.key_used_since, delivery.body_digest) == (None, None)
        assert delivery.maybe_taken_since is not None


def test_dead_key_of_the_user_stays() -> None:
    delivery = past(age=WINDOW * 2, key_from_user=True)
    with delivery.call(WithKeys):
        assert delivery.key == "old"


def test_without_keys_what_may_have_been_taken_is_never_forgotten() -> None:
    delivery = past(age=1e6)
    with delivery.call(EspFacts):
        assert delivery.key == "old"
        assert delivery.maybe_taken_since is not None


@pytest.mark.parametrize(
    ("status", "answer", "renewed"),
    [
        pytest.param(429, {"name": "rate_limit_exceeded"}, True, id="refused"),
        pytest.param(429, {"name": "daily_quota_exceeded"}, True, id="blocked"),
        pytest.param(409, {"name": "concurrent_idempotent_requests"}, False, id="still worked on"),
        pytest.param(500, {"name": "application_error"}, False, id="maybe taken"),
    ],
)
@pytest.mark.parametrize("users", [False, True], ids=["own key", "key of the user"])
def test_answer_renews_the_key_where_it_may_count_as_used(
    resend: LocalEsp, status: int, answer: Any, renewed: bool, users: bool
) -> None:
    """An ESP that counts a refused request as the use of its key would say "duplicate" to the next."""
    resend.script(Status(status, answer))
    sent = message()
    if users:
        sent.idempotency_key = "order-17"
    delivery = Delivery()
    before = delivery.key
    deliver(Resend(**resend.options()), sent, delivery)
    assert resend.requests[0].idempotency_key == ("order-17" if users else before)
    assert delivery.key == ("order-17" if users else delivery.key)
    assert (delivery.key != resend.requests[0].idempotency_key) is (renewed and not users)


def test_connection_that_never_stood_renews_nothing(resend: LocalEsp) -> None:
    resend.stop_listening()
    delivery = Delivery()
    before = delivery.key
    outcome = deliver(Resend(**resend.options()), message(), delivery)
    assert outcome.verdict is Verdict.REFUSED
    assert delivery.key == before


# --- What may have been taken ---


def test_first_ambiguous_attempt_is_remembered(resend: LocalEsp) -> None:
    backend, sent, delivery = Resend(**resend.options()), message(), Delivery()
    resend.script(AcceptThenDrop(), AcceptThenDrop(), Status(429))
    began = datetime.now(timezone.utc)
    assert deliver(backend, sent, delivery).verdict is Verdict.AMBIGUOUS
    since = delivery.maybe_taken_since
    assert since is not None
    assert began <= since <= datetime.now(timezone.utc)
    assert deliver(backend, sent, delivery).verdict is Verdict.AMBIGUOUS
    outcome = deliver(backend, sent, delivery)
    assert (outcome.verdict, outcome.http_status) == (Verdict.AMBIGUOUS, 429)  # a refusal undoes nothing
    assert delivery.maybe_taken_since == since
    assert len({request.idempotency_key for request in resend.requests}) == 1


def test_answer_under_the_same_key_settles_it(resend: LocalEsp) -> None:
    backend, sent, delivery = Resend(**resend.options()), message(), Delivery()
    resend.script(AcceptThenDrop())
    deliver(backend, sent, delivery)
    assert deliver(backend, sent, delivery).verdict is Verdict.DELIVERED
    assert len(resend.ledger) == 1
    assert resend.requests[1].replayed


@pytest.mark.parametrize(
    ("esp", "fault", "verdict", "held"),
    [
        pytest.param("resend", Status(429), "ambiguous", False, id="refused"),
        pytest.param("resend", Status(401, {"name": "invalid_api_key"}), "ambiguous", False, id="blocked"),
        pytest.param("resend", Status(422, {"name": "validation_error"}), "ambiguous", True, id="refused for good"),
        pytest.param("resend", AcceptThenDrop(), "ambiguous", False, id="maybe taken again"),
        pytest.param("brevo", Status(400, DUPLICATE), "ambiguous", False, id="duplicate answer"),
        pytest.param("resend", None, "delivered", False, id="accepted"),
    ],
)
def test_answer_under_a_new_key_settles_nothing_of_the_past(
    local_esp: Callable[..., LocalEsp], esp: str, fault: Any, verdict: str, held: bool
) -> None:
    """The ESP may have it since an attempt under a key that it has forgotten by now."""
    server = local_esp(esp)
    if fault is not None:
        server.script(fault)
    backend = {"resend": Resend, "brevo": Brevo}[esp](**server.options())
    delivery = past(age=1e6)
    since = delivery.maybe_taken_since
    outcome = deliver(backend, message(), delivery)
    assert (outcome.verdict, outcome.hold) == (verdict, held)
    assert server.requests[0].idempotency_key != "old"
    assert delivery.maybe_taken_since == since
    taken_now = isinstance(fault, AcceptThenDrop)
    assert (delivery.key_used_since is not None) is taken_now
    assert not delivery.is_protected(WINDOW)


@pytest.mark.parametrize(
    ("error", "verdict", "held"),
    [
        pytest.param(smtplib.SMTPDataError(451, b"later"), "ambiguous", False, id="refused"),
        pytest.param(smtplib.SMTPDataError(550, b"no"), "ambiguous", True, id="refused for good"),
        pytest.param(None, "delivered", False, id="accepted"),
    ],
)
def test_no_answer_of_smtp_settles_the_past(error: Exception | None, verdict: str, held: bool) -> None:
    errors = [smtplib.SMTPServerDisconnected("gone"), error]

    class Smtp(BaseEmailBackend):
        def send_messages(self, email_messages: Any) -> int:
            failure = errors.pop(0)
            if failure is not None:
                raise failure
            return 1

    delivery = Delivery()
    assert deliver(Smtp(), message(), delivery).verdict is Verdict.AMBIGUOUS
    since = delivery.maybe_taken_since
    outcome = deliver(Smtp(), message(), delivery)
    assert (outcome.verdict, outcome.hold) == (verdict, held)
    assert delivery.maybe_taken_since == since


@pytest.mark.parametrize(
    ("delivery", "before"),
    [
        pytest.param(Delivery(), False, id="new"),
        pytest.param(Delivery(key_from_user=True), True, id="the user's key says so"),
        pytest.param(Delivery(maybe_taken_since=NOW, key_used_since=NOW), True, id="an earlier call"),
        pytest.param(Delivery(maybe_taken_since=NOW), False, id="an earlier call, under another key"),
        pytest.param(Delivery(attempts=[Attempt(Phase.SENT, Verdict.AMBIGUOUS)]), True, id="this call"),
        pytest.param(Delivery(attempts=[Attempt(Phase.CONNECT, Verdict.REFUSED)]), False, id="surely not"),
    ],
)
def test_duplicate_answer_needs_something_before_it(delivery: Delivery, before: bool) -> None:
    assert delivery.was_taken_before is before


# --- Back ends that know nothing of us ---


class Foreign(BaseEmailBackend):
    """Fails in one way, when it connects or when it sends."""

    def __init__(self, error: Exception, *, when: str = "send") -> None:
        super().__init__()
        self.error = error
        self.when = when

    def open(self) -> bool:
        if self.when == "open":
            raise self.error
        return True

    def send_messages(self, email_messages: Any) -> int:
        raise self.error


MISTAKES = [
    pytest.param(FileNotFoundError(errno.ENOENT, "cert.pem"), id="a file that is missing"),
    pytest.param(PermissionError(errno.EACCES, "key.pem"), id="a file that is not to be read"),
    pytest.param(IsADirectoryError(errno.EISDIR, "certs"), id="a folder where a file should be"),
    pytest.param(NotADirectoryError(errno.ENOTDIR, "mail"), id="a file where a folder should be"),
    pytest.param(requests.exceptions.MissingSchema("esp.example"), id="a URL without a scheme"),
    pytest.param(requests.exceptions.InvalidSchema("htps://"), id="a URL with a wrong one"),
    pytest.param(requests.exceptions.InvalidURL("https:///"), id="no URL"),
    pytest.param(requests.exceptions.InvalidHeader("X-Key: 1"), id="no header"),
    pytest.param(requests.exceptions.InvalidProxyURL("http:/proxy"), id="no URL of a proxy"),
]


@pytest.mark.django_db
@pytest.mark.parametrize("when", ["open", "send"])
@pytest.mark.parametrize("error", MISTAKES)
def test_mistake_of_a_foreign_back_end_is_raised_and_never_queued(error: Exception, when: str) -> None:
    """They are OSErrors all, as the network's trouble is."""
    outcome = deliver(Foreign(error, when=when), message(), Delivery())
    assert (outcome.anticipated, outcome.may_be_queued) == (False, False)
    with pytest.raises(type(error)):
        Fallback("foreign").send(Foreign(error, when=when), message())
    assert not QueuedMessage.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize("site", WAYS[-1:], indirect=True)
@pytest.mark.parametrize("tls", ["use_ssl", "use_tls"])
def test_certificate_file_that_is_missing_is_a_mistake_of_smtps_settings(site: Site, tls: str) -> None:
    with SmtpServer() as server:
        site.settings.EMAIL_FALLBACK_QUEUE = True
        site.smtp(server.port, wrapper="fallback")
        site._legacy(**{f"EMAIL_{tls.upper()}": True, "EMAIL_SSL_CERTFILE": "/no/such/cert.pem"})
        if site.way == "mailers":
            mailers = copy.deepcopy(site.settings.MAILERS)
            mailers["inner"]["OPTIONS"].update({tls: True, "ssl_certfile": "/no/such/cert.pem"})
            site.settings.MAILERS = mailers
        with pytest.raises(FileNotFoundError):
            message().send()
    assert not QueuedMessage.objects.exists()


@pytest.mark.parametrize(
    ("error", "when", "verdict"),
    [
        pytest.param(OSError(errno.ENOSPC, "full"), "send", "ambiguous", id="a full disk, in the middle of a file"),
        pytest.param(OSError(errno.ENETUNREACH, "no way"), "open", "refused", id="no network"),
        pytest.param(ConnectionResetError(), "send", "ambiguous", id="reset"),
        pytest.param(requests.ReadTimeout(), "send", "ambiguous", id="a library's read timeout"),
        pytest.param(
            smtplib.SMTPNotSupportedError("SMTPUTF8 not supported"), "send", "permanent", id="a feature it lacks"
        ),
        pytest.param(
            smtplib.SMTPNotSupportedError("no AUTH"), "open", "refused", id="a feature it lacks for now, at log-in"
        ),
    ],
)
def test_trouble_of_a_foreign_back_end_comes_to(error: Exception, when: str, verdict: str) -> None:
    outcome = deliver(Foreign(error, when=when), message(), Delivery())
    assert (outcome.verdict, outcome.anticipated, outcome.hold) == (verdict, True, False)


# --- Whose it is ---


def test_call_is_found_from_below_and_only_there() -> None:
    outer, inner = Delivery(), Delivery()
    assert current_delivery() is None
    with outer.call(EspFacts):
        assert current_delivery() is outer
        with contextlib.suppress(ZeroDivisionError), inner.call(EspFacts):
            assert current_delivery() is inner
            raise ZeroDivisionError
        assert current_delivery() is outer
    assert current_delivery() is None


def test_call_is_not_found_from_another_thread() -> None:
    seen: list[Any] = []
    with Delivery().call(EspFacts):
        thread = threading.Thread(target=lambda: seen.append(current_delivery()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_call_begins_with_nothing_of_the_last() -> None:
    delivery = Delivery(attempts=[Attempt(Phase.SENT, Verdict.AMBIGUOUS)], ends_at=1.0, is_probe=True)
    with delivery.call(EspFacts):
        assert (delivery.attempts, delivery.answer, delivery.ends_at, delivery.is_probe) == ([], None, None, False)


@pytest.fixture
def sends_another(resend: LocalEsp, settings: SettingsWrapper) -> Iterator[list[Any]]:
    """A ``post_send`` receiver that sends a copy: a send inside a send. The copies."""
    copies: list[Any] = []

    def receive(message: Any, **kwargs: Any) -> None:
        if message.subject == "original":
            copy = type(message)("copy", "Body", "from@example.com", ["copy@example.com"])
            copies.append(copy)
            Resend().send_messages([copy])

    settings.ANYMAIL = resend.settings()
    post_send.connect(receive)
    yield copies
    post_send.disconnect(receive)


@pytest.mark.django_db
@pytest.mark.parametrize("fault", [Status(429), Status(500), AcceptThenDrop()], ids=["429", "500", "drop"])
def test_send_inside_a_send_has_its_own_record(
    resend: LocalEsp, sends_another: list[Any], settings: SettingsWrapper, fault: Any
) -> None:
    """What becomes of the copy is neither the original's failure nor its key."""
    settings.EMAIL_FALLBACK_QUEUE = True
    resend.script(Rule(fault, contains="copy@example.com"))
    original = message("original")
    assert Resend().send_messages([original]) == 1
    (copy,) = sends_another
    assert original.anymail_status.status == {"queued"}  # Resend's own word for taken
    assert not hasattr(original, "queued_message")
    assert [attempt.status for attempt in original.retry_history] == [200]
    (row,) = QueuedMessage.objects.all()
    assert copy.queued_message == row
    assert row.recipients == "copy@example.com"
    first, second = resend.requests
    assert first.idempotency_key != second.idempotency_key
    assert (row.key == second.idempotency_key) is (row.verdict == "ambiguous")


def test_good_send_inside_a_failing_one_settles_nothing(resend: LocalEsp) -> None:
    """From a ``pre_send`` receiver, so that the inner one comes first."""

    def receive(message: Any, **kwargs: Any) -> None:
        if message.subject == "original":
            copy = type(message)("copy", "Body", "from@example.com", ["copy@example.com"])
            assert Resend(**resend.options()).send_messages([copy]) == 1

    resend.script(Rule(AcceptThenDrop(), contains="original"))
    delivery = Delivery()
    pre_send.connect(receive)
    try:
        outcome = deliver(Resend(**resend.options()), message("original"), delivery)
    finally:
        pre_send.disconnect(receive)
    assert outcome.verdict is Verdict.AMBIGUOUS
    assert [attempt.verdict for attempt in outcome.attempts] == [Verdict.AMBIGUOUS]
    assert [accepted.subject for accepted in resend.ledger] == ["copy", "original"]


# --- deliver() and what its caller makes of it ---


def test_failure_is_an_outcome_and_not_an_exception(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp("mandrill")
    esp.script(Status(400))
    outcome = deliver(Mandrill(**esp.options()), message(), Delivery())
    assert outcome.verdict is Verdict.PERMANENT
    assert isinstance(outcome.error, AnymailAPIError)
    with pytest.raises(AnymailAPIError) as caught:
        conclude(None, message(), outcome)
    assert caught.value is outcome.error


class Interrupted(BaseEmailBackend):
    def send_messages(self, email_messages: Any) -> int:
        raise KeyboardInterrupt


def test_interrupt_is_no_outcome() -> None:
    with pytest.raises(KeyboardInterrupt):
        deliver(Interrupted(), message(), Delivery())


def test_pre_send_is_fired_once_per_delivery(resend: LocalEsp) -> None:
    fired: list[Any] = []

    def receive(message: Any, **kwargs: Any) -> None:
        fired.append(message)

    pre_send.connect(receive)
    try:
        deliver(Resend(**resend.options()), message(), Delivery())
        deliver(Resend(**resend.options()), message(), Delivery(pre_send_done=True))
    finally:
        pre_send.disconnect(receive)
    assert len(fired) == 1
    assert len(resend.ledger) == 2


def test_message_that_a_receiver_cancels_is_nothing(resend: LocalEsp) -> None:
    from anymail.exceptions import AnymailCancelSend

    def receive(**kwargs: Any) -> None:
        raise AnymailCancelSend

    pre_send.connect(receive)
    try:
        outcome = deliver(Resend(**resend.options()), message(), Delivery())
    finally:
        pre_send.disconnect(receive)
    assert (outcome.verdict, outcome.reason) == (None, "cancelled")
    assert conclude(None, message(), outcome) is False
    assert resend.requests == []


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("esp", "option"),
    [
        pytest.param("resend", "api_key", id="the API key"),
        pytest.param("mailjet", "secret_key", id="Mailjet's second"),
        pytest.param("postmark", "server_token", id="Postmark's name for it"),
    ],
)
@pytest.mark.parametrize("before", [0, 490], ids=["short", "cut in the middle of it"])
def test_key_that_the_esp_quotes_stands_in_no_row_and_no_log(
    local_esp: Callable[..., LocalEsp],
    settings: SettingsWrapper,
    caplog: pytest.LogCaptureFixture,
    esp: str,
    option: str,
    before: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "Sesam-0123456789"
    server = local_esp(esp)
    server.script(Status(401, "x" * before + secret + " is wrong"))
    settings.ANYMAIL = {**server.settings(), f"{esp.upper()}_{option.upper()}": secret}
    settings.EMAIL_FALLBACK_QUEUE = True
    sent = message()
    assert import_string(f"anymail_retry.backends.{esp}.EmailBackend")().send_messages([sent]) == 1
    assert sent.queued_message.answer == ("x" * before + "*** is wrong")[:500]
    logged = [record.getMessage() for record in caplog.records if record.name != "anymail_retry.testing"]
    assert any("the account is blocked" in line for line in logged)
    assert not [line for line in logged if secret[:6] in line]


def test_password_that_an_smtp_server_quotes_stands_in_no_outcome() -> None:
    class Smtp(BaseEmailBackend):
        def __init__(self) -> None:
            super().__init__()
            self.password = "Sesam-0123456789"

        def send_messages(self, email_messages: Any) -> int:
            raise smtplib.SMTPAuthenticationError(535, b"x" * 490 + b"Sesam-0123456789")

    assert deliver(Smtp(), message(), Delivery()).answer == "x" * 490 + "***"


@pytest.mark.parametrize("charset", ["undefined", "idna", "no-such"])
@pytest.mark.parametrize(
    ("status", "verdict", "hold"),
    [pytest.param(200, "ambiguous", True, id="200"), pytest.param(429, "refused", False, id="429")],
)
def test_answer_in_a_strange_charset_is_judged_all_the_same(
    resend: LocalEsp, charset: str, status: int, verdict: str, hold: bool
) -> None:
    resend.script(Status(status, "caf\xe9", headers={"Content-Type": f"text/html; charset={charset}"}))
    outcome = deliver(Resend(**resend.options()), message(), Delivery())
    assert (outcome.verdict, outcome.http_status, outcome.hold) == (verdict, status, hold)
    assert outcome.answer == "caf\xe9"


NOBODY = {
    "status": "success",
    "job_id": "1",
    "emails": [],
    "failed_emails": {"to@example.com": "temporary_unavailable"},
}


def test_silent_refusal_is_told_by_log_and_signal(
    local_esp: Callable[..., LocalEsp], caplog: pytest.LogCaptureFixture
) -> None:
    """Anymail raises nothing where Unisender Go accepts no recipient, and returns 1; so do we, and say so."""
    failed: list[Any] = []

    def receive(**kwargs: Any) -> None:
        failed.append(kwargs)

    esp = local_esp("unisender_go")
    esp.script(Status(200, NOBODY))
    sent = message()
    message_failed.connect(receive)
    try:
        assert UnisenderGo(**esp.options()).send_messages([sent]) == 1
    finally:
        message_failed.disconnect(receive)
    (kwargs,) = failed
    assert (kwargs["message"], kwargs["queued_message"], kwargs["sender"]) == (sent, None, UnisenderGo)
    assert kwargs["outcome"].reason == "no recipient accepted"
    assert "Unisender Go accepted the message for no recipient: no recipient accepted" in caplog.text
