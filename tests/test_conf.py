"""The settings reader: what each setting takes, where it may stand, and what the error says to whoever errs."""

from __future__ import annotations

import base64
import enum
import inspect
import os
import re
import subprocess
import sys
import warnings
from datetime import timedelta
from decimal import Decimal
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anymail
import django
import pytest
from anymail.backends.mandrill import EmailBackend as AnymailBackend
from django.core.exceptions import ImproperlyConfigured
from django.core.mail.backends.smtp import EmailBackend as SmtpBackend
from hypothesis import given
from hypothesis import strategies as st

from anymail_retry import RetryMixin, conf
from anymail_retry.backends.mandrill import EmailBackend
from tests.sites import MANDRILL, WAYS, Site, site

if TYPE_CHECKING:
    from pytest_django.fixtures import SettingsWrapper

__all__ = ["site"]  # a fixture


class OnAmbiguous(str, enum.Enum):
    """As a site may write it, which keeps such words in an enum."""

    HOLD = "hold"


# --- What each setting takes ---

COUNTS = ["TOTAL_RETRIES", "CONNECT_RETRIES", "READ_RETRIES", "HTTP_STATUS_RETRIES", "OTHER_RETRIES"]
SECONDS = [
    "RETRY_BACKOFF_FACTOR",
    "RETRY_BACKOFF_MAX",
    "RETRY_BACKOFF_JITTER",
    "RETRY_AFTER_MAX",
    "CONNECTION_MAX_IDLE",
    "QUEUE_BACKOFF",
    "QUEUE_BACKOFF_MAX",
]
SECONDS_ABOVE_0 = [
    "RETRY_DEADLINE",
    "CONNECT_TIMEOUT",
    "QUEUE_LEASE",
    "QUEUE_SEND_MAX",
    "QUEUE_POLL",
    "QUEUE_MAX_AGE",
]
NUMBERS_ABOVE_0 = ["QUEUE_THREADS", "QUEUE_BATCH_SIZE", "QUEUE_MAX_ATTEMPTS", "BREAKER_FAILURES"]
FLAGS = ["FALLBACK_QUEUE", "QUEUE_KEEP_CONTENT", "MAILER_FOR_CRASH_EMAILS"]
TEXTS = ["QUEUE_DATABASE", "QUEUE_BACKEND", "FALLBACK_BACKEND"]
NONE = [
    "TOTAL_RETRIES",
    "CONNECT_RETRIES",
    "READ_RETRIES",
    "HTTP_STATUS_RETRIES",
    "OTHER_RETRIES",
    "RETRY_DEADLINE",
    "BREAKER_FAILURES",
    "QUEUE_RATE",
    "QUEUE_DATABASE",
    "QUEUE_BACKEND",
    "FALLBACK_BACKEND",
    "QUEUE_MAX_AGE",
    "QUEUE_MAX_ATTEMPTS",
]

KEY_1, KEY_2 = (base64.urlsafe_b64encode(letter * 32).decode() for letter in (b"1", b"2"))

RIGHT: list[tuple[str, Any, Any]] = [
    *((name, value, value) for name in COUNTS for value in (0, 7)),
    *((name, value, value) for name in NUMBERS_ABOVE_0 for value in (1, 7)),
    *((name, 0, 0.0) for name in SECONDS),
    *((name, value, 2.5) for name in SECONDS + SECONDS_ABOVE_0 for value in (2.5, timedelta(seconds=2.5))),
    *((name, 3, 3.0) for name in SECONDS + SECONDS_ABOVE_0),
    *((name, value, value) for name in FLAGS for value in (True, False)),
    *((name, "default", "default") for name in TEXTS),
    *((name, None, None) for name in NONE),
    ("READ_RETRIES", False, False),  # none, as requests itself says it
    ("HTTP_STATUS_RETRYABLE", [], frozenset()),
    ("HTTP_STATUS_RETRYABLE", None, frozenset()),  # as urllib3 takes it
    ("HTTP_STATUS_RETRYABLE", [429, 503], frozenset({429, 503})),
    ("HTTP_STATUS_RETRYABLE", (HTTPStatus.BAD_GATEWAY,), frozenset({502})),
    ("HTTP_STATUS_RETRYABLE", range(500, 600), frozenset(range(500, 600))),
    ("QUEUE_ON_AMBIGUOUS", "resend", "resend"),
    ("QUEUE_ON_AMBIGUOUS", "hold", "hold"),
    ("QUEUE_ON_AMBIGUOUS", OnAmbiguous.HOLD, "hold"),
    ("QUEUE_RATE", 2, 2.0),
    ("QUEUE_RATE", 0.5, 0.5),
    ("QUEUE_ENCRYPTION_KEYS", [], ()),
    ("QUEUE_ENCRYPTION_KEYS", [KEY_1, KEY_2.encode()], (KEY_1, KEY_2)),  # Fernet.generate_key() gives bytes
]

