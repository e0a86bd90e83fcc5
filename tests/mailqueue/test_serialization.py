"""A message comes back from storage as it went in, or is refused by name."""

from __future__ import annotations

import email.policy
import json
import logging
from datetime import date, datetime, time, timedelta
from datetime import timezone as dt_timezone
from decimal import Decimal
from email.header import Header
from email.message import Message, MIMEPart
from email.mime.base import MIMEBase
from email.mime.image import MIMEImage
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from anymail.backends.base import BasePayload
from anymail.message import AnymailMessage, AnymailMessageMixin
from anymail.utils import UNSET
from django.core.mail import EmailAlternative, EmailAttachment, EmailMessage, EmailMultiAlternatives
from django.utils import timezone, translation
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy

from anymail_retry.exceptions import MessageNotQueueable, PayloadError
from anymail_retry.mailqueue.serialization import (
    ANYMAIL_FIELDS,
    NEVER_STORED,
    TEXT_IN_PAYLOAD,
    VERSION,
    pack,
    unpack,
)

from .awkward import (
    AWKWARD,
    BREAKS_WHILE_LAZY,
    PNG,
    REFUSED,
    Both,
    Frozen,
    Templated,
    attached,
    everything,
    html,
    legacy_part,
    message,
)
from .observed import OPTIONS, Failed, observe

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("tried_before", [False, True], ids=["queued first", "after a failed send"])
@pytest.mark.parametrize("reason", AWKWARD)
def test_every_esp_and_receiver_sees_the_same_after_storage(reason: str, tried_before: bool) -> None:
    # Sending leaves its marks, in attached parts: boundaries, encodings. Two ESPs see those as well as all do.
    esps = ("mailgun", "mandrill") if tried_before else tuple(OPTIONS)
    # The caller's language and time zone are not the worker's.
    with translation.override("de"), timezone.override("Europe/Berlin"):
        original = AWKWARD[reason]()
        if tried_before:
            observe(original, esps)
        packed = pack(original)
        before = observe(original, esps)
    after = observe(unpack(packed.payload, packed.bodies), esps)
    for observer, seen in before.items():
        if reason in BREAKS_WHILE_LAZY and isinstance(seen, Failed):
            assert not isinstance(after[observer], Failed), observer
        else:
            assert after[observer] == seen, observer


@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD.keys())
def test_packing_what_was_unpacked_gives_the_same_again(make: Callable[[], EmailMessage]) -> None:
    with translation.override("de"), timezone.override("Europe/Berlin"):
        packed = pack(make())
    assert pack(unpack(packed.payload, packed.bodies)) == packed


@pytest.mark.parametrize("fix_message_id", [False, True])
@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD.keys())
def test_the_callers_message_stays_as_it_was(make: Callable[[], EmailMessage], fix_message_id: bool) -> None:
    original = make()
    before = _state(original)
    pack(original, fix_message_id=fix_message_id)
    assert _state(original) == before


