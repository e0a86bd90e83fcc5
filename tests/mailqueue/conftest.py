"""Fixtures of the queue's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from django.db import connection

from anymail_retry.mailqueue import bodies
from anymail_retry.mailqueue.database import disconnect

from . import engine

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has met no attachment yet."""
    monkeypatch.setattr(bodies, "_seen", bodies.Seen())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[engine.Script]:
    """What the back ends of :mod:`tests.mailqueue.engine` do in this test."""
    fresh = engine.Script()
    monkeypatch.setattr(engine, "script", fresh)
    yield fresh
    if connection.connection is not None and not connection.is_usable():
        disconnect("default")  # broken by the test; what empties the tables after it needs one that works
