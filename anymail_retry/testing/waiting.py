"""No waits between HTTP retries, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from django.test import override_settings


def no_waiting() -> override_settings:
    """A decorator or ``with`` block in which HTTP retries follow at once.

    It sets ``EMAIL_RETRY_BACKOFF_FACTOR`` and ``EMAIL_RETRY_BACKOFF_JITTER`` to 0. Values in a mailer's OPTIONS or in
    ``ANYMAIL`` go before these; a ``Retry-After`` that the ESP sends is still obeyed.
    """
    from django.test import override_settings

    return override_settings(EMAIL_RETRY_BACKOFF_FACTOR=0, EMAIL_RETRY_BACKOFF_JITTER=0)
