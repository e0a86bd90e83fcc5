"""Queue first: ``send()`` stores, and a worker sends in the background, through any Django e-mail back end.

On Django 6.1 with MAILERS::

    MAILERS = {
        "default": {"BACKEND": "anymail_retry.backends.queued.EmailBackend", "OPTIONS": {"using": "mandrill"}},
        "mandrill": {"BACKEND": "anymail_retry.backends.RetryableMandrillEmailBackend"},
    }

Before that::

    EMAIL_BACKEND = "anymail_retry.backends.queued.EmailBackend"
    EMAIL_QUEUE_BACKEND = "anymail_retry.backends.RetryableMandrillEmailBackend"
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .. import conf
from ..exceptions import MessageNotQueueable
from ..mailqueue.fallback import OWN_OPTIONS, forget_earlier_send, queued_status, tell_queued
from ..mailqueue.functions import store
from ..mailqueue.wrapping import WrappingBackend

if TYPE_CHECKING:
    from django.core.mail import EmailMessage


class EmailBackend(WrappingBackend):
    """Stores every message for the back end behind it. The row is the receipt: ``message.queued_message``.

    ``message.anymail_status`` says "queued" for each recipient.

    :param using: the ``MAILERS`` alias of the back end to send through, later.
    :raises ImproperlyConfigured: nothing is behind it, or one that does not send itself, or the app that keeps the
        queue is missing. Says what line to add.
    """

    setting = "QUEUE_BACKEND"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        conf.require_app(f"Mail goes through {__name__}")

    def send_messages(self, email_messages: Iterable[EmailMessage]) -> int:
        """Store the messages, all or none, and return how many. With ``fail_silently`` those that can be.

        :raises MessageNotQueueable: one of them cannot be kept exactly; says which part of it.
        """
        if self.own_options:
            raise MessageNotQueueable(", ".join(sorted(self.own_options)), OWN_OPTIONS)
        messages = [message for message in email_messages or () if message.recipients()]
        for message in messages:
            forget_earlier_send(message)
        statuses = [queued_status(message) for message in messages]
        rows = store(messages, mailer=self.mailer, fail_silently=self.fail_silently)
        for message, status, row in zip(messages, statuses, rows, strict=True):
            if row is not None:
                tell_queued(message, status, row)
        return sum(row is not None for row in rows)
