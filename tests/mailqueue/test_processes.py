"""Real worker processes, a real ESP and signals: what arrives, by the ESP's own ledger."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import Group
from django.db import connection

from anymail_retry.mailqueue.claim import Claimer, Wanted
from anymail_retry.mailqueue.clock import DatabaseClock
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.schedule import LOST_TOO_OFTEN, Policy
from anymail_retry.mailqueue.watchdog import Watchdog
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import QueuedMessage
from anymail_retry.testing.pytest import spawned_esp

from .engine import PATIENCE, end_leases, mail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from anymail_retry.testing import SpawnedEsp

__all__ = ["spawned_esp"]  # a fixture

pytestmark = pytest.mark.django_db(transaction=True)

WITH_KEYS = "sparkpost"
WITHOUT_KEYS = "postmark"

THREADS = 5


def until(condition: Callable[[], bool], patience: float = 2 * PATIENCE) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def sent() -> int:
    return QueuedMessage.objects.filter(state="sent").count()


def held_as_deadly() -> int:
    return QueuedMessage.objects.filter(state="held", reason=LOST_TOO_OFTEN).count()


class Fleet:
    """Worker processes of one site."""

    def __init__(self, esp: SpawnedEsp, env: Mapping[str, str]) -> None:
        self.esp = esp
        self.env = {
            **env,
            "DJANGO_SETTINGS_MODULE": "tests.mailqueue.worker_settings",
            "TEST_ANYMAIL": json.dumps(esp.settings()),
            # A lease as short as a test can wait for, and long enough for a machine that is busy.
            "TEST_QUEUE": json.dumps({"LEASE": 6, "SEND_MAX": 3}),
        }
        self.backend = f"anymail_retry.backends.{esp.esp}.EmailBackend"
        self.processes: list[subprocess.Popen[str]] = []

    def fill(self, number: int) -> list[str]:
        markers = [f"m{place}" for place in range(number)]
        messages = [mail(marker, extra_headers={"X-Message-Marker": marker}) for marker in markers]
        enqueue(messages, mailer=self.backend, origin="queued")
        return markers

    def start(self, command: str = "runmailer", *args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "django", command, "--threads", str(THREADS), *args],
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture
def fleet(spawned_esp: Callable[..., SpawnedEsp], process_env: Mapping[str, str]) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(esp: str = WITH_KEYS, **options: Any) -> Fleet:
        started = spawned_esp(esp, **options)
        made.append(Fleet(started, {**process_env, **started.environ}))
        return made[-1]

    yield make
    for one in made:
        one.end()


def stop(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> str:
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)
    return out


def test_send_mail_command_delivers_everything(fleet: Callable[..., Fleet]) -> None:
    site = fleet()
    markers = site.fill(50)
    out, _ = site.start("send_mail").communicate(timeout=PATIENCE)
    assert out.startswith("sent 50, deferred 0, failed 0, held 0 in ")
    assert site.esp.ledger.lost(markers) == []
    assert site.esp.ledger.duplicates() == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_process_gives_back_what_it_did_not_begin(fleet: Callable[..., Fleet], number: signal.Signals) -> None:
    site = fleet(WITHOUT_KEYS, latency=0.05)
    markers = site.fill(400)
    process = site.start()
    until(lambda: sent() >= 20)
    out = stop(process, number)
    assert process.returncode == 0
    assert f"sent {sent()}, " in out
    assert QueuedMessage.objects.filter(state="sending").count() == 0
    assert set(QueuedMessage.objects.exclude(state="sent").values_list("state", "attempt_count")) == {("queued", 0)}
    assert len(site.esp.ledger) == sent() < 400
    site.start("send_mail").communicate(timeout=2 * PATIENCE)
    assert site.esp.ledger.lost(markers) == []
    assert site.esp.ledger.duplicates() == {}


def test_second_signal_stops_at_once(fleet: Callable[..., Fleet]) -> None:
    site = fleet(WITHOUT_KEYS, latency=PATIENCE)
    site.fill(20)
    process = site.start()
    until(lambda: QueuedMessage.objects.filter(state="sending").count() > 0)
    site.esp.wait_for(requests=1)
    process.send_signal(signal.SIGTERM)
    until(lambda: QueuedMessage.objects.filter(state="queued").count() == 20 - THREADS)
    assert process.poll() is None
    stop(process)
    assert process.returncode == 1
    assert QueuedMessage.objects.filter(state="sending").count() == THREADS


@pytest.mark.parametrize("esp", [WITH_KEYS, WITHOUT_KEYS])
def test_killed_workers_lose_nothing(fleet: Callable[..., Fleet], esp: str) -> None:
    """Three workers, of which one is killed again and again in the middle of its work."""
    site = fleet(esp, latency=0.03)
    markers = site.fill(400)
    workers = [site.start("runmailer", "-v0") for _ in range(3)]
    chance = random.Random(7)
    kills = 0
    until(lambda: sent() >= 20)
    while sent() < 300:
        before = sent()
        until(lambda at=before: sent() >= at + 40 or held_as_deadly() > 0)  # type: ignore[misc]  # bound now
        assert held_as_deadly() == 0  # they die of something else, each time with other messages
        victim = chance.randrange(3)
        workers[victim].kill()
        workers[victim].communicate()
        workers[victim] = site.start("runmailer", "-v0")
        kills += 1
    until(lambda: sent() + held_as_deadly() == len(markers))
    for worker in workers:
        stop(worker)
    assert kills >= 3
    assert held_as_deadly() == 0
    assert site.esp.ledger.lost(markers) == []
    copies = sum(number - 1 for number in site.esp.ledger.duplicates().values())
    if esp == WITH_KEYS:
        assert copies == 0
    else:
        # What was under way, and what was answered and not yet written, of the one that was killed.
        assert copies <= kills * (THREADS + THREADS * 4)


def test_process_that_slept_through_its_lease_begins_nothing(fleet: Callable[..., Fleet]) -> None:
    if not hasattr(signal, "SIGSTOP"):
        pytest.skip("this system cannot stop a process")
    site = fleet(WITHOUT_KEYS, latency=0.2)
    markers = site.fill(200)
    sleeper = site.start()
    until(lambda: sent() >= 20)
    os.kill(sleeper.pid, signal.SIGSTOP)
    under_way = QueuedMessage.objects.filter(state="sending").count()
    end_leases()
    site.start("send_mail").communicate(timeout=2 * PATIENCE)
    assert sent() == 200
    assert held_as_deadly() == 0
    time.sleep(6)  # the sleeper's own idea of its lease ends
    os.kill(sleeper.pid, signal.SIGCONT)
    time.sleep(1)
    stop(sleeper)
    copies = sum(number - 1 for number in site.esp.ledger.duplicates().values())
    assert site.esp.ledger.lost(markers) == []
    # Only what was on the wire, or answered and not written, when it fell asleep; not the rest of what it had claimed.
    assert copies <= 5 * THREADS < under_way


CLOCK_AHEAD = """
import datetime, time

