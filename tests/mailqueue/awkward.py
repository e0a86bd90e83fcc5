"""Messages which a queue is likely to spoil, each under the reason why; and what a queue must refuse, by what name.

Both are tables of functions: a message is made where it is used, in the language and time zone that are active there.
"""

from __future__ import annotations

import email
import email.policy
import enum
import io
from collections import OrderedDict
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from email.charset import QP, Charset
from email.header import Header
from email.message import EmailMessage as PythonMessage
from email.message import Message, MIMEPart
from email.mime.application import MIMEApplication
from email.mime.audio import MIMEAudio
from email.mime.base import MIMEBase
from email.mime.image import MIMEImage
from email.mime.message import MIMEMessage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from typing import TYPE_CHECKING, Any
from uuid import UUID
from zoneinfo import ZoneInfo

import django
from anymail.inbound import AnymailInboundMessage
from anymail.message import AnymailMessage, AnymailMessageMixin, attach_inline_image
from anymail.utils import UNSET
from django.core.mail import EmailAlternative, EmailAttachment, EmailMessage, EmailMultiAlternatives
from django.db.models import TextChoices
from django.utils.functional import SimpleLazyObject
from django.utils.safestring import SafeString, mark_safe
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy, ngettext_lazy, override
from requests.structures import CaseInsensitiveDict

if TYPE_CHECKING:
    from collections.abc import Callable

DJANGO_6 = django.VERSION >= (6, 0)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
HEADERS = b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\nFrom: x@example.com\r\nX-Long: " + b"a b " * 40 + b"\r\n"
RAW = HEADERS + b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\nh\xc3\xa9\r\n"
DIGEST = (
    b"From x@example.com Sat Jan  1 00:00:00 2033\nContent-Type: multipart/digest; boundary=b\n\n--b\n\n"
    + RAW
    + b"\n--b--\n"
)
BROKEN = HEADERS + b"\r\nh\xe9llo, in no charset\r\n"


def message(cls: type[EmailMessage] = EmailMessage, **attributes: Any) -> EmailMessage:
    """A message with these attributes; Django's, Anymail's or the user's own."""
    made = cls("Subject", "Body", "from@example.com", ["to@example.com"])
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def html(**attributes: Any) -> EmailMultiAlternatives:
    made = message(EmailMultiAlternatives, **attributes)
    assert isinstance(made, EmailMultiAlternatives)
    made.attach_alternative("<p>Body</p>", "text/html")
    return made


def attached(*args: Any, **attributes: Any) -> EmailMessage:
    """A message to which this was attached with ``attach()``."""
    made = message(**attributes)
    made.attach(*args)
    return made


def holding(*attachments: Any, **attributes: Any) -> EmailMessage:
    """A message whose list of attachments holds these, without ``attach()`` having seen them."""
    return message(attachments=list(attachments), **attributes)


def headed(part: Any, **headers: Any) -> Any:
    for name, value in headers.items():
        part[name.replace("_", "-")] = value
    return part


def inline(**kwargs: Any) -> EmailMessage:
    made = html()
    attach_inline_image(made, PNG, **kwargs)
    return made


def everything() -> EmailMessage:
    made = inline(filename="é.png")
    made.attach("a.pdf", PNG, "application/pdf")
    made.attach("b.csv", "é", "text/csv")
    made.attach("m.eml", html(), "message/rfc822")
    return made


def modern_part(content: Any, policy: Any = email.policy.default, **kwargs: Any) -> MIMEPart:
    part = MIMEPart(policy=policy)
    part.set_content(content, **kwargs)
    return part


def legacy_part(filename: Any = "a.bin", **params: Any) -> MIMEBase:
    part = MIMEBase("application", "x-thing", **params)
    part.set_payload(PNG)
    email.encoders.encode_base64(part)
    part.add_header("Content-Disposition", "attachment", filename=filename)
    return part


def multipart() -> MIMEMultipart:
    part = MIMEMultipart("related", None, [MIMEText("<p>é</p>", "html", "utf-8"), MIMEImage(PNG, "png")])
    part.preamble = "Not for humans"
    part.epilogue = "The end"
    return part


