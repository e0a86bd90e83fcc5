"""What an outage of the ESP costs a web process: milliseconds per send, and the worker's time lost per minute.

    python benchmarks/outage.py

The ESP is a black hole: it drops what comes, so that every connect hangs until it times out. Three processes meet it
at the same time, each with one thread that calls Django's ``send_mail()`` twenty times a second, as a busy sync worker
does: plain Anymail; ours without a database, with ``EMAIL_BREAKER_FAILURES = 5``; and ours with the queue on SQLite.
Lost is the time beyond 50 ms that each send kept the worker waiting, the probes of the circuit breaker included.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose queue.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, installed or not

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
import types
from typing import Any, NamedTuple

from anymail_retry.testing import LocalEsp, SpawnedEsp

SCENARIOS = {
    "plain": "plain Anymail",
    "breaker": "ours, no database, breaker on",
    "queue": "ours, with the queue on SQLite",
}
#: Seconds between the begins of two sends.
PACE = 0.05
#: Seconds up to which a send is what a send costs.
NORMAL = 0.05


class Send(NamedTuple):
    """One send: when it began, by the outage's clock; how long it took, in seconds; whether the network was asked."""

    began: float
    took: float
    tried: bool


# --- one worker ---


def configure(scenario: str, database: str) -> None:
    settings = types.ModuleType("benchmark_settings")
    backend = "anymail.backends.mandrill" if scenario == "plain" else "anymail_retry.backends.mandrill"
    vars(settings).update(
        SECRET_KEY="benchmark",
        INSTALLED_APPS=["anymail"] + (["anymail_retry"] if scenario == "queue" else []),
        USE_TZ=True,
        ANYMAIL=json.loads(os.environ["OUTAGE_ANYMAIL"]),
        LOGGING={"version": 1, "loggers": {"anymail_retry": {"handlers": [], "level": "CRITICAL", "propagate": False}}},
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": database,
                "OPTIONS": {"transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=WAL;"},
            }
        },
    )
    import django

    if django.VERSION >= (6, 1):
        vars(settings)["MAILERS"] = {"default": {"BACKEND": f"{backend}.EmailBackend"}}
    else:
        vars(settings)["EMAIL_BACKEND"] = f"{backend}.EmailBackend"
    if scenario == "breaker":
        vars(settings)["EMAIL_BREAKER_FAILURES"] = 5
    sys.modules[settings.__name__] = settings
    os.environ["DJANGO_SETTINGS_MODULE"] = settings.__name__
    django.setup()
    if scenario == "queue":
        from django.core.management import call_command

        call_command("migrate", verbosity=0)


def be_a_worker(scenario: str, minutes: float) -> None:
    """Say when ready, wait for the outage, and print what each send took."""
    with tempfile.TemporaryDirectory() as folder:
        configure(scenario, f"{folder}/outage.sqlite3")
        from django.core.mail import EmailMessage

        def send() -> Any:
            message = EmailMessage("Subject", "Body", "from@example.com", ["to@example.com"])
            message.send()
            return message

        for _ in range(20):
            send()
        print("ready", flush=True)
        sys.stdin.readline()
        outage = time.perf_counter()
        sends: list[Send] = []
        while (began := time.perf_counter() - outage) < minutes * 60:
            message = None
            try:
                message = send()
            except Exception as error:
                tried = type(error).__name__ != "CircuitOpen"
            else:
                tried = bool(message.retry_history)
            took = time.perf_counter() - outage - began
            sends.append(Send(began, took, tried))
            time.sleep(max(PACE - took, 0))
        print(json.dumps(sends))


# --- the table ---


def start(scenario: str, minutes: float, esp: SpawnedEsp) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", scenario, "--minutes", str(minutes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **esp.environ, "OUTAGE_ANYMAIL": json.dumps(esp.settings())},
    )


def percentile(values: list[float], percent: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(percent * 10) - 1]


def tell(scenario: str, sends: list[Send], minutes: float) -> dict[str, float]:
    print(SCENARIOS[scenario])
    lost = [0.0] * round(minutes)
    for send in sends:
        # A send's waiting counts for the minutes in which it happens.
        for minute in range(len(lost)):
            begin, end = max(send.began + NORMAL, minute * 60), min(send.began + send.took, minute * 60 + 60)
            lost[minute] += max(end - begin, 0.0)
    print(f"    worker-seconds lost in each minute      {', '.join(f'{seconds:.1f}' for seconds in lost)}")
    figures = {"lost": statistics.mean(lost), "later": statistics.mean(lost[1:] or lost)}
    quick = next((place for place, send in enumerate(sends) if not send.tried), None)
    if scenario == "plain" or quick is None:
        print(f"    sends begun                             {len(sends)}")
        print(f"    seconds per send                        {statistics.median(send.took for send in sends):.1f}")
        return figures
    after = [send.took * 1000 for send in sends[quick:] if not send.tried]
    probes = [send.took for send in sends[quick:] if send.tried]
    figures |= {"p50": percentile(after, 50), "p99": percentile(after, 99)}
    print(f"    breaker open after                      {sends[quick].began:.1f} s, {quick} sends")
    print(f"    sends after that                        {len(after)}")
    print(f"    milliseconds per send                   p50 {figures['p50']:.2f}, p99 {figures['p99']:.2f}")
    print(f"    probes                                  {len(probes)}, {sum(probes):.1f} s in all")
    return figures


def run(minutes: float) -> bool:
    with LocalEsp.spawn("mandrill", keep_bodies=False) as esp:
        workers = {scenario: start(scenario, minutes, esp) for scenario in SCENARIOS}
        for worker in workers.values():
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        esp.black_hole()
        print(f"The ESP drops everything for {minutes:g} minutes; one thread, {1 / PACE:g} sends a second at most\n")
        outputs = {}
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        for scenario, worker in workers.items():
            outputs[scenario], _ = worker.communicate(timeout=minutes * 60 + 120)
    figures = {
        scenario: tell(scenario, [Send(*send) for send in json.loads(output)], minutes)
        for scenario, output in outputs.items()
    }
    print()
    reached = True
    for scenario, limit in (("breaker", 5.0), ("queue", 20.0)):
        for what in ("p50", "p99"):
            value = figures[scenario].get(what, float("inf"))
            reached &= value <= limit
            verdict = "" if value <= limit else "missed"
            print(f"  {SCENARIOS[scenario]}: {what} in ms {value:>20.2f}   <= {limit:g}   {verdict}")
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5, help="of the outage (default: 5)")
    parser.add_argument("--worker", choices=list(SCENARIOS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        be_a_worker(args.worker, args.minutes)
        return 0
    return 0 if run(args.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
