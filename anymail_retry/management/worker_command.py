"""What the commands that send have in common: arguments, signals and what they print."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import Error as DatabaseError
from django.db import connections
from django.utils.connection import ConnectionDoesNotExist

from ..mailqueue.database import queue_database
from ..mailqueue.watchdog import Watchdog
from ..mailqueue.worker import Totals, Worker
from ..models import MailerState, QueuedMessage


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


class WorkerCommand(BaseCommand):
    """A command that runs a worker."""

    requires_migrations_checks = False  # usable_database() says it better

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--mailer",
            action="append",
            metavar="NAME",
            help="send only this mailer's mail (a MAILERS alias, or the dotted path of a back end); may be repeated",
        )
        parser.add_argument(
            "--threads", type=_positive(int), help="send so many messages at a time (EMAIL_QUEUE_THREADS)"
        )
        parser.add_argument("--limit", type=_positive(int), help="end after so many messages")
        parser.add_argument("--max-time", type=_positive(float), metavar="SECONDS", help="end after so many seconds")
        parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")
        parser.add_argument(
            "--exit-code", action="store_true", help="exit with 1 if a message failed or is held, else with 0"
        )

    def make_worker(self, options: dict[str, Any]) -> Worker:
        alias = usable_database()
        try:
            return Worker(
                alias=alias,
                only=options["mailer"],
                threads=options["threads"],
                limit=options["limit"],
                max_time=options["max_time"],
            )
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error

    def work(self, worker: Worker, run: Callable[[], Totals], options: dict[str, Any]) -> None:
        """Run the worker, and say at the end what it did."""
        began = time.monotonic()
        try:
            with self._logging(options["verbosity"]), stopped_by_signals(worker), Watchdog(worker):
                totals = run()
        except DatabaseError as error:
            raise CommandError(f"The database failed: {str(error).strip()}") from error
        self.tell(worker, totals, time.monotonic() - began, options)
        if worker.was_interrupted or (options["exit_code"] and (totals.failed or totals.held)):
            sys.exit(1)

    def tell(self, worker: Worker, totals: Totals, seconds: float, options: dict[str, Any]) -> None:
        paused = [
            state
            for state in MailerState.objects.using(worker.alias).exclude(paused_until=None)
            if worker.only is None or state.alias in worker.only
        ]
        if options["json"]:
            pauses = {
                state.alias: {"until": state.paused_until.isoformat(), "reason": state.pause_reason}
                for state in paused
                if state.paused_until
            }
            self.stdout.write(json.dumps({**vars(totals), "seconds": round(seconds, 3), "paused": pauses}))
            return
        if options["verbosity"] < 1:
            return
        self.stdout.write(summary(totals, seconds))
        for state in paused:
            self.stdout.write(
                self.style.WARNING(
                    f"{state.alias} pauses until {state.paused_until:%Y-%m-%d %H:%M:%S} UTC: {state.pause_reason}"
                )
            )

    @contextmanager
    def _logging(self, verbosity: int) -> Iterator[None]:
        """With ``-v 2``, what the worker does, on standard output."""
        if verbosity < 2:
            yield
            return
        logger = logging.getLogger("anymail_retry")
        handler = logging.StreamHandler(self.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if verbosity == 2 else logging.DEBUG)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def summary(totals: Totals, seconds: float) -> str:
    """``sent 212, deferred 3, failed 1, held 0 in 4.2 s``"""
    parts = [f"sent {totals.sent}", f"deferred {totals.deferred}", f"failed {totals.failed}", f"held {totals.held}"]
    if totals.cancelled:
        parts.append(f"cancelled {totals.cancelled}")
    return f"{', '.join(parts)} in {seconds:.1f} s"


@contextmanager
def stopped_by_signals(worker: Worker) -> Iterator[None]:
    """SIGTERM and SIGINT have the worker finish what it is sending, and give back the rest; the second time it does not
    wait for what is being sent; the third time they do what they did before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        worker.stop()
        if worker.was_interrupted:
            signal.signal(signum, before[signal.Signals(signum)])  # the third time it is not asked any more

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its error
    return parse
