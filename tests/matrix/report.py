"""What the matrix shows, in figures and as a table.

``python -m tests.matrix.report`` runs every cell and prints the figures; it exits with 1 if a message was lost, or
arrived twice where that could have been known. ``--docs`` writes the table of ``docs/faults.rst`` anew.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from anymail_retry.testing.esps import PROVIDERS

from .cases import CASES, QUEUED, RAISED, SENT, WARNED, Case, Ends

PAGE = Path(__file__).parents[2] / "docs" / "faults.rst"
BEGIN, END = ".. begin of the table\n\n", ".. end of the table\n"

# --- The figures ---


@dataclass
class Figures:
    """A pytest plugin that keeps what the cells recorded."""

    cells: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += report.failed
        if report.when == "call":
            self.cells += [value for name, value in report.user_properties if name == "cell"]

    @property
    def lost(self) -> list[dict[str, Any]]:
        """Nobody has the message, and nobody was told."""
        return [cell for cell in self.cells if cell["lost"]]

    @property
    def duplicated(self) -> list[dict[str, Any]]:
        """Arrived twice, and it could have been known."""
        return [cell for cell in self.cells if cell["duplicates"] and not cell["in_doubt"]]

    @property
    def is_good(self) -> bool:
        return bool(self.cells) and not (self.failed or self.lost or self.duplicated)

    def lines(self) -> Iterator[str]:
        paths = Counter(cell["path"] for cell in self.cells)
        yield f"cells tried: {len(self.cells)} ({', '.join(f'{path}: {count}' for path, count in paths.items())})"
        yield f"failed:      {self.failed}"
        yield f"lost:        {len(self.lost)}"
        yield f"duplicated where it could have been known: {len(self.duplicated)}"
        yield from (f"  {cell['path']}, {cell['esp']}: {cell['fault']}" for cell in [*self.lost, *self.duplicated])
        yield ""
        yield "Left open, and no key to settle it; copies that arrive under each policy:"
        for fault, copies in self._in_doubt().items():
            resend, hold = (", ".join(sorted(copies[policy])) or "not tried" for policy in ("resend", "hold"))
            yield f"  {fault}: resend (default) {resend}; hold {hold} (ESPs: {len(copies['esps'])})"

    def _in_doubt(self) -> dict[str, dict[str, set[str]]]:
        found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for cell in self.cells:
            if cell["in_doubt"] and cell["path"] in ("send", "drain", "hold") and cell["kept"]:
                policy = "hold" if cell["path"] == "hold" else "resend"
                found[cell["fault"]][policy].add(str(cell["copies"]))
                found[cell["fault"]]["esps"].add(cell["esp"])
        return found


# --- The table ---

CALLER = {
    SENT: "success",
    QUEUED: "success; queued",
    RAISED: "the exception",
    WARNED: "success, as in Anymail; a warning and ``message_failed``",
}


def table() -> str:
    """The list tables of the documentation, one for each group of faults."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in CASES:
        groups[case.group].append(case)
    return "\n".join(line.rstrip() for group, cases in groups.items() for line in _group(group, cases)) + "\n"


def _group(title: str, cases: Iterable[Case]) -> Iterator[str]:
    yield from (title, "-" * len(title), "")
    yield from (".. list-table::", "   :header-rows: 1", "   :widths: 32 12 14 14 14 14", "")
    yield from _row(
        "Fault", "Verdict", "Tries in the call", "``send()`` gives", "Drained, the row is", "Without the queue"
    )
    for case in cases:
        yield from _rows(case)
    yield ""


def _rows(case: Case) -> Iterator[str]:
    where = f" ({_names(case.only)})" if len(case.only) > 1 else ""
    yield from _row(f"**{case.id}**: {case.what}{where}", *_cells(case.ends))
    exceptions: dict[tuple[Ends, str], list[str]] = defaultdict(list)
    if case.keyed is not None:
        exceptions[case.keyed, ""] = ["under an idempotency key"]
    for esp, (ends, why) in case.others.items():
        exceptions[ends, why].append(PROVIDERS[esp].name)
    for (ends, why), names in exceptions.items():
        yield from _row(f"– {', '.join(names)}{': ' if why else ''}{why}", *_cells(ends))


def _names(esps: Collection[str]) -> str:
    if len(esps) <= len(PROVIDERS) / 2:
        return ", ".join(provider.name for esp, provider in PROVIDERS.items() if esp in esps)
    return "all but " + ", ".join(provider.name for esp, provider in PROVIDERS.items() if esp not in esps)


def _cells(ends: Ends) -> tuple[str, ...]:
    error = "nothing raised" if ends.error is None else f"``{ends.error.__name__}``"
    return f"``{ends.verdict}``", str(ends.tries), CALLER[ends.caller], f"``{ends.row}``", error


def _row(*cells: str) -> Iterator[str]:
    yield f"   * - {cells[0]}"
    yield from (f"     - {cell}" for cell in cells[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix.report", description=__doc__.splitlines()[0])
    parser.add_argument("--docs", action="store_true", help="write the table of docs/faults.rst anew, and run nothing")
    if parser.parse_args(arguments).docs:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(before + BEGIN + table() + "\n" + END + after, encoding="utf-8")
        return 0
    figures = Figures()
    paths = [str(Path(__file__).parent / name) for name in ("test_send.py", "test_drain.py")]
    pytest.main([*paths, "-q", "--tb=short", "-n", "auto", "--dist", "loadfile"], plugins=[figures])
    sys.stdout.write("\n".join(["", *figures.lines(), ""]))
    return 0 if figures.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
