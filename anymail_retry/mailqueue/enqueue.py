"""Rows in: storing messages, in the caller's transaction and without ever harming it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Literal

from django.db import connections, transaction
from django.utils import timezone

from .. import signals
from ..delivery import SECRETS, Delivery
from ..exceptions import InvalidIdempotencyKey, MessageNotQueueable
from ..log import get_logger, is_reporting, reporting
from ..models import MessageContent, QueuedMessage
from ..verdict import Outcome
from . import bodies, mailers, schedule
from .clock import MARGIN, clock_of
from .database import chunks, drop_if_broken, errors_of, max_packet, queue_database, size_in_statement, storable
from .encryption import SUBJECT, Cipher, cipher, stored_size
from .schedule import Policy
from .serialization import Packed, pack
from .statements import insert, insert_many, tells_ids
from .states import OnAmbiguous, Origin, Priority, State
from .wakeup import wake

if TYPE_CHECKING:
    from django.core.mail import EmailMessage

    from ..idempotency import IdempotencyKey

logger = get_logger("queue")

#: Rows and bytes in one INSERT.
INSERT_ROWS = 1000
INSERT_BYTES = bodies.INSERT_BYTES

#: Characters of an idempotency key: the column's.
LONGEST_KEY = 256


def enqueue(
    messages: Sequence[EmailMessage],
    *,
    mailer: str,
    origin: Literal["fallback", "queued"],
    delivery: Delivery | None = None,
    outcome: Outcome | None = None,
    priority: int | str | None = None,
    not_before: datetime | timedelta | None = None,
    expires_at: datetime | timedelta | None = None,
    on_ambiguous: str | None = None,
    created_at: datetime | None = None,
    using: str | None = None,
    close_connection: bool = False,
) -> list[QueuedMessage]:
    """Store messages for a worker to send; all of them, or none and an exception.

    The rows are written in a savepoint of the caller's transaction (or a transaction of their own), so a failure here
    leaves the caller's own work alone. One message is two INSERTs, many in one call are as few as the database takes.

    :param mailer: ``MAILERS`` alias, or dotted path of a back end.
    :param origin: ``fallback``: a send that failed, the message is as ``pre_send`` left it. ``queued``: not sent yet.
    :param delivery: of the send that failed; with ``outcome``, and for one message.
    :param priority: ``high``, ``medium`` or ``low``, or 1 to 3. This and the next three are only for messages that do
        not have an attribute of that name.
    :param not_before: aware datetime, or timedelta from now.
    :param expires_at: aware datetime, or timedelta from now; not sent after that.
    :param on_ambiguous: ``resend`` or ``hold``; default: as the mailer says.
    :param created_at: since when the messages wait, if not from now on: of mail that another queue kept until now.
    :param using: another alias of the queue's database, for a transaction that was begun there.
    :param close_connection: close the database connection again if this call opened it, outside a transaction: an
        outage of the ESP must not become one of the database.
    :raises MessageNotQueueable: a message cannot be kept exactly.
    :raises InvalidIdempotencyKey: the user's own is not one that the ESP would take.
    :raises ValueError: one of the options means nothing.
    :raises ImproperlyConfigured: of the keys that should encrypt it, one is none.
    """
    alias = using or queue_database()
    connection = connections[alias]
    opens_it = connection.connection is None
    inside = connection.in_atomic_block
    try:
        found = _find_mailer(mailer)
        options = Options(priority, not_before, expires_at, on_ambiguous)
        for message in messages:
            _check_secrets(message, found)
            if delivery is None:
                _check_key(options.of(message).idempotency_key, found)
        packed = [pack(message, fix_message_id=found is not None and found.sends_mime) for message in messages]
        encrypting = cipher()
        if encrypting is not None:
            packed = [replace(one, payload=encrypting.encrypt_text(one.payload)) for one in packed]
        for one in packed:
            bodies.check_size(alias, "body", one.payload)
        now = clock_of(alias).now()
        policy = None if outcome is None else found.policy if found else Policy.from_settings()
        rows = [
            options.of(message).row(message, one, mailer, origin, delivery, outcome, policy, now, encrypting)
            for message, one in zip(messages, packed, strict=True)
        ]
        since = _moment("created_at", created_at, now)
        for row in rows:
            row.created_at = min(since or now, now)
        with transaction.atomic(using=alias) if _needs_transaction(alias, packed) else nullcontext():
            _insert(alias, rows, packed, now, encrypting)
            if any(row.due_at is not None and row.due_at <= now for row in rows):
                wake(alias, mailer)
            transaction.on_commit(partial(_announce, rows, outcome), using=alias, robust=True)
    except errors_of(alias):
        if not inside and connection.autocommit:
            drop_if_broken(alias)  # as atomic() does, where there is one
        raise
    finally:
        # connection.autocommit and not get_autocommit(), which would connect.
        if close_connection and opens_it and not connection.in_atomic_block and connection.autocommit:
            connection.close()
    for row in rows:
        _log(row, outcome, inside=inside)
    return rows


#: Where else than in :data:`~anymail_retry.delivery.SECRETS` an ESP's account key may stand in ``esp_extra``.
ESP_SECRETS = {"Mandrill": ("key",)}


def _check_secrets(message: EmailMessage, mailer: mailers.Mailer | None) -> None:
    """Anymail takes some accounts' keys per message (Postmark: ``esp_extra["server_token"]``)."""
    extra = getattr(message, "esp_extra", None)
    if not isinstance(extra, Mapping):
        return
    esp_name = getattr(mailer.backend_class, "esp_name", "") if mailer is not None else ""
    for name in (*SECRETS, *ESP_SECRETS.get(esp_name, ())):
        if name in extra:
            raise MessageNotQueueable(
                f"{name!r} in esp_extra",
                "secrets are not stored. Give that account an alias in MAILERS, or a subclass of the back end",
            )


