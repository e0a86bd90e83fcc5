"""The outage: four phases of sending, then the queue is drained."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anymail
import django
from anymail.exceptions import AnymailError
from django.conf import settings
from django.core.management import call_command
from django.db.models import Count, Min
from django.utils import timezone

from anymail_retry import conf
from anymail_retry.models import Attempt, QueuedMessage, State
from anymail_retry.testing import ScriptedEsp
from anymail_retry.transport import breaker

from . import messages, phases, report

MANAGE = Path(__file__).resolve().parent.parent / "manage.py"
#: How often ``send_mail`` is called before what is left counts as unfinished.
DRAINS = 10
#: How long the circuit breaker stays open before it lets one message try.
BREAKER_RESET = 1.0
#: What outage.settings shortens, with the default where it is not ours.
SHORTENED = {
    "EMAIL_RETRY_BACKOFF_FACTOR": None,
    "EMAIL_RETRY_BACKOFF_JITTER": None,
    "EMAIL_QUEUE_BACKOFF": None,
    "ANYMAIL_REQUESTS_TIMEOUT": 30,
}


def run(
    esp: ScriptedEsp, count: int, *, rate: int, threads: int, drains: bool = True
) -> tuple[list[report.Row], report.Judgement]:
    """Send so many messages, drain, and print what came of it."""
    name = esp.provider.name
    _introduce(esp, count, rate, threads)
    call_command("migrate", verbosity=0)

    rows: list[report.Row] = []
    bodies: dict[str, Any] = {}
    for number, phase in enumerate(phases.PHASES):
        share = count * (number + 1) // len(phases.PHASES) - count * number // len(phases.PHASES)
        items = list(messages.items(esp.esp, phase.name, share))
        bodies.update({item.marker: item.body for item in items})
        phase.begin(esp, [item.marker for item in items])
        began = time.monotonic()
        with _progress(f"{phase.name}: {name} {phase.what}", share) as done:
            sends = _send_all(items, rate, threads, done)
        rows.append(report.Row.of(phase.name, phase.what, sends, time.monotonic() - began))

    esp.script()
    if drains:
        rows.append(_drain())
    judgement = report.judge(bodies, esp.ledger, esp.requests)
    judgement.waiting = _unfinished()
    print(f"\n{report.table(rows)}\n{report.footnote(rows)}")
    keys = esp.provider.keys is not None
    print(report.verdict(judgement, name, has_keys=keys, on_ambiguous=conf.get("QUEUE_ON_AMBIGUOUS")))
    print("\nNothing was lost, ", end="") if judgement.good else print("\nNOT AS IT SHOULD BE, ", end="")
    return rows, judgement


def _introduce(esp: ScriptedEsp, count: int, rate: int, threads: int) -> None:
    mailers = getattr(settings, "MAILERS", None)
    backend = mailers["default"]["BACKEND"] if mailers else settings.EMAIL_BACKEND
    print(
        f"{count} messages, {rate} a second from {threads} threads of a web process, to a local {esp.provider.name}"
        f" at {esp.origin}.\n"
        f"Python {platform.python_version()}, Django {django.get_version()}, Anymail {anymail.__version__},"
        f' {"MAILERS" if mailers else "EMAIL_BACKEND"}: "{backend}"'
    )
    print("Shortened for the demo:")
    for name, default in SHORTENED.items():
        usual = conf.SETTINGS[name.removeprefix("EMAIL_")].default if default is None else default
        print(f"  {name} = {getattr(settings, name):g}  (default: {usual:g})")
    # Not a setting, so it is changed here.
    print(f"  the circuit breaker's first reset, in seconds = {BREAKER_RESET:g}  (default: {breaker.RESET_FIRST:g})\n")
    breaker.RESET_FIRST = BREAKER_RESET


@contextmanager
def _progress(title: str, count: int) -> Iterator[Callable[[int], None]]:
    """Prints the title, a dot for each tenth that is done, and the time it took."""
    print(f"{title:<42} ", end="", flush=True)
    began, dots = time.monotonic(), 0

    def done(number: int) -> None:
        nonlocal dots
        due = number * 10 // count
        print("." * (due - dots), end="", flush=True)
        dots = due

    try:
        yield done
    finally:
        print(f" {time.monotonic() - began:.1f} s", flush=True)


def _send_all(
    items: Sequence[messages.Item], rate: int, threads: int, done: Callable[[int], None]
) -> list[report.Send]:
    began = time.monotonic()
    sends = []
    with ThreadPoolExecutor(threads) as pool:
        for number, item in enumerate(items):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            sends.append(pool.submit(_send, item))
            done(number + 1)
    return [send.result() for send in sends]


def _send(item: messages.Item) -> report.Send:
    message = item.message
    began = time.perf_counter()
    with item.in_its_language():
        try:
            message.send()
        except AnymailError as error:
            result = type(error).__name__
        else:
            result = "sent" if getattr(message, "queued_message", None) is None else "queued"
    milliseconds = (time.perf_counter() - began) * 1000
    return report.Send(item.marker, result, len(message.retry_history), milliseconds)


def _drain() -> report.Row:
    """Call ``manage.py send_mail``, as cron would, until nothing waits."""
    waiting = QueuedMessage.objects.exclude(due_at=None).count()
    began = time.monotonic()
    with _progress(f"drain: manage.py send_mail, {waiting} queued", 1) as done:
        for _ in range(DRAINS):
            due_at = QueuedMessage.objects.aggregate(Min("due_at"))["due_at__min"]
            if due_at is None:
                break
            time.sleep(max(0.0, (due_at - timezone.now()).total_seconds()))
            _manage("send_mail")
        done(1)
    return report.Row(
        "drain",
        "answers",
        messages=0,
        sent=QueuedMessage.objects.filter(state=State.SENT).count(),
        queued=0,
        raised=0,
        tries=Attempt.objects.exclude(worker="").count(),  # the first of each is the direct send's
        median=None,
        p95=None,
        seconds=time.monotonic() - began,
    )


def _manage(*arguments: str) -> None:
    command = [sys.executable, str(MANAGE), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        sys.exit(f"\n{' '.join(command)} failed:\n{result.stdout}")


def _unfinished() -> dict[str, int]:
    """How many rows are not sent, by state and reason."""
    rows = QueuedMessage.objects.exclude(state=State.SENT)
    counts = rows.values_list("state", "reason").annotate(Count("pk"))
    return {f"{state} ({reason})": count for state, reason, count in counts}
