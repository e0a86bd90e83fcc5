"""System checks. Their ids are stable; an id that is retired is not given again.

=======  ================================================================================================
id       what it says
=======  ================================================================================================
E001     a setting has a wrong type or value
W002     a setting looks like one of ours, and is not
W003     ``ANYMAIL`` holds one of our settings without the name of an ESP, where nobody reads it
W004     ``EMAIL_RETRY_DEADLINE`` is so long that a web worker is killed before the row is written
W005     ``ATOMIC_REQUESTS`` without ``EMAIL_QUEUE_DATABASE``: a view that fails takes the queued mail with it
E006     ``EMAIL_QUEUE_DATABASE`` is no alias in ``DATABASES``
E007     ``EMAIL_QUEUE_DATABASE`` is another alias to the same SQLite file
E008     a wrapping back end wraps itself, or nothing
W009     SQLite without WAL and IMMEDIATE
W010     read retries for an ESP without idempotency keys: duplicates
W011     nothing that sends mail here uses this app
E012     ``EMAIL_QUEUE_SEND_MAX`` does not fit into ``EMAIL_QUEUE_LEASE``
E013     ``EMAIL_QUEUE_ENCRYPTION_KEYS`` without the package ``cryptography``
=======  ================================================================================================
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from django.apps import AppConfig
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.utils.module_loading import import_string

from . import conf
from .mailqueue import encryption
from .mailqueue.mailers import DEFAULT_BACKEND
from .mailqueue.wrapping import WrappingBackend
from .verdict import EspFacts

#: What begins like this means one of ours, however it goes on.
_OUR_FAMILIES = re.compile(r"EMAIL_(QUEUE_|FALLBACK_|BREAKER_|RETRY_|CONNECTION_|[A-Z_]+_RETR(Y|IES|YABLE)$)")

#: Back ends of Django's that send nothing: the machine of a developer, or a test run, is not a site without mail.
_SEND_NOTHING = tuple(f"django.core.mail.backends.{name}." for name in ("console", "dummy", "filebased", "locmem"))

#: A worker of gunicorn is killed after this many seconds, by its default.
_WEB_WORKER_TIMEOUT = 30.0


def check_settings(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[checks.CheckMessage]:
    """All checks, in the order of their ids."""
    mailers = list(_configured())
    found: list[checks.CheckMessage] = [*_values(mailers), *_names(mailers)]
    if not any(isinstance(message, checks.Error) for message in found):
        found += [
            *_deadline(mailers),
            *_atomic_requests(),
            *_database(),
            *_wrapping(mailers),
            *_sqlite(),
            *_duplicates(mailers),
            *_unused(mailers),
            *_lease(),
            *_encryption(),
        ]
    return found


class _Mailer(NamedTuple):
    """One back end that this site names."""

    #: Where it is named: ``MAILERS['default']`` or ``EMAIL_BACKEND``.
    where: str
    alias: str | None
    path: str
    #: None: it cannot be imported, which Django says itself, and better.
    backend: type | None
    options: Mapping[str, Any]

    @property
    def esp_name(self) -> str | None:
        name = getattr(self.backend, "esp_name", None)
        return name if isinstance(name, str) else None

    @property
    def retries(self) -> bool:
        """Whether it is one that tries again by our settings."""
        return self.backend is not None and issubclass(self.backend, EspFacts)

    @property
    def settings(self) -> tuple[conf.Setting, ...]:
        """Those that may stand in its OPTIONS."""
        if self.retries:
            return (*conf.TRANSPORT_SETTINGS, *conf.MAILER_SETTINGS)
        if self.backend is not None and issubclass(self.backend, WrappingBackend):
            return self.backend.own_settings
        return ()

    def get(self, name: str) -> Any:
        return conf.get(name, esp_name=self.esp_name, options=self.options)


def _configured() -> Iterator[_Mailer]:
    mailers = conf.mailers()
    if mailers is None:
        path = conf.email_backend()
        yield _Mailer("EMAIL_BACKEND", None, path, _class(path), {})
        return
    for alias, mailer in mailers.items():
        path = mailer.get("BACKEND", DEFAULT_BACKEND)
        yield _Mailer(f"MAILERS[{alias!r}]", alias, path, _class(path), mailer.get("OPTIONS", {}))


def _class(path: str) -> type | None:
    try:
        backend = import_string(path)
    except ImportError:
        return None
    return backend if isinstance(backend, type) else None


def _values(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    said = set()
    for name in conf.SETTINGS:
        try:
            conf.get(name)
        except ImproperlyConfigured as error:
            said.add(str(error))
            yield checks.Error(str(error), id="anymail_retry.E001")
    for mailer in mailers:
        for setting in mailer.settings:
            try:
                mailer.get(setting.name)
            except ImproperlyConfigured as error:
                text = f"{mailer.where}: {error}" if setting.option in mailer.options else str(error)
                if text not in said:  # what is said for all of them is said once
                    said.add(text)
                    yield checks.Error(text, id="anymail_retry.E001")


def _names(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    ours = sorted(setting.full_name for setting in conf.SETTINGS.values())
    # dir(), not getattr(): reading one of Django's deprecated EMAIL_* names is a warning.
    names = dir(settings)
    for name in names:
        if name in ours or not name.startswith(("EMAIL_", "MAILER_")):
            continue
        meant = difflib.get_close_matches(name, ours, n=1, cutoff=0.85)
        if meant or _OUR_FAMILIES.match(name):
            yield checks.Warning(
                f"{name} is no setting of anymail_retry's, and nothing reads it.",
                hint=_hint(meant or difflib.get_close_matches(name, ours, n=1), ours),
                id="anymail_retry.W002",
            )
    per_mailer = sorted(setting.name for setting in conf.SETTINGS.values() if setting.per_mailer)
    esps = sorted({conf.esp_prefix(mailer.esp_name) for mailer in mailers if mailer.retries and mailer.esp_name})
    for where, key in _anymail_keys(names):
        if key in per_mailer:
            yield checks.Warning(
                f"{where} is not read: Anymail's own reader wants the name of an ESP in front.",
                hint=f'Write ANYMAIL = {{"{esps[0] if esps else "MANDRILL"}_{key}": ...}} for one ESP,'
                f" or EMAIL_{key} = ... for all.",
                id="anymail_retry.W003",
            )
        for esp in esps:
            name = key.removeprefix(f"{esp}_")
            meant = difflib.get_close_matches(name, per_mailer, n=1, cutoff=0.85)
            if name not in (key, *per_mailer) and meant:
                yield checks.Warning(
                    f"{where} is no setting of anymail_retry's, and nothing reads it.",
                    hint=f"Did you mean {esp}_{meant[0]}?",
                    id="anymail_retry.W002",
                )


def _hint(meant: Sequence[str], ours: Sequence[str]) -> str:
    return f"Did you mean {meant[0]}?" if meant else f"The settings are: {', '.join(ours)}."


def _anymail_keys(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Anymail's settings in both of its forms: where each stands, and its name there."""
    for key in getattr(settings, "ANYMAIL", None) or {}:
        yield f"ANYMAIL[{key!r}]", str(key)
    for name in names:
        if name.startswith("ANYMAIL_"):
            yield name, name.removeprefix("ANYMAIL_")


