"""Sphinx configuration."""

from __future__ import annotations

import anymail_retry

project = "django-anymail-retry"
copyright = "django-anymail-retry contributors"  # noqa: A001  Sphinx's name for it
release = version = anymail_retry.__version__

exclude_patterns = ["_build"]
html_theme = "alabaster"
nitpicky = True
