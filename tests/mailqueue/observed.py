"""All that the outside can see of a message: what each ESP is sent, what Anymail reads from it, and its MIME."""

from __future__ import annotations

import email.policy
import importlib
import importlib.util
import random
import warnings
from contextlib import contextmanager
from datetime import datetime, timezone
from email.message import Message, MIMEPart
from email.mime.base import MIMEBase
from typing import TYPE_CHECKING, Any
from unittest import mock

import django
import django.core.mail.message
import requests
from anymail.utils import Attachment, EmailAddress
from django.test import override_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.core.mail import EmailMessage

# Whatever an ESP cannot do is left out of its request, so that each sees as much of the message as it can.
OPTIONS: dict[str, dict[str, Any]] = {
    "brevo": {"api_key": "k"},
    "mailersend": {"api_token": "k"},
    "mailgun": {"api_key": "k", "sender_domain": "example.com"},
    "mailjet": {"api_key": "k", "secret_key": "k"},
    "mailtrap": {"api_token": "k"},
    "mandrill": {"api_key": "k"},
    "postal": {"api_key": "k", "api_url": "https://postal.example.com"},
    "postmark": {"server_token": "k"},
    "resend": {"api_key": "k"},
    "scaleway": {"secret_key": "k", "project_id": "p"},
    "sendgrid": {"api_key": "k", "generate_message_id": False},
    "sparkpost": {"api_key": "k"},
    "unisender_go": {"api_key": "k", "api_url": "https://go.example.com", "generate_message_id": False},
}
SETTINGS = {"IGNORE_UNSUPPORTED_FEATURES": True}


class Failed(str):
    """Instead of an observation."""

    __slots__ = ()


class _Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]  # a plain datetime
        return datetime(2030, 1, 2, 3, 4, 5, tzinfo=tz or timezone.utc)


@contextmanager
def _generated_alike() -> Iterator[None]:
    """What is made anew for each send (Message-ID, Date, boundaries) comes out the same each time."""
    module = django.core.mail.message
    names: dict[str, Any] = {
        "make_msgid": lambda domain: "<generated@example.com>",
        "datetime": _Clock,  # Django 6.1
        "formatdate": lambda *args, **kwargs: "Wed, 02 Jan 2030 03:04:05 -0000",  # before
    }
    patches = [mock.patch.object(module, name, made) for name, made in names.items() if hasattr(module, name)]
    state = random.getstate()
    random.seed(1)
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        random.setstate(state)


def observe(message: EmailMessage, esps: Any = tuple(OPTIONS)) -> dict[str, Any]:
    """By name of the observer: what it saw, or the error that it ran into."""
    observers: dict[str, Callable[[], Any]] = {"anymail": lambda: _anymail(message)}
    observers |= {esp: lambda esp=esp: _request(esp, message) for esp in esps}  # type: ignore[misc]  # mypy/12557
    if importlib.util.find_spec("boto3"):
        observers["amazon_ses"] = lambda: _amazon_ses(message)
    observers["mime"] = lambda: message.message().as_bytes()
    observers["smtp"] = lambda: _smtp(message)
    observers["parts by themselves"] = lambda: _parts(message)
    observers["recipients"] = lambda: [str(recipient) for recipient in message.recipients()]
    seen = {}
    for name, look in observers.items():
        with _generated_alike(), override_settings(ANYMAIL=SETTINGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what each back end thinks of the message, or Anymail of SendGrid
            try:
                seen[name] = look()
            except Exception as error:  # an error is an observation too: both must run into it
                seen[name] = Failed(f"{type(error).__name__}: {str(error)[:200]}")
    return seen


def _backend(name: str, **options: Any) -> Any:
    return importlib.import_module(f"anymail.backends.{name}").EmailBackend(**options)


def _request(esp: str, message: EmailMessage) -> Any:
    backend = _backend(esp, **OPTIONS[esp])
    payload = backend.build_message_payload(message, {})
    request = requests.Request(**payload.get_request_params(backend.api_url)).prepare()
    body = request.body.encode() if isinstance(request.body, str) else request.body or b""
    _, _, boundary = request.headers.get("Content-Type", "").partition("boundary=")
    if boundary:
        body = body.replace(boundary.encode(), b"boundary")
        request.headers["Content-Type"] = "multipart"
    return request.method, request.url, dict(request.headers), body


def _parts(message: EmailMessage) -> Any:
    """What is asked of parts by nobody but their user, before a message is sent again."""
    items = [item[1] if isinstance(item, tuple) else item for item in message.attachments]
    return [
        (
            [cls for cls in (MIMEBase, MIMEPart) if isinstance(part, cls)],
            str(part.get_charset()),
            part.get_unixfrom(),
            part.get_default_type(),
            str(getattr(part, "encoding", None)),
            part.as_bytes(),
        )
        for item in items
        if isinstance(item, Message)
        for part in item.walk()
    ]


def _smtp(message: EmailMessage) -> bytes:
    """As Django's SMTP back end does it."""
    if django.VERSION >= (6, 0):
        return message.message(policy=email.policy.SMTP).as_bytes()
    made: Any = message.message()
    return bytes(made.as_bytes(linesep="\r\n"))


def _amazon_ses(message: EmailMessage) -> Any:
    payload = _backend("amazon_ses").build_message_payload(message, {})
    payload.finalize_payload()
    return payload.params


def _anymail(message: EmailMessage) -> Any:
    """What Anymail understands, before any ESP's notation: with types."""
    return _plain(_backend("test").build_message_payload(message, {}).get_params())


def _plain(value: Any) -> Any:
    if isinstance(value, Attachment):
        return {name: _plain(part) for name, part in vars(value).items() if name != "_attachment"}
    if isinstance(value, EmailAddress):
        return str(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if hasattr(value, "items"):
        return list(value.items())
    if hasattr(value, "as_bytes"):
        return value.as_bytes()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return type(value).__name__, bytes(value)
    # A subclass (a safe string, a text choice, a test tool's datetime) is sent as what it holds.
    if isinstance(value, datetime):
        return "datetime", datetime.isoformat(value)
    kind = str if isinstance(value, str) else type(value)
    return kind.__name__, str(value)
