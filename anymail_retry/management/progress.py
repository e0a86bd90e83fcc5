"""A progress bar, for terminals only."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Self

WIDTH = 30


class Progress:
    """Shows how far something is, on standard error if that is a terminal; elsewhere it shows nothing.

    As a context manager it clears the line at the end, for what is printed after it.

    :param total: how much there is to do; more may come.
    """

    def __init__(self, label: str, total: int, *, stream: TextIO | None = None) -> None:
        self.label = label
        self.total = total
        self.stream = stream or sys.stderr
        self.is_shown = self.stream.isatty()
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def show(self, done: int) -> None:
        if not self.is_shown:
            return
        total = max(self.total, done, 1)
        filled = WIDTH * done // total
        rate = done / max(time.monotonic() - self._began, 0.001)
        bar = "#" * filled + "." * (WIDTH - filled)
        self.stream.write(f"\r{self.label} [{bar}] {done}/{total}, {rate:.0f} a second ")
        self.stream.flush()

    def end(self) -> None:
        if self.is_shown:
            self.stream.write("\r\033[K")
            self.stream.flush()
