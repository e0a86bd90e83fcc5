"""Anymail's own back ends send to the local ESP as to the real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import anymail
import pytest
import requests
from anymail.exceptions import AnymailAPIError, AnymailRequestsAPIError
from anymail.message import AnymailMessage
from django.core import mail
from django.utils.module_loading import import_string

from anymail_retry.testing import ESPS, LocalEsp, ScriptedEsp, Status

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore:django-anymail has dropped official support for SendGrid")


def backend_for(esp: ScriptedEsp, **options: Any) -> Any:
    return import_string(f"anymail.backends.{esp.esp}.EmailBackend")(**{**esp.options(), **options})


def send(esp: ScriptedEsp, message: Any, **options: Any) -> Any:
    assert backend_for(esp, **options).send_messages([message]) == 1
    return message.anymail_status


def plain_message(**attributes: Any) -> AnymailMessage:
    return AnymailMessage(
        **{
            "subject": "Grüße, 世界",
            "body": "Text",
            "from_email": "Shop <shop@example.com>",
            "to": ["to@example.com"],
            **attributes,
        }
    )


@pytest.mark.parametrize("tls", [True, False], ids=["https", "http"])
@pytest.mark.parametrize("name", ESPS)
def test_plain_message_is_accepted(local_esp: Callable[..., LocalEsp], name: str, tls: bool) -> None:
    esp = local_esp(name, tls=tls)
    status = send(
        esp,
        plain_message(
            to=['"Zoë, Ltd." <zoe@example.com>', "second@example.com"],
            cc=["Copy <cc@example.com>"],
            bcc=["bcc@example.com"],
        ),
    )
    expected = {"zoe@example.com", "second@example.com", "cc@example.com", "bcc@example.com"}
    (accepted,) = esp.ledger
    assert set(accepted.recipients) == expected
    assert len(accepted.recipients) == 4
    assert accepted.subject == "Grüße, 世界"
    assert set(status.recipients) == expected
    assert status.status <= {"queued", "sent"}
    assert all(recipient.message_id for recipient in status.recipients.values())


@pytest.mark.parametrize("name", ESPS)
def test_html_and_attachment_are_accepted(local_esp: Callable[..., LocalEsp], name: str) -> None:
    esp = local_esp(name)
    message = plain_message()
    message.attach_alternative("<p>HTML ✓</p>", "text/html")
    message.attach("data.bin", bytes(range(256)) * 1000, "application/octet-stream")
    message.attach("ünïcode.txt", "text", "text/plain")
    status = send(esp, message)
    (accepted,) = esp.ledger
    assert accepted.recipients == ("to@example.com",)
    assert accepted.subject == "Grüße, 世界"
    assert accepted.body == esp.requests[0].body
    assert len(accepted.body) > 256_000
    assert status.status <= {"queued", "sent"}


class Batch(NamedTuple):
    name: str
    path: str
    attributes: dict[str, Any]
    copies: int = 1  # that cc@example.com gets
    options: dict[str, Any] = {}


MERGE = {"a@example.com": {"name": "A"}, "b@example.com": {"name": "B"}}
TEMPLATE = {"template_id": "7", "merge_data": MERGE, "merge_global_data": {"shop": "Shop"}}
METADATA = {"merge_metadata": {"a@example.com": {"order": "1"}, "b@example.com": {"order": "2"}}}
# Some ESPs send each copy of a batch to its cc too, some once in all.
BATCHES = [
    pytest.param(Batch("brevo", "/v3/smtp/email", TEMPLATE), id="brevo: messageVersions of a template"),
    pytest.param(
        Batch("mailersend", "/v1/bulk-email", TEMPLATE, copies=2, options={"batch_send_mode": "use-bulk-email"}),
        id="mailersend: bulk",
    ),
    pytest.param(
        Batch("mailersend", "/v1/email", TEMPLATE, options={"batch_send_mode": "expose-to-list"}),
        id="mailersend: one mail to all",
    ),
    pytest.param(Batch("mailgun", "/v3/example.com/messages", TEMPLATE), id="mailgun: recipient-variables"),
    pytest.param(Batch("mailjet", "/v3.1/send", TEMPLATE, copies=2), id="mailjet: one of Messages for each"),
    pytest.param(Batch("mailtrap", "/api/batch", TEMPLATE, copies=2), id="mailtrap: batch"),
    pytest.param(
        Batch("mailtrap", "/api/batch/4711", TEMPLATE, copies=2, options={"sandbox_id": "4711"}),
        id="mailtrap: batch into a sandbox",
    ),
    pytest.param(Batch("mandrill", "/api/1.0/messages/send-template.json", TEMPLATE), id="mandrill: template"),
    pytest.param(Batch("mandrill", "/api/1.0/messages/send.json", METADATA), id="mandrill: metadata"),
    pytest.param(
        Batch("postmark", "/email/batchWithTemplates", TEMPLATE, copies=2), id="postmark: batch of a template"
    ),
    pytest.param(Batch("postmark", "/email/batch", METADATA, copies=2), id="postmark: batch"),
    pytest.param(
        Batch("postmark", "/email/bulk", TEMPLATE, copies=2, options={"use_bulk_api": True}),
        id="postmark: bulk",
        marks=pytest.mark.skipif(
            anymail.__version__.startswith(("15.0", "15.1")), reason="Anymail 15.2 is the first to use email/bulk"
        ),
    ),
    pytest.param(Batch("resend", "/emails/batch", METADATA, copies=2), id="resend: batch"),
    pytest.param(
        Batch("sendgrid", "/v3/mail/send", {**TEMPLATE, "template_id": "d-7"}, copies=2),
        id="sendgrid: personalizations",
    ),
    pytest.param(
        Batch("sparkpost", "/api/v1/transmissions/", {**TEMPLATE, "from_email": None, "cc": []}, copies=0),
        id="sparkpost: template, which takes no cc",
    ),
    pytest.param(Batch("sparkpost", "/api/v1/transmissions/", METADATA, copies=2), id="sparkpost: metadata"),
    pytest.param(
        Batch("unisender_go", "/ru/transactional/api/v1/email/send.json", {**TEMPLATE, "cc": []}, copies=0),
        id="unisender_go: template, whose batches take no cc",
    ),
]


@pytest.mark.parametrize("batch", BATCHES)
def test_batch_is_one_entry_that_lists_every_copy(local_esp: Callable[..., LocalEsp], batch: Batch) -> None:
    esp = local_esp(batch.name)
    message = plain_message(**{"to": list(MERGE), "cc": ["cc@example.com"], **batch.attributes})
    status = send(esp, message, **batch.options)
    (accepted,) = esp.ledger
    assert sorted(accepted.recipients) == sorted([*MERGE, *["cc@example.com"] * batch.copies])
    assert esp.ledger.deliveries()[accepted.marker, "cc@example.com"] == batch.copies
    assert esp.requests[0].path == batch.path
    assert {*MERGE} <= set(status.recipients)
    for address in MERGE:
        assert status.recipients[address].status in {"queued", "sent", "unknown"}
        assert status.recipients[address].message_id


@pytest.mark.parametrize(
    ("name", "path", "options"),
    [
        pytest.param("postmark", "/email/withTemplate/", {}, id="postmark: its own endpoint"),
        pytest.param("mailtrap", "/api/send/4711", {"sandbox_id": 4711}, id="mailtrap: into a sandbox"),
        pytest.param("brevo", "/v3/smtp/email", {}, id="brevo: no subject needed"),
    ],
)
def test_template_without_merge_data_is_accepted(
    local_esp: Callable[..., LocalEsp], name: str, path: str, options: dict[str, Any]
) -> None:
    esp = local_esp(name)
    message = plain_message(template_id="7", subject="", body="", cc=["cc@example.com"])
    status = send(esp, message, **options)
    (accepted,) = esp.ledger
    assert accepted.recipients == ("to@example.com", "cc@example.com")
    assert accepted.subject == ""
    assert esp.requests[0].path == path
    assert status.status <= {"queued", "sent"}


MAKES_ITS_OWN_IDS = {"sendgrid", "unisender_go"}  # Anymail does, and sends them along


@pytest.mark.parametrize("name", [name for name in ESPS if name not in MAKES_ITS_OWN_IDS])
def test_ledger_knows_the_ids_that_anymail_reports(local_esp: Callable[..., LocalEsp], name: str) -> None:
    esp = local_esp(name)
    seen: set[str] = set()
    for number in (1, 2):
        status = send(esp, plain_message(to=["a@example.com", "b@example.com"]))
        reported = {str(recipient.message_id) for recipient in status.recipients.values()}
        assert reported <= set(esp.ledger[-1].message_ids)
        assert not seen & reported
        seen |= reported
        assert len(esp.ledger) == number


@pytest.mark.parametrize("name", ESPS)
def test_marker_is_found_in_a_header(local_esp: Callable[..., LocalEsp], name: str) -> None:
    esp = local_esp(name)
    send(esp, plain_message(headers={"X-Message-Marker": "m-17", "X-Other": "1"}))
    assert esp.ledger[0].marker == "m-17"


@pytest.mark.parametrize("name", [name for name in ESPS if name not in {"mailersend", "postal"}])  # have no metadata
def test_marker_is_found_in_metadata(local_esp: Callable[..., LocalEsp], name: str) -> None:
    esp = local_esp(name)
    send(esp, plain_message(metadata={"other": "1", "marker": "m-17"}))
    assert esp.ledger[0].marker == "m-17"


@pytest.mark.parametrize("name", ESPS)
def test_subject_is_the_marker_of_last_resort(local_esp: Callable[..., LocalEsp], name: str) -> None:
    esp = local_esp(name)
    send(esp, plain_message(subject="Order 17", body="this text has a marker: none"))
    assert esp.ledger[0].marker == "Order 17"


def test_marker_in_a_multipart_body_is_found(local_esp: Callable[..., LocalEsp]) -> None:
    """Mailgun gets a form, and a multipart one where there are attachments."""
    esp = local_esp("mailgun")
    message = plain_message(headers={"X-Message-Marker": "m-17"})
    message.attach("data.bin", b'\r\n\r\nname="to"\r\n\r\nnobody@example.com', "application/octet-stream")
    send(esp, message)
    assert esp.ledger[0].marker == "m-17"
    assert esp.ledger[0].recipients == ("to@example.com",)


@pytest.mark.parametrize("name", ESPS)
def test_wrong_api_key_is_refused_and_the_right_one_recorded(local_esp: Callable[..., LocalEsp], name: str) -> None:
    esp = local_esp(name, api_keys=["right", "also right"])
    key = next(iter(esp.provider.credentials))
    with pytest.raises(AnymailAPIError) as caught:
        send(esp, plain_message(), **{key: "wrong"})
    assert caught.value.response.status_code == (200 if name == "postal" else 401)  # Postal answers 200 to all
    assert esp.ledger == []
    send(esp, plain_message())
    send(esp, plain_message(), **{key: "also right"})
    assert [accepted.api_key for accepted in esp.ledger] == ["right", "also right"]
    assert [request.api_key for request in esp.requests] == ["wrong", "right", "also right"]


ERRORS = [
    pytest.param(name, status, kind, id=f"{name} {status} {kind or ''}".strip())
    for name in ESPS
    for status, kind in [(key, None) if isinstance(key, int) else key for key in LocalEsp(name).provider.errors]
]


@pytest.mark.parametrize(("name", "status", "kind"), ERRORS)
def test_errors_have_the_form_of_the_esp(
    local_esp: Callable[..., LocalEsp], name: str, status: int, kind: str | None
) -> None:
    esp = local_esp(name, tls=False)
    esp.script(Status(status, kind=kind))
    response = requests.post(esp.url, timeout=30)
    assert response.status_code == status
    if response.headers["Content-Type"] == "application/json":
        assert isinstance(response.json(), dict)
    else:
        assert (name, status) in {("mailjet", 429), ("mailgun", 401)}  # the ones known to be text or HTML
    assert esp.ledger == []


@pytest.mark.parametrize("name", ESPS)
def test_every_esp_has_an_answer_of_every_status(local_esp: Callable[..., LocalEsp], name: str) -> None:
    """Anymail raises with that status, unless this ESP's parser takes it for per-recipient results."""
    esp = local_esp(name, tls=False)
    for status in (400, 402, 403, 404, 413, 420, 422, 429, 500, 502, 503, 504, 520, 524):
        esp.script(Status(status))
        if (name, status) == ("mailjet", 400):
            assert send(esp, plain_message()).status == {"failed"}
            continue
        with pytest.raises(AnymailRequestsAPIError) as caught:
            send(esp, plain_message())
        assert caught.value.status_code == status
        assert caught.value.response.content
    assert esp.ledger == []


