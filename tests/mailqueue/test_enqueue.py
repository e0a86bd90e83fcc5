"""Rows in: what is stored, in whose transaction, and with how many statements."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import Group
from django.core.mail import EmailMessage
from django.db import DatabaseError, connection, connections, transaction
from django.test.utils import CaptureQueriesContext

from anymail_retry.delivery import Delivery
from anymail_retry.exceptions import InvalidIdempotencyKey, MessageNotQueueable
from anymail_retry.mailqueue import bodies, database
from anymail_retry.mailqueue import enqueue as module
from anymail_retry.mailqueue.clock import MARGIN, clock_of
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.serialization import unpack
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import AttachmentBody, Attempt, MessageContent, QueuedMessage
from anymail_retry.signals import message_held, message_queued
from anymail_retry.verdict import Outcome, Verdict

from .engine import AMBIGUOUS, KEYED, PLAIN, REFUSED, Script, in_threads, mail, queue, statements

if TYPE_CHECKING:
    from pytest_django.fixtures import SettingsWrapper

NOON = datetime(2040, 1, 1, 12, 0, tzinfo=timezone.utc)


def fall_back(outcome: Outcome, *, mailer: str = PLAIN, **attributes: Any) -> QueuedMessage:
    delivery = attributes.pop("delivery", None) or Delivery()
    (row,) = enqueue([mail(**attributes)], mailer=mailer, origin="fallback", delivery=delivery, outcome=outcome)
    row.refresh_from_db()
    return row


# --- what is stored ---


@pytest.mark.django_db
def test_message_to_be_sent_is_due_at_once() -> None:
    (row,) = queue("Hello", to="anna@example.com")
    row.refresh_from_db()
    assert (row.state, row.origin, row.attempt_count, row.mailer) == ("queued", "queued", 0, PLAIN)
    assert row.due_at == row.created_at - MARGIN
    assert (row.subject, row.recipients, row.priority) == ("Hello", "anna@example.com", 2)
    assert row.key
    assert not row.key_from_user
    message = unpack(row.content.payload, [])
    assert (message.subject, message.body) == ("Hello", "Body")
    assert row.size == len(row.content.payload)


@pytest.mark.django_db
def test_failed_message_is_due_after_its_first_delay() -> None:
    row = fall_back(REFUSED)
    assert (row.state, row.origin, row.attempt_count) == ("deferred", "fallback", 1)
    assert (row.verdict, row.reason, row.http_status) == ("refused", "busy", 503)
    assert row.due_at is not None
    assert row.created_at <= row.due_at <= row.created_at + timedelta(seconds=60)


@pytest.mark.django_db
def test_retry_after_travels_to_the_queue() -> None:
    row = fall_back(Outcome(Verdict.REFUSED, retry_after=3600.0))
    assert row.due_at is not None
    assert row.due_at >= row.created_at + timedelta(hours=1)


@pytest.mark.django_db
def test_key_travels_to_the_queue() -> None:
    taken = datetime(2026, 1, 1, tzinfo=timezone.utc)
    used = taken + timedelta(hours=1)
    delivery = Delivery("order-7", True, maybe_taken_since=taken, key_used_since=used, body_digest="d" * 64)
    row = QueuedMessage.objects.get(pk=fall_back(AMBIGUOUS, delivery=delivery).pk)
    assert (row.key, row.key_from_user, row.body_digest) == ("order-7", True, "d" * 64)
    assert (row.maybe_taken_since, row.key_used_since) == (taken, used)


@pytest.mark.django_db
def test_users_key_is_kept_for_a_message_to_be_sent() -> None:
    (row,) = queue(idempotency_key="order-7")
    assert (row.key, row.key_from_user) == ("order-7", True)


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("mailer", "key"),
    [
        pytest.param("anymail_retry.backends.brevo.EmailBackend", "order-7", id="not this ESP's grammar"),
        pytest.param(PLAIN, "k" * 257, id="longer than the column"),
        pytest.param(PLAIN, "", id="empty"),
    ],
)
def test_users_key_that_will_not_do_is_told_at_once(mailer: str, key: str) -> None:
    with pytest.raises(InvalidIdempotencyKey, match="idempotency_key"):
        enqueue([mail(idempotency_key=key)], mailer=mailer, origin="queued")
    assert not QueuedMessage.objects.exists()


@pytest.mark.django_db
def test_ambiguous_message_is_held_where_the_mailer_says_so(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_ON_AMBIGUOUS = "hold"
    delivery = Delivery()
    delivery.remember(clock_of("default").now())
    row = fall_back(AMBIGUOUS, delivery=delivery)
    assert (row.state, row.due_at) == ("held", None)
    assert fall_back(AMBIGUOUS, mailer=KEYED, delivery=delivery).state == "deferred"
    delivery.renew_key()
    assert fall_back(AMBIGUOUS, mailer=KEYED, delivery=delivery).state == "held"


@pytest.mark.django_db
def test_message_that_no_worker_would_send_is_not_kept(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_MAX_ATTEMPTS = 1
    with pytest.raises(MessageNotQueueable, match="too many attempts"):
        fall_back(REFUSED)
    assert not QueuedMessage.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize(("said", "stored"), [("high", 1), ("medium", 2), ("low", 3), ("LOW", 3), (1, 1), (3, 3)])
def test_priority_is_the_messages_own(said: Any, stored: int) -> None:
    (row,) = queue(priority=said)
    assert row.priority == stored


@pytest.mark.django_db
def test_what_the_message_says_counts_before_what_the_call_says() -> None:
    messages = [mail(), mail(priority="high", on_ambiguous="resend", not_before=NOON)]
    rows = enqueue(
        messages, mailer=PLAIN, origin="queued", priority="low", on_ambiguous="hold", not_before=timedelta(hours=1)
    )
    assert [(row.priority, row.on_ambiguous) for row in rows] == [(3, "hold"), (1, "resend")]
    assert rows[0].due_at == rows[0].created_at + timedelta(hours=1)
    assert rows[1].due_at == NOON


@pytest.mark.django_db
def test_rows_of_one_call_keep_what_each_was_given() -> None:
    given: list[dict[str, Any]] = [
        {},  # NULL where the others have a value, and plain text where they have a member of an enumeration
        {"priority": "high", "on_ambiguous": "hold", "not_before": NOON},
        {"idempotency_key": "order-1", "expires_at": NOON},
        {"subject": 'Ä, "{}\\ NULL'},
    ]
    rows = enqueue([mail(**one) for one in given], mailer=PLAIN, origin="queued")
    names = [field.attname for field in QueuedMessage._meta.concrete_fields]
    stored = QueuedMessage.objects.in_bulk([row.pk for row in rows])
    for row in rows:
        assert {name: getattr(stored[row.pk], name) for name in names} == {name: getattr(row, name) for name in names}
        assert unpack(stored[row.pk].content.payload, []).subject == row.subject


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        pytest.param({"priority": "urgent"}, "priority is 'urgent'", id="priority"),
        pytest.param({"priority": 4}, "priority is 4", id="priority out of range"),
        pytest.param({"not_before": "tomorrow"}, "not_before is 'tomorrow'", id="not_before"),
        pytest.param({"expires_at": 60}, "expires_at is 60", id="expires_at"),
        pytest.param({"on_ambiguous": "drop"}, "'drop'", id="on_ambiguous"),
    ],
)
def test_options_that_mean_nothing_are_refused(attributes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        queue(**attributes)
    assert not QueuedMessage.objects.exists()


@pytest.mark.django_db
def test_naive_time_is_the_callers_time() -> None:
    (row,) = queue(not_before=datetime(2040, 7, 1, 12, 0))  # noqa: DTZ001  # as many a caller would write it
    assert row.due_at == datetime(2040, 7, 1, 9, 0, tzinfo=timezone.utc)  # TIME_ZONE is Helsinki


@pytest.mark.django_db
def test_waiting_message_is_looked_at_when_it_expires() -> None:
    (row,) = queue(not_before=timedelta(hours=2), expires_at=timedelta(minutes=10))
    assert row.due_at == row.expires_at == row.created_at + timedelta(minutes=10)


@pytest.mark.django_db
def test_summaries_take_what_no_database_takes() -> None:
    (row,) = queue("A\0B \ud83d C\n" + "x" * 500, to="Jürgen 😀 <j@example.com>")
    row.refresh_from_db()
    assert row.subject.startswith("A\N{REPLACEMENT CHARACTER}B ? C x")
    assert len(row.subject) == 200
    assert "j@example.com" in row.recipients


# --- how many statements ---


@pytest.mark.django_db
@pytest.mark.parametrize("origin", ["queued", "fallback"])
def test_one_message_is_two_inserts_and_nothing_else(origin: str) -> None:
    clock_of("default").now()
    with statements() as found:
        if origin == "fallback":
            fall_back_without_reading(REFUSED)
        else:
            queue()
    assert sum(sql.count("INSERT INTO") for sql in found) == 2
    assert len(found) == (1 if connection.vendor == "postgresql" else 2)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("attachments", [0, 1])
@pytest.mark.parametrize("messages", [1, 2])
def test_what_is_one_statement_needs_no_transaction(messages: int, attachments: int) -> None:
    mails = [mail() for _ in range(messages)]
    for one in mails:
        one.attachments += [("a.bin", b"a", "application/octet-stream")] * attachments
    clock_of("default").now()
    with CaptureQueriesContext(connection) as found:
        enqueue(mails, mailer=PLAIN, origin="queued")
    one_statement = connection.vendor == "postgresql" and (messages, attachments) == (1, 0)
    assert any(query["sql"] == "COMMIT" for query in found) is not one_statement


def fall_back_without_reading(outcome: Outcome) -> None:
    enqueue([mail()], mailer=PLAIN, origin="fallback", delivery=Delivery(), outcome=outcome)


@pytest.mark.django_db(transaction=True)
def test_500_messages_are_few_statements() -> None:
    clock_of("default").now()
    messages = [mail(f"Subject {number}") for number in range(500)]
    with statements() as found:
        rows = enqueue(messages, mailer=PLAIN, origin="queued")
    assert len(found) <= 6  # 2, or more where the database takes few parameters: SQLite, before Django 6
    assert len({row.pk for row in rows}) == 500
    assert QueuedMessage.objects.filter(content__isnull=False).count() == 500


@pytest.mark.django_db
def test_ids_are_found_where_the_database_does_not_return_them(monkeypatch: pytest.MonkeyPatch) -> None:
    if connection.vendor != "mysql":
        pytest.skip("MySQL alone does not return the ids of many rows")
    monkeypatch.setattr(type(connection.features), "can_return_rows_from_bulk_insert", False)
    attached = [mail(f"Subject {number}") for number in range(5)]
    for number, message in enumerate(attached):
        message.attach("n.bin", bytes([number]), "application/octet-stream")
    rows = enqueue(attached, mailer=PLAIN, origin="queued")
    for number, row in enumerate(rows):
        stored = QueuedMessage.objects.get(pk=row.pk)
        assert stored.subject == f"Subject {number}"
        (attachment,) = bodies.load("default", [row.pk])[row.pk]
        assert unpack(stored.content.payload, [attachment[2]]).subject == f"Subject {number}"
        assert attachment[2] == bytes([number])


@pytest.mark.django_db
def test_large_inserts_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INSERT_BYTES", 10_000)
    with statements() as found:
        enqueue([mail("S", idempotency_key="k") for _ in range(20)], mailer=PLAIN, origin="queued")
    assert len([sql for sql in found if sql.startswith("INSERT")]) > 2
    assert MessageContent.objects.count() == 20


# --- whose transaction ---


@pytest.mark.django_db(transaction=True)
def test_row_goes_with_the_callers_transaction() -> None:
    with transaction.atomic():
        queue()
        transaction.set_rollback(True)
    assert not QueuedMessage.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_failing_insert_leaves_the_callers_rows_alone() -> None:
    def misdirect(execute: Any, sql: str, *args: Any) -> Any:
        return execute(sql.replace(MessageContent._meta.db_table, "no_such_table"), *args)

    with transaction.atomic():
        Group.objects.create(name="caller's")
        with connection.execute_wrapper(misdirect), pytest.raises(DatabaseError):
            queue()
        assert Group.objects.count() == 1  # the transaction still works
    assert Group.objects.count() == 1
    assert not QueuedMessage.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_all_messages_are_stored_or_none() -> None:
    with pytest.raises(ValueError, match="priority"):
        enqueue([mail(), mail(priority="urgent")], mailer=PLAIN, origin="queued")
    assert not QueuedMessage.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_caller_hears_of_it_when_it_is_committed() -> None:
    heard: list[Any] = []

    def hear(queued_message: QueuedMessage, **kwargs: Any) -> None:
        heard.append(queued_message.pk)

    message_queued.connect(hear)
    try:
        with transaction.atomic():
            rows = queue("a", "b")
            assert heard == []
        assert heard == [row.pk for row in rows]
    finally:
        message_queued.disconnect(hear)


@pytest.mark.django_db(transaction=True)
def test_held_message_is_told_of(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_ON_AMBIGUOUS = "hold"
    heard: list[Any] = []

    def hear(queued_message: QueuedMessage, outcome: Outcome, **kwargs: Any) -> None:
        heard.append((queued_message.pk, outcome))

    message_held.connect(hear)
    try:
        row = fall_back(AMBIGUOUS, delivery=Delivery(maybe_taken_since=clock_of("default").now()))
    finally:
        message_held.disconnect(hear)
    assert heard == [(row.pk, AMBIGUOUS)]


@pytest.mark.django_db(transaction=True)
def test_raising_receiver_harms_nobody(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    def hear(**kwargs: Any) -> None:
        raise RuntimeError("receiver")

    message_queued.connect(hear)
    try:
        queue()
    finally:
        message_queued.disconnect(hear)
    assert QueuedMessage.objects.count() == 1


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("inside", [True, False])
def test_log_says_where_a_row_may_be_lost(caplog: pytest.LogCaptureFixture, inside: bool) -> None:
    caplog.set_level(logging.INFO, "anymail_retry.queue")
    if inside:
        with transaction.atomic():
            queue("Secret", to="secret@example.com")
    else:
        queue("Secret", to="secret@example.com")
    (line,) = [record.getMessage() for record in caplog.records if "queued" in record.getMessage()]
    assert ("inside a transaction" in line) == inside
    assert PLAIN in line
    assert "ecret" not in line


@pytest.mark.django_db(transaction=True)
def test_connection_that_it_opened_is_closed_again() -> None:
    connection.close()
    enqueue([mail()], mailer=PLAIN, origin="queued", close_connection=True)
    closed = connection.connection is None
    assert closed or connection.is_in_memory_db()  # type: ignore[attr-defined]  # SQLite in memory stays open
    assert QueuedMessage.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_connection_of_the_callers_stays_open() -> None:
    connection.ensure_connection()
    before = connection.connection
    enqueue([mail()], mailer=PLAIN, origin="queued", close_connection=True)
    assert connection.connection is before


# --- which database ---


@pytest.mark.django_db(transaction=True, databases=["default", "queue"])
def test_queue_has_a_database_of_its_own(settings: SettingsWrapper, script: Script) -> None:
    settings.EMAIL_QUEUE_DATABASE = "queue"
    with transaction.atomic():
        message = mail("kept")
        message.attach("a.bin", b"123", "application/octet-stream")
        enqueue([message], mailer=PLAIN, origin="queued")
        transaction.set_rollback(True)
    assert not QueuedMessage.objects.using("default").exists()
    assert QueuedMessage.objects.using("queue").get().subject == "kept"
    assert Worker().drain().sent == 1
    assert script.subjects == ["kept"]
    assert Attempt.objects.using("queue").count() == 1


class Replica:
    """Reads go to a replica, which has nothing yet."""

    def db_for_read(self, model: type, **hints: Any) -> str:
        return "queue"

    def db_for_write(self, model: type, **hints: Any) -> str:
        return "default"

    def allow_relation(self, one: Any, other: Any, **hints: Any) -> bool:
        return True


@pytest.mark.django_db(transaction=True, databases=["default", "queue"])
def test_replica_is_never_read(settings: SettingsWrapper, script: Script) -> None:
    settings.DATABASE_ROUTERS = [Replica()]
    message = mail("sent")
    message.attach("a.bin", b"123", "application/octet-stream")
    with connections["queue"].execute_wrapper(_forbidden):
        enqueue([message, mail("also")], mailer=PLAIN, origin="queued")
        assert Worker().drain().sent == 2


def _forbidden(execute: Any, sql: str, *args: Any) -> Any:
    raise AssertionError(f"asked the replica: {sql}")


# --- what is too large ---


@pytest.mark.django_db(transaction=True)
def test_message_over_max_allowed_packet_is_refused_before_the_insert(monkeypatch: pytest.MonkeyPatch) -> None:
    if connection.vendor != "mysql":
        pytest.skip("MySQL alone has max_allowed_packet")
    database.max_packet.cache_clear()
    limit = database.max_packet("default")
    assert limit is not None
    with transaction.atomic():
        Group.objects.create(name="caller's")
        for what, size in (("attachments\\[0\\]", limit), ("attachments\\[0\\]", limit // 2)):
            message = mail()
            message.attach("a.bin", b"\0" * size, "application/octet-stream")  # doubled by the driver's escaping
            with pytest.raises(MessageNotQueueable, match=f"{what}.*max_allowed_packet"):
                enqueue([message], mailer=PLAIN, origin="queued")
        message = mail()
        message.body = '"' * limit
        with pytest.raises(MessageNotQueueable, match=r"body.*max_allowed_packet"):
            enqueue([message], mailer=PLAIN, origin="queued")
    assert Group.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_no_statement_of_many_messages_is_longer_than_the_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the connection, and the caller's transaction with it. The driver doubles what it escapes."""
    if connection.vendor != "mysql":
        pytest.skip("MySQL alone has max_allowed_packet")
    limit = 1024 * 1024  # the smallest default of a server still in use
    monkeypatch.setattr(module, "max_packet", lambda alias: limit)
    messages = [mail(str(number)) for number in range(100)]
    for message in messages:
        message.body = '<p class="x">\n' * 1000
    with CaptureQueriesContext(connection) as queries:
        enqueue(messages, mailer=PLAIN, origin="queued")
    lengths = [len(query["sql"].encode()) for query in queries if "INSERT" in query["sql"]]
    assert len(lengths) > 2
    assert max(lengths) < limit


