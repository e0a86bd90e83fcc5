"""``manage.py purge_mail_log DAYS``: delete messages whose life ended some days ago."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from django.core.management.base import CommandError

from ...mailqueue import retention
from ...mailqueue.clock import clock_of
from ...mailqueue.states import TERMINAL, State
from ..progress import Progress
from ..queue_command import QueueCommand, usable_database

RESULTS = {
    "success": (State.SENT, State.CANCELLED),
    "failure": (State.FAILED,),
    "all": TERMINAL,
}


class Command(QueueCommand):
    help = "Delete messages whose life ended at least DAYS days ago, with their history. Never mail that still waits."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("days", type=float, metavar="DAYS")
        parser.add_argument(
            "-r",
            "--result",
            choices=list(RESULTS),
            default="success",
            help="success (the default): what was sent or cancelled; failure: what failed for good; all: both",
        )
        parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")

    def handle(self, *args: Any, **options: Any) -> None:
        alias = usable_database()
        if not 0 <= options["days"] <= 100_000:
            raise CommandError("DAYS should be a number of days, 0 or more.")
        now = clock_of(alias).now()
        states = RESULTS[options["result"]]
        before = now - timedelta(days=options["days"])
        total = retention.count(alias, before=before, states=states) if sys.stderr.isatty() else 0
        deleted = 0
        with Progress("deleting", total) as progress:
            for number in retention.purge(alias, before=before, states=states):
                deleted += number
                progress.show(deleted)
        orphans = retention.delete_orphans(alias, now)
        if options["json"]:
            self.stdout.write(json.dumps({"messages": deleted, "orphans": orphans}))
        elif options["verbosity"] >= 1:
            also = f", and {orphans} orphaned attachments and attempts" if orphans else ""
            self.stdout.write(f"deleted {deleted} message{'' if deleted == 1 else 's'}{also}")
