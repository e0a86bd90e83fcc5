"""``manage.py runmailer``: send queued mail as it becomes due, until stopped. For a process supervisor."""

from __future__ import annotations

from typing import Any

from ..worker_command import WorkerCommand


class Command(WorkerCommand):
    help = (
        "Send queued mail as it becomes due, until stopped. SIGTERM or Ctrl-C: what is being sent is finished, the"
        " rest given back; a second time: at once. -v 2 prints what it does."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        worker = self.make_worker(options)
        if options["verbosity"] >= 1 and not options["json"]:
            mailers = ", ".join(worker.only) if worker.only else "every mailer"
            self.stdout.write(
                f"Sending the mail of {mailers} with {worker.threads} threads,"
                f" looking for more every {worker.poll:g} s. Stop with Ctrl-C."
            )
            self.stdout.flush()
        self.work(worker, worker.run, options)
