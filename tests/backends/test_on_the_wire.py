"""Changing the one dotted path changes nothing on the wire but the idempotency key.

Each request is read back from a real HTTPS server, Anymail's own beside ours.
"""

from __future__ import annotations

import re
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib import import_module
from typing import Any

import pytest
from anymail.exceptions import AnymailNotSupportedWarning, AnymailUnsupportedFeature
from anymail.message import AnymailMessage
from django.test import override_settings

from anymail_retry import reset_breakers
from anymail_retry.testing import ESPS, LocalEsp
from anymail_retry.testing.ledger import Request

# --- Messages that use every feature that an ESP supports ---

TEMPLATES: dict[str, Any] = {
    "brevo": 12,
    "mailjet": "1234567",
    "sendgrid": "d-5a963add2ec84305813ff860db277d7a",
}

#: One ESP's own parameter each, so that ``esp_extra`` is merged as that ESP's payload does it.
ESP_EXTRA: dict[str, dict[str, Any]] = {
    "brevo": {"batchId": "5c6cfa04-eed9-42c2-8b5c-6d470d978e9d"},
    "mailersend": {"settings": {"track_content": True}},
    "mailgun": {"o:dkim": "yes"},
    "mailjet": {"Globals": {"Priority": 3}},
    "mailtrap": {"category": "reminders"},
    "mandrill": {"async": True, "message": {"subaccount": "library"}},
    "postal": {"bounce": False},
    "postmark": {"MessageStream": "reminders"},
    "resend": {"tags": [{"name": "kind", "value": "reminder"}]},
    "scaleway": {"project_name": "library"},
    "sendgrid": {"asm": {"group_id": 1}},
    "sparkpost": {"description": "Reminder", "options": {"transactional": True}},
    "unisender_go": {"skip_unsubscribe": 1},
}

Feature = Callable[[AnymailMessage], object]


def inline_image() -> Any:
    """An attachment of the kind that the installed Django takes, with its random Content-ID."""
    message = AnymailMessage()
    message.attach_inline_image(b"\x89PNG\r\n\x1a\n\x00\xff not really", "logo.png", subtype="png")
    return message.attachments[0]


INLINE_IMAGE = inline_image()


def ordinary(esp: str) -> tuple[AnymailMessage, dict[str, Feature]]:
    message = AnymailMessage(
        subject="Påminnelse: boken",
        body="Hej,\n\nboken skall tillbaka.\n",
        from_email='"Bibliotek, Södra" <library@example.com>',
        to=["Zoë <zoe@example.net>", "to@example.com"],
    )
    send_at = datetime(2035, 6, 1, 9, 30, tzinfo=timezone.utc)
    return message, {
        "cc": lambda m: m.cc.append("Kopia <cc@example.com>"),
        "bcc": lambda m: m.bcc.append("bcc@example.com"),
        "reply_to": lambda m: m.reply_to.append("Svar <reply@example.com>"),
        "a second reply_to": lambda m: m.reply_to.append("reply2@example.com"),
        "headers": lambda m: m.extra_headers.update({"X-Loan": "17", "List-Unsubscribe": "<https://example.com/u>"}),
        "html": lambda m: m.attach_alternative("<p>Boken <b>skall</b> tillbaka.</p>", "text/html"),
        "amp": lambda m: m.attach_alternative("<!doctype html><html amp4email>", "text/x-amp-html"),
        "text attachment": lambda m: m.attach("lån.txt", "Måndag\n", "text/plain"),
        "binary attachment": lambda m: m.attach("lån.pdf", b"%PDF-1.7 \x00\xff", "application/pdf"),
        "inline image": lambda m: m.attachments.append(INLINE_IMAGE),
        "envelope_sender": lambda m: setattr(m, "envelope_sender", "bounces@example.com"),
        "metadata": lambda m: setattr(m, "metadata", {"loan": "17", "branch": "south"}),
        "tags": lambda m: setattr(m, "tags", ["reminder"]),
        "a second tag": lambda m: m.tags.append("library"),
        "track_clicks": lambda m: setattr(m, "track_clicks", False),
        "track_opens": lambda m: setattr(m, "track_opens", True),
        "send_at": lambda m: setattr(m, "send_at", send_at),
        "esp_extra": lambda m: setattr(m, "esp_extra", ESP_EXTRA[esp]),
    }