def test_unknown_kind_of_an_error_is_refused_when_scripted(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp("sendgrid", tls=False)
    with pytest.raises(ValueError, match="SendGrid has no 'quota' of status 429"):
        esp.script(Status(429, kind="quota"))


@pytest.mark.parametrize("name", ESPS)
def test_what_is_no_api_call_is_refused(local_esp: Callable[..., LocalEsp], name: str) -> None:
    esp = local_esp(name, tls=False)
    with requests.Session() as session:
        assert session.post(esp.origin + "/nowhere", timeout=30).status_code == 404
        assert session.post(esp.url + "/" * (name == "mailgun"), timeout=30).status_code == 404
    send(esp, plain_message())
    with requests.Session() as session:
        url = esp.origin + esp.requests[-1].path
        assert session.get(url, timeout=30).status_code == 405
        if name != "mailgun":
            headers = {"Content-Type": "application/json"}
            assert session.post(url, b"{not JSON", headers=headers, timeout=30).status_code == 400
            assert session.post(url, b"[1]", headers=headers, timeout=30).status_code == 400
    assert len(esp.ledger) == 1


@pytest.mark.parametrize("name", ESPS)
def test_settings_are_all_that_anymail_needs(local_esp: Callable[..., LocalEsp], settings: Any, name: str) -> None:
    esp = local_esp(name)
    settings.ANYMAIL = esp.settings()
    backend = import_string(f"anymail.backends.{name}.EmailBackend")()
    assert backend.send_messages([plain_message()]) == 1
    assert len(esp.ledger) == 1


def test_options_are_those_of_a_mailer(local_esp: Callable[..., LocalEsp], settings: Any) -> None:
    if not hasattr(mail, "mailers"):
        pytest.skip("Django before 6.1 has no MAILERS")
    esp = local_esp("unisender_go")
    settings.MAILERS = {"default": {"BACKEND": "anymail.backends.unisender_go.EmailBackend", "OPTIONS": esp.options()}}
    mail.send_mail("Subject", "Text", "from@example.com", ["to@example.com"])
    assert esp.ledger[0].recipients == ("to@example.com",)
