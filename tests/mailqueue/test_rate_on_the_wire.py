"""The rate that worker processes keep together, by what arrives at the ESP and when."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from anymail_retry.mailqueue.gate import SLOT_WIDTH
from anymail_retry.testing.pytest import spawned_esp

from .test_processes import WITHOUT_KEYS, fleet, sent, stop, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from .test_processes import Fleet

__all__ = ["fleet", "spawned_esp"]  # fixtures

pytestmark = pytest.mark.django_db(transaction=True)

WORKERS = 4

ROUNDS = 3

#: Seconds by which two processes' readings of the database's clock may differ where the machine is busy.
CLOCKS = 0.25


def most_in_a_second(arrivals: list[float]) -> int:
    return max(len([other for other in arrivals if first <= other < first + 1]) for first in arrivals)


@pytest.mark.parametrize(("rate", "messages"), [(2, 5), (10, 20), (50, 75)])
def test_four_processes_together_keep_the_rate(fleet: Callable[..., Fleet], rate: int, messages: int) -> None:
    """No message arrives before its place in the line, however busy the machine is; and no second brings more than the
    rate and one, where the machine let them keep their places: it may hold up one message and let the next pass, so the
    best of a few rounds counts."""
    site = fleet(WITHOUT_KEYS)
    queue_settings = {**json.loads(site.env["TEST_QUEUE"]), "RATE": rate, "LEASE": 60, "SEND_MAX": 30, "POLL": 0.2}
    site.env["TEST_QUEUE"] = json.dumps(queue_settings)
    workers = [site.start("runmailer") for _ in range(WORKERS)]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()  # that it begins
    in_a_second: list[int] = []
    for number in range(1, ROUNDS + 1):
        began = time.time()  # the ESP's clock too
        site.fill(messages)
        until(lambda number=number: sent() == number * messages)  # type: ignore[misc]  # bound now
        arrivals = sorted(request.time for request in site.esp.requests)[-messages:]
        assert len(arrivals) == messages
        too_early = {
            place: arrived - began
            for place, arrived in enumerate(arrivals)
            if arrived - began < place * SLOT_WIDTH / rate - CLOCKS
        }
        assert too_early == {}
        in_a_second.append(most_in_a_second(arrivals))
        if in_a_second[-1] <= rate + 1:
            break
    assert min(in_a_second) <= rate + 1
    assert len(site.esp.ledger) == len(in_a_second) * messages
    for worker in workers:
        stop(worker)
        assert worker.returncode == 0
