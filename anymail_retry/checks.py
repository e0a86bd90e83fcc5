"""System checks. Their ids are stable; an id that is retired is not given again.

=======  ================================================================================================
id       what it says
=======  ================================================================================================
E001     a setting has a wrong type or value
W002     a setting or an option looks like one of ours, and is not
W003     ``ANYMAIL`` holds one of our settings in a way that is not read there
W004     ``EMAIL_RETRY_DEADLINE`` is so long that a web worker is killed before the row is written
W005     ``ATOMIC_REQUESTS`` without ``EMAIL_QUEUE_DATABASE``: a view that fails takes the queued mail with it
E006     ``EMAIL_QUEUE_DATABASE`` is no alias in ``DATABASES``
E007     ``EMAIL_QUEUE_DATABASE`` is another alias to the same SQLite file
E008     a wrapping back end wraps itself, or nothing
W009     SQLite without WAL and IMMEDIATE
W010     read retries without idempotency keys: duplicates
W011     nothing that sends mail here uses the queue
E012     ``EMAIL_QUEUE_SEND_MAX`` does not fit into ``EMAIL_QUEUE_LEASE``
E013     ``EMAIL_QUEUE_ENCRYPTION_KEYS`` without the package ``cryptography``
E014     ``EMAIL_FALLBACK_QUEUE = True``, and a back end that retries but keeps nothing
E015     the path of a back end of ours cannot be imported
W016     settings of django-mailer's, which is not installed
W017     django-mailer's ``send_mail`` and ``runmailer`` stand before ours
=======  ================================================================================================
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from django.apps import AppConfig, apps
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.utils.module_loading import import_string

from . import conf
from .backends import BACKENDS
from .mailqueue import encryption
from .mailqueue.fallback import FallbackQueueMixin
from .mailqueue.wrapping import WrappingBackend
from .verdict import EspFacts

#: A name like one of these means one of ours, however it goes on.
_FAMILIES = (
    *(re.compile(f"EMAIL_{family}_") for family in ("QUEUE", "FALLBACK", "BREAKER", "RETRY", "CONNECTION")),
    re.compile(r"EMAIL_([A-Z\d_]+_)?RETR(Y|IES|YABLE)$"),
)

#: Retries of what the ESP may have taken.
_RISKY = ("READ_RETRIES", "OTHER_RETRIES")

#: Back ends of Django's that send nothing: the machine of a developer, or a test run, is not a site without mail.
_SEND_NOTHING = tuple(f"django.core.mail.backends.{name}." for name in ("console", "dummy", "filebased", "locmem"))

#: A worker of gunicorn is killed after this many seconds, by its default.
_WEB_WORKER_TIMEOUT = 30.0

_FULL_NAMES = {setting.full_name: setting for setting in conf.SETTINGS.values()}

#: How Anymail's settings begin that are meant for one ESP.
_ESPS = frozenset(module.upper() for module in BACKENDS.values())

_OURS = "anymail_retry.backends"

#: Every path of a back end of ours.
_PATHS = (
    *(f"{_OURS}.{name}" for name in BACKENDS),
    *(f"{_OURS}.{module}.EmailBackend" for module in (*BACKENDS.values(), "fallback", "queued")),
)

#: django-mailer's settings, and what has their effect here.
DJANGO_MAILER = {
    "MAILER_EMAIL_BACKEND": 'EMAIL_QUEUE_BACKEND, or "using" in MAILERS',
    "MAILER_EMAIL_LOG_MESSAGE_DATA": "EMAIL_QUEUE_KEEP_CONTENT",
    "MAILER_EMAIL_MAX_BATCH": "manage.py send_mail --limit N",
    "MAILER_EMAIL_MAX_DEFERRED": "nothing: a mailer that fails pauses by itself",
    "MAILER_EMAIL_MAX_RETRIES": "EMAIL_QUEUE_MAX_ATTEMPTS and EMAIL_QUEUE_MAX_AGE",
    "MAILER_EMAIL_THROTTLE": "EMAIL_QUEUE_RATE, in messages per second",
    "MAILER_EMPTY_QUEUE_SLEEP": "EMAIL_QUEUE_POLL",
    "MAILER_ERROR_HANDLER": "the signals in anymail_retry.signals",
    "MAILER_LOCK_PATH": "nothing: workers share the queue by the database",
    "MAILER_LOCK_WAIT_TIMEOUT": "nothing",
    "MAILER_MESSAGES_BATCH_SIZE": "nothing",
    "MAILER_PAUSE_SEND": "nothing: stop the workers",
    "MAILER_USE_FILE_LOCK": "nothing",
}


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
            *_keeps_nothing(mailers),
            *_imports(mailers),
            *_django_mailer(),
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
    #: Whether it stands behind one that wraps it.
    is_behind: bool = False

    @property
    def esp_name(self) -> str | None:
        name = getattr(self.backend, "esp_name", None)
        return name if isinstance(name, str) else None

    @property
    def retries(self) -> bool:
        """Whether it is one that tries again by our settings."""
        return self.backend is not None and issubclass(self.backend, EspFacts)

    @property
    def wrapper(self) -> type[WrappingBackend] | None:
        """Its class, if it is one that stands before another."""
        return self.backend if self.backend is not None and issubclass(self.backend, WrappingBackend) else None

    @property
    def queues(self) -> bool:
        """Whether it is one that can keep a message in the queue."""
        return self.backend is not None and issubclass(self.backend, (FallbackQueueMixin, WrappingBackend))

    @property
    def settings(self) -> tuple[conf.Setting, ...]:
        """Those that may stand in its OPTIONS."""
        if self.wrapper is not None:
            return self.wrapper.own_settings
        return (*(conf.TRANSPORT_SETTINGS if self.retries else ()), *(conf.MAILER_SETTINGS if self.queues else ()))

    @property
    def ready_made(self) -> str | None:
        """The path of our own back end for its ESP, if there is one."""
        for base in self.backend.__mro__ if self.backend is not None else ():
            package, _, module = base.__module__.rpartition(".")
            if package == "anymail.backends" and module in BACKENDS.values():
                return f"{_OURS}.{module}.EmailBackend"
        return None

    @property
    def remedy(self) -> str:
        """What to write where it retries, and is to keep in the queue as well."""
        if self.ready_made is None:
            return f'Put "{_OURS}.fallback.EmailBackend" before it'
        name = self.backend.__name__ if self.backend is not None else "EmailBackend"
        return f"Derive from the ready-made back end: class {name}({self.ready_made})"

    def get(self, name: str) -> Any:
        return conf.get(name, esp_name=self.esp_name, options=self.options)


def _configured() -> Iterator[_Mailer]:
    configured = conf.mailers()
    if configured is None:
        path = conf.email_backend()
        mailer = _Mailer("EMAIL_BACKEND", None, path, _class(path), {})
        yield mailer
        if mailer.wrapper is not None:
            where = conf.SETTINGS[mailer.wrapper.setting].full_name
            path = str(getattr(settings, where, ""))
            behind = _Mailer(where, None, path, _class(path), {}, is_behind=True)
            if behind.backend is not None and behind.wrapper is None:  # else the wrapper's own check says so
                yield behind
        return
    mailers = []
    for alias, entry in configured.items():
        mailers.append(_Mailer(f"MAILERS[{alias!r}]", alias, entry.path, _class(entry.path), entry.options))
    aliases_behind = {mailer.options.get("using") for mailer in mailers if mailer.wrapper is not None}
    yield from (mailer._replace(is_behind=mailer.alias in aliases_behind) for mailer in mailers)


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
    # dir(), not getattr(): reading one of Django's deprecated EMAIL_* names is a warning.
    names = dir(settings)
    for name in names:
        if name not in _FULL_NAMES and name.startswith(("EMAIL_", "MAILER_")):
            hint = _hint(name, lambda setting: setting.full_name)
            if hint is not None:
                yield checks.Warning(
                    f"{name} is no setting of anymail_retry's, which does not read it.",
                    hint=hint,
                    id="anymail_retry.W002",
                )
    yield from _option_names(mailers)
    yield from _anymail_names(mailers, names)


def _hint(name: str, write: Callable[[conf.Setting], str]) -> str | None:
    """What to say of a name that looks like one of ours, and is not; None: it does not.

    :param write: how a setting is written in the place in question.
    """
    meant = conf.likely(name, _FULL_NAMES, cutoff=0.85)
    if meant is not None:
        return f"Did you mean {write(_FULL_NAMES[meant])}?"
    for family in _FAMILIES:
        if family.match(name):
            # Whoever looks for some number of retries must not be led to the ones that repeat mail.
            kind = [
                write(setting)
                for full_name, setting in _FULL_NAMES.items()
                if family.match(full_name)
                and (setting.name not in _RISKY or setting.name.partition("_")[0] in name.split("_"))
            ]
            return f"The settings of this kind are: {', '.join(kind)}."
    return None


def _option_names(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    """Django refuses such a mailer too, but when mail is sent."""
    for mailer in mailers:
        if not mailer.retries and mailer.wrapper is None:
            continue
        own = {setting.option for setting in mailer.settings}
        for name in mailer.options:
            if name not in own and name in conf.MAILER_OPTIONS:
                remedy = mailer.remedy if mailer.wrapper is None else "It is one of back ends that retry"
                yield checks.Warning(
                    f"{mailer.where}: {mailer.path} has no option {name!r}.",
                    hint=f"{remedy}. For all mailers, write: EMAIL_{name.upper()} = ...",
                    id="anymail_retry.W002",
                )
            wrong = conf.wrong_option(name)
            if wrong is not None:
                text, _, hint = wrong.partition(". ")
                yield checks.Warning(f"{mailer.where}: {text}.", hint=hint, id="anymail_retry.W002")


def _anymail_names(mailers: Iterable[_Mailer], names: Iterable[str]) -> Iterator[checks.CheckMessage]:
    used = {conf.esp_prefix(mailer.esp_name) for mailer in mailers if mailer.retries and mailer.esp_name}
    esps = sorted(_ESPS | used)
    example = min(used, default="MANDRILL")

    for where, key in _anymail_keys(names):
        esp, name = _split(key.upper(), esps)
        setting = conf.SETTINGS.get(name)

        def write(meant: conf.Setting, esp: str = esp) -> str:
            return f"{esp or example}_{meant.name}" if meant.per_mailer else meant.full_name

        if setting is None:
            hint = _hint(f"EMAIL_{name}", write) if esp or conf.likely(name, conf.SETTINGS, cutoff=0.85) else None
            if hint is not None:
                yield checks.Warning(
                    f"{where} is no setting of anymail_retry's, which does not read it.",
                    hint=hint,
                    id="anymail_retry.W002",
                )
        elif not setting.per_mailer:
            yield checks.Warning(
                f"{where} is not read: it is a setting of the queue as a whole.",
                hint=f"Write: {setting.full_name} = ...",
                id="anymail_retry.W003",
            )
        elif esp in ("", "EMAIL"):
            yield checks.Warning(
                f"{where} is not read: Anymail's own reader wants the name of an ESP in front.",
                hint=f'Write ANYMAIL = {{"{example}_{name}": ...}} for one ESP, or EMAIL_{name} = ... for all.',
                id="anymail_retry.W003",
            )
        elif esp not in esps:
            meant = difflib.get_close_matches(esp, esps, n=1)
            yield checks.Warning(
                f"{where} is not read: no back end's settings begin with {esp}.",
                hint=f"Did you mean {meant[0]}_{name}?" if meant else f"They begin with: {', '.join(esps)}.",
                id="anymail_retry.W002",
            )
        elif key != key.upper():
            yield checks.Warning(
                f"{where} is not read: such names are in capitals.",
                hint=f"Did you mean {key.upper()}?",
                id="anymail_retry.W002",
            )


def _split(key: str, esps: Iterable[str]) -> tuple[str, str]:
    """A key of Anymail's settings as the prefix of an ESP and a name, of which one or the other may be none."""
    for name in conf.SETTINGS:
        if key == name or key.endswith(f"_{name}"):
            return key.removesuffix(name).removesuffix("_"), name
    for esp in esps:
        if key.startswith(f"{esp}_"):
            return esp, key.removeprefix(f"{esp}_")
    return "", key


