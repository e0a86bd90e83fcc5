"""The mail functions that store instead of send: Django's signatures, and mail for the right mailer."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.db import DatabaseError, connection

import anymail_retry
from anymail_retry import send_mail
from anymail_retry.exceptions import MessageNotQueueable
from anymail_retry.mailqueue.functions import store
from anymail_retry.mailqueue.serialization import unpack
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import QueuedMessage
from anymail_retry.testing import LocalEsp
from anymail_retry.testing.pytest import local_esp
from tests.sites import MANDRILL, SMTP, WAYS, Site, site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp", "site"]  # fixtures

FROM, TO = "from@example.com", ["to@example.com"]


@pytest.fixture
def mandrill(site: Site) -> Site:
    """A site whose mail goes through Mandrill; nothing is sent in most of these tests."""
    site.settings.ANYMAIL = {"MANDRILL_API_KEY": "test-api-key"}
    site.behind("", MANDRILL)
    if site.way == "mailers":
        site.settings.MAILERS = {
            "default": {"BACKEND": MANDRILL, "OPTIONS": {"api_key": "test-api-key"}},
            "bulk": {"BACKEND": MANDRILL, "OPTIONS": {"api_key": "test-api-key"}},
        }
    return site


def only() -> Any:
    """The one message that was stored, with ``row``."""
    (row,) = rows()
    stored: Any = unpack(row.content.payload, [])
    stored.row = row
    return stored


def rows() -> list[QueuedMessage]:
    return list(QueuedMessage.objects.order_by("pk"))


# --- Signatures ---

NAMES = ["send_mail", "send_mass_mail", "mail_admins", "mail_managers"]


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_every_call_of_djangos_function_is_one_of_ours(name: str) -> None:
    """Its parameters by name and default; those that it takes by position, ours do in the same order."""
    theirs, ours = parameters(getattr(mail, name)), parameters(getattr(anymail_retry, name))
    assert theirs.keys() <= ours.keys()
    for parameter in theirs.values():
        assert ours[parameter.name].default == parameter.default
    by_position = [name for name, parameter in theirs.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert list(ours)[: len(by_position)] == by_position
    assert ours["priority"].kind is inspect.Parameter.KEYWORD_ONLY
    assert ours["priority"].default is None
    assert ours.keys() - theirs.keys() <= {"priority", "using"}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        (
            "send_mail",
            "subject message from_email recipient_list fail_silently auth_user auth_password connection html_message",
        ),
        ("send_mass_mail", "datatuple fail_silently auth_user auth_password connection"),
        ("mail_admins", "subject message fail_silently connection html_message"),
        ("mail_managers", "subject message fail_silently connection html_message"),
    ],
)
def test_positions_of_django_5_2_are_taken(name: str, order: str) -> None:
    """Django 6.1 deprecates them; code that uses them need not change for us."""
    ours = parameters(getattr(anymail_retry, name))
    assert list(ours)[: len(order.split())] == order.split()


def test_send_html_mail_is_django_mailers() -> None:
    order = "subject message message_html from_email recipient_list fail_silently auth_user auth_password headers"
    assert list(parameters(anymail_retry.send_html_mail))[:9] == order.split()


# --- What is stored ---


@pytest.mark.django_db
def test_send_mail_stores(mandrill: Site) -> None:
    assert anymail_retry.send_mail("Hello", "Text", FROM, TO, html_message="<p>Text</p>") == 1
    stored = only()
    assert (stored.subject, stored.body, stored.from_email, stored.to) == ("Hello", "Text", FROM, TO)
    assert [tuple(alternative) for alternative in stored.alternatives] == [("<p>Text</p>", "text/html")]
    row = stored.row
    assert (row.mailer, row.origin, row.state, row.priority) == (mandrill.mailer, "queued", "queued", 2)


@pytest.mark.django_db
def test_sender_by_default_is_the_sites(mandrill: Site) -> None:
    mandrill.settings.DEFAULT_FROM_EMAIL = "site@example.com"
    anymail_retry.send_mail("Hello", "Text", None, TO)
    assert only().from_email == "site@example.com"


@pytest.mark.django_db
def test_send_html_mail_stores(mandrill: Site) -> None:
    sent = anymail_retry.send_html_mail("Hello", "Text", "<p>Text</p>", FROM, TO, headers={"X-A": "1"}, priority="high")
    assert sent == 1
    stored = only()
    assert (stored.body, dict(stored.extra_headers)) == ("Text", {"X-A": "1"})
    assert [tuple(alternative) for alternative in stored.alternatives] == [("<p>Text</p>", "text/html")]
    assert stored.row.priority == 1


@pytest.mark.django_db
def test_send_mass_mail_stores_each(mandrill: Site) -> None:
    mails = [("1", "Text", FROM, TO), ("2", "Text", None, ["b@example.com"]), ("nobody", "Text", FROM, [])]
    assert anymail_retry.send_mass_mail((row for row in mails), priority="low") == 2
    assert [(row.subject, row.recipients, row.priority) for row in rows()] == [
        ("1", "to@example.com", 3),
        ("2", "b@example.com", 3),
    ]


@pytest.mark.django_db
def test_send_mass_mail_of_nothing_is_nothing(mandrill: Site) -> None:
    assert anymail_retry.send_mass_mail([]) == 0
    assert anymail_retry.send_mail("Hello", "Text", FROM, []) == 0
    assert rows() == []


@pytest.mark.django_db
@pytest.mark.parametrize(("priority", "number"), [("high", 1), ("medium", 2), ("low", 3), (None, 2), (1, 1)])
def test_priority_is_stored(mandrill: Site, priority: Any, number: int) -> None:
    anymail_retry.send_mail("Hello", "Text", FROM, TO, priority=priority)
    assert only().row.priority == number


@pytest.mark.django_db
def test_unknown_priority_is_an_error(mandrill: Site) -> None:
    with pytest.raises(ValueError, match="priority is 'urgent'"):
        anymail_retry.send_mail("Hello", "Text", FROM, TO, priority="urgent", fail_silently=True)
    assert rows() == []


PAIRS = [("Anna", "anna@example.com"), ["Bea", "bea@example.com"]]
STRINGS = ["anna@example.com", "bea@example.com"]


@pytest.mark.django_db
@pytest.mark.parametrize(("setting", "function"), [("ADMINS", "mail_admins"), ("MANAGERS", "mail_managers")])
@pytest.mark.parametrize("people", [PAIRS, STRINGS, tuple(STRINGS)], ids=["pairs", "strings", "tuple"])
def test_people_of_the_settings_get_it(mandrill: Site, setting: str, function: str, people: Any) -> None:
    """As pairs until Django 5.2, and as addresses since 6.0."""
    mandrill.settings.SERVER_EMAIL = "server@example.com"
    mandrill.settings.EMAIL_SUBJECT_PREFIX = "[Shop] "
    setattr(mandrill.settings, setting, people)
    send = getattr(anymail_retry, function)
    assert send("Trouble", "Text", html_message="<p>Text</p>", priority="high") is None
    stored = only()
    assert stored.to == STRINGS
    assert (stored.subject, stored.from_email) == ("[Shop] Trouble", "server@example.com")
    assert [tuple(alternative) for alternative in stored.alternatives] == [("<p>Text</p>", "text/html")]
    assert stored.row.priority == 1


@pytest.mark.django_db
def test_nobody_in_the_settings_is_nothing(site: Site) -> None:
    """Not even a mailer is needed, as in Django."""
    site.settings.ADMINS = site.settings.MANAGERS = []
    if site.way == "mailers":
        site.settings.MAILERS = {}
    anymail_retry.mail_admins("Trouble", "Text")
    anymail_retry.mail_managers("Trouble", "Text")
    assert rows() == []


@pytest.mark.django_db
def test_one_text_in_place_of_a_list_is_an_error(mandrill: Site) -> None:
    """Each of its letters would be somebody."""
    mandrill.settings.ADMINS = "anna@example.com"
    with pytest.raises(ImproperlyConfigured, match="The ADMINS setting must be a list"):
        anymail_retry.mail_admins("Trouble", "Text", fail_silently=True)


# --- For which mailer ---


@pytest.mark.django_db
@pytest.mark.parametrize("wrapper", ["queued", "fallback"])
def test_mailer_behind_a_wrapper_is_meant(site: Site, wrapper: str) -> None:
    """Else the worker would store it again."""
    site.behind(wrapper, MANDRILL)
    anymail_retry.send_mail("Hello", "Text", FROM, TO)
    assert only().row.mailer == site.mailer


@pytest.mark.django_db
def test_back_end_of_anybody_is_served(site: Site) -> None:
    site.behind("", SMTP)
    anymail_retry.send_mail("Hello", "Text", FROM, TO)
    assert only().row.mailer == site.mailer


@pytest.mark.django_db
def test_back_end_of_the_queue_goes_before_that_of_the_site(settings: SettingsWrapper) -> None:
    site = Site(settings, "legacy")
    site.behind("", SMTP)
    settings.EMAIL_QUEUE_BACKEND = MANDRILL
    anymail_retry.send_mail("Hello", "Text", FROM, TO)
    assert only().row.mailer == MANDRILL


@pytest.mark.django_db
@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
def test_using_names_the_mailer(settings: SettingsWrapper) -> None:
    from django.core.mail import MailerDoesNotExist  # Django 6.1

    settings.MAILERS = {
        "default": {"BACKEND": SMTP},
        "bulk": {"BACKEND": MANDRILL},
        "later": {"BACKEND": "anymail_retry.backends.queued.EmailBackend", "OPTIONS": {"using": "bulk"}},
    }
    settings.ADMINS = TO
    anymail_retry.send_mail("1", "Text", FROM, TO, using="bulk")
    anymail_retry.send_mass_mail([("2", "Text", FROM, TO)], using="later")
    anymail_retry.mail_admins("3", "Text", using="bulk")
    assert [row.mailer for row in rows()] == ["bulk"] * 3
    with pytest.raises(MailerDoesNotExist):
        anymail_retry.send_mail("4", "Text", FROM, TO, using="nobody")


@pytest.mark.django_db
def test_using_without_mailers_is_an_error(settings: SettingsWrapper) -> None:
    site = Site(settings, "legacy")
    site.behind("", SMTP)
    with pytest.raises(ImproperlyConfigured, match="no mailer 'bulk'"):
        anymail_retry.send_mail("Hello", "Text", FROM, TO, using="bulk")
    assert anymail_retry.send_mail("Hello", "Text", FROM, TO, using="default") == 1  # as Django 6.1 has it


@pytest.mark.django_db
def test_connection_of_ours_only_names_the_mailer(mandrill: Site) -> None:
    anymail_retry.send_mail("1", "Text", FROM, TO, connection=mandrill.connection())
    mandrill.behind("queued", MANDRILL)
    anymail_retry.send_mail("2", "Text", FROM, TO, connection=mandrill.connection())
    inner = "inner" if mandrill.way == "mailers" else MANDRILL
    assert [row.mailer for row in rows()] == ["default" if mandrill.way == "mailers" else MANDRILL, inner]


@pytest.mark.django_db
@pytest.mark.parametrize("wrapper", ["", "queued", "fallback"])
def test_connection_with_an_account_of_its_own_is_refused(site: Site, wrapper: str) -> None:
    site.settings.ANYMAIL = {"MANDRILL_API_KEY": "site-key"}
    site.behind(wrapper, MANDRILL)
    if site.way == "mailers":
        site.settings.MAILERS[site.mailer]["OPTIONS"] = {"api_key": "site-key"}
    tenants = site.connection(api_key="tenant-key")
    with pytest.raises(MessageNotQueueable, match=r"api_key: .*an alias in MAILERS") as caught:
        anymail_retry.send_mail("Hello", "Text", FROM, TO, connection=tenants)
    assert "tenant-key" not in str(caught.value)
    assert rows() == []


@pytest.mark.django_db
def test_connection_whose_account_cannot_be_seen_is_refused(site: Site) -> None:
    site.behind("", "anymail.backends.test.EmailBackend")
    with pytest.raises(MessageNotQueueable, match=r"^connection: .*using=\"<alias>\""):
        anymail_retry.send_mail("Hello", "Text", FROM, TO, connection=site.connection(), fail_silently=True)
    assert rows() == []


@pytest.mark.django_db
@pytest.mark.parametrize("account", [{"auth_user": "me"}, {"auth_password": "0penSesame"}], ids=["user", "password"])
@pytest.mark.parametrize("silently", [False, True])
def test_account_is_refused(mandrill: Site, account: dict[str, str], silently: bool) -> None:
    with pytest.raises(MessageNotQueueable, match="auth_user, auth_password") as caught:
        anymail_retry.send_mail("Hello", "Text", FROM, TO, silently, **account)
    assert "0penSesame" not in str(caught.value)
    with pytest.raises(MessageNotQueueable):
        anymail_retry.send_mass_mail([("Hello", "Text", FROM, TO)], **account)
    with pytest.raises(MessageNotQueueable):
        anymail_retry.send_html_mail("Hello", "Text", "<p>Text</p>", FROM, TO, **account)
    assert rows() == []


@pytest.mark.django_db
def test_connection_and_using_exclude_each_other(mandrill: Site) -> None:
    with pytest.raises(TypeError, match="'connection' is not compatible with 'using'"):
        anymail_retry.send_mail("Hello", "Text", FROM, TO, connection=mandrill.connection(), using="default")


# --- When it does not work ---


@pytest.fixture
def no_table(transactional_db: None) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE anymail_retry_queuedmessage RENAME TO gone")
    yield
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE gone RENAME TO anymail_retry_queuedmessage")


@pytest.mark.usefixtures("no_table")
def test_database_that_fails_is_raised(mandrill: Site) -> None:
    with pytest.raises(DatabaseError):
        anymail_retry.send_mail("Hello", "Text", FROM, TO)


@pytest.mark.usefixtures("no_table")
def test_database_that_fails_silently_is_in_the_log(mandrill: Site, caplog: pytest.LogCaptureFixture) -> None:
    assert anymail_retry.send_mail("Hello", "Text", FROM, TO, fail_silently=True) == 0
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert f"{mandrill.mailer}: not queued: " in record.getMessage()


def test_missing_app_is_an_error_with_the_line_to_add(mandrill: Site) -> None:
    mandrill.settings.INSTALLED_APPS = [app for app in mandrill.settings.INSTALLED_APPS if app != "anymail_retry"]
    with pytest.raises(ImproperlyConfigured, match='Add to INSTALLED_APPS: "anymail_retry"'):
        anymail_retry.send_mail("Hello", "Text", FROM, TO, fail_silently=True)


# --- And then ---


@pytest.mark.django_db(transaction=True)
def test_stored_mail_is_sent_by_the_drain(site: Site, local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp("mandrill")
    site.esp(esp)
    site.settings.ADMINS = ["admin@example.com"]
    anymail_retry.send_mail("1", "Text", FROM, TO)
    anymail_retry.mail_admins("2", "Text")
    assert esp.requests == []
    assert Worker().drain().sent == 2
    prefix = site.settings.EMAIL_SUBJECT_PREFIX
    assert {accepted.subject: accepted.recipients for accepted in esp.ledger} == {
        "1": ("to@example.com",),
        f"{prefix}2": ("admin@example.com",),
    }


@pytest.mark.django_db
def test_nothing_deprecated_of_djangos_is_used(mandrill: Site) -> None:
    """Its own functions warn of positions, of ``connection`` and of ``fail_silently``; ours take them all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anymail_retry.send_mail("Hello", "Text", FROM, TO, True, None, None, None, "<p>Text</p>")
    assert len(rows()) == 1


class Unstorable(EmailMessage):
    def message(self, *args: Any, **kwargs: Any) -> Any:
        return super().message(*args, **kwargs)


@pytest.mark.django_db
def test_many_that_fail_silently_lose_only_those_that_cannot_be_stored(
    mandrill: Site, caplog: pytest.LogCaptureFixture
) -> None:
    good = [EmailMessage(f"good {number}", "Body", None, ["to@example.com"]) for number in range(2)]
    bad = Unstorable("bad", "Body", None, ["to@example.com"])
    nobody = EmailMessage("nobody", "Body", None, [])
    stored = store([good[0], bad, nobody, good[1]], mailer=MANDRILL, fail_silently=True)
    assert [row and row.subject for row in stored] == ["good 0", None, None, "good 1"]
    (record,) = caplog.records
    assert "not queued: MessageNotQueueable: message(): Unstorable overrides it" in record.getMessage()


def test_priority_in_the_place_where_django_mailer_has_it_is_an_error(mandrill: Site) -> None:
    """Else it would be taken for "fail silently"."""
    with pytest.raises(TypeError, match=r"Write: priority=\.\.\."):
        send_mail("Subject", "Body", None, ["to@example.com"], "high")  # type: ignore[arg-type]  # the mistake
