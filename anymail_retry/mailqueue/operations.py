"""What a person may do with rows: always a compare-and-set on the state, so a row that is being sent is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.db import transaction
from django.db.models import Case, CharField, F, QuerySet, Value, When

from .. import conf
from ..delivery import new_key
from ..exceptions import PayloadError
from ..log import get_logger
from ..models import MailerState, MessageContent, QueuedMessage
from . import bodies, gate
from .claim import mailers_with_rows
from .clock import MARGIN, clock_of
from .database import queue_database
from .encryption import SUBJECT, CannotDecrypt, cipher, decrypted, stored_size
from .fields import UTCDateTimeField
from .mailers import MailerGone, find
from .serialization import unpack
from .states import TERMINAL, WAITING, State
from .wakeup import wake

logger = get_logger("queue")

#: Reasons by which a key that lives is of no use.
KEY_TROUBLE = ("key conflict", "body changed")

#: A pause that only a person ends.
FOR_EVER = datetime(9999, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Change:
    """How many rows were changed, and how many of those meant were being sent and therefore left alone."""

    changed: int
    being_sent: int


def retry_now(rows: QuerySet[QueuedMessage], states: Collection[State] = (State.DEFERRED,)) -> Change:
    """Make messages due now.

    A message that failed or was held begins anew. Where the ESP would still recognise its idempotency key it keeps
    that; else it gets a new one (save one of the user's own), and whoever does this to one that may have been taken
    sends it a second time. One that failed because it had expired loses its expiry; one that was held keeps it.

    :param states: of ``queued``, ``deferred``, ``held`` and ``failed``, those to touch.
    """
    if not set(states) <= {*WAITING, State.HELD, State.FAILED}:
        raise ValueError("a message that was sent or cancelled is sent again as a new one: see send_again()")
    now = _now()
    due_at = now - MARGIN
    changed = 0
    with transaction.atomic(using=queue_database()):
        waiting = [state for state in states if state in WAITING]
        if waiting:
            changed += _mine(rows).filter(state__in=waiting).update(due_at=due_at, not_before=None)
        ended = [state for state in states if state not in WAITING]
        if ended:
            changed += _begin_anew(_mine(rows).filter(state__in=ended), now, due_at=due_at, not_before=None)
        if changed:
            wake(queue_database())
    return Change(changed, _being_sent(rows))


def hold(rows: QuerySet[QueuedMessage], reason: str = "held by an operator") -> Change:
    """Keep messages that wait from being sent, until they are released."""
    changed = _mine(rows).filter(state__in=WAITING).update(state=State.HELD, due_at=None, reason=reason[:200])
    return Change(changed, _being_sent(rows))


def release(rows: QuerySet[QueuedMessage]) -> Change:
    """Let held messages go, each at its own time. They begin anew, as in :func:`retry_now`."""
    now = _now()
    due_at = Case(
        When(not_before__gt=now, then=F("not_before")),
        default=Value(now - MARGIN, output_field=UTCDateTimeField()),
        output_field=UTCDateTimeField(),
    )
    with transaction.atomic(using=queue_database()):
        changed = _begin_anew(_mine(rows).filter(state=State.HELD), now, due_at=due_at)
        if changed:
            wake(queue_database())
    return Change(changed, _being_sent(rows))


def cancel(rows: QuerySet[QueuedMessage], reason: str = "cancelled by an operator") -> Change:
    """Give up messages that wait, are held or failed."""
    changed = (
        _mine(rows)
        .filter(state__in=(*WAITING, State.HELD, State.FAILED))
        .update(state=State.CANCELLED, due_at=None, ended_at=_now(), reason=reason[:200])
    )
    return Change(changed, _being_sent(rows))


def send_again(row: QueuedMessage) -> QueuedMessage:
    """Queue a copy of a message whose life has ended, as a new message.

    :raises ValueError: it has not ended, or its content is not kept, or cannot be decrypted.
    """
    alias = queue_database()
    now = _now()
    with transaction.atomic(using=alias):
        # Locked, so that nobody encrypts its content anew between the two queries that read it.
        old = QueuedMessage.objects.using(alias).select_for_update().filter(pk=row.pk).first()
        if old is None:
            raise ValueError(f"message {row.pk} is not in the queue any more")
        if old.state not in TERMINAL:
            raise ValueError(f"message {old.pk} is {old.state}: it is not sent again while it may still be sent")
        now_under = cipher()
        payload, plain = _content(alias, old)
        if now_under is not None:
            payload = now_under.encrypt_text(payload)
        new = QueuedMessage(
            mailer=old.mailer,
            priority=old.priority,
            state=State.QUEUED,
            due_at=now - MARGIN,
            size=stored_size(payload, plain, now_under),
            attachment_count=old.attachment_count,
            origin=old.origin,
            created_at=now,
            on_ambiguous=old.on_ambiguous,
            key=new_key(),
            subject=old.subject if now_under is None else SUBJECT,
            recipients=old.recipients,
        )
        new.save(using=alias, force_insert=True)
        MessageContent(message=new, payload=payload).save(using=alias, force_insert=True)
        bodies.store(alias, [(new.pk, plain)], now, now_under)
        wake(alias, new.mailer)
    return new


def stored_message(row: QueuedMessage) -> EmailMessage:
    """The message of a row, rebuilt from its stored content.

    :raises ValueError: the content is not kept, or cannot be decrypted or decoded; says which.
    """
    try:
        return unpack(*_content(queue_database(), row))
    except PayloadError as error:
        raise ValueError(f"the content of message {row.pk} cannot be decoded: {error}") from None


def mailers() -> list[str]:
    """The names of all mailers that the settings configure, or that a row names."""
    return sorted({*_configured_mailers(), *mailers_with_rows(queue_database())})


def pause(mailer: str, reason: str = "paused by an operator") -> None:
    """Keep a mailer's mail back, on every host, until :func:`resume`."""
    alias = queue_database()
    gate.ensure(alias, mailer)
    MailerState.objects.using(alias).filter(alias=mailer).update(
        paused_until=FOR_EVER, pause_reason=reason[:200], pause_seconds=0, paused_by=None
    )


def resume(mailer: str) -> bool:
    """End a mailer's pause, whoever began it. False: it was not paused."""
    alias = queue_database()
    paused = MailerState.objects.using(alias).filter(alias=mailer, paused_until__isnull=False)
    with transaction.atomic(using=alias):
        resumed = bool(paused.update(paused_until=None, pause_reason="", pause_seconds=0, paused_by=None))
        if resumed:
            wake(alias)
    return resumed


def _configured_mailers() -> Iterator[str]:
    """What sends; a mailer that only stands before another is named by that one."""
    configured = conf.mailers()
    for name in [conf.email_backend()] if configured is None else configured:
        try:
            mailer = find(name)
        except (MailerGone, ImproperlyConfigured):
            continue  # a system check says what is wrong with it
        yield mailer.name


def _content(alias: str, row: QueuedMessage) -> tuple[str, Sequence[bytes]]:
    """The payload and the attachments of a message, as they were before they were encrypted."""
    content = MessageContent.objects.using(alias).filter(message=row.pk).first()
    attachments = bodies.load(alias, [row.pk]).get(row.pk, [])
    if content is None or len(attachments) != row.attachment_count:
        raise ValueError(
            f"the content of message {row.pk} is not kept any more"
            " (EMAIL_QUEUE_KEEP_CONTENT = True keeps that of sent messages)"
        )
    try:
        return decrypted(cipher(), content.payload, [data for _, _, data in attachments])
    except CannotDecrypt as error:
        raise ValueError(f"the content of message {row.pk} cannot be decrypted: {error}") from None


def _mine(rows: QuerySet[QueuedMessage]) -> QuerySet[QueuedMessage]:
    return rows.using(queue_database())


def _now() -> datetime:
    return clock_of(queue_database()).now()


def _being_sent(rows: QuerySet[QueuedMessage]) -> int:
    return _mine(rows).filter(state=State.SENDING).count()


def _begin_anew(rows: QuerySet[QueuedMessage], now: datetime, **changes: Any) -> int:
    """Have rows sent again that waited for a person, or had ended."""
    changes = {
        # Before the state, because MySQL assigns from left to right.
        "expires_at": Case(
            When(state=State.FAILED, expires_at__lte=now, then=None),
            default=F("expires_at"),
            output_field=UTCDateTimeField(),
        ),
        "lost_count": 0,
        **changes,
        "state": State.DEFERRED,
        "ended_at": None,
    }
    changed = 0
    # Under a key that lives the ESP tells a second copy from a first one.
    for name in rows.filter(key_used_since__isnull=False).order_by().values_list("mailer", flat=True).distinct():
        window = _key_window(name)
        if window is not None:
            live = rows.filter(mailer=name, key_used_since__gt=now - timedelta(seconds=window))
            changed += live.exclude(reason__in=KEY_TROUBLE).update(**changes)
    again = list(rows.filter(maybe_taken_since__isnull=False).order_by("pk").values_list("pk", flat=True))
    changed += rows.update(
        **changes,
        key=Case(When(key_from_user=True, then=F("key")), default=Value(""), output_field=CharField()),
        maybe_taken_since=None,
        key_used_since=None,
        body_digest=None,
    )
    if again:
        shown = ", ".join(map(str, again[:20])) + (", ..." if len(again) > 20 else "")
        logger.warning("sent again by an operator though it may have been taken, may arrive twice: message %s", shown)
    return changed


def _key_window(name: str) -> float | None:
    try:
        return find(name).key_window
    except Exception:  # its worker will say so
        return None
