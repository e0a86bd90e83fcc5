"""Python's MIME parts (``email.message``) taken apart and put together again, exactly.

Not by way of their wire format: parsing what was written would unfold headers differently, drop what only the object
knows, and change the answers that Anymail gets from it. A part is its class, its policy, its headers as stored, its
payload as stored, and a few small attributes.
"""

from __future__ import annotations

import email.headerregistry
import email.message
import email.mime.application
import email.mime.audio
import email.mime.base
import email.mime.image
import email.mime.message
import email.mime.multipart
import email.mime.nonmultipart
import email.mime.text
import email.policy
from collections.abc import Callable
from email.charset import Charset
from email.header import Header
from email.message import Message
from typing import Any, NoReturn

import django.core.mail.message

from .serialization_classes import overrides, rebuilt_as

_STDLIB: tuple[type[Message], ...] = (
    email.message.Message,
    email.message.MIMEPart,
    email.message.EmailMessage,
    email.mime.base.MIMEBase,
    email.mime.nonmultipart.MIMENonMultipart,
    email.mime.multipart.MIMEMultipart,
    email.mime.application.MIMEApplication,
    email.mime.audio.MIMEAudio,
    email.mime.image.MIMEImage,
    email.mime.message.MIMEMessage,
    email.mime.text.MIMEText,
)
# What Message.message() of Django 5.2 is made of. Django 7.0 has them no more.
_DJANGO: tuple[type[Message], ...] = tuple(
    getattr(django.core.mail.message, name)
    for name in ("SafeMIMEMessage", "SafeMIMEText", "SafeMIMEMultipart")
    if hasattr(django.core.mail.message, name)
)
_CLASSES = _STDLIB + _DJANGO
_CLASS_NAMED = {cls.__name__: cls for cls in _CLASSES}

# The attributes beside policy and headers that make a part's MIME, with the value that every new part has. Python gives
# no other access to a payload as stored: get_payload() decodes what holds surrogates. `encoding` is Django's.
_ATTRIBUTES = {
    "_payload": None,
    "_charset": None,
    "_unixfrom": None,
    "_default_type": "text/plain",
    "preamble": None,
    "epilogue": None,
    "encoding": None,
}

_POLICIES: dict[str, email.policy.Policy] = {
    "compat32": email.policy.compat32,
    "default": email.policy.default,
}
_POLICY_VALUES = {
    "cte_type",
    "linesep",
    "mangle_from_",
    "max_line_length",
    "raise_on_defect",
    "refold_source",
    "utf8",
    "verify_generated_headers",
}

# Values that the legacy API puts into messages and parts, and the attributes that each consists of.
VALUES: dict[type, set[str]] = {
    Charset: {
        "input_charset",
        "header_encoding",
        "body_encoding",
        "output_charset",
        "input_codec",
        "output_codec",
    },
    Header: {"_charset", "_continuation_ws", "_chunks", "_maxlinelen", "_headerlen"},
}

Refuse = Callable[[str], NoReturn]


def part_state(part: Message, refuse: Refuse) -> dict[str, Any]:
    """What a part consists of: class, policy, headers, and the attributes that are not as in a new part.

    Values are as they are in the part, so a payload may hold parts again.

    :param refuse: called with the reason if the part cannot be rebuilt exactly; it must raise.
    """
    cls: type = type(part)
    rebuilt = rebuilt_as(cls, _CLASSES)
    if rebuilt is None:
        refuse(f"no known class can stand for {cls.__qualname__}")
    lost = rebuilt.overridden or overrides(vars(part), rebuilt.base)
    if lost:
        refuse(f"its class {cls.__qualname__} overrides {lost[0]}(), which cannot be stored")
    attributes = vars(part)
    return {
        "class": rebuilt.base.__name__,
        "policy": _policy_state(part.policy, refuse),
        "headers": [_header_state(name, value, part.policy, refuse) for name, value in part.raw_items()],
        **{
            name.lstrip("_"): attributes[name]
            for name, default in _ATTRIBUTES.items()
            if attributes.get(name, default) != default
        },
    }


def part_from(state: dict[str, Any]) -> Message:
    """The part with this state. A damaged state raises what Python happens to raise."""
    cls = _CLASS_NAMED[state["class"]]
    part = cls.__new__(cls)
    policy = _policy_from(*state["policy"])
    Message.__init__(part, policy)
    for name, value, *parsed in state["headers"]:
        part.set_raw(name, policy.header_factory(name, value) if parsed else value)
    for name in _ATTRIBUTES:
        key = name.lstrip("_")
        if key in state:
            setattr(part, name, state[key])
    return part


def _header_state(name: str, value: Any, policy: email.policy.Policy, refuse: Refuse) -> list[Any]:
    """``[name, value]`` as stored, or ``[name, text, 1]`` for what the policy's header factory makes of the text."""
    if not hasattr(value, "fold"):
        return [name, value]
    factory: Any = getattr(policy, "header_factory", None)  # none in a legacy part that was given a modern header
    text = str.__str__(value)
    try:
        again = factory(name, text)
        exact = again == value and again.fold(policy=policy) == value.fold(policy=policy)
    except Exception:  # Python's header parser fails on some texts, in many ways
        exact = False
    if not exact:
        refuse(f"its header {name} cannot be stored exactly")
    return [name, text, 1]


def _policy_state(policy: email.policy.Policy, refuse: Refuse) -> list[Any]:
    """``[name of the policy it was cloned from, what was changed]``."""
    name = next((name for name, base in _POLICIES.items() if type(policy) is type(base)), None)
    if name is None:
        refuse(f"its policy, a {type(policy).__qualname__}, is not one of Python's")
    changed = {}
    for key, value in vars(policy).items():
        if key in _POLICY_VALUES and isinstance(value, (str, int, type(None))):
            changed[key] = value
        elif not _same_factory(value, getattr(_POLICIES[name], key)):
            refuse(f"its policy has a {key} of its own")
    return [name, changed]


def _same_factory(one: Any, other: Any) -> bool:
    """Each EmailPolicy() has a header registry of its own, all of them alike."""
    return one is other or (
        type(one) is type(other) and isinstance(one, email.headerregistry.HeaderRegistry) and vars(one) == vars(other)
    )


def _policy_from(name: str, changed: dict[str, Any]) -> Any:
    if not _POLICY_VALUES.issuperset(changed):
        raise ValueError("a policy with unknown settings")
    return _POLICIES[name].clone(**changed) if changed else _POLICIES[name]


def value_state(value: Charset | Header, refuse: Refuse) -> dict[str, Any]:
    """All that a charset (names and numbers) or a legacy header object (texts with charsets) consists of."""
    if vars(value).keys() != VALUES[type(value)]:
        refuse(f"a {type(value).__name__} with attributes of its own cannot be stored")
    return dict(vars(value))


def value_from(cls: type, state: dict[str, Any]) -> Any:
    """The charset or header object with this state; ValueError if the state is another's."""
    if state.keys() != VALUES[cls]:
        raise ValueError(f"not a {cls.__name__}")
    value: Any = object.__new__(cls)
    vars(value).update(state)
    return value
