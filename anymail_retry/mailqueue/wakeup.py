"""PostgreSQL's NOTIFY: a worker that sleeps learns at once that mail is due.

An economy of waiting and nothing more. A notification may be lost (a connection broke, a pooler swallowed it), so
workers poll all the same, and mail is never marked by it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from ..log import get_logger
from .database import first_line

logger = get_logger("queue")

#: What is notified on. The payload is the name of the mailer whose mail is due.
CHANNEL = "anymail_retry"

#: In place of a mailer's name: any of them, or a pause that was ended.
ANY = ""

#: Seconds that a notification may take to arrive when a connection is tried.
PATIENCE = 3.0

#: Seconds after which it is tried again, whether it heard anything or not.
RECHECK = 600.0

#: Seconds until the next try after a connection was lost: the first, doubling up to the last.
RETRY_FIRST, RETRY_MAX = 1.0, 60.0

#: Seconds of one wait for notifications, which is how long ending may take; and for how long the end is waited for.
TURN, FAREWELL = 0.25, 2.0

#: Seconds in which notifications are collected after some were passed on: a busy site sends hundreds a second.
PAUSE = 0.05


# --- those who store ---


def wake(alias: str, mailer: str = ANY) -> None:
    """Once the present transaction is committed, tell the workers that this mailer's mail is due.

    One notification per mailer and transaction. After the commit, because PostgreSQL commits transactions that notify
    one after the other. On other databases nothing.
    """
    connection = connections[alias]
    if connection.vendor != "postgresql":
        return
    hooks = (hook for _, hook, *_ in connection.run_on_commit)
    told = next((hook.told for hook in hooks if isinstance(hook, _Notify)), None)
    transaction.on_commit(_Notify(alias, mailer, set() if told is None else told), using=alias, robust=True)


@dataclass(frozen=True, eq=False)
class _Notify:
    """What is done at the commit. A savepoint that is rolled back takes its own with it, and no other's."""

    alias: str
    mailer: str
    #: Those who were notified of: shared by all of one transaction.
    told: set[str]

    def __call__(self) -> None:
        if self.mailer in self.told:
            return
        self.told.add(self.mailer)
        connection = connections[self.alias]
        try:
            # A transaction only where a test runs these inside its own.
            with transaction.atomic(using=self.alias) if connection.in_atomic_block else nullcontext():
                _notify(connection, CHANNEL, self.mailer)
        except Exception as error:  # the mail is stored, and a worker finds it by polling
            logger.info("no worker was woken: %s: %s", type(error).__name__, first_line(error))


def _notify(connection: BaseDatabaseWrapper, channel: str, payload: str) -> None:
    # PostgreSQL would flush its log to disk for a notification, which is as dear as storing the mail was. For this one
    # statement it need not; inside a transaction that would hold for the rest of it.
    cheaply = "" if connection.in_atomic_block else "set_config('synchronous_commit', 'off', true), "
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {cheaply}pg_notify(%s, %s)", [channel, payload])  # one of two constants


# --- those who send ---


@contextmanager
def listening(alias: str, heard: Callable[[Collection[str]], None]) -> Iterator[None]:
    """Listen for the length of the context, where the database and its driver can.

    :param heard: called in another thread with the names of mailers, among them perhaps :data:`ANY`.
    """
    if not _can_listen(alias):
        yield
        return
    listener = Listener(alias, heard)
    listener.start()
    try:
        yield
    finally:
        listener.close()


def _can_listen(alias: str) -> bool:
    connection = connections[alias]
    if connection.vendor != "postgresql":
        return False
    driver: Any = connection.Database  # type: ignore[attr-defined]  # every back end has it
    version = driver.__version__.split()[0]
    if tuple(map(int, version.split(".")[:2])) >= (3, 2):
        return True
    logger.info(
        "mail is found by polling: to be woken by the database takes psycopg 3.2, this is %s %s",
        driver.__name__,
        version,
    )
    return False


class Listener(threading.Thread):
    """Waits for notifications on a connection of its own, and comes back by itself when that is lost.

    A connection that hears nothing gives no error: a pooler that shares connections between transactions (pgbouncer)
    takes the LISTEN and passes nothing on. So each is tried first, by a notification from a second connection.

    :param heard: as for :func:`listening`.
    :param patience: seconds that such a notification may take.
    """

    def __init__(self, alias: str, heard: Callable[[Collection[str]], None], *, patience: float = PATIENCE) -> None:
        super().__init__(name="anymail-retry-listener", daemon=True)
        self.alias = alias
        self.heard = heard
        self.patience = patience
        self._over = threading.Event()
        self._told: str | None = None  # the last that was logged, to log changes only

    def close(self) -> None:
        """End, and wait for that, unless it is the database that lets one wait."""
        self._over.set()
        self.join(timeout=FAREWELL)

    def run(self) -> None:
        failures = 0
        while not self._over.is_set():
            try:
                with self._connection() as connection:
                    raw: Any = connection.connection
                    raw.execute(f"LISTEN {CHANNEL}")
                    while self._arrives(raw):
                        failures = 0
                        self._tell(logging.INFO, "notifications of the database wake this worker")
                        self.heard({ANY})  # what came before was not heard
                        self._listen(raw)
                if self._over.is_set():
                    return
                self._tell(
                    logging.WARNING,
                    "notifications of the database do not arrive, as behind a pooler (pgbouncer) that shares"
                    " connections between transactions; mail is found by polling",
                )
                wait = RECHECK
            except Exception as error:  # whatever it is: polling goes on, and so must this
                self._tell(
                    logging.INFO,
                    "no notifications of the database, mail is found by polling",
                    f": {type(error).__name__}: {first_line(error)}",
                )
                wait = min(RETRY_FIRST * 2.0 ** min(failures, 10), RETRY_MAX)
                failures += 1
            self._over.wait(wait * random.uniform(0.75, 1.25))  # noqa: S311  # keeps workers apart

    def _listen(self, raw: Any) -> None:
        """Until it is time to try the connection again: one that a firewall forgot is silent, too."""
        ends_at = time.monotonic() + RECHECK
        while not self._over.is_set() and time.monotonic() < ends_at:
            names = {notification.payload for notification in raw.notifies(timeout=TURN, stop_after=1)}
            if names:
                self.heard(names)
                self._over.wait(PAUSE)

    def _arrives(self, raw: Any) -> bool:
        """Whether this connection hears what another one says."""
        channel = f"{CHANNEL}_{uuid.uuid4().hex}"  # for nobody else to hear
        raw.execute(f"LISTEN {channel}")
        self._try(channel)
        ends_at = time.monotonic() + self.patience
        while not self._over.is_set() and (left := ends_at - time.monotonic()) > 0:
            heard = list(raw.notifies(timeout=min(left, TURN), stop_after=1))
            if any(notification.channel == channel for notification in heard):
                raw.execute(f"UNLISTEN {channel}")
                return True
        raw.execute("UNLISTEN *")
        return False

    def _try(self, channel: str) -> None:
        with self._connection() as other:
            _notify(other, channel, "")

    @contextmanager
    def _connection(self) -> Iterator[BaseDatabaseWrapper]:
        """A connection that is nobody else's, nor a pool's: it would be missing there."""
        connection = connections[self.alias].copy()
        connection.settings_dict["AUTOCOMMIT"] = True
        connection.settings_dict["OPTIONS"].pop("pool", None)
        try:
            connection.connect()
            yield connection
        finally:
            connection.close()

    def _tell(self, level: int, text: str, details: str = "") -> None:
        if text != self._told:
            self._told = text
            logger.log(level, "%s%s", text, details)
