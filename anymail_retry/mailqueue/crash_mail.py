"""``MAILER_FOR_CRASH_EMAILS = True``: Django's crash mail goes by the queue.

A crash that sends mail makes the site wait for the ESP, just when many requests crash at once.
"""

from __future__ import annotations

from typing import Any

from django.db import connections
from django.utils.log import AdminEmailHandler

from ..log import get_logger
from . import functions
from .database import queue_database

logger = get_logger("queue")

_send_directly = AdminEmailHandler.send_mail


def install() -> None:
    """Have every ``AdminEmailHandler`` store its mail; a handler whose class has a ``send_mail`` of its own is left
    alone. May be called again."""
    AdminEmailHandler.send_mail = _store  # type: ignore[method-assign,assignment]  # the hook that Django documents for subclasses


def _store(handler: AdminEmailHandler, subject: str, message: str, *args: Any, **kwargs: Any) -> None:
    try:
        # What is stored inside a transaction goes with it if it is rolled back, which a crash often has done.
        if not connections[queue_database()].in_atomic_block:
            # A crash comes seldom alone, and the site's own mail should not stand in line behind its mails.
            html = kwargs.get("html_message")
            functions.mail_to("ADMINS", subject, message, html, lambda: _mailer(handler), priority="low")
            return
    except Exception:
        # The database may be what crashed. The mail must not be lost over the queue.
        logger.exception("A crash mail could not be queued, and is sent directly")
    _send_directly(handler, subject, message, *args, **kwargs)


def _mailer(handler: AdminEmailHandler) -> str:
    path = getattr(handler, "email_backend", None)  # deprecated in Django 6.1, in favour of "using"
    return functions.sending(path) if path else functions.default_mailer(getattr(handler, "using", None))
