"""Settings of a site that comes from django-mailer or post_office: the tests' own, with both installed."""

from __future__ import annotations

from tests.settings import *  # noqa: F403  # the same settings, and more
from tests.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "mailer", "post_office"]
MAILER_USE_FILE_LOCK = False