def eight_bit() -> MIMEPart:
    part = MIMEPart()
    part.set_content("é è\n", cte="8bit")
    return part


def quoted_printable() -> Charset:
    charset = Charset("utf-8")
    charset.body_encoding = QP
    return charset


class Colour(TextChoices):
    RED = "red", "Red"


class Priority(str, enum.Enum):
    LOW = "low"


class Frozen(datetime):
    """As test tools replace datetime."""


class Moment(datetime):
    """As libraries replace datetime: str() has a notation of its own."""

    def __str__(self) -> str:
        return self.strftime("%H:%M")


class Templated(EmailMultiAlternatives):
    """As sites write them: constants, a constructor of its own, rendering in send(), a body that is computed."""

    content_subtype = "html"
    tags = ("from the class",)
    category = "invoice"

    def __init__(self, order: int) -> None:
        super().__init__("Order", from_email="from@example.com", to=["to@example.com"])
        self.order = order

    @property
    def body(self) -> str:
        return f"<p>Order {self.order}</p>"

    @body.setter
    def body(self, value: str) -> None:
        pass

    @property
    def url(self) -> str:
        return f"https://example.com/{self.order}"

    def render(self) -> None:
        self.subject = "Rendered"

    def send(self, *args: Any, **kwargs: Any) -> int:
        self.render()
        return super().send(*args, **kwargs)


class Quiet:
    def message(self) -> Any: ...


class Overruled(EmailMultiAlternatives, Quiet):
    """A mixin listed last overrides nothing."""


class Both(AnymailMessageMixin, EmailMultiAlternatives):
    """Anymail's documented way to have both."""


