"""The one settings reader: every name, its type, its default, and where it may stand.

Order of reading, for a setting that makes sense per mailer: the back end's keyword or ``MAILERS[...]["OPTIONS"]``
(``total_retries``), then Anymail's ESP-specific form (``ANYMAIL = {"MANDRILL_TOTAL_RETRIES": ...}`` or
``ANYMAIL_MANDRILL_TOTAL_RETRIES``), then ``EMAIL_TOTAL_RETRIES``, then the default. Everything is read when it is
used, so ``override_settings`` works. Times are seconds or ``timedelta``.
"""

from __future__ import annotations

import difflib
import enum
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Final, NamedTuple

import django
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured


class Unset:
    """Marks a setting that the user did not set; ``None`` is a value."""

    def __repr__(self) -> str:
        return "<unset>"

    def __bool__(self) -> bool:
        return False


UNSET: Final = Unset()

# --- types: each takes what the user wrote and gives the typed value, or raises ValueError with what it should be ----


def count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a whole number, 0 or more")
    return value


def positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number, 1 or more")
    return value


def read_count(value: Any) -> int | bool:
    if value is False:
        return False
    try:
        return count(value)
    except ValueError:
        raise ValueError("a whole number, 0 or more, or False for none") from None


def seconds(value: Any) -> float:
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError("a number of seconds, 0 or more, or a timedelta")
    return float(value)


def positive_seconds(value: Any) -> float:
    try:
        value = seconds(value)
    except ValueError:
        value = 0.0
    if not value:
        raise ValueError("a number of seconds above 0, or a timedelta")
    return float(value)


def rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError("a number of messages per second, above 0")
    return float(value)


