"""SQLite as ``startproject`` leaves it: deferred transactions and a rollback journal.

A check advises otherwise, and the queue keeps what it is given all the same.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connection

from anymail_retry.testing.pytest import spawned_esp

from .engine import PATIENCE
from .test_processes import WEB, WITHOUT_KEYS, fleet, stop, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .test_processes import Fleet

__all__ = ["fleet", "spawned_esp"]  # fixtures

pytestmark = pytest.mark.django_db(transaction=True)

#: Of each web process: see WEB.
REQUESTS = 60


class Database:
    """A copy of the tests' database, empty, in the format that SQLite makes by default."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with connection.cursor() as cursor:
            cursor.execute("VACUUM INTO %s", [str(path)])
        assert self.ask("PRAGMA journal_mode") == [("delete",)]

    def ask(self, sql: str) -> list[Any]:
        reader = sqlite3.connect(self.path, timeout=PATIENCE)
        try:
            return reader.execute(sql).fetchall()
        finally:
            reader.close()


def test_web_processes_that_write_and_a_worker_that_drains_lose_nothing(
    fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    if connection.vendor != "sqlite":
        pytest.skip("of SQLite's defaults")
    database = Database(tmp_path / "db.sqlite3")
    site = fleet(WITHOUT_KEYS)
    site.env["DJANGO_SETTINGS_MODULE"] = "tests.mailqueue.sqlite_default_settings"
    site.env["TEST_DATABASE_NAME"] = str(database.path)
    site.env["TEST_QUEUE"] = json.dumps({"LEASE": 2 * PATIENCE, "SEND_MAX": PATIENCE})
    worker = site.start()
    names = ("web 1", "web 2")
    requests = [
        subprocess.Popen(
            [sys.executable, "-c", WEB, name, site.backend],
            env=site.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for name in names
    ]
    site.processes += requests
    for process in requests:
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out  # no request met a database that is locked
    markers = [f"{name} {number}" for name in names for number in range(REQUESTS)]
    states = "SELECT state, attempt_count, COUNT(*) FROM anymail_retry_queuedmessage GROUP BY state, attempt_count"
    until(lambda: database.ask(states) == [("sent", 1, len(markers))])
    out = stop(worker)
    assert worker.returncode == 0
    assert (
        "database is locked" not in out
    )  # it logs its own trouble: each of its transactions begins with a write, and waits
    assert database.ask("SELECT COUNT(*) FROM auth_group") == [(len(markers),)]
    assert database.ask("SELECT COUNT(*) FROM anymail_retry_attempt") == [(len(markers),)]
    assert database.ask("SELECT COUNT(*) FROM anymail_retry_messagecontent") == [(0,)]
    assert site.esp.ledger.lost(markers) == []
    assert site.esp.ledger.duplicates() == {}
    assert database.ask("PRAGMA journal_mode") == [("delete",)]  # it was so to the end
