"""Encryption at rest: who reads the database reads no mail, and a change of keys loses none."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.core.management import CommandError, call_command
from django.db import connection, transaction

from anymail_retry.delivery import Delivery
from anymail_retry.mailqueue import bodies, encryption, operations, reencryption
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import AttachmentBody, Attempt, MessageAttachment, MessageContent, QueuedMessage
from anymail_retry.verdict import Outcome
from tests.test_walls import CONFIGURE, loaded_after

from .engine import DELIVERED, PERMANENT, PLAIN, REFUSED, Script, change, make_due, past

if TYPE_CHECKING:
    from pytest_django.fixtures import SettingsWrapper

database = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("script")]

OLD, NEW, OTHER = (base64.urlsafe_b64encode(letter * 32).decode() for letter in (b"o", b"n", b"x"))
SECRET = "one-time-code-271828"
SHA256 = hashlib.sha256(SECRET.encode()).hexdigest()
LONG = b"%PDF one-time-code-271828 " * 1000
HELD = "cannot be decrypted: no key in EMAIL_QUEUE_ENCRYPTION_KEYS fits"


def with_database(test: Any) -> Any:
    for mark in database:
        test = mark(test)
    return test


def use(settings: SettingsWrapper, *keys: str) -> None:
    settings.EMAIL_QUEUE_ENCRYPTION_KEYS = list(keys)


def store(*, attachments: tuple[bytes, ...] = (LONG,), **options: Any) -> QueuedMessage:
    message = EmailMessage(f"Your code: {SECRET}", f"It is {SECRET}.", "from@example.com", ["to@example.com"])
    for data in attachments:
        message.attach("a.bin", data, "application/octet-stream")
    (row,) = enqueue([message], mailer=PLAIN, origin="queued", **options)
    return row


def arrived(script: Script) -> list[tuple[str, list[Any]]]:
    return [(str(send.message.body), [part[1] for part in send.message.attachments]) for send in script.sends]


ONE = (f"It is {SECRET}.", [LONG])


def everything_stored() -> bytes:
    """Every column of every row of the queue's tables."""
    values = []
    for model in (QueuedMessage, MessageContent, AttachmentBody, MessageAttachment, Attempt):
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT * FROM {connection.ops.quote_name(model._meta.db_table)}")
            values += [value for row in cursor.fetchall() for value in row]
    assert values
    return b"\n".join(bytes(v) if isinstance(v, (bytes, memoryview)) else str(v).encode() for v in values)


def traces() -> set[bytes]:
    """The secret as it may be found: as it is, its digests, and base64 at each of the three places in a word."""
    secret = SECRET.encode()
    digests = {hashlib.sha256(data).hexdigest().encode() for data in (secret, LONG)}
    return {secret, *digests, *(base64.b64encode(b" " * n + secret)[4:-4] for n in range(3))}


def run(*args: str) -> dict[str, int]:
    out = io.StringIO()
    call_command("reencrypt_mail_queue", "--json", *args, stdout=out)
    found: dict[str, int] = json.loads(out.getvalue())
    return {name: number for name, number in found.items() if number}


# --- What is in the tables ---


@with_database
@pytest.mark.parametrize("messages", [1, 3], ids=["one", "many, with shared bytes"])
def test_nothing_of_the_message_is_readable(settings: SettingsWrapper, script: Script, messages: int) -> None:
    use(settings, NEW)
    mails = []
    for _ in range(messages):
        mail = EmailMessage(f"Your code: {SECRET}", SECRET, to=["to@example.com"])
        mail.attach("a.bin", LONG, "application/octet-stream")
        mails.append(mail)
    rows = enqueue(mails, mailer=PLAIN, origin="queued", delivery=Delivery(body_digest=SHA256))
    script.behaviour = lambda message, delivery: REFUSED
    assert Worker().drain().deferred == messages
    stored = everything_stored()
    assert [trace for trace in traces() if trace in stored] == []
    assert AttachmentBody.objects.count() == 1
    assert str(QueuedMessage.objects.get(pk=rows[0].pk)) == "(encrypted) to to@example.com: deferred"
    script.behaviour = lambda message, delivery: DELIVERED
    make_due()
    assert Worker().drain().sent == messages
    assert {(send.message.body, send.message.attachments[0][1]) for send in script.sends} == {(SECRET, LONG)}


