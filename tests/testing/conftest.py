"""For the tests of the local ESP: its own fixtures, and a look at what each test leaves behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from anymail_retry.testing.pytest import local_esp, spawned_esp

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["local_esp", "spawned_esp"]


def open_sockets() -> int | None:
    """This process's open sockets; None: the system does not tell."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        return None
    return sum(is_socket(link) for link in folder.iterdir())


def is_socket(link: Path) -> bool:
    try:
        return str(link.readlink()).startswith("socket:")
    except FileNotFoundError:  # the one that listed the folder
        return False


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test no new thread and no more sockets than before: the local ESP ends all of its own."""
    threads, sockets = set(threading.enumerate()), open_sockets()
    yield
    assert set(threading.enumerate()) <= threads
    if sockets is None:
        return
    if (open_sockets() or 0) > sockets:
        gc.collect()  # a caught error keeps its response, which keeps urllib3's pool, which keeps the client's socket
    assert (open_sockets() or 0) <= sockets
