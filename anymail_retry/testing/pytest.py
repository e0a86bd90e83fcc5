"""Fixtures for pytest, where a ``conftest.py`` names them: ``pytest_plugins = ["anymail_retry.testing.pytest"]``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from anymail_retry.testing.local import LocalEsp
from anymail_retry.testing.process import SpawnedEsp


@pytest.fixture
def local_esp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalEsp]]:
    """Start local ESPs in this process: ``local_esp("resend", latency=0.01)``. Trusted and closed for you."""
    with contextlib.ExitStack() as stack:

        def start(esp: str = "mandrill", **options: Any) -> LocalEsp:
            started = stack.enter_context(LocalEsp(esp, **options))
            for name, value in started.environ.items():
                monkeypatch.setenv(name, value)
            return started

        yield start


@pytest.fixture
def spawned_esp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SpawnedEsp]]:
    """As ``local_esp``, each in a process of its own."""
    with contextlib.ExitStack() as stack:

        def start(esp: str = "mandrill", **options: Any) -> SpawnedEsp:
            started = stack.enter_context(LocalEsp.spawn(esp, **options))
            for name, value in started.environ.items():
                monkeypatch.setenv(name, value)
            return started

        yield start
