"""The demo, run as a newcomer runs it but for the environment it makes; and the example site."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.management import call_command
from django.urls import reverse

from anymail_retry.models import QueuedMessage
from anymail_retry.testing import Accepted, LocalEsp, Request
from anymail_retry.testing.pytest import local_esp
from tests.settings import MAIL_SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.test import Client
    from pytest_django.fixtures import SettingsWrapper

__all__ = ["local_esp"]  # a fixture

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the examples with this Python and what it can import."""
    inherited = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    path = {"PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
    return subprocess.run(
        [sys.executable, *command],
        env=inherited | path | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
    )


def demo(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The demo without its environment, and the numbers that it wrote."""
    numbers = folder / "numbers.json"
    command = [str(EXAMPLES / "demo.py"), "--no-venv", "--mail-settings", MAIL_SETTINGS, "--json", str(numbers)]
    result = run(*command, *arguments, PYTHONIOENCODING="utf-8")
    assert numbers.exists(), result.stdout
    return result, json.loads(numbers.read_text(encoding="utf-8"))


# --- The whole of it ---


@pytest.fixture(scope="module")
def outage(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """One run. 25 messages in the flaky phase meet each of its troubles once."""
    return demo(tmp_path_factory.mktemp("demo"), "--messages", "102", "--rate", "100")


def test_every_message_is_delivered_unaltered(outage: tuple[Any, dict[str, Any]]) -> None:
    result, numbers = outage
    assert result.returncode == 0, result.stdout
    ledger = numbers["ledger"]
    assert (ledger["expected"], ledger["delivered"]) == (102, 102)
    assert (ledger["lost"], ledger["altered"], ledger["waiting"]) == ([], [], {})
    assert "Nothing was lost" in result.stdout


def test_each_duplicate_is_explained(outage: tuple[Any, dict[str, Any]]) -> None:
    result, numbers = outage
    duplicates = {duplicate["marker"]: duplicate["why"] for duplicate in numbers["ledger"]["duplicates"]}
    # What was accepted without an answer; the second comes late in the phase, when the circuit breaker may be open.
    assert "flaky-010" in duplicates
    assert set(duplicates) <= {"flaky-010", "flaky-021"}
    for marker, (first, second) in duplicates.items():
        assert f"{marker}  {first}; then {second}" in result.stdout
        assert first in {
            "accepted, then the connection dropped before the answer",
            "accepted, then silent until the read timeout",
        }
        assert second == "accepted, answered 200"
    assert "UNEXPLAINED" not in result.stdout


def test_the_numbers_of_the_table_add_up(outage: tuple[Any, dict[str, Any]]) -> None:
    _result, numbers = outage
    *phases, drain = numbers["phases"]
    assert [phase["name"] for phase in phases] == ["healthy", "flaky", "dead", "recovered"]
    assert drain["name"] == "drain"
    assert sum(phase["messages"] for phase in phases) == 102
    for phase in phases:
        assert phase["messages"] == phase["sent"] + phase["queued"], phase
        assert phase["raised"] == 0
    healthy, _flaky, dead, _recovered = phases
    assert (healthy["queued"], healthy["tries"]) == (0, healthy["messages"])
    assert dead["sent"] == 0
    assert sum(phase["queued"] for phase in phases) == drain["sent"] <= drain["tries"]
    assert sum(row["sent"] for row in numbers["phases"]) == numbers["ledger"]["delivered"] == 102


def test_with_idempotency_keys_nothing_arrives_twice(tmp_path: Path) -> None:
    result, numbers = demo(tmp_path, "--messages", "100", "--rate", "100", "--esp", "resend")

    assert result.returncode == 0, result.stdout
    ledger = numbers["ledger"]
    assert ledger["delivered"] == 100
    assert ledger["duplicates"] == []
    assert ledger["replayed"] >= 1, "no repetition was recognised, so the keys had nothing to prevent"


def test_exit_status_tells_that_mail_was_not_delivered(tmp_path: Path) -> None:
    result, numbers = demo(tmp_path, "--messages", "8", "--no-drain")

    assert result.returncode == 1, result.stdout
    assert {"dead-001", "dead-002"} <= set(numbers["ledger"]["lost"])
    assert "NOT AS IT SHOULD BE" in result.stdout


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("--messages", "3", "at least 4, one for each phase"),
        ("--rate", "0", "at least 1"),
        ("--rate", "-5", "at least 1"),
        ("--threads", "0", "at least 1"),
        ("--threads", "many", "invalid number value: 'many'"),
    ],
)
def test_number_that_makes_no_demo_is_refused(option: str, value: str, what: str) -> None:
    result = run(str(EXAMPLES / "demo.py"), "--no-venv", option, value)
    assert result.returncode == 2
    assert result.stdout.splitlines()[-1] == f"demo.py: error: argument {option}: {what}"


# --- Its judgement ---


BODY = {"message": {"subject": "s"}}


def accepted(request: int, marker: str = "one", body: Any = BODY) -> Accepted:
    return Accepted(
        number=request,
        time=0.0,
        esp="Mandrill",
        recipients=("a@example.com",),
        subject="s",
        marker=marker,
        idempotency_key=None,
        api_key="k",
        message_ids=("1",),
        request=request,
        body=json.dumps(body).encode(),
    )


def request(number: int, status: int | None = 200, fault: str | None = None) -> Request:
    return Request(number, 0.0, 1, 1, "POST", "/", {}, b"", b"", fault=fault, status=status, accepted=number)


DROPPED = "AcceptThenDrop(reset=False)"


@pytest.mark.parametrize(
    ("ledger", "requests", "waiting", "good"),
    [
        pytest.param([accepted(1)], [request(1)], {}, True, id="accepted once"),
        pytest.param([], [], {}, False, id="lost"),
        pytest.param([], [], {"deferred": 1}, False, id="still in the queue"),
        pytest.param([accepted(1)], [request(1)], {"held": 1}, False, id="delivered, but its row is not done"),
        pytest.param([accepted(1, body={})], [request(1)], {}, False, id="another body"),
        pytest.param([accepted(1), accepted(2, marker="two")], [request(1), request(2)], {}, False, id="never sent"),
        pytest.param(
            [accepted(1), accepted(2)],
            [request(1, None, DROPPED), request(2)],
            {},
            True,
            id="twice, and the first had no answer",
        ),
        pytest.param(
            [accepted(1), accepted(2)], [request(1), request(2)], {}, False, id="twice, though the first was answered"
        ),
        pytest.param(
            [accepted(1), accepted(2), accepted(3)],
            [request(1, None, DROPPED), request(2), request(3)],
            {},
            False,
            id="three times, and only one had no answer",
        ),
    ],
)
def test_what_the_ledger_must_say_for_success(
    ledger: list[Accepted], requests: list[Request], waiting: dict[str, int], good: bool
) -> None:
    from outage import report

    judgement = report.judge({"one": BODY}, ledger, requests)
    judgement.waiting = waiting
    assert judgement.good is good


def test_percentile_is_a_time_that_was_measured() -> None:
    from outage import report

    sends = [report.Send(str(n), "sent", 1, float(n)) for n in range(1, 101)]
    row = report.Row.of("healthy", "answers", sends, 1.0)
    assert (row.median, row.p95) == (50.5, 95.0)
    assert report.Row.of("healthy", "answers", sends[:1], 1.0).p95 == 1.0


# --- The example site ---


@pytest.mark.parametrize("mail_settings", sorted({"legacy", MAIL_SETTINGS}))
def test_example_site_passes_its_own_checks(mail_settings: str, tmp_path: Path) -> None:
    result = run(
        str(EXAMPLES / "manage.py"),
        "check",
        "--fail-level=WARNING",
        DEMO_MAIL_SETTINGS=mail_settings,
        DEMO_DATABASE=str(tmp_path / "site.sqlite3"),
    )
    assert result.returncode == 0, result.stdout


@pytest.fixture
def site(settings: SettingsWrapper, local_esp: Callable[..., LocalEsp]) -> LocalEsp:
    """The example site in this process, with the mail settings that it has itself; its ESP."""
    esp = local_esp("mandrill")
    settings.ROOT_URLCONF = "demo_site.urls"
    settings.TEMPLATES = [settings.TEMPLATES[0] | {"DIRS": [EXAMPLES / "demo_site" / "templates"]}]
    settings.DEFAULT_FROM_EMAIL = "The Corner Bookshop <shop@example.com>"
    settings.EMAIL_QUEUE_BACKOFF = 0
    backend = "anymail_retry.backends.RetryableMandrillEmailBackend"
    if MAIL_SETTINGS == "mailers":
        settings.MAILERS = {"default": {"BACKEND": backend, "OPTIONS": esp.options()}}
    else:
        settings.EMAIL_BACKEND = backend
        settings.ANYMAIL = esp.settings()
    return esp


ORDER = {"name": "Ada", "email": "ada@example.org", "book": "吾輩は猫である", "language": "de"}
SUBJECT = "吾輩は猫である: Vielen Dank, dass Sie unsere Website benutzen!"


@pytest.mark.django_db
def test_order_is_confirmed_in_the_customers_language(site: LocalEsp, client: Client) -> None:
    page = client.post(reverse("order"), ORDER, follow=True)

    assert "The ESP took the confirmation to ada@example.org." in page.content.decode()
    assert [(entry.subject, entry.recipients) for entry in site.ledger] == [(SUBJECT, ("ada@example.org",))]


@pytest.mark.django_db
def test_order_during_an_outage_is_confirmed_after_it(site: LocalEsp, client: Client) -> None:
    site.script()
    site.stop_listening()
    page = client.post(reverse("order"), ORDER, follow=True)
    assert "waits in the queue" in page.content.decode()
    assert QueuedMessage.objects.get().state == "deferred"

    site.start_listening()
    call_command("send_mail", verbosity=0)
    assert [entry.subject for entry in site.ledger] == [SUBJECT]
    assert QueuedMessage.objects.get().state == "sent"