COUNT = "a whole number, 0 or more"
WRONG: list[tuple[str, Any, str]] = [
    *((name, value, COUNT) for name in COUNTS for value in (-1, 1.0, "3", True, [3], timedelta(1))),
    *((name, False, COUNT) for name in COUNTS if name != "READ_RETRIES"),
    *((name, value, "a whole number, 1 or more") for name in NUMBERS_ABOVE_0 for value in (0, -1, 1.5, "3", True)),
    *(
        (name, value, "a number of seconds")
        for name in SECONDS + SECONDS_ABOVE_0
        for value in (-1, -0.5, "25", True, float("nan"), float("inf"), timedelta(seconds=-1), Decimal(2))
    ),
    *((name, value, "above 0") for name in SECONDS_ABOVE_0 for value in (0, 0.0, timedelta(0))),
    *((name, value, "True or False") for name in FLAGS for value in (0, 1, "yes", "False", None)),
    *((name, value, "a text that is not empty") for name in TEXTS for value in ("", 1, ["default"], True)),
    *(
        (name, None, "")
        for name in [*SECONDS, *SECONDS_ABOVE_0, *NUMBERS_ABOVE_0, "QUEUE_ON_AMBIGUOUS"]
        if name not in NONE
    ),
    *(
        ("HTTP_STATUS_RETRYABLE", value, "a list of HTTP statuses")
        for value in (429, "429", b"429", {429: 1}, ["429"], [429, True], [4.5], iter([429]))
    ),
    ("HTTP_STATUS_RETRYABLE", [200, 503, 202], "without 200, 202: a message that was accepted would be sent again"),
    ("HTTP_STATUS_RETRYABLE", [302], "without 302"),
    ("HTTP_STATUS_RETRYABLE", [399, 600, 0], "without 0, 399, 600"),
    ("QUEUE_ON_AMBIGUOUS", "drop", "'resend' or 'hold'"),
    ("QUEUE_ON_AMBIGUOUS", "HOLD", "'resend' or 'hold'"),
    ("QUEUE_ON_AMBIGUOUS", ["hold"], "'resend' or 'hold'"),
    *(("QUEUE_RATE", value, "messages per second, above 0") for value in (0, -1, "10", True, float("nan"))),
    *(("QUEUE_ENCRYPTION_KEYS", value, "a list of Fernet keys") for value in (None, KEY_1, 1, {KEY_1})),
    *(
        ("QUEUE_ENCRYPTION_KEYS", [KEY_1, value], "number 2 of 2 is none")
        for value in ("", None, 5, "secret", KEY_2[:-4], KEY_2 * 2, "\N{SNOWMAN}" * 44)
    ),
]


def ids(table: list[tuple[str, Any, Any]]) -> list[str]:
    return [f"{name}={value!r}".partition(" object at")[0] for name, value, _ in table]


def names(table: list[tuple[str, Any, Any]]) -> set[str]:
    return {row[0] for row in table}


def test_tables_speak_of_every_setting() -> None:
    assert names(RIGHT) == names(WRONG) == set(conf.SETTINGS)


def test_only_those_named_are_none() -> None:
    assert {name for name, setting in conf.SETTINGS.items() if setting.none_is_a_value} == set(NONE)


@pytest.mark.parametrize(("name", "value", "typed"), RIGHT, ids=ids(RIGHT))
def test_right_value_is_read(settings: SettingsWrapper, name: str, value: Any, typed: Any) -> None:
    setattr(settings, conf.SETTINGS[name].full_name, value)
    found = conf.get(name)
    assert found == typed
    assert type(found) is type(typed)


@pytest.mark.parametrize(("name", "value", "what"), WRONG, ids=ids(WRONG))
def test_wrong_value_is_refused_with_the_line_to_write(
    settings: SettingsWrapper, name: str, value: Any, what: str
) -> None:
    setting = conf.SETTINGS[name]
    setattr(settings, setting.full_name, value)
    with pytest.raises(ImproperlyConfigured) as caught:
        conf.get(name)
    text = str(caught.value)
    assert text.startswith(f"{setting.full_name} {'' if setting.secret else f'is {value!r}, and '}should be ")
    if setting.secret:
        assert not any(str(item) in text for item in [KEY_1, KEY_2, "secret"])
    assert what in text
    assert text.endswith(f"Write, for example: {setting.full_name} = {setting.example}")


