"""``manage.py retry_deferred``: make deferred mail due now."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand

from ...mailqueue import operations
from ...mailqueue.states import State
from ...models import QueuedMessage
from ..worker_command import usable_database


class Command(BaseCommand):
    help = (
        "Make deferred mail due now, instead of when its delay is over; a worker or send_mail sends it then."
        " Deferred mail becomes due by itself: this is for when you know that the trouble is over."
    )
    requires_migrations_checks = False

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--failed", action="store_true", help="also mail that failed for good")
        parser.add_argument(
            "--held",
            action="store_true",
            help="also mail that waits for a person; what may have been taken is then sent a second time",
        )
        parser.add_argument("--mailer", action="append", metavar="NAME", help="only this mailer's; may be repeated")
        parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")

    def handle(self, *args: Any, **options: Any) -> None:
        rows = QueuedMessage.objects.using(usable_database())
        chosen = rows.filter(mailer__in=options["mailer"]) if options["mailer"] else rows.all()
        states = [State.DEFERRED]
        states += [State.FAILED] if options["failed"] else []
        states += [State.HELD] if options["held"] else []
        change = operations.retry_now(chosen, states)
        if options["json"]:
            self.stdout.write(json.dumps({"due": change.changed, "being_sent": change.being_sent}))
        elif options["verbosity"] >= 1:
            words = "1 message is" if change.changed == 1 else f"{change.changed} messages are"
            sending = f"; {change.being_sent} being sent" if change.being_sent else ""
            self.stdout.write(f"{words} due now ({', '.join(states)}){sending}")
