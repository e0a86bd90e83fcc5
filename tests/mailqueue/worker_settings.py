"""Settings of worker processes that tests start: the tests' own, with an ESP that a test runs."""

from __future__ import annotations

import json
import os

from tests.settings import *  # noqa: F403  # the same settings, and more

ANYMAIL = json.loads(os.environ["TEST_ANYMAIL"])

for _name, _value in json.loads(os.environ.get("TEST_QUEUE", "{}")).items():
    globals()[f"EMAIL_QUEUE_{_name}"] = _value
