"""``manage.py send_mail``: send what is due, and end. For cron."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from ...mailqueue.clock import clock_of
from ...mailqueue.worker import Totals, Worker
from ...models import QueuedMessage
from ..progress import Progress
from ..worker_command import WorkerCommand


class Command(WorkerCommand):
    help = (
        "Send the queued mail that is due, until nothing is due any more, and end. Prints nothing where nothing was"
        " done, unless on a terminal or with -v 2; -v 2 also prints what it does."
    )
    is_silent_when_idle = True

    def handle(self, *args: Any, **options: Any) -> None:
        worker = self.make_worker(options)
        has_bar = options["verbosity"] == 1 and sys.stderr.isatty()  # log lines would run into it
        self.work(worker, partial(drain_with_bar, worker) if has_bar else worker.drain, options)


def drain_with_bar(worker: Worker) -> Totals:
    with Progress("sending", count_due(worker)) as progress:
        worker.on_progress = lambda totals: progress.show(totals.done)
        return worker.drain()


def count_due(worker: Worker) -> int:
    due = QueuedMessage.objects.using(worker.alias).filter(due_at__lte=clock_of(worker.alias).now())
    if worker.only is not None:
        due = due.filter(mailer__in=worker.only)
    return due.count()
