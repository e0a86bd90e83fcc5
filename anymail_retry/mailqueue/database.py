"""Which database the queue lives in, and what its vendor can do."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from django.db import Error, connections, router, transaction

from .. import conf

T = TypeVar("T")

UPDATE = re.compile(r"^(UPDATE `\w+`)(?= SET )")

READ_ISOLATION = {
    "postgresql": "SHOW transaction_isolation",
    # MySQL 8 calls it transaction_isolation, MariaDB before 11.1 tx_isolation; this finds either.
    "mysql": "SHOW VARIABLES WHERE Variable_name IN ('transaction_isolation', 'tx_isolation')",
}


def queue_database() -> str:
    """The one alias that every query of the queue names: never a replica."""
    alias: str | None = conf.get("QUEUE_DATABASE")
    if alias is not None:
        return alias
    from ..models import QueuedMessage

    return router.db_for_write(QueuedMessage)


@contextmanager
def own_transaction(alias: str) -> Iterator[None]:
    """A transaction of the worker's own: an error inside somebody else's, because nothing would be stored until that
    ends. Its first statement is a write (on SQLite, what begins by reading cannot become a writer while others are)."""
    connection = connections[alias]
    hint = connection.execute_wrapper(_by_primary_key) if connection.vendor == "mysql" else nullcontext()
    with transaction.atomic(using=alias, durable=True), hint:
        yield


def _by_primary_key(execute: Callable[..., T], sql: str, *args: Any) -> T:
    """All our updates name their rows. MySQL would rather read a small table whole; under REPEATABLE READ it then
    waits for whoever has inserted a row and not committed, and has all others who insert wait for it."""
    return execute(UPDATE.sub(r"\1 FORCE INDEX (PRIMARY)", sql, count=1), *args)


def errors_of(alias: str) -> tuple[type[Exception], ...]:
    """What a database that does not work may raise: Django's errors, and the driver's own, which a cursor that is
    closed on a broken connection raises as they are (MySQL, Django 5.2)."""
    driver: type[Exception] = connections[alias].Database.Error  # type: ignore[attr-defined]  # every back end has it
    return Error, driver


def first_line(error: Exception) -> str:
    """What a database's error says, for a log: PostgreSQL goes on with the row, and so with a recipient."""
    return (str(error).strip().splitlines() or [""])[0]


def disconnect(alias: str) -> None:
    """Close a connection that may be broken, so that the next statement opens another."""
    try:
        connections[alias].close()
    except errors_of(alias):
        pass  # MySQL's driver complains if there was nothing left to close; Django forgets the connection all the same


def drop_if_broken(alias: str) -> None:
    """Close a connection that does not work any more, so that the next statement opens another."""
    connection = connections[alias]
    if connection.connection is not None and not connection.is_usable():
        disconnect(alias)


def is_there(alias: str) -> bool:
    """Whether the database answers, if need be over a new connection: so it was the statement that failed."""
    try:
        drop_if_broken(alias)
        connections[alias].ensure_connection()
    except errors_of(alias):
        return False
    return True


def may_skip_locked(alias: str) -> bool:
    """Whether reading with SKIP LOCKED saves lost races. Only where the database has it and reads are committed
    reads: under REPEATABLE READ it takes gap locks, and deadlocks those who insert."""
    connection = connections[alias]
    statement = READ_ISOLATION.get(connection.vendor)
    if statement is None or not connection.features.has_select_for_update_skip_locked:
        return False
    with connection.cursor() as cursor:
        cursor.execute(statement)
        level = str(cursor.fetchone()[-1])
    return level.upper().replace("-", " ") == "READ COMMITTED"


@functools.cache
def max_packet(alias: str) -> int | None:
    """The longest statement that the server takes, in bytes; None: as good as unlimited.

    A longer one does not fail by itself: it ends the connection, and the caller's transaction with it.
    """
    connection = connections[alias]
    if connection.vendor != "mysql":
        return None
    with connection.cursor() as cursor:
        cursor.execute("SELECT @@max_allowed_packet")
        return int(cursor.fetchone()[0])


def size_in_statement(data: bytes | str) -> int:
    """Bytes that a value takes up in a statement to MySQL, where the driver puts a backslash before some of them."""
    raw = data.encode() if isinstance(data, str) else bytes(data)
    return len(raw) + sum(raw.count(special) for special in (b"\0", b"\n", b"\r", b"\x1a", b"'", b'"', b"\\"))


def chunks(items: Sequence[T], sizes: Sequence[int], *, limit: int, count: int) -> Iterator[list[T]]:
    """Split into runs of at most ``count`` items whose sizes add up to at most ``limit`` (a larger item is alone)."""
    run: list[T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if run and (total + size > limit or len(run) >= count):
            yield run
            run, total = [], 0
        run.append(item)
        total += size
    if run:
        yield run


def storable(text: str, length: int) -> str:
    """A text as every database takes it: no NUL (PostgreSQL refuses it), no lone surrogates (all do)."""
    return text[:length].replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
