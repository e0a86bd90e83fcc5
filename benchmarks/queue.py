"""What the queue costs, beside django-mailer, django-post_office and no queue at all: ratios in one run.

    pip install --group benchmarks
    python benchmarks/queue.py

"The floor" is plain Anymail in as many threads over connections that are held open. Each side is a site of its own: a
process with its own settings and its own empty database, and all send through Mandrill's back end to one local ESP over
TLS. Sides take turns, and each ratio is the median over the rounds. What is not installed, or not running, is skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose queue.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, installed or not

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from anymail_retry.testing import LocalEsp, SpawnedEsp
from benchmarks.databases import KINDS, Unavailable, temporary

ANYMAIL = "anymail.backends.mandrill.EmailBackend"
OURS = "anymail_retry.backends.mandrill.EmailBackend"

#: The peers, and the versions that the targets are about.
PEERS = {"mailer": ("django-mailer", "2.3.2"), "post_office": ("django-post_office", "3.12.0")}

#: Threads of ours by default.
THREADS = 20


# --- a site, in a process of its own ---


class Site:
    """One side, without a queue: the floor."""

    apps: Sequence[str] = ()
    options: dict[str, Any] = {"EMAIL_BACKEND": ANYMAIL}

    def fill(self, count: int) -> None:
        """Have so many messages wait."""
        self.waiting = count

    def drain(self, threads: int) -> int:
        """Send what waits; how many that were."""
        from django.core.mail import get_connection

        turns, turn = iter(range(self.waiting)), threading.Lock()

        def work() -> int:
            sent = 0
            with get_connection() as connection:
                while True:
                    with turn:
                        if next(turns, None) is None:
                            return sent
                    sent += connection.send_messages([message()])

        with ThreadPoolExecutor(threads) as pool:
            return sum(done.result() for done in [pool.submit(work) for _ in range(threads)])

    def enqueue(self, count: int, calls: int) -> float:
        """Store so many messages in one call; seconds that each of so many calls took, in the middle."""
        seconds = []
        for _ in range(calls):
            store = self.store([message() for _ in range(count)])
            began = time.perf_counter()
            store()
            seconds.append(time.perf_counter() - began)
        self.forget()
        return statistics.median(seconds)

    def store(self, messages: list[Any]) -> Callable[[], Any]:
        from django.core.mail import get_connection

        return lambda: get_connection().send_messages(messages)

    def forget(self) -> None:
        """Empty the queue."""

    def statements(self, count: int) -> list[str]:
        """What the database executes for one call with so many messages."""
        store = self.store([message() for _ in range(count)])
        with captured() as statements:
            store()
        self.forget()
        return statements


class Ours(Site):
    """This package's queue."""

    apps = ("anymail_retry",)
    options = {"EMAIL_BACKEND": "anymail_retry.backends.queued.EmailBackend", "EMAIL_QUEUE_BACKEND": OURS}

    def fill(self, count: int) -> None:
        self.forget()
        for start in range(0, count, 500):
            self.store([message() for _ in range(min(500, count - start))])()

    def drain(self, threads: int) -> int:
        from anymail_retry.mailqueue.worker import Worker

        return Worker(threads=threads).drain().sent

    def enqueue_by_save(self, calls: int) -> float:
        """One message by ``Model.save()`` in place of the statements that are made once."""
        from anymail_retry.models import MessageContent

        def by_save(alias: str, row: Any, payload: str) -> None:
            row.save(using=alias, force_insert=True)
            MessageContent(message=row, payload=payload).save(using=alias, force_insert=True)

        with mock.patch("anymail_retry.mailqueue.enqueue.insert", by_save):
            return self.enqueue(1, calls)

    def forget(self) -> None:
        from anymail_retry.models import AttachmentBody, Attempt, MessageAttachment, MessageContent, QueuedMessage

        empty(Attempt, MessageAttachment, MessageContent, AttachmentBody, QueuedMessage)

    def statements_of_drain(self, count: int, attachments: int) -> dict[str, Any]:
        """How many statements claims and flushes take, on average, and which of them change content."""
        from anymail_retry.mailqueue.claim import Claimer
        from anymail_retry.mailqueue.settle import Settler

        self.forget()
        self.store([message(attachments) for _ in range(count)])()
        counts: dict[str, list[int]] = {"claim": [], "flush": []}
        with captured() as statements, ExitStack() as stack:
            for kind, cls in (("claim", Claimer), ("flush", Settler)):
                stack.enter_context(mock.patch.object(cls, kind, counted(getattr(cls, kind), counts[kind], statements)))
            self.drain(THREADS)
        rewritten = [
            statement
            for statement in statements
            if statement.startswith("UPDATE") and any(name in statement for name in ("content", "attachment_body"))
        ]
        return {**{kind: statistics.fmean(taken) for kind, taken in counts.items()}, "rewritten": len(rewritten)}