def batch(esp: str) -> tuple[AnymailMessage, dict[str, Feature]]:
    # Without a From of its own, which SparkPost does not take beside a template.
    message = AnymailMessage(to=["Zoë <zoe@example.net>", "to@example.com"])
    zoe, other = "zoe@example.net", "to@example.com"
    return message, {
        "template_id": lambda m: setattr(m, "template_id", TEMPLATES.get(esp, "reminder")),
        "merge_data": lambda m: setattr(m, "merge_data", {zoe: {"name": "Zoë"}, other: {"name": "To"}}),
        "merge_global_data": lambda m: setattr(m, "merge_global_data", {"branch": "Södra"}),
        "metadata": lambda m: setattr(m, "metadata", {"mailing": "monthly"}),
        "merge_metadata": lambda m: setattr(m, "merge_metadata", {zoe: {"loan": "17"}, other: {"loan": "18"}}),
        "merge_headers": lambda m: setattr(m, "merge_headers", {zoe: {"List-Unsubscribe": "<https://example.com/z>"}}),
        "tags": lambda m: setattr(m, "tags", ["reminder"]),
        "cc": lambda m: m.cc.append("cc@example.com"),
        "subject": lambda m: setattr(m, "subject", "Reminder"),
        "body": lambda m: setattr(m, "body", "The book is due."),
        "empty merge_data": lambda m: m.merge_data or setattr(m, "merge_data", {}),
    }


MESSAGES = {"ordinary": ordinary, "batch": batch}

#: A feature that each of them supports, which shows that the messages are not bare ones.
ALWAYS = {
    "ordinary": {"cc", "bcc", "reply_to", "headers", "html", "text attachment", "binary attachment", "esp_extra"},
    "batch": set(),
}
#: The ESPs that send no batches, so that their second message is an ordinary one too.
NO_BATCH = {"postal", "scaleway"}


def backend_of(package: str, esp: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnymailNotSupportedWarning)  # Anymail's own, for SendGrid
        return import_module(f"{package}.backends.{esp}").EmailBackend()


def supported(esp: str, kind: str) -> list[str]:
    """The features that Anymail takes for this ESP, all in one message."""
    backend = backend_of("anymail", esp)
    names: list[str] = []
    for name in MESSAGES[kind](esp)[1]:
        payload = None
        try:
            payload = backend.build_message_payload(build(esp, kind, [*names, name]), {})
            payload.get_request_params(backend.api_url)
        except AnymailUnsupportedFeature:
            continue
        names.append(name)
    return names


def build(esp: str, kind: str, names: list[str]) -> AnymailMessage:
    message, features = MESSAGES[kind](esp)
    for name in names:
        features[name](message)
    return message


# --- What was sent ---

UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
BOUNDARY = re.compile(rb"(?<=boundary=)[0-9a-f]+")
#: Where an ESP takes the idempotency key, and what is around it.
KEYS = {
    "brevo": [rb'(?:, )?"idempotencyKey": "[^"]+"', rb'"headers": \{\}, '],
    "unisender_go": [rb', "idempotence_key": "[^"]+"'],
}


def normalized(request: Request, *, without_key: bool) -> tuple[bytes, bytes]:
    """Head and body, with what is random in Anymail's own requests made equal."""
    head, body = request.head, request.body
    assert int(request.headers["content-length"]) == len(body)
    if without_key:
        head = re.sub(rb"\r\nIdempotency-Key: [^\r]+", b"", head)
        for pattern in KEYS.get(request_esp(request), []):
            body = re.sub(pattern, b"", body)
    head = re.sub(rb"(?<=\r\nContent-Length: )[0-9]+", str(len(body)).encode(), head)
    boundary = BOUNDARY.search(head)
    if boundary:
        head, body = head.replace(boundary[0], b"boundary"), body.replace(boundary[0], b"boundary")
    return UUID.sub(b"uuid", head), UUID.sub(b"uuid", body)


def request_esp(request: Request) -> str:
    return "unisender_go" if request.path.endswith("email/send.json") else "brevo" if "smtp" in request.path else ""


@pytest.fixture(scope="module")
def esps() -> Iterator[Callable[[str], LocalEsp]]:
    """One local ESP of each kind, started when it is first asked for."""
    started: dict[str, LocalEsp] = {}

    def get(name: str) -> LocalEsp:
        if name not in started:
            started[name] = LocalEsp(name).start()
        started[name].reset()
        return started[name]

    yield get
    for esp in started.values():
        esp.close()


def settings_of(esp: LocalEsp) -> dict[str, Any]:
    return {
        "ANYMAIL": {**esp.settings(), "MAILERSEND_BATCH_SEND_MODE": "use-bulk-email"},
        "DEFAULT_FROM_EMAIL": "library@example.com",
    }


