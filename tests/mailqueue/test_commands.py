"""The commands, by the names that users of django-mailer have in their crontabs."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from anymail_retry.mailqueue import operations
from anymail_retry.mailqueue.worker import Totals, Worker
from anymail_retry.management.progress import Progress
from anymail_retry.management.worker_command import summary
from anymail_retry.models import QueuedMessage

from .engine import (
    BLOCKED,
    CANCELLED,
    OTHER,
    PERMANENT,
    PLAIN,
    REFUSED,
    Script,
    change,
    future,
    make_due,
    past,
    queue,
    states,
)

if TYPE_CHECKING:
    from pytest_django.fixtures import SettingsWrapper

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("script")]

COMMANDS = [("send_mail",), ("runmailer", "--max-time", "1"), ("retry_deferred",), ("purge_mail_log", "3")]


def run(name: str, *args: str, **options: Any) -> str:
    out = io.StringIO()
    call_command(name, *args, stdout=out, stderr=out, **options)
    return out.getvalue()


# --- send_mail ---


def test_send_mail_sends_what_is_due_and_says_so(script: Script) -> None:
    script.by_subject({"deferred": REFUSED, "failed": PERMANENT, "cancelled": CANCELLED})
    queue("a", "b", "deferred", "failed", "cancelled")
    words = run("send_mail", "--limit", "5")
    assert words.startswith("sent 2, deferred 1, failed 1, held 0, cancelled 1 in ")
    assert words.endswith(" s\n")


def test_send_mail_with_nothing_to_do() -> None:
    assert run("send_mail").startswith("sent 0, deferred 0, failed 0, held 0 in ")


def test_send_mail_says_that_a_mailer_pauses(script: Script) -> None:
    script.behaviour = lambda message, delivery: BLOCKED
    queue()
    words = run("send_mail")
    assert f"{PLAIN} pauses until" in words
    assert "Invalid API key" in words


def test_send_mail_is_readable_for_scripts(script: Script) -> None:
    script.by_subject({"failed": PERMANENT})
    queue("a", "failed")
    found = json.loads(run("send_mail", "--json"))
    assert found.pop("seconds") >= 0
    assert found == {"sent": 1, "deferred": 0, "failed": 1, "held": 0, "cancelled": 0, "paused": {}}
    script.behaviour = lambda message, delivery: BLOCKED
    queue()
    paused = json.loads(run("send_mail", "--json"))["paused"]
    assert "Invalid API key" in paused[PLAIN]["reason"]
    assert paused[PLAIN]["until"]


@pytest.mark.parametrize(("subject", "wanted", "code"), [("failed", True, 1), ("failed", False, 0), ("sent", True, 0)])
def test_exit_code_tells_of_failures_where_wanted(script: Script, subject: str, wanted: bool, code: int) -> None:
    script.by_subject({"failed": PERMANENT})
    queue(subject)
    arguments = ["--exit-code"] if wanted else []
    if code:
        with pytest.raises(SystemExit) as exit_:
            run("send_mail", *arguments)
        assert exit_.value.code == code
    else:
        run("send_mail", *arguments)


def test_send_mail_works_for_the_mailers_that_it_is_told() -> None:
    queue("a")
    queue("b", mailer=OTHER)
    run("send_mail", "--mailer", OTHER)
    assert states() == {"a": "queued", "b": "sent"}


def test_quiet_is_quiet() -> None:
    queue()
    assert run("send_mail", verbosity=0) == ""


def test_verbose_tells_what_it_does() -> None:
    (row,) = queue()
    assert f"{PLAIN}: message {row.pk} sent" in run("send_mail", verbosity=2)


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--limit", "-1"], ["--max-time", "0"], ["--limit", "x"]])
def test_arguments_that_mean_nothing_are_refused(arguments: list[str]) -> None:
    with pytest.raises(CommandError):
        run("send_mail", *arguments)


# --- runmailer ---


def test_runmailer_stays_until_its_time(script: Script) -> None:
    queue("a", "b")
    words = run("runmailer", "--max-time", "0.5")
    assert "Stop with Ctrl-C" in words
    assert "sent 2, deferred 0, failed 0, held 0" in words


# --- retry_deferred ---


def test_retry_deferred_makes_deferred_mail_due(script: Script) -> None:
    for state in ("deferred", "failed", "held"):
        (row,) = queue(state)
        change(row, state=state, due_at=future() if state == "deferred" else None)
    assert run("retry_deferred") == "1 message is due now (deferred)\n"
    Worker().drain()
    assert states() == {"deferred": "sent", "failed": "failed", "held": "held"}
    assert run("retry_deferred", "--failed", "--held") == "2 messages are due now (deferred, failed, held)\n"
    Worker().drain()
    assert set(states().values()) == {"sent"}


def test_retry_deferred_says_what_is_being_sent() -> None:
    (row,) = queue()
    change(row, state="sending", due_at=future())
    assert run("retry_deferred") == "0 messages are due now (deferred); 1 being sent\n"
    assert json.loads(run("retry_deferred", "--json")) == {"due": 0, "being_sent": 1}


def test_retry_deferred_of_one_mailer() -> None:
    for mailer in (PLAIN, OTHER):
        (row,) = queue(mailer=mailer)
        change(row, state="deferred", due_at=future())
    assert json.loads(run("retry_deferred", "--mailer", OTHER, "--json"))["due"] == 1


# --- purge_mail_log ---


@pytest.fixture
def log() -> None:
    for state, days in [("sent", 1), ("sent", 9), ("failed", 9), ("cancelled", 9)]:
        (row,) = queue(f"{state} {days}")
        change(row, state=state, due_at=None, ended_at=past(days * 86400))
    (row,) = queue("waiting")
    change(row, created_at=past(99 * 86400))


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize(
    ("arguments", "gone", "words"),
    [
        pytest.param(["3"], {"sent 9", "cancelled 9"}, "deleted 2 messages\n", id="success is the default"),
        pytest.param(["3", "-r", "failure"], {"failed 9"}, "deleted 1 message\n", id="failure"),
        pytest.param(["3", "-r", "all"], {"sent 9", "failed 9", "cancelled 9"}, "deleted 3 messages\n", id="all"),
        pytest.param(
            ["0", "--result", "all"],
            {"sent 1", "sent 9", "failed 9", "cancelled 9"},
            "deleted 4 messages\n",
            id="whatever its age",
        ),
    ],
)
def test_purge_mail_log_deletes_what_has_ended(arguments: list[str], gone: set[str], words: str) -> None:
    before = set(states())
    assert run("purge_mail_log", *arguments) == words
    assert before - set(states()) == gone


@pytest.mark.usefixtures("log")
def test_purge_mail_log_is_readable_for_scripts() -> None:
    assert json.loads(run("purge_mail_log", "3", "--json")) == {"messages": 2, "orphans": 0}


@pytest.mark.parametrize("days", ["-1", "nan", "1e99"])
def test_purge_mail_log_refuses_days_that_mean_nothing(days: str) -> None:
    with pytest.raises(CommandError, match="DAYS"):
        run("purge_mail_log", "--", days)


# --- what is missing ---


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_tables_are_named_with_the_command_that_makes_them(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QueuedMessage._meta, "db_table", "no_such_table")
    with pytest.raises(CommandError, match="migrate anymail_retry"):
        run(*command)


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_database_is_named(command: tuple[str, ...], settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_DATABASE = "nowhere"
    with pytest.raises(CommandError, match="nowhere"):
        run(*command)


def test_wrong_setting_is_named(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_THREADS = "many"
    with pytest.raises(CommandError, match="EMAIL_QUEUE_THREADS"):
        run("send_mail")


def test_migrations_are_complete() -> None:
    call_command("makemigrations", "anymail_retry", check=True, dry_run=True, verbosity=0)


# --- what a terminal sees ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only() -> None:
    for stream, shown in [(Terminal(), True), (io.StringIO(), False)]:
        progress = Progress("sending", 4, stream=stream)
        progress.show(2)
        assert ("sending [###############...............] 2/4" in stream.getvalue()) == shown
        progress.end()
        assert bool(stream.getvalue()) == shown


@pytest.mark.parametrize(("total", "done"), [(0, 0), (0, 5), (10, 20)])
def test_progress_survives_more_than_was_expected(total: int, done: int) -> None:
    stream = Terminal()
    Progress("sending", total, stream=stream).show(done)
    assert f"{done}/{max(total, done, 1)}" in stream.getvalue()


def test_summary_is_one_line() -> None:
    assert summary(Totals(sent=212, deferred=3, failed=1), 4.2) == "sent 212, deferred 3, failed 1, held 0 in 4.2 s"


def test_pause_of_an_operator_is_shown() -> None:
    queue()
    operations.pause(PLAIN, "moving house")
    assert "moving house" in run("send_mail")
    assert connection.is_usable()
    make_due()
