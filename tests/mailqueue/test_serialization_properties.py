"""What no table thinks of: messages, values, parts and damage made by hypothesis."""

from __future__ import annotations

import email.policy
import json
from datetime import timedelta, timezone
from email.message import Message, MIMEPart
from email.mime.base import MIMEBase
from email.mime.text import MIMEText
from typing import Any

from anymail.message import AnymailMessage
from django.core.mail import EmailAlternative, EmailAttachment, EmailMessage, EmailMultiAlternatives
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from anymail_retry.exceptions import MessageNotQueueable, PayloadError
from anymail_retry.mailqueue.serialization import pack, unpack

from .awkward import AWKWARD, message
from .observed import observe

# All that a str can hold, lone surrogates included, with what formats trip over made likely.
texts = st.text(st.characters(exclude_categories=()) | st.sampled_from('\0\r\n\ud83d\ude00"$,;:<>@é😀'), max_size=20)
lines = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=60)
zones = st.none() | st.builds(
    timezone,
    st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(
        lambda d: timedelta(seconds=d // timedelta(seconds=1))
    ),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**2000), 2**2000)
    | st.floats()
    | texts
    | st.binary(max_size=20)
    | st.builds(bytearray, st.binary(max_size=20))
    | st.datetimes(timezones=zones).map(lambda d: d.replace(fold=0))
    | st.dates()
    | st.times().map(lambda t: t.replace(fold=0))
    | st.timedeltas()
    | st.decimals()
    | st.uuids()
)
keys = texts | st.none() | st.booleans() | st.integers() | st.dates() | st.tuples(texts, st.integers())
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def stored_and_back(original: EmailMessage) -> Any:
    packed = pack(original)
    assert packed.payload.isascii()
    rebuilt = unpack(packed.payload, packed.bodies)
    assert pack(rebuilt) == packed
    return rebuilt


@given(values)
def test_any_value_comes_back_with_its_types_and_order(value: Any) -> None:
    original = message(metadata=value, own=value)
    rebuilt = stored_and_back(original)
    assert repr(rebuilt.metadata) == repr(value)  # repr() shows types, order, NaN and -0.0, which == does not
    assert repr(rebuilt.own) == repr(value)
    assert repr(original.metadata) == repr(value)  # type: ignore[attr-defined]  # Anymail's


addresses = st.sampled_from(
    [
        "a@example.com",
        "Ü <u@example.com>",
        '"A, B" <ab@example.com>',
        "x@bücher.example",
        "c@example.com, d@example.com",
    ]
)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
mimetypes = st.sampled_from(
    ["text/plain", "text/csv", "application/pdf", "application/json", "image/png", "text/calendar"]
)
attachments = st.builds(
    EmailAttachment, st.none() | lines, texts | st.binary(max_size=60) | st.just("long é\n" * 2000), mimetypes
) | st.tuples(lines, st.binary(max_size=60), mimetypes)


@st.composite
def messages(draw: st.DrawFn) -> EmailMessage:
    cls = draw(st.sampled_from([EmailMessage, EmailMultiAlternatives, AnymailMessage]))
    made = cls(draw(lines), draw(texts), draw(addresses), draw(st.lists(addresses, min_size=1, max_size=3)))
    made.cc = draw(st.lists(addresses, max_size=2))
    made.reply_to = draw(st.lists(addresses, max_size=2))
    made.extra_headers = draw(
        st.dictionaries(st.sampled_from(["X-A", "X-B", "x-c", "Reply-To", "List-Id", "Message-ID"]), lines, max_size=4)
    )
    made.attachments = draw(st.lists(attachments, max_size=3))
    made.content_subtype = draw(st.sampled_from(["plain", "html"]))
    made.encoding = draw(st.sampled_from([None, "utf-8", "iso-8859-1"]))
    if isinstance(made, EmailMultiAlternatives):
        made.alternatives = draw(
            st.lists(st.builds(EmailAlternative, texts, st.sampled_from(["text/html", "text/x-amp-html"])), max_size=2)
        )
    optional: dict[str, st.SearchStrategy[Any]] = {
        "tags": st.lists(texts, max_size=3),
        "metadata": st.dictionaries(texts, plain_json, max_size=3),
        "merge_data": st.dictionaries(addresses, st.dictionaries(texts, plain_json, max_size=2), max_size=2),
        "merge_global_data": st.dictionaries(texts, plain_json, max_size=2),
        "merge_metadata": st.dictionaries(addresses, st.dictionaries(texts, plain_json, max_size=2), max_size=2),
        "esp_extra": st.dictionaries(texts, plain_json, max_size=2),
        "send_at": st.datetimes(timezones=zones),
        "track_opens": st.none() | st.booleans(),
        "template_id": st.none() | texts,
        "envelope_sender": addresses,
    }
    for name, strategy in optional.items():
        if draw(st.booleans()):
            setattr(made, name, draw(strategy))
    return made


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(messages())
def test_any_message_looks_the_same_to_esps_and_in_mime(original: EmailMessage) -> None:
    rebuilt = stored_and_back(original)
    esps = ("mandrill", "mailgun", "postmark", "resend", "unisender_go")
    assert observe(rebuilt, esps) == observe(original, esps)


