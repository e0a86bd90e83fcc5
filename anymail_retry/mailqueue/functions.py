"""Django's mail functions, which store instead of send; ``from anymail_retry import send_mail`` gets them.

They keep Django's signatures, plus ``priority``: ``"high"``, ``"medium"`` or ``"low"``. The mail is sent by the worker,
or by ``manage.py send_mail``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from django import db
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMultiAlternatives
from django.utils.module_loading import import_string

from .. import conf
from ..exceptions import MessageNotQueueable
from ..log import get_logger
from .fallback import OWN_OPTIONS, mailer_name, why_not_stored
from .mailers import canonical
from .wrapping import WrappingBackend, behind

if TYPE_CHECKING:
    from django.core.mail import EmailMessage

    from ..models import QueuedMessage

Priority = str | int | None

logger = get_logger("queue")


def send_mail(
    subject: str,
    message: str,
    from_email: str | None,
    recipient_list: Sequence[str],
    fail_silently: bool = False,
    auth_user: str | None = None,
    auth_password: str | None = None,
    connection: Any = None,
    html_message: str | None = None,
    *,
    using: str | None = None,
    priority: Priority = None,
) -> int:
    """Store one message. As :func:`django.core.mail.send_mail`, which see; returns 1.

    :param fail_silently: return 0 if the message cannot be stored.
    :param connection: only names the mailer. It has to be one of this package's back ends, made without options.
    :param using: ``MAILERS`` alias to send through, later.
    :param priority: ``"high"``, ``"medium"`` (the default) or ``"low"``.
    :raises MessageNotQueueable: the message cannot be kept, or an account was given with it: secrets are not stored.
    :raises ImproperlyConfigured: the app that keeps the queue is missing, or there is no such mailer.
    """
    mail = EmailMultiAlternatives(subject, message, from_email, recipient_list)
    if html_message:
        mail.attach_alternative(html_message, "text/html")
    return _store([mail], using, connection, fail_silently, priority, auth_user, auth_password)


def send_html_mail(
    subject: str,
    message: str,
    message_html: str,
    from_email: str | None,
    recipient_list: Sequence[str],
    fail_silently: bool = False,
    auth_user: str | None = None,
    auth_password: str | None = None,
    headers: dict[str, str] | None = None,
    *,
    using: str | None = None,
    priority: Priority = None,
) -> int:
    """Store one message with a text and an HTML body; django-mailer's function."""
    mail = EmailMultiAlternatives(subject, message, from_email, recipient_list, headers=headers)
    mail.attach_alternative(message_html, "text/html")
    return _store([mail], using, None, fail_silently, priority, auth_user, auth_password)


def send_mass_mail(
    datatuple: Iterable[tuple[str, str, str | None, Sequence[str]]],
    fail_silently: bool = False,
    auth_user: str | None = None,
    auth_password: str | None = None,
    connection: Any = None,
    *,
    using: str | None = None,
    priority: Priority = None,
) -> int:
    """Store many messages, all or none. As :func:`django.core.mail.send_mass_mail`, which see."""
    mails = [EmailMultiAlternatives(subject, body, sender, to) for subject, body, sender, to in datatuple]
    return _store(mails, using, connection, fail_silently, priority, auth_user, auth_password)


def mail_admins(
    subject: str,
    message: str,
    fail_silently: bool = False,
    connection: Any = None,
    html_message: str | None = None,
    *,
    using: str | None = None,
    priority: Priority = None,
) -> None:
    """Store a message to the ADMINS. As :func:`django.core.mail.mail_admins`, which see."""
    mail_to("ADMINS", subject, message, html_message, lambda: _mailer(using, connection), fail_silently, priority)


def mail_managers(
    subject: str,
    message: str,
    fail_silently: bool = False,
    connection: Any = None,
    html_message: str | None = None,
    *,
    using: str | None = None,
    priority: Priority = None,
) -> None:
    """Store a message to the MANAGERS. As :func:`django.core.mail.mail_managers`, which see."""
    mail_to("MANAGERS", subject, message, html_message, lambda: _mailer(using, connection), fail_silently, priority)


