"""Ending a process whose database does not answer any more, because nothing else can."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from ..log import get_logger
from .worker import Worker

logger = get_logger("queue")

#: sysexits.h: try again later. What supervises the process starts it anew.
EX_TEMPFAIL = 75


def end_process(reason: str) -> None:
    """Say why, and end at once: the thread that waits for the database cannot be interrupted."""
    logger.critical("%s", reason)
    os._exit(EX_TEMPFAIL)


class Watchdog(threading.Thread):
    """Watches a worker, for as long as the context lasts.

    A connection through a firewall that forgot it answers nothing, not even an error. The worker's rows are taken
    over by others when their leases end; what remains is a process that looks alive.

    :param after: seconds in one piece of database work; default two leases.
    :param bark: called once, in this thread.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        after: float | None = None,
        interval: float = 1.0,
        bark: Callable[[str], None] = end_process,
    ) -> None:
        super().__init__(name="anymail-retry-watchdog", daemon=True)
        self.worker = worker
        self.after = 2 * worker.lease if after is None else after
        self.interval = interval
        self.bark = bark
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(self.interval):
            since = self.worker.in_database_since
            if since is not None and self.worker.steady() - since > self.after:
                self.bark(f"the database has not answered for {self.after:g} s; this worker ends")
                return

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