def statuses(value: Any) -> frozenset[int]:
    if value is None:  # "none", as urllib3 takes it
        return frozenset()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise ValueError("a list of HTTP statuses, such as [429, 503]")
    if any(isinstance(status, bool) or not isinstance(status, int) for status in value):
        raise ValueError("a list of HTTP statuses as whole numbers, such as [429, 503]")
    wrong = sorted(status for status in value if not 400 <= status <= 599)
    if wrong:
        names = ", ".join(str(int(status)) for status in wrong)
        why = ": a message that was accepted would be sent again" if any(200 <= s <= 299 for s in wrong) else ""
        raise ValueError(f"a list of HTTP statuses from 400 to 599, so without {names}{why}")
    return frozenset(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    return value


def fernet_keys(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("a list of Fernet keys")
    keys = tuple(key.decode("latin-1") if isinstance(key, bytes) else key for key in value)
    for place, key in enumerate(keys, 1):
        if not isinstance(key, str) or not re.fullmatch("[A-Za-z0-9_-]{43}=", key):
            raise ValueError(
                f"a list of Fernet keys, each 32 bytes in urlsafe base64; number {place} of {len(value)} is none."
                " To make one: python -c"
                ' "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'
            )
    return keys


def one_of(*choices: str) -> Callable[[Any], str]:
    def choice(value: Any) -> str:
        if value not in choices:
            raise ValueError(" or ".join(repr(choice) for choice in choices))
        return choices[choices.index(value)]  # plain, also where a member of an enum was given

    return choice


@dataclass(frozen=True)
class Setting:
    """One setting, by its name without ``EMAIL_``.

    :param kind: turns what the user wrote into the typed value, or raises ``ValueError`` with what it should be.
    :param default: taken as it is.
    :param example: what a hint writes behind the ``=``.
    :param none_is_a_value: the user may write ``None``.
    :param per_mailer: may stand in a mailer's OPTIONS and in ``ANYMAIL``.
    :param secret: no error quotes its value.
    """

    name: str
    kind: Callable[[Any], Any]
    default: Any
    example: str
    none_is_a_value: bool = False
    per_mailer: bool = False
    secret: bool = False
    prefix: str = "EMAIL_"

    @cached_property
    def full_name(self) -> str:
        return f"{self.prefix}{self.name}"

    @cached_property
    def option(self) -> str:
        return self.name.lower()

    def convert(self, value: Any) -> Any:
        if value is None and self.none_is_a_value:
            return None
        return self.kind(value)


def _transport(name: str, kind: Callable[[Any], Any], default: Any, example: str, none: bool = False) -> Setting:
    return Setting(name, kind, default, example, none_is_a_value=none, per_mailer=True)


#: Settings of the HTTP retries; all of them may stand per mailer. UNSET: the policy decides, by what it knows of the
#: ESP (:mod:`anymail_retry.transport.policy`).
TRANSPORT_SETTINGS: Final = (
    _transport("TOTAL_RETRIES", count, 3, "3", none=True),
    _transport("CONNECT_RETRIES", count, None, "3", none=True),
    _transport("READ_RETRIES", read_count, UNSET, "0", none=True),
    _transport("HTTP_STATUS_RETRIES", count, None, "3", none=True),
    _transport("OTHER_RETRIES", count, 0, "0", none=True),
    _transport("HTTP_STATUS_RETRYABLE", statuses, UNSET, "[429, 503]"),
    _transport("RETRY_BACKOFF_FACTOR", seconds, 0.5, "0.5"),
    _transport("RETRY_BACKOFF_MAX", seconds, 10.0, "10"),
    _transport("RETRY_BACKOFF_JITTER", seconds, 0.5, "0.5"),
    _transport("RETRY_AFTER_MAX", seconds, 10.0, "10"),
    _transport("RETRY_DEADLINE", positive_seconds, UNSET, "25", none=True),
    _transport("CONNECT_TIMEOUT", positive_seconds, 5.0, "5"),
    _transport("CONNECTION_MAX_IDLE", seconds, 15.0, "15"),
    _transport("BREAKER_FAILURES", positive, UNSET, "5", none=True),
)

#: Settings of the queue that may stand per mailer.
MAILER_SETTINGS: Final = (
    Setting("FALLBACK_QUEUE", flag, UNSET, "True", per_mailer=True),
    Setting("QUEUE_ON_AMBIGUOUS", one_of("resend", "hold"), "resend", '"resend"', per_mailer=True),
    Setting("QUEUE_RATE", rate, None, "10", none_is_a_value=True, per_mailer=True),
)

#: Settings of the queue as a whole.
QUEUE_SETTINGS: Final = (
    Setting("QUEUE_DATABASE", text, None, '"default"', none_is_a_value=True),
    Setting("QUEUE_BACKEND", text, None, '"anymail.backends.mandrill.EmailBackend"', none_is_a_value=True),
    Setting("FALLBACK_BACKEND", text, None, '"django.core.mail.backends.smtp.EmailBackend"', none_is_a_value=True),
    Setting("QUEUE_LEASE", positive_seconds, 120.0, "120"),
    Setting("QUEUE_SEND_MAX", positive_seconds, 60.0, "60"),
    Setting("QUEUE_THREADS", positive, 20, "20"),
    Setting("QUEUE_BATCH_SIZE", positive, 100, "100"),
    Setting("QUEUE_POLL", positive_seconds, 1.0, "1"),
    Setting("QUEUE_BACKOFF", seconds, 60.0, "60"),
    Setting("QUEUE_BACKOFF_MAX", seconds, 3600.0, "3600"),
    Setting("QUEUE_MAX_AGE", positive_seconds, 259200.0, "timedelta(days=3)", none_is_a_value=True),
    Setting("QUEUE_MAX_ATTEMPTS", positive, None, "20", none_is_a_value=True),
    Setting("QUEUE_KEEP_CONTENT", flag, False, "False"),
    Setting("QUEUE_ENCRYPTION_KEYS", fernet_keys, (), '[os.environ["EMAIL_QUEUE_KEY"]]', secret=True),
    Setting("MAILER_FOR_CRASH_EMAILS", flag, False, "True", prefix=""),
)

SETTINGS: Final[Mapping[str, Setting]] = {
    setting.name: setting for setting in (*TRANSPORT_SETTINGS, *MAILER_SETTINGS, *QUEUE_SETTINGS)
}

#: What may stand in a mailer's OPTIONS.
MAILER_OPTIONS: Final = frozenset(setting.option for setting in SETTINGS.values() if setting.per_mailer)


def get(name: str, *, esp_name: str | None = None, options: Mapping[str, Any] | None = None) -> Any:
    """The value of one setting, by its name without ``EMAIL_``.

    :param esp_name: Anymail's name of the ESP; without it the ESP-specific form is not looked at.
    :param options: the back end's keywords; not changed here (see :func:`take_options`).
    :raises ImproperlyConfigured: the value has the wrong type; names the setting and the line to write.
    """
    setting = SETTINGS[name]
    place, key, value = _find(setting, esp_name, options or {})
    if value is UNSET:
        return setting.default
    try:
        return setting.convert(value)
    except ValueError as error:
        name, line = (text.format(key=key, example=setting.example) for text in place.value)
        found = name if setting.secret else f"{name} is {value!r}, and"
        raise ImproperlyConfigured(f"{found} should be {error}. Write, for example: {line}") from None


class _Place(enum.Enum):
    """Where a value may stand: how that is called, and the line to write there."""

    OPTION = ("The option {key!r}", '"{key}": {example}')
    ANYMAIL = ("ANYMAIL[{key!r}]", 'ANYMAIL = {{"{key}": {example}}}')
    SETTING = ("{key}", "{key} = {example}")


def _find(setting: Setting, esp_name: str | None, options: Mapping[str, Any]) -> tuple[_Place, str, Any]:
    """The nearest place where the setting stands, its name there, and its value. Every back end asks for all."""
    if setting.per_mailer:
        if setting.option in options:
            return _Place.OPTION, setting.option, options[setting.option]
        if esp_name is not None:
            key, name = _esp_names(esp_name, setting.name)
            anymail = getattr(settings, "ANYMAIL", None) or {}
            if key in anymail:
                return _Place.ANYMAIL, key, anymail[key]
            value = _setting(name)
            if value is not UNSET:
                return _Place.SETTING, name, value
    return _Place.SETTING, setting.full_name, _setting(setting.full_name)


def _setting(name: str) -> Any:
    """One of the site's settings, or UNSET.

    Read past Django's lazy object, which takes ten times as long over a name that is not there, and most of ours are
    not, at each of a site's ``send_mail()``.
    """
    if not settings.configured:
        return getattr(settings, name, UNSET)  # sets them up, or says why that is not possible
    return getattr(settings._wrapped, name, UNSET)  # type: ignore[misc]  # the plugin knows only the public names


@functools.cache
def _esp_names(esp_name: str, name: str) -> tuple[str, str]:
    """The setting's key in ``ANYMAIL``, and its name as a setting of its own."""
    key = f"{esp_prefix(esp_name)}_{name}"
    return key, f"ANYMAIL_{key}"


def esp_prefix(esp_name: str) -> str:
    """How Anymail's settings begin that are meant for one ESP: ``UNISENDER_GO`` for "Unisender Go"."""
    return esp_name.upper().replace(" ", "_")


def take_options(names: Iterable[Setting], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Pop our own options out of a back end's keywords, before Anymail and Django see them.

    :raises ImproperlyConfigured: a keyword looks like a misspelt option of ours, and Django would swallow it. (An
        unknown one among the OPTIONS in ``MAILERS`` is Django's to refuse.)
    """
    for name in own_keywords(kwargs):
        wrong = wrong_option(name)
        if wrong is not None:
            raise ImproperlyConfigured(wrong)
    return {setting.option: kwargs.pop(setting.option) for setting in names if setting.option in kwargs}


def wrong_option(name: str) -> str | None:
    """What to say of an option that looks like one of ours, and is not; None: it does not, or is."""
    known = sorted(MAILER_OPTIONS)
    if name in MAILER_OPTIONS or not difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        return None
    meant = likely(name, known, cutoff=0.8)
    hint = f"The options are: {', '.join(known)}." if meant is None else f"Did you mean {meant!r}?"
    return f"There is no option {name!r}. {hint}"


def likely(name: str, known: Collection[str], *, cutoff: float) -> str | None:
    """The one of the known names that was probably meant, if any.

    The words that differ have to be alike too: by its letters ``EMAIL_MAX_RETRIES`` is all but ``EMAIL_READ_RETRIES``,
    of all settings the one that sends mail twice.
    """
    for candidate in difflib.get_close_matches(name, known, n=3, cutoff=cutoff):
        mine, others = name.upper().split("_"), candidate.upper().split("_")
        for end in (0, -1):
            while mine and others and mine[end] == others[end]:
                del mine[end], others[end]
        enough = 0.75 if {"READ", "OTHER"} & set(others) else 0.6
        if not mine or not others or difflib.SequenceMatcher(None, "_".join(mine), "_".join(others)).ratio() >= enough:
            return candidate
    return None


def own_keywords(kwargs: Mapping[str, Any]) -> set[str]:
    """The names of the keywords that were given for this one back end object, and do not stand in ``MAILERS``.

    Django passes over those that nobody knows.
    """
    if kwargs.get("alias") is not None:
        return set(kwargs.get("_ignore_unknown_kwargs") or ())  # Django 6.1, get_connection(**kwargs)
    return set(kwargs) - {"alias", "_ignore_unknown_kwargs"}


#: Django's own, for an entry of ``MAILERS`` without BACKEND.
DEFAULT_BACKEND: Final = "django.core.mail.backends.smtp.EmailBackend"


class MailerEntry(NamedTuple):
    """One entry of ``MAILERS``."""

    #: The back end's dotted path.
    path: str
    options: Mapping[str, Any]


def mailers() -> dict[str, MailerEntry] | None:
    """``MAILERS``; None where Django does not read it, or it is not there."""
    configured = getattr(settings, "MAILERS", None) if django.VERSION >= (6, 1) else None
    if configured is None:
        return None
    return {
        alias: MailerEntry(entry.get("BACKEND", DEFAULT_BACKEND), entry.get("OPTIONS", {}))
        for alias, entry in configured.items()
    }


def email_backend() -> str:
    """``EMAIL_BACKEND``, for where there is no ``MAILERS``.

    Read past Django's lazy object: since 6.1 that warns of a deprecated setting at whoever is the first to read it,
    and its user has been warned at start.
    """
    path: str = settings._wrapped.EMAIL_BACKEND  # type: ignore[misc]  # the plugin knows only the public names
    return path


def require_app(what: str) -> None:
    """Raise ImproperlyConfigured, with the line to add, where the app that keeps the queue is not installed.

    :param what: what needs it.
    """
    if not apps.apps_ready:
        raise ImproperlyConfigured(f"{what}, but Django's apps are not loaded yet. Call first: django.setup()")
    if not apps.is_installed("anymail_retry"):
        raise ImproperlyConfigured(
            f'{what}, but the app that keeps the queue is not installed. Add to INSTALLED_APPS: "anymail_retry"'
        )


def fallback_is_on(*, esp_name: str | None = None, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a send that fails is kept in the queue: if the app is installed, and nothing says ``False``.

    Off in a script that loads no apps, where Anymail works too.

    :raises ImproperlyConfigured: ``EMAIL_FALLBACK_QUEUE = True`` without the app.
    """
    wanted = get("FALLBACK_QUEUE", esp_name=esp_name, options=options)
    if wanted is True:
        require_app("EMAIL_FALLBACK_QUEUE is True")
    return wanted is not False and apps.apps_ready and apps.is_installed("anymail_retry")
