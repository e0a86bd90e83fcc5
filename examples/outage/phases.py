"""What the ESP does in each phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anymail_retry.testing import (
    AcceptThenDrop,
    AcceptThenStall,
    Fault,
    ResetAfterRequest,
    Rule,
    ScriptedEsp,
    Stall,
    Status,
)


@dataclass(frozen=True)
class Trouble:
    """What happens to one message of the flaky phase.

    :param times: how many of its requests meet the fault; None: each of them.
    """

    fault: Fault
    times: int | None = 1


#: By a message's number in the flaky phase, modulo CYCLE; the others meet nothing. Kinds of message come round
#: every 8, so each of them meets each trouble sooner or later.
CYCLE = 25
TROUBLE = {
    1: Trouble(Status(429, retry_after=1)),
    3: Trouble(Status(503)),
    5: Trouble(ResetAfterRequest()),
    7: Trouble(Status(503), times=2),
    10: Trouble(AcceptThenDrop()),
    12: Trouble(Status(503), times=None),
    14: Trouble(Status(429, retry_after=1)),
    17: Trouble(Stall()),
    19: Trouble(Status(503, retry_after=1)),
    21: Trouble(AcceptThenStall()),
    23: Trouble(Status(429), times=None),
}


def healthy(esp: ScriptedEsp, markers: list[str]) -> None:
    esp.script()


def flaky(esp: ScriptedEsp, markers: list[str]) -> None:
    rules = []
    for number, marker in enumerate(markers, start=1):
        trouble = TROUBLE.get(number % CYCLE)
        if trouble is not None:
            rules.append(Rule(trouble.fault, contains=marker, times=trouble.times))
    esp.script(*rules)


def dead(esp: ScriptedEsp, markers: list[str]) -> None:
    esp.script()
    esp.stop_listening()


def recovered(esp: ScriptedEsp, markers: list[str]) -> None:
    esp.start_listening()


@dataclass(frozen=True)
class Phase:
    name: str
    what: str
    begin: Callable[[ScriptedEsp, list[str]], None]


PHASES = (
    Phase("healthy", "answers", healthy),
    Phase("flaky", "429, 503, resets, silence", flaky),
    Phase("dead", "refuses connections", dead),
    Phase("recovered", "answers again", recovered),
)

#: Why an accepted message had no answer, by the name of the fault.
UNANSWERED = {
    "AcceptThenDrop": "accepted, then the connection dropped before the answer",
    "AcceptThenStall": "accepted, then silent until the read timeout",
}