AWKWARD: dict[str, Callable[[], EmailMessage]] = {
    # Text
    "nothing but a recipient": lambda: EmailMessage(to=["to@example.com"]),
    "empty body with html": lambda: html(body=""),
    "NUL in text": lambda: html(subject="a\0b", body="\0", metadata={"a\0": "\0"}),
    "lone surrogate in the body": lambda: message(body="a\ud83db\udc80"),
    "two lone surrogates that JSON would join": lambda: message(
        body="\ud83d\ude00", metadata={"\ud83d\ude00": "\ud83d\ude00"}
    ),
    "surrogateescaped bytes": lambda: message(body=b"h\xe9llo".decode("ascii", "surrogateescape")),
    "astral characters and combining marks": lambda: message(subject="😀 e\u0301", body="😀\u202e\ufeff", tags=["😀"]),
    "line ends of every kind": lambda: message(body="a\r\nb\rc\nd\u2028e\x85f\x0bg\n\n"),
    "no line end at the end": lambda: html(body="a"),
    "1 MB of text and html": lambda: html(
        body="Zeile ä\n" * 120_000, alternatives=[EmailAlternative("<p>ж</p>" * 130_000, "text/html")]
    ),
    "a line of 100 KB": lambda: message(body="x" * 100_000),
    "lines which start with From and dots": lambda: message(body="From me\n.\n..\n>From you\n"),
    "subject of 2000 characters": lambda: message(subject="Wort ü " * 280),
    "subject that looks encoded": lambda: message(subject="=?utf-8?q?=C3=A9?= plain"),
    "safe strings": lambda: message(
        subject=mark_safe("<b>"), body=SafeString("&lt;"), metadata={SafeString("k"): SafeString("v")}
    ),
    "body as bytes": lambda: message(body="h\u00e9llo".encode()),
    "subject that is no string": lambda: message(subject=42),
    "subject None": lambda: message(subject=None),
    # Lazy values
    "lazy subject, body and html": lambda: message(
        EmailMultiAlternatives,
        subject=gettext_lazy("Monday"),
        body=gettext_lazy("January"),
        alternatives=[EmailAlternative(gettext_lazy("March"), "text/html")],
    ),
    "lazy addresses": lambda: message(
        from_email=format_lazy("{} <from@example.com>", gettext_lazy("Monday")),
        to=[format_lazy("{} <to@example.com>", gettext_lazy("Tuesday"))],
        reply_to=[format_lazy("{} <re@example.com>", gettext_lazy("March"))],
    ),
    "lazy headers": lambda: message(extra_headers={"X-Day": gettext_lazy("Monday")}),
    "lazy values inside Anymail's attributes": lambda: message(
        metadata={"day": gettext_lazy("Monday"), "n": {"deep": format_lazy("{}!", gettext_lazy("March"))}},
        merge_data={"to@example.com": {"day": gettext_lazy("Tuesday")}},
        merge_global_data={"month": gettext_lazy("January")},
        tags=[gettext_lazy("Monday"), "plain"],
        esp_extra={"x": {"y": gettext_lazy("Friday")}},
        template_id=gettext_lazy("Sunday"),
    ),
    "lazy attachment": lambda: holding((gettext_lazy("Monday"), gettext_lazy("March"), "text/plain")),
    "lazy plural": lambda: message(subject=ngettext_lazy("%(num)d hour", "%(num)d hours", 2) % {"num": 2}),
    "lazy object around a string": lambda: message(subject=SimpleLazyObject(lambda: "Subject"), body="x"),
    # Addresses
    "display names with commas and quotes": lambda: message(
        from_email='"Doe, \\"J\\"" <from@example.com>', to=['"To, O" <to@example.com>', "b@example.com"]
    ),
    "several addresses in one string": lambda: message(to=['"A, B" <a@example.com>, c@example.com']),
    "non-ASCII names": lambda: message(from_email="Jürgen <from@example.com>", cc=["Кто <cc@example.com>"]),
    "internationalised domain": lambda: message(to=["to@bücher.example"], reply_to=["re@xn--bcher-kva.example"]),
    "non-ASCII local part": lambda: message(to=["jürgen@example.com"]),
    "only bcc": lambda: message(to=[], bcc=["bcc@example.com"]),
    "tuples for lists of addresses": lambda: message(
        to=("to@example.com",), cc=(), bcc=(), reply_to=("re@example.com",)
    ),
    "an empty address": lambda: message(to=["to@example.com", ""], cc=[""]),
    "200 recipients": lambda: message(to=[f"u{n}@example.com" for n in range(200)]),
    "several senders": lambda: message(from_email=["a@example.com", "b@example.com"]),
    "sender None": lambda: message(from_email=None),
    "a line end in an address": lambda: message(to=["to@example.com\nBcc: x@example.com"]),
    # Headers
    "headers in their order": lambda: message(
        extra_headers={"X-Z": "1", "X-A": "2", "List-Unsubscribe": "<https://example.com/u>", "X-M": "ü"}
    ),
    "headers that replace addresses": lambda: message(
        extra_headers={"From": "Other <other@example.com>", "Reply-To": "re@example.com", "Cc": "cc@example.com"}
    ),
    "own Message-ID and Date": lambda: message(
        extra_headers={"message-id": "<mine@example.com>", "DATE": "Tue, 02 Jan 2001 03:04:05 -0000"}
    ),
    "header values that are not strings": lambda: message(extra_headers={"X-N": 5, "X-None": None, "X-T": True}),
    "ordered headers": lambda: message(extra_headers=OrderedDict([("X-B", "b"), ("X-A", "a")])),
    "a header of 5000 characters": lambda: message(extra_headers={"X-Long": "word " * 1000}),
    "a legacy Header object as header": lambda: message(extra_headers={"X-H": Header("Grüße", "iso-8859-1")}),
    # Kinds of message
    "html as the body": lambda: message(content_subtype="html", body="<p>é</p>"),
    "markdown as the body": lambda: message(content_subtype="markdown"),
    "encoding iso-8859-1": lambda: html(encoding="iso-8859-1", body="é"),
    "encoding that cannot hold the text": lambda: message(encoding="ascii", body="é"),
    "encoding as a Charset": lambda: message(encoding=quoted_printable(), body="é " * 100),
    "html first, then calendar": lambda: message(
        EmailMultiAlternatives,
        alternatives=[
            EmailAlternative("<p>x</p>", "text/html"),
            EmailAlternative("BEGIN:VCALENDAR\r\nEND:VCALENDAR\r\n", "text/calendar; method=REQUEST"),
        ],
    ),
    "alternatives of other types": lambda: message(
        EmailMultiAlternatives,
        alternatives=[EmailAlternative(b'{"a": 1}', "application/json"), EmailAlternative("<amp>", "text/x-amp-html")],
    ),
    "text alternative as bytes": lambda: message(
        EmailMultiAlternatives, alternatives=[EmailAlternative("<p>é</p>".encode(), "text/html")]
    ),
    "alternative as a plain tuple": lambda: message(EmailMultiAlternatives, alternatives=[("<p>x</p>", "text/html")]),
    "alternatives on a class that has none": lambda: message(alternatives=[("<p>x</p>", "text/html")]),
    "alternatives and every kind of attachment": everything,
    "AnymailMessage with nothing set": lambda: message(AnymailMessage),
    "AnymailMessageMixin with alternatives": lambda: message(
        Both, tags=["a"], alternatives=[EmailAlternative("<p>x</p>", "text/html")]
    ),
    "a mixin after Django's class": lambda: message(Overruled),
    "a site's own subclass": lambda: Templated(7),
    "related instead of mixed": lambda: html(
        mixed_subtype="related", attachments=[EmailAttachment("a.txt", "x", "text/plain")]
    ),
    "an attribute deleted": lambda: _without(message(AnymailMessage), "tags", "cc"),
    # Anymail
    "every Anymail attribute": lambda: message(
        AnymailMessage,
        envelope_sender="bounce@example.com",
        metadata={"order": 7, "z": "1", "a": "2"},
        send_at=datetime(2033, 7, 1, 9, 30, 15, 250_000, tzinfo=timezone.utc),
        tags=["b", "a"],
        track_clicks=False,
        track_opens=True,
        template_id="welcome",
        merge_data={"to@example.com": {"name": "Tö", "n": [1, 2]}, "x@example.com": {}},
        merge_global_data={"site": "S"},
        merge_headers={"to@example.com": {"List-Unsubscribe": "<https://example.com/1>"}},
        merge_metadata={"to@example.com": {"id": 1}},
        esp_extra={"z": [1, {"y": None}], "a": 1.5},
    ),
    "attributes None, empty and UNSET": lambda: message(
        metadata=None, tags=[], merge_data={}, template_id="", esp_extra=UNSET, track_opens=None, envelope_sender=None
    ),
    "batch send by an empty merge_data": lambda: message(to=["a@example.com", "b@example.com"], merge_data={}),
    "naive send_at": lambda: message(send_at=datetime(2033, 7, 1, 9, 0)),  # noqa: DTZ001  # the case itself
    "naive send_at in the hour that comes twice": lambda: message(
        send_at=datetime(2033, 10, 30, 3, 30, fold=1)  # noqa: DTZ001  # the case itself
    ),
    "send_at with a zone": lambda: message(send_at=datetime(2033, 1, 1, tzinfo=ZoneInfo("America/New_York"))),
    "send_at as a date": lambda: message(send_at=date(2033, 7, 1)),
    "send_at as a timestamp": lambda: message(send_at=2_000_000_000),
    "send_at as a float timestamp": lambda: message(send_at=2_000_000_000.25),
    "send_at in the ESP's own words": lambda: message(send_at="tomorrow"),
    "dates, decimals and identifiers as values": lambda: message(
        metadata={
            "decimal": Decimal("-1.10E+5"),
            "nan": Decimal("NaN"),
            "date": date(2033, 1, 2),
            "time": time(1, 2, 3, 4),
            "when": datetime(2033, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=5, minutes=45))),
            "naive": datetime(2033, 1, 2),  # noqa: DTZ001  # kept naive: only send_at has Anymail's rule
            "delta": timedelta(days=-1, microseconds=1),
            "uuid": UUID("12345678123456781234567812345678"),
        },
    ),
    "a subclass of datetime": lambda: message(send_at=Frozen(2033, 1, 2, tzinfo=timezone.utc)),
    "a subclass of datetime with another str()": lambda: message(send_at=Moment(2033, 1, 2, tzinfo=timezone.utc)),
    "numbers of every kind": lambda: message(
        metadata={"int": 2**70, "float": 0.1, "neg": -0.0, "inf": float("inf"), "nan": float("nan"), "bool": True}
    ),
    "keys that are not strings": lambda: message(metadata={1: "int", None: "none", 1.5: "float", False: "bool"}),
    "keys that JSON cannot have": lambda: message(esp_extra={"x": {(1, 2): "tuple", date(2033, 1, 2): "date"}}),
    "a key that our own format uses": lambda: message(metadata={"$": "tuple", "v": [1]}, esp_extra={"$": {"$": 1}}),
    "tuples inside values": lambda: message(esp_extra={"a": (1, [2, (3,)])}, tags=("a", "b")),
    "bytes inside values": lambda: message(esp_extra={"b": b"\0\xff", "ba": bytearray(b"x")}),
    "text choices as values": lambda: message(tags=[Colour.RED], metadata={"colour": Colour.RED}),
    # Attachments by name and content
    "bytes": lambda: attached("a.pdf", b"%PDF\0\xff", "application/pdf"),
    "no bytes at all": lambda: attached("empty.bin", b"", "application/octet-stream"),
    "text": lambda: attached("b.csv", "id,name\n1,Ä\n", "text/csv"),
    "text without a line end": lambda: attached("b.txt", "x", "text/plain"),
    "text longer than stays in the payload": lambda: attached("b.csv", "id,ж\n" * 5000, "text/csv"),
    "long text with lone surrogates": lambda: attached("b.csv", "id,\ud83d\ude00\n" * 5000, "text/csv"),
    "text with another type": lambda: attached("b.json", '{"é": 1}', "application/json"),
    "bytes of a text type": lambda: holding(("b.txt", "é".encode(), "text/plain")),
    "bytes of a text type that are not UTF-8": lambda: holding(("b.txt", b"\xe9", "text/plain")),
    "bytearray and memoryview": lambda: holding(
        ("a.bin", bytearray(b"\0a"), "application/x-a"), ("b.bin", memoryview(b"\0b"), "application/x-b")
    ),
    "no file name": lambda: attached(None, b"x", "application/pdf"),
    "empty file name": lambda: attached("", b"x", "application/pdf"),
    "non-ASCII file name": lambda: attached("Rechnung Nº 5 – ü.pdf", b"x", "application/pdf"),
    "file name with quotes and separators": lambda: attached('a"b;c=d\\e/f.txt', b"x", "application/pdf"),
    "one file name twice": lambda: holding(
        EmailAttachment("a.txt", "one", "text/plain"), EmailAttachment("a.txt", "two", "text/plain")
    ),
    "the same bytes twice": lambda: holding(("a.bin", PNG, "application/x-a"), ("b.bin", PNG, "application/x-b")),
    "no type": lambda: holding(("a.pdf", b"x", None)),
    "type with parameters": lambda: holding(
        ("i.ics", "BEGIN:VCALENDAR", 'text/calendar; method="REQUEST"; charset=utf-8')
    ),
    "plain tuple of two": lambda: holding(("a.txt", "x")),
    "a list instead of a tuple": lambda: holding(["a.txt", "x", "text/plain"]),
    "attachments as a tuple": lambda: message(attachments=(EmailAttachment("a.txt", "x", "text/plain"),)),
    "only attachments, no body": lambda: attached("a.txt", "x", "text/plain", body=""),
    "text in the message's own encoding": lambda: attached("a.txt", "é", "text/plain", encoding="iso-8859-1"),
    # Attached messages
    "a message of Django's": lambda: attached("m.eml", html(subject="Inner é", tags=["x"]), "message/rfc822"),
    "a message of Django's in a message of Django's": lambda: attached(
        "m.eml", attached("n.eml", attached("o.txt", "ö", "text/plain"), "message/rfc822"), "message/rfc822"
    ),
    "a message as bytes": lambda: attached("m.eml", RAW, "message/rfc822"),
    "a message as text": lambda: attached("m.eml", RAW.decode("latin-1"), "message/rfc822"),
    "a parsed message": lambda: attached("m.eml", email.message_from_bytes(RAW), "message/rfc822"),
    "a parsed message that is broken": lambda: attached("m.eml", email.message_from_bytes(BROKEN), "message/rfc822"),
    "a broken message as bytes": lambda: attached("m.eml", BROKEN, "message/rfc822"),
    "a parsed message of the modern kind": lambda: attached(
        "m.eml", email.message_from_bytes(RAW, policy=email.policy.default), "message/rfc822"
    ),
    "a message built by Python's modern API": lambda: attached("m.eml", _modern_message(), "message/rfc822"),
    "a message built by Python's legacy API": lambda: attached(
        "m.eml",
        headed(MIMEText("é", "plain", "utf-8"), Subject=Header("Grüße", "utf-8"), X_N=Header("a " * 60)),
        "message/rfc822",
    ),
    "what Django makes of a message": lambda: attached(
        "m.eml", attached("a.txt", "é", "text/plain").message(), "message/rfc822"
    ),
    "a received message passed on": lambda: attached(
        "m.eml", AnymailInboundMessage.parse_raw_mime_bytes(RAW), "message/rfc822"
    ),
    # Parts
    "inline image": inline,
    "inline image with a name": lambda: inline(filename="logo.png", subtype="png"),
    "inline image with a non-ASCII name": lambda: inline(
        filename='Lögo "1" und ein sehr langer Name, der umbricht, so lang.png'
    ),
    "legacy part": lambda: holding(legacy_part()),
    "legacy part, non-ASCII name": lambda: holding(legacy_part(("utf-8", "", "Ü.bin"))),
    "legacy part, headers and parameters": lambda: holding(
        headed(legacy_part(name="x; y"), Content_ID="<a@b>", X_B="1", X_A="ü" * 60)
    ),
    "legacy image, inline by Content-ID alone": lambda: holding(headed(MIMEImage(PNG), Content_ID="<logo>")),
    "legacy text": lambda: holding(MIMEText("é\n", "html", "iso-8859-1")),
    "legacy text with a Charset": lambda: holding(MIMEText("é\n", "plain", quoted_printable())),
    "legacy audio and application": lambda: holding(MIMEAudio(b"RIFF", "wav"), MIMEApplication(b"\0", Name="ü.bin")),
    "legacy part of the modern policy": lambda: holding(
        headed(MIMEImage(PNG, "png", policy=email.policy.default), Content_ID="<logo>")
    ),
    "legacy multipart": lambda: holding(multipart()),
    "legacy digest": lambda: holding(MIMEMessage(email.message_from_bytes(DIGEST))),
    "legacy part around a message": lambda: holding(MIMEMessage(email.message_from_bytes(RAW))),
    "legacy part without a payload": lambda: holding(MIMEBase("application", "x-empty")),
    "a part with attributes of its own": lambda: holding(_own_attribute()),
    "a part with bytes not yet encoded": lambda: holding(_unencoded()),
}
if DJANGO_6:
    AWKWARD |= {
        "modern part": lambda: attached(modern_part(PNG, maintype="image", subtype="png", filename="a.png")),
        "modern text part": lambda: attached(modern_part("é\n", subtype="csv", filename="ü.csv", charset="iso-8859-1")),
        "modern part sent as 8bit": lambda: attached(eight_bit()),
        "modern part around a message": lambda: attached(modern_part(_modern_message())),
        "modern part, long parsed headers": lambda: attached(
            headed(modern_part("x"), X_Long="word " * 60, Content_Description="Grüße " * 20)
        ),
        "modern part of the SMTP policy": lambda: attached(modern_part("é\n", email.policy.SMTP)),
        "modern part of a policy with settings": lambda: attached(
            modern_part("é\n", email.policy.default.clone(cte_type="7bit", utf8=True, max_line_length=40))
        ),
        "modern part of a policy that leaves long lines": lambda: attached(
            headed(modern_part("x", email.policy.default.clone(refold_source="none")), X_Long="word " * 60)
        ),
        "modern part of a policy made anew": lambda: attached(modern_part("é\n", email.policy.EmailPolicy())),
        "modern part of the legacy policy": lambda: attached(_parsed_part(email.policy.compat32)),
        "modern part that was parsed": lambda: attached(_parsed_part(email.policy.default)),
    }