@pytest.mark.django_db(transaction=True)
def test_attachments_as_large_as_the_server_takes_are_kept() -> None:
    size = 3_000_000
    messages = []
    for number in range(3):
        message = mail()
        message.attach("a.bin", bytes([number]) * size, "application/octet-stream")
        message.attach("b.bin", b"'" * size, "application/octet-stream")
        messages.append(message)
    rows = enqueue(messages, mailer=PLAIN, origin="queued")
    for number, row in enumerate(rows):
        found = [data for _, _, data in bodies.load("default", [row.pk])[row.pk]]
        assert found == [bytes([number]) * size, b"'" * size]


# --- attachments ---


def attached(*contents: bytes) -> EmailMessage:
    message = mail()
    for number, data in enumerate(contents):
        message.attach(f"{number}.bin", data, "application/octet-stream")
    return message


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> bodies.Seen:
    """A process that has met no attachment yet."""
    seen = bodies.Seen(size=3)
    monkeypatch.setattr(bodies, "_seen", seen)
    return seen


def store(*messages: EmailMessage) -> list[QueuedMessage]:
    return enqueue(messages, mailer=PLAIN, origin="queued")


@pytest.mark.django_db
@pytest.mark.usefixtures("unseen")
def test_attachment_is_private_at_first_and_shared_when_seen_again() -> None:
    store(attached(b"logo"))
    assert AttachmentBody.objects.get().digest is None
    store(attached(b"logo"))
    store(attached(b"logo"))
    assert AttachmentBody.objects.filter(digest=None).count() == 1
    assert AttachmentBody.objects.exclude(digest=None).count() == 1


