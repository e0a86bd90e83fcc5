"""The back ends that stand before another one: ``fallback`` before a real SMTP server, ``queued`` before anything."""

from __future__ import annotations

import smtplib
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead
from socket import gaierror
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import requests
from anymail.exceptions import AnymailRequestsAPIError
from anymail.signals import pre_send
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.core.mail.backends.base import BaseEmailBackend
from django.core.mail.backends.smtp import EmailBackend as SmtpBackend
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from anymail_retry.backends import fallback, queued
from anymail_retry.exceptions import MessageNotQueueable
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import QueuedMessage
from anymail_retry.testing import LocalEsp, Rule, Status
from anymail_retry.testing.pytest import local_esp
from tests.sites import MANDRILL, WAYS, Site, message, site, words
from tests.smtp import DROP, STALL, SmtpServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp", "site"]  # fixtures

pytestmark = [
    # Without MAILERS the SMTP settings of Django 6.1 are deprecated, and so is making its back end as the worker does.
    pytest.mark.filterwarnings(r"ignore:The EMAIL_\w+ setting is deprecated:PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Directly creating EmailBackend instances:PendingDeprecationWarning"),
]


@pytest.fixture
def smtp() -> Iterator[SmtpServer]:
    with SmtpServer() as server:
        yield server


@pytest.fixture
def smtp_site(site: Site, smtp: SmtpServer) -> Site:
    """SMTP with the queue behind it."""
    site.smtp(smtp.port, wrapper="fallback")
    return site


@pytest.fixture
def esp(local_esp: Callable[..., LocalEsp], settings: SettingsWrapper) -> LocalEsp:
    settings.EMAIL_TOTAL_RETRIES = 0
    return local_esp("mandrill")


def rows() -> list[QueuedMessage]:
    return list(QueuedMessage.objects.order_by("pk"))


def make_due() -> None:
    for row in rows():
        row.due_at = row.created_at
        row.save()


# --- fallback: SMTP ---


@pytest.mark.django_db
def test_good_send_costs_no_sql_and_leaves_no_connection(smtp_site: Site, smtp: SmtpServer) -> None:
    with CaptureQueriesContext(connection) as queries:
        assert message("hello").send() == 1
    assert list(queries) == []
    assert [taken.subject for taken in smtp.ledger] == ["hello"]
    smtp.wait_until_nobody_is_connected()


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("script", "verdict", "status"),
    [
        pytest.param({"CONNECT": "421 4.3.2 closing"}, "refused", 421, id="greeting 421"),
        pytest.param({"CONNECT": "554 5.3.2 no service"}, "refused", 554, id="greeting 554: open() failed"),
        pytest.param({"CONNECT": DROP}, "refused", None, id="dropped at the greeting"),
        pytest.param({"MAIL": "451 4.3.0 later"}, "refused", 451, id="sender 451"),
        pytest.param({"MAIL": "421 4.3.2 closing"}, "refused", 421, id="sender 421"),
        pytest.param({"RCPT": "450 4.2.1 busy"}, "refused", 450, id="recipient 450"),
        pytest.param({"DATA": "451 4.3.0 later"}, "refused", 451, id="DATA 451"),
        pytest.param({"BODY": "452 4.3.1 full"}, "refused", 452, id="body 452"),
        pytest.param({"MAIL": DROP}, "ambiguous", None, id="dropped at the sender"),
        pytest.param({"DATA": DROP}, "ambiguous", None, id="dropped at DATA"),
        pytest.param({"BODY": DROP}, "ambiguous", None, id="taken, then dropped"),
        pytest.param({"BODY": "what?"}, "ambiguous", None, id="taken, then garbage"),
    ],
)
def test_failure_that_time_may_cure_is_kept(
    smtp_site: Site, smtp: SmtpServer, script: dict[str, str], verdict: str, status: int | None
) -> None:
    smtp.script(**script)
    sent = message()
    assert sent.send() == 1
    (row,) = rows()
    assert (row.mailer, row.verdict) == (smtp_site.mailer, verdict)
    assert (row.maybe_taken_since is not None) is (verdict == "ambiguous")
    assert sent.queued_message == row
    assert sent.anymail_status.status == {"queued"}
    (attempt,) = sent.retry_history
    assert (attempt.verdict.value, attempt.status) == (verdict, status)