# As lazy values these break some back ends; stored, they are text.
BREAKS_WHILE_LAZY = {
    "lazy subject, body and html",
    "lazy attachment",
    "lazy object around a string",
}


def _without(made: EmailMessage, *names: str) -> EmailMessage:
    for name in names:
        delattr(made, name)
    return made


def _modern_message() -> PythonMessage:
    made = PythonMessage()
    made["Subject"] = "Grüße " * 30
    made["From"] = '"Ä, B" <from@example.com>'
    made["To"] = "group: a@example.com, Ü <b@example.com>;"
    made["Date"] = datetime(2001, 2, 3, tzinfo=timezone(timedelta(hours=3)))
    made.set_content("é\n")
    made.add_alternative("<p>é</p>", subtype="html")
    made.add_attachment(PNG, maintype="image", subtype="png", filename="ü.png")
    return made


def _parsed_part(policy: Any) -> MIMEPart:
    raw = (
        b"Content-Type: text/plain;\r\n charset=utf-8\r\nX-Folded: " + b"word " * 30 + b"\r\n here\r\n\r\nh\xc3\xa9\r\n"
    )
    part = email.message_from_bytes(raw, _class=MIMEPart, policy=policy)  # type: ignore[arg-type]  # stub: Message
    assert isinstance(part, MIMEPart)
    return part


