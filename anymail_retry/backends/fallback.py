"""The fallback queue for any Django e-mail back end: SMTP, Amazon SES, somebody else's.

On Django 6.1 with MAILERS::

    MAILERS = {
        "default": {"BACKEND": "anymail_retry.backends.fallback.EmailBackend", "OPTIONS": {"using": "smtp"}},
        "smtp": {"BACKEND": "django.core.mail.backends.smtp.EmailBackend", "OPTIONS": {"host": "..."}},
    }

Before that::

    EMAIL_BACKEND = "anymail_retry.backends.fallback.EmailBackend"
    EMAIL_FALLBACK_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from anymail.exceptions import AnymailError

from .. import conf
from ..log import get_logger
from ..mailqueue.fallback import Fallback
from ..mailqueue.wrapping import WrappingBackend

if TYPE_CHECKING:
    from django.core.mail import EmailMessage

logger = get_logger("queue")


class EmailBackend(WrappingBackend):
    """Sends through the back end behind it, and keeps in the queue what that could not send.

    :param using: the ``MAILERS`` alias of the back end to send through.
    :param fallback_queue: ``False``: keep nothing.
    :raises ImproperlyConfigured: nothing is behind it, or one that does not send itself; or the queue is wanted and
        its app is missing. Says what line to add.
    """

    setting = "FALLBACK_BACKEND"
    own_settings = (conf.SETTINGS["FALLBACK_QUEUE"],)

    #: None: off.
    fallback: Fallback | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if conf.fallback_is_on(options=self.options):
            self.fallback = Fallback(self.mailer, self.own_options)
        # With the queue on, what fails has to be seen here.
        silently = {"fail_silently": True} if self.fail_silently and self.fallback is None else {}
        self.inner = self.make_inner(**silently)
        if self.fallback is not None:
            self.inner.fail_silently = False
        self._is_open = False
        self._lock = threading.RLock()

    def open(self) -> bool | None:
        """Open the connection behind this one, and keep it until :meth:`close`.

        With the queue on, a connection that does not stand is no reason to raise: each message is tried, and queued.
        """
        self._is_open = True
        if self.fallback is None:
            return self.inner.open()
        with self._lock:
            try:
                return self.inner.open()
            except (AnymailError, OSError):
                self._close_quietly()
                return None

    def close(self) -> None:
        self._is_open = False
        self.inner.close()

    def send_messages(self, email_messages: Iterable[EmailMessage]) -> int:
        messages = list(email_messages or ())
        fallback = self.fallback
        if fallback is None or not messages:
            return self.inner.send_messages(messages) or 0
        try:
            return fallback.send_all(
                messages, self._send, fail_silently=self.fail_silently, anticipated=(AnymailError, OSError)
            )
        finally:
            if not self._is_open:
                with self._lock:
                    self._close_quietly()

    def _send(self, message: EmailMessage) -> bool:
        assert self.fallback is not None  # send_messages() asked
        # Django's SMTP back end serves threads one by one; what is done around it here must too.
        with self._lock:
            return self.fallback.send(self.inner, message)

    def _close_quietly(self) -> None:
        """Close, and let nothing that happens here undo what was sent."""
        try:
            self.inner.close()
        except Exception as error:
            logger.debug("closing %s: %s", self.mailer, error)
