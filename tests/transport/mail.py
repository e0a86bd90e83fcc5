"""The back ends that are compared, and a message for them."""

from __future__ import annotations

from typing import Any

import anymail.backends.mandrill
import requests
from django.core.mail import EmailMessage

from anymail_retry import RetryMixin
from anymail_retry.testing import ScriptedEsp

from .clock import FakeClock

Plain: Any = anymail.backends.mandrill.EmailBackend


class Retrying(RetryMixin, Plain):
    """As a user writes it who follows Anymail's documentation. No queue behind it."""


def backend(esp: ScriptedEsp, clock: FakeClock | None = None, **options: Any) -> Any:
    """A retrying back end for this ESP. With a clock its waits take no time."""
    made = Retrying(**esp.options(), **options)
    if clock is not None:
        made.retry_clock = clock
    return made


def message(subject: str = "Subject") -> Any:
    return EmailMessage(subject, "Body", "from@example.com", ["to@example.com"])


def send(sender: Any, subject: str = "Subject") -> Any:
    """Send a message, and return it."""
    sent = message(subject)
    assert sender.send_messages([sent]) == 1
    return sent


def failure(sender: Any) -> Any:
    """What a send raises."""
    try:
        send(sender)
    except Exception as error:
        return error
    raise AssertionError("it was sent")


def network_error(sender: Any) -> type[Exception]:
    """The class of requests' that a failed send can be caught as."""
    (_, network) = type(failure(sender)).__bases__
    assert issubclass(network, requests.RequestException)
    return network
