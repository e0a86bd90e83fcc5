"""Fixtures of the matrix: one local ESP per provider, and the surroundings of a cell."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import trustme

from anymail_retry import close_connections
from anymail_retry.testing import LocalEsp
from tests.settings import MAIL_SETTINGS

from .cases import KEYED, QUEUED
from .cell import Cell, fresh

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_django.fixtures import SettingsWrapper

    from .cases import Case, Ends


@pytest.fixture(scope="package")
def running_esps() -> Iterator[dict[str, LocalEsp]]:
    """The local ESPs that run, by name. Each is started for the first cell that needs it."""
    with contextlib.ExitStack() as stack:
        stack.callback(close_connections)

        class Running(dict[str, LocalEsp]):
            def __missing__(self, name: str) -> LocalEsp:
                self[name] = stack.enter_context(LocalEsp(name))
                return self[name]

        yield Running()


@pytest.fixture
def esp(request: pytest.FixtureRequest, running_esps: dict[str, LocalEsp]) -> Iterator[LocalEsp]:
    """The local ESP that the test's parameter names, as new."""
    esp = running_esps[request.param]
    fresh(esp)
    yield esp
    fresh(esp)


@pytest.fixture(scope="session")
def untrusted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a CA bundle that has nothing to do with the local ESP."""
    path: Path = tmp_path_factory.mktemp("ca") / "other.pem"
    trustme.CA().cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture
def cell(esp: LocalEsp, db: None, settings: SettingsWrapper, monkeypatch: pytest.MonkeyPatch, untrusted: str) -> Cell:
    return Cell(esp, settings, monkeypatch, MAIL_SETTINGS, untrusted)


@pytest.fixture
def ends(cell: Cell, case: Case) -> Ends:
    """What is expected of a cell."""
    return case.of(cell.esp.esp)


class Record(Protocol):
    """Keeps for ``report.py`` what became of a message."""

    def __call__(self, path: str, message: Any, *, told: bool) -> None: ...


@pytest.fixture
def record(cell: Cell, case: Case, ends: Ends, record_property: Callable[[str, object], None]) -> Record:
    def record(path: str, message: Any, *, told: bool) -> None:
        copies = cell.accepted(message)
        record_property(
            "cell",
            {
                "path": path,
                "esp": cell.esp.esp,
                "fault": case.id,
                "kept": ends.caller == QUEUED,
                "copies": copies,
                "lost": copies == 0 and not told,
                "duplicates": max(copies - 1, 0),
                "in_doubt": ends.verdict == "ambiguous" and cell.esp.esp not in KEYED,
            },
        )

    return record
