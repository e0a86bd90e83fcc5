"""Settings of the test suite; everything about the machine comes from environment variables.

``TEST_DATABASE``
    ``sqlite`` (default), ``postgresql`` or ``mariadb``. The servers are found as their own clients find them:
    ``PGHOST``, ``PGPORT``, ``PGUSER``, ``PGPASSWORD`` and ``MYSQL_HOST``, ``MYSQL_PORT``, ``MYSQL_USER``,
    ``MYSQL_PASSWORD``.
``TEST_DATABASE_NAME``
    The name of a database that exists: how a process that a test starts shares that test's database
    (``tests/conftest.py``, fixture ``process_env``).
``TEST_MAIL_SETTINGS``
    ``mailers`` (default where Django has it) or ``legacy``: ``MAILERS`` or ``EMAIL_BACKEND``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import django

BASE_DIR = Path(__file__).resolve().parent

SECRET_KEY = "not a secret: tests only"
ROOT_URLCONF = "tests.urls"
USE_TZ = True
TIME_ZONE = "Europe/Helsinki"  # neither UTC nor without daylight saving: what mixes local time with UTC shows
STATIC_URL = "static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "anymail",
    "anymail_retry",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # fast: nothing here is worth guarding


# --- Databases ---


def _database(alias: str) -> dict[str, Any]:
    """The database of one alias: a name for this process alone, so that runs side by side do not meet."""
    kind = os.environ.get("TEST_DATABASE", "sqlite")
    name = f"anymail_retry_{alias}_{os.getpid()}"
    if kind == "sqlite":
        # A file, not memory: other processes and threads can open it. WAL and IMMEDIATE as the docs advise.
        path = str(Path(tempfile.gettempdir()) / f"{name}.sqlite3")
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ.get("TEST_DATABASE_NAME", path),
            "OPTIONS": {
                "timeout": 30,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            },
            "TEST": {"NAME": path},
        }
    if kind == "postgresql":
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": os.environ.get("TEST_DATABASE_NAME", "postgres"),
            "HOST": os.environ.get("PGHOST", "127.0.0.1"),
            "PORT": os.environ.get("PGPORT", "5432"),
            "USER": os.environ.get("PGUSER", "postgres"),
            "PASSWORD": os.environ.get("PGPASSWORD", ""),
            "TEST": {"NAME": f"test_{name}"},
        }
    if kind == "mariadb":
        return {
            "ENGINE": "django.db.backends.mysql",
            "NAME": os.environ.get("TEST_DATABASE_NAME", "test"),
            "HOST": os.environ.get("MYSQL_HOST", "127.0.0.1"),
            "PORT": os.environ.get("MYSQL_PORT", "3306"),
            "USER": os.environ.get("MYSQL_USER", "root"),
            "PASSWORD": os.environ.get("MYSQL_PASSWORD", ""),
            "OPTIONS": {"charset": "utf8mb4"},
            "TEST": {"NAME": f"test_{name}", "CHARSET": "utf8mb4"},
        }
    raise ValueError(f"TEST_DATABASE={kind!r}: not one of sqlite, postgresql, mariadb")


DATABASES = {
    "default": _database("default"),
    "queue": _database("queue"),  # made only for tests that name it: EMAIL_QUEUE_DATABASE, routers
}


# --- Mail ---

MAIL_SETTINGS = os.environ.get("TEST_MAIL_SETTINGS", "mailers" if django.VERSION >= (6, 1) else "legacy")

if MAIL_SETTINGS == "mailers":
    MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}
elif MAIL_SETTINGS == "legacy":
    EMAIL_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
else:
    raise ValueError(f"TEST_MAIL_SETTINGS={MAIL_SETTINGS!r}: not one of mailers, legacy")