def _check_key(key: object, mailer: mailers.Mailer | None) -> None:
    """See to the user's own idempotency key while the user is there to hear of it.

    :raises anymail_retry.exceptions.InvalidIdempotencyKey: the ESP would not take it, or no column.
    """
    if key is None:
        return
    spec: IdempotencyKey | None = getattr(mailer.backend_class, "idempotency", None) if mailer is not None else None
    if spec is not None:
        spec.check(str(key))
    elif not 0 < len(str(key)) <= LONGEST_KEY:
        raise InvalidIdempotencyKey(f"idempotency_key should have 1 to {LONGEST_KEY} characters")


@dataclass(frozen=True)
class Options:
    """What may be said of one message, by an attribute of its own or for a whole call."""

    priority: int | str | None = None
    not_before: datetime | timedelta | None = None
    expires_at: datetime | timedelta | None = None
    on_ambiguous: str | None = None
    idempotency_key: str | None = None

    def of(self, message: EmailMessage) -> Options:
        own = {name: getattr(message, name, None) for name in self.__dataclass_fields__}
        return Options(**{name: getattr(self, name) if value is None else value for name, value in own.items()})

    def row(
        self,
        message: EmailMessage,
        packed: Packed,
        mailer: str,
        origin: str,
        delivery: Delivery | None,
        outcome: Outcome | None,
        policy: Policy | None,
        now: datetime,
        encrypting: Cipher | None,
    ) -> QueuedMessage:
        skew = timedelta(0)
        if delivery is None:
            delivery = Delivery()
            if self.idempotency_key is not None:
                delivery.key, delivery.key_from_user = str(self.idempotency_key), True  # a UUID is as good
        elif abs(now - delivery.now()) > MARGIN:
            # A direct send's times go by this host's clock; workers compare them with the database's.
            skew = now - delivery.now()
        not_before = _moment("not_before", self.not_before, now)
        expires_at = _moment("expires_at", self.expires_at, now)
        row = QueuedMessage(
            mailer=mailer,
            priority=_priority(self.priority),
            origin=Origin(origin),
            is_report=is_reporting(),
            created_at=now,
            not_before=not_before,
            expires_at=expires_at,
            on_ambiguous=_on_ambiguous(self.on_ambiguous),
            size=stored_size(packed.payload, packed.bodies, encrypting),
            attachment_count=len(packed.bodies),
            key=delivery.key,
            key_from_user=delivery.key_from_user,
            maybe_taken_since=delivery.maybe_taken_since and delivery.maybe_taken_since + skew,
            key_used_since=delivery.key_used_since and delivery.key_used_since + skew,
            body_digest=_body_digest(delivery, encrypting),
            subject=_summary(str(message.subject)) if encrypting is None else SUBJECT,
            recipients=_summary(", ".join(map(str, message.recipients()))),
        )
        start = not_before if not_before is not None and not_before > now else now - MARGIN
        if outcome is None or policy is None:
            row.state, row.due_at = State.QUEUED, schedule.due_at(start, expires_at)
            return row
        if schedule.is_expired(expires_at, now):
            raise MessageNotQueueable("expires_at", "is over, so no worker would send it")
        row.attempt_count = 1  # the send that failed
        row.verdict = str(outcome.verdict or "")
        row.http_status = outcome.http_status
        row.answer = storable(outcome.answer, 500)
        facts = schedule.Row(row.attempt_count, now, expires_at, row.on_ambiguous)
        fate = schedule.fate(outcome, delivery, facts, policy, now)
        if fate.state not in (State.DEFERRED, State.HELD):
            raise MessageNotQueueable("message", f"a worker would not send it: {fate.reason}")
        row.state, row.reason, row.due_at = fate.state, storable(fate.reason, 200), fate.due_at
        if row.due_at is not None and row.due_at < start:
            row.due_at = schedule.due_at(start, expires_at)
        return row


def _find_mailer(name: str) -> mailers.Mailer | None:
    try:
        return mailers.find(name)
    except mailers.MailerGone:
        return None  # the worker will say so, once it is its turn


def _priority(value: int | str | None) -> Priority:
    if value is None:
        return Priority.MEDIUM
    try:
        return Priority[value.upper()] if isinstance(value, str) else Priority(value)
    except (KeyError, ValueError):
        raise ValueError(f"priority is {value!r}, and should be 'high', 'medium' or 'low', or 1 to 3") from None