@pytest.mark.django_db
def test_refused_connection_is_kept(smtp_site: Site, smtp: SmtpServer) -> None:
    smtp.stop_listening()
    assert message().send() == 1
    assert [row.verdict for row in rows()] == ["refused"]


@pytest.mark.django_db
@pytest.mark.parametrize(("command", "verdict"), [("CONNECT", "refused"), ("MAIL", "ambiguous"), ("BODY", "ambiguous")])
def test_silence_is_kept(site: Site, smtp: SmtpServer, command: str, verdict: str) -> None:
    site.smtp(smtp.port, wrapper="fallback", timeout=0.2)  # it says nothing for ever
    smtp.script(**{command: STALL})
    assert message().send() == 1
    assert [row.verdict for row in rows()] == [verdict]


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("reply", "verdict"), [("535 5.7.8 wrong password", "blocked"), ("454 4.7.0 later", "refused")]
)
def test_login_that_fails_is_kept(site: Site, smtp: SmtpServer, reply: str, verdict: str) -> None:
    site.smtp(smtp.port, wrapper="fallback", username="site", password="secret")
    smtp.script(AUTH=reply)
    assert message().send() == 1
    (row,) = rows()
    assert row.verdict == verdict
    assert "secret" not in row.answer


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("script", "error"),
    [
        pytest.param({"MAIL": "553 5.1.7 no such sender"}, smtplib.SMTPSenderRefused, id="sender"),
        pytest.param({"RCPT": "550 5.1.1 no such user"}, smtplib.SMTPRecipientsRefused, id="recipient"),
        pytest.param({"DATA": "554 5.5.1 no"}, smtplib.SMTPDataError, id="DATA"),
        pytest.param({"BODY": "554 5.7.1 spam"}, smtplib.SMTPDataError, id="body"),
    ],
)
def test_5xx_is_raised_as_smtplib_raises_it(
    smtp_site: Site, smtp: SmtpServer, script: dict[str, str], error: type[Exception]
) -> None:
    smtp.script(**script)
    sent = message()
    with pytest.raises(error) as caught:
        sent.send()
    assert sent.send_error is caught.value
    assert rows() == smtp.ledger == []
    smtp.wait_until_nobody_is_connected()


@pytest.mark.django_db
@pytest.mark.parametrize("script", [{"MAIL": DROP}, {"BODY": "451 4.3.0 later"}, {"RCPT": "421 4.3.2 closing"}])
def test_back_end_is_usable_after_a_failure(smtp_site: Site, smtp: SmtpServer, script: dict[str, str]) -> None:
    """Django's own stays broken: "please run connect() first" for every later message."""
    backend = smtp_site.connection()
    smtp.script(**script)
    assert backend.send_messages([message("1"), message("2"), message("3")]) == 3
    assert [row.subject for row in rows()] == ["1"]
    assert backend.send_messages([message("4")]) == 1
    assert [taken.subject for taken in smtp.ledger] == ["2", "3", "4"]


@pytest.mark.django_db
def test_connection_that_the_caller_opens_serves_all_sends(smtp_site: Site, smtp: SmtpServer) -> None:
    with smtp_site.connection() as backend:
        for subject in ("1", "2"):
            assert backend.send_messages([message(subject)]) == 1
        assert smtp.connections == 1
    smtp.wait_until_nobody_is_connected()


@pytest.mark.django_db
def test_one_call_takes_one_connection(smtp_site: Site, smtp: SmtpServer) -> None:
    assert smtp_site.connection().send_messages([message("1"), message("2")]) == 2
    assert smtp.connections == 1
    smtp.wait_until_nobody_is_connected()


