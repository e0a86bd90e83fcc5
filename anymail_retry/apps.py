"""The Django app: needed for the queue, not for the retries alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core import checks


class AnymailRetryConfig(AppConfig):
    name = "anymail_retry"
    verbose_name = "E-mail queue"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        checks.register(check_settings)
        if getattr(settings, "MAILER_FOR_CRASH_EMAILS", False) is True:  # a check speaks of any other value
            from .mailqueue import crash_mail

            crash_mail.install()


def check_settings(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[checks.CheckMessage]:
    """The system checks, whose module is loaded when they run."""
    from . import checks as ours

    return ours.check_settings(app_configs, **kwargs)
