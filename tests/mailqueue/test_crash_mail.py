"""``MAILER_FOR_CRASH_EMAILS``: what ``AdminEmailHandler`` would send is stored, and never lost over that."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core import mail
from django.db import connection, transaction
from django.utils.log import AdminEmailHandler

import anymail_retry
from anymail_retry.mailqueue import crash_mail
from anymail_retry.mailqueue.serialization import unpack
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import QueuedMessage
from anymail_retry.testing import LocalEsp
from anymail_retry.testing.pytest import local_esp
from tests.sites import ADMINS, MANDRILL, WAYS, Site, site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp", "site"]  # fixtures

LOCMEM = "django.core.mail.backends.locmem.EmailBackend"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdminEmailHandler, "send_mail", AdminEmailHandler.send_mail)  # to be put back
    crash_mail.install()


@pytest.fixture
def crashing_site(site: Site) -> Site:
    site.settings.ADMINS = ADMINS
    site.behind("", LOCMEM)
    return site


@pytest.fixture
def crash() -> Iterator[Callable[..., None]]:
    """Log an error through a handler that mails it."""
    logger = logging.getLogger("tests.crashes")
    added: list[logging.Handler] = []

    def log(handler: logging.Handler | None = None) -> None:
        added.append(handler or AdminEmailHandler(include_html=True))
        logger.addHandler(added[-1])
        try:
            raise ZeroDivisionError("the reason")
        except ZeroDivisionError:
            logger.exception("It crashed")

    logger.propagate = False
    yield log
    for handler in added:
        logger.removeHandler(handler)
    logger.propagate = True


def rows() -> list[QueuedMessage]:
    return list(QueuedMessage.objects.order_by("pk"))


@pytest.mark.django_db(transaction=True)
def test_crash_mail_is_stored(crashing_site: Site, crash: Callable[..., None]) -> None:
    crash()
    (row,) = rows()
    assert (row.mailer, row.recipients) == (crashing_site.mailer, "anna@example.com")
    stored: Any = unpack(row.content.payload, [])
    assert stored.subject.endswith("ERROR: It crashed")
    assert "ZeroDivisionError" in stored.body
    assert "the reason" in stored.body
    ((html, mimetype),) = stored.alternatives
    assert "ZeroDivisionError" in html
    assert mimetype == "text/html"
    assert mail.outbox == []


@pytest.mark.django_db(transaction=True)
def test_stored_crash_mail_is_sent_by_the_drain(
    crashing_site: Site, crash: Callable[..., None], local_esp: Callable[..., LocalEsp]
) -> None:
    esp = local_esp("mandrill")
    crashing_site.esp(esp)
    crash()
    assert esp.requests == []
    assert Worker().drain().sent == 1
    assert [accepted.recipients for accepted in esp.ledger] == [("anna@example.com",)]


@pytest.mark.django_db(transaction=True)
def test_database_that_fails_has_it_sent_directly(
    crashing_site: Site, crash: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The database may be what crashed."""
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE anymail_retry_queuedmessage RENAME TO gone")
    try:
        crash()
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE gone RENAME TO anymail_retry_queuedmessage")
    assert [sent.subject.partition("] ")[2] for sent in mail.outbox] == ["ERROR: It crashed"]
    assert rows() == []
    assert "A crash mail could not be queued, and is sent directly" in caplog.text


def test_database_that_is_forbidden_has_it_sent_directly(crashing_site: Site, crash: Callable[..., None]) -> None:
    crash()
    assert len(mail.outbox) == 1


@pytest.mark.django_db(transaction=True)
def test_inside_a_transaction_it_is_sent_directly(crashing_site: Site, crash: Callable[..., None]) -> None:
    """The crash may have the transaction rolled back, and a stored mail with it."""
    with transaction.atomic():
        crash()
        transaction.set_rollback(True)
    assert len(mail.outbox) == 1
    assert rows() == []


@pytest.mark.django_db(transaction=True)
def test_nobody_to_tell_is_nothing(crashing_site: Site, crash: Callable[..., None]) -> None:
    crashing_site.settings.ADMINS = []
    crash()
    assert mail.outbox == rows() == []


class OwnHandler(AdminEmailHandler):
    """A site's own, with its own way of sending."""

    def send_mail(self, subject: str, message: str, *args: Any, **kwargs: Any) -> None:
        sent_by_itself.append(subject)


sent_by_itself: list[str] = []


@pytest.mark.django_db(transaction=True)
def test_handler_with_its_own_way_is_left_alone(crashing_site: Site, crash: Callable[..., None]) -> None:
    sent_by_itself.clear()
    crash(OwnHandler())
    assert len(sent_by_itself) == 1
    assert mail.outbox == rows() == []


@pytest.mark.django_db(transaction=True)
@pytest.mark.filterwarnings("ignore:The 'email_backend' argument is deprecated:PendingDeprecationWarning")
@pytest.mark.parametrize("path", [MANDRILL, "anymail_retry.backends.fallback.EmailBackend"], ids=["ESP", "wrapper"])
def test_back_end_of_the_handler_is_the_one_that_sends(
    settings: SettingsWrapper, crash: Callable[..., None], path: str
) -> None:
    site = Site(settings, "legacy")
    settings.ADMINS = ADMINS
    site.behind("", LOCMEM)
    settings.EMAIL_FALLBACK_BACKEND = MANDRILL
    crash(AdminEmailHandler(email_backend=path))
    assert [row.mailer for row in rows()] == [MANDRILL]


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
def test_mailer_of_the_handler_is_the_one_that_sends(settings: SettingsWrapper, crash: Callable[..., None]) -> None:
    Site(settings, "mailers")
    settings.ADMINS = ADMINS
    settings.MAILERS = {"default": {"BACKEND": LOCMEM}, "alarm": {"BACKEND": MANDRILL}}
    crash(AdminEmailHandler(using="alarm"))
    assert [row.mailer for row in rows()] == ["alarm"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
def test_mailer_that_does_not_exist_is_passed_over_as_django_does(
    settings: SettingsWrapper, crash: Callable[..., None]
) -> None:
    """A crash must not crash."""
    Site(settings, "mailers")
    settings.ADMINS = ADMINS
    settings.MAILERS = {}
    crash()
    assert mail.outbox == rows() == []


@pytest.mark.django_db(transaction=True)
def test_to_install_twice_is_to_install_once(crashing_site: Site, crash: Callable[..., None]) -> None:
    crash_mail.install()
    crash()
    assert len(rows()) == 1


# --- The setting ---

SETTINGS = """
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["anymail_retry"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    ADMINS=["anna@example.com"],
    **%r,
)
import django
django.setup()
from django.utils.log import AdminEmailHandler
print(AdminEmailHandler.send_mail.__module__)
"""


@pytest.mark.parametrize(
    ("values", "module"),
    [
        pytest.param({"MAILER_FOR_CRASH_EMAILS": True}, "anymail_retry.mailqueue.crash_mail", id="on"),
        pytest.param({"MAILER_FOR_CRASH_EMAILS": False}, "django.utils.log", id="off"),
        pytest.param({}, "django.utils.log", id="unset"),
    ],
)
def test_setting_switches_it_on(values: dict[str, bool], module: str) -> None:
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", SETTINGS % values],
        cwd=Path(anymail_retry.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.strip() == module, process.stderr