@pytest.mark.django_db
def test_connection_that_cannot_be_opened_is_no_reason_to_lose_what_should_go_over_it(
    smtp_site: Site, smtp: SmtpServer
) -> None:
    """``with get_connection() as connection`` is Django's own way to send several messages."""
    smtp.stop_listening()
    with smtp_site.connection() as opened:
        assert opened.send_messages([message("one"), message("two")]) == 2
    assert [(row.subject, row.verdict) for row in rows()] == [("one", "refused"), ("two", "refused")]


@pytest.mark.django_db
def test_connection_without_the_queue_that_cannot_be_opened_raises(site: Site, smtp: SmtpServer) -> None:
    site.smtp(smtp.port, wrapper="fallback")
    site.settings.EMAIL_FALLBACK_QUEUE = False
    smtp.stop_listening()
    with pytest.raises(ConnectionRefusedError), site.connection():
        pass


@pytest.mark.django_db(transaction=True)
def test_threads_may_share_it(smtp_site: Site, smtp: SmtpServer) -> None:
    """As they may share Django's: what one of them ends is not what another is in the middle of."""
    backend = smtp_site.connection()
    subjects = [f"{number}" for number in range(40)]
    smtp.script(MAIL=DROP)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda subject: backend.send_messages([message(subject)]), subjects)) == [1] * 40
    (row,) = rows()
    assert {row.subject, *(taken.subject for taken in smtp.ledger)} == set(subjects)
    assert len(smtp.ledger) == 39


@pytest.mark.django_db(transaction=True)
def test_kept_message_is_sent_by_the_mailer_behind(smtp_site: Site, smtp: SmtpServer) -> None:
    smtp.script(MAIL="451 4.3.0 later")
    message("hello").send()
    make_due()
    assert Worker().drain().sent == 1
    assert [taken.subject for taken in smtp.ledger] == ["hello"]
    assert [row.state for row in rows()] == ["sent"]


@pytest.mark.django_db(transaction=True)
def test_drain_that_fails_makes_no_second_row(smtp_site: Site, smtp: SmtpServer) -> None:
    smtp.script(MAIL="451 4.3.0 later")
    message().send()
    make_due()
    smtp.script(RCPT="451 4.3.0 still later")
    assert Worker().drain().deferred == 1
    assert [row.attempt_count for row in rows()] == [2]


@pytest.mark.django_db
def test_local_mailbox_is_kept(smtp_site: Site, smtp: SmtpServer) -> None:
    """Anymail knows no address without a domain; SMTP does."""
    smtp.script(MAIL="451 4.3.0 later")
    sent = message(to="root")
    assert sent.send() == 1
    assert sent.anymail_status.recipients["root"].status == "queued"


@pytest.mark.django_db
def test_failing_insert_leaves_smtps_error_and_a_usable_back_end(
    smtp_site: Site, smtp: SmtpServer, settings: SettingsWrapper
) -> None:
    settings.EMAIL_QUEUE_DATABASE = "nowhere"
    backend = smtp_site.connection()
    smtp.script(MAIL="451 4.3.0 later")
    with pytest.raises(smtplib.SMTPSenderRefused) as caught:
        backend.send_messages([message("1"), message("2")])
    assert "not kept in the queue" in words(caught.value)
    assert [taken.subject for taken in smtp.ledger] == ["2"]


@pytest.mark.django_db
def test_failing_silently_counts_what_was_sent_or_kept(smtp_site: Site, smtp: SmtpServer) -> None:
    backend = smtp_site.connection(fail_silently=True)
    smtp.script(MAIL="553 5.1.7 no such sender")
    sent = message("never")
    assert backend.send_messages([sent, message("good")]) == 1
    assert isinstance(sent.send_error, smtplib.SMTPSenderRefused)
    smtp.script(MAIL="451 4.3.0 later")
    assert backend.send_messages([message("later")]) == 1
    assert [row.subject for row in rows()] == ["later"]


