"""Messages in as few round trips, and as short statements, as the database allows.

``Model.save()`` spends more time on making a statement than the database does on executing it, and a message that
falls back is stored while somebody waits for a web page. So the statements are made once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from django.db import connections
from django.db.models import Field

from ..models import MessageContent, QueuedMessage


def insert(alias: str, row: QueuedMessage, payload: str) -> None:
    """Store one message, as ``save(force_insert=True)`` would, without its signals.

    Two INSERTs; on PostgreSQL one statement, which halves the time.
    """
    connection = connections[alias]
    into_messages, fields = _insert_into(alias, QueuedMessage._meta.db_table)
    values = [field.get_db_prep_save(getattr(row, field.attname), connection) for field in fields]
    into_content = f"INSERT INTO {connection.ops.quote_name(MessageContent._meta.db_table)} (message_id, payload)"
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            both = f"WITH message AS ({into_messages} RETURNING id) {into_content} SELECT id, %s FROM message"  # noqa: S608  # names of ours
            cursor.execute(f"{both} RETURNING message_id", [*values, payload])
            row.pk = cursor.fetchone()[0]
        else:
            if connection.features.can_return_columns_from_insert:
                cursor.execute(f"{into_messages} RETURNING id", values)
                row.pk = cursor.fetchone()[0]
            else:
                cursor.execute(into_messages, values)
                row.pk = connection.ops.last_insert_id(cursor, QueuedMessage._meta.db_table, "id")
            cursor.execute(f"{into_content} VALUES (%s, %s)", [row.pk, payload])
    row._state.adding = False
    row._state.db = alias


def insert_by_columns(alias: str, rows: Sequence[QueuedMessage]) -> None:
    """Store the rows of many messages on PostgreSQL: one parameter per column, not per value.

    As Django's ``bulk_create()`` does it for field types that it knows, which :class:`.fields.UTCDateTimeField` is not.
    """
    connection = connections[alias]
    into_messages, fields = _insert_into(alias, QueuedMessage._meta.db_table)
    columns = [[field.get_db_prep_save(getattr(row, field.attname), connection) for row in rows] for field in fields]
    # Members of enumerations among plain texts would be of mixed types to the driver.
    columns = [[str(value) if isinstance(value, str) else value for value in column] for column in columns]
    # Without their lengths, for the database to refuse what is too long and not to cut it.
    types = [str(field.db_type(connection)).partition("(")[0] for field in fields]
    into, _, _ = into_messages.partition(" VALUES ")
    with connection.cursor() as cursor:
        arrays = ", ".join(f"%s::{name}[]" for name in types)
        cursor.execute(f"{into} SELECT * FROM UNNEST({arrays}) RETURNING id", columns)  # noqa: S608  # names of ours
        for row, (pk,) in zip(rows, cursor.fetchall(), strict=True):
            row.pk = pk
            row._state.adding = False
            row._state.db = alias


@functools.lru_cache(maxsize=8)
def _insert_into(alias: str, table: str) -> tuple[str, list[Field[Any, Any]]]:
    """The INSERT of a message's row, and the fields that its parameters come from."""
    quote = connections[alias].ops.quote_name
    fields = [field for field in QueuedMessage._meta.concrete_fields if not field.primary_key]
    columns = ", ".join(quote(str(field.column)) for field in fields)
    places = ", ".join(["%s"] * len(fields))
    return f"INSERT INTO {quote(table)} ({columns}) VALUES ({places})", fields  # noqa: S608  # names of ours
