"""What is lost and what is sent twice when workers are killed, by the ESP's own ledger.

    python benchmarks/crashes.py
    python benchmarks/crashes.py --messages 1000 --kills 3 --database sqlite  # within a minute
    python benchmarks/crashes.py --database postgresql --scenario restart

Four ``runmailer`` processes of ten threads drain a queue to a local ESP, over TLS, while one of those at work is ended
every now and then, at random, and started anew. SQLite needs nothing; PostgreSQL and MariaDB are found as their own
clients find them (``PGHOST``, ``PGPORT``, ``PGUSER``, ``PGPASSWORD``; ``MYSQL_HOST`` and so on), in a database of its
own that is dropped again. ``restart`` stops and starts a PostgreSQL of its own, made for it with ``initdb``.

Promised, and the exit code is 1 if it is broken: nothing is ever lost. Nothing is sent twice, save by a worker that
was killed (SIGKILL) with an ESP that takes no idempotency keys: then at most what it had under way, and what was
answered in its last 50 ms.
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
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from anymail_retry.testing import LocalEsp, SpawnedEsp

ROOT = Path(__file__).resolve().parent.parent

WITH_KEYS = "sparkpost"
WITHOUT_KEYS = "postmark"

#: Seconds between an answer and the moment at which it is in the database, at most.
UNSETTLED = 0.05

#: Seconds in which something has to happen, on a machine that is busy.
PATIENCE = 90.0


class Scenario(NamedTuple):
    """What happens to the workers, and what is promised."""

    what: str
    esp: str
    #: That ends a worker; None: nothing does.
    signal: signal.Signals | None = None
    databases: Sequence[str] = ("sqlite", "postgresql", "mariadb")


SCENARIOS = {
    "kill": Scenario("SIGKILL, ESP without keys", WITHOUT_KEYS, signal.SIGKILL),
    "kill-keys": Scenario("SIGKILL, ESP with keys", WITH_KEYS, signal.SIGKILL),
    "term": Scenario("SIGTERM, ESP without keys", WITHOUT_KEYS, signal.SIGTERM),
    "steady": Scenario("nobody is ended, ESP without keys", WITHOUT_KEYS),
    "restart": Scenario("database restarted twice, ESP without keys", WITHOUT_KEYS, databases=("postgresql",)),
}

DATABASES = ("sqlite", "postgresql", "mariadb")


class Broken(Exception):
    """A promise was broken, or what was to be measured did not happen."""


# --- databases ---


def database(kind: str, scratch: Path) -> dict[str, Any]:
    """Django's settings of it; the name is of this process alone."""
    name = f"anymail_retry_crashes_{os.getpid()}"
    env = os.environ.get
    if kind == "sqlite":
        path = str(scratch / f"{name}.sqlite3")
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": path,
            "OPTIONS": {
                "timeout": 30,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            },
            "TEST": {"NAME": path},
        }
    if kind == "postgresql":
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "postgres",
            "HOST": env("PGHOST", "127.0.0.1"),
            "PORT": env("PGPORT", "5432"),
            "USER": env("PGUSER", "postgres"),
            "PASSWORD": env("PGPASSWORD", ""),
            "TEST": {"NAME": name},
        }
    return {
        "ENGINE": "django.db.backends.mysql",
        "NAME": "test",
        "HOST": env("MYSQL_HOST", "127.0.0.1"),
        "PORT": env("MYSQL_PORT", "3306"),
        "USER": env("MYSQL_USER", "root"),
        "PASSWORD": env("MYSQL_PASSWORD", ""),
        "OPTIONS": {"charset": "utf8mb4"},
        "TEST": {"NAME": name, "CHARSET": "utf8mb4"},
    }


def why_absent(settings: dict[str, Any]) -> str | None:
    """Why this database cannot be used here."""
    from django.db.utils import load_backend

    try:
        load_backend(settings["ENGINE"])
    except Exception as error:  # ImproperlyConfigured, or whatever its driver raises
        return str(error).strip().splitlines()[0]
    if not settings.get("HOST") or settings["HOST"].startswith("/"):
        return None
    try:
        socket.create_connection((settings["HOST"], int(settings["PORT"])), timeout=5).close()
    except OSError as error:
        return f"no server at {settings['HOST']}:{settings['PORT']}: {error}"
    return None


