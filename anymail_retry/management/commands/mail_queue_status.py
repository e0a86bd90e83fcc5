"""``manage.py mail_queue_status``: how the queue stands, for people and for monitoring."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ...mailqueue.states import State
from ...mailqueue.status import Glance, MailerStatus, glance, status
from ..queue_command import QueueCommand, chosen_mailers, duration, usable_database
from ..worker_command import positive

#: States with a column of their own: what waits, and what a person may have to look at.
SHOWN = (State.QUEUED, State.DEFERRED, State.SENDING, State.HELD, State.FAILED)


class Command(QueueCommand):
    """Counting the rows of each state reads the whole table, because no index tells states apart. That is for a person
    who asks now and then. Monitoring asks every minute, and only how late the mail is: so ``--max-age`` counts
    nothing, and reads a few entries of the index for each mailer."""

    help = (
        "Say for each mailer how many messages are in which state, for how long the oldest due one has been due, when"
        " the next will be due, how many leases have ended, and whether it pauses. With --max-age only how late the"
        " mail is, which is cheap at any size of the queue, and exit with 1 if that is too late."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--mailer", action="append", metavar="NAME", help="only this mailer's; may be repeated")
        parser.add_argument(
            "--max-age",
            type=positive(float),
            metavar="SECONDS",
            help="count nothing, and exit with 1 if a message has been due for longer than this, else with 0",
        )
        parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")

    def handle(self, *args: Any, **options: Any) -> None:
        alias = usable_database()
        only = chosen_mailers(alias, options["mailer"])
        max_age = options["max_age"]
        if max_age is None:
            counted = status(only, alias=alias)
            if not options["json"] and options["verbosity"] >= 1:
                self._tell(counted)
            found: Sequence[Glance] = counted
        else:
            found = glance(only, alias=alias)
            if not options["json"] and options["verbosity"] >= 1:
                self._tell_lateness(found, max_age)
        if options["json"]:
            self.stdout.write(json.dumps(for_scripts(found), default=datetime.isoformat))
        if max_age is not None and lateness(found) > max_age:
            sys.exit(1)

    def _tell(self, found: Sequence[MailerStatus]) -> None:
        if not found:
            self.stdout.write("The queue is empty, and no mailer pauses.")
            return
        head = ["mailer", *SHOWN, "due", "oldest due", "next due in", "lease ended"]
        for line in table([head, *map(cells, found)]):
            self.stdout.write(line)
        self.tell_pauses(one for one in found if one.paused_until is not None)

    def _tell_lateness(self, found: Sequence[Glance], max_age: float) -> None:
        oldest = max(found, key=lambda one: one.oldest_due_seconds, default=None)
        if oldest is None or oldest.oldest_due_at is None:
            self.stdout.write("No mail is due.")
        else:
            words = f"The oldest due mail has been due for {duration(oldest.oldest_due_seconds)} ({oldest.mailer})"
            if oldest.oldest_due_seconds > max_age:
                self.stdout.write(self.style.ERROR(f"{words}: longer than {max_age:g} s."))
            else:
                self.stdout.write(f"{words}.")
        self.tell_pauses(one for one in found if one.paused_until is not None)


def lateness(found: Sequence[Glance]) -> float:
    """For how many seconds the oldest due mail of all has been due; 0: none is."""
    return max((one.oldest_due_seconds for one in found), default=0.0)


def cells(one: MailerStatus) -> list[str]:
    return [
        one.mailer,
        *(str(one.counts[state]) for state in SHOWN),
        str(one.due),
        "-" if one.oldest_due_at is None else duration(one.oldest_due_seconds),
        "-" if one.next_due_at is None else duration((one.next_due_at - one.read_at).total_seconds()),
        str(one.lease_ended),
    ]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others, which are numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def for_scripts(found: Sequence[Glance]) -> dict[str, Any]:
    mailers = {
        one.mailer: {
            **{name: value for name, value in vars(one).items() if name != "mailer"},
            "oldest_due_seconds": round(one.oldest_due_seconds, 3),
        }
        for one in found
    }
    return {"oldest_due_seconds": round(lateness(found), 3), "mailers": mailers}
