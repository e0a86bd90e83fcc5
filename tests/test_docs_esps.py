"""The page on the ESPs says what the back ends' class attributes say."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_page_on_the_esps_is_made_from_the_facts() -> None:
    """After a change of a fact: ``python docs/esp_table.py > docs/esps.rst``."""
    made = runpy.run_path(str(DOCS / "esp_table.py"))["page"]()
    assert (DOCS / "esps.rst").read_text(encoding="utf-8") == made
