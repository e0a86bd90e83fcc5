"""What can go wrong in this library itself; failures of an ESP keep Anymail's own exceptions."""

from __future__ import annotations

from typing import Any

from anymail.exceptions import AnymailAPIError, AnymailError


class MessageNotQueueable(Exception):
    """This message cannot be kept exactly, so it is not kept at all. Sending it again is the caller's decision.

    :param what: what cannot be kept, in the user's own terms (``attachments[2]``, ``message()``, ``api_key``).
    :param why: the reason, and what to do instead.
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what
        self.why = why


class PayloadError(Exception):
    """A stored message cannot be rebuilt. Its row is held, and its content kept, for an operator to look at."""


class InvalidIdempotencyKey(AnymailError, ValueError):
    """The user's idempotency key is not one that the ESP would take. Nothing was sent."""


class BodyChanged(AnymailError):
    """The ESP may have taken this delivery with another body. Nothing was sent this time."""


class CircuitOpen(AnymailAPIError):
    """Not tried: the ESP's circuit breaker is open. Surely not taken, so safe to send again later.

    :param retry_after: seconds until the breaker lets the next try through.
    """

    def __init__(self, *args: Any, retry_after: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.retry_after = retry_after
