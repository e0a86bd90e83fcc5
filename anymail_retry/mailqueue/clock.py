"""The queue's two clocks: the database's, which all workers share, and a steady one for what this process measures.

Claims, leases, pauses and send slots are compared between hosts, so they go by the database's clock: it is asked once
a minute and kept as an offset to the steady one. Django's ``Now()`` is not used: with ``USE_TZ = False``, or with a
``time_zone`` in a MySQL session, it is hours wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from django.db import connections

#: Seconds for which one reading of the database's clock is used.
MAX_AGE = 60.0

#: By how much the views that two processes have of the database's clock may differ. What is due at once is stored as
#: due this long ago, or the worker that looks first might not see it yet.
MARGIN = timedelta(seconds=1)

#: A reading that took longer than this says too little about the moment at which it was taken.
SLOW_READING = 1.0

#: The database's time in UTC, without any time zone of a session or server.
NOW_IN_UTC = {
    "postgresql": "SELECT clock_timestamp() AT TIME ZONE 'UTC'",
    "mysql": "SELECT UTC_TIMESTAMP(6)",
}


def steady() -> float:
    """Seconds that only go forward, and go on while the machine sleeps (where the system has such a clock)."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def read_database_time(alias: str) -> datetime:
    """What the database's clock says now: one statement, none on SQLite, whose clock is this machine's."""
    connection = connections[alias]
    statement = NOW_IN_UTC.get(connection.vendor)
    if statement is None:
        return datetime.now(timezone.utc)
    with connection.cursor() as cursor:
        cursor.execute(statement)
        value: datetime = cursor.fetchone()[0]
    return value.replace(tzinfo=timezone.utc)


class DatabaseClock:
    """The database's clock, as seen from this process.

    :param alias: the database.
    :param max_age: seconds after which the database is asked again.
    :param read: asks the database; for tests.
    """

    def __init__(
        self,
        alias: str,
        *,
        max_age: float = MAX_AGE,
        read: Callable[[str], datetime] = read_database_time,
        steady: Callable[[], float] = steady,
    ) -> None:
        self.alias = alias
        self.max_age = max_age
        self.steady = steady
        self._read = read
        self._epoch: datetime | None = None  # the database's time at steady() == 0
        self._read_at = -max_age

    def now(self) -> datetime:
        """The database's time, aware and in UTC. Asks the database if the last answer is too old."""
        if self.steady() - self._read_at >= self.max_age:
            self._synchronize()
        return self.at(self.steady())

    def at(self, moment: float) -> datetime:
        """The database's time at a moment of the steady clock, by the last answer."""
        if self._epoch is None:
            self._synchronize()
        assert self._epoch is not None
        return self._epoch + timedelta(seconds=moment)

    def from_any_thread(self) -> datetime:
        """The database's time, by the last answer. Asks nobody, as only the thread that made this object may."""
        return self.at(self.steady())

    def moment(self, time: datetime) -> float:
        """The moment of the steady clock at which the database's clock shows this time."""
        return (time - self.at(0.0)).total_seconds()

    def _synchronize(self) -> None:
        before = self.steady()
        time = self._read(self.alias)
        after = self.steady()
        if self._epoch is None or after - before <= SLOW_READING:
            self._epoch = time - timedelta(seconds=(before + after) / 2)
            self._read_at = after


_clocks: dict[str, DatabaseClock] = {}
_lock = threading.Lock()


def clock_of(alias: str) -> DatabaseClock:
    """This process's clock of a database, for storing messages: seconds of skew do no harm there."""
    with _lock:
        return _clocks.setdefault(alias, DatabaseClock(alias, max_age=600.0))
