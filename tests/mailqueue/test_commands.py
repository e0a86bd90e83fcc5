"""The commands, by the names that users of django-mailer have in their crontabs."""

from __future__ import annotations

import io
import json
import re
import sys
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import django
import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection

from anymail_retry.mailqueue import operations
from anymail_retry.mailqueue.status import Remaining
from anymail_retry.mailqueue.worker import Totals, Worker
from anymail_retry.management.progress import Progress
from anymail_retry.management.queue_command import duration
from anymail_retry.management.worker_command import summary, what_remains
from anymail_retry.models import MailerState, QueuedMessage

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
    past,
    queue,
    statements,
    states,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_django.fixtures import SettingsWrapper

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("script")]

COMMANDS = [
    ("send_mail",),
    ("runmailer", "--max-time", "1"),
    ("retry_deferred",),
    ("purge_mail_log", "3"),
    ("mail_queue_status",),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(name: str, *args: str, out: io.StringIO | None = None, **options: Any) -> str:
    """What a command prints: where nobody watches, unless it is given a terminal."""
    out = out or io.StringIO()
    call_command(name, *args, stdout=out, stderr=out, no_color=True, **options)
    return out.getvalue()


def exit_code_of(name: str, *args: str) -> tuple[Any, str]:
    """The exit code of a command, and what it prints."""
    out = io.StringIO()
    try:
        run(name, *args, out=out)
    except SystemExit as exit_:
        return exit_.code, out.getvalue()
    return 0, out.getvalue()


# --- send_mail ---


def test_send_mail_sends_what_is_due_and_says_so(script: Script) -> None:
    script.by_subject({"deferred": REFUSED, "failed": PERMANENT, "cancelled": CANCELLED})
    queue("a", "b", "deferred", "failed", "cancelled")
    words = run("send_mail", "--limit", "5")
    assert re.fullmatch(
        r"sent 2, deferred 1, failed 1, held 0, cancelled 1 in \d+\.\d s; 1 waits, the next is due in \d+ s\n", words
    )


def test_send_mail_says_what_others_send(script: Script) -> None:
    _, theirs = queue("a", "b")
    change(theirs, state="sending", due_at=future())
    assert re.fullmatch(r"sent 1, .* s; nothing waits; 1 is being sent by others\n", run("send_mail"))


def test_send_mail_says_what_it_left() -> None:
    queue(*"abc")
    assert run("send_mail", "--limit", "1").endswith(" s; 2 wait, due now\n")


@pytest.mark.parametrize("arguments", [[], ["-v", "0"]])
def test_cron_has_nothing_to_mail_where_nothing_was_done(arguments: list[str]) -> None:
    (row,) = queue()
    change(row, state="deferred", due_at=future())
    assert run("send_mail", *arguments) == ""


@pytest.mark.parametrize(
    ("arguments", "out"),
    [
        pytest.param([], Terminal(), id="a terminal"),
        pytest.param(["-v", "2"], None, id="verbose"),
        pytest.param(["--json"], None, id="JSON"),
    ],
)
def test_whoever_asks_is_told_that_nothing_was_done(arguments: list[str], out: io.StringIO | None) -> None:
    assert "sent" in run("send_mail", *arguments, out=out)


def test_a_pause_is_worth_a_mail_from_cron_while_it_lasts() -> None:
    operations.pause(PLAIN, "moving house")
    assert "moving house" in run("send_mail")
    MailerState.objects.update(paused_until=past())
    assert run("send_mail") == ""
    assert f"{PLAIN} was paused until" in run("send_mail", out=Terminal())


def test_send_mail_says_that_a_mailer_pauses(script: Script) -> None:
    script.behaviour = lambda message, delivery: BLOCKED
    queue()
    words = run("send_mail")
    assert f"{PLAIN} pauses until" in words
    assert "Invalid API key" in words


def test_send_mail_is_readable_for_scripts(script: Script) -> None:
    script.by_subject({"failed": PERMANENT})
    queue("a", "failed")
    (later,) = queue("later")
    change(later, due_at=future())
    found = json.loads(run("send_mail", "--json"))
    assert found.pop("seconds") >= 0
    assert datetime.fromisoformat(found.pop("next_due_at")) == later.due_at
    done = {"sent": 1, "deferred": 0, "failed": 1, "held": 0, "cancelled": 0, "paused": {}}
    assert found == done | {"waiting": 1, "due": 0, "being_sent": 0, "exact": True}
    script.behaviour = lambda message, delivery: BLOCKED
    queue()
    paused = json.loads(run("send_mail", "--json"))["paused"]
    assert "Invalid API key" in paused[PLAIN]["reason"]
    assert paused[PLAIN]["until"]


@pytest.mark.parametrize(("subject", "wanted", "code"), [("failed", True, 1), ("failed", False, 0), ("sent", True, 0)])
def test_exit_code_tells_of_failures_where_wanted(script: Script, subject: str, wanted: bool, code: int) -> None:
    script.by_subject({"failed": PERMANENT})
    queue(subject)
    assert exit_code_of("send_mail", *(["--exit-code"] if wanted else []))[0] == code


def test_exit_code_does_not_tell_of_a_pause(script: Script) -> None:
    script.behaviour = lambda message, delivery: BLOCKED
    queue()
    code, words = exit_code_of("send_mail", "--exit-code")
    assert (code, "pauses until" in words) == (0, True)


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


def test_verbose_json_is_json_all_the_same() -> None:
    (row,) = queue()
    out, err = io.StringIO(), io.StringIO()
    call_command("send_mail", "--json", "-v", "2", stdout=out, stderr=err, force_color=True)
    assert json.loads(out.getvalue())["sent"] == 1
    assert f"{PLAIN}: message {row.pk} sent" in err.getvalue()
    assert "\033" not in err.getvalue()  # no line of a log is an error of the command


@pytest.mark.parametrize(
    "arguments", [["--threads", "0"], ["--limit", "-1"], ["--max-time", "0"], ["--max-time", "nan"], ["--limit", "x"]]
)
def test_arguments_that_mean_nothing_are_refused(arguments: list[str]) -> None:
    with pytest.raises(CommandError):
        run("send_mail", *arguments)


# --- runmailer ---


def test_runmailer_stays_until_its_time(script: Script) -> None:
    queue("a", "b")
    words = run("runmailer", "--max-time", "0.5")
    assert "Stop with Ctrl-C" in words
    assert "sent 2, deferred 0, failed 0, held 0" in words
    assert words.endswith("; nothing waits\n")


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
    assert json.loads(run("retry_deferred", "--json")) == {"due": 0, "being_sent": 1, "resumed": [], "paused": {}}


def test_retry_deferred_of_one_mailer() -> None:
    for mailer in (PLAIN, OTHER):
        (row,) = queue(mailer=mailer)
        change(row, state="deferred", due_at=future())
    assert json.loads(run("retry_deferred", "--mailer", OTHER, "--json"))["due"] == 1


def test_retry_deferred_says_what_keeps_the_mail_back() -> None:
    for mailer, reason in ((PLAIN, "Invalid API key"), (OTHER, "moving house")):
        queue(mailer=mailer)
        operations.pause(mailer, reason)
    MailerState.objects.filter(alias=PLAIN).update(paused_until=future())
    words = run("retry_deferred")
    assert re.search(rf"{PLAIN} pauses until \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC: Invalid API key\n", words)
    assert f"{OTHER} pauses until it is resumed: moving house\n" in words
    assert words.endswith("--resume ends pauses.\n")
    paused = json.loads(run("retry_deferred", "--json"))["paused"]
    assert paused[OTHER] == {"until": operations.FOR_EVER.isoformat(), "reason": "moving house"}


def test_retry_deferred_ends_the_pauses_of_the_chosen_mailers() -> None:
    for mailer in (PLAIN, OTHER):
        queue(mailer, mailer=mailer)
        operations.pause(mailer)
    assert f"{OTHER}: its pause is ended\n" in run("retry_deferred", "--resume", "--mailer", OTHER)
    run("send_mail")
    assert states() == {PLAIN: "queued", OTHER: "sent"}
    found = json.loads(run("retry_deferred", "--resume", "--json"))
    assert (found["resumed"], found["paused"]) == ([PLAIN], {})


# --- mail_queue_status ---


def test_status_is_a_table() -> None:
    for state, due_at in [("queued", past(125)), ("deferred", future(45)), ("sending", past(1)), ("held", None)]:
        (row,) = queue()
        change(row, state=state, due_at=due_at)
    queue(mailer=OTHER)
    operations.pause(OTHER, "moving house")
    head, other, plain, pause = run("mail_queue_status").splitlines()
    assert re.split(r"  +", head) == [
        *("mailer", "queued", "deferred", "sending", "held", "failed"),
        *("due", "oldest due", "next due in", "lease ended"),
    ]
    assert re.fullmatch(rf"{PLAIN} +1 +1 +1 +1 +0 +2 +2 min +4\d s +1", plain)
    assert re.fullmatch(rf"{OTHER} +1 +0 +0 +0 +0 +1 +\d+ s +- +0", other)
    assert len({len(line) for line in (head, other, plain)}) == 1
    assert pause == f"{OTHER} pauses until it is resumed: moving house"


def test_status_of_an_empty_queue() -> None:
    assert run("mail_queue_status") == "The queue is empty, and no mailer pauses.\n"
    assert run("mail_queue_status", verbosity=0) == ""


def test_status_is_readable_for_scripts() -> None:
    (row,) = queue()
    change(row, due_at=past(100))
    operations.pause(PLAIN, "moving house")
    found = json.loads(run("mail_queue_status", "--json"))
    assert found["oldest_due_seconds"] >= 100
    mailer = found["mailers"][PLAIN]
    assert datetime.fromisoformat(mailer["oldest_due_at"]) == row.due_at
    assert datetime.fromisoformat(mailer["read_at"]).tzinfo == timezone.utc
    assert mailer["counts"]["queued"] == mailer["due"] == 1
    assert mailer["counts"]["sent"] == mailer["lease_ended"] == 0
    assert (mailer["next_due_at"], mailer["pause_reason"]) == (None, "moving house")
    assert mailer["paused_until"] == operations.FOR_EVER.isoformat()


def test_status_of_one_mailer() -> None:
    queue()
    queue(mailer=OTHER)
    assert PLAIN not in run("mail_queue_status", "--mailer", OTHER)


@pytest.mark.parametrize(("max_age", "code"), [("60", 1), ("1000", 0)])
def test_max_age_is_for_monitoring(max_age: str, code: int) -> None:
    (row,) = queue()
    change(row, due_at=past(200))
    found, words = exit_code_of("mail_queue_status", "--max-age", max_age)
    assert found == code
    assert words.startswith(f"The oldest due mail has been due for 3 min ({PLAIN})")
    assert ("longer than 60 s" in words) == bool(code)
    found, words = exit_code_of("mail_queue_status", "--max-age", max_age, "--json")
    assert (found, json.loads(words)["oldest_due_seconds"] >= 200) == (code, True)


def test_max_age_says_that_the_mail_is_late_because_of_a_pause() -> None:
    (row,) = queue()
    change(row, due_at=past(200))
    operations.pause(PLAIN, "moving house")
    code, words = exit_code_of("mail_queue_status", "--max-age", "60")
    assert (code, "moving house" in words) == (1, True)


def test_max_age_with_nothing_due() -> None:
    assert exit_code_of("mail_queue_status", "--max-age", "1") == (0, "No mail is due.\n")


def test_max_age_counts_no_rows() -> None:
    queue()
    with statements() as found:
        run("mail_queue_status", "--max-age", "60")
    assert not any("COUNT(" in statement for statement in found)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119, "119 s"), (125, "2 min"), (7199, "119 min"), (7200, "2 h"), (172_800, "2 days")],
)
def test_durations_are_short(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# --- --mailer ---

MAILER_COMMANDS = [command for command in COMMANDS if command[0] != "purge_mail_log"]


@pytest.mark.parametrize("command", MAILER_COMMANDS)
@pytest.mark.parametrize("name", ["nobody", "nobody.at.all", "tests.mailqueue.engine"])
def test_a_mailer_that_is_not_there_is_refused_with_those_that_are(command: tuple[str, ...], name: str) -> None:
    queue()
    with pytest.raises(CommandError, match=rf"no mailer '{name}'\. Known are: .*{PLAIN}"):
        run(*command, "--mailer", name)


@pytest.mark.parametrize("command", MAILER_COMMANDS)
def test_mailers_are_known_by_the_settings_and_by_their_mail(command: tuple[str, ...]) -> None:
    (row,) = queue()
    change(row, mailer="gone", state="deferred", due_at=future())
    run(*command, "--mailer", "gone", "--mailer", PLAIN)


@pytest.mark.skipif(django.VERSION < (6, 1), reason="Django has no MAILERS")
@pytest.mark.parametrize("chosen", ["front", "behind", PLAIN])
@pytest.mark.parametrize("row_name", ["front", "behind", PLAIN])
def test_a_mailer_is_meant_by_each_of_its_names(chosen: str, row_name: str, settings: SettingsWrapper) -> None:
    """And a row may have any of them: from before MAILERS, or from before the other was put before it."""
    settings.MAILERS = {
        "default": {"BACKEND": OTHER},
        "front": {"BACKEND": "anymail_retry.backends.queued.EmailBackend", "OPTIONS": {"using": "behind"}},
        "behind": {"BACKEND": PLAIN},
    }
    (row,) = queue("a", mailer="behind")
    change(row, mailer=row_name)
    queue("b", mailer="default")
    run("send_mail", "--mailer", chosen)
    assert states() == {"a": "sent", "b": "queued"}


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


def refuse_to_write(execute: Callable[..., Any], sql: str, *args: Any) -> Any:
    if sql.startswith(("UPDATE", "DELETE", "INSERT")):
        raise OperationalError("attempt to write a readonly database")
    return execute(sql, *args)


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("command", [("retry_deferred",), ("purge_mail_log", "3"), ("reencrypt_mail_queue",)])
def test_database_that_fails_is_no_traceback(command: tuple[str, ...], settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_ENCRYPTION_KEYS = ["MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="]
    failed = pytest.raises(CommandError, match=r"^The database failed: attempt to write a readonly database$")
    with failed, connection.execute_wrapper(refuse_to_write):
        run(*command)


def test_wrong_setting_is_named(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_THREADS = "many"
    with pytest.raises(CommandError, match="EMAIL_QUEUE_THREADS"):
        run("send_mail")


def test_migrations_are_complete() -> None:
    call_command("makemigrations", "anymail_retry", check=True, dry_run=True, verbosity=0)


# --- what a terminal sees ---


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


@pytest.mark.parametrize(("verbosity", "has_bar"), [(1, True), (0, False), (2, False)])
def test_progress_and_what_is_printed_do_not_mix(
    verbosity: int, has_bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue()
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    run("send_mail", out=screen, verbosity=verbosity)
    assert ("sending [" in screen.getvalue()) == has_bar
    if has_bar:
        assert re.search(r"1/1, \d+ a second \r\033\[Ksent 1,", screen.getvalue())
    else:
        assert "\r" not in screen.getvalue()


def test_progress_is_cleared_for_an_error() -> None:
    screen = Terminal()
    progress = Progress("sending", 1, stream=screen)
    progress.show(1)
    with pytest.raises(ZeroDivisionError), progress:
        _ = 1 / 0
    assert screen.getvalue().endswith("\r\033[K")


def test_summary_is_one_line() -> None:
    assert summary(Totals(sent=212, deferred=3, failed=1), 4.2) == "sent 212, deferred 3, failed 1, held 0 in 4.2 s"


@pytest.mark.parametrize(
    ("waiting", "due", "being_sent", "words"),
    [
        (0, 0, 0, "nothing waits"),
        (1, 0, 0, "1 waits, the next is due in 40 s"),
        (23, 0, 3, "23 wait, the next is due in 40 s; 3 are being sent by others"),
        (1, 1, 0, "1 waits, due now"),
        (23, 20, 1, "23 wait, 20 of them due now; 1 is being sent by others"),
        (10_001, 0, 0, "more than 10,000 wait, the next is due in 40 s"),
        (20_002, 10_001, 0, "more than 20,000 wait, many of them due now"),
    ],
)
def test_what_remains_is_one_line(waiting: int, due: int, being_sent: int, words: str) -> None:
    now = datetime.now(timezone.utc)
    left = Remaining(waiting, due, being_sent, now + timedelta(seconds=40), now, is_exact=waiting < 10_000)
    assert what_remains(left) == words


def test_pause_of_an_operator_is_shown() -> None:
    queue("a")
    operations.pause(PLAIN, "moving house")
    assert f"{PLAIN} pauses until it is resumed: moving house" in run("send_mail")
    assert states() == {"a": "queued"}
