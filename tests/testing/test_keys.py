"""Idempotency keys, as the four ESPs that have them keep them."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import requests

from anymail_retry.testing import AcceptThenDrop, Latency, LocalEsp, Status

if TYPE_CHECKING:
    from collections.abc import Callable


class Keyed(NamedTuple):
    """How one ESP takes a key, and what it says."""

    name: str
    path: str
    window: int
    replays: bool  # the first answer again, else an error of its own
    compares: bool  # bodies
    duplicate: Any = None
    other_body: Any = None
    in_progress: Any = None

    def body(self, key: str | None, text: str = "text") -> dict[str, Any]:
        to = [{"email": "to@example.com"}]
        if self.name == "brevo":
            return {"to": to, "textContent": text, "headers": {"idempotencyKey": key} if key else {}}
        if self.name == "unisender_go":
            body = {"recipients": to, "body": {"plaintext": text}}
            return {"message": {**body, "idempotence_key": key} if key else body}
        if self.name == "resend":
            return {"to": ["to@example.com"], "text": text}
        return {"recipients": [{"address": {"email": "to@example.com"}}], "content": {"text": text}}

    def headers(self, key: str | None) -> dict[str, str]:
        return {"Idempotency-Key": key} if key and self.name in {"resend", "sparkpost"} else {}


BREVO = {"code": "duplicate_parameter", "message": "Email for the idempotency key has already been processed"}
KEYED = [
    Keyed("brevo", "/v3/smtp/email", 30 * 60, replays=False, compares=False, duplicate=BREVO),
    Keyed(
        "resend",
        "/emails",
        24 * 3600,
        replays=True,
        compares=True,
        other_body={"statusCode": 409, "name": "invalid_idempotent_request"},
        in_progress={"statusCode": 409, "name": "concurrent_idempotent_requests"},
    ),
    Keyed(
        "sparkpost",
        "/api/v1/transmissions/",
        24 * 3600,
        replays=True,
        compares=True,
        other_body={"errors": [{"code": "1600"}]},
        in_progress={"errors": [{"code": "1601"}]},
    ),
    Keyed(
        "unisender_go",
        "/ru/transactional/api/v1/email/send.json",
        60,
        replays=False,
        compares=False,
        duplicate={"status": "error", "code": 1573},
    ),
]
each = pytest.mark.parametrize("keyed", [pytest.param(keyed, id=keyed.name) for keyed in KEYED])
KEY = "8a6e0804-2bd0-4672-b79d-d97027f9071a"
OTHER = "3f333df6-90a4-4fda-8dd3-9485d27cee36"


def post(esp: LocalEsp, keyed: Keyed, key: str | None = KEY, text: str = "text", auth: str = "k") -> requests.Response:
    headers = {**keyed.headers(key), esp.provider.key_header: auth}
    url = esp.origin + keyed.path
    return requests.post(url, json=keyed.body(key, text), headers=headers, timeout=30)


def says(answer: Any, expected: Any) -> bool:
    """Whether the answer has all that is expected, at any depth."""
    if isinstance(expected, dict):
        return all(says(answer[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return all(map(says, answer, expected))
    return bool(answer == expected)


@each
def test_second_request_under_a_key_is_not_accepted(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    esp = local_esp(keyed.name, tls=False)
    first, second = post(esp, keyed), post(esp, keyed)
    assert first.ok
    assert len(esp.ledger) == 1
    assert esp.ledger[0].idempotency_key == KEY
    if keyed.replays:
        assert (second.status_code, second.content) == (first.status_code, first.content)
        assert second.headers.get("X-Idempotent-Replayed") == ("true" if keyed.name == "sparkpost" else None)
        assert "X-Idempotent-Replayed" not in first.headers
    else:
        assert second.status_code == 400
        assert says(second.json(), keyed.duplicate)
    assert [request.replayed for request in esp.requests] == [False, keyed.replays]
    assert [request.idempotency_key for request in esp.requests] == [KEY, KEY]


@each
def test_without_a_key_or_with_another_each_is_accepted(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    esp = local_esp(keyed.name, tls=False)
    assert all(post(esp, keyed, key).ok for key in (None, KEY, None, OTHER))
    assert [accepted.idempotency_key for accepted in esp.ledger] == [None, KEY, None, OTHER]


@each
def test_other_body_under_a_key(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    """An error where the ESP compares bodies; a duplicate like any where it does not."""
    esp = local_esp(keyed.name, tls=False)
    post(esp, keyed)
    second = post(esp, keyed, text="another text")
    assert second.status_code == (409 if keyed.compares else 400)
    assert says(second.json(), keyed.other_body if keyed.compares else keyed.duplicate)
    assert len(esp.ledger) == 1


@each
def test_request_in_progress_holds_its_key(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    esp = local_esp(keyed.name, tls=False)
    esp.script(Latency(None))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, esp, keyed)
        esp.wait_for(stalled=1)
        assert esp.ledger == []
        second = post(esp, keyed)
        assert second.status_code == (409 if keyed.compares else 400)
        assert says(second.json(), keyed.in_progress or keyed.duplicate)
        esp.release()
        assert first.result().ok
    assert len(esp.ledger) == 1


@each
def test_key_is_forgotten_after_its_window(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    """Counted from the acceptance, by the ESP's clock."""
    time = 1000.0
    esp = local_esp(keyed.name, tls=False, clock=lambda: time)
    post(esp, keyed)
    time += keyed.window - 1
    post(esp, keyed)
    assert len(esp.ledger) == 1
    esp.advance(1)
    post(esp, keyed)
    assert [accepted.time for accepted in esp.ledger] == [1000.0, 1000.0 + keyed.window]