@pytest.mark.django_db
def test_programming_error_is_raised_at_once(smtp_site: Site, smtp: SmtpServer) -> None:
    with pytest.raises(ValueError, match="address"):
        smtp_site.connection().send_messages([message(to="a@b@c.example"), message("2")])
    assert rows() == smtp.ledger == []


# --- fallback: accounts ---


@pytest.fixture
def account_is_allowed_to_be_given() -> Iterator[None]:
    with warnings.catch_warnings():
        # Django 6.1 deprecates it.
        warnings.filterwarnings("ignore", "The 'auth_user' and 'auth_password' arguments", PendingDeprecationWarning)
        yield


def send_mail_as(user: str) -> Any:
    return mail.send_mail(
        "Subject", "Body", "from@example.com", ["to@example.com"], auth_user=user, auth_password="secret"
    )


@pytest.mark.django_db
@pytest.mark.usefixtures("account_is_allowed_to_be_given")
def test_account_of_one_call_is_used_and_never_queued_for(site: Site, smtp: SmtpServer) -> None:
    site.smtp(smtp.port, wrapper="fallback", username="site", password="secret")
    assert send_mail_as("tenant") == 1
    assert [taken.user for taken in smtp.ledger] == ["tenant"]
    smtp.script(MAIL="451 4.3.0 later")
    with pytest.raises(smtplib.SMTPSenderRefused) as caught:
        send_mail_as("tenant")
    assert "password, username: this connection was made with options of its own" in words(caught.value)
    assert "an alias in MAILERS" in words(caught.value)
    assert rows() == []
    smtp.script(MAIL="451 4.3.0 later")
    assert message().send() == 1
    assert len(rows()) == 1


@pytest.mark.django_db
@pytest.mark.usefixtures("account_is_allowed_to_be_given")
def test_account_of_one_call_is_refused_by_queue_first(site: Site, smtp: SmtpServer) -> None:
    site.smtp(smtp.port, wrapper="queued")
    with pytest.raises(MessageNotQueueable, match=r"password, username: .* an alias in MAILERS"):
        send_mail_as("tenant")
    assert rows() == []


@pytest.mark.django_db
def test_key_of_one_connection_reaches_the_esp_behind(site: Site, esp: LocalEsp) -> None:
    site.behind("fallback", MANDRILL, esp)
    tenants = site.connection(api_key="tenant-key")
    assert tenants.send_messages([message()]) == 1
    assert [accepted.api_key for accepted in esp.ledger] == ["tenant-key"]
    esp.script(Status(503))
    with pytest.raises(AnymailRequestsAPIError) as caught:
        tenants.send_messages([message()])
    assert "api_key" in words(caught.value)
    assert rows() == []


# --- fallback: without the queue ---


@pytest.mark.django_db
def test_without_the_queue_the_wrapper_passes_on(site: Site, smtp: SmtpServer) -> None:
    site.smtp(smtp.port, wrapper="fallback")
    site.settings.EMAIL_FALLBACK_QUEUE = False
    assert message().send() == 1
    smtp.script(MAIL="451 4.3.0 later")
    with pytest.raises(smtplib.SMTPSenderRefused):
        message().send()
    smtp.script(MAIL="451 4.3.0 later")
    assert site.connection(fail_silently=True).send_messages([message()]) == 0
    assert rows() == []


def test_queue_that_is_wanted_without_the_app_is_an_error_with_the_line_to_add(
    smtp_site: Site, settings: SettingsWrapper
) -> None:
    settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if app != "anymail_retry"]
    assert smtp_site.connection().fallback is None
    settings.EMAIL_FALLBACK_QUEUE = True
    with pytest.raises(ImproperlyConfigured, match='Add to INSTALLED_APPS: "anymail_retry"'):
        smtp_site.connection()


@pytest.mark.django_db
def test_option_of_the_wrapper_switches_it_off(site: Site, esp: LocalEsp) -> None:
    site.behind("fallback", "anymail.backends.mandrill.EmailBackend", esp, fallback_queue=False)
    esp.script(Status(503))
    with pytest.raises(AnymailRequestsAPIError):
        message().send()
    assert rows() == []


