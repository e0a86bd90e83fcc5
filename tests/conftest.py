"""What every test gets: a closed network, a database server or a visible skip, a hypothesis profile."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from django.conf import settings

if TYPE_CHECKING:
    from collections.abc import Mapping

CI = os.environ.get("CI", "").lower() in {"1", "true"}

# No deadline: on a busy machine one slow example says nothing. In CI what failed must fail again if repeated.
hypothesis.settings.register_profile("anymail_retry", deadline=None)
hypothesis.settings.register_profile("anymail_retry-ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("anymail_retry-ci" if CI else "anymail_retry")


# --- The network is closed ---


class NetworkForbiddenError(AssertionError):
    """A test tried to connect beyond this machine.

    Not an OSError: the code under test must not take it for an ESP that cannot be reached.
    """


def _is_local(address: object) -> bool:
    if not isinstance(address, tuple):
        return True  # a Unix socket's path
    host = address[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _forbid_other_machines(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect" and not _is_local(args[1]):
        args[0].close()  # the caller closes it for an OSError only
        raise NetworkForbiddenError(f"tests stay on this machine; this one connects to {args[1]}")


# An audit hook and not a patched socket class: nothing that the tests see is replaced, and threads and
# collection are covered too.
sys.addaudithook(_forbid_other_machines)


# --- The database ---


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the database: ``-m database`` is what runs on each database server."""
    for item in items:
        if item.get_closest_marker("django_db") or "db" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.database)


@pytest.fixture(scope="session")
def django_db_modify_db_settings(django_db_modify_db_settings_parallel_suffix: None) -> None:
    """Skip what needs a database server that does not answer. In CI it must, so there the error stands."""
    database = settings.DATABASES["default"]
    if CI or not database.get("HOST"):
        return
    host, port = database["HOST"], int(database["PORT"])
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        pytest.skip(f"no {os.environ['TEST_DATABASE']} server at {host}:{port}: {error}")


@pytest.fixture
def process_env(transactional_db: None, pytestconfig: pytest.Config) -> Mapping[str, str]:
    """Environment for a process that uses these settings and shares this test's database."""
    from django.db import connection

    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "PYTHONPATH": str(pytestconfig.rootpath),
        "TEST_DATABASE_NAME": str(connection.settings_dict["NAME"]),
    }
