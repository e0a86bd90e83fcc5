"""Starts the local ESP and the site; then :mod:`outage.run`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import django

from anymail_retry.testing import LocalEsp

from .options import parser


def main() -> int:
    began = time.monotonic()
    options = parser().parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="anymail-retry-demo-", ignore_cleanup_errors=True) as folder,
        LocalEsp.spawn(options.esp) as esp,
    ):
        os.environ.update(
            **esp.environ,
            **esp.settings(),
            DJANGO_SETTINGS_MODULE="outage.settings",
            DEMO_DATABASE=str(Path(folder, "demo.sqlite3")),
            DEMO_DEBUG="0",
            OUTAGE_ESP=options.esp,
        )
        if options.mail_settings:
            os.environ["DEMO_MAIL_SETTINGS"] = options.mail_settings
        if options.log:
            os.environ["OUTAGE_LOG"] = str(Path(options.log).resolve())
        django.setup()
        from .run import run  # needs the site's settings

        rows, judgement = run(
            esp, options.messages, rate=options.rate, threads=options.threads, drains=not options.no_drain
        )
    print(f"{time.monotonic() - began:.0f} s in all.")
    if options.json:
        numbers = {"phases": [asdict(row) for row in rows], "ledger": asdict(judgement)}
        Path(options.json).write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return 0 if judgement.good else 1


if __name__ == "__main__":
    sys.exit(main())
