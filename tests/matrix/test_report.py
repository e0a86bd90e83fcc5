"""The table of the documentation is the one that the matrix runs; the figures count what they say."""

from __future__ import annotations

from typing import Any

from .cases import CASES
from .report import BEGIN, END, PAGE, Figures, table


def test_faults_page_has_the_table() -> None:
    """``python -m tests.matrix.report --docs`` writes it anew."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    written, end, _ = rest.partition(END)
    assert end
    assert written.strip() == table().strip()


def test_each_fault_stands_in_the_table_once() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
    for case in CASES:
        assert table().count(f"**{case.id}**") == 1


def recorded(**values: Any) -> dict[str, Any]:
    cell = {"path": "send", "esp": "mandrill", "fault": "reset", "kept": True, "copies": 1}
    return {**cell, "lost": False, "duplicates": 0, "in_doubt": False, **values}


def test_one_lost_message_is_not_good() -> None:
    assert Figures([recorded()]).is_good
    assert not Figures([recorded(), recorded(copies=0, lost=True)]).is_good


def test_one_copy_too_many_is_good_only_where_nobody_can_know() -> None:
    assert not Figures([recorded(copies=2, duplicates=1)]).is_good
    figures = Figures([recorded(copies=2, duplicates=1, in_doubt=True)])
    assert figures.is_good
    assert "  reset: resend (default) 2; hold not tried (ESPs: 1)" in figures.lines()


def test_nothing_tried_is_not_good() -> None:
    assert not Figures().is_good
