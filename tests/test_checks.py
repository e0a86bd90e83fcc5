"""The system checks: each id with its text and hint, and a well configured site of which nothing is said."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anymail
import pytest
from anymail.backends.base_requests import AnymailRequestsBackend
from anymail.backends.mandrill import EmailBackend as AnymailMandrill
from anymail.backends.resend import EmailBackend as AnymailResend
from django.conf import settings as django_settings
from django.core import checks as django_checks
from django.core.mail.backends.base import BaseEmailBackend
from django.test.utils import override_settings

import anymail_retry
from anymail_retry import RetryMixin, apps, checks
from anymail_retry.backends import BACKENDS
from anymail_retry.mailqueue import encryption
from tests.sites import MANDRILL, SMTP, WAYS, Site, site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from django.core.checks import CheckMessage
    from pytest_django.fixtures import SettingsWrapper

__all__ = ["site"]  # a fixture

POSTMARK = "anymail_retry.backends.postmark.EmailBackend"
RESEND = "anymail_retry.backends.resend.EmailBackend"
FALLBACK = "anymail_retry.backends.fallback.EmailBackend"
QUEUED = "anymail_retry.backends.queued.EmailBackend"


def found() -> list[CheckMessage]:
    """What the checks say; reading a deprecated setting of Django's is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checks.check_settings(None)


def only() -> tuple[str, str]:
    """The one thing that the checks say: its id without the app, and its text with its hint."""
    (message,) = found()
    return short(message), f"{message.msg}\n{message.hint or ''}"


def short(message: CheckMessage) -> str:
    app, _, number = str(message.id).partition(".")
    assert app == "anymail_retry"
    assert isinstance(message, {"E": django_checks.Error, "W": django_checks.Warning}[number[0]])
    return number


def one_mailer(site: Site, backend: str = MANDRILL, **options: Any) -> None:
    """A site with one mailer; options stand in MAILERS, or in ANYMAIL where there is none."""
    if site.way == "mailers":
        site.settings.MAILERS = {"default": {"BACKEND": backend, "OPTIONS": options}}
        return
    site.settings.EMAIL_BACKEND = backend
    esp = backend.split(".")[-2].upper()
    site.settings.ANYMAIL = {f"{esp}_{name.upper()}": value for name, value in options.items()}


def database(settings: SettingsWrapper, alias: str = "default", **changes: Any) -> None:
    """Change what DATABASES says, and nothing of what is connected."""
    databases = copy.deepcopy(dict(settings.DATABASES))
    databases[alias] = {**databases.get(alias, {}), **changes}
    settings.DATABASES = databases


SQLITE = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": "/srv/site/db.sqlite3",
    "OPTIONS": {"transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=WAL;"},
}


@pytest.fixture(autouse=True)
def no_database_of_the_tests(settings: SettingsWrapper) -> None:
    """What the checks say of a database must not depend on the one that the tests run on."""
    with warnings.catch_warnings():
        # Django says that overriding DATABASES has no effect on the connections: that is as wanted.
        warnings.filterwarnings("ignore", "Overriding setting DATABASES", UserWarning)
        settings.DATABASES = {"default": copy.deepcopy(SQLITE)}


pytestmark = pytest.mark.filterwarnings("ignore:Overriding setting DATABASES:UserWarning")


# --- Nothing to say ---


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param(MANDRILL, {}, id="with an ESP of Anymail's"),
        pytest.param(RESEND, {"read_retries": 2, "retry_deadline": 20}, id="with read retries under idempotency keys"),
        pytest.param(MANDRILL, {"read_retries": False, "total_retries": None}, id="with numbers of retries"),
        pytest.param(MANDRILL, {"read_retries": 0, "retry_deadline": timedelta(seconds=29)}, id="with a deadline"),
        pytest.param(MANDRILL, {"fallback_queue": False, "retry_deadline": None}, id="without the queue"),
        *(
            pytest.param(f"django.core.mail.backends.{name}.EmailBackend", {}, id=f"of a developer, with {name}")
            for name in ("console", "dummy", "filebased", "locmem")
        ),
    ],
)
def test_nothing_is_said_of_a_site(site: Site, backend: str, options: Mapping[str, Any]) -> None:
    one_mailer(site, backend, **options)
    assert found() == []


@pytest.mark.parametrize("wrapper", ["fallback", "queued"])
def test_nothing_is_said_of_a_site_with_a_wrapper(site: Site, wrapper: str) -> None:
    site.behind(wrapper, MANDRILL)
    assert found() == []


def test_mailer_that_cannot_be_imported_is_djangos_matter(site: Site) -> None:
    one_mailer(site, "no.such.EmailBackend")
    assert [short(message) for message in found()] == ["W011"]


def test_back_end_that_is_a_function_is_no_stumbling_block(site: Site) -> None:
    one_mailer(site, "django.core.mail.get_connection")
    assert [short(message) for message in found()] == ["W011"]


class CheckedBackend(BaseEmailBackend):
    """Somebody else's, with a method of the name that would be tempting to call."""

    def check(self) -> None:
        raise AssertionError("called")


def test_back_end_with_a_check_of_its_own_is_not_asked(site: Site) -> None:
    one_mailer(site, f"{__name__}.CheckedBackend")
    assert [short(message) for message in found()] == ["W011"]


# --- E001: values ---