# --- fallback: back ends of others ---


@pytest.mark.django_db
def test_plain_anymail_behind_is_judged_by_its_answers(site: Site, esp: LocalEsp) -> None:
    site.behind("fallback", "anymail.backends.mandrill.EmailBackend", esp)
    esp.script(Rule(Status(503), contains="later"), Rule(Status(400), contains="never"))
    with pytest.raises(AnymailRequestsAPIError) as caught:
        site.connection().send_messages([message("never"), message("later"), message("good")])
    assert caught.value.status_code == 400
    assert [row.subject for row in rows()] == ["later"]
    assert [accepted.subject for accepted in esp.ledger] == ["good"]


@pytest.mark.django_db
def test_back_end_of_ours_behind_makes_one_row_and_not_two(site: Site, esp: LocalEsp) -> None:
    site.behind("fallback", MANDRILL, esp)
    esp.script(Status(503))
    assert message().send() == 1
    assert [row.mailer for row in rows()] == [site.mailer]


class OddBackend(BaseEmailBackend):
    """Somebody's own: it answers as the subject says."""

    def send_messages(self, email_messages: Any) -> Any:
        (sent,) = email_messages
        if sent.subject == "raises":
            raise ZeroDivisionError
        return {"nothing": None, "none": 0, "one": 1}[sent.subject]


@pytest.mark.django_db
@pytest.mark.parametrize(("subject", "count"), [("one", 1), ("nothing", 1), ("none", 0)])
def test_answer_of_a_back_end_is_taken_at_its_word(site: Site, subject: str, count: int) -> None:
    site.behind("fallback", f"{__name__}.OddBackend")
    assert message(subject).send() == count
    assert rows() == []


@pytest.mark.django_db
def test_error_that_nobody_anticipated_is_raised_and_not_queued(site: Site) -> None:
    site.behind("fallback", f"{__name__}.OddBackend")
    with pytest.raises(ZeroDivisionError):
        message("raises").send()
    assert rows() == []


def http_error(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code, response._content = status, b"the words"
    return requests.HTTPError(f"{status} of an API", response=response)


class ThrottlingError(Exception):
    """As botocore's ``ClientError``: no OSError, and its answer is a dict."""

    response: ClassVar = {"Error": {"Code": "Throttling"}, "ResponseMetadata": {"HTTPStatusCode": 429}}


class ApiBackend(BaseEmailBackend):
    """Somebody's back end for somebody's HTTP API."""

    error: Exception

    def send_messages(self, email_messages: Any) -> int:
        raise self.error


def chained(cause: Exception) -> Exception:
    """As a library of its own kind raises it: httpx, aiohttp, botocore."""
    error = RuntimeError("the call failed")
    error.__cause__ = cause
    return error


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("error", "verdict", "status"),
    [
        pytest.param(http_error(429), "refused", 429, id="429"),
        pytest.param(http_error(503), "ambiguous", 503, id="503: nobody knows this API's facts"),
        pytest.param(http_error(401), "blocked", 401, id="401"),
        pytest.param(ThrottlingError(), "refused", 429, id="boto3's throttling"),
        pytest.param(IncompleteRead(b""), "ambiguous", None, id="half an answer"),
        pytest.param(requests.ReadTimeout("slow"), "ambiguous", None, id="requests' read timeout"),
        pytest.param(requests.ConnectTimeout("slow"), "refused", None, id="requests' connect timeout"),
        pytest.param(chained(ConnectionResetError()), "ambiguous", None, id="a reset, under another name"),
        pytest.param(chained(gaierror("no such host")), "refused", None, id="no name, under another name"),
    ],
)
def test_http_api_of_anybody_is_understood(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception, verdict: str, status: int | None
) -> None:
    site.behind("fallback", f"{__name__}.ApiBackend")
    monkeypatch.setattr(ApiBackend, "error", error, raising=False)
    assert message().send() == 1
    (row,) = rows()
    assert (row.verdict, row.http_status) == (verdict, status)