@each
def test_accepted_without_an_answer_uses_the_key(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    esp = local_esp(keyed.name, tls=False)
    esp.script(AcceptThenDrop())
    with pytest.raises(requests.ConnectionError):
        post(esp, keyed)
    assert post(esp, keyed).ok is keyed.replays
    assert len(esp.ledger) == 1


@each
def test_refused_request_leaves_its_key_free(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    esp = local_esp(keyed.name, tls=False)
    esp.script(Status(503))
    assert post(esp, keyed).status_code == 503
    assert post(esp, keyed).ok
    assert len(esp.ledger) == 1


@each
def test_refused_request_uses_its_key_where_the_script_says_so(
    local_esp: Callable[..., LocalEsp], keyed: Keyed
) -> None:
    esp = local_esp(keyed.name, tls=False)
    esp.script(Status(503, uses_key=True))
    assert post(esp, keyed).status_code == 503
    assert post(esp, keyed).status_code == (503 if keyed.replays else 400)
    assert esp.ledger == []


@pytest.mark.parametrize(
    "keyed",
    [pytest.param(keyed, id=keyed.name) for keyed in KEYED if keyed.headers(KEY)],  # the others' is in the body
)
def test_malformed_request_leaves_its_key_free(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    esp = local_esp(keyed.name, tls=False)
    url = esp.origin + keyed.path
    assert requests.post(url, json=[], headers=keyed.headers(KEY), timeout=30).status_code == 400
    assert requests.post(url, json=keyed.body(KEY), headers=keyed.headers(KEY), timeout=30).ok


@each
def test_two_accounts_do_not_share_keys(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    esp = local_esp(keyed.name, tls=False)
    assert post(esp, keyed, auth="one").ok
    assert post(esp, keyed, auth="two").ok
    assert len(esp.ledger) == 2


@pytest.mark.parametrize(
    ("name", "key", "error"),
    [
        pytest.param("brevo", "order-17", {"code": "invalid_parameter"}, id="brevo: a UUID"),
        pytest.param("resend", "k" * 257, {"name": "invalid_idempotency_key"}, id="resend: at most 256"),
        pytest.param("sparkpost", "order 17", {"errors": [{"code": "1602"}]}, id="sparkpost: its alphabet"),
        pytest.param("unisender_go", "k" * 65, {"code": 1572}, id="unisender_go: at most 64"),
    ],
)
def test_key_of_a_wrong_form_is_refused(local_esp: Callable[..., LocalEsp], name: str, key: str, error: Any) -> None:
    (keyed,) = (keyed for keyed in KEYED if keyed.name == name)
    esp = local_esp(name, tls=False)
    answer = post(esp, keyed, key)
    assert answer.status_code == 400
    assert says(answer.json(), error)
    assert esp.ledger == []


@each
def test_uuid_suits_every_esp(local_esp: Callable[..., LocalEsp], keyed: Keyed) -> None:
    assert post(local_esp(keyed.name, tls=False), keyed, str(uuid.uuid4())).ok


def test_header_is_no_key_to_brevo(local_esp: Callable[..., LocalEsp]) -> None:
    """Neither the HTTP header nor another spelling in the body: measured by its users, two mails."""
    esp = local_esp("brevo", tls=False)
    for _ in range(2):
        body = {"to": [{"email": "to@example.com"}], "headers": {"Idempotency-Key": KEY}}
        url = esp.origin + "/v3/smtp/email"
        assert requests.post(url, json=body, headers={"Idempotency-Key": KEY}, timeout=30).ok
    assert len(esp.ledger) == 2


def test_esp_without_keys_takes_every_request(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp("postmark", tls=False)
    for _ in range(2):
        headers = {"Idempotency-Key": KEY}
        assert requests.post(esp.url + "email", json={"To": "a@example.com"}, headers=headers, timeout=30).ok
    assert [accepted.idempotency_key for accepted in esp.ledger] == [None, None]
