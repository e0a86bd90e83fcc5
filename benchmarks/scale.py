"""What a long queue costs: a million rows that wait, large messages, one attachment many times.

    python benchmarks/scale.py

For each database one of its own, which is dropped at the end. In full size that takes up to 4 GB of disk, and some
minutes each; ``--waiting``, ``--large`` and ``--alike`` scale it down. What is not running is skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose queue.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, installed or not

import argparse
import json
import os
import random
import resource
import signal
import statistics
import string
import subprocess
import time
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from anymail_retry.testing import LocalEsp, SpawnedEsp
from benchmarks.databases import KINDS, Unavailable, temporary

OURS = "anymail_retry.backends.mandrill.EmailBackend"

#: Rows of one claim, and claims of the short queue before it is made anew.
ROWS, CLAIMS = 100, 8

#: Copies of a row in one statement: SQLite takes 500 SELECTs in one.
COPIES = 400


# --- rows, quickly ---


def configure(database: dict[str, Any], anymail: dict[str, Any]) -> None:
    settings = types.ModuleType("benchmark_settings")
    vars(settings).update(
        SECRET_KEY="benchmark",
        INSTALLED_APPS=["anymail", "anymail_retry"],
        USE_TZ=True,
        EMAIL_BACKEND="anymail_retry.backends.queued.EmailBackend",
        EMAIL_QUEUE_BACKEND=OURS,
        LOGGING_CONFIG=None,
        ANYMAIL=anymail,
        DATABASES={"default": database},
    )
    sys.modules[settings.__name__] = settings
    os.environ["DJANGO_SETTINGS_MODULE"] = settings.__name__
    warnings.simplefilter("ignore")  # Django 6.1's about EMAIL_BACKEND
    import django

    django.setup()


def execute(*statements: str) -> Any:
    from django.db import connection

    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchone() if cursor.description else None


def empty() -> None:
    from anymail_retry.models import AttachmentBody, Attempt, MessageAttachment, MessageContent, QueuedMessage

    tables = [
        model._meta.db_table for model in (Attempt, MessageAttachment, MessageContent, AttachmentBody, QueuedMessage)
    ]
    from django.db import connection

    if connection.vendor == "postgresql":
        execute(f"TRUNCATE {', '.join(tables)} CASCADE")
    elif connection.vendor == "mysql":
        truncated = [f"TRUNCATE {table}" for table in tables]
        execute("SET FOREIGN_KEY_CHECKS = 0", *truncated, "SET FOREIGN_KEY_CHECKS = 1")
    else:
        execute(*(f"DELETE FROM {table}" for table in tables))


def copy(times: int, *, by: str = "id") -> None:
    """Have every message that there is, with its content, so many times; the database does it by itself.

    :param by: the column that says in which order the copies come to lie in the table.
    """
    from django.db import connection

    from anymail_retry.models import MessageContent, QueuedMessage

    quote, table = connection.ops.quote_name, QueuedMessage._meta.db_table
    columns = ", ".join(quote(field.column) for field in QueuedMessage._meta.concrete_fields if not field.primary_key)
    content = MessageContent._meta.db_table
    last = execute(f"SELECT MAX(id) FROM {table}")[0]
    for first in range(1, times, COPIES):
        numbers = range(first, min(first + COPIES, times))
        again = " UNION ALL ".join(f"SELECT {number} AS number" for number in numbers)
        source = f"{table} CROSS JOIN ({again}) AS again"
        order = by if by == "due_at" else f"number, {by}"
        execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {source} WHERE id <= {last} ORDER BY {order}")
    # The content of a copy is that of any original.
    execute(
        f"INSERT INTO {content} (message_id, payload)"
        f" SELECT id, (SELECT payload FROM {content} WHERE message_id = {last}) FROM {table} WHERE id > {last}"
    )


def fill(waiting: int, *, shuffled: bool = True) -> None:
    """So many due messages of three priorities, as many that are not due yet, and half as many of a paused mailer.

    :param shuffled: no two that fall due after one another lie near one another, as after an outage of hours. Else they
        lie in the order in which they fall due, as mail that is queued first does.
    """
    from anymail_retry.mailqueue.clock import clock_of
    from anymail_retry.models import MessageContent, QueuedMessage

    empty()
    seeds = min(waiting, 10_000)
    now, rng = clock_of("default").now(), random.Random(1)  # the same rows each time

    def row(mailer: str, sign: int) -> QueuedMessage:
        due_at = now + sign * timedelta(seconds=rng.uniform(3600, 86400))
        return QueuedMessage(
            mailer=mailer, priority=rng.randint(1, 3), state="queued", origin="queued", created_at=now,
            due_at=due_at, size=200, key="0" * 36, subject="Your receipt", recipients="to@example.com",
        )  # fmt: skip

    rows = [row("main", -1) for _ in range(seeds)] + [row("main", 1) for _ in range(seeds)]
    rows += [row("paused", -1) for _ in range(seeds // 2)]
    if shuffled:
        rng.shuffle(rows)
    else:
        rows.sort(key=lambda row: row.due_at)
    for start in range(0, len(rows), 1000):
        QueuedMessage.objects.bulk_create(rows[start : start + 1000])
    contents = [
        MessageContent(message_id=pk, payload="x" * 200) for pk in QueuedMessage.objects.values_list("pk", flat=True)
    ]
    MessageContent.objects.bulk_create(contents, batch_size=1000)
    copy(waiting // seeds, by="id" if shuffled else "due_at")
    tidy()


def tidy() -> None:
    """As autovacuum leaves it."""
    from django.db import connection

    from anymail_retry.models import MessageContent, QueuedMessage

    tables = QueuedMessage._meta.db_table, MessageContent._meta.db_table
    if connection.vendor == "postgresql":
        execute(*(f"VACUUM ANALYZE {table}" for table in tables), "CHECKPOINT")
    elif connection.vendor == "mysql":
        execute(*(f"ANALYZE TABLE {table}" for table in tables))
    else:
        execute("ANALYZE", "PRAGMA wal_checkpoint(TRUNCATE)")


# --- claims ---


def claim(claimer: Any) -> tuple[float, list[Any]]:
    """Milliseconds, and the jobs."""
    from anymail_retry.mailqueue.claim import Wanted
    from anymail_retry.mailqueue.schedule import Policy

    began = time.perf_counter()
    jobs = claimer.claim("main", Wanted(rows=ROWS, size=32 << 20, at_once=20), Policy()).jobs
    taken = (time.perf_counter() - began) * 1000
    assert len(jobs) == ROWS, f"{len(jobs)} claimed"
    return taken, jobs


def new_claimer() -> Any:
    from anymail_retry.mailqueue.claim import Claimer
    from anymail_retry.mailqueue.clock import clock_of

    return Claimer("default", clock_of("default"), lease=3600)


def of_a_thousand() -> list[float]:
    from anymail_retry.mailqueue.claim import mailers_with_rows

    fill(1000)
    claimer = new_claimer()
    mailers_with_rows("default")  # connects
    return [claim(claimer)[0] for _ in range(CLAIMS)]


@contextmanager
def open_snapshot() -> Iterator[None]:
    """Somebody else's transaction that has read and does not end: a report, a dump."""
    from django.db import connection

    from anymail_retry.models import QueuedMessage

    begin = {
        "postgresql": ["BEGIN ISOLATION LEVEL REPEATABLE READ"],
        # Under READ COMMITTED, which Django asks for, there would be no snapshot.
        "mysql": ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "START TRANSACTION WITH CONSISTENT SNAPSHOT"],
        "sqlite": ["BEGIN DEFERRED"],
    }
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            for statement in begin[connection.vendor]:
                cursor.execute(statement)
            cursor.execute(f"SELECT MIN(id) FROM {QueuedMessage._meta.db_table}")
            cursor.fetchall()
            yield
            cursor.execute("ROLLBACK")
    finally:
        other.close()