@pytest.mark.django_db
@pytest.mark.parametrize(
    "error",
    [
        pytest.param(http_error(400), id="400: this message can never go"),
        pytest.param(ValueError("no"), id="programming error"),
        pytest.param(chained(FileNotFoundError("template.html")), id="a file that is missing is not the network"),
        pytest.param(ImproperlyConfigured(ConnectionResetError()), id="configuration"),
    ],
)
def test_what_time_does_not_cure_of_an_http_api_is_raised(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    site.behind("fallback", f"{__name__}.ApiBackend")
    monkeypatch.setattr(ApiBackend, "error", error, raising=False)
    with pytest.raises(type(error)) as caught:
        message().send()
    assert caught.value is error
    assert rows() == []


class StubbornBackend(BaseEmailBackend):
    """It sends, and cannot end."""

    def send_messages(self, email_messages: Any) -> int:
        return len(email_messages)

    def close(self) -> None:
        raise OSError("the line is dead")


@pytest.mark.django_db
def test_close_that_fails_undoes_nothing(site: Site) -> None:
    """The message is sent; an error now would have it sent again."""
    site.behind("fallback", f"{__name__}.StubbornBackend")
    assert message().send() == 1


# --- queued ---


@pytest.mark.django_db
def test_queue_first_stores_and_asks_nobody(site: Site, esp: LocalEsp) -> None:
    site.behind("queued", MANDRILL, esp)
    sent = message()
    assert sent.send() == 1
    (row,) = rows()
    assert (row.mailer, row.state, row.origin, row.attempt_count) == (site.mailer, "queued", "queued", 0)
    assert sent.queued_message == row
    assert sent.anymail_status.status == {"queued"}
    assert sent.anymail_status.esp_response is None
    assert esp.requests == []


@pytest.mark.django_db(transaction=True)
def test_queue_first_is_sent_by_the_mailer_behind(site: Site, esp: LocalEsp) -> None:
    """The message is stored as the caller made it; ``pre_send`` fires when it is sent."""

    def receive(message: Any, **kwargs: Any) -> None:
        message.subject = f"[staging] {message.subject}"

    site.behind("queued", MANDRILL, esp)
    pre_send.connect(receive)
    try:
        message("hello").send()
        assert [row.subject for row in rows()] == ["hello"]
        assert Worker().drain().sent == 1
    finally:
        pre_send.disconnect(receive)
    assert [accepted.subject for accepted in esp.ledger] == ["[staging] hello"]


@pytest.mark.django_db(transaction=True)
def test_queue_first_serves_smtp(site: Site, smtp: SmtpServer) -> None:
    site.smtp(smtp.port, wrapper="queued")
    assert site.connection().send_messages([message("1"), message("2")]) == 2
    assert smtp.connections == 0
    assert Worker().drain().sent == 2
    assert {taken.subject for taken in smtp.ledger} == {"1", "2"}


@pytest.mark.django_db
def test_queue_first_leaves_out_messages_without_recipients(site: Site) -> None:
    site.behind("queued", MANDRILL)
    nobody = EmailMessage("Subject", "Body", "from@example.com", [])
    assert site.connection().send_messages([nobody, message("somebody")]) == 1
    assert site.connection().send_messages([nobody]) == 0
    assert [row.subject for row in rows()] == ["somebody"]


class Signed(EmailMessage):
    def message(self, *args: Any, **kwargs: Any) -> Any:
        return super().message(*args, **kwargs)


@pytest.mark.django_db
def test_queue_first_stores_all_or_none(site: Site) -> None:
    site.behind("queued", MANDRILL)
    first = message()
    with pytest.raises(MessageNotQueueable, match=r"message\(\)"):
        site.connection().send_messages([first, Signed("Subject", "Body", None, ["to@example.com"])])
    assert rows() == []
    assert not hasattr(first, "queued_message")
    assert not hasattr(first, "anymail_status")


@pytest.mark.django_db
def test_queue_first_that_fails_silently_says_so_in_the_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.behind("queued", MANDRILL)
    sent = Signed("Subject", "Body", None, ["to@example.com"])
    assert site.connection(fail_silently=True).send_messages([sent]) == 0
    assert not hasattr(sent, "queued_message")
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.django_db
def test_queue_first_that_fails_silently_stores_the_others(site: Site) -> None:
    site.behind("queued", MANDRILL)
    messages = [message("one"), Signed("two", "Body", "from@example.com", ["to@example.com"]), message("three")]
    assert site.connection(fail_silently=True).send_messages(messages) == 2
    assert [row.subject for row in rows()] == ["one", "three"]
    assert [hasattr(each, "queued_message") for each in messages] == [True, False, True]
    assert messages[2].queued_message.subject == "three"


@pytest.mark.django_db
def test_message_that_is_not_stored_tells_nothing_of_an_earlier_time(site: Site) -> None:
    site.behind("queued", MANDRILL)
    sent = message()
    assert sent.send() == 1
    sent.tags = {object()}
    assert site.connection(fail_silently=True).send_messages([sent]) == 0
    assert not hasattr(sent, "queued_message")


@pytest.mark.django_db
@pytest.mark.parametrize("wrapper", ["fallback", "queued"])
def test_no_messages_are_nothing(site: Site, wrapper: str) -> None:
    site.behind(wrapper, "django.core.mail.backends.locmem.EmailBackend")
    assert site.connection().send_messages(None) == 0
    assert site.connection().send_messages([]) == 0


@pytest.mark.django_db
def test_queue_first_never_swallows_a_mistake_in_the_settings(site: Site) -> None:
    site.behind("queued", MANDRILL)
    site.settings.EMAIL_QUEUE_DATABASE = 7
    with pytest.raises(ImproperlyConfigured, match="EMAIL_QUEUE_DATABASE"):
        site.connection(fail_silently=True).send_messages([message()])


def test_queue_first_needs_the_app_and_says_what_to_add(site: Site) -> None:
    site.behind("queued", MANDRILL)
    site.settings.INSTALLED_APPS = [app for app in site.settings.INSTALLED_APPS if app != "anymail_retry"]
    with pytest.raises(ImproperlyConfigured, match='Add to INSTALLED_APPS: "anymail_retry"'):
        site.connection()


@pytest.mark.django_db
def test_queue_first_joins_the_callers_transaction(site: Site) -> None:
    site.behind("queued", MANDRILL)
    with transaction.atomic():
        message().send()
        transaction.set_rollback(True)
    assert rows() == []


@pytest.mark.django_db
def test_site_may_queue_some_of_its_mail_only(settings: SettingsWrapper, esp: LocalEsp) -> None:
    """``EMAIL_BACKEND`` sends; a wrapper made by hand stands before the same back end."""
    site = Site(settings, "legacy")
    site.esp(esp)
    settings.EMAIL_QUEUE_BACKEND = settings.EMAIL_FALLBACK_BACKEND = MANDRILL
    assert queued.EmailBackend().send_messages([message("later")]) == 1
    assert fallback.EmailBackend().send_messages([message("now")]) == 1
    assert [row.subject for row in rows()] == ["later"]
    assert [accepted.subject for accepted in esp.ledger] == ["now"]


# --- What may stand behind ---

FALLBACK = "anymail_retry.backends.fallback.EmailBackend"
QUEUED = "anymail_retry.backends.queued.EmailBackend"


@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
@pytest.mark.parametrize("wrapper", [FALLBACK, QUEUED])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        pytest.param({}, '"OPTIONS": {"using": "<alias>"}', id="nothing"),
        pytest.param({"using": "default"}, "sends through itself", id="itself"),
        pytest.param({"using": "nobody"}, "no alias in MAILERS. Its aliases are: default, other, gone", id="nobody"),
        pytest.param({"using": "other"}, "sends nothing itself", id="a wrapper, and so itself in the end"),
        pytest.param({"using": "gone"}, "cannot be imported", id="something that is gone"),
    ],
)
def test_wrong_mailer_behind_is_refused(
    settings: SettingsWrapper, wrapper: str, options: dict[str, str], what: str
) -> None:
    from django.core.mail import mailers  # Django 6.1

    settings.MAILERS = {
        "default": {"BACKEND": wrapper, "OPTIONS": options},
        "other": {"BACKEND": FALLBACK, "OPTIONS": {"using": "default"}},
        "gone": {"BACKEND": "no.such.EmailBackend"},
    }
    with pytest.raises(ImproperlyConfigured) as caught:
        mailers["default"]
    assert what in str(caught.value)


