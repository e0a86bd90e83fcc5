"""A message as JSON and bytes, and back. Explicit and versioned; never a pickle.

``pack`` gives text for a text column (a JSON column would reorder keys and refuse NUL) and the bytes that the text
refers to. ``unpack`` gives a message with the same Anymail payload and the same MIME, apart from what is generated
anew each time (Message-ID, Date, boundaries). What cannot be kept exactly is refused by name.

The payload, version 1
======================

ASCII JSON::

    {"v": 1, "class": "EmailMultiAlternatives", "fields": {...}, "user": {...}}

``class``
    ``EmailMessage`` or ``EmailMultiAlternatives`` (Django's), ``AnymailMessage`` or ``AnymailMessageMixin``
    (Anymail's). A message of a subclass is rebuilt as the simplest of these that it extends: a subclass may add
    ``__init__``, attributes and methods, and override what runs before sending (``send``, ``attach``...), but one that
    overrides ``message()`` or anything else that makes MIME or recipients is refused.
``fields``
    The attributes that Django and Anymail read (``FIELDS``), where they differ from those of a new message.
    ``from_email`` is always there.
``user``
    Attributes of the user's own, those of a subclass itself included. What cannot be stored is left out, and named in
    one WARNING of the logger ``anymail_retry.queue``. The key is absent if there are none.

Values are JSON's own (a list is a list, an object is a dict with string keys) or an object with the key ``"$"``:

===============================  =======================================================================================
``"$"``                          meaning
===============================  =======================================================================================
bytes, bytearray, memoryview     the bytes with index ``body``
text                             the text of an attachment longer than ``TEXT_IN_PAYLOAD``: the bytes with index
                                 ``body``, as UTF-8 with lone surrogates passed through
pieces                           the strings in ``v`` joined: lone surrogates which JSON would make one character of
tuple                            the list ``v``, as a tuple
dict                             the pairs in ``v``: keys which are not strings, or one which is ``"$"``
float                            ``v``: "nan", "inf" or "-inf"
datetime, date, time             ``v``: ISO 8601; of a time zone the offset
timedelta                        ``v``: days, seconds, microseconds
decimal, uuid                    ``v``: as text
unset, absent                    Anymail's UNSET; an attribute that the message does not have
charset, header                  ``v``: the attributes of an ``email.charset.Charset``, an ``email.header.Header``
attachment, alternative          ``v``: the items of Django's named tuple
message                          a message inside an attachment: ``class``, ``fields`` and ``user`` as above
part                             a part of ``email.message`` or ``email.mime``: ``class``, ``policy`` (Python's policy
                                 and what was changed), ``headers`` (name, value; and 1 where the policy has parsed the
                                 value), and those of its attributes that a new part does not have
===============================  =======================================================================================

Lazy strings are stored as the text that they give in the caller's language. A naive ``send_at`` is stored aware, in
the caller's time zone, by Anymail's rule. Subclasses of str, int, datetime... (``SafeString``, ``TextChoices``) become
the plain type; one whose ``str()`` differs from the plain value's is refused, as nobody could say which was meant.

Never stored: ``connection``, ``anymail_status`` and with it the ESP's response, what this library itself sets.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from email.message import Message
from email.utils import make_msgid
from typing import Any, NoReturn
from uuid import UUID

from anymail.message import AnymailMessage, AnymailMessageMixin
from anymail.utils import UNSET
from django.core.mail import EmailAlternative, EmailAttachment, EmailMessage, EmailMultiAlternatives
from django.core.mail.utils import DNS_NAME
from django.utils.functional import LazyObject, Promise
from django.utils.timezone import is_naive, make_aware

from ..exceptions import MessageNotQueueable, PayloadError
from ..log import get_logger
from . import mime
from .serialization_classes import overrides, rebuilt_as

VERSION = 1

TEXT_IN_PAYLOAD = 8192
"""Characters: text of an attachment up to this long stays in the payload, as a row of its own costs more."""

DJANGO_FIELDS = (
    "subject",
    "body",
    "from_email",
    "to",
    "cc",
    "bcc",
    "reply_to",
    "extra_headers",
    "attachments",
    "alternatives",
    "encoding",
    "content_subtype",
    "mixed_subtype",  # these two: Django 5.2 only
    "alternative_subtype",
)
ANYMAIL_FIELDS = (
    "envelope_sender",
    "metadata",
    "send_at",
    "tags",
    "track_clicks",
    "track_opens",
    "template_id",
    "merge_data",
    "merge_global_data",
    "merge_headers",
    "merge_metadata",
    "esp_extra",
)
FIELDS = frozenset(DJANGO_FIELDS + ANYMAIL_FIELDS)

NEVER_STORED = frozenset(
    {
        "connection",
        "_connection",
        "anymail_status",
        "esp_response",
        # Our own: they belong to this send or to the queue's row.
        "queued_message",
        "retry_history",
        "send_error",
        "priority",
        "not_before",
        "expires_at",
        "on_ambiguous",
        "idempotency_key",
    }
)

_NOT_THE_USERS = FIELDS | NEVER_STORED

logger = get_logger("queue")

# One that another extends stands before it: see rebuilt_as().
_CLASSES = (EmailMessage, EmailMultiAlternatives, AnymailMessageMixin, AnymailMessage)
_CLASS_NAMED = {cls.__name__: cls for cls in _CLASSES}

# Methods that have done their work when a message reaches its back end.
_BEFORE_SENDING = {
    "attach",
    "attach_alternative",
    "attach_file",
    "attach_inline_image",
    "attach_inline_image_file",
    "body_contains",
    "get_connection",
    "send",
}

_ABSENT: Any = type("ABSENT", (), {})  # of an attribute; like UNSET a class, so that it is itself when copied
_NO_DEFAULT = object()

_MAX_DEPTH = 64  # deeper than any message; a list which holds itself ends here
_MAX_INT_BITS = 2048  # 617 digits: Python may refuse to read more than 640

_BETWEEN_SURROGATES = re.compile("(?<=[\ud800-\udbff])(?=[\udc00-\udfff])")

# Types with a plain form: tag, form, and back. A datetime is a date too, so it stands first.
_TAGGED: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    datetime: ("datetime", datetime.isoformat, datetime.fromisoformat),
    date: ("date", date.isoformat, date.fromisoformat),
    time: ("time", time.isoformat, time.fromisoformat),
    timedelta: ("timedelta", lambda t: [t.days, t.seconds, t.microseconds], lambda v: timedelta(*v)),
    Decimal: ("decimal", Decimal.__str__, Decimal),
    UUID: ("uuid", UUID.__str__, UUID),
}
_PLAIN: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
_NAMED_TUPLES: dict[type, str] = {EmailAttachment: "attachment", EmailAlternative: "alternative"}


@dataclass(frozen=True)
class Packed:
    """A message as it is stored.

    :param payload: ASCII JSON; the docstring of this module has its schema.
    :param bodies: what the payload refers to by index: all bytes, and long texts of attachments.
    """

    payload: str
    bodies: tuple[bytes, ...]


def pack(message: EmailMessage, *, fix_message_id: bool = False) -> Packed:
    """A message in the form in which it is stored. The message itself stays as it is.

    :param fix_message_id: give the stored copy a Message-ID if it has none, for back ends that send MIME: however
        often it is sent, receivers can then tell a second copy from a second message.
    :raises MessageNotQueueable: something in it cannot be kept exactly; the error says what.
    """
    packer = _Packer()
    payload = {"v": VERSION, **packer.message(message, fix_message_id=fix_message_id)}
    return Packed(json.dumps(payload, separators=(",", ":")), tuple(packer.bodies))


def unpack(payload: str, bodies: Sequence[bytes]) -> EmailMessage:
    """The message that :func:`pack` was given. Nothing that the payload names is imported or run.

    :raises PayloadError: it was not written by :func:`pack`, or by that of a newer release, or a body is missing.
    """
    unpacker = _Unpacker(bodies)
    try:
        stored = json.loads(payload, object_hook=unpacker.restore)
        version = stored.get("v") if type(stored) is dict else None
        if type(version) is not int:
            raise PayloadError("This is not a stored message: it has no version")
        if version != VERSION:
            raise PayloadError(
                f"This message was stored in version {version} of the format; this release reads {VERSION}"
            )
        return unpacker.message(stored)
    except PayloadError:
        raise
    except json.JSONDecodeError as error:
        raise PayloadError(f"The stored message is not JSON ({error})") from error
    except Exception as error:
        # Damaged content makes the constructors of its values raise anything; their texts would quote the content.
        raise PayloadError(f"The stored message cannot be decoded ({type(error).__name__})") from error


@functools.lru_cache(maxsize=8)
def _defaults(cls: type) -> dict[str, Any]:
    """The fields as a new message has them: those are not stored. The sender always is: its default is a setting."""
    new = cls()
    return {
        name: _NO_DEFAULT if name == "from_email" else getattr(new, name, _ABSENT)
        for name in DJANGO_FIELDS + ANYMAIL_FIELDS
    }


def _with_message_id(headers: Any) -> Any:
    """The headers, with a Message-ID as Django makes it if there is none: before all others, its place in Django."""
    if not isinstance(headers, Mapping) or any(str(name).lower() == "message-id" for name in headers):
        return headers
    return {"Message-ID": make_msgid(domain=str(DNS_NAME)), **headers}


def _aware(value: Any) -> Any:
    """``send_at`` by the rule of Anymail's ``aware_datetime``, as far as that depends on the active time zone."""
    if not isinstance(value, date):
        return value  # a timestamp or an ESP's own notation
    moment = value if isinstance(value, datetime) else datetime.combine(value, time())
    if is_naive(moment):
        moment = make_aware(moment)
    # The offset instead of the zone: the same moment, whatever class and zone data the caller has.
    return datetime.fromisoformat(datetime.isoformat(moment))


