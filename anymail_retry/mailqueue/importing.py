"""Rows in from another queue: the pending mail of an installed django-mailer or django-post_office.

A message is taken over in one transaction: our row is inserted, theirs is deleted. So it is in one of the two queues
at any time, whatever is killed, and both have to be in one database. A row is locked before it is read; where the
database cannot lock rows (SQLite), and with post_office, whose workers do not lock theirs, the other queue's own file
lock is held besides.

What cannot be taken over stays where it is, untouched, and is named by its id and the reason; never by its content.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parseaddr
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from django.apps import apps
from django.conf import settings
from django.core.exceptions import FieldDoesNotExist, ImproperlyConfigured
from django.db import DatabaseError, InterfaceError, OperationalError, connections, router, transaction
from django.db.models import F, Prefetch, QuerySet, prefetch_related_objects
from django.utils import timezone

from .. import conf
from ..exceptions import MessageNotQueueable
from .database import own_transaction, queue_database
from .enqueue import enqueue
from .fallback import discreet
from .functions import default_mailer
from .mailers import MailerGone, find
from .states import Priority

if TYPE_CHECKING:
    from django.core.mail import EmailMessage

#: Rows taken over in one transaction: others wait for it at most (SQLite).
BATCH = 100

#: Modules of back ends that store: what is imported must not come back.
STORING = frozenset({"mailer.backend", "post_office.backends"})


class CannotImport(Exception):
    """Nothing was taken over. The text says what to do."""


class Left(Exception):
    """This row stays where it is. The text is the reason, without any content."""


@dataclass(frozen=True)
class Pending:
    """A message of another queue, as ours would have been given it.

    :param left_out: how many recipients were taken off, because they stand on the other queue's don't-send list.
    """

    message: EmailMessage
    mailer: str
    priority: Priority
    created_at: datetime
    not_before: datetime | None = None
    expires_at: datetime | None = None
    left_out: int = 0


@dataclass
class Report:
    """What became of one queue's mail.

    :param taken: messages that are ours now; in a dry run: that would be.
    :param left: ids of those that stay where they are, and why.
    :param left_out: ids of those that were taken without some of their recipients, and how many those are.
    """

    taken: int = 0
    left: dict[int, str] = field(default_factory=dict)
    left_out: dict[int, int] = field(default_factory=dict)


class Source(ABC):
    """Another queue.

    :param mailer: the name of our mailer that is to send all of its mail; None: the queue's own settings decide.
    :raises CannotImport: it is not installed, not one that is known here, or without its tables.
    """

    app: ClassVar[str]
    package: ClassVar[str]
    model: ClassVar[str]
    oldest: ClassVar[tuple[int, int]]
    fields: ClassVar[frozenset[str]]

    def __init__(self, mailer: str | None = None) -> None:
        if not apps.is_installed(self.app):
            raise CannotImport(
                f"{self.package} is not installed here. Add to INSTALLED_APPS, until its mail is taken over:"
                f' "{self.app}"'
            )
        self._check_version()
        self.rows: Any = apps.get_model(self.app, self.model)
        try:
            for name in self.fields:
                self.rows._meta.get_field(name)
        except FieldDoesNotExist as error:
            raise CannotImport(f"This {self.package} is not one that is known here: {error}") from error
        self.alias = router.db_for_write(self.rows)
        if self.rows._meta.db_table not in connections[self.alias].introspection.table_names():
            raise CannotImport(f"The tables of {self.package} are missing in the database {self.alias!r}.")
        ours = queue_database()
        if not is_same_database(self.alias, ours):
            raise CannotImport(
                f"The mail of {self.package} is in the database {self.alias!r} and our queue in {ours!r}: no"
                " transaction spans both, so a message could be lost or sent twice. Let EMAIL_QUEUE_DATABASE"
                f" (or the router) name {self.alias!r} until that mail is sent."
            )
        self.mailer = None if mailer is None else target(mailer)

    def _check_version(self) -> None:
        version = self.version()
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers < self.oldest:
            oldest = ".".join(map(str, self.oldest))
            raise CannotImport(
                f'The app "{self.app}" is {self.package} {version or "of an unknown version"};'
                f" {oldest} or later can be taken over. Upgrade it first, and run its migrations."
            )

    @abstractmethod
    def version(self) -> str:
        """Of the package; empty: it does not say."""

    @abstractmethod
    def pending(self) -> QuerySet[Any]:
        """The rows that wait to be sent."""

    @abstractmethod
    def read(self, row: Any) -> Pending:
        """The message of a row.

        :raises Left: it should not be taken.
        """

    def lock(self) -> AbstractContextManager[None]:
        """Keeps the queue's own workers on this host from sending, where a locked row does not."""
        return nullcontext()