class Cluster:
    """A PostgreSQL of our own, which may be restarted."""

    def __init__(self, scratch: Path) -> None:
        self.data = scratch / "cluster"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        # It refuses to run as root.
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            scratch.chmod(0o755)
            self.data.mkdir(mode=0o700)
            shutil.chown(self.data, "postgres", "postgres")
            self._as = {"user": "postgres", "group": "postgres", "extra_groups": ()}

    def start(self) -> None:
        self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8")
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.write(
                f"\nport = {self.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{self.data}'\n"
            )
        self._run("pg_ctl", "start", "--wait", f"--log={self.data / 'log'}")

    def restart(self, mode: str) -> None:
        self._run("pg_ctl", "restart", "--wait", f"--mode={mode}", f"--log={self.data / 'log'}")

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "--wait", "--mode=immediate")

    @property
    def settings(self) -> dict[str, Any]:
        return {"HOST": "127.0.0.1", "PORT": str(self.port), "USER": "postgres", "PASSWORD": ""}

    @staticmethod
    def program(name: str) -> str | None:
        found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))  # Debian keeps them off the PATH
        return shutil.which(name) or (str(found[-1]) if found else None)

    def _run(self, name: str, *args: str) -> None:
        program = self.program(name)
        assert program is not None
        command = [program, f"--pgdata={self.data}", *args]
        # To files: a pipe would be inherited by the server, and never end.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                command, cwd="/", stdout=output, stderr=output, timeout=PATIENCE, check=False, **self._as
            )
            if done.returncode:
                output.seek(0)
                raise Broken(f"{name} failed: {output.read().decode(errors='replace')}")


# --- the site ---

SITE = """
import json, os
globals().update(json.loads(os.environ["CRASHES_SETTINGS"]))
"""


def configure(scratch: Path, esp: SpawnedEsp, database: dict[str, Any], args: argparse.Namespace) -> dict[str, str]:
    """Set Django up here. The environment in which the workers have the same settings."""
    settings = {
        "SECRET_KEY": "benchmark",
        "INSTALLED_APPS": ["anymail", "anymail_retry"],
        "USE_TZ": True,
        "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
        "DATABASES": {"default": database},
        "ANYMAIL": esp.settings(),
        "EMAIL_BACKEND": f"anymail_retry.backends.{esp.esp}.EmailBackend",
        "EMAIL_QUEUE_LEASE": args.lease,
        "EMAIL_QUEUE_SEND_MAX": args.lease / 2,
        "EMAIL_QUEUE_BACKOFF": 1,
    }
    (scratch / "crashes_site.py").write_text(SITE)
    os.environ.update(
        esp.environ,
        CRASHES_SETTINGS=json.dumps(settings),
        DJANGO_SETTINGS_MODULE="crashes_site",
        PYTHONPATH=os.pathsep.join([str(scratch), str(ROOT)]),
    )
    sys.path.insert(0, str(scratch))
    import django

    django.setup()
    return dict(os.environ)


@contextmanager
def own_database() -> Iterator[dict[str, str]]:
    """Make it, and drop it again; what workers have to know to find it."""
    from django.db import connection

    before = connection.settings_dict["NAME"]
    name = connection.creation.create_test_db(verbosity=0, autoclobber=True)
    try:
        settings = json.loads(os.environ["CRASHES_SETTINGS"])
        settings["DATABASES"]["default"]["NAME"] = name
        yield {"CRASHES_SETTINGS": json.dumps(settings)}
    finally:
        wait_until(lambda: dropped(before), patience=30)  # a worker that was killed may still be connected


def dropped(before: str) -> bool:
    from django.db import Error, connection

    try:
        connection.creation.destroy_test_db(before, verbosity=0)
    except Error:
        return False
    return True


def fill(esp: SpawnedEsp, messages: int) -> list[str]:
    """Queue so many messages. Their markers."""
    from django.core.mail import EmailMessage

    from anymail_retry.mailqueue.enqueue import enqueue

    markers = [f"m{number}" for number in range(messages)]
    for start in range(0, messages, 500):
        some = [
            EmailMessage(
                "Subject", "Body", "from@example.com", ["to@example.com"], headers={"X-Message-Marker": marker}
            )
            for marker in markers[start : start + 500]
        ]
        enqueue(some, mailer=f"anymail_retry.backends.{esp.esp}.EmailBackend", origin="queued")
    return markers


