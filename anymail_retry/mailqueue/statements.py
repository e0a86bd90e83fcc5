"""The statements that are executed for every message: few, and put together by hand.

Django's ORM spends more time on making one of these than the database does on executing it. A message that falls back
is stored while somebody waits for a web page, and a worker's results are written while its threads want the same CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import AutoField, Field, Model

from ..models import MessageContent, QueuedMessage
from .database import chunks


def insert(alias: str, row: QueuedMessage, payload: str) -> None:
    """Store one message, as ``save(force_insert=True)`` would, without its signals.

    Two INSERTs; on PostgreSQL one statement, which halves the time.
    """
    connection = connections[alias]
    values = [_prepared(field, getattr(row, field.attname), connection) for field in _fields(QueuedMessage)]
    into_messages, into_content = _into_both(alias)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            both = f"WITH message AS ({into_messages} RETURNING id) {into_content} SELECT id, %s FROM message"
            cursor.execute(f"{both} RETURNING message_id", [*values, payload])
            row.pk = cursor.fetchone()[0]
            return
        if connection.features.can_return_columns_from_insert:
            cursor.execute(f"{into_messages} RETURNING id", values)
            row.pk = cursor.fetchone()[0]
        else:
            cursor.execute(into_messages, values)
            row.pk = connection.ops.last_insert_id(cursor, QueuedMessage._meta.db_table, "id")
        cursor.execute(f"{into_content} VALUES (%s, %s)", [row.pk, payload])


def insert_many(alias: str, model: type[Model], rows: Sequence[Mapping[str, Any]], *, ids: bool = False) -> list[int]:
    """Store many rows, in one statement unless the database takes fewer parameters than that needs.

    Values that all rows have in common are sent once (not to MySQL), on PostgreSQL the others as one array per column.

    :param rows: by the attributes' names.
    :param ids: ask for the ids that the database gives; not where it cannot say (:func:`tells_ids`).
    """
    connection = connections[alias]
    common: dict[Field[Any, Any], Any] = {}
    varying: dict[Field[Any, Any], list[Any]] = {}
    for field in _fields(model):
        values = [row[field.attname] for row in rows]
        if connection.vendor != "mysql" and values.count(values[0]) == len(values):
            common[field] = _prepared(field, values[0], connection)
        else:
            varying[field] = [_prepared(field, value, connection) for value in values]
    if not varying:  # one row, as a rule
        field, value = common.popitem()
        varying[field] = [value] * len(rows)
    into = _insert_into(connection, model, [*common, *varying])
    given: list[int] = []
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(*_from_arrays(connection, into, common, varying, ids=ids))
            return [pk for (pk,) in cursor.fetchall()] if ids else given
        most = (connection.features.max_query_params or 10**9) - len(common)
        tuples = list(zip(*varying.values(), strict=True))
        for chunk in chunks(tuples, [len(varying)] * len(tuples), limit=most, count=len(tuples)):
            lists = ", ".join([f"({_places(varying)})"] * len(chunk))
            parameters = [*common.values(), *(value for values in chunk for value in values)]
            if connection.vendor != "sqlite":
                cursor.execute(f"{into} VALUES {lists}{' RETURNING id' if ids else ''}", parameters)
                given += [pk for (pk,) in cursor.fetchall()] if ids else []
                continue
            columns = ", ".join([*["%s"] * len(common), *(f"column{place + 1}" for place in range(len(varying)))])
            cursor.execute(f"{into} SELECT {columns} FROM (VALUES {lists})", parameters)
            if ids:  # consecutive, because nobody else writes meanwhile; before 3.35 SQLite has no RETURNING
                given += range(cursor.lastrowid - len(chunk) + 1, cursor.lastrowid + 1)
    return given


def tells_ids(alias: str) -> bool:
    """Whether :func:`insert_many` can say which ids the database gave. MySQL's own says it for the first only."""
    connection = connections[alias]
    return connection.vendor == "sqlite" or connection.features.can_return_rows_from_bulk_insert