def _unencoded() -> MIMEBase:
    part = MIMEBase("application", "x-thing")
    part.set_payload(b"\0\xff\xe9")
    return part


# --- What is refused ---


class Signed(EmailMessage):
    def message(self, *args: Any, **kwargs: Any) -> Any:
        return super().message(*args, **kwargs)


class Filtered(EmailMultiAlternatives):
    def recipients(self) -> list[str]:
        return ["someone@example.com"]


class Mixed(Quiet, AnymailMessage):  # type: ignore[misc]  # incompatible on purpose
    pass


class Footer(EmailMessage):
    if DJANGO_6:

        def _add_bodies(self, msg: Any) -> None: ...

    else:

        def _create_message(self, msg: Any) -> Any: ...


class OwnPart(MIMEImage):
    def get_filename(self, *args: Any, **kwargs: Any) -> Any:
        return "other"


class OwnPolicy(email.policy.EmailPolicy):
    pass


def _replaced() -> EmailMessage:
    made = message()
    made.message = lambda **kwargs: Message()  # type: ignore[method-assign,assignment,misc]  # the case itself
    return made


def _own_charset() -> Charset:
    charset = Charset("utf-8")
    charset.order = 7  # type: ignore[attr-defined]  # the case itself
    return charset


def _own_attribute() -> MIMEImage:
    part = MIMEImage(PNG, "png")
    part.order = 7  # type: ignore[attr-defined]  # the case itself
    return part