def test_e001_wrong_value_everywhere(site: Site) -> None:
    """Named once, however many mailers read it."""
    one_mailer(site)
    if site.way == "mailers":
        site.settings.MAILERS = {alias: {"BACKEND": MANDRILL} for alias in ("default", "bulk")}
    site.settings.EMAIL_TOTAL_RETRIES = -1
    id_, text = only()
    assert id_ == "E001"
    assert "EMAIL_TOTAL_RETRIES is -1" in text
    assert "EMAIL_TOTAL_RETRIES = 3" in text


@pytest.mark.parametrize("name", ["EMAIL_QUEUE_LEASE", "EMAIL_FALLBACK_QUEUE", "MAILER_FOR_CRASH_EMAILS"])
def test_e001_wrong_value_of_the_queue(site: Site, name: str) -> None:
    one_mailer(site)
    setattr(site.settings, name, "wrong")
    id_, text = only()
    assert id_ == "E001"
    assert f"{name} is 'wrong'" in text


def test_e001_status_that_is_a_success(site: Site) -> None:
    one_mailer(site)
    site.settings.EMAIL_HTTP_STATUS_RETRYABLE = [200]
    id_, text = only()
    assert id_ == "E001"
    assert "a message that was accepted would be sent again" in text


def test_e001_wrong_value_for_one_esp(site: Site) -> None:
    one_mailer(site)
    site.settings.ANYMAIL = {"MANDRILL_TOTAL_RETRIES": "3"}
    id_, text = only()
    assert id_ == "E001"
    assert 'ANYMAIL = {"MANDRILL_TOTAL_RETRIES": 3}' in text


@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
@pytest.mark.parametrize(
    ("backend", "options", "option"),
    [
        pytest.param(MANDRILL, {"total_retries": "3"}, "total_retries", id="retries"),
        pytest.param(MANDRILL, {"queue_rate": 0}, "queue_rate", id="queue"),
        pytest.param(FALLBACK, {"using": "default", "fallback_queue": "no"}, "fallback_queue", id="wrapper"),
    ],
)
def test_e001_wrong_option(settings: SettingsWrapper, backend: str, options: Mapping[str, Any], option: str) -> None:
    settings.MAILERS = {"default": {"BACKEND": MANDRILL}, "bulk": {"BACKEND": backend, "OPTIONS": options}}
    id_, text = only()
    assert id_ == "E001"
    assert text.startswith(f"MAILERS['bulk']: The option '{option}' is ")


# --- W002 and W003: names ---


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EMAIL_TOTL_RETRIES", "EMAIL_TOTAL_RETRIES"),
        ("EMAIL_TOTAL_RETIRES", "EMAIL_TOTAL_RETRIES"),
        ("EMAIL_TOTAL_RETRY", "EMAIL_TOTAL_RETRIES"),
        ("EMAIL_STATUS_RETRIES", "EMAIL_HTTP_STATUS_RETRIES"),
        ("EMAIL_HTTP_STATUS_RETRYABLES", "EMAIL_HTTP_STATUS_RETRYABLE"),
        ("EMAIL_RETRY_BACKOF_FACTOR", "EMAIL_RETRY_BACKOFF_FACTOR"),
        ("EMAIL_QUEUE_LEASES", "EMAIL_QUEUE_LEASE"),
        ("EMAIL_QUEU_LEASE", "EMAIL_QUEUE_LEASE"),
        ("EMAIL_FALBACK_QUEUE", "EMAIL_FALLBACK_QUEUE"),
        ("MAILER_FOR_CRASH_EMAIL", "MAILER_FOR_CRASH_EMAILS"),
    ],
)
def test_w002_misspelt_name(site: Site, name: str, meant: str) -> None:
    one_mailer(site)
    setattr(site.settings, name, 1)
    said = f"{name} is no setting of anymail_retry's, which does not read it."
    assert only() == ("W002", f"{said}\nDid you mean {meant}?")


@pytest.mark.parametrize(
    ("name", "listed", "not_listed"),
    [
        ("EMAIL_QUEUE_COLOUR", ["EMAIL_QUEUE_POLL", "EMAIL_QUEUE_RATE"], "EMAIL_TOTAL_RETRIES"),
        ("EMAIL_QUEUE_TIME", ["EMAIL_QUEUE_RATE", "EMAIL_QUEUE_MAX_AGE"], "EMAIL_RETRY_DEADLINE"),
        ("EMAIL_BREAKER_FUSE", ["EMAIL_BREAKER_FAILURES"], "EMAIL_QUEUE"),
        ("EMAIL_RETRY_WHEN_IT_RAINS", ["EMAIL_RETRY_DEADLINE", "EMAIL_RETRY_AFTER_MAX"], "EMAIL_TOTAL_RETRIES"),
        ("EMAIL_RETRIES", ["EMAIL_TOTAL_RETRIES", "EMAIL_CONNECT_RETRIES"], "EMAIL_READ_RETRIES"),
        ("EMAIL_RETRY", ["EMAIL_TOTAL_RETRIES"], "EMAIL_READ_RETRIES"),
        ("EMAIL_MAX_RETRIES", ["EMAIL_TOTAL_RETRIES"], "EMAIL_READ_RETRIES"),
        ("EMAIL_SEND_RETRIES", ["EMAIL_TOTAL_RETRIES"], "EMAIL_READ_RETRIES"),
        ("EMAIL_SMTP2_RETRIES", ["EMAIL_TOTAL_RETRIES"], "EMAIL_OTHER_RETRIES"),
    ],
)
def test_w002_name_of_our_family_that_resembles_nothing(
    site: Site, name: str, listed: list[str], not_listed: str
) -> None:
    one_mailer(site)
    setattr(site.settings, name, 1)
    id_, text = only()
    assert id_ == "W002"
    assert text.startswith(f"{name} is no setting")
    assert "Did you mean" not in text
    assert [setting for setting in listed if setting not in text] == []
    assert not_listed not in text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EMAIL_READS_RETRIES", "EMAIL_READ_RETRIES"),
        ("EMAIL_READ_RETRY", "EMAIL_READ_RETRIES"),
        ("EMAIL_OTHERS_RETRIES", "EMAIL_OTHER_RETRIES"),
    ],
)
def test_retries_that_repeat_mail_are_named_where_they_must_be_meant(site: Site, name: str, meant: str) -> None:
    one_mailer(site)
    setattr(site.settings, name, 0)
    assert only()[1].endswith(f"Did you mean {meant}?")