class DjangoMailer(Site):
    """django-mailer, as it comes."""

    apps = ("mailer",)
    options = {"EMAIL_BACKEND": "mailer.backend.DbBackend", "MAILER_EMAIL_BACKEND": ANYMAIL}

    def fill(self, count: int) -> None:
        self.forget()
        self.store([message() for _ in range(count)])()

    def drain(self, threads: int) -> int:
        from mailer.engine import send_all
        from mailer.models import Message, MessageLog

        send_all()
        assert not Message.objects.exists()
        return MessageLog.objects.count()

    def forget(self) -> None:
        from mailer.models import Message, MessageLog

        empty(Message, MessageLog)


class PostOffice(Site):
    """django-post_office, as it comes, or with batches and threads of one's choice."""

    apps = ("django.contrib.contenttypes", "post_office")
    options = {"EMAIL_BACKEND": "post_office.EmailBackend"}
    processes = 1

    def fill(self, count: int) -> None:
        self.forget()
        self.store([message() for _ in range(count)])()

    def store(self, messages: list[Any]) -> Callable[[], Any]:
        from post_office import mail

        many = [
            {"recipients": one.to, "sender": one.from_email, "subject": one.subject, "message": one.body}
            for one in messages
        ]
        return lambda: mail.send_many(many)

    def drain(self, threads: int) -> int:
        from django.conf import settings
        from post_office import mail
        from post_office.models import STATUS, Email

        if threads:  # its best: batches that do not end before its threads are busy
            settings.POST_OFFICE.update(THREADS_PER_PROCESS=threads, BATCH_SIZE=1000 * self.processes)
        mail.send_queued_mail_until_done("post_office", self.processes)
        return Email.objects.filter(status=STATUS.sent).count()

    def forget(self) -> None:
        from post_office.models import Attachment, Email, Log

        empty(Log, Attachment.emails.through, Attachment, Email)


class PostOfficeTwice(PostOffice):
    """django-post_office with two processes."""

    processes = 2


SITES: dict[str, type[Site]] = {
    "floor": Site,
    "ours": Ours,
    "mailer": DjangoMailer,
    "post_office": PostOffice,
    "post_office_twice": PostOfficeTwice,
}


def message(attachments: int = 0) -> Any:
    from django.core.mail import EmailMessage

    made = EmailMessage("Your receipt", "Thank you for your order.\n" * 20, "from@example.com", ["to@example.com"])
    for place in range(attachments):
        made.attach(f"{place}.bin", bytes([place]) * 10_000, "application/octet-stream")
    return made


def empty(*models: Any) -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            tables = ", ".join(connection.ops.quote_name(model._meta.db_table) for model in models)
            cursor.execute(f"TRUNCATE {tables} CASCADE")
            return
        for model in models:
            cursor.execute(f"DELETE FROM {connection.ops.quote_name(model._meta.db_table)}")


@contextmanager
def captured() -> Iterator[list[str]]:
    """The statements that are executed, save those that begin and end transactions."""
    from django.db import connection

    statements: list[str] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if not sql.startswith(("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE")):
            statements.append(sql)
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        yield statements


def counted(method: Callable[..., Any], counts: list[int], statements: Sequence[str]) -> Callable[..., Any]:
    """The method, and each call adds how many statements it took."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = len(statements)
        try:
            return method(*args, **kwargs)
        finally:
            counts.append(len(statements) - before)

    return call


def be_site(name: str) -> None:
    """Do what standard input says, a line of JSON at a time, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    site = SITES[name]()
    settings = types.ModuleType("benchmark_settings")
    vars(settings).update(
        SECRET_KEY="benchmark",
        INSTALLED_APPS=["anymail", *site.apps],
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
        POST_OFFICE={"BACKENDS": {"default": ANYMAIL}},
        LOGGING_CONFIG=None,
        ANYMAIL=first["anymail"],
        DATABASES={"default": first["database"]},
        **site.options,
    )
    sys.modules[settings.__name__] = settings
    os.environ["DJANGO_SETTINGS_MODULE"] = settings.__name__
    import warnings

    warnings.simplefilter("ignore")  # Django 6.1's about EMAIL_BACKEND, which all three can be set by
    import logging

    import django

    logging.disable(logging.WARNING)
    django.setup()
    if first["migrate"] and site.apps:
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
    print(json.dumps(None), file=answers, flush=True)
    for line in sys.stdin:
        name, args = json.loads(line)
        print(json.dumps(getattr(site, name)(*args)), file=answers, flush=True)