def mail_to(
    setting: str,
    subject: str,
    message: str,
    html_message: str | None,
    mailer: Callable[[], str],
    fail_silently: bool = False,
    priority: Priority = None,
) -> None:
    """Store a message to the people in a setting; without any nothing is done, and no mailer is needed.

    :param mailer: gives the name of the mailer that is to send.
    """
    people = getattr(settings, setting)
    if isinstance(people, str):
        raise ImproperlyConfigured(f"The {setting} setting must be a list of email address strings.")
    # (name, address) pairs until Django 5.2, plain addresses since 6.0
    recipients = [person[1] if isinstance(person, (list, tuple)) else person for person in people]
    if not recipients:
        return
    mail = EmailMultiAlternatives(
        f"{settings.EMAIL_SUBJECT_PREFIX}{subject}", message, settings.SERVER_EMAIL, recipients
    )
    if html_message:
        mail.attach_alternative(html_message, "text/html")
    store([mail], mailer=mailer(), priority=priority, fail_silently=fail_silently)


def _store(
    mails: list[EmailMultiAlternatives],
    using: str | None,
    connection: Any,
    fail_silently: bool,
    priority: Priority,
    auth_user: str | None = None,
    auth_password: str | None = None,
) -> int:
    if auth_user is not None or auth_password is not None:
        raise MessageNotQueueable("auth_user, auth_password", OWN_OPTIONS)
    if not isinstance(fail_silently, bool):  # the place where django-mailer has its priority
        raise TypeError(f"fail_silently is {fail_silently!r}, and should be True or False. Write: priority=...")
    rows = store(mails, mailer=_mailer(using, connection), priority=priority, fail_silently=fail_silently)
    return sum(row is not None for row in rows)


def store(
    mails: Sequence[EmailMessage], *, mailer: str, priority: Priority = None, fail_silently: bool = False
) -> list[QueuedMessage | None]:
    """Store messages for a mailer, all or none.

    :param fail_silently: store those that can be, and log the others. Errors of configuration and programming are
        raised.
    :returns: the row of each message; None: it has no recipients, which Django passes over too, or was not stored.
    """
    conf.require_app("A message is to be queued")
    from .enqueue import enqueue  # here, because it needs the app registry

    sendable = [mail for mail in mails if mail.recipients()]
    try:
        rows = iter(enqueue(sendable, mailer=mailer, origin="queued", priority=priority) if sendable else ())
    except (MessageNotQueueable, db.Error) as error:
        if not fail_silently:
            raise
        if len(mails) > 1 and isinstance(error, MessageNotQueueable):
            return [store([mail], mailer=mailer, priority=priority, fail_silently=True)[0] for mail in mails]
        logger.error("%s: not queued: %s", mailer, why_not_stored(error))
        return [None for _ in mails]
    return [next(rows) if mail.recipients() else None for mail in mails]


def default_mailer(using: str | None = None) -> str:
    """The name of the mailer that sends where nothing else is said, or of the one with this alias.

    A back end that stands before another is not meant: its mail would be queued again, or for the wrong name.

    :raises ImproperlyConfigured: there is no such mailer.
    """
    configured = conf.mailers()
    if configured is not None:
        alias = using or "default"
        if alias not in configured:
            from django.core.mail import MailerDoesNotExist  # Django 6.1

            raise MailerDoesNotExist(alias=alias)
        entry = configured[alias]
        return sending(entry.path, alias, entry.options.get("using"))
    if using not in (None, "default"):
        raise ImproperlyConfigured(f"There is no mailer {using!r}, because these settings have no MAILERS.")
    return sending(conf.get("QUEUE_BACKEND") or conf.email_backend())


def sending(path: str, alias: str | None = None, using: str | None = None) -> str:
    """The name of the mailer that sends: this one, or the one behind it."""
    backend = import_string(path)
    if isinstance(backend, type) and issubclass(backend, WrappingBackend):
        return behind(backend, alias, using)
    return alias or canonical(path, backend)


def _mailer(using: str | None, connection: Any) -> str:
    if connection is None:
        return default_mailer(using)
    if using is not None:
        raise TypeError("'connection' is not compatible with 'using'.")
    own_options = getattr(connection, "own_options", None)
    if own_options is None:
        raise MessageNotQueueable(
            "connection",
            f"it cannot be seen whether this {mailer_name(connection)!r} was made with options of its own, which are"
            ' not stored. Leave it out, or name a mailer by its alias: using="<alias>"',
        )
    if own_options:
        raise MessageNotQueueable(", ".join(sorted(own_options)), OWN_OPTIONS)
    return connection.mailer if isinstance(connection, WrappingBackend) else mailer_name(connection)