@pytest.mark.parametrize(
    "name",
    [
        "EMAIL_SUBJECT_PREFIX",
        "EMAIL_USE_LOCALTIME",
        "EMAIL_RETRIEVAL_HOST",
        "EMAIL_VERIFICATION",
        "EMAIL_CONNECT_TIMEOUT",
        "EMAIL_LOGO",
        "MAILER_HOMEPAGE",
        "RETRY_TOTAL",
    ],
)
def test_other_names_are_not_suspected(site: Site, name: str) -> None:
    one_mailer(site)
    setattr(site.settings, name, 1)
    assert found() == []


@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 deprecates none of them")
def test_deprecated_settings_of_djangos_are_not_read(settings: SettingsWrapper) -> None:
    """To read one is a warning, which is an error here; and there are some to read."""
    one_mailer(Site(settings, "legacy"))
    assert {"EMAIL_HOST", "EMAIL_TIMEOUT", "EMAIL_USE_TLS"} <= set(dir(django_settings))
    assert found() == []
    with pytest.raises(PendingDeprecationWarning):
        django_settings.EMAIL_TIMEOUT  # noqa: B018  # reading it is the test


@pytest.mark.parametrize("form", ["ANYMAIL", "ANYMAIL_..."])
def test_w002_misspelt_name_in_anymails_settings(site: Site, form: str) -> None:
    one_mailer(site)
    if form == "ANYMAIL":
        site.settings.ANYMAIL = {"MANDRILL_TOTL_RETRIES": 5, "MANDRILL_API_KEY": "..."}
    else:
        site.settings.ANYMAIL_MANDRILL_TOTL_RETRIES = 5
    id_, text = only()
    assert id_ == "W002"
    assert "MANDRILL_TOTL_RETRIES" in text
    assert "Did you mean MANDRILL_TOTAL_RETRIES?" in text


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("MANDRIL_TOTAL_RETRIES", "Did you mean MANDRILL_TOTAL_RETRIES?"),
        ("MANDRILL_EMAIL_TOTAL_RETRIES", "Did you mean MANDRILL_TOTAL_RETRIES?"),
        ("OWL_POST_TOTAL_RETRIES", "They begin with: AMAZON_SES, BREVO, "),
        ("mandrill_total_retries", "Did you mean MANDRILL_TOTAL_RETRIES?"),
        ("mandrill_totl_retries", "Did you mean MANDRILL_TOTAL_RETRIES?"),
        ("RESEND_TOTL_RETRIES", "Did you mean RESEND_TOTAL_RETRIES?"),
        ("MANDRILL_MAX_RETRIES", "The settings of this kind are: MANDRILL_TOTAL_RETRIES, "),
        ("MANDRILL_QUEUE_LEASES", "Did you mean EMAIL_QUEUE_LEASE?"),
        ("TOTL_RETRIES", "Did you mean MANDRILL_TOTAL_RETRIES?"),
    ],
)
def test_w002_key_in_anymails_settings_that_is_not_read(site: Site, key: str, hint: str) -> None:
    one_mailer(site)
    site.settings.ANYMAIL = {key: 5}
    id_, text = only()
    assert id_ == "W002"
    assert text.startswith(f"ANYMAIL[{key!r}] is ")
    assert hint in text


def anymails_settings() -> set[str]:
    """Every name that Anymail reads among its settings."""
    files = [path for path in Path(anymail.__file__).parent.rglob("*.py") if path.name != "utils.py"]
    sources = [path.read_text(encoding="utf-8") for path in files]
    return {name.upper() for source in sources for name in re.findall(r"get_anymail_setting\(\s*\"(\w+)\"", source)}


@pytest.mark.parametrize("spelt", [str.upper, str.lower])
def test_anymails_own_settings_are_not_suspected(site: Site, spelt: Any) -> None:
    names = anymails_settings()
    assert {"API_KEY", "REQUESTS_TIMEOUT", "SEND_DEFAULTS", "WEBHOOK_SECRET", "CLIENT_PARAMS"} <= names
    one_mailer(site, RESEND)
    esps = [*(module.upper() for module in BACKENDS.values()), "SENDINBLUE", "CONSOLE", "TEST"]
    keys = {*names, *(f"{esp}_{name}" for esp in esps for name in names)}
    site.settings.ANYMAIL = {spelt(key): None for key in keys}
    assert found() == []