@pytest.mark.parametrize(("wrapper", "name"), [(FALLBACK, "EMAIL_FALLBACK_BACKEND"), (QUEUED, "EMAIL_QUEUE_BACKEND")])
@pytest.mark.parametrize(
    ("behind", "what"),
    [
        pytest.param(None, ' = "django.core.mail.backends.smtp.EmailBackend"', id="nothing"),
        pytest.param(FALLBACK, "sends nothing itself", id="a wrapper"),
        pytest.param(QUEUED, "sends nothing itself", id="the other wrapper"),
        pytest.param("no.such.EmailBackend", "cannot be imported", id="something that is gone"),
    ],
)
def test_wrong_back_end_behind_is_refused(
    settings: SettingsWrapper, wrapper: str, name: str, behind: str | None, what: str
) -> None:
    site = Site(settings, "legacy")
    settings.EMAIL_BACKEND = wrapper
    if behind is not None:
        setattr(settings, name, behind)
    with pytest.raises(ImproperlyConfigured) as caught:
        site.connection()
    assert name in str(caught.value)
    assert what in str(caught.value)


@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
@pytest.mark.parametrize("wrapper", [FALLBACK, QUEUED])
def test_unknown_option_is_djangos_to_refuse(settings: SettingsWrapper, wrapper: str) -> None:
    """And so is one of ours that the wrapper would not read."""
    from django.core.mail import InvalidMailer, mailers  # Django 6.1

    for option in ("colour", "queue_rate"):
        settings.MAILERS = {
            "default": {"BACKEND": wrapper, "OPTIONS": {"using": "inner", option: 1}},
            "inner": {"BACKEND": MANDRILL},
        }
        with pytest.raises(InvalidMailer, match=option):
            mailers["default"]