@with_database
def test_what_is_searched_for_is_found_where_nothing_is_encrypted() -> None:
    """Else the test above would pass for ever."""
    store(delivery=Delivery(body_digest=SHA256))
    stored = everything_stored()
    assert {trace for trace in traces() if trace in stored} == {SECRET.encode(), SHA256.encode()}


@with_database
@pytest.mark.parametrize("keys", [(), (NEW,)], ids=["plain", "encrypted"])
def test_size_is_what_the_tables_hold(settings: SettingsWrapper, keys: tuple[str, ...]) -> None:
    use(settings, *keys)
    for length in (1, 15, 16, 17, 20_000):
        row = store(attachments=(b"x" * length,))
        ((_, _, data),) = bodies.load("default", [row.pk])[row.pk]
        assert row.size == len(MessageContent.objects.get(message=row).payload) + len(data)


@with_database
def test_encrypted_size_is_what_is_measured_against_max_allowed_packet(
    settings: SettingsWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(settings, NEW)
    measured: dict[str, int] = {}
    monkeypatch.setattr(bodies, "check_size", lambda alias, what, data: measured.update({what: len(data)}))
    row = store()
    assert set(measured) == {"body", "attachments[0]"}
    assert sum(measured.values()) == row.size


# --- Keys that change ---


@with_database
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((), (NEW,), id="switched on"),
        pytest.param((OLD,), (NEW, OLD), id="rotated"),
        pytest.param((OLD,), (OLD, NEW), id="a second key for later"),
    ],
)
def test_what_was_stored_before_the_switch_goes_out_beside_what_is_stored_after(
    settings: SettingsWrapper, script: Script, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    use(settings, *before)
    store()
    store()  # the second one's bytes are shareable
    use(settings, *after)
    store()
    store()
    assert Worker().drain().sent == 4
    assert arrived(script) == [ONE] * 4


@with_database
@pytest.mark.parametrize("without", [(), (OTHER,)], ids=["switched off", "wrong key"])
def test_what_no_key_fits_is_held_alone_and_sent_once_the_key_is_back(
    settings: SettingsWrapper, script: Script, without: tuple[str, ...]
) -> None:
    use(settings, OLD)
    row = store()
    use(settings, *without)
    readable = store()
    totals = Worker().drain()
    assert (totals.sent, totals.held) == (1, 1)
    row.refresh_from_db()
    readable.refresh_from_db()
    assert (row.state, row.reason, readable.state) == ("held", HELD, "sent")
    use(settings, OLD)
    call_command("retry_deferred", "--held", stdout=io.StringIO())
    assert Worker().drain().sent == 1
    assert arrived(script) == [ONE, ONE]


@with_database
def test_damaged_attachment_is_held(settings: SettingsWrapper) -> None:
    use(settings, NEW)
    store()
    AttachmentBody.objects.update(data=b"damaged")
    assert Worker().drain().held == 1


@with_database
def test_copy_of_a_failed_message_is_under_the_first_key(settings: SettingsWrapper, script: Script) -> None:
    use(settings, OLD)
    script.behaviour = lambda message, delivery: PERMANENT
    row = store()
    Worker().drain()
    use(settings, NEW, OLD)
    operations.send_again(row)
    use(settings, NEW)
    script.behaviour = lambda message, delivery: DELIVERED
    assert Worker().drain().sent == 1
    assert arrived(script) == [ONE, ONE]
    with pytest.raises(ValueError, match="cannot be decrypted"):
        operations.send_again(row)


# --- The digest of what the ESP may have taken ---


@pytest.mark.parametrize(
    ("made_by", "now", "same"),
    [
        pytest.param((OLD,), (OLD,), True, id="same key"),
        pytest.param((OLD,), (NEW, OLD), True, id="an older key of the list"),
        pytest.param((), (NEW,), True, id="before encryption"),
        pytest.param((OLD,), (NEW,), False, id="a key that is gone"),
    ],
)
def test_digest_of_a_request_compares_across_keys(made_by: tuple[str, ...], now: tuple[str, ...], same: bool) -> None:
    stored = encryption.Cipher(made_by).request_digests(SHA256)[0] if made_by else SHA256
    assert (stored in encryption.Cipher(now).request_digests(SHA256)) is same
    assert encryption.Cipher(now).request_digests(SHA256)[0] != SHA256


@with_database
def test_digest_is_keyed_in_the_row_that_a_worker_writes(settings: SettingsWrapper, script: Script) -> None:
    def compare(message: Any, delivery: Delivery) -> Outcome:
        assert delivery.digest_forms is not None
        delivery.body_digest = delivery.digest_forms(SHA256)[0]
        return REFUSED

    use(settings, NEW)
    row = store()
    script.behaviour = compare
    assert Worker().drain().deferred == 1
    row.refresh_from_db()
    assert row.body_digest == encryption.Cipher([NEW]).request_digests(SHA256)[0]


# --- reencrypt_mail_queue ---


@with_database
def test_old_key_can_be_dropped_after_reencrypting(settings: SettingsWrapper, script: Script) -> None:
    store()
    store()
    use(settings, OLD)
    store(attachments=(LONG, b"second"))
    held = change(store(), state="held", due_at=None, body_digest="d" * 64)
    use(settings, NEW, OLD)
    store(attachments=())
    assert run("--dry-run") == {"plain": 2, "old_key": 2, "current": 1}
    assert run() == {"encrypted": 4, "current": 1}
    assert run() == {"current": 5}
    AttachmentBody.objects.filter(links=None).update(created_at=past(bodies.KEPT_FOR.total_seconds() + 60))
    run()
    use(settings, NEW)
    stored = everything_stored()
    assert [trace for trace in traces() if trace in stored] == []
    for row in QueuedMessage.objects.all():
        attached = bodies.load("default", [row.pk]).get(row.pk, [])
        assert row.size == len(row.content.payload) + sum(len(data) for _, _, data in attached)
    held.refresh_from_db()
    assert (held.state, held.body_digest) == ("held", None)
    operations.release(QueuedMessage.objects.filter(pk=held.pk))
    assert Worker().drain().sent == 5
    said = f"It is {SECRET}."
    assert sorted(arrived(script)) == sorted([ONE, ONE, ONE, (said, []), (said, [LONG, b"second"])])


@with_database
def test_what_is_being_sent_or_unreadable_is_left_alone_and_said(settings: SettingsWrapper, script: Script) -> None:
    use(settings, OTHER)
    store()
    use(settings)

    def meanwhile(message: Any, delivery: Any) -> Outcome:
        use(settings, NEW)
        reports.append(run_in_thread())
        return DELIVERED

    def run_in_thread() -> dict[str, int]:
        try:
            return run()
        finally:
            connection.close()  # opened in the sender's thread

    reports: list[dict[str, int]] = []
    script.behaviour = meanwhile
    store()
    assert Worker().drain().sent == 1
    assert reports == [{"plain": 1, "unreadable": 1}]
    assert arrived(script) == [ONE]


@with_database
def test_batches_are_bounded(settings: SettingsWrapper) -> None:
    for _ in range(5):
        store(attachments=())
    cipher = encryption.Cipher([NEW])
    assert [found.total() for found in reencryption.reencrypt("default", cipher, batch=2)] == [2, 2, 1]


@with_database
def test_reencrypting_without_a_key_is_refused() -> None:
    with pytest.raises(CommandError, match="EMAIL_QUEUE_ENCRYPTION_KEYS is empty"):
        run()


# --- Configuration ---


@with_database
def test_wrong_key_leaves_the_callers_work_and_stores_nothing(settings: SettingsWrapper) -> None:
    use(settings, NEW, "not a key at all")
    with transaction.atomic():
        with pytest.raises(ImproperlyConfigured, match="number 2 of 2 is none") as caught:
            store()
        assert QueuedMessage.objects.count() == 0
    assert "not a key at all" not in str(caught.value)
    assert NEW not in str(caught.value)


def test_keys_are_in_no_repr(settings: SettingsWrapper) -> None:
    use(settings, NEW)
    cipher = encryption.cipher()
    assert cipher is not None
    assert encryption.cipher() is cipher
    for one in (cipher, Delivery(digest_forms=cipher.request_digests), encryption.CannotDecrypt()):
        assert NEW not in repr(one)
        assert NEW not in str(one)


def test_without_keys_cryptography_is_not_imported() -> None:
    modules = "anymail_retry.mailqueue.enqueue, anymail_retry.mailqueue.worker, anymail_retry.mailqueue.reencryption"
    configure = CONFIGURE.replace("configure()", 'configure(INSTALLED_APPS=["anymail_retry"])')
    loaded = loaded_after(
        f"{configure}\nimport {modules}\nfrom anymail_retry.mailqueue.encryption import cipher\nassert cipher() is None"
    )
    assert "anymail_retry.mailqueue.encryption" in loaded
    assert "cryptography.fernet" not in loaded
