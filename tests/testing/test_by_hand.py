"""``python -m anymail_retry.testing``, the pytest fixtures, and what a fresh interpreter loads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import requests
from django.conf import settings

from anymail_retry.testing import no_waiting
from anymail_retry.testing.__main__ import parser

if TYPE_CHECKING:
    from pathlib import Path

ROOT = os.getcwd()


def test_esp_by_hand_prints_the_settings_and_each_request() -> None:
    command = [sys.executable, "-m", "anymail_retry.testing", "--esp", "postmark", "--fault", "503", "--every", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            printed = ""
            while "REQUESTS_CA_BUNDLE" not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            given = dict(re.findall(r'"(\w+)": "([^"]*)"', printed))
            assert given.keys() == {"POSTMARK_API_URL", "POSTMARK_SERVER_TOKEN"}
            ca_file = re.search(r"REQUESTS_CA_BUNDLE=(\S+)", printed)
            assert ca_file
            statuses = []
            with requests.Session() as session:
                session.trust_env = False
                for _ in range(2):
                    body = {"To": "to@example.com"}
                    url = given["POSTMARK_API_URL"] + "email"
                    statuses.append(session.post(url, json=body, verify=ca_file[1], timeout=30).status_code)
            assert statuses == [200, 503]
        finally:
            process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert "#1 POST /email: 200, accepted as 1\n" in rest
    assert "#2 POST /email: fault Status(code=503" in rest
    assert "2 requests, 1 accepted" in rest
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(["--esp", "madrill"], "invalid choice: 'madrill'", id="no ESP"),
        pytest.param(["--fault", "Explode"], "neither an HTTP status nor a fault", id="no fault"),
        pytest.param(["--fault", "Fault"], "neither an HTTP status nor a fault", id="only the base of faults"),
        pytest.param(["--fault", "Status"], "needs arguments", id="a fault that needs arguments"),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(arguments)
    assert complaint in capsys.readouterr().err


def test_fixtures_start_trust_and_close(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["anymail_retry.testing.pytest"]\n')
    (tmp_path / "test_it.py").write_text(
        "import requests\n"
        "def test_local(local_esp):\n"
        "    esp = local_esp('resend')\n"
        "    assert requests.post(esp.url + 'emails', json={'to': 'to@example.com'}).ok\n"
        "    assert local_esp().port != esp.port\n"
        "def test_spawned(spawned_esp):\n"
        "    esp = spawned_esp('resend')\n"
        "    assert requests.post(esp.url + 'emails', json={'to': 'to@example.com'}).ok\n"
        "    assert len(esp.ledger) == 1\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            ".",
            "-c",
            os.devnull,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT, "DJANGO_SETTINGS_MODULE": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_importing_it_reads_no_settings_and_needs_no_extra() -> None:
    code = (
        "import sys\n"
        "sys.modules['trustme'] = None\n"
        "sys.modules['pytest'] = None\n"
        "import anymail_retry.testing\n"
        "assert 'django' not in sys.modules\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)


def test_no_waiting_takes_the_backoff_away_and_gives_it_back() -> None:
    with no_waiting():
        assert (settings.EMAIL_RETRY_BACKOFF_FACTOR, settings.EMAIL_RETRY_BACKOFF_JITTER) == (0, 0)
    assert not hasattr(settings, "EMAIL_RETRY_BACKOFF_FACTOR")


@no_waiting()
def test_no_waiting_is_a_decorator_too() -> None:
    assert settings.EMAIL_RETRY_BACKOFF_FACTOR == 0