def _anymail_keys(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Anymail's settings in both of its forms: where each stands, and its name there."""
    for key in getattr(settings, "ANYMAIL", None) or {}:
        yield f"ANYMAIL[{key!r}]", str(key)
    for name in names:
        if name.startswith("ANYMAIL_"):
            yield name, name.removeprefix("ANYMAIL_")


def _deadline(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    for mailer in mailers:
        if not mailer.retries or not mailer.queues:
            continue
        if not conf.fallback_is_on(esp_name=mailer.esp_name, options=mailer.options):
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
        if mailer.wrapper is not None:
            yield from mailer.wrapper.check_mailer(mailer.where, mailer.alias, mailer.options)


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
        ready_made = _class(mailer.ready_made) if mailer.ready_made is not None else None
        why, remedy = f"{mailer.esp_name} has no idempotency keys", ""
        if ready_made is None:
            why += " that are known here"
        elif getattr(ready_made, "idempotency", None) is not None:
            why = f"{mailer.path} uses no idempotency keys, though {mailer.esp_name} has them"
            remedy = f"{mailer.remedy}. "
        for name in _RISKY:
            # Whoever sets no limit for "other" has the total's, and so has urllib3's "read" of None.
            if _means_some(mailer.get(name)):
                prefix = conf.esp_prefix(mailer.esp_name or "")
                yield checks.Warning(
                    f"{mailer.where}: EMAIL_{name} has requests repeated whose answer did not come, and"
                    f" {why}: a message that was taken is sent twice.",
                    hint=f'{remedy}Unless you prefer duplicates to delays, write: ANYMAIL = {{"{prefix}_{name}": 0}}',
                    id="anymail_retry.W010",
                )


def _unused(mailers: Sequence[_Mailer]) -> Iterator[checks.CheckMessage]:
    if conf.get("MAILER_FOR_CRASH_EMAILS") or any(
        mailer.queues or mailer.path.startswith((*_SEND_NOTHING, "anymail_retry.")) for mailer in mailers
    ):
        return
    retrying = [mailer for mailer in mailers if mailer.retries]
    if not retrying:
        yield checks.Warning(
            "anymail_retry is installed, and no mail goes through it.",
            hint=(
                "Name one of its back ends in EMAIL_BACKEND or MAILERS, such as"
                f' "{_OURS}.RetryableMandrillEmailBackend", or silence this check if you only call'
                " anymail_retry.send_mail()."
            ),
            id="anymail_retry.W011",
        )
    elif isinstance(conf.get("FALLBACK_QUEUE"), conf.Unset):  # False: that is wanted; True: an error of its own
        for mailer in retrying:
            yield checks.Warning(
                f"{mailer.where}: anymail_retry is installed, and {mailer.path} retries but keeps nothing in the"
                " queue: what still fails is raised.",
                hint=f"{mailer.remedy}. If retries are all that you want, write: EMAIL_FALLBACK_QUEUE = False",
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


def _keeps_nothing(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    if conf.get("FALLBACK_QUEUE") is not True:
        return
    for mailer in mailers:
        if mailer.retries and not mailer.queues and not mailer.is_behind:
            yield checks.Error(
                f"{mailer.where}: EMAIL_FALLBACK_QUEUE is True, and {mailer.path} retries but cannot keep anything in"
                " the queue.",
                hint=mailer.remedy,
                id="anymail_retry.E014",
            )


def _imports(mailers: Iterable[_Mailer]) -> Iterator[checks.CheckMessage]:
    for mailer in mailers:
        if mailer.backend is not None or not mailer.path.startswith("anymail_retry."):
            continue
        try:
            import_string(mailer.path)
        except ImportError as error:
            why = str(error)
        else:
            why = "it is no class"
        meant = [] if mailer.path in _PATHS else difflib.get_close_matches(mailer.path, _PATHS, n=1)
        yield checks.Error(
            f"{mailer.where} names {mailer.path!r}, which cannot be imported as a back end: {why}",
            hint=f"Did you mean {meant[0]}?" if meant else None,
            id="anymail_retry.E015",
        )


def _django_mailer() -> Iterator[checks.CheckMessage]:
    if not apps.is_installed("mailer"):
        left = [name for name in DJANGO_MAILER if name in dir(settings)]
        if left:
            yield checks.Warning(
                f"django-mailer's settings have no effect here: {', '.join(left)}.",
                hint=f"Write instead of {'; of '.join(f'{name}: {DJANGO_MAILER[name]}' for name in left)}.",
                id="anymail_retry.W016",
            )
        return
    installed = [config.name for config in apps.get_app_configs()]
    if "anymail_retry" in installed[installed.index("mailer") :]:
        yield checks.Warning(
            "manage.py send_mail, runmailer, retry_deferred and purge_mail_log are django-mailer's: Django takes a"
            " command from the app that stands first in INSTALLED_APPS.",
            hint='Write in INSTALLED_APPS: "anymail_retry" before "mailer"',
            id="anymail_retry.W017",
        )
