"""Deleting what nobody needs any more, in small transactions, and never what still waits."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime

from django.db.models import Exists, OuterRef

from ..models import AttachmentBody, Attempt, MessageAttachment, MessageContent, QueuedMessage
from .bodies import KEPT_FOR
from .database import own_transaction
from .statements import delete
from .states import TERMINAL, State

#: Rows deleted in one transaction: long enough to be worth one, short enough for others to wait for.
BATCH = 500


def purge(alias: str, *, before: datetime, states: Collection[State] = TERMINAL, batch: int = BATCH) -> Iterator[int]:
    """Delete messages that ended before a time, with all that belongs to them. Yields how many after each batch.

    :param states: which of the terminal states; others are refused.
    """
    if not set(states) <= set(TERMINAL):
        raise ValueError("only messages whose life has ended are ever deleted")
    last = 0
    while True:
        ended = QueuedMessage.objects.using(alias).filter(state__in=states, ended_at__lt=before)
        ids = list(ended.filter(id__gt=last).order_by("id").values_list("id", flat=True)[:batch])
        if not ids:
            return
        last = ids[-1]
        yield _delete(alias, ids, states, before)


def count(alias: str, *, before: datetime, states: Collection[State] = TERMINAL) -> int:
    """How many messages :func:`purge` would delete."""
    return QueuedMessage.objects.using(alias).filter(state__in=states, ended_at__lt=before).count()


def delete_orphans(alias: str, now: datetime) -> int:
    """Delete all attachments and history that belong to no message, batch by batch. How many rows."""
    deleted = 0
    for one_batch in (
        lambda: delete_unlinked_bodies(alias, now),
        lambda: delete_orphaned_attempts(alias),
    ):
        while number := one_batch():
            deleted += number
    return deleted


def _delete(alias: str, ids: Collection[int], states: Collection[State], before: datetime) -> int:
    with own_transaction(alias):
        # A state that no worker and no operator touches any more, so that what follows cannot be overtaken.
        ended = QueuedMessage.objects.using(alias).filter(id__in=ids, state__in=states, ended_at__lt=before)
        ended.update(state=State.CANCELLED, lease=-1)
        doomed = list(QueuedMessage.objects.using(alias).filter(id__in=ids, lease=-1).values_list("id", flat=True))
        links = MessageAttachment.objects.using(alias).filter(message__in=doomed)
        bodies = list(links.values_list("body_id", flat=True))
        delete(alias, MessageAttachment, "message", doomed)
        delete(alias, AttachmentBody, "id", bodies, null="digest")
        delete(alias, MessageContent, "message", doomed)
        delete(alias, Attempt, "message", doomed)
        delete(alias, QueuedMessage, "id", doomed)
    return len(doomed)


def delete_unlinked_bodies(alias: str, now: datetime, *, limit: int = BATCH) -> int:
    """Delete attachments that no message carries any more, once they are old enough that none can begin to."""
    bodies = AttachmentBody.objects.using(alias)
    linked = Exists(MessageAttachment.objects.using(alias).filter(body=OuterRef("pk")))
    old = bodies.filter(~linked, created_at__lt=now - KEPT_FOR)
    ids = list(old.order_by("id").values_list("id", flat=True)[:limit])
    if not ids:
        return 0
    with own_transaction(alias):
        return delete(alias, AttachmentBody, "id", ids)


def delete_orphaned_attempts(alias: str, *, limit: int = BATCH) -> int:
    """Delete the history of messages that are gone."""
    known = Exists(QueuedMessage.objects.using(alias).filter(pk=OuterRef("message_id")))
    orphans = Attempt.objects.using(alias).filter(~known)
    ids = list(orphans.order_by("id").values_list("id", flat=True)[:limit])
    if not ids:
        return 0
    with own_transaction(alias):
        return delete(alias, Attempt, "id", ids)