class DjangoMailer(Source):
    """django-mailer, by its own model, which decodes the pickled messages."""

    app = "mailer"
    package = "django-mailer"
    model = "Message"
    oldest = (2, 3)
    fields = frozenset({"message_data", "when_added", "priority", "retry_count"})

    DEFERRED = 4

    def __init__(self, mailer: str | None = None) -> None:
        super().__init__(mailer)
        self.mailer = self.mailer or target(None)
        entries: Any = apps.get_model(self.app, "DontSendEntry")
        addresses = entries.objects.using(self.alias).values_list("to_address", flat=True)
        self.unwanted = {str(address).casefold() for address in addresses}

    def version(self) -> str:
        return str(getattr(import_module("mailer"), "__version__", ""))

    def pending(self) -> QuerySet[Any]:
        return self.rows.objects.using(self.alias).all()  # type: ignore[no-any-return]  # the model is not typed

    def read(self, row: Any) -> Pending:
        limit = getattr(settings, "MAILER_EMAIL_MAX_RETRIES", None)
        deferred = row.priority == self.DEFERRED
        if deferred and limit is not None and row.retry_count >= limit:
            raise Left("given up: out of retries (MAILER_EMAIL_MAX_RETRIES)")
        message = row.email
        if message is None:
            raise Left("cannot be decoded")
        left_out = self._leave_out_unwanted(message)
        # What it was before it was deferred nobody knows; its own retry_deferred makes it medium too.
        priority = Priority.MEDIUM if deferred else Priority(row.priority)
        assert self.mailer is not None
        return Pending(message, self.mailer, priority, row.when_added, left_out=left_out)

    def _leave_out_unwanted(self, message: EmailMessage) -> int:
        before = len(message.recipients())
        if not self.unwanted:
            return 0
        for name in ("to", "cc", "bcc"):
            wanted = [address for address in getattr(message, name) if not self._is_unwanted(str(address))]
            setattr(message, name, wanted)
        left_out = before - len(message.recipients())
        if left_out and left_out == before:
            raise Left("all of its recipients are on the don't-send list")
        return left_out

    def _is_unwanted(self, address: str) -> bool:
        _, plain = parseaddr(address)
        return address.casefold() in self.unwanted or plain.casefold() in self.unwanted

    @contextmanager
    def lock(self) -> Iterator[None]:
        # Elsewhere its workers lock the row that they send, or fail to and pass it over.
        locks_rows = connections[self.alias].features.has_select_for_update
        if locks_rows or not getattr(settings, "MAILER_USE_FILE_LOCK", True):
            yield
            return
        engine = import_module("mailer.engine")
        acquired, lock = engine.acquire_lock()
        if not acquired:
            raise CannotImport(
                "django-mailer's lock file is there: its send_mail (or another import) is running. If none is, it was"
                f" left behind by one that died: delete {lock.lock_file}"
            )
        try:
            yield
        finally:
            engine.release_lock(lock)


