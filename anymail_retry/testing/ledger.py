"""What the local ESP saw and what it took: the judge of what was lost and what was sent twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MARKER_HEADER = "X-Message-Marker"
MARKER_METADATA = "marker"


@dataclass
class Request:
    """One request as it came over the wire, and what the local ESP did with it.

    ``fault``, ``status``, ``accepted`` and ``replayed`` stand before the first byte of the answer is sent, so a
    client that has its answer reads them as they stay.
    """

    #: From 1, over all connections.
    number: int
    #: By the ESP's clock, in seconds.
    time: float
    #: The connection's number, from 1 in the order of accepting.
    connection: int
    #: 1 for the first request on its connection, 2 and more where the connection was kept alive.
    nth_on_connection: int
    method: str
    path: str
    #: Names in lower case.
    headers: dict[str, str]
    #: Request line and headers as sent, without the blank line.
    head: bytes
    body: bytes
    api_key: str | None = None
    idempotency_key: str | None = None
    #: The fault that met it, as its ``repr``; None: it was served as the healthy ESP does.
    fault: str | None = None
    #: The status line that was sent; None: none was.
    status: int | None = None
    #: Number of its entry in the ledger; None: not accepted by this request.
    accepted: int | None = None
    #: Answered from the store of idempotency keys: nothing was accepted anew.
    replayed: bool = False

    @property
    def reused(self) -> bool:
        """Whether it came over a kept-alive connection that had carried a request before."""
        return self.nth_on_connection > 1

    def json(self) -> Any:
        """The body as JSON; raises ``ValueError`` where it is none."""
        return json.loads(self.body)

    def __str__(self) -> str:
        done = [f"fault {self.fault}"] if self.fault else []
        done += [str(self.status) if self.status else "no answer"]
        done += [f"accepted as {self.accepted}"] if self.accepted else []
        done += ["replayed"] if self.replayed else []
        return f"#{self.number} {self.method} {self.path}: {', '.join(done)}"


@dataclass(frozen=True)
class Accepted:
    """One request that the ESP took. A batch is one entry; its ``recipients`` names them all."""

    #: From 1, in the order of acceptance.
    number: int
    #: By the ESP's clock, in seconds.
    time: float
    #: The ESP's name, as Anymail's ``esp_name``.
    esp: str
    #: Bare addresses in the request's order. One that gets a copy of each message of a batch stands there as often.
    recipients: tuple[str, ...]
    #: Empty where a template has it.
    subject: str
    #: See :func:`message_id_of`.
    marker: str
    idempotency_key: str | None
    #: The key that the request carried, right or wrong; None: none.
    api_key: str | None
    #: What the ESP called it in its answer: one id, or one per message or recipient.
    message_ids: tuple[str, ...]
    #: Number of the request in ``esp.requests``.
    request: int
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """The body as JSON; raises ``ValueError`` where it is none (Mailgun)."""
        return json.loads(self.body)


class Ledger(list[Accepted]):
    """What was accepted, in order: a copy as of the moment it was asked for."""

    def count_by(self, attribute: str) -> Counter[Any]:
        """Accepted requests per value of an attribute: ``count_by("marker")["order-17"]``, ``count_by("api_key")``."""
        return Counter(getattr(accepted, attribute) for accepted in self)

    def deliveries(self) -> Counter[tuple[str, str]]:
        """Copies per (marker, recipient): what the recipients see, where a batch counts once for each of them."""
        return Counter((accepted.marker, recipient) for accepted in self for recipient in accepted.recipients)

    def lost(self, expected_markers: Iterable[str]) -> list[str]:
        """The expected markers that were never accepted, in the order given."""
        seen = {accepted.marker for accepted in self}
        return [marker for marker in dict.fromkeys(expected_markers) if marker not in seen]

    def duplicates(self, expected_markers: Iterable[str] | None = None) -> dict[str, int]:
        """The markers accepted more than once and how often; only of the expected ones where these are given."""
        counts = self.count_by("marker")
        markers = counts if expected_markers is None else dict.fromkeys(expected_markers)
        return {marker: counts[marker] for marker in markers if counts[marker] > 1}


def message_id_of(accepted: Accepted) -> str:
    """What tells this message from all others, for accounting.

    The value of its ``X-Message-Marker`` header, else of ``marker`` in its metadata (wherever the ESP puts these),
    else its subject.
    """
    return accepted.marker


def find_marker(data: Any, subject: str, body: bytes) -> str:
    """The marker in a request, as :func:`message_id_of` defines it.

    :param data: the body as parsed: of dicts, lists and texts.
    :param body: as sent; it spares the search where there is no marker.
    """
    lower = body.lower()
    for name in (MARKER_HEADER.lower(), MARKER_METADATA):
        if name.encode() in lower and (found := _find(data, name)) is not None:
            return found
    return subject


def _find(value: Any, wanted: str) -> str | None:
    if isinstance(value, dict):
        for key, item in value.items():
            name = key.lower()
            if name == wanted or name in {f"h:{wanted}", f"v:{wanted}"}:  # Mailgun's "h:X-Message-Marker", "v:marker"
                return str(item[0] if isinstance(item, list) else item)
            # {"name": "X-Message-Marker", "value": ...}, in the ESP's spelling; Scaleway says "key"
            if name in {"name", "key"} and isinstance(item, str) and item.lower() == wanted:
                return next((str(text) for field, text in value.items() if field.lower() == "value"), None)
        value = list(value.values())
    if isinstance(value, list):
        return next((found for item in value if (found := _find(item, wanted)) is not None), None)
    # metadata inside a header: Brevo's X-Mailin-custom, Resend's X-Metadata, Mailjet's EventPayload
    if isinstance(value, str) and value.startswith("{") and f'"{wanted}"' in value.lower():
        try:
            return _find(json.loads(value), wanted)
        except ValueError:
            return None
    return None