def sent_beside_a_snapshot(waiting: int, claims: int) -> list[float]:
    """Milliseconds of each claim, where what one has claimed is sent before the next."""
    from anymail_retry.mailqueue.clock import steady
    from anymail_retry.mailqueue.settle import Settler

    fill(waiting, shuffled=False)
    settler = Settler("default", worker="benchmark", keep_content=False, steady=steady)
    claimer, times = new_claimer(), []
    with open_snapshot():
        for _ in range(claims):
            taken, jobs = claim(claimer)
            times.append(taken)
            settle(settler, claimer, jobs)
    return times


def settle(settler: Any, claimer: Any, jobs: list[Any]) -> None:
    from anymail_retry.mailqueue.schedule import Fate
    from anymail_retry.mailqueue.settle import Result
    from anymail_retry.mailqueue.states import State
    from anymail_retry.verdict import Outcome, Verdict

    now = claimer.clock.now()
    outcome = Outcome(Verdict.DELIVERED, "")
    settler.settle([Result(job, Fate(State.SENT, ""), outcome, now, 0.05) for job in jobs], now)


def measure_claims(args: argparse.Namespace) -> bool:
    from anymail_retry.mailqueue.claim import mailers_with_rows

    short = [taken for _ in range(4) for taken in of_a_thousand()]
    base = statistics.median(short)
    print(f"    claim of {ROWS}, 1,000 waiting: {base:.2f} ms")
    fill(args.waiting)
    worst = statistics.median(claim(new_claimer())[0] for _ in range(CLAIMS))
    began = time.perf_counter()
    fill(args.waiting, shuffled=False)
    seconds = time.perf_counter() - began
    print(f"    ({args.waiting:,} waiting, as many not due, half as many paused: made in {seconds:.0f} s)")
    claimer = new_claimer()
    began = time.perf_counter()
    assert mailers_with_rows("default") == ["main", "paused"]
    print(f"    names of the mailers: {(time.perf_counter() - began) * 1000:.2f} ms")
    rounds = min(4 * CLAIMS, args.waiting // ROWS - 1)
    long = statistics.median(claim(claimer)[0] for _ in range(rounds))
    reached = target(f"claim of {ROWS}: {args.waiting:,} waiting / 1,000", long / base, 1.5, f"{long:.2f} ms")
    print(f"    the same, each of the {ROWS} rows on a page of its own: {worst / base:.2f}   ({worst:.2f} ms)")
    few = statistics.median(taken for _ in range(4) for taken in sent_beside_a_snapshot(1000, CLAIMS))
    turns = min(args.through, args.waiting // 2) // ROWS
    times = sent_beside_a_snapshot(args.waiting, turns)
    last = statistics.median(times[-max(turns // 5, 5) :])
    what = f"the same, after {turns * ROWS:,} were sent while a snapshot is open"
    return target(what, last / few, 1.5, f"{last:.2f} / {few:.2f} ms") and reached


# --- large messages ---


def noise(size: int) -> str:
    return "".join(random.Random(2).choices(string.ascii_letters, k=size))  # what does not compress well


def enqueue(message: Any) -> None:
    from django.core.mail import get_connection

    assert get_connection().send_messages([message]) == 1


def new_message(body: str) -> Any:
    from django.core.mail import EmailMessage

    return EmailMessage("Your receipt", body, "from@example.com", ["to@example.com"])


def measure_memory(args: argparse.Namespace, database: dict[str, Any], esp: SpawnedEsp) -> bool:
    empty()
    enqueue(new_message(noise(50_000)))
    copy(args.large)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps([database, esp.settings()])]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **esp.environ})
    sent, before, peak = json.loads(done.stdout)
    assert sent == args.large, f"sent {sent}"
    detail = f"{before:.0f} MB before its first claim; {sent / (time.perf_counter() - began):.0f} a second"
    return target(f"worker's peak memory in MB, {sent:,} x 50 KB", peak, 120, detail)


def be_worker(database: dict[str, Any], anymail: dict[str, Any]) -> None:
    import logging

    configure(database, anymail)
    logging.disable(logging.WARNING)
    from anymail_retry.mailqueue.worker import Worker

    worker = Worker()
    before = peak_memory()
    sent = worker.drain().sent
    print(json.dumps([sent, before, peak_memory()]))


def peak_memory() -> float:
    """Of this process, in megabytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage() says on Linux began with the peak of the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --- the same attachment ---


def size_of_database() -> float:
    """In megabytes."""
    from django.db import connection

    if connection.vendor == "postgresql":
        size = execute("SELECT pg_database_size(current_database())")[0]
    elif connection.vendor == "mysql":
        execute(*(f"ANALYZE TABLE {table}" for table in connection.introspection.table_names()))
        size = execute(
            "SELECT SUM(data_length + index_length) FROM information_schema.tables WHERE table_schema = DATABASE()"
        )[0]
    else:
        execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size = Path(connection.settings_dict["NAME"]).stat().st_size
    return float(size) / 2**20


def measure_attachment(args: argparse.Namespace) -> None:
    empty()
    if args.inside == "sqlite":
        execute("VACUUM")
    before = size_of_database()
    data = random.Random(3).randbytes(1_000_000)  # what does not compress
    times = []
    for _ in range(args.alike):
        message = new_message("See the attachment.")
        message.attach("terms.pdf", data, "application/pdf")
        began = time.perf_counter()
        enqueue(message)
        times.append((time.perf_counter() - began) * 1000)
    grown = size_of_database() - before
    print(
        f"    {args.alike:,} messages with the same 1 MB attachment: {grown:.1f} MB, {statistics.median(times):.2f} ms"
        f" per enqueue (99 %: {statistics.quantiles(times, n=100)[98]:.2f} ms)"
    )


# --- the table ---


def target(what: str, value: float, bound: float, detail: str) -> bool:
    reached = value <= bound
    print(f"  {what:<60} {value:>7.2f}   <= {bound:<5g} {'reached' if reached else 'MISSED'}   ({detail})", flush=True)
    return reached


def be_inside(args: argparse.Namespace) -> bool:
    """All of it, in one database."""
    import logging

    with temporary(args.inside) as database, LocalEsp.spawn("mandrill", keep_bodies=False) as esp:
        configure(database, esp.settings())
        logging.disable(logging.WARNING)
        from django.core.management import call_command
        from django.db import connection

        call_command("migrate", verbosity=0)
        reached = []
        try:
            if "claims" in args.part:
                reached.append(measure_claims(args))
            if "memory" in args.part:
                reached.append(measure_memory(args, database, esp))
            if "attachment" in args.part:
                measure_attachment(args)
        finally:
            connection.close()
    return all(reached)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--waiting", type=int, default=1_000_000, help="rows that are due (default: 1000000)")
    parser.add_argument("--through", type=int, default=20_000, help="sent while a snapshot is open (default: 20000)")
    parser.add_argument("--large", type=int, default=20_000, help="messages of 50 KB (default: 20000)")
    parser.add_argument("--alike", type=int, default=10_000, help="messages with one attachment (default: 10000)")
    parser.add_argument("--database", choices=KINDS, action="append", help="may be repeated (default: all)")
    parts = ("claims", "memory", "attachment")
    parser.add_argument("--part", choices=parts, action="append", help="may be repeated (default: all)")
    parser.add_argument("--inside", choices=KINDS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # be the worker that is measured
    args = parser.parse_args()
    args.part = args.part or parts
    if args.worker:
        be_worker(*json.loads(args.worker))
        return 0
    if args.inside:
        try:
            return 0 if be_inside(args) else 1
        except Unavailable as why:
            print(f"SKIPPED: {why}")
            return 0
    results = []
    for kind in args.database or KINDS:
        print(f"\n{kind}, load {os.getloadavg()[0]:.1f}", flush=True)
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--inside", kind]
        with subprocess.Popen(command) as process:
            signal.signal(signal.SIGTERM, lambda *_, process=process: process.terminate())
            results.append(process.wait())
    return max(results)


if __name__ == "__main__":
    sys.exit(main())