class Remote:
    """A site's process, at this end."""

    def __init__(self, stack: ExitStack, name: str, esp: SpawnedEsp, database: dict[str, Any], *, migrate: bool = True):
        self.database = database
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--site", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **esp.environ},
            cwd=stack.enter_context(tempfile.TemporaryDirectory()),  # the peers' lock files
        )
        stack.callback(self.process.communicate)  # the end of its standard input is its end
        self.write({"anymail": esp.settings(), "database": database, "migrate": migrate})
        self.read()

    def write(self, what: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)

    def read(self) -> Any:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a site's process has ended, status {self.process.poll()}")
        return json.loads(answer)

    def do(self, name: str, *args: Any) -> Any:
        self.write([name, args])
        return self.read()


def drain(messages: int, threads: int, *sites: Remote) -> float:
    """Messages per second, by all these processes together."""
    sites[0].do("fill", messages)
    began = time.perf_counter()
    for site in sites:
        site.write(["drain", [threads]])
    sent = sum(site.read() for site in sites)
    seconds = time.perf_counter() - began
    assert sent == messages, f"sent {sent} of {messages}"
    return messages / seconds


# --- the table ---


class Table:
    """Prints rows, and knows whether all targets were reached."""

    def __init__(self) -> None:
        self.reached = True

    def row(self, what: str, value: float, bound: str, target: float) -> None:
        reached = value >= target if bound == ">=" else value <= target
        self.reached = self.reached and reached
        print(f"  {what:<66} {value:>7.2f}   {bound} {target:<6g} {'reached' if reached else 'MISSED'}", flush=True)

    def rates(self, rates: dict[str, list[float]], unit: str = "a second") -> None:
        for name, taken in rates.items():
            each = " ".join(f"{value:.4g}" for value in taken)
            print(f"    {name:<40} {statistics.median(taken):>9.4g} {unit}   ({each})", flush=True)


def ratio(taken: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(taken[one], taken[other], strict=True))


def take_turns(actions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds):
        for name in list(actions) if turn % 2 else reversed(actions):
            taken[name].append(actions[name]())
    return taken