class PostOffice(Source):
    """django-post_office: what is queued, requeued or scheduled. Its own model renders templates."""

    app = "post_office"
    package = "django-post_office"
    model = "Email"
    oldest = (3, 12)
    fields = frozenset(
        {"status", "priority", "created", "scheduled_time", "expires_at", "backend_alias", "attachments"}
    )

    #: Its queued and requeued.
    PENDING = (2, 3)
    #: Its low, medium, high and now.
    PRIORITIES: ClassVar = {0: Priority.LOW, 1: Priority.MEDIUM, 2: Priority.HIGH, 3: Priority.HIGH}

    def __init__(self, mailer: str | None = None) -> None:
        super().__init__(mailer)
        self._targets: dict[str, str] = {}

    def version(self) -> str:
        return str(getattr(import_module("post_office"), "VERSION_STRING", ""))

    def pending(self) -> QuerySet[Any]:
        return self.rows.objects.using(self.alias).filter(status__in=self.PENDING)  # type: ignore[no-any-return]  # not typed

    def read(self, row: Any) -> Pending:
        if row.expires_at is not None and row.expires_at <= timezone.now():
            raise Left("expired")
        for name in ("attachments", "template"):  # which post_office would ask a router for: of a replica, and late
            related: Any = self.rows._meta.get_field(name).related_model
            prefetch_related_objects([row], Prefetch(name, related._base_manager.using(self.alias)))
        return Pending(
            row.prepare_email_message(),
            self.mailer or self._target(row.backend_alias),
            self.PRIORITIES.get(row.priority, Priority.MEDIUM),
            row.created,
            row.scheduled_time,
            row.expires_at,
        )

    def _target(self, alias: str) -> str:
        """The mailer that sends what post_office would send by this alias."""
        if alias not in self._targets:
            try:
                self._targets[alias] = self._find_target(alias)
            except CannotImport as error:
                raise Left(f"backend alias {alias!r}: {error}") from error
        return self._targets[alias]

    def _find_target(self, alias: str) -> str:
        theirs = import_module("post_office.settings")
        alias = alias or theirs.get_default_mailer()
        configured = conf.mailers()
        if configured is None:
            backends = theirs.get_available_backends()
            if alias not in backends:
                raise CannotImport('it is not in POST_OFFICE["BACKENDS"]. Add it there, or name a mailer with --mailer')
            return target(backends[alias])
        if alias not in configured:
            raise CannotImport("it is not in MAILERS. Add it there, or name a mailer with --mailer")
        try:
            return target(alias)
        except CannotImport:  # its own back end: then it delivers through this one
            return target(theirs.get_default_mailer())

    @contextmanager
    def lock(self) -> Iterator[None]:
        lockfile = import_module("post_office.lockfile")
        lock = lockfile.FileLock(lockfile.default_lockfile)
        try:
            lock.__enter__()
        except (lockfile.FileLocked, FileExistsError) as error:
            raise CannotImport(
                f"A send_queued_mail (or another import) is running: it holds {lock.lock_filename}. It does not lock"
                " the rows that it sends, so stop it first, on every host."
            ) from error
        try:
            yield
        finally:
            lock.__exit__(None, None, None)


#: By what ``--from`` calls them.
SOURCES: dict[str, type[Source]] = {source.app: source for source in (DjangoMailer, PostOffice)}


def installed() -> list[str]:
    """Which of :data:`SOURCES` this site has.

    :raises CannotImport: none.
    """
    found = [name for name in SOURCES if apps.is_installed(name)]
    if not found:
        raise CannotImport(
            'There is no queue to take mail from. Add to INSTALLED_APPS, below "anymail_retry", the one whose mail is'
            ' to be taken over: "mailer" (django-mailer) or "post_office" (django-post_office).'
        )
    return found


def take_over(
    source: Source, *, dry_run: bool = False, batch: int = BATCH, progress: Callable[[int], None] = lambda done: None
) -> Report:
    """Take over what is pending, batch by batch, each in a transaction of its own.

    :param dry_run: do everything, and roll it back.
    :param progress: called with the number of rows that were looked at so far.
    :raises CannotImport: the other queue's workers are sending.
    """
    report = Report()
    missed: list[int] = []
    done = last = 0
    with source.lock():
        while ids := list(source.pending().filter(pk__gt=last).order_by("pk").values_list("pk", flat=True)[:batch]):
            last = ids[-1]
            found = Report()
            with own_transaction(source.alias):
                locked = _lock(source, ids)
                for pk in locked:
                    _take(source, pk, found)
                    progress(done := done + 1)
                if dry_run:
                    transaction.set_rollback(True, using=source.alias)
            report.taken += found.taken
            report.left.update(found.left)
            report.left_out.update(found.left_out)
            missed += sorted(set(ids) - set(locked))
        for start in range(0, len(missed), batch):
            still = source.pending().filter(pk__in=missed[start : start + batch]).values_list("pk", flat=True)
            report.left.update(dict.fromkeys(still, "locked: it is being sent, or taken by another import"))
    return report