def _on_ambiguous(value: str | None) -> str:
    if value is not None and value not in OnAmbiguous.values:
        raise ValueError(f"on_ambiguous is {value!r}, and should be 'resend' or 'hold'")
    return value or ""


def _moment(name: str, value: datetime | timedelta | None, now: datetime) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, timedelta):
        return now + value
    if not isinstance(value, datetime):
        raise ValueError(f"{name} is {value!r}, and should be an aware datetime or a timedelta")
    return timezone.make_aware(value) if timezone.is_naive(value) else value


def _summary(words: str) -> str:
    words = " ".join(storable(words, 1000).split())
    return words if len(words) <= 200 else f"{words[:199]}…"


def _body_digest(delivery: Delivery, encrypting: Cipher | None) -> str | None:
    """The plain digest of a direct send's request, as a row may hold it."""
    if delivery.body_digest is None or encrypting is None:
        return delivery.body_digest
    return encrypting.request_digests(delivery.body_digest)[0]


def _needs_transaction(alias: str, packed: Sequence[Packed]) -> bool:
    """Whether storing takes more than one statement, or must not harm a transaction of the caller's if it fails.

    A transaction costs PostgreSQL two round trips.
    """
    connection = connections[alias]
    is_one_statement = connection.vendor == "postgresql" and len(packed) == 1 and not packed[0].bodies
    return connection.in_atomic_block or not is_one_statement or not connection.get_autocommit()


def _insert(
    alias: str, rows: Sequence[QueuedMessage], packed: Sequence[Packed], now: datetime, encrypting: Cipher | None
) -> None:
    if len(rows) == 1:
        insert(alias, rows[0], packed[0].payload)
    else:
        _insert_many(alias, rows)
        contents = [{"message_id": row.pk, "payload": one.payload} for row, one in zip(rows, packed, strict=True)]
        # A payload is JSON, whose quotation marks and backslashes MySQL's driver doubles.
        size_of = size_in_statement if connections[alias].vendor == "mysql" else len
        sizes = [size_of(one.payload) for one in packed]
        for chunk in chunks(contents, sizes, limit=_statement_limit(alias), count=INSERT_ROWS):
            insert_many(alias, MessageContent, chunk)
    for row in rows:
        row._state.adding, row._state.db = False, alias
    attachments = [(row.pk, one.bodies) for row, one in zip(rows, packed, strict=True) if one.bodies]
    if attachments:
        bodies.store(alias, attachments, now, encrypting)


def _insert_many(alias: str, rows: Sequence[QueuedMessage]) -> None:
    for chunk in chunks(rows, [_width(row) for row in rows], limit=_statement_limit(alias), count=INSERT_ROWS):
        if tells_ids(alias):
            for row, pk in zip(chunk, insert_many(alias, QueuedMessage, list(map(vars, chunk)), ids=True), strict=True):
                row.pk = pk
            continue
        # MySQL does not say which ids it gave. They are found again by what the lease's column holds until the first
        # claim, among the rows that are no older than the first of them.
        marks = {random.getrandbits(62): row for row in chunk}  # a mark, not a secret
        for mark, row in marks.items():
            row.lease = mark
        insert_many(alias, QueuedMessage, list(map(vars, chunk)))
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT LAST_INSERT_ID()")
            first = cursor.fetchone()[0]
        found = QueuedMessage.objects.using(alias).filter(pk__gte=first, lease__in=marks)
        for pk, lease in found.values_list("pk", "lease"):
            assert lease is not None
            marks[lease].pk = pk


def _statement_limit(alias: str) -> int:
    """Bytes of one INSERT of many rows. One row alone may be longer: :func:`.bodies.check_size` has seen to that."""
    return min(INSERT_BYTES, (max_packet(alias) or INSERT_BYTES) // 2)


def _width(row: QueuedMessage) -> int:
    return 1000 + 4 * (len(row.subject) + len(row.recipients) + len(row.answer))


def _announce(rows: Sequence[QueuedMessage], outcome: Outcome | None) -> None:
    """Signal that messages were stored; but not those that report.

    Where a receiver raises, Django logs that. A site may have it mailed, the mail may be queued, and the same receiver
    be called for it.
    """
    with reporting():
        for row in rows:
            if row.is_report:
                continue
            signals.message_queued.send_robust(QueuedMessage, queued_message=row)
            if row.state == State.HELD:
                signals.message_held.send_robust(QueuedMessage, queued_message=row, outcome=outcome)


def _log(row: QueuedMessage, outcome: Outcome | None, *, inside: bool) -> None:
    details = ", ".join(str(detail) for detail in (row.verdict, row.reason, row.http_status) if detail)
    where = ", inside a transaction: kept only if that is committed" if inside else ""
    if outcome is None:
        logger.info("%s: message %s queued%s", row.mailer, row.pk, where)
    else:
        state = "held" if row.state == State.HELD else "queued"
        logger.warning("%s: message %s %s after a failed send (%s)%s", row.mailer, row.pk, state, details, where)