@pytest.mark.django_db
@pytest.mark.usefixtures("unseen")
def test_attachment_of_a_bulk_send_is_stored_once() -> None:
    rows = store(*(attached(b"logo", bytes([number])) for number in range(50)))
    assert AttachmentBody.objects.exclude(digest=None).count() == 1
    assert AttachmentBody.objects.filter(digest=None).count() == 50
    loaded = bodies.load("default", [row.pk for row in rows])
    for number, row in enumerate(rows):
        assert [data for _, _, data in loaded[row.pk]] == [b"logo", bytes([number])]
    assert len({id(loaded[row.pk][0][2]) for row in rows}) == 1  # in memory once, too


@pytest.mark.django_db
@pytest.mark.usefixtures("unseen")
def test_same_attachment_twice_in_one_message() -> None:
    (row,) = store(attached(b"a", b"b", b"a"))
    assert [data for _, _, data in bodies.load("default", [row.pk])[row.pk]] == [b"a", b"b", b"a"]
    assert AttachmentBody.objects.count() == 2


@pytest.mark.django_db
@pytest.mark.usefixtures("unseen")
def test_old_body_is_not_shared_any_more() -> None:
    store(attached(b"logo"))
    store(attached(b"logo"))
    AttachmentBody.objects.update(created_at=clock_of("default").now() - bodies.SHARED_FOR - timedelta(seconds=1))
    store(attached(b"logo"))
    assert AttachmentBody.objects.count() == 3


def test_hint_forgets_what_is_long_ago(unseen: bodies.Seen) -> None:
    assert [unseen.add(digest) for digest in "abca"] == [False, False, False, True]
    assert not unseen.add("d")  # b leaves
    assert not unseen.add("b")
    assert unseen.add("a")


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("unseen")
def test_two_open_transactions_with_the_same_attachments_do_not_wait_for_each_other() -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has one writer at a time, whatever they write")
    import threading

    store(attached(b"one", b"two"))
    both = threading.Barrier(2)

    def send(*contents: bytes) -> None:
        with transaction.atomic():
            store(attached(*contents))
            both.wait(60)  # with locks, or in another order with a unique key, one would never come here

    in_threads(lambda: send(b"one", b"two"), lambda: send(b"two", b"one"))
    assert QueuedMessage.objects.count() == 3