def compare_drains(table: Table, sites: dict[str, Remote], esp: SpawnedEsp, args: argparse.Namespace) -> None:
    n = args.messages
    ours = sites["ours"], sites["ours again"]
    actions: dict[str, Callable[[], float]] = {
        "floor": lambda: drain(n, THREADS, sites["floor"]),
        "ours": lambda: drain(n, THREADS, ours[0]),
        "ours, 2 processes": lambda: drain(2 * n, THREADS, *ours),
    }
    if "post_office" in sites:
        actions["post_office, 20 threads"] = lambda: drain(n, THREADS, sites["post_office"])
        actions["post_office, 2 x 20 threads"] = lambda: drain(2 * n, THREADS, sites["post_office_twice"])
    for latency in (0, 50):
        esp.latency = latency / 1000
        print(f"\n  Drain, ESP answers after {latency} ms, {args.rounds} rounds of {n} messages, {THREADS} threads")
        if latency:  # these are slow by their waits: fewer messages tell as much
            if "post_office" in sites:
                actions["post_office"] = lambda: drain(max(100, n // 400 * 100), 0, sites["post_office_defaults"])
            if "mailer" in sites:
                actions["mailer"] = lambda: drain(max(20, n // 30), 0, sites["mailer"])
        for action in actions.values():
            action() if not latency else None  # warm
        rates = take_turns(actions, args.rounds)
        table.rates(rates)
        table.row("ours / floor", ratio(rates, "ours", "floor"), ">=", 0.95 if latency else 0.85)
        if not latency:
            continue
        table.row("ours, 2 processes / 1", ratio(rates, "ours, 2 processes", "ours"), ">=", 1.7)
        if "mailer" in sites:
            table.row("ours / django-mailer", ratio(rates, "ours", "mailer"), ">=", 18)
        if "post_office" in sites:
            table.row("ours / post_office, both by default", ratio(rates, "ours", "post_office"), ">=", 3.5)
            best = ratio(rates, "ours", "post_office, 20 threads")
            table.row("ours / post_office's best, 20 threads each", best, ">=", 1)
            best = ratio(rates, "ours, 2 processes", "post_office, 2 x 20 threads")
            table.row("ours / post_office's best, 2 processes of 20 threads each", best, ">=", 1)


def compare_enqueues(table: Table, sites: dict[str, Remote], args: argparse.Namespace) -> None:
    print(f"\n  Enqueue, {args.rounds} rounds; in milliseconds")
    calls = args.calls

    def once(site: str, count: int, calls: int) -> Callable[[], float]:
        return lambda: sites[site].do("enqueue", count, calls) * 1000

    actions = {
        "ours, one": once("ours", 1, calls),
        "ours, one, by Model.save()": lambda: sites["ours"].do("enqueue_by_save", calls) * 1000,
        "ours, 500 in one call": once("ours", 500, 5),
    }
    if "mailer" in sites:
        actions["mailer, one"] = once("mailer", 1, calls)
    if "post_office" in sites:
        actions["post_office, 500 in send_many()"] = once("post_office", 500, 5)
    for action in actions.values():
        action()
    taken = take_turns(actions, args.rounds)
    table.rates(taken, "ms")
    if "mailer" in sites:
        table.row("one: ours / django-mailer", ratio(taken, "ours, one", "mailer, one"), "<=", 1.5)
        by_save = ratio(taken, "ours, one, by Model.save()", "mailer, one")
        print(f"  {'one, if it were by Model.save(): ours / django-mailer':<66} {by_save:>7.2f}")
    if "post_office" in sites:
        many = ratio(taken, "ours, 500 in one call", "post_office, 500 in send_many()")
        table.row("500 in one call: ours / post_office", many, "<=", 1)


def count_statements(table: Table, site: Remote, esp: SpawnedEsp, messages: int) -> None:
    esp.latency = 0.05
    print("\n  Statements, without those that begin and end transactions")
    for count, target in ((1, 2), (500, 6)):
        taken = site.do("statements", count)
        table.row(f"enqueue, {count} in one call", len(taken), "<=", target)
    for attachments in (0, 1):
        means = site.do("statements_of_drain", messages, attachments)
        what = "with an attachment each" if attachments else "no attachments"
        table.row(f"a claim, {what}", means["claim"], "<=", 5 + attachments)
        table.row(f"a flush, {what}", means["flush"], "<=", 3 + 2 * attachments)
        table.row(f"content rewritten, {what}", means["rewritten"], "<=", 0)


def run(args: argparse.Namespace) -> bool:
    table = Table()
    peers = []
    for name, (package, version) in PEERS.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"SKIPPED {package}: not installed. Run: pip install {package}=={version}")
            continue
        print(f"{package} {installed}" + ("" if installed == version else f" (the targets are about {version})"))
        peers.append(name)
    if "post_office" in peers:
        peers += ["post_office_defaults", "post_office_twice"]
    for kind in args.database or KINDS[:2]:
        with LocalEsp.spawn("mandrill", keep_bodies=False) as esp, ExitStack() as stack:
            print(f"\n{kind}, load {os.getloadavg()[0]:.1f}")
            try:
                sites = {
                    name: Remote(
                        stack,
                        "post_office" if name == "post_office_defaults" else name,
                        esp,
                        stack.enter_context(temporary(kind)),
                    )
                    for name in ("ours", *peers)
                }
            except Unavailable as why:
                print(f"SKIPPED {kind}: {why}")
                continue
            sites["floor"] = Remote(stack, "floor", esp, {"ENGINE": "django.db.backends.dummy"})
            sites["ours again"] = Remote(stack, "ours", esp, sites["ours"].database, migrate=False)
            if "enqueue" in args.part:
                compare_enqueues(table, sites, args)
            if "statements" in args.part:
                count_statements(table, sites["ours"], esp, min(args.messages, 1000))
            if "drain" in args.part:
                compare_drains(table, sites, esp, args)
    return table.reached


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default: 5)")
    parser.add_argument("--messages", type=int, default=2000, help="in a drain (default: 2000)")
    parser.add_argument("--calls", type=int, default=200, help="that store one message, in a round (default: 200)")
    parser.add_argument("--database", choices=KINDS, action="append", help="may be repeated (default: the first two)")
    parts = ("enqueue", "statements", "drain")
    parser.add_argument("--part", choices=parts, action="append", help="may be repeated (default: all)")
    parser.add_argument("--site", choices=SITES, help=argparse.SUPPRESS)  # be this one
    args = parser.parse_args()
    args.part = args.part or parts
    if args.site:
        be_site(args.site)
        return 0
    return 0 if run(args) else 1


if __name__ == "__main__":
    sys.exit(main())
