"""``manage.py retry_deferred``: make deferred mail due now."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from typing import Any

from ...mailqueue import operations
from ...mailqueue.operations import Change
from ...mailqueue.states import State
from ...mailqueue.status import Glance, glance
from ...models import QueuedMessage
from ..queue_command import QueueCommand, chosen_mailers, pauses_for_scripts, usable_database


class Command(QueueCommand):
    help = (
        "Make deferred mail due now, instead of when its delay is over; a worker or send_mail sends it then."
        " Deferred mail becomes due by itself: this is for when you know that the trouble is over."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--failed", action="store_true", help="also mail that failed for good")
        parser.add_argument(
            "--held",
            action="store_true",
            help="also mail that waits for a person; what may have been taken is then sent a second time",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="also end the mailers' pauses, those that a person began included",
        )
        parser.add_argument("--mailer", action="append", metavar="NAME", help="only this mailer's; may be repeated")
        parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")

    def handle(self, *args: Any, **options: Any) -> None:
        alias = usable_database()
        only = chosen_mailers(alias, options["mailer"])
        rows = QueuedMessage.objects.using(alias)
        states = [State.DEFERRED]
        states += [State.FAILED] if options["failed"] else []
        states += [State.HELD] if options["held"] else []
        change = operations.retry_now(rows.all() if only is None else rows.filter(mailer__in=only), states)
        paused = [one for one in glance(only, alias=alias) if one.paused_until is not None]
        resumed = [one.mailer for one in paused if options["resume"] and operations.resume(one.mailer)]
        still_paused = [] if options["resume"] else paused
        if options["json"]:
            pauses = pauses_for_scripts(still_paused)
            due = {"due": change.changed, "being_sent": change.being_sent}
            self.stdout.write(json.dumps({**due, "resumed": resumed, "paused": pauses}))
        elif options["verbosity"] >= 1:
            self._tell(change, states, resumed, [one for one in still_paused if one.is_paused])

    def _tell(self, change: Change, states: list[State], resumed: list[str], paused: list[Glance]) -> None:
        words = "1 message is" if change.changed == 1 else f"{change.changed} messages are"
        sending = f"; {change.being_sent} being sent" if change.being_sent else ""
        self.stdout.write(f"{words} due now ({', '.join(states)}){sending}")
        for mailer in resumed:
            self.stdout.write(f"{mailer}: its pause is ended")
        self.tell_pauses(paused)
        if paused:
            self.stdout.write("--resume ends pauses.")
