"""Varied mail, as a site sends it: one function per kind, each with a marker to be found by in the ESP's ledger."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle
from typing import Any

from anymail.exceptions import AnymailUnsupportedFeature
from anymail.message import AnymailMessage, attach_inline_image
from demo_site import mails
from django.core.mail import EmailMessage, EmailMultiAlternatives
from django.utils import translation

from anymail_retry.testing.ledger import MARKER_HEADER


@dataclass(frozen=True)
class Item:
    """One message to be sent."""

    marker: str
    kind: str
    message: EmailMessage
    #: The language of the request that sends it: what is lazy is translated at that moment.
    language: str
    #: The request body that plain Anymail would send.
    body: Any

    def in_its_language(self) -> AbstractContextManager[None]:
        return translation.override(self.language)


def text(n: int) -> EmailMessage:
    return EmailMessage(f"Your order {n}", f"Order {n} is on its way.\n", to=[f"reader{n}@example.org"])


def html(n: int) -> EmailMessage:
    return mails.order_confirmation("Ada Lovelace", f"ada{n}@example.org", "Middlemarch")


def attachments(n: int) -> EmailMessage:
    message = EmailMessage(
        f"Invoice {n}", "See the attached files.", to=[f"books{n}@example.org"], cc=["accounts@example.com"]
    )
    message.attach(f"invoice-{n}.pdf", b"%PDF-1.4\n" + bytes(range(256)) * 16, "application/pdf")
    message.attach("lines.csv", f"title;price\nMiddlemarch;{n}.50\n", "text/csv")
    message.attach("raw.bin", b"\x00\x01\x02 of no particular kind")
    return message


def inline_image(n: int) -> EmailMessage:
    message = EmailMultiAlternatives(f"New this week ({n})", "Our window.", to=[f"window{n}@example.org"])
    cid = attach_inline_image(message, PNG, filename="window.png", subtype="png")
    message.attach_alternative(f'<p>Our window:</p><img alt="" src="cid:{cid}">', "text/html")
    return message


def template(n: int) -> EmailMessage:
    readers = [f"reader{n}+{i}@example.net" for i in range(3)]
    return AnymailMessage(
        to=[f"Reader {i} <{reader}>" for i, reader in enumerate(readers)],
        template_id="newsletter",
        merge_data={reader: {"first_name": f"Reader {i}", "points": i * n} for i, reader in enumerate(readers)},
        merge_global_data={"shop": mails.SITE_NAME},
        tags=["newsletter"],
    )


def non_ascii(n: int) -> EmailMessage:
    message = EmailMessage(
        f"Ваш заказ №{n} — 注文 🎉",
        "Здравствуйте!\nご注文ありがとうございます。\n謝謝 🙏\n",
        to=[f"Цветаева Марина <marina{n}@example.org>"],
        reply_to=['"Müller & Söhne, Bücher" <verlag@bücher.example.com>'],
    )
    message.attach("счёт-фактура.txt", "Итого: 42 ₽", "text/plain")
    return message


def lazy_translation(n: int) -> EmailMessage:
    return mails.password_reset(f"forgetful{n}@example.org", f"https://shop.example.com/reset/{n}/")


def metadata(n: int) -> EmailMessage:
    return AnymailMessage(
        subject=f"How was order {n}?",
        body="Please tell us.",
        to=[f"critic{n}@example.org"],
        metadata={"order": n, "campaign": "reviews"},
        tags=["review"],
        headers={"X-Shop": "corner"},
    )


KINDS: dict[str, Callable[[int], EmailMessage]] = {
    "text": text,
    "HTML": html,
    "attachments": attachments,
    "inline image": inline_image,
    "template, merge data": template,
    "non-ASCII": non_ascii,
    "lazy translation": lazy_translation,
    "metadata": metadata,
}
LANGUAGES = ("de", "ja", "el")


def items(esp: str, phase: str, count: int) -> Iterator[Item]:
    """So many messages of all kinds that this ESP has; their markers are ``<phase>-<number>``."""
    backend = import_module(f"anymail.backends.{esp}").EmailBackend(api_key="test-api-key")
    languages = cycle(LANGUAGES)
    kinds = cycle(KINDS.items())
    number = 1
    while number <= count:
        kind, make = next(kinds)
        language = next(languages)
        marker = f"{phase}-{number:03}"
        with translation.override(language):
            message = make(number)
            message.extra_headers[MARKER_HEADER] = marker
            try:
                payload = backend.build_message_payload(message, backend.send_defaults)
            except AnymailUnsupportedFeature:
                continue
            body = json.loads(payload.serialize_data())
        yield Item(marker, kind, message, language, body)
        number += 1


def _png(width: int, height: int, color: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = (b"\x00" + color * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


#: A picture of 32 by 32 pixels.
PNG = _png(32, 32, b"\x2e\x6d\xa4")
