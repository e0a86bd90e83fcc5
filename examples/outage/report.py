"""What came of the messages: judged by the ESP's own ledger, and laid out for people to read. No I/O."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anymail_retry.testing import Accepted, Request

from .phases import UNANSWERED


@dataclass(frozen=True)
class Send:
    """One call of ``message.send()``."""

    marker: str
    #: ``sent``, ``queued``, or the class name of what was raised.
    result: str
    #: HTTP requests begun, refused connections included.
    tries: int
    milliseconds: float


@dataclass(frozen=True)
class Row:
    """One phase."""

    name: str
    what: str
    messages: int
    sent: int
    queued: int
    raised: int
    tries: int
    #: Milliseconds that one ``send()`` took; None: nobody waited for it.
    median: float | None
    p95: float | None
    seconds: float

    @classmethod
    def of(cls, name: str, what: str, sends: Sequence[Send], seconds: float) -> Row:
        results = [send.result for send in sends]
        times = sorted(send.milliseconds for send in sends)
        return cls(
            name,
            what,
            messages=len(sends),
            sent=results.count("sent"),
            queued=results.count("queued"),
            raised=len(sends) - results.count("sent") - results.count("queued"),
            tries=sum(send.tries for send in sends),
            median=statistics.median(times),
            p95=times[max(0, -(-len(times) * 95 // 100) - 1)],
            seconds=seconds,
        )


@dataclass(frozen=True)
class Duplicate:
    """One message that the ESP accepted more than once."""

    marker: str
    copies: int
    #: What the ESP did with each copy.
    why: tuple[str, ...]
    #: All copies but one had no answer: nobody could have known that they were accepted.
    explained: bool


@dataclass
class Judgement:
    """What the ledger says of the messages that were to be delivered."""

    expected: int
    delivered: int
    lost: list[str]
    #: Accepted with another body than plain Anymail would have sent.
    altered: list[str]
    duplicates: list[Duplicate]
    #: Answered from the ESP's store of idempotency keys: duplicates that did not happen.
    replayed: int
    #: Messages that a worker has not finished with; None of them should be left.
    waiting: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return (
            not self.lost
            and not self.altered
            and not self.waiting
            and self.delivered == self.expected
            and all(duplicate.explained for duplicate in self.duplicates)
        )


def judge(bodies: Mapping[str, Any], ledger: Iterable[Accepted], requests: Iterable[Request]) -> Judgement:
    """Compare what was to be delivered with what the ESP accepted.

    :param bodies: the request body that is to be accepted, by marker.
    """
    by_number = {request.number: request for request in requests}
    accepted: dict[str, list[Accepted]] = defaultdict(list)
    for entry in ledger:
        accepted[entry.marker].append(entry)
    duplicates = []
    for marker, copies in accepted.items():
        if len(copies) > 1:
            outcomes = [by_number[copy.request] for copy in copies]
            unanswered = [request for request in outcomes if request.status is None]
            duplicates.append(
                Duplicate(
                    marker,
                    len(copies),
                    tuple(_what_happened(request) for request in outcomes),
                    explained=len(unanswered) >= len(copies) - 1,
                )
            )
    return Judgement(
        expected=len(bodies),
        delivered=sum(marker in accepted for marker in bodies),
        lost=[marker for marker in bodies if marker not in accepted],
        altered=[
            marker for marker, copies in accepted.items() if any(copy.json() != bodies.get(marker) for copy in copies)
        ],
        duplicates=sorted(duplicates, key=lambda duplicate: duplicate.marker),
        replayed=sum(request.replayed for request in by_number.values()),
    )


def _what_happened(request: Request) -> str:
    if request.status is not None:
        return f"accepted, answered {request.status}"
    fault = (request.fault or "").partition("(")[0]
    return UNANSWERED.get(fault, f"accepted, no answer ({fault})")


HEAD = ("phase", "the ESP", "messages", "sent", "queued", "raised", "HTTP tries", "ms median", "ms 95 %", "seconds")


def table(rows: Sequence[Row]) -> str:
    """The phases as a table."""
    summed = ("messages", "sent", "queued", "raised", "tries", "seconds")
    sums = {name: sum(getattr(row, name) for row in rows) for name in summed}
    total = Row("total", "", median=None, p95=None, **sums)
    return lay_out(HEAD, [_cells(row) for row in (*rows, total)], left=2, rule_before_last=True)


def footnote(rows: Sequence[Row]) -> str:
    """What the table alone would leave a reader wondering about."""
    if any(row.name == "recovered" and row.queued for row in rows):
        return "Queued after the recovery: the circuit breaker was still open, until a probe found the ESP well.\n"
    return ""


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.what,
        str(row.messages or ""),
        str(row.sent),
        str(row.queued),
        str(row.raised),
        str(row.tries),
        "" if row.median is None else f"{row.median:.1f}",
        "" if row.p95 is None else f"{row.p95:.1f}",
        f"{row.seconds:.1f}",
    )


def lay_out(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, rule_before_last: bool = False) -> str:
    """A table in plain text; the first ``left`` columns flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    lines = [line(head), rule, *map(line, rows)]
    if rule_before_last:
        lines.insert(-1, rule)
    return "\n".join(lines)


def verdict(judgement: Judgement, esp: str, *, has_keys: bool, on_ambiguous: str) -> str:
    """The ledger's judgement, each duplicate explained."""
    numbers = [
        ("delivered", f"{judgement.delivered} of {judgement.expected}", ""),
        ("lost", str(len(judgement.lost)), ", ".join(judgement.lost)),
        (
            "altered",
            str(len(judgement.altered)),
            ", ".join(judgement.altered) or "each is what plain Anymail would send",
        ),
        ("duplicated", str(len(judgement.duplicates)), _prevented(judgement, has_keys=has_keys)),
    ]
    if judgement.waiting:
        waiting = ", ".join(f"{count} {state}" for state, count in sorted(judgement.waiting.items()))
        numbers.append(("unfinished", str(sum(judgement.waiting.values())), waiting))
    widest = max(len(number) for _, number, _ in numbers)
    lines = [f"By {esp}'s own ledger:"]
    lines += [f"  {name:<10}  {number:>{widest}}  {note}".rstrip() for name, number, note in numbers]
    if judgement.duplicates:
        lines += ["", *_explanation(judgement, esp, on_ambiguous)]
    return "\n".join(lines)


def _prevented(judgement: Judgement, *, has_keys: bool) -> str:
    if has_keys:
        return f"{judgement.replayed} repetitions recognised by their idempotency key"
    return ""


def _explanation(judgement: Judgement, esp: str, on_ambiguous: str) -> Iterable[str]:
    yield f"Why twice: {esp} has no idempotency keys. Where no answer came, nobody can know whether a message was"
    yield f'taken; EMAIL_QUEUE_ON_AMBIGUOUS = "{on_ambiguous}" prefers twice to never ("hold" leaves it to a person).'
    for duplicate in judgement.duplicates:
        why = "; then ".join(duplicate.why)
        yield f"  {duplicate.marker}  {why}" + ("" if duplicate.explained else "  (UNEXPLAINED)")
