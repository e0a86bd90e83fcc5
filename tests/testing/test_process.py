"""The local ESP in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests

from anymail_retry.testing import (
    AcceptThenDrop,
    DropInHandshake,
    Latency,
    LocalEsp,
    Rule,
    SpawnedEsp,
    Stall,
    Status,
)

from .client import MANDRILL, PATIENCE, Client, mandrill

if TYPE_CHECKING:
    from collections.abc import Callable

    from anymail_retry.testing import Request


def post(esp: SpawnedEsp, marker: str = "m-1") -> requests.Response:
    return requests.post(esp.origin + MANDRILL, mandrill(marker), timeout=30)


def is_fifth(request: Request) -> bool:
    return request.number == 5


def test_it_does_all_that_the_local_one_does(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp("mandrill", api_keys=["k"])
    assert esp.pid != os.getpid()
    assert esp.options() == {"api_url": f"https://127.0.0.1:{esp.port}/api/1.0", "api_key": "k"}
    assert esp.settings()["MANDRILL_API_URL"] == esp.url
    with LocalEsp() as local:
        assert esp.ca_file == local.ca_file  # one bundle for all
    assert post(esp).ok

    esp.script(Rule(Status(429, retry_after=1), nth=1), Rule(AcceptThenDrop(), contains="m-3"))
    assert post(esp, "m-2").headers["Retry-After"] == "1"
    with pytest.raises(requests.ConnectionError):
        post(esp, "m-3")
    assert [accepted.marker for accepted in esp.ledger] == ["m-1", "m-3"]
    assert [request.status for request in esp.requests] == [200, 429, None]
    assert esp.requests[2].fault == "AcceptThenDrop(reset=False)"
    assert esp.ledger[0].body == esp.requests[0].body == mandrill()

    esp.stop_listening()
    with pytest.raises(requests.ConnectionError, match="refused"):
        post(esp)
    esp.start_listening()
    assert post(esp, "m-4").ok
    assert len(esp.ledger) == 3  # and the first two are the same as before
    assert [accepted.number for accepted in esp.ledger] == [1, 2, 3]

    with requests.Session() as session:
        session.post(esp.origin + MANDRILL, mandrill(), timeout=30)
        assert esp.close_idle_connections() == 1
    assert esp.counts == (5, 4, 5, 0, 0)

    esp.script(Stall(), Latency(None))
    with Client(esp) as client:
        client.send(mandrill(), MANDRILL)
        esp.wait_for(6, stalled=1)
        esp.release()
        assert client.receive() == b""

    esp.latency = 0.05
    assert esp.latency == 0.05
    esp.reset()
    assert (esp.ledger, esp.requests) == ([], [])
    start = time.monotonic()
    assert post(esp).ok
    assert time.monotonic() - start >= 0.05
    assert [accepted.number for accepted in esp.ledger] == [1]

    with pytest.raises(TimeoutError, match="requests=9 "):
        esp.wait_for(9, timeout=0.01)
    esp.wait_for(1, accepted=1)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels refuse when the backlog is full")
def test_it_may_be_a_black_hole(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp()
    esp.black_hole()
    with pytest.raises(requests.ConnectTimeout):
        requests.post(esp.url, timeout=0.2)
    esp.start_listening()
    assert post(esp).ok


def test_its_clock_moves(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp("sparkpost", tls=False)
    body = {"recipients": [], "content": {}}
    for _ in range(2):
        requests.post(
            esp.url + "transmissions/", json=body, headers={"Idempotency-Key": "k"}, timeout=30
        ).raise_for_status()
        esp.advance(24 * 3600)
    first, second = esp.ledger
    assert second.time - first.time >= 24 * 3600


def test_errors_come_through(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp("sendgrid", tls=False)
    with pytest.raises(ValueError, match="SendGrid has no 'quota' of status 429"):
        esp.script(Status(429, kind="quota"))
    with pytest.raises(OSError, match="in use"):
        SpawnedEsp("sendgrid", tls=False, port=esp.port).start()


def test_function_that_cannot_travel_is_refused(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp(tls=False)
    with pytest.raises(TypeError, match="can be imported"):
        esp.script(Rule(Status(503), when=lambda request: True))
    esp.script(Rule(Status(503), when=is_fifth))  # of a module that its process can import
    assert [post(esp).status_code for _ in range(6)] == [200, 200, 200, 200, 503, 200]


def test_bodies_need_not_travel(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp(tls=False, keep_bodies=False)
    post(esp)
    assert esp.ledger[0].body == b""


def test_what_it_prints_is_not_among_its_answers(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp(tls=False)
    esp.script(Rule(Status(503), when=print))
    assert post(esp).ok
    assert len(esp.requests) == 1


def test_closing_ends_the_process(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp()
    esp.script(DropInHandshake(), Stall())
    pid = esp.pid
    esp.close()
    esp.close()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(RuntimeError, match="not running"):
        _ = esp.counts


def test_process_that_has_ended_is_an_error(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp(tls=False)
    os.kill(esp.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="process has ended"):
        esp.wait_for(1)


def test_ctrl_c_is_its_parents_to_act_upon(spawned_esp: Callable[..., SpawnedEsp]) -> None:
    esp = spawned_esp(tls=False)
    os.kill(esp.pid, signal.SIGINT)
    assert post(esp).ok


def test_it_ends_with_the_process_that_spawned_it() -> None:
    code = (
        "import sys\n"
        "from anymail_retry.testing import LocalEsp\n"
        "esp = LocalEsp.spawn(tls=False).start()\n"
        "print(esp.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    end = time.monotonic() + PATIENCE
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # one that nobody has waited for