def test_settings_of_esps_that_a_site_does_not_use_are_in_order(site: Site) -> None:
    one_mailer(site)
    site.settings.ANYMAIL = {f"{module.upper()}_TOTAL_RETRIES": 5 for module in BACKENDS.values()}
    assert found() == []


class OwlPost(RetryMixin, AnymailRequestsBackend):
    """Somebody's own ESP."""

    esp_name = "Owl Post"


@pytest.mark.parametrize("wrapper", ["", "fallback"])
def test_settings_of_an_esp_of_somebodys_own_are_in_order(site: Site, wrapper: str) -> None:
    site.behind(wrapper, f"{__name__}.OwlPost")
    site.settings.EMAIL_FALLBACK_QUEUE = False
    site.settings.ANYMAIL = {"OWL_POST_TOTAL_RETRIES": 5}
    assert found() == []


@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
@pytest.mark.parametrize(
    ("backend", "name", "hint"),
    [
        (MANDRILL, "totl_retries", "Did you mean 'total_retries'?"),
        (MANDRILL, "total_retrys", "Did you mean 'total_retries'?"),
        (MANDRILL, "send_retries", "The options are: breaker_failures, "),
        (FALLBACK, "fallback_que", "Did you mean 'fallback_queue'?"),
        (FALLBACK, "total_retries", "For all mailers, write: EMAIL_TOTAL_RETRIES = ..."),
        (f"{__name__}.Retrying", "fallback_queue", "class Retrying(anymail_retry.backends.mandrill.EmailBackend)"),
    ],
)
def test_w002_option_that_the_back_end_does_not_have(
    settings: SettingsWrapper, backend: str, name: str, hint: str
) -> None:
    options = {name: 5, **({"using": "default"} if backend == FALLBACK else {})}
    settings.MAILERS = {"default": {"BACKEND": MANDRILL}, "bulk": {"BACKEND": backend, "OPTIONS": options}}
    id_, text = only()
    assert id_ == "W002"
    assert text.startswith("MAILERS['bulk']: ")
    assert f"no option {name!r}" in text
    assert hint in text


@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
def test_options_of_others_are_not_suspected(settings: SettingsWrapper) -> None:
    settings.MAILERS = {
        "default": {"BACKEND": MANDRILL, "OPTIONS": {"api_key": "...", "requests_timeout": 5, "debug_api_requests": 1}},
        "smtp": {"BACKEND": SMTP, "OPTIONS": {"totl_retries": 5}},
    }
    assert found() == []


@pytest.mark.parametrize("form", ["ANYMAIL", "ANYMAIL_..."])
@pytest.mark.parametrize("key", ["MANDRILL_QUEUE_LEASE", "QUEUE_LEASE", "mandrill_queue_lease"])
def test_w003_setting_of_the_whole_queue_in_anymails(site: Site, form: str, key: str) -> None:
    one_mailer(site)
    if form == "ANYMAIL":
        site.settings.ANYMAIL = {key: 60}
    else:
        setattr(site.settings, f"ANYMAIL_{key}", 60)
    id_, text = only()
    assert id_ == "W003"
    assert f"{key}" in text
    assert "Write: EMAIL_QUEUE_LEASE = ..." in text


@pytest.mark.parametrize("key", ["EMAIL_TOTAL_RETRIES", "total_retries"])
def test_w003_setting_in_another_form_in_anymails(site: Site, key: str) -> None:
    one_mailer(site)
    site.settings.ANYMAIL = {key: 5}
    id_, text = only()
    assert id_ == "W003"
    assert "EMAIL_TOTAL_RETRIES = ... for all" in text


@pytest.mark.parametrize("form", ["ANYMAIL", "ANYMAIL_..."])
def test_w003_setting_without_an_esp_in_anymails(site: Site, form: str) -> None:
    one_mailer(site, RESEND)
    if form == "ANYMAIL":
        site.settings.ANYMAIL = {"TOTAL_RETRIES": 5}
    else:
        site.settings.ANYMAIL_TOTAL_RETRIES = 5
    id_, text = only()
    assert id_ == "W003"
    assert 'ANYMAIL = {"RESEND_TOTAL_RETRIES": ...}' in text
    assert "EMAIL_TOTAL_RETRIES = ..." in text


# --- W004: the deadline ---


@pytest.mark.parametrize(
    ("values", "why"),
    [
        pytest.param({"retry_deadline": 30}, "may last 30 seconds", id="as long as a web worker lives"),
        pytest.param({"retry_deadline": timedelta(minutes=2)}, "may last 120 seconds", id="longer"),
        pytest.param({"retry_deadline": None}, "has no EMAIL_RETRY_DEADLINE", id="none"),
        pytest.param({"read_retries": 2}, "because EMAIL_READ_RETRIES is set", id="none for read retries"),
        pytest.param({"read_retries": None}, "because EMAIL_READ_RETRIES is set", id="none for unlimited ones"),
    ],
)
@pytest.mark.parametrize("place", ["everywhere", "one mailer"])
def test_w004_deadline_past_the_end_of_a_web_worker(
    site: Site, values: Mapping[str, Any], why: str, place: str
) -> None:
    one_mailer(site, RESEND, **(values if place == "one mailer" else {}))
    if place == "everywhere":
        for name, value in values.items():
            setattr(site.settings, f"EMAIL_{name.upper()}", value)
    id_, text = only()
    assert id_ == "W004"
    assert why in text
    assert "EMAIL_RETRY_DEADLINE = 25" in text


