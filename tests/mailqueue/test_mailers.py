"""From the name in a row to the back end that sends: one name per account, however it is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import django
import pytest
from django.core import mail

from anymail_retry import send_mail
from anymail_retry.mailqueue.fallback import identity
from anymail_retry.mailqueue.mailers import MailerGone, canonical, find
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import QueuedMessage
from anymail_retry.testing import LocalEsp, Rule, Status
from anymail_retry.testing.pytest import local_esp
from tests.sites import MANDRILL, Site, message, site

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp", "site"]  # fixtures

LAZY_NAME = "anymail_retry.backends.RetryableMandrillEmailBackend"
LOCMEM = "django.core.mail.backends.locmem.EmailBackend"

needs_mailers = pytest.mark.skipif(django.VERSION < (6, 1), reason="Django before 6.1 has no MAILERS")


@pytest.fixture
def esp(local_esp: Callable[..., LocalEsp], settings: SettingsWrapper) -> LocalEsp:
    settings.EMAIL_TOTAL_RETRIES = 0
    return local_esp("mandrill")


def names() -> list[str]:
    return list(QueuedMessage.objects.order_by("pk").values_list("mailer", flat=True))


@pytest.mark.django_db
@pytest.mark.parametrize("path", [MANDRILL, LAZY_NAME])
def test_one_account_has_one_name_whichever_way_a_message_comes(site: Site, esp: LocalEsp, path: str) -> None:
    """Or its pauses and its rate would not be shared."""
    site.esp(esp, backend=path)
    esp.script(Rule(Status(503)))
    message().send()
    send_mail("Subject", "Body", None, ["to@example.com"])
    assert names() == [site.mailer if site.way == "mailers" else MANDRILL] * 2


@pytest.mark.django_db
def test_one_account_has_one_name_behind_a_wrapper_too(site: Site, esp: LocalEsp) -> None:
    site.behind("queued", LAZY_NAME, esp)
    message().send()
    assert names() == ["inner" if site.way == "mailers" else MANDRILL]


def make_backend(**options: Any) -> Any:
    raise NotImplementedError


def test_a_function_that_makes_back_ends_has_a_name_too() -> None:
    assert canonical(f"{__name__}.make_backend") == f"{__name__}.make_backend"


# --- rows from before MAILERS ---


@needs_mailers
@pytest.mark.django_db(transaction=True)
def test_a_row_from_before_mailers_is_sent_by_the_one_entry_with_its_back_end(settings: SettingsWrapper) -> None:
    legacy = Site(settings, "legacy")
    legacy._legacy(EMAIL_BACKEND=LOCMEM)
    send_mail("before", "Body", None, ["to@example.com"])
    assert names() == [LOCMEM]
    Site(settings, "mailers")._mailers({"default": {"BACKEND": MANDRILL}, "local": {"BACKEND": LOCMEM}})
    assert find(LOCMEM).name == "local"
    assert Worker().drain().sent == 1
    assert [sent.subject for sent in mail.outbox] == ["before"]


@needs_mailers
@pytest.mark.django_db(transaction=True)
def test_a_row_that_any_of_several_entries_could_send_waits_until_it_is_said_which(settings: SettingsWrapper) -> None:
    mailers = Site(settings, "mailers")
    entries = {"default": {"BACKEND": LOCMEM}, "other": {"BACKEND": LOCMEM}}
    mailers._mailers(entries)
    send_mail("before", "Body", None, ["to@example.com"])
    QueuedMessage.objects.update(mailer=LOCMEM)
    assert Worker().drain().held == 1
    (row,) = QueuedMessage.objects.all()
    assert "'default', 'other'" in row.reason
    assert "then: manage.py retry_deferred --held" in row.reason
    mailers._mailers({**entries, LOCMEM: {"BACKEND": LOCMEM}})
    assert find(LOCMEM).alias == LOCMEM


@needs_mailers
def test_an_entry_that_cannot_be_imported_hides_no_other(settings: SettingsWrapper) -> None:
    Site(settings, "mailers")._mailers({"default": {"BACKEND": "nowhere.Backend"}, "local": {"BACKEND": LOCMEM}})
    assert find(LOCMEM).alias == "local"


@pytest.mark.parametrize("name", ["gone", "nowhere.Backend"])
def test_a_mailer_that_is_gone_says_what_to_do(site: Site, name: str) -> None:
    with pytest.raises(MailerGone, match=r"then: manage.py retry_deferred --held"):
        find(name)


# --- whom a back end sends as ---


class Account:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"api_key": "a"}, {"api_key": "b"}, id="a key"),
        pytest.param({"api_key": "a"}, {}, id="a key that only one has"),
        pytest.param({"params": {"aws_access_key_id": "a"}}, {"params": {"aws_access_key_id": "b"}}, id="boto3's"),
        pytest.param({"a": {"b": {"c": "d"}}}, {"a": {"b": {"c": "e"}}}, id="deeper"),
    ],
)
def test_accounts_are_told_apart_by(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert identity(Account(**one)) != identity(Account(**other))  # type: ignore[arg-type]  # anything with attributes
    assert identity(Account(**one)) == identity(Account(**one))  # type: ignore[arg-type]  # as above
