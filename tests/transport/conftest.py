"""For the tests of the transport: local ESPs, a clock, and connections that no other test has used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from anymail_retry import close_connections
from anymail_retry.testing import LocalEsp
from anymail_retry.testing.pytest import local_esp, spawned_esp

from .clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["local_esp", "spawned_esp"]


#: What requests obeys in the environment of whoever runs the tests.
VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(autouse=True)
def own_connections() -> Iterator[None]:
    yield
    close_connections()


@pytest.fixture
def esp(local_esp: Callable[..., LocalEsp]) -> LocalEsp:
    return local_esp("mandrill")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