@pytest.mark.django_db
def test_back_end_named_for_one_wrapper_is_no_account_of_its_own(settings: SettingsWrapper, esp: LocalEsp) -> None:
    Site(settings, "legacy").esp(esp)
    esp.script(Status(503))
    assert fallback.EmailBackend(using=MANDRILL).send_messages([message()]) == 1
    assert [row.mailer for row in rows()] == [MANDRILL]


def test_smtp_behind_is_made_without_djangos_warning(settings: SettingsWrapper, smtp: SmtpServer) -> None:
    """Django 6.1 deprecates to make it by hand, and makes it so itself where there is no MAILERS."""
    Site(settings, "legacy").smtp(smtp.port, wrapper="fallback")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(fallback.EmailBackend().inner, SmtpBackend)


class MyBackend(fallback.EmailBackend):
    """A subclass that always gives an account: the worker makes the same."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(username="mine", password="secret", **kwargs)


@pytest.mark.django_db
def test_subclass_with_options_passes_them_on(settings: SettingsWrapper, smtp: SmtpServer) -> None:
    Site(settings, "legacy").smtp(smtp.port, wrapper="fallback")
    backend = MyBackend()
    assert isinstance(backend.inner, SmtpBackend)
    assert backend.send_messages([message()]) == 1
    assert [taken.user for taken in smtp.ledger] == ["mine"]
