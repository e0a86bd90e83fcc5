"""Databases of a benchmark's own: made for it, dropped at its end."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KINDS = ("sqlite", "postgresql", "mariadb")


class Unavailable(Exception):
    """There is no such server here, or no driver for it."""


@contextmanager
def temporary(kind: str) -> Iterator[dict[str, Any]]:
    """An entry for ``DATABASES``, whose database is empty.

    The servers are found as their own clients find them: ``PGHOST``, ``PGPORT``, ``PGUSER``, ``PGPASSWORD`` and
    ``MYSQL_HOST``, ``MYSQL_PORT``, ``MYSQL_USER``, ``MYSQL_PASSWORD``.

    :raises Unavailable: says why.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # it is dropped then, too
    name = f"anymail_retry_benchmark_{uuid.uuid4().hex[:8]}"
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix=name) as folder:
            yield {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(Path(folder) / "db.sqlite3"),
                "OPTIONS": {  # as the docs advise
                    "timeout": 30,
                    "transaction_mode": "IMMEDIATE",
                    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
                },
            }
    elif kind == "postgresql":
        place = {
            "HOST": os.environ.get("PGHOST", "127.0.0.1"),
            "PORT": os.environ.get("PGPORT", "5432"),
            "USER": os.environ.get("PGUSER", "postgres"),
            "PASSWORD": os.environ.get("PGPASSWORD", ""),
        }
        execute = _postgresql(place)
        execute(f'CREATE DATABASE "{name}"')
        try:
            yield {"ENGINE": "django.db.backends.postgresql", "NAME": name, **place}
        finally:
            execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    else:
        place = {
            "HOST": os.environ.get("MYSQL_HOST", "127.0.0.1"),
            "PORT": os.environ.get("MYSQL_PORT", "3306"),
            "USER": os.environ.get("MYSQL_USER", "root"),
            "PASSWORD": os.environ.get("MYSQL_PASSWORD", ""),
        }
        execute = _mariadb(place)
        execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        try:
            yield {
                "ENGINE": "django.db.backends.mysql",
                "NAME": name,
                "OPTIONS": {"charset": "utf8mb4", "local_infile": False},
                **place,
            }
        finally:
            execute(f"DROP DATABASE IF EXISTS {name}")


def _postgresql(place: dict[str, str]) -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise Unavailable(f"no driver: {error}") from error

    def execute(statement: str) -> None:
        with psycopg.connect(
            host=place["HOST"],
            port=place["PORT"],
            user=place["USER"],
            password=place["PASSWORD"],
            dbname="postgres",
            autocommit=True,
        ) as connection:
            connection.execute(statement)

    try:
        execute("SELECT 1")
    except psycopg.Error as error:
        raise Unavailable(str(error).partition("\n")[0]) from error
    return execute


def _mariadb(place: dict[str, str]) -> Any:
    try:
        import MySQLdb
    except ImportError as error:
        raise Unavailable(f"no driver: {error}") from error

    def execute(statement: str) -> None:
        connection = MySQLdb.connect(
            host=place["HOST"], port=int(place["PORT"]), user=place["USER"], password=place["PASSWORD"]
        )
        try:
            connection.cursor().execute(statement)
        finally:
            connection.close()

    try:
        execute("SELECT 1")
    except MySQLdb.Error as error:
        raise Unavailable(str(error)) from error
    return execute
