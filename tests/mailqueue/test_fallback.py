"""What a send that fails leaves in the queue, and what its caller sees: on the wire, and in a real database."""

from __future__ import annotations

import asyncio
import logging
import threading
import unittest
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any

import pytest
import requests
from anymail.exceptions import AnymailAPIError, AnymailRecipientsRefused, AnymailRequestsAPIError
from anymail.message import AnymailMessage
from anymail.signals import pre_send
from django.contrib.auth.models import Group
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.db import OperationalError, connection, connections, transaction
from django.test import SimpleTestCase
from django.test.utils import CaptureQueriesContext

from anymail_retry.backends.mandrill import EmailBackend
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import QueuedMessage
from anymail_retry.signals import message_queued
from anymail_retry.testing import AcceptThenDrop, LocalEsp, Rule, Status
from anymail_retry.testing.pytest import local_esp
from tests.sites import WAYS, Site, message, site, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django import DjangoCaptureOnCommitCallbacks, DjangoDbBlocker
    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp", "site"]  # fixtures

SITE_KEY, TENANT_KEY = "site-key", "tenant-key"

DOWN = Rule(Status(503))


@pytest.fixture
def esp(local_esp: Callable[..., LocalEsp], settings: SettingsWrapper) -> LocalEsp:
    """Mandrill, which knows two accounts. Sends are tried once."""
    settings.EMAIL_TOTAL_RETRIES = 0
    return local_esp("mandrill", api_keys=(SITE_KEY, TENANT_KEY))


@pytest.fixture
def esp_site(site: Site, esp: LocalEsp) -> Site:
    site.esp(esp)
    return site


def send(sent: Any, by: Any = None) -> int:
    """Send a message, through a connection of its own if one is given."""
    return int(sent.send() if by is None else by.send_messages([sent]))


def fail_to_send(sent: Any, by: Any = None) -> Any:
    """Send a message; what is raised, which is the ESP's error and says why the message was not kept."""
    with pytest.raises(AnymailRequestsAPIError) as caught:
        send(sent, by)
    assert "not kept in the queue" in words(caught.value)
    return caught.value


def queued() -> list[QueuedMessage]:
    return list(QueuedMessage.objects.order_by("pk"))


# --- What the caller sees ---


