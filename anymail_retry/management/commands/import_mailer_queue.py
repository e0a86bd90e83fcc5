"""``manage.py import_mailer_queue``: take over the pending mail of django-mailer or django-post_office."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import CommandError
from django.db import Error as DatabaseError

from ...mailqueue import importing
from ..progress import Progress
from ..queue_command import QueueCommand, usable_database

#: Ids printed for one reason; ``--json`` has them all.
IDS_SHOWN = 20


class Command(QueueCommand):
    help = (
        "Take over the mail that waits in an installed django-mailer or django-post_office: each message becomes one of"
        " ours and is deleted there, in one transaction. What cannot be taken stays where it is. Can be run again."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--from",
            dest="source",
            choices=list(importing.SOURCES),
            help="whose mail; default: that of each which is installed",
        )
        parser.add_argument(
            "--mailer",
            metavar="NAME",
            help="the mailer that is to send it (a MAILERS alias, or the dotted path of a back end); default: the"
            " site's, and for post_office the one of each message's backend alias",
        )
        parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
        parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")
        parser.add_argument("--exit-code", action="store_true", help="exit with 1 if a message was left, else with 0")

    def handle(self, *args: Any, **options: Any) -> None:
        usable_database()
        reports: dict[str, importing.Report] = {}
        try:
            names = [options["source"]] if options["source"] else importing.installed()
            sources = [importing.SOURCES[name](options["mailer"]) for name in names]
            for source in sources:
                reports[source.app] = self._take_over(source, dry_run=options["dry_run"])
        except importing.CannotImport as error:
            raise CommandError(str(error)) from error
        except DatabaseError as error:
            raise CommandError(f"The database failed: {str(error).strip()}. Run it again.") from error
        if options["json"]:
            self.stdout.write(json.dumps({name: vars(report) for name, report in reports.items()}))
        elif options["verbosity"] >= 1:
            for source in sources:
                self._tell(source, reports[source.app], dry_run=options["dry_run"])
        if options["exit_code"] and any(report.left for report in reports.values()):
            sys.exit(1)

    def _take_over(self, source: importing.Source, *, dry_run: bool) -> importing.Report:
        pending = source.pending().count() if sys.stderr.isatty() else 0
        with Progress(f"importing from {source.app}", pending) as progress:
            return importing.take_over(source, dry_run=dry_run, progress=progress.show)

    def _tell(self, source: importing.Source, report: importing.Report, *, dry_run: bool) -> None:
        verbs = "would take {}, leave {}" if dry_run else "took {}, left {}"
        self.stdout.write(f"{source.package}: {verbs.format(report.taken, len(report.left))}")
        reasons: dict[str, list[int]] = {}
        for pk, reason in report.left.items():
            reasons.setdefault(reason, []).append(pk)
        for reason, ids in reasons.items():
            shown = ", ".join(map(str, ids[:IDS_SHOWN])) + (", ..." if len(ids) > IDS_SHOWN else "")
            self.stdout.write(self.style.WARNING(f"  left {len(ids)} ({shown}): {reason}"))
        if report.left_out:
            ids_ = ", ".join(map(str, list(report.left_out)[:IDS_SHOWN]))
            number = sum(report.left_out.values())
            self.stdout.write(
                self.style.WARNING(f"  left out {number} recipients on the don't-send list, of message {ids_}")
            )
