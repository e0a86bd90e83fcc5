"""Retries, a fallback queue and a mail queue for Django sites that send through django-anymail.

The mail functions are Django's, with a ``priority``, and store instead of send. Importing this package loads no model
and reads no setting.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mailqueue.functions import mail_admins, mail_managers, send_html_mail, send_mail, send_mass_mail
    from .transport.breaker import breakers, reset_breakers
    from .transport.mixins import RetryMixin
    from .transport.policy import RetryPolicy
    from .transport.pools import close_connections

__version__ = "0.1.0"

__all__ = [
    "RetryMixin",
    "RetryPolicy",
    "breakers",
    "close_connections",
    "mail_admins",
    "mail_managers",
    "reset_breakers",
    "send_html_mail",
    "send_mail",
    "send_mass_mail",
]

_HOMES = {
    "breakers": "transport.breaker",
    "reset_breakers": "transport.breaker",
    "RetryMixin": "transport.mixins",
    "RetryPolicy": "transport.policy",
    "close_connections": "transport.pools",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'mailqueue.functions')}"), name)