def sent() -> int:
    """How many rows are sent; the last known number while the database is away."""
    from django.db import Error, connection

    from anymail_retry.models import QueuedMessage

    try:
        return QueuedMessage.objects.filter(state="sent").count()
    except Error:
        connection.close()
        return -1


# --- the workers ---


class Fleet:
    """Worker processes, each started anew when it was ended."""

    def __init__(self, size: int, threads: int, env: dict[str, str], logs: Path) -> None:
        self.command = [sys.executable, "-m", "django", "runmailer", "--threads", str(threads)]
        self.env = env
        self.logs = logs
        self.started = 0
        self.workers: list[tuple[subprocess.Popen[bytes], Path]] = []
        try:
            for _ in range(size):
                self.workers.append(self._start())
        except BaseException:
            self.kill()
            raise

    def _start(self) -> tuple[subprocess.Popen[bytes], Path]:
        self.started += 1
        path = self.logs / f"worker-{self.started}.log"
        with path.open("wb") as log:
            return subprocess.Popen(self.command, env=self.env, stdout=log, stderr=subprocess.STDOUT), path

    def at_work(self) -> list[int]:
        """Those that said a moment ago that they begin."""
        files = [log.stat() for _, log in self.workers]
        return [place for place, log in enumerate(files) if log.st_size and time.time() - log.st_mtime > 0.2]

    def is_well(self) -> bool:
        """True.

        :raises Broken: one ended by itself.
        """
        for process, log in self.workers:
            if process.poll() is not None:
                raise Broken(f"a worker ended by itself, status {process.returncode}: {log.read_text()[-2000:]}")
        return True

    def end_one(self, place: int, number: signal.Signals) -> None:
        """End one, and start it anew."""
        process, log = self.workers[place]
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait(PATIENCE)
        else:
            self._wait(process, log)
        self.workers[place] = self._start()

    def stop(self) -> None:
        wait_until(lambda: self.is_well() and len(self.at_work()) == len(self.workers))
        for process, _ in self.workers:
            process.terminate()
        for process, log in self.workers:
            self._wait(process, log)

    @staticmethod
    def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
        status = process.wait(PATIENCE)
        if status != 0:
            raise Broken(f"a worker that was asked to end has status {status}: {log.read_text()[-2000:]}")

    def kill(self) -> None:
        for process, _ in self.workers:
            if process.poll() is None:
                process.kill()
                process.wait()


def wait_until(condition: Callable[[], bool], *, patience: float = PATIENCE, every: float = 0.1) -> None:
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() >= end:
            raise Broken(f"waited {patience:g} s in vain")
        time.sleep(every)


# --- what happens to them ---


def end_workers(fleet: Fleet, esp: SpawnedEsp, messages: int, number: signal.Signals, args: argparse.Namespace) -> int:
    """End one of those at work every now and then, while there is work. How many times."""
    chance = random.Random(args.seed)
    kills = 0
    wait_until(lambda: fleet.is_well() and esp.counts.accepted > 0)
    while kills < args.kills and esp.counts.accepted < messages:
        began = time.monotonic()
        wait_until(lambda: fleet.is_well() and bool(fleet.at_work()), every=0.02)
        fleet.end_one(chance.choice(fleet.at_work()), number)
        kills += 1
        time.sleep(max(0.0, began + args.every - time.monotonic()))
    return kills


def restart_database(fleet: Fleet, cluster: Cluster, esp: SpawnedEsp, messages: int) -> None:
    """Twice, at a third and at two thirds: politely, and as if it had crashed."""
    for part, mode in ((1 / 3, "fast"), (2 / 3, "immediate")):
        wait_until(lambda at=part * messages: fleet.is_well() and esp.counts.accepted >= at)
        cluster.restart(mode)


def drain(fleet: Fleet, messages: int) -> None:
    """Until everything is sent. It may take as long as it goes on."""
    last, since = -1, time.monotonic()
    while last < messages:
        fleet.is_well()
        now = sent()
        if now > last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            raise Broken(f"{last} of {messages} are sent, and for {PATIENCE:g} s no other")
        time.sleep(0.2)


# --- one run ---


