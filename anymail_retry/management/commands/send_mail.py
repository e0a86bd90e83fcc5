"""``manage.py send_mail``: send what is due, and end. For cron."""

from __future__ import annotations

import sys
from typing import Any

from ...mailqueue.clock import clock_of
from ...mailqueue.worker import Worker
from ...models import QueuedMessage
from ..progress import Progress
from ..worker_command import WorkerCommand


class Command(WorkerCommand):
    help = "Send the queued mail that is due, until nothing is due any more, and end."

    def handle(self, *args: Any, **options: Any) -> None:
        worker = self.make_worker(options)
        progress = Progress("sending", count_due(worker) if sys.stderr.isatty() else 0)
        worker.on_progress = lambda totals: progress.show(totals.done)
        try:
            self.work(worker, worker.drain, options)
        finally:
            progress.end()


def count_due(worker: Worker) -> int:
    due = QueuedMessage.objects.using(worker.alias).filter(due_at__lte=clock_of(worker.alias).now())
    if worker.only is not None:
        due = due.filter(mailer__in=worker.only)
    return due.count()