def _in_itself() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def _dict_in_itself() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["d"] = made
    return made


def _keys_of_two_languages() -> dict[Any, int]:
    with override("en"):
        return {"Montag": 1, gettext_lazy("Monday"): 2}


def _message_in_itself() -> EmailMessage:
    made = message()
    made.attach("m.eml", made, "message/rfc822")
    return made


# Reason: (message, the name that the error must give, part of why)
REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a subclass that makes its own MIME": (lambda: message(Signed), "message()", "Signed"),
    "a subclass that chooses its own recipients": (lambda: message(Filtered), "recipients()", "Filtered"),
    "a mixin that makes its own MIME": (lambda: message(Mixed), "message()", "Mixed"),
    "a subclass that changes how Django builds MIME": (
        lambda: message(Footer),
        "_add_bodies()" if DJANGO_6 else "_create_message()",
        "Footer",
    ),
    "a method replaced on the message itself": (_replaced, "message()", "EmailMessage"),
    "not a message of Django's": (PythonMessage, "message", "EmailMessage"),
    "a set": (lambda: message(tags={"a"}), "tags", "set"),
    "a frozenset in a list": (lambda: message(tags=["a", frozenset()]), "tags[1]", "frozenset"),
    "a generator": (lambda: message(tags=(t for t in "a")), "tags", "generator"),
    "the keys of a dict": (lambda: message(tags={"a": 1}.keys()), "tags", "dict_keys"),
    "an object of the user's own": (lambda: message(metadata={"a": {"b": [object()]}}), "metadata[a][b][0]", "object"),
    "a key of the user's own": (lambda: message(esp_extra={frozenset(): 1}), "esp_extra[frozenset()]", "frozenset"),
    "a function": (
        lambda: message(merge_data={"to@example.com": {"f": len}}),
        "merge_data[to@example.com][f]",
        "builtin",
    ),
    "an enum": (lambda: message(metadata={"a": enum.Enum("E", "X").X}), "metadata[a]", "E"),  # type: ignore[attr-defined]
    "a string whose str() says something else": (lambda: message(tags=[Priority.LOW]), "tags[0]", "Priority"),
    "a date whose str() says something else": (
        lambda: message(metadata={"when": Moment(2033, 1, 2, tzinfo=timezone.utc)}),
        "metadata[when]",
        "Moment",
    ),
    "a complex number": (lambda: message(metadata={"a": 1j}), "metadata[a]", "complex"),
    "an integer that JSON readers refuse": (lambda: message(metadata={"a": 10**700}), "metadata[a]", "600 digits"),
    "headers with look-up of their own": (
        lambda: message(extra_headers=CaseInsensitiveDict({"X-A": "1"})),
        "extra_headers",
        "CaseInsensitiveDict",
    ),
    "a list in itself": (lambda: message(metadata={"a": _in_itself()}), "metadata[a]" + "[0]" * 63, "deeply"),
    "a dict in itself": (lambda: message(metadata=_dict_in_itself()), "metadata" + "[d]" * 64, "deeply"),
    "keys that become one": (
        lambda: message(metadata=_keys_of_two_languages()),
        "metadata",
        "same text",
    ),
    "a charset with attributes of its own": (lambda: message(encoding=_own_charset()), "encoding", "Charset"),
    "an open file": (lambda: holding(("a.txt", io.BytesIO(b"x"), "text/plain")), "attachments[0][1]", "BytesIO"),
    "an attachment that is none": (lambda: holding(object()), "attachments[0]", "object"),
    "a message in itself": (_message_in_itself, "attachments[0][1]." * 21 + "attachments[0]", "deeply"),
    "an attached message that makes its own MIME": (
        lambda: attached("m.eml", message(Signed), "message/rfc822"),
        "attachments[0][1].message()",
        "Signed",
    ),
    "a part with code of its own": (
        lambda: holding(OwnPart(PNG, "png")),
        "attachments[0]",
        "OwnPart overrides get_filename()",
    ),
    "a part of a foreign policy": (
        lambda: holding(MIMEImage(PNG, "png", policy=OwnPolicy())),
        "attachments[0]",
        "OwnPolicy",
    ),
    "a part whose policy has its own content manager": (
        lambda: holding(MIMEPart(policy=email.policy.default.clone(content_manager=object()))),
        "attachments[0]",
        "content_manager",
    ),
    "a part in a part that cannot be kept": (
        lambda: holding(MIMEMultipart("mixed", None, [MIMEText("x"), OwnPart(PNG, "png")])),
        "attachments[0].payload[1]",
        "OwnPart",
    ),
    "a parsed header in a legacy part": (
        lambda: holding(headed(legacy_part(), X_Subject=_modern_message()["Subject"])),
        "attachments[0]",
        "X-Subject",
    ),
    "a parsed header that its text does not give back": (
        lambda: holding(headed(MIMEPart(email.policy.default), Content_Description="a\udce9b")),
        "attachments[0]",
        "Content-Description",
    ),
}