def update(alias: str, ids: Collection[int], values: Mapping[str, Any]) -> None:
    """Give all these messages the same values."""
    connection = connections[alias]
    quote = connection.ops.quote_name
    fields: list[Any] = [QueuedMessage._meta.get_field(name) for name in values]
    assigned = ", ".join(f"{quote(field.column)} = %s" for field in fields)
    prepared = [_prepared(field, value, connection) for field, value in zip(fields, values.values(), strict=True)]
    table = quote(QueuedMessage._meta.db_table)
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE {table} SET {assigned} WHERE id IN ({_places(ids)})", [*prepared, *ids])


def delete(alias: str, model: type[Model], column: str, values: Collection[int], *, null: str | None = None) -> int:
    """DELETE the rows that have one of these values, in one statement, without loading rows or looking for what
    refers to them.

    :param null: a column that has to be NULL besides.
    """
    if not values:
        return 0
    connection = connections[alias]
    quote = connection.ops.quote_name
    table = quote(model._meta.db_table)
    field: Any = model._meta.get_field(column)
    only = "" if null is None else f"{table}.{quote(null)} IS NULL"
    if connection.vendor == "mysql":
        # With IN, MySQL reads a small table whole, and waits for whoever has inserted a row and not committed: a web
        # request may take its time. Joined to the values it looks up each by itself.
        wanted = " UNION ALL ".join(["SELECT %s AS id"] * len(values))
        joined = f"({wanted}) AS wanted STRAIGHT_JOIN {table} ON {table}.{quote(field.column)} = wanted.id"
        statement = f"DELETE {table} FROM {joined}{only and f' WHERE {only}'}"
    else:
        statement = f"DELETE FROM {table} WHERE {quote(field.column)} IN ({_places(values)}){only and f' AND {only}'}"
    with connection.cursor() as cursor:
        cursor.execute(statement, list(values))
        return int(cursor.rowcount)


@functools.cache
def _fields(model: type[Model]) -> list[Field[Any, Any]]:
    """What a new row is given: all but the id that the database makes."""
    return [field for field in model._meta.concrete_fields if not isinstance(field, AutoField)]


def _prepared(field: Field[Any, Any], value: Any, connection: BaseDatabaseWrapper) -> Any:
    """A value as the database's driver takes it. Texts of text columns, the only texts here, are so already."""
    return value if value is None or type(value) is str else field.get_db_prep_save(value, connection)


@functools.lru_cache(maxsize=8)
def _into_both(alias: str) -> tuple[str, str]:
    """The INSERT of a message's row, and the beginning of that of its content."""
    connection, fields = connections[alias], _fields(QueuedMessage)
    into_messages = f"{_insert_into(connection, QueuedMessage, fields)} VALUES ({_places(fields)})"
    return into_messages, _insert_into(connection, MessageContent, _fields(MessageContent))


def _insert_into(connection: BaseDatabaseWrapper, model: type[Model], fields: Collection[Field[Any, Any]]) -> str:
    quote = connection.ops.quote_name
    return f"INSERT INTO {quote(model._meta.db_table)} ({', '.join(quote(str(field.column)) for field in fields)})"


def _places(items: Collection[Any]) -> str:
    return ", ".join(["%s"] * len(items))


def _from_arrays(
    connection: BaseDatabaseWrapper,
    into: str,
    common: Mapping[Field[Any, Any], Any],
    varying: Mapping[Field[Any, Any], Sequence[Any]],
    *,
    ids: bool,
) -> tuple[str, list[Any]]:
    """PostgreSQL's INSERT of many rows, and its parameters.

    As Django's ``bulk_create()`` has it for field types that it knows, which :class:`.fields.UTCDateTimeField` is not.
    """

    def type_of(field: Field[Any, Any]) -> str:
        # Without its length, for the database to refuse what is too long and not to cut it.
        return str(field.db_type(connection)).partition("(")[0]

    # Members of enumerations among plain texts would be of mixed types to the driver.
    arrays = [[str(value) if isinstance(value, str) else value for value in values] for values in varying.values()]
    same = "".join(f"%s::{type_of(field)}, " for field in common)
    unnested = ", ".join(f"%s::{type_of(field)}[]" for field in varying)
    statement = f"{into} SELECT {same}rows.* FROM UNNEST({unnested}) AS rows"
    return f"{statement}{' RETURNING id' if ids else ''}", [*common.values(), *arrays]