# --- W005, E006, E007, W009: the database ---


@pytest.mark.parametrize(
    ("engine", "hint"),
    [
        pytest.param("django.db.backends.postgresql", "a second connection to the same server", id="server"),
        pytest.param("django.db.backends.sqlite3", "an SQLite file of the queue's own", id="file"),
    ],
)
def test_w005_atomic_requests(site: Site, engine: str, hint: str) -> None:
    one_mailer(site)
    database(site.settings, ENGINE=engine, ATOMIC_REQUESTS=True)
    id_, text = only()
    assert id_ == "W005"
    assert "DATABASES['default'] has ATOMIC_REQUESTS" in text
    assert hint in text
    assert "EMAIL_QUEUE_DATABASE = " in text


def test_w005_is_about_the_queues_database(site: Site) -> None:
    one_mailer(site)
    database(site.settings, ATOMIC_REQUESTS=True)
    database(site.settings, "queue", ENGINE="django.db.backends.postgresql", NAME="site")
    site.settings.EMAIL_QUEUE_DATABASE = "queue"
    assert found() == []
    site.settings.EMAIL_QUEUE_DATABASE = "default"
    assert only()[0] == "W005"


def test_w005_needs_a_queue(site: Site) -> None:
    one_mailer(site)
    database(site.settings, ATOMIC_REQUESTS=True)
    site.settings.EMAIL_FALLBACK_QUEUE = False
    assert found() == []


def test_e006_database_that_is_none(site: Site) -> None:
    one_mailer(site)
    site.settings.EMAIL_QUEUE_DATABASE = "queue"
    id_, text = only()
    assert id_ == "E006"
    assert "'queue'" in text
    assert "The aliases are: default." in text


@pytest.mark.parametrize("name", ["/srv/site/db.sqlite3", Path("/srv/site/db.sqlite3")], ids=["text", "path"])
def test_e007_second_alias_to_one_file(site: Site, name: Any) -> None:
    one_mailer(site)
    database(site.settings, "queue", **{**SQLITE, "NAME": name})
    site.settings.EMAIL_QUEUE_DATABASE = "queue"
    id_, text = only()
    assert id_ == "E007"
    assert "the same SQLite file as 'default'" in text
    assert 'EMAIL_QUEUE_DATABASE = "default"' in text


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        pytest.param("django.db.backends.sqlite3", "/srv/site/queue.sqlite3", id="file of its own"),
        pytest.param("django.db.backends.sqlite3", ":memory:", id="memory"),
        pytest.param("django.db.backends.postgresql", "/srv/site/db.sqlite3", id="server"),
    ],
)
def test_second_alias_to_something_else_is_in_order(site: Site, engine: str, name: str) -> None:
    one_mailer(site)
    database(site.settings, "queue", **{**SQLITE, "ENGINE": engine, "NAME": name})
    site.settings.EMAIL_QUEUE_DATABASE = "queue"
    assert found() == []


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="neither"),
        pytest.param({"transaction_mode": "IMMEDIATE"}, id="immediate only"),
        pytest.param({"init_command": "PRAGMA journal_mode=WAL;"}, id="WAL only"),
        pytest.param({"transaction_mode": "DEFERRED", "init_command": "PRAGMA journal_mode=WAL;"}, id="deferred"),
    ],
)
def test_w009_sqlite_as_it_comes(site: Site, options: Mapping[str, Any]) -> None:
    one_mailer(site)
    database(site.settings, OPTIONS=options)
    id_, text = only()
    assert id_ == "W009"
    assert '"transaction_mode": "IMMEDIATE"' in text
    assert "journal_mode=WAL" in text


@pytest.mark.parametrize(
    "name", [":memory:", "", "file:queue?mode=memory&cache=shared"], ids=["memory", "temporary", "shared"]
)
def test_sqlite_that_nobody_else_can_open_needs_no_advice(site: Site, name: str) -> None:
    one_mailer(site)
    database(site.settings, NAME=name, OPTIONS={})
    assert found() == []


def test_the_hint_about_sqlite_is_enough(site: Site) -> None:
    one_mailer(site)
    database(site.settings, OPTIONS={})
    hint = only()[1].partition('"OPTIONS": ')[2]
    database(site.settings, OPTIONS=eval(hint))
    assert found() == []


# --- E008: wrapping back ends ---


@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
@pytest.mark.parametrize("wrapper", [FALLBACK, QUEUED])
@pytest.mark.parametrize(
    ("mailers", "what"),
    [
        pytest.param({}, '"OPTIONS": {"using": "<alias>"}', id="nothing behind it"),
        pytest.param({"using": "default"}, "sends through itself", id="itself behind it"),
        pytest.param({"using": "nobody"}, "'nobody', in \"using\", is no alias", id="nobody behind it"),
        pytest.param({"using": "gone"}, "which cannot be imported", id="something behind it that is gone"),
        pytest.param({"using": "other"}, "sends nothing itself", id="another wrapper behind it"),
    ],
)
def test_e008_wrapper_with_mailers(
    settings: SettingsWrapper, wrapper: str, mailers: Mapping[str, Any], what: str
) -> None:
    settings.MAILERS = {
        "default": {"BACKEND": wrapper, "OPTIONS": mailers},
        "gone": {"BACKEND": "no.such.EmailBackend"},
        "other": {"BACKEND": FALLBACK, "OPTIONS": {"using": "smtp"}},
        "smtp": {"BACKEND": SMTP},
    }
    id_, text = only()
    assert id_ == "E008"
    assert text.startswith("MAILERS['default']: ")
    assert what in text


