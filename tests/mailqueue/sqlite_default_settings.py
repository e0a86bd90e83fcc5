"""Settings of worker processes on SQLite, with Django's defaults."""

from __future__ import annotations

from tests.mailqueue.worker_settings import *  # noqa: F403  # the same settings, and other ones of the database
from tests.mailqueue.worker_settings import DATABASES

DATABASES["default"]["OPTIONS"] = {"timeout": 60}  # as many seconds as a test waits; 5 is Django's
