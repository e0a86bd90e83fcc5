"""Bringing everything that is stored under the first of ``EMAIL_QUEUE_ENCRYPTION_KEYS``, beside running workers.

Each message is one short transaction, which begins by locking its row: whoever claims it meanwhile waits, and then
reads payload and attachments as they belong together. A message that is being sent is left alone.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator

from django.db import transaction

from ..exceptions import MessageNotQueueable
from ..log import get_logger
from ..models import AttachmentBody, MessageAttachment, MessageContent, QueuedMessage
from . import bodies, retention
from .clock import DatabaseClock, clock_of
from .database import own_transaction
from .encryption import SUBJECT, CannotDecrypt, Cipher, decrypted, is_encrypted, stored_size
from .statements import delete
from .states import State

logger = get_logger("queue")

#: Messages read at a time.
BATCH = 50


class Storage(str, enum.Enum):
    """How a message is stored."""

    CURRENT = "current"  # under the first key
    OLD_KEY = "old_key"
    PLAIN = "plain"
    UNREADABLE = "unreadable"  # no key fits, or an attachment is missing
    ENCRYPTED = "encrypted"  # under the first key, by this call


def count(alias: str) -> int:
    """How many messages :func:`reencrypt` looks at: those that have content."""
    return MessageContent.objects.using(alias).count()


def survey(alias: str, cipher: Cipher, *, batch: int = BATCH) -> Iterator[Counter[Storage]]:
    """How messages are stored; changes nothing. Yields after each batch."""
    for found in _batches(alias, batch):
        yield Counter(_storage(payload, cipher) for payload in found.values())


def reencrypt(alias: str, cipher: Cipher, *, batch: int = BATCH) -> Iterator[Counter[Storage]]:
    """Store messages and their attachments under the first key, whatever their state. Yields after each batch.

    What is still ``plain`` or ``old_key`` then was being sent, or would be too large for the database server. Bytes
    that messages shared are stored anew; the old ones are deleted here or by a worker,
    :data:`~anymail_retry.mailqueue.bodies.KEPT_FOR` after they were stored.
    """
    clock = clock_of(alias)
    for found in _batches(alias, batch):
        done: Counter[Storage] = Counter()
        for message, payload in found.items():
            storage = _storage(payload, cipher)
            if storage in (Storage.PLAIN, Storage.OLD_KEY):
                try:
                    storage = _rewrite(alias, message, cipher, clock) or storage
                except MessageNotQueueable as error:
                    logger.warning("message %s stays as it is: %s", message, error)
                if not MessageContent.objects.using(alias).filter(message=message).exists():
                    continue  # sent meanwhile
            done[storage] += 1
        yield done
    while retention.delete_unlinked_bodies(alias, clock.now()):
        pass


def _batches(alias: str, batch: int) -> Iterator[dict[int, str]]:
    contents = MessageContent.objects.using(alias).order_by("message_id")
    last = 0
    while found := dict(contents.filter(message_id__gt=last).values_list("message_id", "payload")[:batch]):
        yield found
        last = max(found)


def _storage(payload: str, cipher: Cipher) -> Storage:
    if not is_encrypted(payload):
        return Storage.PLAIN
    if cipher.is_under_first_key(payload):
        return Storage.CURRENT
    try:
        cipher.decrypt_text(payload)
    except CannotDecrypt:
        return Storage.UNREADABLE
    return Storage.OLD_KEY


def _rewrite(alias: str, message: int, cipher: Cipher, clock: DatabaseClock) -> Storage | None:
    """Encrypt one message anew. None: it is being sent, or gone."""
    row = QueuedMessage.objects.using(alias).filter(pk=message)
    contents = MessageContent.objects.using(alias).filter(message=message)
    now = clock.now()
    with own_transaction(alias):
        # The digest was made by a key that may be dropped. Without it the ESP alone compares what is sent again.
        if not row.exclude(state=State.SENDING).update(subject=SUBJECT, body_digest=None):
            return None
        payload = contents.values_list("payload", flat=True).first()
        if payload is None:
            return None
        attached = bodies.load(alias, [message]).get(message, [])
        try:
            if len(attached) != row.values_list("attachment_count", flat=True).get():
                raise CannotDecrypt
            payload, plain = decrypted(cipher, payload, [data for _, _, data in attached])
        except CannotDecrypt:
            transaction.set_rollback(True, using=alias)  # it stays as it is
            return Storage.UNREADABLE
        payload = cipher.encrypt_text(payload)
        bodies.check_size(alias, "body", payload)
        contents.update(payload=payload)
        row.update(size=stored_size(payload, plain, cipher))
        if attached:
            delete(alias, MessageAttachment, "message", [message])
            private = [body for body, digest, _ in attached if digest is None]
            delete(alias, AttachmentBody, "id", private, null="digest")
            bodies.store(alias, [(message, plain)], now, cipher)
    return Storage.ENCRYPTED