@pytest.mark.django_db
def test_failed_send_is_kept_and_looks_like_a_success(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(DOWN)
    sent = message(cc=["Anna Ölund <anna@example.com>"])
    assert sent.send() == 1
    (row,) = queued()
    assert sent.queued_message == row
    assert (row.mailer, row.state, row.origin) == (esp_site.mailer, "deferred", "fallback")
    assert (row.verdict, row.http_status, row.attempt_count) == ("refused", 503, 1)
    status = sent.anymail_status
    assert status.status == {"queued"}
    assert {address: one.status for address, one in status.recipients.items()} == {
        "to@example.com": "queued",
        "anna@example.com": "queued",
    }
    assert status.message_id is None
    assert status.esp_response is None
    assert isinstance(sent.send_error, AnymailRequestsAPIError)
    assert [attempt.status for attempt in sent.retry_history] == [503]


@pytest.mark.django_db
@pytest.mark.parametrize("make", [EmailMessage, AnymailMessage])
def test_nothing_else_of_the_message_is_touched(esp_site: Site, esp: LocalEsp, make: Any) -> None:
    esp.script(DOWN)
    sent = make("Subject", "Body", "from@example.com", ["to@example.com"], headers={"X-A": "1"})
    sent.attach("a.txt", "text", "text/plain")
    sent.metadata = {"order": 7}
    before = {name: repr(value) for name, value in vars(sent).items() if name != "anymail_status"}
    sent.send()
    after = {name: repr(value) for name, value in vars(sent).items()}
    ours = {"anymail_status", "queued_message", "retry_history", "send_error"}
    # Django keeps the connection that it made.
    assert {name: after[name] for name in after.keys() - ours - {"connection"}} == {
        name: before[name] for name in before.keys() - {"connection"}
    }
    assert ours <= after.keys()


@pytest.mark.django_db
def test_sent_message_tells_nothing_of_an_earlier_failure(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(DOWN)
    sent = message()
    sent.send()
    esp.script()
    assert sent.send() == 1
    assert not hasattr(sent, "queued_message")
    assert not hasattr(sent, "send_error")
    assert sent.anymail_status.status == {"sent"}


@pytest.mark.django_db(transaction=True)
def test_queued_message_arrives_once(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(DOWN)
    message().send()
    esp.script()
    QueuedMessage.objects.update(due_at=QueuedMessage.objects.get().created_at)
    assert Worker().drain().sent == 1
    assert Worker().drain().sent == 0
    assert len(esp.ledger) == 1


@pytest.mark.django_db
def test_message_that_may_have_been_taken_is_kept_as_such(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(AcceptThenDrop())
    sent = message()
    assert sent.send() == 1
    (row,) = queued()
    assert row.verdict == "ambiguous"
    assert row.maybe_taken_since is not None
    assert len(esp.ledger) == 1


@pytest.mark.django_db
def test_longer_wait_than_a_call_may_take_is_left_to_the_queue(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(Status(429, retry_after=3600))
    message().send()
    (row,) = queued()
    assert row.due_at is not None
    assert row.due_at - row.created_at >= timedelta(hours=1)


@pytest.mark.django_db
def test_esp_that_is_down_costs_no_more_than_the_tries_that_are_set(
    esp_site: Site, esp: LocalEsp, settings: SettingsWrapper
) -> None:
    settings.EMAIL_TOTAL_RETRIES = 2
    settings.EMAIL_RETRY_BACKOFF_FACTOR = settings.EMAIL_RETRY_BACKOFF_JITTER = 0
    esp.script(DOWN)
    sent = message()
    sent.send()
    assert len(sent.retry_history) == len(esp.requests) == 3


# --- What it costs ---


@pytest.mark.django_db
def test_good_send_costs_no_sql(esp_site: Site, esp: LocalEsp) -> None:
    with CaptureQueriesContext(connection) as queries:
        assert message().send() == 1
    assert [query["sql"] for query in queries] == []
    assert len(esp.ledger) == 1


@pytest.mark.django_db
@pytest.mark.parametrize("inside", [False, True], ids=["outside a transaction", "inside one"])
def test_fallback_costs_two_inserts_at_most(esp_site: Site, esp: LocalEsp, inside: bool) -> None:
    esp.script(DOWN)
    message("the first learns the database's time").send()
    with transaction.atomic(savepoint=inside), CaptureQueriesContext(connection) as queries:
        message().send()
    statements = [query["sql"].split()[0] for query in queries]
    inserts = ["WITH"] if connection.vendor == "postgresql" else ["INSERT", "INSERT"]  # PostgreSQL takes both in one
    assert statements == ["SAVEPOINT", *inserts, "RELEASE"]


@pytest.mark.django_db(transaction=True)
def test_database_connection_that_the_fallback_opened_is_closed_again(esp_site: Site, esp: LocalEsp) -> None:
    """Else an outage of the ESP would take a connection for each thread, and become one of the database."""
    esp.script(DOWN)
    seen: list[Any] = []

    def in_a_thread() -> None:
        message().send()
        seen.append(connection.connection)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert seen == [None]
    assert len(queued()) == 1


@pytest.mark.django_db(transaction=True)
def test_database_connection_that_the_caller_opened_stays_open(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(DOWN)
    connection.ensure_connection()
    before = connection.connection
    message().send()
    assert connection.connection is before


# --- Transactions and signals ---


@pytest.fixture
def announced() -> Iterator[list[QueuedMessage]]:
    """The rows of which ``message_queued`` told."""
    rows: list[QueuedMessage] = []

    def receive(queued_message: QueuedMessage, **kwargs: Any) -> None:
        rows.append(queued_message)

    message_queued.connect(receive)
    yield rows
    message_queued.disconnect(receive)


@pytest.mark.django_db(transaction=True)
def test_signal_is_sent_when_the_row_is_committed(
    esp_site: Site, esp: LocalEsp, announced: list[QueuedMessage]
) -> None:
    esp.script(DOWN)
    with transaction.atomic():
        message().send()
        assert announced == []
    assert announced == queued()
    assert len(announced) == 1


@pytest.mark.django_db(transaction=True)
def test_row_goes_with_the_callers_transaction(
    esp_site: Site, esp: LocalEsp, announced: list[QueuedMessage], caplog: pytest.LogCaptureFixture
) -> None:
    esp.script(DOWN)
    with transaction.atomic():
        message().send()
        transaction.set_rollback(True)
    assert queued() == announced == []
    assert "inside a transaction" in caplog.text


@pytest.mark.django_db
def test_receiver_that_raises_changes_nothing(
    esp_site: Site,
    esp: LocalEsp,
    announced: list[QueuedMessage],
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    def receive(**kwargs: Any) -> None:
        raise ZeroDivisionError

    esp.script(DOWN)
    message_queued.connect(receive)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            assert message().send() == 1
    finally:
        message_queued.disconnect(receive)
    assert announced == queued()


# --- A database that does not take it ---


@contextmanager
def no_table() -> Iterator[None]:
    """The app is installed, and nobody has migrated."""
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE anymail_retry_queuedmessage RENAME TO gone")
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE gone RENAME TO anymail_retry_queuedmessage")


class ForbiddingRouter:
    """A site's own, which lets nobody write from here."""

    def db_for_write(self, model: Any, **hints: Any) -> None:
        if model._meta.app_label == "anymail_retry":
            raise PermissionError("no mail from this host")


@contextmanager
def forbidding_router() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("django.db.router.routers", [ForbiddingRouter()])
        yield


@contextmanager
def another_database_that_is_forbidden() -> Iterator[None]:
    """As in a TestCase whose ``databases`` do not name the queue's."""
    from django.test.utils import override_settings

    with override_settings(EMAIL_QUEUE_DATABASE="queue"):
        yield


@contextmanager
def database_that_does_not_exist() -> Iterator[None]:
    from django.test.utils import override_settings

    with override_settings(EMAIL_QUEUE_DATABASE="nowhere"):
        yield


READ_ONLY = {
    "sqlite": ("PRAGMA query_only = ON", "PRAGMA query_only = OFF"),
    "postgresql": ("SET LOCAL transaction_read_only = on", None),  # for what is left of the transaction
}


@contextmanager
def read_only() -> Iterator[None]:
    """From here on, what is left of the transaction may only read."""
    if connection.vendor not in READ_ONLY:
        pytest.skip(f"{connection.vendor} cannot be made read-only inside a transaction")
    on, off = READ_ONLY[connection.vendor]
    with connection.cursor() as cursor:
        cursor.execute(on)
    try:
        yield
    finally:
        if off is not None:
            with connection.cursor() as cursor:
                cursor.execute(off)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("obstacle", "why"),
    [
        pytest.param(no_table, "anymail_retry_queuedmessage", id="no table"),
        pytest.param(forbidding_router, "PermissionError: no mail from this host", id="router"),
        pytest.param(another_database_that_is_forbidden, "DatabaseOperationForbidden", id="forbidden in a test"),
        pytest.param(database_that_does_not_exist, "ConnectionDoesNotExist", id="no such database"),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["outside a transaction", "inside one"])
def test_obstacle_in_the_database_leaves_the_callers_work_and_the_esps_error(
    esp_site: Site, esp: LocalEsp, obstacle: Any, why: str, inside: bool
) -> None:
    esp.script(DOWN)
    with obstacle():
        if inside:
            with transaction.atomic():
                Group.objects.create(name="before")
                error = fail_to_send(message())
                Group.objects.create(name="after")
        else:
            Group.objects.create(name="before")
            error = fail_to_send(message())
            Group.objects.create(name="after")
    assert error.status_code == 503
    assert why in words(error)
    assert {group.name for group in Group.objects.all()} == {"before", "after"}
    assert queued() == []


@pytest.mark.django_db(transaction=True)
def test_read_only_database_leaves_the_callers_work_and_the_esps_error(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(DOWN)
    with transaction.atomic():
        Group.objects.create(name="before")
        with read_only():
            error = fail_to_send(message())
    assert error.status_code == 503
    assert "Error" in words(error)
    assert [group.name for group in Group.objects.all()] == ["before"]
    assert queued() == []


@pytest.mark.django_db(transaction=True)
def test_wrong_encryption_key_brings_the_esps_error(esp_site: Site, esp: LocalEsp, settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_ENCRYPTION_KEYS = ["no-such-key"]
    esp.script(DOWN)
    error = fail_to_send(message())
    assert "EMAIL_QUEUE_ENCRYPTION_KEYS" in words(error)
    assert "no-such-key" not in words(error)
    assert queued() == []


@pytest.mark.django_db(transaction=True)
def test_transaction_that_is_broken_already_brings_the_esps_error(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(DOWN)
    with transaction.atomic():
        transaction.set_rollback(True)
        error = fail_to_send(message())
    assert "TransactionManagementError" in words(error)


@pytest.mark.django_db(transaction=True)
def test_async_context_brings_the_esps_error(esp_site: Site, esp: LocalEsp) -> None:
    async def view() -> Any:
        return fail_to_send(message())  # plain Anymail can be used so

    esp.script(DOWN)
    assert "SynchronousOnlyOperation" in words(asyncio.run(view()))


def test_simple_test_case_brings_the_esps_error(
    esp_site: Site, esp: LocalEsp, django_db_blocker: DjangoDbBlocker
) -> None:
    """Django forbids it the database with an AssertionError, which is no error of any database."""

    class Test(SimpleTestCase):
        def runTest(self) -> None:  # noqa: N802  # unittest's name
            errors.append(fail_to_send(message()))

    errors: list[Any] = []
    esp.script(DOWN)
    result = unittest.TestResult()
    with django_db_blocker.unblock():  # else pytest-django may be faster than Django
        unittest.TestSuite([Test()]).run(result)
    assert result.errors == result.failures == []
    assert "DatabaseOperationForbidden" in words(errors[0])


@pytest.mark.django_db(transaction=True)
def test_error_keeps_its_cause(esp_site: Site, esp: LocalEsp) -> None:
    """A user's ``except`` looks there."""
    esp.stop_listening()
    with no_table(), pytest.raises(AnymailAPIError) as caught:
        message().send()
    assert isinstance(caught.value.__cause__, requests.ConnectionError)
    assert isinstance(caught.value, requests.ConnectionError)


@pytest.mark.django_db(transaction=True)
def test_obstacle_is_logged_as_an_error(esp_site: Site, esp: LocalEsp, caplog: pytest.LogCaptureFixture) -> None:
    esp.script(DOWN)
    with no_table():
        fail_to_send(message())
    assert [record.levelname for record in caplog.records if "not kept in the queue" in record.getMessage()] == [
        "ERROR"
    ]


class Signed(EmailMessage):
    """As S/MIME packages do it: what it sends is made when it is sent."""

    def message(self, *args: Any, **kwargs: Any) -> Any:
        return super().message(*args, **kwargs)


@pytest.mark.django_db
def test_message_that_cannot_be_kept_brings_the_esps_error(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(DOWN)
    error = fail_to_send(Signed("Subject", "Body", "from@example.com", ["to@example.com"]))
    assert error.status_code == 503
    assert "MessageNotQueueable" in words(error)
    assert "message()" in words(error)
    assert queued() == []


@pytest.mark.django_db
def test_back_end_that_no_worker_would_find_brings_the_esps_error(esp: LocalEsp, settings: SettingsWrapper) -> None:
    class Nowhere(EmailBackend):
        """Its dotted path leads nowhere."""

    settings.ANYMAIL = esp.settings()
    esp.script(DOWN)
    assert "MailerGone" in words(fail_to_send(message(), by=Nowhere()))
    assert queued() == []


# --- Accounts ---


class TenantBackend(EmailBackend):
    """An account of its own, in the way that the error recommends."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(api_key=TENANT_KEY, **kwargs)


def make_due() -> None:
    for row in queued():
        row.due_at = row.created_at
        row.save()


@pytest.mark.django_db(transaction=True)
def test_connection_with_an_account_of_its_own_is_never_drained_by_another(esp_site: Site, esp: LocalEsp) -> None:
    """By the ESP's ledger: the tenant's mail is not sent with the site's key."""
    esp.script(DOWN)
    tenants = esp_site.connection(api_key=TENANT_KEY)
    error = fail_to_send(message("tenant's"), by=tenants)
    assert "api_key" in words(error)
    assert "an alias in MAILERS, or a subclass" in words(error)
    assert TENANT_KEY not in words(error)
    message("site's").send()
    esp.script()
    make_due()
    Worker().drain()
    assert [(accepted.subject, accepted.api_key) for accepted in esp.ledger] == [("site's", SITE_KEY)]
    send(message("tenant's"), by=tenants)
    assert esp.ledger[-1].api_key == TENANT_KEY


@pytest.mark.django_db(transaction=True)
def test_subclass_with_an_account_of_its_own_is_drained_by_itself(esp_site: Site, esp: LocalEsp) -> None:
    esp_site.settings.ANYMAIL = {**esp.settings(), "MANDRILL_API_KEY": SITE_KEY}
    esp.script(DOWN)
    TenantBackend().send_messages([message()])
    (row,) = queued()
    assert row.mailer == f"{__name__}.TenantBackend"
    esp.script()
    make_due()
    assert Worker().drain().sent == 1
    assert [accepted.api_key for accepted in esp.ledger] == [TENANT_KEY]


@pytest.mark.django_db
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"total_retries": 0}, id="how often it tries"),
        pytest.param({"fallback_queue": True}, id="that it queues"),
        pytest.param({"username": None, "password": None}, id="as Django 5.2 calls it"),
    ],
)
def test_options_that_are_no_account_keep_nothing_from_the_queue(
    esp_site: Site, esp: LocalEsp, options: dict[str, Any]
) -> None:
    esp.script(DOWN)
    assert send(message(), by=esp_site.connection(**options)) == 1
    assert [row.mailer for row in queued()] == [esp_site.mailer]


@pytest.mark.django_db
def test_account_that_was_changed_afterwards_is_not_drained_by_another(esp_site: Site, esp: LocalEsp) -> None:
    """Nobody gave it as an option."""
    esp.script(DOWN)
    tenants = esp_site.connection()
    tenants.api_key = TENANT_KEY
    error = fail_to_send(message(), by=tenants)
    assert "api_key" in words(error)
    assert TENANT_KEY not in words(error)
    assert queued() == []


@pytest.mark.django_db
@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(lambda o: EmailBackend(alias="default", **{**o, "api_key": TENANT_KEY}), "api_key", id="account"),
        pytest.param(lambda o: TenantBackend(alias="default", api_url=o["api_url"]), "is another one", id="class"),
    ],
)
def test_back_end_that_only_claims_an_alias_is_not_drained_by_it(
    settings: SettingsWrapper, esp: LocalEsp, make: Any, what: str
) -> None:
    Site(settings, "mailers").esp(esp)
    esp.script(DOWN)
    assert what in words(fail_to_send(message(), by=make(esp.options())))
    assert queued() == []


@pytest.mark.django_db
def test_policy_of_one_connection_cannot_be_kept(esp_site: Site, esp: LocalEsp) -> None:
    """The worker would not know of it, so it must not look as if it did."""
    esp.script(DOWN)
    error = fail_to_send(message(), by=esp_site.connection(queue_on_ambiguous="hold"))
    assert "queue_on_ambiguous" in words(error)


# --- What is not kept ---


@pytest.mark.django_db
def test_message_that_can_never_go_is_raised_as_anymail_raises_it(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(Status(400, {"status": "error", "name": "ValidationError", "message": "no such thing"}))
    sent = message()
    with pytest.raises(AnymailRequestsAPIError, match="no such thing") as caught:
        sent.send()
    assert caught.value.status_code == 400
    assert caught.value.response.json()["name"] == "ValidationError"
    assert sent.send_error is caught.value
    assert queued() == []


@pytest.mark.django_db
def test_message_without_a_good_recipient_is_raised_as_anymail_raises_it(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(Status(200, [{"email": "to@example.com", "status": "rejected", "_id": "1"}]))
    with pytest.raises(AnymailRecipientsRefused):
        message().send()
    assert queued() == []


@pytest.mark.django_db
def test_message_without_recipients_is_nothing(esp_site: Site, esp: LocalEsp) -> None:
    nobody = EmailMessage("Subject", "Body", "from@example.com", [])
    assert esp_site.connection().send_messages([nobody]) == 0
    assert esp_site.connection().send_messages([]) == 0
    assert esp.requests == queued() == []


@pytest.fixture
def wrong_key(site: Site, esp: LocalEsp) -> Site:
    site.esp(esp, api_key="a key that was revoked")
    return site


@pytest.mark.django_db
def test_wrong_key_of_a_live_site_is_an_error_in_the_log_and_the_mail_is_kept(
    wrong_key: Site, esp: LocalEsp, caplog: pytest.LogCaptureFixture
) -> None:
    assert message().send() == 1
    (row,) = queued()
    assert (row.verdict, row.http_status) == ("blocked", 401)
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.getMessage().startswith(f"{wrong_key.mailer}: the account is blocked (401)")
    assert "a key that was revoked" not in caplog.text


@pytest.mark.django_db
def test_wrong_key_is_raised_in_development(wrong_key: Site, settings: SettingsWrapper) -> None:
    settings.DEBUG = True
    with pytest.raises(AnymailRequestsAPIError) as caught:
        message().send()
    assert caught.value.status_code == 401
    assert queued() == []


@pytest.mark.django_db
def test_outage_in_development_is_kept_as_ever(esp_site: Site, esp: LocalEsp, settings: SettingsWrapper) -> None:
    settings.DEBUG = True
    esp.script(DOWN)
    assert message().send() == 1
    assert len(queued()) == 1


@pytest.mark.django_db
def test_wrong_url_is_an_error_and_not_queued(site: Site, esp: LocalEsp) -> None:
    """A mistake in the settings: time does not cure it."""
    site.esp(esp, api_url="htps://127.0.0.1/")
    with pytest.raises(AnymailRequestsAPIError, match="MissingSchema"):
        message().send()
    assert queued() == []


# --- On and off ---


@pytest.mark.django_db
def test_queue_that_is_switched_off_is_plain_anymail(site: Site, esp: LocalEsp) -> None:
    site.esp(esp, fallback_queue=False)
    esp.script(DOWN)
    with pytest.raises(AnymailRequestsAPIError) as caught:
        message().send()
    assert "queue" not in words(caught.value)
    assert queued() == []


def test_without_the_app_there_is_no_queue(esp_site: Site, esp: LocalEsp, settings: SettingsWrapper) -> None:
    settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if app != "anymail_retry"]
    esp.script(DOWN)
    with pytest.raises(AnymailRequestsAPIError) as caught:
        message().send()
    assert "queue" not in words(caught.value)


def test_queue_that_is_wanted_without_the_app_is_an_error_with_the_line_to_add(
    esp_site: Site, settings: SettingsWrapper
) -> None:
    settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if app != "anymail_retry"]
    settings.EMAIL_FALLBACK_QUEUE = True
    with pytest.raises(ImproperlyConfigured, match='Add to INSTALLED_APPS: "anymail_retry"'):
        esp_site.connection()


# --- Many messages in one call ---


def script_of_four(esp: LocalEsp) -> list[Any]:
    """Two that arrive, one to be queued, and two that can never go."""
    esp.script(
        Rule(Status(503), contains="later"),
        Rule(Status(400, {"message": "the first"}), contains="never 1"),
        Rule(Status(400, {"message": "the second"}), contains="never 2"),
    )
    return [message(subject) for subject in ("good 1", "never 1", "later", "never 2", "good 2")]


@pytest.mark.django_db
def test_every_message_of_a_call_is_tried_and_the_first_that_can_never_go_is_raised(
    esp_site: Site, esp: LocalEsp, caplog: pytest.LogCaptureFixture
) -> None:
    messages = script_of_four(esp)
    with pytest.raises(AnymailRequestsAPIError, match="the first") as caught:
        esp_site.connection().send_messages(messages)
    assert [accepted.subject for accepted in esp.ledger] == ["good 1", "good 2"]
    assert [row.subject for row in queued()] == ["later"]
    assert messages[1].send_error is caught.value
    assert "the second" in str(messages[3].send_error)
    assert (
        len(
            [
                record
                for record in caplog.records
                if "a send failed and is not queued: AnymailRequestsAPIError (HTTP 400)" in record.getMessage()
            ]
        )
        == 2
    )


@pytest.mark.django_db
@pytest.mark.filterwarnings("ignore:Anymail will drop support for fail_silently:DeprecationWarning")
def test_failing_silently_counts_what_was_sent_or_kept(esp_site: Site, esp: LocalEsp) -> None:
    messages = script_of_four(esp)
    assert esp_site.connection(fail_silently=True).send_messages(messages) == 3
    assert [row.subject for row in queued()] == ["later"]
    assert "the first" in str(messages[1].send_error)


@pytest.mark.django_db
def test_call_without_failures_counts_its_messages(esp_site: Site, esp: LocalEsp) -> None:
    esp.script(Rule(Status(503), contains="later"))
    made_when_asked = (message(subject) for subject in ("good 1", "later", "good 2"))
    assert esp_site.connection().send_messages(made_when_asked) == 3


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("error", "arrived"),
    [
        pytest.param(ZeroDivisionError, ["1"], id="a mistake: at once"),
        pytest.param(ConnectionRefusedError, ["1", "3"], id="the trouble of one message: after the others"),
    ],
)
def test_error_of_a_receiver_is_raised_and_not_queued(
    esp_site: Site, esp: LocalEsp, error: type[Exception], arrived: list[str]
) -> None:

    def receive(message: Any, **kwargs: Any) -> None:
        if message.subject == "2":
            raise error

    pre_send.connect(receive)
    try:
        with pytest.raises(error):
            esp_site.connection().send_messages([message("1"), message("2"), message("3")])
    finally:
        pre_send.disconnect(receive)
    assert [accepted.subject for accepted in esp.ledger] == arrived
    assert queued() == []


@pytest.mark.django_db
def test_without_the_queue_the_first_error_ends_the_call_as_in_anymail(site: Site, esp: LocalEsp) -> None:
    site.esp(esp, fallback_queue=False)
    with pytest.raises(AnymailRequestsAPIError, match="the first"):
        site.connection().send_messages(script_of_four(esp))
    assert [accepted.subject for accepted in esp.ledger] == ["good 1"]


@pytest.mark.django_db
def test_one_session_serves_the_whole_call(esp_site: Site, esp: LocalEsp) -> None:
    backend = esp_site.connection()
    made = []
    backend.create_session = lambda: made.append(1) or type(backend).create_session(backend)
    assert backend.send_messages([message("1"), message("2")]) == 2
    assert made == [1]
    assert backend.session is None


# --- Its place among the bases ---


def test_mixin_is_written_before_what_retries() -> None:
    from anymail.backends.mandrill import EmailBackend as AnymailBackend

    from anymail_retry import RetryMixin
    from anymail_retry.mailqueue.fallback import FallbackQueueMixin

    order = r"class Wrong\(FallbackQueueMixin, RetryMixin, EmailBackend\)"
    for bases in [(FallbackQueueMixin, AnymailBackend), (RetryMixin, FallbackQueueMixin, AnymailBackend)]:
        with pytest.raises(TypeError, match=order):
            type("Wrong", bases, {})
    assert type("Right", (FallbackQueueMixin, RetryMixin, AnymailBackend), {})
    assert type("Mixed", (type("Mine", (FallbackQueueMixin,), {}), RetryMixin, AnymailBackend), {})


@pytest.mark.django_db
def test_message_whose_time_is_over_is_not_kept(esp_site: Site, esp: LocalEsp) -> None:
    """It would be reported as a success, and could only expire."""
    esp.script(DOWN)
    late = message()
    late.expires_at = timedelta(seconds=-1)
    assert "expires_at: is over" in words(fail_to_send(late))


@pytest.mark.django_db
def test_key_of_an_account_in_esp_extra_is_not_stored(esp_site: Site, esp: LocalEsp) -> None:
    """Mandrill's key stands in the request's body, where ``esp_extra`` may replace it."""
    esp.script(DOWN)
    tenants = message()
    tenants.esp_extra = {"key": TENANT_KEY}
    assert "'key' in esp_extra: secrets are not stored" in words(fail_to_send(tenants))
    assert queued() == []


@pytest.mark.django_db
@pytest.mark.parametrize("value", ["drop", 1])
def test_policy_that_means_nothing_is_named(esp_site: Site, esp: LocalEsp, value: Any) -> None:
    esp.script(DOWN)
    odd = message()
    odd.on_ambiguous = value
    assert f"on_ambiguous is {value!r}, and should be 'resend' or 'hold'" in words(fail_to_send(odd))


@pytest.mark.django_db
def test_what_cannot_be_kept_is_told_without_the_addresses_on_the_way_to_it(
    esp_site: Site, esp: LocalEsp, caplog: pytest.LogCaptureFixture
) -> None:
    esp.script(DOWN)
    odd = message()
    odd.merge_metadata = {"to@example.com": {"f": Stage.FIRST}}
    error = fail_to_send(odd)
    assert "to@example.com" not in caplog.text
    assert "merge_metadata[...]" in words(error)


class Stage(str, Enum):
    """JSON has it as "first", a text as "Stage.FIRST": it cannot be kept exactly."""

    FIRST = "first"


@pytest.mark.django_db(transaction=True)
def test_database_that_is_down_is_asked_once(esp_site: Site, esp: LocalEsp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time may take its connect timeout, and the caller waits."""
    esp.script(DOWN)
    asked: list[str] = []

    def get_new_connection(self: Any, params: Any) -> Any:
        asked.append(self.alias)
        raise OperationalError("down")

    monkeypatch.setattr(type(connections["default"]), "get_new_connection", get_new_connection)
    errors: list[Any] = []
    thread = threading.Thread(target=lambda: errors.append(fail_to_send(message())))  # one without a connection
    thread.start()
    thread.join()
    assert "OperationalError: down" in words(errors[0])
    assert asked == ["default"]