LAYERS = {
    "without the queue and the breaker": {"EMAIL_FALLBACK_QUEUE": False, "EMAIL_BREAKER_FAILURES": None},
    "with the queue and the breaker": {"EMAIL_FALLBACK_QUEUE": True, "EMAIL_BREAKER_FAILURES": 5},
}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("name", ESPS)
def test_our_request_is_anymails_byte_for_byte(
    name: str, kind: str, layers: str, esps: Callable[[str], LocalEsp], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a database: a good send needs none, so any SQL would be an error here."""
    esp = esps(name)
    for variable, value in esp.environ.items():
        monkeypatch.setenv(variable, value)
    reset_breakers()
    with override_settings(**settings_of(esp), **LAYERS[layers]):
        features = supported(name, kind)
        theirs, ours = build(name, kind, features), build(name, kind, features)
        assert backend_of("anymail", name).send_messages([theirs]) == 1
        assert backend_of("anymail_retry", name).send_messages([ours]) == 1

    first, second = esp.requests
    assert (first.status, second.status) == (second.status, first.status)
    assert len(esp.ledger) == 2
    has_key = name in {"brevo", "resend", "sparkpost", "unisender_go"}
    assert (second.idempotency_key is not None) is has_key
    assert first.idempotency_key is None
    assert normalized(second, without_key=True) == normalized(first, without_key=False)
    statuses = [
        {address: status.status for address, status in message.anymail_status.recipients.items()}
        for message in (theirs, ours)
    ]
    assert statuses[0] == statuses[1] != {}


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("name", ESPS)
def test_the_message_uses_what_the_esp_supports(name: str, kind: str, esps: Callable[[str], LocalEsp]) -> None:
    """The test above would mean little with bare messages."""
    esp = esps(name)
    with override_settings(**settings_of(esp)):
        features = set(supported(name, kind))
    assert features >= ALWAYS[kind]
    if kind == "batch" and name not in NO_BATCH:
        assert features & {"merge_data", "merge_metadata", "merge_headers", "empty merge_data"}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        pytest.param("resend", "order-17", id="a text"),
        pytest.param("resend", 17, id="a number"),
        pytest.param("brevo", uuid.UUID("c5f0e3a1-7d3b-4c0e-9a53-0a2b6f4d8e11"), id="a UUID"),
        pytest.param("sparkpost", "order_17", id="SparkPost"),
        pytest.param("unisender_go", "order 17", id="Unisender Go"),
    ],
)
def test_a_key_of_the_users_own_is_sent_in_the_esps_place(
    name: str, key: Any, esps: Callable[[str], LocalEsp], monkeypatch: pytest.MonkeyPatch
) -> None:
    esp = esps(name)
    for variable, value in esp.environ.items():
        monkeypatch.setenv(variable, value)
    message = build(name, "ordinary", ["html"])
    message.idempotency_key = key
    with override_settings(**settings_of(esp)):
        assert backend_of("anymail_retry", name).send_messages([message]) == 1
    assert esp.requests[0].idempotency_key == str(key)
    assert message.idempotency_key is key


def test_ids_that_anymail_makes_are_the_same_where_a_test_makes_them_predictable(
    esps: Callable[[str], LocalEsp], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests of Anymail's users patch ``uuid.uuid4``, as Anymail's own do; ours must not use one up."""
    esp = esps("sendgrid")
    for variable, value in esp.environ.items():
        monkeypatch.setenv(variable, value)
    bodies = []
    with override_settings(**settings_of(esp)):
        for package in ("anymail", "anymail_retry"):
            ids = iter(uuid.UUID(int=number) for number in range(1, 9))
            backend, message = backend_of(package, "sendgrid"), build("sendgrid", "ordinary", ["html"])
            with monkeypatch.context() as patch:
                patch.setattr(uuid, "uuid4", lambda ids=ids: next(ids))
                backend.send_messages([message])
            bodies.append(esp.requests[-1].body)
    assert bodies[0] == bodies[1]


def test_a_key_that_is_left_in_is_seen(esps: Callable[[str], LocalEsp], monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes requests comparable must not make them equal."""
    esp = esps("brevo")
    for variable, value in esp.environ.items():
        monkeypatch.setenv(variable, value)
    with override_settings(**settings_of(esp)):
        for package in ("anymail", "anymail_retry"):
            backend_of(package, "brevo").send_messages([build("brevo", "ordinary", ["html"])])
    first, second = esp.requests
    assert normalized(second, without_key=False) != normalized(first, without_key=False)
    assert normalized(second, without_key=True) == normalized(first, without_key=False)