def _deadline(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    for mailer in mailers:
        if not mailer.retries or not conf.fallback_is_on(esp_name=mailer.esp_name, options=mailer.options):
            continue
        deadline, reads = mailer.get("RETRY_DEADLINE"), mailer.get("READ_RETRIES")
        if isinstance(deadline, conf.Unset):
            if not _means_some(reads):
                continue
            lasts = "has no EMAIL_RETRY_DEADLINE, because EMAIL_READ_RETRIES is set"
        elif deadline is None:
            lasts = "has no EMAIL_RETRY_DEADLINE"
        elif deadline < _WEB_WORKER_TIMEOUT:
            continue
        else:
            lasts = f"may last {deadline:g} seconds by EMAIL_RETRY_DEADLINE"
        yield checks.Warning(
            f"{mailer.where}: a send {lasts}. A web server that kills its worker after {_WEB_WORKER_TIMEOUT:g} seconds"
            " does so before a failing message is queued.",
            hint="Write: EMAIL_RETRY_DEADLINE = 25",
            id="anymail_retry.W004",
        )


def _means_some(retries: int | conf.Unset | None) -> bool:
    """Whether a number of retries that the user set is more than none; None is as many as there are in all."""
    return not isinstance(retries, conf.Unset) and (retries is None or retries > 0)


def _queue_database() -> tuple[str, Mapping[str, Any]]:
    alias = conf.get("QUEUE_DATABASE") or DEFAULT_DB_ALIAS
    return alias, settings.DATABASES.get(alias, {})


def _atomic_requests() -> Iterator[checks.CheckMessage]:
    alias, database = _queue_database()
    if conf.fallback_is_on() and database.get("ATOMIC_REQUESTS"):
        if _is_sqlite(database):
            remedy = "add an alias to DATABASES for an SQLite file of the queue's own"
        else:
            remedy = "add an alias to DATABASES for a second connection to the same server, without ATOMIC_REQUESTS"
        yield checks.Warning(
            f"DATABASES[{alias!r}] has ATOMIC_REQUESTS: a message that was queued in a view is rolled back if the view"
            " fails later.",
            hint=f'If the mail must survive, {remedy}, and write: EMAIL_QUEUE_DATABASE = "<that alias>"',
            id="anymail_retry.W005",
        )


def _database() -> Iterator[checks.CheckMessage]:
    alias, mine = _queue_database()
    if alias not in settings.DATABASES:
        yield checks.Error(
            f"EMAIL_QUEUE_DATABASE is {alias!r}, which is no alias in DATABASES.",
            hint=f"The aliases are: {', '.join(sorted(settings.DATABASES))}.",
            id="anymail_retry.E006",
        )
        return
    if conf.get("QUEUE_DATABASE") is None or not _is_file(mine):
        return
    for other, database in settings.DATABASES.items():
        if other != alias and _is_sqlite(database) and str(mine["NAME"]) == str(database.get("NAME")):
            yield checks.Error(
                f"EMAIL_QUEUE_DATABASE is {alias!r}, the same SQLite file as {other!r}: queueing inside a transaction"
                " would wait for itself.",
                hint=f'Write: EMAIL_QUEUE_DATABASE = "{DEFAULT_DB_ALIAS}", or give the queue a file of its own.',
                id="anymail_retry.E007",
            )
            return


def _is_sqlite(database: Mapping[str, Any]) -> bool:
    return "sqlite" in str(database.get("ENGINE", ""))


def _is_file(database: Mapping[str, Any]) -> bool:
    """Whether it is an SQLite database that several connections can share."""
    name = str(database.get("NAME") or "")
    return _is_sqlite(database) and name not in ("", ":memory:") and "mode=memory" not in name


def _wrapping(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    for mailer in mailers:
        if mailer.backend is not None and issubclass(mailer.backend, WrappingBackend):
            yield from mailer.backend.check_mailer(mailer.where, mailer.alias, mailer.options)


def _sqlite() -> Iterator[checks.CheckMessage]:
    _, database = _queue_database()
    if not _is_file(database):
        return
    options = database.get("OPTIONS", {})
    immediate = str(options.get("transaction_mode", "")).upper() == "IMMEDIATE"
    if not immediate or "wal" not in str(options.get("init_command", "")).lower():
        yield checks.Warning(
            "SQLite locks readers out while it writes, unless it keeps a write-ahead log.",
            hint=(
                'Write in DATABASES: "OPTIONS": {"transaction_mode": "IMMEDIATE",'
                ' "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"}'
            ),
            id="anymail_retry.W009",
        )


def _duplicates(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    for mailer in mailers:
        backend = mailer.backend
        if backend is None or not issubclass(backend, EspFacts) or backend.idempotency is not None:
            continue
        for name in ("READ_RETRIES", "OTHER_RETRIES"):
            # Whoever sets no limit for "other" has the total's, and so has urllib3's "read" of None.
            if _means_some(mailer.get(name)):
                prefix = conf.esp_prefix(mailer.esp_name or "")
                yield checks.Warning(
                    f"{mailer.where}: EMAIL_{name} has requests repeated whose answer did not come, and"
                    f" {mailer.esp_name} has no idempotency keys: a message that was taken is sent twice.",
                    hint=f'Unless you prefer duplicates to delays, write: ANYMAIL = {{"{prefix}_{name}": 0}}',
                    id="anymail_retry.W010",
                )


def _unused(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    if conf.get("MAILER_FOR_CRASH_EMAILS") or any(
        mailer.retries
        or (mailer.backend is not None and issubclass(mailer.backend, WrappingBackend))
        or mailer.path.startswith(_SEND_NOTHING)
        for mailer in mailers
    ):
        return
    yield checks.Warning(
        "anymail_retry is installed, and no mail goes through it.",
        hint=(
            "Name one of its back ends in EMAIL_BACKEND or MAILERS, such as"
            ' "anymail_retry.backends.RetryableMandrillEmailBackend", or silence this check if you only call'
            " anymail_retry.send_mail()."
        ),
        id="anymail_retry.W011",
    )


def _lease() -> Iterator[checks.CheckMessage]:
    lease, send_max = conf.get("QUEUE_LEASE"), conf.get("QUEUE_SEND_MAX")
    if send_max >= lease:
        yield checks.Error(
            f"EMAIL_QUEUE_SEND_MAX ({send_max:g} s) does not fit into EMAIL_QUEUE_LEASE ({lease:g} s): another worker"
            " could take over a message that is still being sent.",
            hint=f"Write: EMAIL_QUEUE_LEASE = {send_max * 2:g}",
            id="anymail_retry.E012",
        )


def _encryption() -> Iterator[checks.CheckMessage]:
    try:
        encryption.cipher()
    except ImproperlyConfigured as error:
        yield checks.Error(str(error), id="anymail_retry.E013")