@pytest.mark.parametrize(("wrapper", "name"), [(FALLBACK, "EMAIL_FALLBACK_BACKEND"), (QUEUED, "EMAIL_QUEUE_BACKEND")])
@pytest.mark.parametrize(
    ("behind", "what"),
    [
        pytest.param(None, " = ", id="nothing behind it"),
        pytest.param(FALLBACK, "sends nothing itself", id="a wrapper behind it"),
        pytest.param(QUEUED, "sends nothing itself", id="the other wrapper behind it"),
        pytest.param("no.such.EmailBackend", "which cannot be imported", id="something behind it that is gone"),
    ],
)
def test_e008_wrapper_without_mailers(
    settings: SettingsWrapper, wrapper: str, name: str, behind: str | None, what: str
) -> None:
    Site(settings, "legacy")
    settings.EMAIL_BACKEND = wrapper
    if behind is not None:
        setattr(settings, name, behind)
    id_, text = only()
    assert id_ == "E008"
    assert text.startswith("EMAIL_BACKEND: ")
    assert name in text
    assert what in text


# --- W010: duplicates ---


@pytest.mark.parametrize("name", ["READ_RETRIES", "OTHER_RETRIES"])
@pytest.mark.parametrize("value", [1, None], ids=["some", "as many as in all"])
@pytest.mark.parametrize("place", ["everywhere", "one ESP"])
def test_w010_retries_of_what_may_have_been_taken(site: Site, name: str, value: int | None, place: str) -> None:
    one_mailer(site, POSTMARK)
    site.settings.EMAIL_RETRY_DEADLINE = 25
    if place == "everywhere":
        setattr(site.settings, f"EMAIL_{name}", value)
    else:
        site.settings.ANYMAIL = {f"POSTMARK_{name}": value}
    id_, text = only()
    assert id_ == "W010"
    assert f"EMAIL_{name}" in text
    assert "Postmark has no idempotency keys" in text
    assert f'ANYMAIL = {{"POSTMARK_{name}": 0}}' in text


def test_the_hint_about_duplicates_is_enough(site: Site) -> None:
    one_mailer(site, POSTMARK)
    site.settings.EMAIL_RETRY_DEADLINE = 25
    site.settings.EMAIL_READ_RETRIES = 2
    site.settings.ANYMAIL = eval(only()[1].partition("ANYMAIL = ")[2])
    assert found() == []


class RetryingResend(RetryMixin, AnymailResend):
    pass


def test_w010_names_the_keys_that_a_back_end_of_ours_would_use(site: Site) -> None:
    one_mailer(site, f"{__name__}.RetryingResend")
    site.settings.EMAIL_FALLBACK_QUEUE = False
    site.settings.EMAIL_READ_RETRIES = 2
    id_, text = only()
    assert id_ == "W010"
    assert "RetryingResend uses no idempotency keys, though Resend has them" in text
    assert "class RetryingResend(anymail_retry.backends.resend.EmailBackend)" in text


def test_w010_claims_nothing_of_an_esp_that_is_not_known(site: Site) -> None:
    one_mailer(site, f"{__name__}.OwlPost")
    site.settings.EMAIL_FALLBACK_QUEUE = False
    site.settings.EMAIL_READ_RETRIES = 2
    id_, text = only()
    assert id_ == "W010"
    assert "Owl Post has no idempotency keys that are known here" in text


# --- W011 and E014: unused ---


@pytest.mark.parametrize("backend", [SMTP, "anymail.backends.mandrill.EmailBackend"], ids=["SMTP", "plain Anymail"])
def test_w011_nothing_goes_through_it(site: Site, backend: str) -> None:
    one_mailer(site, backend)
    id_, text = only()
    assert id_ == "W011"
    assert '"anymail_retry.backends.RetryableMandrillEmailBackend"' in text


class Retrying(RetryMixin, AnymailMandrill):
    """As Anymail's documentation has it: for retries alone."""


@pytest.mark.parametrize(
    ("backend", "hint"),
    [
        ("Retrying", "class Retrying(anymail_retry.backends.mandrill.EmailBackend)"),
        ("OwlPost", 'Put "anymail_retry.backends.fallback.EmailBackend" before it'),
    ],
)
def test_w011_nothing_is_kept(site: Site, backend: str, hint: str) -> None:
    one_mailer(site, f"{__name__}.{backend}")
    id_, text = only()
    assert id_ == "W011"
    assert f"{__name__}.{backend} retries but keeps nothing in the queue" in text
    assert hint in text
    assert "EMAIL_FALLBACK_QUEUE = False" in text


@pytest.mark.parametrize(
    "values", [{"EMAIL_FALLBACK_QUEUE": False}, {"MAILER_FOR_CRASH_EMAILS": True}], ids=["off", "crash mail"]
)
def test_nothing_is_said_of_retries_alone_where_they_are_wanted(site: Site, values: dict[str, Any]) -> None:
    one_mailer(site, f"{__name__}.Retrying")
    for name, value in values.items():
        setattr(site.settings, name, value)
    assert found() == []