policies = st.sampled_from(
    [
        email.policy.compat32,
        email.policy.default,
        email.policy.SMTP,
        email.policy.SMTPUTF8,
        email.policy.EmailPolicy(max_line_length=30),
        email.policy.compat32.clone(mangle_from_=False),
    ]
)
names = st.sampled_from(
    ["Content-ID", "Content-Disposition", "Content-Description", "Subject", "To", "Date", "X-A", "x-a"]
)


@st.composite
def parts(draw: st.DrawFn) -> Message:
    policy = draw(policies)
    kind = draw(st.sampled_from(["text", "bytes", "parsed", "modern"]))
    part: Message
    if kind == "text":
        part = MIMEText(draw(lines), draw(st.sampled_from(["plain", "html"])), "utf-8", policy=policy)
    elif kind == "bytes":
        part = MIMEBase("application", "x-thing", policy=policy)
        part.set_payload(draw(st.binary(max_size=60) | texts))
    elif kind == "parsed":
        part = email.message_from_bytes(draw(st.binary(max_size=200)), policy=policy)
    else:
        assume(policy is not email.policy.compat32 and isinstance(policy, email.policy.EmailPolicy))
        part = MIMEPart(policy=policy)
        part.set_content(draw(lines), cte=draw(st.sampled_from(["8bit", "base64", "quoted-printable"])))
    for name in draw(st.lists(names, max_size=4)):
        try:
            part[name] = draw(lines)
        except (ValueError, IndexError, TypeError):  # no such header can be set, or Python's parser fails on it
            assume(False)
    return part


def looks(part: Message) -> list[Any]:
    """What Django and Anymail ask a part for."""
    questions = [
        part.items,
        part.get_filename,
        part.get_content_type,
        part.get_content_charset,
        part.get_content_disposition,
        lambda: part.get_payload(decode=True),
        lambda: part.get_content(),  # type: ignore[attr-defined]  # noqa: PLW0108  # only MIMEPart has it
        part.is_multipart,
        lambda: str(part.get_charset()),
        part.as_bytes,
        lambda: part.as_bytes(policy=email.policy.SMTP),
        lambda: part.as_bytes(policy=email.policy.SMTP.clone(cte_type="7bit")),
    ]
    answers: list[Any] = []
    for ask in questions:
        try:
            answers.append(ask())
        except Exception as error:  # the same error is the same answer
            answers.append((type(error), str(error)))
    return answers


@given(parts())
def test_any_part_comes_back_as_it_was_or_is_refused(part: Message) -> None:
    refused = None
    try:
        packed = pack(message(attachments=[part]))
    except MessageNotQueueable as refusal:
        refused = refusal
    if refused:
        assert refused.what.startswith("attachments[0]")
        assert "its header" in refused.why
        return
    rebuilt: Any = unpack(packed.payload, packed.bodies)
    assert type(rebuilt.attachments[0]) is type(part)
    assert repr(rebuilt.attachments[0].policy) == repr(part.policy) or "header_factory" in vars(part.policy)
    assert looks(rebuilt.attachments[0]) == looks(part)


# --- Damage ---

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("$") | st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
words = st.sampled_from(
    [
        "$",
        "tuple",
        "dict",
        "part",
        "message",
        "charset",
        "header",
        "bytes",
        "text",
        "date",
        "absent",
        "MIMEText",
        "default",
    ]
)


def readable_or_payload_error(payload: Any, bodies: Any) -> None:
    try:
        rebuilt = unpack(payload, bodies)
    except PayloadError:
        return
    assert isinstance(rebuilt, EmailMessage)


@given(st.none() | st.text() | st.binary() | anything.map(json.dumps), st.lists(st.binary(max_size=5)))
def test_any_garbage_raises_payload_error_and_nothing_else(payload: Any, bodies: list[bytes]) -> None:
    readable_or_payload_error(payload, bodies)


@settings(max_examples=300)
@given(st.data())
def test_any_damage_to_a_payload_raises_payload_error_and_nothing_else(data: st.DataObject) -> None:
    reasons = [reason for reason in AWKWARD if "1 MB" not in reason]
    packed = pack(AWKWARD[data.draw(st.sampled_from(reasons))]())
    stored = json.loads(packed.payload)
    parent, key = _somewhere(data, stored)
    if data.draw(st.booleans()):
        parent[key] = data.draw(anything | words)
    elif isinstance(parent, dict):
        parent[data.draw(words | st.text(max_size=5))] = parent.pop(key)
    else:
        del parent[key]
    readable_or_payload_error(json.dumps(stored), data.draw(st.just(packed.bodies) | st.just(()) | st.just((None,))))


def _somewhere(data: st.DataObject, stored: Any) -> tuple[Any, Any]:
    """A place in the payload: any container and a key or index in it."""
    parent, key = stored, data.draw(st.sampled_from(sorted(stored)))
    while isinstance(parent[key], (dict, list)) and parent[key] and data.draw(st.integers(0, 3)):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    return parent, key
