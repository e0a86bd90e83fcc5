"""``manage.py reencrypt_mail_queue``: encrypt what is stored under the first key, so that an old one can be dropped."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections import Counter
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError

from ...mailqueue import reencryption
from ...mailqueue.encryption import cipher
from ...mailqueue.reencryption import Storage
from ..progress import Progress
from ..queue_command import QueueCommand, usable_database


class Command(QueueCommand):
    help = (
        "Encrypt all stored mail under the first of EMAIL_QUEUE_ENCRYPTION_KEYS, and say how much is still plain or"
        " under another key. Workers may run meanwhile; what they are sending is left alone."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="only count")
        parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")

    def handle(self, *args: Any, **options: Any) -> None:
        alias = usable_database()
        try:
            encrypting = cipher()
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        if encrypting is None:
            raise CommandError("EMAIL_QUEUE_ENCRYPTION_KEYS is empty: there is no key to encrypt with.")
        work = reencryption.survey if options["dry_run"] else reencryption.reencrypt
        label = "counting" if options["dry_run"] else "encrypting"
        total: Counter[Storage] = Counter()
        with Progress(label, reencryption.count(alias) if sys.stderr.isatty() else 0) as progress:
            for found in work(alias, encrypting):
                total += found
                progress.show(total.total())
        if options["json"]:
            self.stdout.write(json.dumps({storage.value: total[storage] for storage in Storage}))
        elif options["verbosity"] >= 1:
            self.stdout.write(
                f"encrypted {total[Storage.ENCRYPTED]}, under the first key already {total[Storage.CURRENT]};"
                f" under an old key {total[Storage.OLD_KEY]}, plain {total[Storage.PLAIN]},"
                f" unreadable {total[Storage.UNREADABLE]}"
            )