AHEAD = 120.0

class Kind(type(datetime.datetime)):
    def __instancecheck__(cls, value):
        return isinstance(value, real)

class Ahead(datetime.datetime, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=AHEAD)

    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)

real, datetime.datetime = datetime.datetime, Ahead
seconds = time.time
time.time = lambda: seconds() + AHEAD
"""


def test_host_whose_clock_is_ahead_takes_nobodys_lease(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """By its own clock the other worker's lease would have ended a minute ago, and the later mail be due."""
    if connection.vendor == "sqlite":
        pytest.skip("SQLite serves one host, and has its clock")
    site = fleet(WITHOUT_KEYS)
    site.fill(20)
    beginning = Claimer("default", DatabaseClock("default"), lease=60)
    assert len(beginning.claim(site.backend, Wanted(rows=20, size=10**9, at_once=20), Policy()).jobs) == 20
    enqueue([mail("later")], mailer=site.backend, origin="queued", not_before=timedelta(seconds=60))
    (row,) = enqueue([mail("now")], mailer=site.backend, origin="queued")
    (tmp_path / "sitecustomize.py").write_text(CLOCK_AHEAD)
    site.env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), site.env["PYTHONPATH"]])
    code = "import time, datetime; print(time.time(), datetime.datetime.now().timestamp())"
    clocks = subprocess.run([sys.executable, "-c", code], env=site.env, capture_output=True, text=True, check=True)
    assert all(float(clock) > time.time() + 60 for clock in clocks.stdout.split())  # it is ahead indeed
    out, _ = site.start("send_mail").communicate(timeout=PATIENCE)
    assert out.startswith("sent 1, "), out
    assert [accepted.subject for accepted in site.esp.ledger] == ["now"]
    assert set(QueuedMessage.objects.filter(state="sending").values_list("attempt_count", flat=True)) == {1}
    row.refresh_from_db()
    assert row.ended_at is not None
    assert row.ended_at < DatabaseClock("default").now()  # nor does it write what its clock says