class _Packer:
    """One message on its way into JSON: its bodies so far, and the place reached, to name what is refused."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.place: list[str | int | tuple[object]] = []  # of a name, an index or a (key,) each

    def refuse(self, why: str) -> NoReturn:
        path = "".join(
            f".{step}" if isinstance(step, str) else f"[{step}]" if isinstance(step, int) else f"[{step[0]!s:.60}]"
            for step in self.place
        )
        raise MessageNotQueueable(path.removeprefix(".") or "message", why)

    # --- Messages ---

    def message(self, message: EmailMessage, *, fix_message_id: bool = False) -> dict[str, Any]:
        cls: type = type(message)
        rebuilt = rebuilt_as(cls, _CLASSES)
        if rebuilt is None:
            self.refuse(f"a {cls.__qualname__} is not one of Django's messages")
        for name in rebuilt.overridden + overrides(vars(message), rebuilt.base):
            if name not in _BEFORE_SENDING:
                self.place.append(f"{name}()")
                self.refuse(f"{cls.__qualname__} overrides it, and code cannot be stored")
        fields = {}
        for name, default in _defaults(rebuilt.base).items():
            value = getattr(message, name, _ABSENT)
            if name == "extra_headers" and fix_message_id:
                value = _with_message_id(value)
            if value is not default and (type(value) is not type(default) or value != default):
                fields[name] = self.field(name, value)
        packed: dict[str, Any] = {"class": rebuilt.base.__name__, "fields": fields}
        if names := [name for name in (*rebuilt.added, *vars(message)) if name not in _NOT_THE_USERS]:
            packed["user"] = self.user_attributes(message, dict.fromkeys(names), rebuilt.base)
        return packed

    def field(self, name: str, value: Any) -> Any:
        self.place.append(name)
        if name == "attachments" and isinstance(value, (list, tuple)):
            packed = self.sequence(value, self.attachment)
        elif name == "alternatives" and isinstance(value, (list, tuple)):
            packed = self.sequence(value, self.alternative)
        elif name == "send_at":
            packed = self.value(_aware(value))
        elif name == "extra_headers" and isinstance(value, Mapping) and type(value) not in (dict, OrderedDict):
            self.refuse(f"a {type(value).__qualname__} finds headers in its own way: use a dict")
        else:
            packed = self.value(value)
        self.place.pop()
        return packed

    def user_attributes(self, message: EmailMessage, names: Iterable[str], base: type) -> dict[str, Any]:
        kept, lost = {}, []
        bodies, place = len(self.bodies), len(self.place)
        for name in names:
            try:
                if hasattr(base, name):
                    self.refuse(f"{base.__name__} has that name for something else")
                kept[name] = self.value(getattr(message, name))
            except Exception:  # refused, or raised by a lazy value of the user's own
                del self.bodies[bodies:], self.place[place:]
                lost.append(name)
            bodies = len(self.bodies)
        if lost:
            logger.warning(
                "Attributes of a queued %s that cannot be stored are left out: %s",
                type(message).__qualname__,
                ", ".join(lost),
            )
        return kept

    # --- What a message holds ---

    def attachment(self, item: Any) -> Any:
        return self.entry(item, self.content)

    def alternative(self, item: Any) -> Any:
        return self.entry(item, self.embedded)

    def entry(self, item: Any, pack_item: Callable[[Any], Any]) -> Any:
        if not isinstance(item, (list, tuple)):
            return self.embedded(item)
        packed = self.sequence(item, pack_item)
        if isinstance(item, list):
            return packed
        return {"$": _NAMED_TUPLES.get(type(item), "tuple"), "v": packed}

    def content(self, value: Any) -> Any:
        """Of an attachment: long text goes where bytes go."""
        if isinstance(value, str) and len(value) > TEXT_IN_PAYLOAD:
            return {"$": "text", "body": self.body(value.encode("utf-8", "surrogatepass"))}
        return self.embedded(value)

    def embedded(self, value: Any) -> Any:
        if isinstance(value, Message):
            return self.part(value)
        if isinstance(value, EmailMessage):
            return {"$": "message", **self.message(value)}
        return self.value(value)

    def part(self, part: Message) -> dict[str, Any]:
        packed: dict[str, Any] = {"$": "part"}
        for name, value in mime.part_state(part, self.refuse).items():
            self.place.append(name)
            if name != "payload":
                packed[name] = self.value(value)
            elif isinstance(value, list):
                packed[name] = self.sequence(value, self.content)
            else:
                packed[name] = self.content(value)
            self.place.pop()
        return packed

    def body(self, content: bytes) -> int:
        self.bodies.append(content)
        return len(self.bodies) - 1

    # --- Values ---

    def value(self, value: Any) -> Any:
        kind = type(value)
        if kind is str:
            return self.text(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            if value.bit_length() > _MAX_INT_BITS:
                self.refuse("an integer of more than 600 digits cannot be stored")
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
        if isinstance(value, list):
            return self.sequence(value, self.value)
        if isinstance(value, tuple):
            self.like(value, tuple(value))
            return {"$": "tuple", "v": self.sequence(value, self.value)}
        if isinstance(value, Mapping):
            return self.mapping(value)
        if isinstance(value, Promise) or (isinstance(value, LazyObject) and isinstance(value, str)):
            return self.value(str(value))
        if isinstance(value, (bytes, bytearray, memoryview)):
            name = next(name for name, cls in _BYTES.items() if isinstance(value, cls))
            return {"$": name, "body": self.body(bytes(value))}
        if value is UNSET or value is _ABSENT:
            return {"$": "unset" if value is UNSET else "absent"}
        if kind in mime.VALUES:
            return {"$": kind.__name__.lower(), "v": self.mapping(mime.value_state(value, self.refuse))}
        return self.scalar(value)

    def scalar(self, value: Any) -> Any:
        """A value of the types that have a plain form, or of a subclass of theirs."""
        kind = type(value)
        for cls, plain in _PLAIN.items():
            if issubclass(kind, cls):
                self.like(value, plain(value))
                return self.value(plain(value))
        for cls, (tag, form, restore) in _TAGGED.items():
            if issubclass(kind, cls):
                if kind is not cls:
                    self.like(value, restore(form(value)))
                return {"$": tag, "v": form(value)}
        return self.refuse(f"a {kind.__qualname__} cannot be stored")

    def like(self, value: Any, plain: Any) -> None:
        if str(value) != str(plain):
            kind = type(value).__qualname__
            self.refuse(f"str() of this {kind} differs from its plain value's: say which is meant")

    def text(self, text: str) -> Any:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                pieces = _BETWEEN_SURROGATES.split(text)
                if len(pieces) > 1:
                    return {"$": "pieces", "v": pieces}
        return text

    def sequence(self, items: Sequence[Any], pack_item: Callable[[Any], Any]) -> list[Any]:
        if len(self.place) > _MAX_DEPTH:
            self.refuse("it is nested too deeply, or holds itself")
        packed = []
        for index, item in enumerate(items):
            self.place.append(index)
            packed.append(pack_item(item))
            self.place.pop()
        return packed

    def mapping(self, mapping: Mapping[Any, Any]) -> dict[str, Any]:
        if len(self.place) > _MAX_DEPTH:
            self.refuse("it is nested too deeply, or holds itself")
        pairs = []
        for key, item in mapping.items():
            self.place.append((key,))
            pairs.append((self.value(key), self.value(item)))
            self.place.pop()
        if all(type(key) is str and key != "$" for key, _ in pairs):
            packed = dict(pairs)
            if len(packed) < len(pairs):
                self.refuse("two of its keys have the same text")
            return packed
        return {"$": "dict", "v": pairs}


class _Unpacker:
    """Makes the values again, each as soon as its JSON object is read, the innermost first."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        self.bodies = bodies

    def restore(self, node: dict[str, Any]) -> Any:
        if "$" not in node:
            return node
        tag = node["$"]
        if tag in _RESTORE:
            return _RESTORE[tag](node["v"])
        if tag in _BYTES:
            return _BYTES[tag](self.body(node["body"]))
        if tag == "text":
            return self.body(node["body"]).decode("utf-8", "surrogatepass")
        if tag == "part":
            return mime.part_from(node)
        if tag == "message":
            return self.message(node)
        if tag in _MARKS:
            return _MARKS[tag]
        raise PayloadError("The stored message holds a value of unknown type")

    def body(self, index: Any) -> bytes:
        if type(index) is not int:
            raise PayloadError("The stored message refers to a body by something else than its number")
        if not 0 <= index < len(self.bodies):
            raise PayloadError(f"Body {index} of the stored message is missing; it has {len(self.bodies)}")
        body = self.bodies[index]
        if not isinstance(body, (bytes, bytearray, memoryview)):
            raise PayloadError(f"Body {index} of the stored message is not bytes")
        return bytes(body)

    def message(self, stored: dict[str, Any]) -> EmailMessage:
        cls = _CLASS_NAMED[stored["class"]]
        message = cls()
        fields = stored["fields"]
        if not FIELDS.issuperset(fields) or "from_email" not in fields:
            raise PayloadError("The stored message has not the fields of this version")
        for name, value in fields.items():
            if value is not _ABSENT:
                setattr(message, name, value)
            elif hasattr(message, name):
                delattr(message, name)
        for name, value in stored.get("user", {}).items():
            if hasattr(cls, name) or name in _NOT_THE_USERS:
                raise PayloadError(f"The user's attribute {name!r:.60} would replace one of the message's own")
            setattr(message, name, value)
        return message


_BYTES: dict[str, type[Any]] = {"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}
_MARKS = {"unset": UNSET, "absent": _ABSENT}
_RESTORE: dict[str, Callable[[Any], Any]] = {
    "pieces": "".join,
    "tuple": tuple,
    "dict": dict,
    "float": float,
    **{tag: restore for tag, _, restore in _TAGGED.values()},
    **{cls.__name__.lower(): functools.partial(mime.value_from, cls) for cls in mime.VALUES},
    **{tag: cls._make for cls, tag in _NAMED_TUPLES.items()},  # type: ignore[attr-defined]
}