def test_deadline_of_retries_alone_is_nobodys_trouble(site: Site) -> None:
    """No row is to be written after it."""
    one_mailer(site, f"{__name__}.Retrying")
    site.settings.EMAIL_RETRY_DEADLINE = 300
    assert [short(message) for message in found()] == ["W011"]


@pytest.mark.parametrize(
    ("backend", "hint"),
    [
        ("Retrying", "class Retrying(anymail_retry.backends.mandrill.EmailBackend)"),
        ("OwlPost", 'Put "anymail_retry.backends.fallback.EmailBackend" before it'),
    ],
)
def test_e014_queue_is_wanted_and_the_back_end_has_none(site: Site, backend: str, hint: str) -> None:
    one_mailer(site, f"{__name__}.{backend}")
    site.settings.EMAIL_FALLBACK_QUEUE = True
    id_, text = only()
    assert id_ == "E014"
    assert f"{__name__}.{backend} retries but cannot keep anything in the queue" in text
    assert hint in text


@pytest.mark.parametrize("wanted", [True, None], ids=["wanted", "unset"])
def test_wrapper_keeps_for_a_back_end_that_only_retries(site: Site, wanted: bool | None) -> None:
    site.behind("fallback", f"{__name__}.Retrying")
    if wanted is not None:
        site.settings.EMAIL_FALLBACK_QUEUE = wanted
    assert found() == []


def test_crash_mail_is_a_use(site: Site) -> None:
    one_mailer(site, SMTP)
    site.settings.MAILER_FOR_CRASH_EMAILS = True
    assert found() == []


@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
def test_one_mailer_among_others_is_a_use(settings: SettingsWrapper) -> None:
    settings.MAILERS = {"default": {"BACKEND": SMTP}, "bulk": {"BACKEND": MANDRILL}}
    assert found() == []


# --- E012: the lease ---


@pytest.mark.parametrize("send_max", [120, 300])
def test_e012_send_that_outlasts_its_lease(site: Site, send_max: int) -> None:
    one_mailer(site)
    site.settings.EMAIL_QUEUE_LEASE = timedelta(minutes=2)
    site.settings.EMAIL_QUEUE_SEND_MAX = send_max
    id_, text = only()
    assert id_ == "E012"
    assert "another worker could take over a message" in text
    assert f"EMAIL_QUEUE_LEASE = {send_max * 2}" in text


# --- E013: encryption ---


def test_e013_package_is_missing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one_mailer(site)
    site.settings.EMAIL_QUEUE_ENCRYPTION_KEYS = ["k" * 43 + "="]
    encryption._cipher.cache_clear()
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "cryptography.fernet", None)  # as if it were not installed
        id_, text = only()
    assert id_ == "E013"
    assert 'pip install "django-anymail-retry[encryption]"' in text
    assert "kkk" not in text
    assert found() == []


# --- E015: paths ---


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        (
            "anymail_retry.backends.RetryableMandrilEmailBackend",
            "anymail_retry.backends.RetryableMandrillEmailBackend",
        ),
        ("anymail_retry.backends.mandril.EmailBackend", MANDRILL),
        ("anymail_retry.backends.queue.EmailBackend", QUEUED),
        ("anymail_retry.backends.mandrill", MANDRILL),
        (
            "anymail_retry.RetryableMandrillEmailBackend",
            "anymail_retry.backends.RetryableMandrillEmailBackend",
        ),
    ],
)
def test_e015_path_of_ours_that_is_none(site: Site, path: str, meant: str) -> None:
    one_mailer(site, path)
    id_, text = only()
    assert id_ == "E015"
    assert f"names {path!r}, which cannot be imported" in text
    assert text.endswith(f"Did you mean {meant}?")


