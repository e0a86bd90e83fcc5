"""The demo's command line. Read before its environment exists, so it imports nothing that has to be installed."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="demo.py",
        description="Send mail through an outage of a local ESP, drain the queue, and compare with the ESP's ledger.",
        epilog="Exit status: 0 if every message was delivered unaltered and every duplicate is explained, else 1.",
    )
    result.add_argument(
        "--messages",
        type=_at_least(4, ", one for each phase"),
        default=300,
        metavar="N",
        help="how many (default: 300)",
    )
    result.add_argument(
        "--esp",
        choices=["mandrill", "resend"],
        default="mandrill",
        help="mandrill has no idempotency keys; resend has them, so nothing arrives twice (default: mandrill)",
    )
    result.add_argument(
        "--mail-settings",
        choices=["legacy", "mailers"],
        help="EMAIL_BACKEND, or MAILERS (Django 6.1 and later); default: mailers where Django has it",
    )
    result.add_argument("--rate", type=_at_least(1), default=30, metavar="N", help="messages per second (default: 30)")
    result.add_argument("--threads", type=_at_least(1), default=8, metavar="N", help="of the web server (default: 8)")
    result.add_argument("--no-drain", action="store_true", help="leave the queue as it is, and what waits undelivered")
    result.add_argument("--json", metavar="FILE", help="write the numbers there too")
    result.add_argument("--log", metavar="FILE", help="append there what the site logs")
    result.add_argument("--no-venv", action="store_true", help="run in the Python at hand, which has all it needs")
    return result


def _at_least(least: int, why: str = "") -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"at least {least}{why}")
        return value

    return number