@pytest.mark.parametrize("name", conf.SETTINGS)
def test_line_to_write_is_right(settings: SettingsWrapper, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EMAIL_QUEUE_KEY", KEY_1)
    setting = conf.SETTINGS[name]
    example = eval(setting.example, {"timedelta": timedelta, "os": os})
    setattr(settings, setting.full_name, example)
    conf.get(name)


@pytest.mark.parametrize("name", conf.SETTINGS)
def test_unset_is_the_default_which_would_be_a_right_value(settings: SettingsWrapper, name: str) -> None:
    setting = conf.SETTINGS[name]
    default = conf.get(name)
    assert default is setting.default
    if not isinstance(default, conf.Unset):
        setattr(settings, setting.full_name, default)
        assert conf.get(name) == default


def test_unset_is_no_value_of_its_own() -> None:
    assert repr(conf.UNSET) == "<unset>"
    assert not conf.UNSET


@given(st.one_of(st.integers(0, 10**9), st.floats(0, 1e9), st.timedeltas(timedelta(0), timedelta(days=9999))))
def test_seconds_are_seconds_in_whatever_form(value: float | timedelta) -> None:
    expected = value.total_seconds() if isinstance(value, timedelta) else value
    assert conf.seconds(value) == expected


@given(st.sets(st.integers(0, 999)))
def test_only_refusals_and_errors_are_statuses_to_try_again(statuses: set[int]) -> None:
    if all(400 <= status < 600 for status in statuses):
        assert conf.statuses(statuses) == statuses
    else:
        with pytest.raises(ValueError, match="without"):
            conf.statuses(statuses)


# --- Where a setting may stand ---

PLACES = ("option", "ANYMAIL", "ANYMAIL_...", "EMAIL_...")


def put(settings: SettingsWrapper, places: dict[str, Any], esp: str = "MANDRILL") -> dict[str, Any]:
    """Set EMAIL_TOTAL_RETRIES in these places; the back end's options."""
    if "ANYMAIL" in places:
        settings.ANYMAIL = {f"{esp}_TOTAL_RETRIES": places["ANYMAIL"]}
    if "ANYMAIL_..." in places:
        setattr(settings, f"ANYMAIL_{esp}_TOTAL_RETRIES", places["ANYMAIL_..."])
    if "EMAIL_..." in places:
        settings.EMAIL_TOTAL_RETRIES = places["EMAIL_..."]
    return {"total_retries": places["option"]} if "option" in places else {}


@pytest.mark.parametrize("nearest", range(len(PLACES)))
@pytest.mark.parametrize("value", [5, None], ids=["number", "None"])
def test_the_nearest_place_is_read(settings: SettingsWrapper, nearest: int, value: int | None) -> None:
    values = {place: 10 + number for number, place in enumerate(PLACES) if number > nearest}
    options = put(settings, {PLACES[nearest]: value, **values})
    assert conf.get("TOTAL_RETRIES", esp_name="Mandrill", options=options) == value


def test_name_of_an_esp_is_written_as_anymail_writes_it(settings: SettingsWrapper) -> None:
    settings.ANYMAIL = {"UNISENDER_GO_TOTAL_RETRIES": 5}
    assert conf.get("TOTAL_RETRIES", esp_name="Unisender Go") == 5
    assert conf.get("TOTAL_RETRIES", esp_name="Mandrill") == 3


def test_another_esps_form_is_not_read(settings: SettingsWrapper) -> None:
    put(settings, {"ANYMAIL": 5, "ANYMAIL_...": 6}, esp="RESEND")
    assert conf.get("TOTAL_RETRIES", esp_name="Mandrill") == 3
    assert conf.get("TOTAL_RETRIES") == 3


def test_what_is_about_the_whole_queue_stands_in_one_place(settings: SettingsWrapper) -> None:
    settings.ANYMAIL = {"MANDRILL_QUEUE_LEASE": 1}
    assert conf.get("QUEUE_LEASE", esp_name="Mandrill", options={"queue_lease": 2}) == 120.0


def test_anymail_may_be_none(settings: SettingsWrapper) -> None:
    settings.ANYMAIL = None
    assert conf.get("TOTAL_RETRIES", esp_name="Mandrill") == 3


def test_settings_are_read_when_they_are_used(settings: SettingsWrapper) -> None:
    settings.EMAIL_TOTAL_RETRIES = 1
    assert conf.get("TOTAL_RETRIES") == 1
    settings.EMAIL_TOTAL_RETRIES = 2
    assert conf.get("TOTAL_RETRIES") == 2


@pytest.mark.parametrize(
    ("place", "name", "line"),
    [
        ("option", "The option 'total_retries'", '"total_retries": 3'),
        ("ANYMAIL", "ANYMAIL['MANDRILL_TOTAL_RETRIES']", 'ANYMAIL = {"MANDRILL_TOTAL_RETRIES": 3}'),
        ("ANYMAIL_...", "ANYMAIL_MANDRILL_TOTAL_RETRIES", "ANYMAIL_MANDRILL_TOTAL_RETRIES = 3"),
        ("EMAIL_...", "EMAIL_TOTAL_RETRIES", "EMAIL_TOTAL_RETRIES = 3"),
    ],
)
def test_error_names_the_place_and_the_line_to_write_there(
    settings: SettingsWrapper, place: str, name: str, line: str
) -> None:
    options = put(settings, {place: "many"})
    with pytest.raises(ImproperlyConfigured) as caught:
        conf.get("TOTAL_RETRIES", esp_name="Mandrill", options=options)
    assert str(caught.value) == f"{name} is 'many', and should be {COUNT}. Write, for example: {line}"


# --- Options of a back end ---

KEY = {"api_key": "test-api-key"}


def configure(site: Site, **options: Any) -> None:
    """A Mandrill site; the options stand in MAILERS or, before that, are given to the constructor by the caller."""
    site.settings.ANYMAIL = {"MANDRILL_API_KEY": "test-api-key"}
    if site.way == "mailers":
        site.settings.MAILERS = {"default": {"BACKEND": MANDRILL, "OPTIONS": {**KEY, **options}}}
    else:
        site.settings.EMAIL_BACKEND = MANDRILL


def test_own_options_reach_neither_anymail_nor_django(site: Site) -> None:
    options = {"total_retries": 5, "retry_deadline": timedelta(seconds=9), "queue_on_ambiguous": "hold"}
    configure(site, **options)
    backend = site.connection() if site.way == "mailers" else site.connection(**options)
    assert backend.retry_policy.total == 5
    assert backend.retry_policy.deadline == 9.0


@pytest.mark.parametrize("way", ["get_connection", "constructor"])
def test_own_options_of_one_object_are_taken(site: Site, way: str) -> None:
    configure(site)
    make = site.connection if way == "get_connection" else EmailBackend
    assert make(read_retries=1).retry_policy.read == 1
    assert make(fallback_queue=False).fallback is None


@pytest.mark.skipif("mailers" not in WAYS, reason="Django before 6.1 has no MAILERS")
def test_unknown_option_in_mailers_is_still_djangos_to_refuse(settings: SettingsWrapper) -> None:
    from django.core.mail import InvalidMailer, mailers  # Django 6.1

    settings.MAILERS = {"default": {"BACKEND": MANDRILL, "OPTIONS": {**KEY, "totl_retries": 5}}}
    with pytest.raises(InvalidMailer, match="totl_retries"):
        mailers["default"]


@pytest.mark.parametrize("way", ["get_connection", "constructor"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("totl_retries", "total_retries"),
        ("read_retry", "read_retries"),
        ("http_status_retriable", "http_status_retryable"),
        ("fallback_que", "fallback_queue"),
        ("queue_on_ambigous", "queue_on_ambiguous"),
    ],
)
def test_misspelt_keyword_is_named_where_django_swallows_it(site: Site, way: str, name: str, meant: str) -> None:
    configure(site)
    make = site.connection if way == "get_connection" else EmailBackend
    with pytest.raises(ImproperlyConfigured, match=f"There is no option '{name}'. Did you mean '{meant}'?"):
        make(**{name: 1})


@pytest.mark.parametrize("name", ["send_retries", "load_retries"])
def test_misspelt_keyword_is_not_taken_for_the_one_that_repeats_mail(name: str) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        EmailBackend(**KEY, **{name: 1})
    assert str(caught.value).startswith(f"There is no option '{name}'. The options are: ")


def test_misspelt_keyword_is_named_without_the_queue_too() -> None:
    class Retrying(RetryMixin, AnymailBackend):
        pass

    with pytest.raises(ImproperlyConfigured, match="Did you mean 'total_retries'"):
        Retrying(**KEY, totl_retries=5)


def options_of_others() -> set[str]:
    """Every option that Anymail's back ends read, and Django's SMTP back end."""
    sources = [path.read_text(encoding="utf-8") for path in (Path(anymail.__file__).parent / "backends").glob("*.py")]
    read = {name for source in sources for name in re.findall(r"get_anymail_setting\(\s*\"(\w+)\"", source)}
    return read | set(inspect.signature(SmtpBackend).parameters)


def test_no_option_of_anymails_or_djangos_is_taken_for_a_misspelt_one() -> None:
    options = options_of_others()
    assert {"api_key", "requests_timeout", "host"} <= options  # they were found
    kwargs = dict.fromkeys(options, "theirs")
    assert conf.take_options(conf.TRANSPORT_SETTINGS, kwargs) == {}
    assert set(kwargs) == options


@pytest.mark.skipif("mailers" in WAYS, reason="Django 6.1 warns of a keyword that nobody knows")
def test_other_unknown_keyword_is_passed_over_as_before(site: Site) -> None:
    configure(site)
    assert site.connection(colour="red").retry_policy.total == 3


# --- Whether there is a queue ---


@pytest.mark.parametrize(
    ("installed", "wanted", "is_on"),
    [
        pytest.param(True, conf.UNSET, True, id="installed"),
        pytest.param(True, True, True, id="installed and wanted"),
        pytest.param(True, False, False, id="installed and not wanted"),
        pytest.param(False, conf.UNSET, False, id="not installed"),
        pytest.param(False, False, False, id="not installed and not wanted"),
    ],
)
def test_queue_is_on_where_it_is_installed_and_not_unwanted(
    settings: SettingsWrapper, installed: bool, wanted: Any, is_on: bool
) -> None:
    if not installed:
        settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if app != "anymail_retry"]
    if wanted is not conf.UNSET:
        settings.EMAIL_FALLBACK_QUEUE = wanted
    assert conf.fallback_is_on() is is_on


