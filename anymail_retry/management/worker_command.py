"""What the commands that send have in common: arguments, signals and what they print."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError, OutputWrapper

from ..mailqueue.status import COUNTED, Glance, Remaining, glance, remaining
from ..mailqueue.watchdog import EX_TEMPFAIL, Watchdog
from ..mailqueue.worker import Totals, Worker, WorkerStuck
from .queue_command import QueueCommand, chosen_mailers, duration, pauses_for_scripts, usable_database


class WorkerCommand(QueueCommand):
    """A command that runs a worker."""

    #: Print nothing where nothing was done, unless somebody watches: cron mails each line that is printed.
    is_silent_when_idle = False

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--mailer",
            action="append",
            metavar="NAME",
            help="send only this mailer's mail (a MAILERS alias, or the dotted path of a back end); may be repeated",
        )
        parser.add_argument(
            "--threads", type=positive(int), help="send so many messages at a time (EMAIL_QUEUE_THREADS)"
        )
        parser.add_argument("--limit", type=positive(int), help="end after so many messages")
        parser.add_argument("--max-time", type=positive(float), metavar="SECONDS", help="end after so many seconds")
        parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")
        parser.add_argument(
            "--exit-code",
            action="store_true",
            help="exit with 1 if this command brought a message to failed or held, else with 0; a mailer that pauses"
            " does not count (mail_queue_status --max-age does)",
        )

    def make_worker(self, options: dict[str, Any]) -> Worker:
        alias = usable_database()
        try:
            return Worker(
                alias=alias,
                only=chosen_mailers(alias, options["mailer"]),
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
            with self._logging(options), stopped_by_signals(worker), Watchdog(worker):
                totals = run()
        except WorkerStuck as error:
            raise CommandError(f"{error}: start it anew.", returncode=EX_TEMPFAIL) from error
        self.tell(worker, totals, time.monotonic() - began, options)
        if worker.was_interrupted or (options["exit_code"] and (totals.failed or totals.held)):
            sys.exit(1)

    def tell(self, worker: Worker, totals: Totals, seconds: float, options: dict[str, Any]) -> None:
        if not (options["json"] or options["verbosity"]):
            return
        found = glance(worker.only, alias=worker.alias)
        if not options["json"] and options["verbosity"] == 1 and not self._is_worth_a_line(totals, found):
            return
        left = remaining(worker.only, alias=worker.alias)
        if options["json"]:
            done = {**vars(totals), "seconds": round(seconds, 3), "paused": pauses_for_scripts(found)}
            self.stdout.write(json.dumps({**done, **for_scripts(left)}))
            return
        self.stdout.write(f"{summary(totals, seconds)}; {what_remains(left)}")
        self.tell_pauses(one for one in found if one.paused_until is not None)

    def _is_worth_a_line(self, totals: Totals, found: Iterable[Glance]) -> bool:
        if not self.is_silent_when_idle or totals.done or any(one.is_paused for one in found):
            return True
        return self.stdout.isatty()

    @contextmanager
    def _logging(self, options: dict[str, Any]) -> Iterator[None]:
        """With ``-v 2``, what the worker does: on standard output, or on standard error if that is for JSON."""
        if options["verbosity"] < 2:
            yield
            return
        logger = logging.getLogger("anymail_retry")
        handler = LogLines(self.stderr if options["json"] else self.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if options["verbosity"] == 2 else logging.DEBUG)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


class LogLines(logging.Handler):
    """Prints log lines by way of a command, and not in the colour that its errors have."""

    def __init__(self, out: OutputWrapper) -> None:
        super().__init__()
        self.out = out

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.out.write(self.format(record), style_func=str)
            self.out.flush()
        except Exception:
            self.handleError(record)


def summary(totals: Totals, seconds: float) -> str:
    """``sent 212, deferred 3, failed 1, held 0 in 4.2 s``"""
    parts = [f"sent {totals.sent}", f"deferred {totals.deferred}", f"failed {totals.failed}", f"held {totals.held}"]
    if totals.cancelled:
        parts.append(f"cancelled {totals.cancelled}")
    return f"{', '.join(parts)} in {seconds:.1f} s"


def what_remains(left: Remaining) -> str:
    """``23 wait, the next is due in 40 s; 3 are being sent by others``"""
    words = "nothing waits"
    if left.waiting:
        number = f"{left.waiting:,}" if left.is_exact else f"more than {(left.waiting - 1) // 1000 * 1000:,}"
        words = f"{number} {'waits' if left.waiting == 1 else 'wait'}"
        if left.due == left.waiting:
            words += ", due now"
        elif left.due:
            words += f", {left.due if left.due <= COUNTED else 'many'} of them due now"
        elif left.next_due_at is not None:
            words += f", the next is due in {duration((left.next_due_at - left.read_at).total_seconds())}"
    if left.being_sent:
        words += f"; {left.being_sent} {'is' if left.being_sent == 1 else 'are'} being sent by others"
    return words


def for_scripts(left: Remaining) -> dict[str, Any]:
    return {
        "waiting": left.waiting,
        "due": left.due,
        "being_sent": left.being_sent,
        "next_due_at": left.next_due_at.isoformat() if left.next_due_at else None,
        "exact": left.is_exact,
    }


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


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:  # nor "nan"
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its error
    return parse
