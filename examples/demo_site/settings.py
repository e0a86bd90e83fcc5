"""Settings of a small site that mails through Mandrill. What this library asks for stands under "Mail" and DATABASES.

Read from the environment, all optional:

``MANDRILL_API_KEY``, ``MANDRILL_API_URL``
    Your account, or a local ESP. Without them nobody answers, and every message waits in the queue.
``REQUESTS_CA_BUNDLE``
    Read by requests itself: the CA of a local ESP.
``DEMO_MAIL_SETTINGS``
    ``mailers`` (default where Django has it) or ``legacy``: ``MAILERS``, or ``EMAIL_BACKEND`` with ``ANYMAIL``.
``DEMO_DATABASE``
    Path of the SQLite file.
``DEMO_DEBUG``
    ``0``: ``DEBUG = False``.
"""

from __future__ import annotations

import os
from pathlib import Path

import django

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = "not a secret: this site is an example"
DEBUG = os.environ.get("DEMO_DEBUG", "1") != "0"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
ROOT_URLCONF = "demo_site.urls"
STATIC_URL = "static/"
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "anymail",
    "anymail_retry",
    "demo_site",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
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

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DEMO_DATABASE", str(BASE_DIR / "demo.sqlite3")),
        # Web processes and workers write to the queue at the same time: let them wait, not fail.
        "OPTIONS": {
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        },
    }
}


# --- Mail ---

DEFAULT_FROM_EMAIL = "The Corner Bookshop <shop@example.com>"
SERVER_EMAIL = "site@example.com"
MANAGERS = ["owner@example.com"]

MANDRILL_API_KEY = os.environ.get("MANDRILL_API_KEY", "test-api-key")
MANDRILL_API_URL = os.environ.get("MANDRILL_API_URL", "https://localhost:1/api/1.0/")

if os.environ.get("DEMO_MAIL_SETTINGS", "mailers" if django.VERSION >= (6, 1) else "legacy") == "mailers":
    MAILERS = {
        "default": {
            "BACKEND": "anymail_retry.backends.RetryableMandrillEmailBackend",
            "OPTIONS": {"api_key": MANDRILL_API_KEY, "api_url": MANDRILL_API_URL},
        }
    }
else:
    EMAIL_BACKEND = "anymail_retry.backends.RetryableMandrillEmailBackend"
    ANYMAIL = {"MANDRILL_API_KEY": MANDRILL_API_KEY, "MANDRILL_API_URL": MANDRILL_API_URL}
