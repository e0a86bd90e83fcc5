"""The package as it is shipped, and the promises of its README about itself."""

from __future__ import annotations

import importlib.metadata
import re
import socket
from pathlib import Path

import pytest

import anymail_retry

CHECKOUT = Path(__file__).parent.parent


def shell_blocks(text: str) -> list[str]:
    """The contents of every ``.. code-block:: shell`` of a reStructuredText document, in order."""
    blocks = re.findall(r"^\.\. code-block:: shell\n((?: +:.*\n)*)((?:[ \t]*\n| +.*\n?)+)", text, re.MULTILINE)
    return [re.sub(r"^ +", "", body, flags=re.MULTILINE).strip() for _options, body in blocks]


def test_shell_blocks_are_found() -> None:
    text = (
        "Title\n=====\n\n.. code-block:: shell\n\n    one\n    two\n\nText.\n\n"
        ".. code-block:: python\n\n    no\n\n.. code-block:: shell\n   :caption: c\n\n   three && four\n"
    )
    assert shell_blocks(text) == ["one\ntwo", "three && four"]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """The second command that a newcomer reads is the one that is known to work."""
    _demo, command, *_ = shell_blocks((CHECKOUT / "README.rst").read_text(encoding="utf-8"))
    assert "nox" in command
    lines = [line.strip() for line in (CHECKOUT / ".ci/run").read_text(encoding="utf-8").splitlines()]
    assert command in lines


def test_version_is_the_one_installed() -> None:
    try:
        installed = importlib.metadata.version("django-anymail-retry")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed: there is no metadata to compare with")
    assert installed == anymail_retry.__version__


def test_changelog_begins_with_this_version() -> None:
    changelog = (CHECKOUT / "CHANGELOG.rst").read_text(encoding="utf-8")
    newest = re.search(r"^(\d\S*) \(.+\)\n-+$", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == anymail_retry.__version__


def test_type_checkers_read_the_types_of_the_package() -> None:
    assert (Path(anymail_retry.__file__).parent / "py.typed").is_file()


def test_the_network_is_closed_to_the_tests() -> None:
    with socket.socket() as client, pytest.raises(AssertionError, match="stay on this machine"):
        client.connect(("192.0.2.1", 80))  # an address reserved for documentation


def test_this_machine_is_open_to_the_tests() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