def test_e015_says_what_a_back_end_needs_to_be_imported(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("anymail.backends.amazon_ses", "anymail_retry.backends.amazon_ses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "boto3", None)  # as if it were not installed
    one_mailer(site, "anymail_retry.backends.RetryableAmazonSESEmailBackend")
    id_, text = only()
    assert id_ == "E015"
    assert "boto3" in text
    assert "Did you mean" not in text


# --- W016 and W017: django-mailer ---


def test_w016_settings_of_django_mailers(site: Site) -> None:
    one_mailer(site)
    site.settings.MAILER_PAUSE_SEND = True
    site.settings.MAILER_EMAIL_THROTTLE = 1
    id_, text = only()
    assert id_ == "W016"
    assert "django-mailer's settings have no effect here: MAILER_EMAIL_THROTTLE, MAILER_PAUSE_SEND." in text
    assert "MAILER_EMAIL_THROTTLE: EMAIL_QUEUE_RATE, in messages per second" in text
    assert "MAILER_PAUSE_SEND: nothing: stop the workers" in text


def test_settings_of_django_mailer_are_all_known() -> None:
    mailer = pytest.importorskip("mailer")
    files = Path(mailer.__file__).parent.rglob("*.py")
    read = {name for path in files for name in re.findall(r"\bMAILER_[A-Z_]+", path.read_text(encoding="utf-8"))}
    assert set(checks.DJANGO_MAILER) == read
    migrating = (Path(__file__).parent.parent / "docs" / "migrating.rst").read_text(encoding="utf-8")
    assert {name for name in read if f"``{name}``" not in migrating} == set()


DJANGO_MAILER_AND_US = [("mailer", "anymail_retry"), ("anymail_retry", "mailer")]


@pytest.mark.parametrize("order", DJANGO_MAILER_AND_US, ids=["before us", "after us"])
def test_w017_django_mailers_commands(order: tuple[str, str]) -> None:
    """Whose command is run is asked of Django."""
    pytest.importorskip("mailer")
    ask = "from django.core.management import get_commands; print(get_commands()['send_mail'])"
    process = subprocess.run(
        [sys.executable, "-c", SETTINGS % (list(order), {"EMAIL_BACKEND": MANDRILL, "MAILER_PAUSE_SEND": True}) + ask],
        cwd=Path(anymail_retry.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.splitlines()[-1] == order[0], process.stderr
    assert ("(anymail_retry.W017)" in process.stderr) is (order[0] == "mailer")
    assert ('"anymail_retry" before "mailer"' in process.stderr) is (order[0] == "mailer")
    assert "W016" not in process.stderr


# --- All of them ---


def test_several_things_are_said_in_the_order_of_their_ids(site: Site) -> None:
    one_mailer(site, POSTMARK, read_retries=2)
    database(site.settings, ATOMIC_REQUESTS=True, OPTIONS={})
    site.settings.EMAIL_TOTL_RETRIES = 3
    site.settings.EMAIL_QUEUE_SEND_MAX = 500
    numbers = [int(short(message)[1:]) for message in found()]
    assert numbers == [2, 4, 5, 9, 10, 12]


def test_values_that_cannot_be_read_leave_the_rest_unsaid(site: Site) -> None:
    one_mailer(site)
    site.settings.EMAIL_QUEUE_LEASE = "long"
    site.settings.EMAIL_QUEUE_DATABASE = "queue"
    assert [short(message) for message in found()] == ["E001"]


def test_each_id_has_its_test_and_its_place_in_the_table() -> None:
    """An id that is given twice, or is not documented, would mislead whoever silences it."""
    source = Path(checks.__file__).read_text(encoding="utf-8")
    given = set(re.findall(r"id=\"anymail_retry\.([EW]\d{3})\"", source))
    given |= set(re.findall(r"id=\"anymail_retry\.([EW]\d{3})\"", _wrapping_source()))
    documented = re.findall(r"^([EW]\d{3})  ", checks.__doc__ or "", re.MULTILINE)
    tested = set(re.findall(r"\b([EW]\d{3})\b", Path(__file__).read_text(encoding="utf-8")))
    assert sorted(given) == sorted(documented)
    assert given <= tested


def test_each_id_has_its_section_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "checks.rst").read_text(encoding="utf-8")
    sections = re.findall(r"^([EW]\d{3})\n----$", page, re.MULTILINE)
    assert sections == re.findall(r"^([EW]\d{3})  ", checks.__doc__ or "", re.MULTILINE)


def _wrapping_source() -> str:
    return (Path(checks.__file__).parent / "mailqueue" / "wrapping.py").read_text(encoding="utf-8")


# --- Registered ---


def test_app_registers_the_checks(site: Site) -> None:
    assert apps.check_settings in django_checks.registry.registry.registered_checks
    one_mailer(site, SMTP)
    assert "anymail_retry.W011" in {message.id for message in apps.check_settings(None)}


def test_id_can_be_silenced(site: Site) -> None:
    one_mailer(site, SMTP)
    (message,) = found()
    assert not message.is_silenced()
    with override_settings(SILENCED_SYSTEM_CHECKS=["anymail_retry.W011"]):
        assert message.is_silenced()


SETTINGS = """
import django.conf
django.conf.settings.configure(
    INSTALLED_APPS=%r,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    SECRET_KEY="only for this process",
    USE_TZ=True,
    **%r,
)
import django, sys
django.setup()
loaded = "anymail_retry.checks" in sys.modules
from django.core.management import call_command
call_command("check")
print("loaded before" if loaded else "loaded late")
"""

WITH_MAILERS = {"MAILERS": {"default": {"BACKEND": MANDRILL, "OPTIONS": {"totl_retries": 3}}}, "EMAIL_TOTL_RETRIES": 3}
WITHOUT = {"EMAIL_BACKEND": MANDRILL, "EMAIL_TOTL_RETRIES": 3}


@pytest.mark.parametrize("values", [WITHOUT, WITH_MAILERS] if "mailers" in WAYS else [WITHOUT], ids=WAYS)
def test_manage_py_check_runs_them_and_a_start_does_not_load_them(values: dict[str, Any]) -> None:
    """Under ``-W error``, save for the one warning that a site on Django 6.1 without MAILERS has to live with."""
    allowed = "ignore:The EMAIL_BACKEND setting is deprecated:PendingDeprecationWarning"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-W", allowed, "-c", SETTINGS % (["anymail_retry"], values)],
        cwd=Path(anymail_retry.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "(anymail_retry.W002) EMAIL_TOTL_RETRIES is no setting" in process.stderr
    assert "Did you mean EMAIL_TOTAL_RETRIES?" in process.stderr
    assert process.stdout.splitlines()[-1] == "loaded late"


def test_wrong_value_is_no_reason_not_to_start() -> None:
    """``manage.py check`` has to be able to say so."""
    values = {"EMAIL_BACKEND": MANDRILL, "MAILER_FOR_CRASH_EMAILS": "yes"}
    process = subprocess.run(
        [sys.executable, "-c", SETTINGS % (["anymail_retry"], values)],
        cwd=Path(anymail_retry.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "(anymail_retry.E001) MAILER_FOR_CRASH_EMAILS is 'yes'" in process.stderr