WEB = """
import django
django.setup()
import sys
from django.contrib.auth.models import Group
from django.core.mail import EmailMessage
from django.db import transaction
from anymail_retry.mailqueue.enqueue import enqueue

name, backend = sys.argv[1:]
for number in range(60):
    with transaction.atomic():
        Group.objects.create(name=f"{name} {number}")
        message = EmailMessage("S", "B", "from@example.com", ["to@example.com"])
        message.extra_headers["X-Message-Marker"] = f"{name} {number}"
        enqueue([message], mailer=backend, origin="queued")
"""


def test_web_processes_that_write_are_not_disturbed_by_workers(fleet: Callable[..., Fleet]) -> None:
    """Above all on SQLite, which has one writer at a time."""
    site = fleet(WITHOUT_KEYS)
    workers = [site.start(), site.start()]
    names = ("web 1", "web 2")
    requests = [
        subprocess.Popen(
            [sys.executable, "-c", WEB, name, site.backend],
            env=site.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for name in names
    ]
    site.processes += requests
    for process in requests:
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out
    until(lambda: sent() == 120)
    for worker in workers:
        out = stop(worker)
        assert worker.returncode == 0
        assert "database" not in out  # it logs its own trouble
    assert site.esp.ledger.lost(f"{name} {number}" for name in names for number in range(60)) == []
    assert site.esp.ledger.duplicates() == {}
    assert Group.objects.count() == 120


def test_watchdog_ends_a_process_whose_database_is_silent() -> None:
    worker = Worker()
    barks: list[str] = []
    worker.in_database_since = worker.steady() - 1000
    dog = Watchdog(worker, interval=0.01, bark=barks.append)
    with dog:
        dog.join(PATIENCE)
    assert len(barks) == 1
    assert "has not answered for 240 s" in barks[0]


def test_watchdog_is_silent_while_the_database_answers() -> None:
    worker = Worker()
    barks: list[str] = []
    with Watchdog(worker, interval=0.01, bark=barks.append) as dog:
        for since in (None, worker.steady() - 100):
            worker.in_database_since = since
            time.sleep(0.05)
    dog.join(PATIENCE)
    assert not dog.is_alive()
    assert barks == []


def test_worker_runs_on_sqlite_in_memory() -> None:
    code = """
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["anymail_retry"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
)
django.setup()
from django.core import mail
from django.core.mail import EmailMessage
from django.core.management import call_command
from anymail_retry.mailqueue.enqueue import enqueue
call_command("migrate", verbosity=0)
mail.outbox = []
messages = [EmailMessage(str(number), "b", "a@example.com", ["b@example.com"]) for number in range(30)]
enqueue(messages, mailer="django.core.mail.backends.locmem.EmailBackend", origin="queued")
call_command("send_mail")
assert len(mail.outbox) == 30, len(mail.outbox)
"""
    env = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("sent 30, ")
