"""What all commands have in common: the queue's database, the names of mailers, and words."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import Error as DatabaseError
from django.db import connections
from django.utils.connection import ConnectionDoesNotExist

from .. import conf
from ..mailqueue import mailers
from ..mailqueue.claim import mailers_with_rows
from ..mailqueue.database import errors_of, queue_database
from ..mailqueue.operations import FOR_EVER
from ..mailqueue.status import Glance
from ..models import QueuedMessage


class QueueCommand(BaseCommand):
    """A command that works on the queue, and whose user a failing database is told of in one line."""

    requires_migrations_checks = False  # usable_database() says it better

    def execute(self, *args: Any, **options: Any) -> str | None:
        try:
            return super().execute(*args, **options)
        except CommandError:
            raise
        except errors_of(queue_database()) as error:
            raise CommandError(f"The database failed: {str(error).strip()}") from error

    def tell_pauses(self, found: Iterable[Glance]) -> None:
        for one in found:
            self.stdout.write(self.style.WARNING(pause_words(one)))


def usable_database() -> str:
    """The alias of the queue's database, once it is clear that the queue can be used there.

    :raises CommandError: saying what to do.
    """
    try:
        alias = queue_database()
        tables = connections[alias].introspection.table_names()
    except (ImproperlyConfigured, ConnectionDoesNotExist) as error:
        raise CommandError(str(error)) from error
    except DatabaseError as error:
        raise CommandError(f"The database does not answer: {str(error).strip()}") from error
    if QueuedMessage._meta.db_table not in tables:
        option = "" if alias == "default" else f" --database {alias}"
        raise CommandError(f"The queue's tables are missing. Run: manage.py migrate anymail_retry{option}")
    return alias


# --- mailers ---


def chosen_mailers(alias: str, names: Collection[str] | None) -> list[str] | None:
    """All names under which the mail of these mailers may lie in the queue; None: of every mailer.

    A row keeps the name that its mailer had. Since then that may have come to stand before another mailer, or have
    become one of MAILERS: what counts is who sends the mail now.

    :param names: as they were given.
    :raises CommandError: nothing has one of these names.
    """
    if not names:
        return None
    in_rows = mailers_with_rows(alias)
    configured = conf.mailers()
    known = {*in_rows, *([conf.email_backend()] if configured is None else configured)}
    for name in names:
        if name not in known and sender_of(name) is None:
            raise CommandError(f"There is no mailer {name!r}. Known are: {', '.join(sorted(known))}.")
    chosen = {*names, *filter(None, map(sender_of, names))}
    return sorted(chosen.union(name for name in in_rows if sender_of(name) in chosen))


def sender_of(name: str) -> str | None:
    """The name of the mailer that sends the mail of this one; None: nothing sends it as things are."""
    try:
        mailer = mailers.find(name)
    except Exception:  # it is gone, or its module or one of its options is broken
        return None
    backend_class: Any = mailer.backend_class  # or whatever else the dotted path leads to
    return mailer.name if isinstance(backend_class, type) else None


# --- words ---


def pause_words(one: Glance) -> str:
    """Until when a mailer pauses, and why."""
    assert one.paused_until is not None
    until = f"{one.paused_until:%Y-%m-%d %H:%M:%S} UTC"
    if not one.is_paused:
        return f"{one.mailer} was paused until {until}, and its next message is a probe: {one.pause_reason}"
    if one.paused_until >= FOR_EVER:
        until = "it is resumed"
    return f"{one.mailer} pauses until {until}: {one.pause_reason}"


def pauses_for_scripts(found: Iterable[Glance]) -> dict[str, dict[str, str]]:
    return {
        one.mailer: {"until": one.paused_until.isoformat(), "reason": one.pause_reason}
        for one in found
        if one.paused_until is not None
    }


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``5 h``, ``3 days``"""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