def test_queue_that_is_wanted_and_not_installed_is_an_error_with_the_line_to_add(settings: SettingsWrapper) -> None:
    settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if app != "anymail_retry"]
    settings.EMAIL_FALLBACK_QUEUE = True
    with pytest.raises(ImproperlyConfigured, match='Add to INSTALLED_APPS: "anymail_retry"'):
        conf.fallback_is_on()


SCRIPT = """
import django.conf
django.conf.settings.configure(INSTALLED_APPS=["anymail_retry"], **%r)
from anymail_retry.backends.mandrill import EmailBackend
print(EmailBackend(api_key="...").fallback)
"""


def script(**values: Any) -> subprocess.CompletedProcess[str]:
    """A script with settings and without ``django.setup()``, where plain Anymail works."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT % values],
        cwd=Path(conf.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("values", [{}, {"EMAIL_FALLBACK_QUEUE": False}], ids=["unset", "not wanted"])
def test_queue_is_off_in_a_script_without_apps(values: dict[str, Any]) -> None:
    process = script(**values)
    assert process.stdout == "None\n", process.stderr


def test_queue_that_is_wanted_in_a_script_without_apps_is_an_error_with_the_line_to_add() -> None:
    process = script(EMAIL_FALLBACK_QUEUE=True)
    assert "ImproperlyConfigured: EMAIL_FALLBACK_QUEUE is True, but" in process.stderr
    assert process.stderr.endswith("Call first: django.setup()\n")


# --- Django's own settings ---


def test_email_backend_is_read_without_djangos_warning(settings: SettingsWrapper) -> None:
    Site(settings, "legacy")
    settings.EMAIL_BACKEND = MANDRILL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert conf.email_backend() == MANDRILL


def test_mailers_are_read_where_django_reads_them(settings: SettingsWrapper) -> None:
    settings.MAILERS = {"default": {"BACKEND": MANDRILL, "OPTIONS": {"api_key": "k"}}, "smtp": {}}
    expected = {"default": (MANDRILL, {"api_key": "k"}), "smtp": (conf.DEFAULT_BACKEND, {})}
    assert conf.mailers() == (expected if django.VERSION >= (6, 1) else None)
    del settings.MAILERS
    assert conf.mailers() is None