def _state(value: Any, depth: int = 0) -> Any:
    """Everything in a message, in a form that later changes cannot reach."""
    if isinstance(value, (EmailMessage, Message)):
        return type(value), _state(dict(vars(value)), depth + 1)
    if isinstance(value, dict):
        return type(value), [(repr(key), _state(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [_state(item, depth + 1) for item in value]
    if isinstance(value, (bytearray, memoryview)):
        return type(value), bytes(value)
    return type(value), id(value), repr(value)


@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD.keys())
def test_the_payload_is_plain_ascii_text_for_any_database(make: Callable[[], EmailMessage]) -> None:
    packed = pack(make())
    assert packed.payload.isascii()
    assert packed.payload.isprintable()  # no NUL either
    assert json.loads(packed.payload)["v"] == VERSION
    assert all(type(body) is bytes for body in packed.bodies)


@pytest.mark.parametrize(("make", "what", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_kept_is_refused_by_name(make: Callable[[], Any], what: str, why: str) -> None:
    with translation.override("de"), pytest.raises(MessageNotQueueable) as caught:
        pack(make())
    assert caught.value.what == what
    assert why in caught.value.why


def test_a_refusal_quotes_no_content() -> None:
    secret = "one-time code 123456"
    made = message(metadata={"code": {secret}}, body=secret)
    with pytest.raises(MessageNotQueueable) as caught:
        pack(made)
    assert secret not in str(caught.value)


# --- What a message is made of ---


def stored_and_back(original: EmailMessage, **options: Any) -> Any:
    packed = pack(original, **options)
    return unpack(packed.payload, packed.bodies)


@pytest.mark.parametrize("name", ANYMAIL_FIELDS)
@pytest.mark.parametrize("cls", [EmailMessage, EmailMultiAlternatives, AnymailMessage])
def test_absent_unset_none_and_empty_are_told_apart(cls: type[EmailMessage], name: str) -> None:
    absent = message(cls)
    if hasattr(absent, name):
        delattr(absent, name)
    assert not hasattr(stored_and_back(absent), name)
    for value in (UNSET, None, "", [], {}, 0, False):
        rebuilt = getattr(stored_and_back(message(cls, **{name: value})), name)
        assert rebuilt == value
        assert type(rebuilt) is type(value)


@pytest.mark.parametrize("cls", [EmailMessage, EmailMultiAlternatives, AnymailMessageMixin, AnymailMessage])
def test_a_message_keeps_its_class(cls: type[EmailMessage]) -> None:
    assert type(stored_and_back(message(cls))) is cls


@pytest.mark.parametrize(
    ("make", "base"),
    [
        pytest.param(lambda: Templated(7), EmailMultiAlternatives, id="a subclass of one class"),
        pytest.param(lambda: message(Both), AnymailMessage, id="of two, as Anymail documents it"),
    ],
)
def test_a_subclass_becomes_the_class_that_it_extends(make: Callable[[], EmailMessage], base: type) -> None:
    assert type(stored_and_back(make())) is base


def test_attachments_stay_what_django_made_of_them() -> None:
    plain = ("c.txt", "c", "text/plain")
    rebuilt = stored_and_back(attached("a.txt", "a", "text/plain", attachments=[plain, legacy_part()]))
    assert [type(item) for item in rebuilt.attachments] == [tuple, MIMEBase, EmailAttachment]
    assert rebuilt.attachments[2].filename == "a.txt"
    assert type(stored_and_back(html()).alternatives[0]) is EmailAlternative


def test_a_datetime_as_test_tools_replace_it_comes_back_as_one() -> None:
    rebuilt = stored_and_back(message(metadata={"when": Frozen(2033, 1, 2, tzinfo=dt_timezone.utc)}))
    assert rebuilt.metadata == {"when": datetime(2033, 1, 2, tzinfo=dt_timezone.utc)}


def test_lazy_text_is_that_of_the_callers_language() -> None:
    original = message(subject=gettext_lazy("Monday"), metadata={"day": [gettext_lazy("Tuesday")]})
    with translation.override("de"):
        packed = pack(original)
    with translation.override("fr"):
        rebuilt: Any = unpack(packed.payload, packed.bodies)
    assert rebuilt.subject == "Montag"
    assert rebuilt.metadata == {"day": ["Dienstag"]}


@pytest.mark.parametrize(
    "send_at",
    [
        datetime(2033, 7, 1, 9, 0),  # noqa: DTZ001  # the case itself
        datetime(2033, 10, 30, 3, 30),  # noqa: DTZ001  # twice in this zone: the first
        datetime(2033, 10, 30, 3, 30, fold=1),  # noqa: DTZ001  # and the second
        datetime(2033, 3, 27, 3, 30),  # noqa: DTZ001  # never in this zone
        datetime(2033, 7, 1, 9, 0, tzinfo=ZoneInfo("Asia/Kathmandu")),
        date(2033, 7, 1),
        2_000_000_000,
        2_000_000_000.5,
        True,
    ],
    ids=repr,
)
def test_send_at_is_the_moment_that_anymail_understands_in_the_callers_zone(send_at: Any) -> None:
    with timezone.override("Europe/Helsinki"):
        packed = pack(message(send_at=send_at))
        expected = BasePayload.aware_datetime(None, send_at)
    with timezone.override("Asia/Tokyo"):
        rebuilt: Any = unpack(packed.payload, packed.bodies)
        assert BasePayload.aware_datetime(None, rebuilt.send_at).isoformat() == expected.isoformat()


def test_bytes_and_long_texts_of_attachments_are_bodies_and_nothing_else_is() -> None:
    original = html(body="b" * 100_000, alternatives=[EmailAlternative("a" * 100_000, "text/html")])
    original.attach("a.bin", PNG, "image/png")
    original.attach("short.csv", "s" * TEXT_IN_PAYLOAD, "text/csv")
    original.attach("long.csv", "ü" * (TEXT_IN_PAYLOAD + 1), "text/csv")
    packed = pack(original)
    assert packed.bodies == (PNG, ("ü" * (TEXT_IN_PAYLOAD + 1)).encode())
    assert stored_and_back(original).attachments == original.attachments


# --- Message-ID ---


def test_a_fixed_message_id_is_the_same_at_every_send_and_not_on_the_callers_message() -> None:
    original = message()
    packed = pack(original, fix_message_id=True)
    sent = [unpack(packed.payload, packed.bodies).message() for _ in range(2)]
    assert sent[0]["Message-ID"] == sent[1]["Message-ID"]
    assert original.extra_headers == {}
    assert pack(original, fix_message_id=True).payload != packed.payload


def test_a_fixed_message_id_stands_where_django_puts_it() -> None:
    original = message(extra_headers={"X-A": "1"})
    assert list(stored_and_back(original, fix_message_id=True).message()) == list(original.message())


@pytest.mark.parametrize("name", ["Message-ID", "message-id", "MESSAGE-ID"])
def test_the_users_message_id_stays(name: str) -> None:
    rebuilt = stored_and_back(message(extra_headers={name: "<mine@example.com>"}), fix_message_id=True)
    assert rebuilt.extra_headers == {name: "<mine@example.com>"}


# --- Attributes of the user's own ---


def test_attributes_of_the_users_own_are_kept() -> None:
    own = {
        "order": 7,
        "customer": {"name": "Ü", "since": date(2001, 2, 3)},
        "note": gettext_lazy("Monday"),
        "raw": b"\0",
    }
    rebuilt = stored_and_back(message(**own))
    assert {name: getattr(rebuilt, name) for name in own} == own | {"note": "Monday"}


def test_attributes_of_a_subclass_are_kept_and_its_code_is_not(caplog: pytest.LogCaptureFixture) -> None:
    rebuilt = stored_and_back(Templated(7))
    assert rebuilt.category == "invoice"  # of the class
    assert rebuilt.order == 7  # of its constructor
    assert rebuilt.body == "<p>Order 7</p>"  # computed
    assert rebuilt.tags == ("from the class",)
    assert not {"render", "url"} & vars(rebuilt).keys()
    assert not caplog.records  # nobody expects code to be stored


def test_what_cannot_be_stored_of_the_users_own_is_left_out_and_named_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = format_lazy("{nothing}", "secret")
    original = message(
        order=object(), secrets={"a": {"secret"}}, half=[PNG, object()], kept=[PNG], broken=broken, send=len
    )
    packed = pack(original)
    rebuilt = unpack(packed.payload, packed.bodies)
    assert rebuilt.kept == [PNG]  # type: ignore[attr-defined]  # the user's own
    assert packed.bodies == (PNG,)  # none of what was left out
    assert not {"order", "secrets", "half", "broken", "send"} & vars(rebuilt).keys()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("anymail_retry.queue", logging.WARNING)
    assert "order, secrets, half, broken, send" in record.getMessage()
    assert "'secret'" not in record.getMessage()


def test_what_belongs_to_one_send_is_never_stored(caplog: pytest.LogCaptureFixture) -> None:
    plain = message(AnymailMessage)
    sent = message(AnymailMessage, **dict.fromkeys(NEVER_STORED - {"connection"}, "secret"))
    assert pack(sent) == pack(plain)
    assert not caplog.records


# --- Reading ---

GOOD = {"v": 1, "class": "EmailMessage", "fields": {"from_email": "from@example.com"}}


def payload(**changes: Any) -> str:
    return json.dumps(GOOD | changes)


def holds(value: Any) -> str:
    """A payload with this value in it."""
    return payload(fields={"from_email": "from@example.com", "subject": value})


PART = {"$": "part", "class": "MIMEText", "policy": ["compat32", {}], "headers": []}

# Reason: (payload, bodies, what the error says)
DAMAGED: dict[str, tuple[Any, Any, str]] = {
    "nothing": ("", (), "not JSON"),
    "not JSON": ("{", (), "not JSON"),
    "not text": (None, (), "cannot be decoded"),
    "a pickle": ("gASVDAAAAAAAAACMBnBvc2l4lIwGc3lzdGVtlJOULg==", (), "not JSON"),
    "JSON of something else": ('["v", 1]', (), "no version"),
    "no version": (json.dumps({"class": "EmailMessage", "fields": {}}), (), "no version"),
    "a version that is no number": (payload(v="1"), (), "no version"),
    "a version that is true": (payload(v=True), (), "no version"),
    "a later version": (payload(v=2), (), "version 2 of the format; this release reads 1"),
    "nested too deeply": ("[" * 100_000, (), "cannot be decoded"),
    "a class of the sender's choosing": (payload(**{"class": "subprocess.Popen"}), (), "cannot be decoded"),
    "a class that is no name": (payload(**{"class": []}), (), "cannot be decoded"),
    "no fields": (payload(fields=None), (), "cannot be decoded"),
    "no sender": (payload(fields={}), (), "fields"),
    "an unknown field": (payload(fields={"from_email": "x", "connection": "x"}), (), "fields"),
    "a method as attribute": (payload(user={"message": "x"}), (), "'message'"),
    "a class as attribute": (payload(user={"__class__": "x"}), (), "'__class__'"),
    "our own attribute": (payload(user={"queued_message": "x"}), (), "'queued_message'"),
    "an unknown type": (holds({"$": "object"}), (), "unknown type"),
    "a type that is no name": (holds({"$": []}), (), "cannot be decoded"),
    "a value without a value": (holds({"$": "tuple"}), (), "cannot be decoded"),
    "a date that is none": (holds({"$": "date", "v": "secret"}), (), "cannot be decoded (ValueError)"),
    "a decimal that is none": (holds({"$": "decimal", "v": "secret"}), (), "cannot be decoded"),
    "a duration without end": (holds({"$": "timedelta", "v": [10**12]}), (), "cannot be decoded"),
    "a list as a key": (holds({"$": "dict", "v": [[[], 1]]}), (), "cannot be decoded"),
    "a missing body": (holds({"$": "bytes", "body": 1}), (b"",), "Body 1 of the stored message is missing; it has 1"),
    "a body before the first": (holds({"$": "bytes", "body": -1}), (b"",), "Body -1"),
    "a body that is no index": (holds({"$": "bytes", "body": "secret"}), {"secret": b""}, "by something else"),
    "a body that is text": (holds({"$": "bytes", "body": 0}), ("text",), "Body 0 of the stored message is not bytes"),
    "a text that is none": (holds({"$": "text", "body": 0}), (b"\xff",), "cannot be decoded"),
    "a part of an unknown class": (holds(PART | {"class": "Popen"}), (), "cannot be decoded"),
    "a part of an unknown policy": (holds(PART | {"policy": ["x", {}]}), (), "cannot be decoded"),
    "a policy with code": (
        holds(PART | {"policy": ["default", {"header_factory": "x"}]}),
        (),
        "cannot be decoded",
    ),
    "a header without a value": (holds(PART | {"headers": [["Subject"]]}), (), "cannot be decoded"),
    "a charset with more than a charset has": (holds({"$": "charset", "v": {"x": 1}}), (), "cannot be decoded"),
}


@pytest.mark.parametrize(("text", "bodies", "says"), DAMAGED.values(), ids=DAMAGED.keys())
def test_what_cannot_be_decoded_raises_payload_error_and_says_why(text: Any, bodies: Any, says: str) -> None:
    with pytest.raises(PayloadError) as caught:
        unpack(text, bodies)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_payload_that_was_cut_short_is_never_taken_for_a_message() -> None:
    packed = pack(everything())
    for length in range(0, len(packed.payload), 7):
        with pytest.raises(PayloadError):
            unpack(packed.payload[:length], packed.bodies)
    for count in range(len(packed.bodies)):
        with pytest.raises(PayloadError, match="missing"):
            unpack(packed.payload, packed.bodies[:count])


def test_bodies_may_come_as_the_database_gives_them() -> None:
    original = everything()
    original.attach("long.csv", "ü" * (TEXT_IN_PAYLOAD + 1), "text/csv")
    packed = pack(original)
    views = [memoryview(body) for body in packed.bodies]
    assert pack(unpack(packed.payload, views)) == packed  # type: ignore[arg-type]  # psycopg gives memoryviews


def test_what_earlier_releases_stored_is_still_read() -> None:
    """Version 1, written out: rows outlive releases."""
    stored = Path(__file__).with_name("payload_v1.json").read_text(encoding="ascii")
    rebuilt: Any = unpack(stored, (b"\x89PNG", "long ж".encode(), b"ba", b"mv"))
    assert type(rebuilt) is AnymailMessage
    assert (rebuilt.subject, rebuilt.body, rebuilt.from_email) == ("S\0", "\ud83d\ude00", "from@example.com")
    assert (rebuilt.to, rebuilt.cc, rebuilt.bcc, rebuilt.reply_to) == (["to@example.com"], ("cc@example.com",), [], [])
    assert rebuilt.extra_headers == {"X-Z": "1", "X-A": "2"}
    assert list(rebuilt.extra_headers) == ["X-Z", "X-A"]
    assert (rebuilt.content_subtype, rebuilt.encoding.input_charset) == ("html", "iso-8859-1")
    assert rebuilt.alternatives == [EmailAlternative("<p>", "text/html")]
    assert type(rebuilt.alternatives[0]) is EmailAlternative
    assert rebuilt.tags is UNSET
    assert not hasattr(rebuilt, "track_opens")
    assert rebuilt.track_clicks is None
    assert rebuilt.send_at == datetime(2033, 7, 1, 9, 0, tzinfo=timezone.get_fixed_timezone(180))
    assert rebuilt.metadata == {
        "tuple": (1, [2]),
        "date": date(2033, 1, 2),
        "time": time(3, 4, 5),
        "delta": timedelta(-1, 2, 3),
        "decimal": Decimal("1.10"),
        "uuid": UUID("12345678123456781234567812345678"),
        "inf": float("inf"),
        "bytes": b"\x89PNG",
        "bytearray": bytearray(b"ba"),
        "memoryview": memoryview(b"mv"),
        "dict": {1: "int", "$": "dollar"},
        "header": Header("Grüße", "utf-8"),
    }
    assert (rebuilt.order, rebuilt.queue) == (7, {"a": [1.5, None, True]})
    pdf, text, inner, image, modern = rebuilt.attachments
    assert pdf == EmailAttachment("a.png", b"\x89PNG", "image/png")
    assert type(pdf) is EmailAttachment
    assert text == ("b.txt", "long ж", "text/plain")
    assert (type(inner[1]), inner[1].subject) == (EmailMessage, "Inner")
    assert (type(image), image["Content-ID"], image.get_payload(decode=True)) == (MIMEImage, "<logo>", b"\x89PNG")
    assert (type(modern), modern.get_filename(), modern.get_content()) == (MIMEPart, "ü.csv", "é\n")
    assert repr(modern.policy) == repr(email.policy.SMTP)
