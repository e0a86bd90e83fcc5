"""The fault matrix: every fault at every ESP, on every path."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.matrix.cell", "tests.matrix.checks")