def run(kind: str, scenario: Scenario, args: argparse.Namespace) -> bool:
    """One scenario on one database. Whether every promise was kept."""
    title = f"{kind:<11} {scenario.what:<43}"
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crashes-")))
        settings = database(kind, scratch)
        cluster = None
        if scenario is SCENARIOS["restart"]:
            if not all(Cluster.program(name) for name in ("initdb", "pg_ctl")):
                print(f"{title} skipped: initdb and pg_ctl are not here")
                return True
            cluster = Cluster(scratch)
            stack.callback(cluster.stop)
            cluster.start()
            settings |= cluster.settings
        absent = why_absent(settings)
        if absent:
            print(f"{title} skipped: {absent}")
            return True
        esp = stack.enter_context(LocalEsp.spawn(scenario.esp, latency=args.latency / 1000, keep_bodies=False))
        env = configure(scratch, esp, settings, args)
        env |= stack.enter_context(own_database())
        messages = args.messages if scenario.signal else args.messages * 4 // 5
        markers = fill(esp, messages)
        began = time.monotonic()
        fleet = Fleet(args.workers, args.threads, env, scratch)
        stack.callback(fleet.kill)
        kills = 0
        broken = []
        try:
            if scenario.signal:
                kills = end_workers(fleet, esp, messages, scenario.signal, args)
            if cluster:
                restart_database(fleet, cluster, esp, messages)
            drain(fleet, messages)
            seconds = time.monotonic() - began
            fleet.stop()
        except Broken as error:
            seconds = time.monotonic() - began
            broken.append(str(error))
        ledger = esp.ledger
        lost = len(ledger.lost(markers))
        copies = sum(number - 1 for number in ledger.duplicates().values())
        answers = args.threads * UNSETTLED / max(args.latency / 1000, 0.001)  # of one worker in that time
        bound = round(kills * (args.threads + answers)) if scenario is SCENARIOS["kill"] else 0
        if scenario.signal and kills < args.kills:
            broken.append(f"all was sent before {args.kills} were ended: --messages should be more")
        if lost:
            broken.append(f"{lost} are lost")
        if copies > bound:
            broken.append(f"{copies} were sent twice, promised: at most {bound}")
        absorbed = esp.counts.requests - esp.counts.accepted
    print(
        f"{title} {len(ledger) - copies:>6} delivered {lost:>4} lost {copies:>4} twice (<= {bound:>3})"
        f" {absorbed:>4} absorbed by keys {kills:>3} ended {seconds:>6.1f} s {'BROKEN' if broken else ''}",
        flush=True,
    )
    for why in broken:
        print(f"    {why}", flush=True)
    return not broken


def run_apart(command: Sequence[str]) -> int:
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        process.terminate()  # it ends its workers, and drops its database
        process.wait(PATIENCE)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--database", choices=DATABASES, action="append", help="may be repeated (default: all)")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="may be repeated (default: all)")
    parser.add_argument(
        "--messages", type=int, default=10_000, help="four fifths of it where none is ended (default: 10000)"
    )
    parser.add_argument("--kills", type=int, default=30, help="(default: 30)")
    parser.add_argument("--every", type=float, default=0.3, help="seconds between two of them (default: 0.3)")
    parser.add_argument("--workers", type=int, default=4, help="(default: 4)")
    parser.add_argument("--threads", type=int, default=10, help="of each worker (default: 10)")
    parser.add_argument("--latency", type=float, default=50, help="of the ESP, in milliseconds (default: 50)")
    parser.add_argument("--lease", type=float, default=6, help="in seconds (default: 6)")
    parser.add_argument("--seed", type=int, default=7, help="of the choice of victims (default: 7)")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # one database and one scenario
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended too
    runs = [
        (kind, name)
        for kind in args.database or DATABASES
        for name in args.scenario or SCENARIOS
        if kind in SCENARIOS[name].databases
    ]
    if args.only:
        kind, name = args.only
        return 0 if run(kind, SCENARIOS[name], args) else 1
    statuses = []
    for kind, name in runs:  # each in a process of its own: Django is set up once per process
        command = [sys.executable, __file__, *sys.argv[1:], "--only", kind, name]
        statuses.append(run_apart(command))
    return max(statuses, default=0)


if __name__ == "__main__":
    sys.exit(main())
