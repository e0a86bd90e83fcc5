"""The bytes of attachments: stored once per message, or once for all messages that carry the same.

Most attachments are private to their message and deleted with it. Bytes that this process has seen before (or that
come twice in one call) are shareable: found by their digest (SHA-256; an HMAC where they are encrypted) among those
younger than :data:`SHARED_FOR`, and deleted when older than :data:`KEPT_FOR` and linked by no message. Age alone keeps
the two apart, so a caller's transaction never waits for another's; one would have to stay open for the hour and three
quarters in between to lose its bytes, and then its message is held, not lost in silence. Two processes may each store
a copy, which does no harm.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta

from django.db import connections, transaction

from ..exceptions import MessageNotQueueable
from ..models import AttachmentBody, MessageAttachment
from .database import chunks, max_packet, size_in_statement
from .encryption import Cipher

#: How long a shareable body is given to further messages.
SHARED_FOR = timedelta(minutes=15)
#: How long it stays without any message.
KEPT_FOR = timedelta(hours=2)

#: Bytes of all values in one INSERT.
INSERT_BYTES = 1_000_000
#: What a statement needs beside its largest value.
STATEMENT_OVERHEAD = 64 * 1024


class Seen:
    """The digests that this process met last: a hint of what is worth sharing, and nothing more."""

    def __init__(self, size: int = 1000) -> None:
        self.size = size
        self._digests: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, digest: str) -> bool:
        """Whether it was met before."""
        with self._lock:
            known = digest in self._digests
            self._digests[digest] = None
            self._digests.move_to_end(digest)
            if len(self._digests) > self.size:
                self._digests.popitem(last=False)
        return known


_seen = Seen()


def store(
    alias: str, attachments: Iterable[tuple[int, Sequence[bytes]]], now: datetime, cipher: Cipher | None = None
) -> None:
    """Store the attachments of messages that were just inserted, in the caller's transaction.

    :param attachments: pairs of a message's id and its bytes in order.
    :param cipher: encrypts them. Their digests differ from those of plain bytes, so the two never mix.
    :raises MessageNotQueueable: one is too large for the database server.
    """
    links = [(message, place, data) for message, bodies in attachments for place, data in enumerate(bodies)]
    if not links:
        return
    digest_of = _sha256 if cipher is None else cipher.attachment_digest
    digests = [digest_of(data) for _, _, data in links]
    times = Counter(digests)
    met = {digest: _seen.add(digest) for digest in times}
    shareable = {digest for digest in times if met[digest] or times[digest] > 1}
    bodies = _find_shared(alias, shareable, now)
    new = []
    for (_, place, data), digest in zip(links, digests, strict=True):
        if digest not in bodies:
            stored = data if cipher is None else cipher.encrypt(data)
            check_size(alias, f"attachments[{place}]", stored)
            bodies[digest] = AttachmentBody(digest=digest if digest in shareable else None, created_at=now, data=stored)
            new.append(bodies[digest])
    _insert(alias, new)
    MessageAttachment.objects.using(alias).bulk_create(
        MessageAttachment(message_id=message, body_id=bodies[digest].pk, position=place)
        for (message, place, _), digest in zip(links, digests, strict=True)
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _find_shared(alias: str, digests: Collection[str], now: datetime) -> dict[str, AttachmentBody]:
    if not digests:
        return {}
    found = AttachmentBody.objects.using(alias).filter(digest__in=digests, created_at__gte=now - SHARED_FOR)
    return {body.digest: body for body in found.only("digest") if body.digest is not None}


def _insert(alias: str, bodies: Sequence[AttachmentBody]) -> None:
    manager = AttachmentBody.objects.using(alias)
    if not connections[alias].features.can_return_rows_from_bulk_insert:
        for body in bodies:
            body.save(using=alias, force_insert=True)
        return
    for chunk in chunks(bodies, [len(body.data) for body in bodies], limit=INSERT_BYTES, count=100):
        manager.bulk_create(chunk)


def check_size(alias: str, what: str, data: bytes | str) -> None:
    """Refuse what the database server would not take, before it ends the connection over it.

    :raises MessageNotQueueable: naming the server's setting.
    """
    # The shortest limit that any server of note starts with is 1 MB; what is well below is not worth a question.
    if connections[alias].vendor != "mysql" or len(data) * 2 + STATEMENT_OVERHEAD < INSERT_BYTES:
        return
    limit = max_packet(alias)
    if limit is not None and size_in_statement(data) + STATEMENT_OVERHEAD > limit:
        raise MessageNotQueueable(
            what,
            f"{len(data)} bytes are too many for one statement to the database; raise the server's"
            f" max_allowed_packet ({limit} bytes)",
        )


def load(alias: str, messages: Collection[int]) -> dict[int, list[tuple[int, str | None, bytes]]]:
    """Each message's attachments in order: id, digest and bytes of the body. One statement.

    A link whose body is gone is missing here; the caller knows how many there should be.
    """
    found: dict[int, list[tuple[int, str | None, bytes]]] = {}
    once: dict[int, bytes] = {}  # messages that share bytes share them in memory too
    links = (
        MessageAttachment.objects.using(alias)
        .filter(message__in=messages)
        .order_by("message_id", "position")
        .values_list("message_id", "body_id", "body__digest", "body__data")
    )
    # Row by row. On PostgreSQL that is a cursor, which must not outlive a transaction: a pooler may have another server
    # answer what follows.
    is_postgresql = connections[alias].vendor == "postgresql"
    with transaction.atomic(using=alias, savepoint=False) if is_postgresql else nullcontext():
        for message, body, digest, data in links.iterator():
            if data is not None:
                found.setdefault(message, []).append((body, digest, once.setdefault(body, bytes(data))))
    return found