def _lock(source: Source, ids: Collection[int]) -> list[int]:
    """Those rows of a batch that are still pending, and now nobody else's until the transaction ends."""
    features = connections[source.alias].features
    rows = source.pending().filter(pk__in=ids).order_by("pk").values_list("pk", flat=True)
    if features.has_select_for_update:
        rows = rows.select_for_update(skip_locked=features.has_select_for_update_skip_locked)
    else:
        # A write that changes nothing makes this the one transaction that may write.
        source.pending().filter(pk__in=ids).update(priority=F("priority"))
    return list(rows)


def _take(source: Source, pk: int, report: Report) -> None:
    try:
        with transaction.atomic(using=source.alias):
            row = source.rows.objects.using(source.alias).get(pk=pk)
            pending = source.read(row)
            if not pending.message.recipients():
                raise Left("it has no recipients")
            enqueue(
                [pending.message],
                mailer=pending.mailer,
                origin="queued",
                priority=pending.priority,
                not_before=pending.not_before,
                expires_at=pending.expires_at,
                created_at=pending.created_at,
                using=source.alias,
            )
            row.delete(using=source.alias)
    except (OperationalError, InterfaceError):
        raise  # the database's trouble, not this message's
    except Exception as error:
        report.left[pk] = _reason(error)
    else:
        report.taken += 1
        if pending.left_out:
            report.left_out[pk] = pending.left_out


def _reason(error: Exception) -> str:
    """Why a row was left. The text of an exception that is not ours may quote the message."""
    if isinstance(error, Left):
        return str(error)
    if isinstance(error, MessageNotQueueable):
        return f"{discreet(error.what)}: {error.why}"
    if isinstance(error, ModuleNotFoundError):
        return f"cannot be decoded: there is no module {error.name!r}"
    kind = "cannot be stored" if isinstance(error, DatabaseError) else "cannot be decoded"
    return f"{kind} ({type(error).__name__})"


def target(name: str | None) -> str:
    """The name of the mailer that sends what is imported: this one, or the one behind it.

    :param name: alias in ``MAILERS``, or dotted path of a back end; None: the site's default.
    :raises CannotImport: there is none, or it stores instead of sending.
    """
    try:
        mailer = find(default_mailer() if name is None else name)
    except MailerGone as error:
        raise CannotImport(f"There is no mailer {name!r}") from error
    except (ImproperlyConfigured, ImportError, LookupError) as error:
        raise CannotImport(str(error)) from error
    storing = [cls for cls in mailer.backend_class.__mro__ if cls.__module__ in STORING]
    if storing:
        raise CannotImport(
            f"{mailer.name!r} does not send: it stores mail in the queue of {storing[0].__module__.partition('.')[0]}."
            " Name the mailer that sends, with --mailer, or change the settings first"
        )
    return mailer.name


def is_same_database(one: str, other: str) -> bool:
    """Whether two aliases are connections to the same database, so that a transaction of either will do for both."""
    if one == other:
        return True
    return _place(connections[one].settings_dict) == _place(connections[other].settings_dict)


def _place(database: dict[str, Any]) -> tuple[Any, ...]:
    # On PostgreSQL "options" may name another schema, and "service" stand for all the rest.
    options = database.get("OPTIONS") or {}
    return (
        *(str(database.get(key) or "") for key in ("ENGINE", "NAME", "HOST", "PORT")),
        options.get("options"),
        options.get("service"),
    )
