"""What a send raises, carries, logs and follows, on the wire."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import requests_mock
import responses
import trustme
import urllib3
import vcr
from anymail.exceptions import AnymailRequestsAPIError
from requests import exceptions

import anymail_retry.backends
from anymail_retry.delivery import Delivery
from anymail_retry.testing import (
    AcceptThenDrop,
    AcceptThenStall,
    DropInHandshake,
    Exchange,
    Fault,
    Garbage200,
    HalfBody,
    LocalEsp,
    Redirect,
    ResetAfterRequest,
    Rule,
    Stall,
    StallInBody,
    StallInHandshake,
    Status,
    TlsErrorAfterRequest,
)
from anymail_retry.testing.certificate import Authority, authority
from anymail_retry.verdict import Phase, Verdict

from .clock import FakeClock
from .mail import Plain, Retrying, backend, failure, message, network_error, send

if TYPE_CHECKING:
    from collections.abc import Callable

# --- The same exceptions as one attempt of Anymail's ---


@dataclass(frozen=True)
class Case:
    """A way to fail, and the class of requests' that it is caught as."""

    #: None: the ESP does not listen.
    fault: Fault | None
    caught_as: type[exceptions.RequestException]
    timeout: Any = 30
    options: dict[str, Any] = field(default_factory=dict)


#: Short where only a timeout ends it, and long where a busy machine shall not.
NO_CONNECTION, NO_ANSWER = (0.2, 30), (30, 0.2)

CASES = {
    "refused": Case(None, exceptions.ConnectionError),
    "no such host": Case(None, exceptions.ConnectionError, options={"api_url": "https://esp.invalid/"}),
    "handshake dropped": Case(DropInHandshake(), exceptions.SSLError),
    "handshake reset": Case(DropInHandshake(reset=True), exceptions.ConnectionError),
    "reset after the request": Case(ResetAfterRequest(), exceptions.ConnectionError),
    "dropped after the request": Case(AcceptThenDrop(), exceptions.ConnectionError),
    "no answer": Case(Stall(), exceptions.ReadTimeout, NO_ANSWER),
    "taken, no answer": Case(AcceptThenStall(), exceptions.ReadTimeout, NO_ANSWER),
    "TLS error after the request": Case(TlsErrorAfterRequest(), exceptions.SSLError),
    "200 with half a body": Case(HalfBody(), exceptions.ChunkedEncodingError),
    "200 and the body stalls": Case(StallInBody(), exceptions.ConnectionError, NO_ANSWER),
    "503 with half a body": Case(HalfBody(status=503, accepted=False), exceptions.ChunkedEncodingError),
    "200 with broken gzip": Case(
        Status(200, body=b"no gzip", headers={"Content-Encoding": "gzip"}), exceptions.ContentDecodingError
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest, esp: LocalEsp) -> Case:
    found: Case = request.param
    if found.fault is None:
        esp.stop_listening()
    else:
        esp.script(Rule(found.fault))
    return found


def test_a_failure_is_caught_as_with_plain_anymail(esp: LocalEsp, case: Case) -> None:
    options = {**esp.options(), "requests_timeout": case.timeout, **case.options}
    assert network_error(Plain(**options)) is case.caught_as
    assert network_error(Retrying(**options, total_retries=0)) is case.caught_as


def test_and_so_is_the_last_of_many_tries(esp: LocalEsp, case: Case, clock: FakeClock) -> None:
    options = {**esp.options(), "requests_timeout": case.timeout, **case.options}
    retrying = Retrying(**options, total_retries=2, read_retries=2, other_retries=2, retry_deadline=None)
    retrying.retry_clock = clock
    sent = message()
    with pytest.raises(case.caught_as) as raised:
        retrying.send_messages([sent])
    assert type(raised.value).__bases__ == (AnymailRequestsAPIError, case.caught_as)
    answered = any(attempt.phase is Phase.ANSWERED for attempt in sent.retry_history)
    assert len(sent.retry_history) == (1 if answered else 3), "a status line of ours to keep ends the sending"


def test_a_stalled_handshake_is_a_connect_timeout(esp: LocalEsp) -> None:
    """The one difference: a read timeout, as urllib3 has it, would say that the message may have been taken.

    Both are caught as ``requests.Timeout``.
    """
    esp.script(Rule(StallInHandshake()))
    options = {**esp.options(), "requests_timeout": NO_CONNECTION}
    assert network_error(Plain(**options)) is exceptions.ReadTimeout
    assert network_error(Retrying(**options, total_retries=0)) is exceptions.ConnectTimeout
    assert network_error(Retrying(**options, total_retries=2, retry_backoff_factor=0)) is exceptions.ConnectTimeout


def test_a_black_hole_is_a_connect_timeout(esp: LocalEsp) -> None:
    esp.black_hole()
    options = {**esp.options(), "requests_timeout": NO_CONNECTION}
    assert network_error(Plain(**options)) is exceptions.ConnectTimeout
    assert network_error(Retrying(**options, total_retries=2, retry_backoff_factor=0)) is exceptions.ConnectTimeout


def test_an_untrusted_certificate_is_an_ssl_error_and_tried_once(
    esp: LocalEsp, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert network_error(Plain(**esp.options())) is exceptions.SSLError
    outcome = backend(esp, clock).deliver(message(), Delivery())
    assert isinstance(outcome.error, exceptions.SSLError)
    assert outcome.verdict is Verdict.BLOCKED
    assert [attempt.phase for attempt in outcome.attempts] == [Phase.CERTIFICATE]


class ForAnotherHost(Authority):
    """Its servers are somebody else."""

    def server_context(self, host: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA.from_pem(self.certificate, self.private_key).issue_cert("another.example").configure_cert(context)
        return context


@pytest.mark.parametrize("by_python", [True, False], ids=["by Python's ssl", "by urllib3, as with LibreSSL"])
def test_another_hosts_certificate_is_not_trusted_either(
    local_esp: Callable[..., LocalEsp], monkeypatch: pytest.MonkeyPatch, by_python: bool
) -> None:
    ours = authority()
    esp = local_esp("mandrill", authority=ForAnotherHost(ours.certificate, ours.private_key, ours.file))
    monkeypatch.setattr(urllib3.util.ssl_, "HAS_NEVER_CHECK_COMMON_NAME", by_python)
    outcome = backend(esp).deliver(message(), Delivery())
    assert isinstance(outcome.error, exceptions.SSLError)
    assert outcome.verdict is Verdict.BLOCKED
    assert [attempt.phase for attempt in outcome.attempts] == [Phase.CERTIFICATE]


def test_a_ca_bundle_that_is_garbage_has_surely_sent_nothing(
    esp: LocalEsp, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "ca.pem"
    broken.write_text("no certificate")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(broken))
    outcome = backend(esp, clock, total_retries=1).deliver(message(), Delivery())
    assert isinstance(outcome.error, exceptions.SSLError)
    assert outcome.verdict is Verdict.REFUSED
    assert [attempt.phase for attempt in outcome.attempts] == [Phase.CONNECT] * 2


@pytest.mark.parametrize("fault", [DropInHandshake(), DropInHandshake(reset=True)], ids=["FIN", "RST"])
def test_a_dropped_handshake_is_surely_refused_and_tried_again(esp: LocalEsp, clock: FakeClock, fault: Fault) -> None:
    """urllib3 takes it for a read error, which would be ambiguous."""
    esp.script(fault, fault)
    sent = send(backend(esp, clock))
    assert [attempt.verdict for attempt in sent.retry_history] == [
        Verdict.REFUSED,
        Verdict.REFUSED,
        Verdict.DELIVERED,
    ]


def test_a_broken_client_certificate_was_surely_not_sent(esp: LocalEsp, clock: FakeClock, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")

    class WithCertificate(Retrying):
        def create_session(self) -> requests.Session:
            session = super().create_session()
            session.cert = str(broken)
            return session

    sender = WithCertificate(**esp.options())
    sender.retry_clock = clock
    outcome = sender.deliver(message(), Delivery())
    assert isinstance(outcome.error, exceptions.SSLError)
    assert outcome.verdict is Verdict.REFUSED


@pytest.mark.parametrize("read_retries", [0, False])
def test_no_read_retries_is_a_read_timeout_either_way(esp: LocalEsp, read_retries: Any) -> None:
    """With urllib3 itself 0 is a ``ConnectionError``, which ``except requests.Timeout`` does not catch."""
    esp.script(Rule(Stall()))
    sender = backend(esp, read_retries=read_retries, requests_timeout=NO_ANSWER)
    assert network_error(sender) is exceptions.ReadTimeout
    assert len(esp.requests) == 1


# --- What they carry ---


@pytest.mark.parametrize(
    ("status", "tries"),
    [(429, 4), (400, 1), (401, 1), (422, 1), (500, 1), (503, 1)],
)
def test_status_and_body_reach_the_caller(esp: LocalEsp, clock: FakeClock, status: int, tries: int) -> None:
    esp.script(Rule(Status(status, body={"name": "TheName", "message": "The words"}, headers={"X-Trace": "17"})))
    error = failure(backend(esp, clock))
    assert type(error) is AnymailRequestsAPIError
    assert error.status_code == status
    assert error.response.json() == {"name": "TheName", "message": "The words"}
    assert error.response.headers["X-Trace"] == "17"
    assert "The words" in str(error)
    assert len(esp.requests) == tries


@dataclass(frozen=True)
class BreaksOff(Fault):
    """A 429 of 16 bytes, of which 7 come."""

    def apply(self, exchange: Exchange) -> None:
        exchange.write(b'HTTP/1.1 429 Too Many Requests\r\nContent-Length: 16\r\n\r\n{"name"')


@dataclass(frozen=True)
class Chunked(Fault):
    """A 429 without a length. The server closes the connection after it, and has to say so, or the next try may be
    sent into the close."""

    def apply(self, exchange: Exchange) -> None:
        head = b"HTTP/1.1 429 Too Many Requests\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        exchange.write(head + b'9\r\n{"name": \r\n7\r\n"Slow"}\r\n0\r\n\r\n')


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            Status(429, gzip.compress(b'{"name": "Slow"}'), headers={"Content-Encoding": "gzip"}), id="compressed"
        ),
        pytest.param(Chunked(), id="chunked"),
        pytest.param(Status(429, b'{"name": "Slow"}'), id="plain"),
    ],
)
def test_a_body_that_was_read_to_judge_it_can_be_read_by_the_caller(
    esp: LocalEsp, clock: FakeClock, fault: Fault
) -> None:
    esp.script(Rule(fault))
    error = failure(backend(esp, clock, total_retries=1))
    assert error.response.json() == {"name": "Slow"}
    assert error.response.raw.version == 11
    assert len(esp.requests) == 2


def test_a_body_that_was_read_keeps_its_headers(esp: LocalEsp, clock: FakeClock) -> None:
    body = gzip.compress(b"{}")
    esp.script(Rule(Status(429, body, headers={"Content-Encoding": "gzip"})))
    headers = failure(backend(esp, clock)).response.headers
    assert (headers["Content-Encoding"], headers["Content-Length"]) == ("gzip", str(len(body)))


@pytest.mark.parametrize(
    ("fault", "timeout"),
    [
        pytest.param(HalfBody(), 30, id="half a body"),
        pytest.param(StallInBody(), NO_ANSWER, id="a body that stalls"),
        pytest.param(Garbage200(), 30, id="garbage"),
    ],
)
def test_a_2xx_status_line_ends_the_sending(esp: LocalEsp, clock: FakeClock, fault: Fault, timeout: Any) -> None:
    """Not even where everything may be tried again: the message is taken, whatever its answer looks like."""
    esp.script(fault)
    sender = backend(
        esp, clock, total_retries=9, read_retries=9, other_retries=9, requests_timeout=timeout, retry_deadline=None
    )
    outcome = sender.deliver(message(), Delivery())
    assert len(esp.requests) == 1
    assert (outcome.http_status, outcome.reason, outcome.hold) == (200, "accepted?", True)


def test_an_answer_that_breaks_off_hangs_on_the_error(esp: LocalEsp) -> None:
    """With plain Anymail nobody can tell it from no answer."""
    esp.script(HalfBody())
    assert failure(backend(esp)).__cause__.response.status_code == 200


def test_the_status_of_an_answer_that_breaks_off_reaches_the_verdict(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(HalfBody(status=401, accepted=False))
    outcome = backend(esp, clock).deliver(message(), Delivery())
    assert (outcome.verdict, outcome.http_status) == (Verdict.BLOCKED, 401)


def test_an_answer_that_breaks_off_is_tried_again_by_its_status(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(HalfBody(status=429, accepted=False))
    sent = send(backend(esp, clock))
    assert [attempt.status for attempt in sent.retry_history] == [429, 200]


def test_an_answer_that_breaks_off_does_not_come_with_the_body_of_the_one_before(
    esp: LocalEsp, clock: FakeClock
) -> None:
    esp.script(Status(429, b'{"name":"First"}'), BreaksOff())
    outcome = backend(esp, clock, total_retries=1).deliver(message(), Delivery())
    assert outcome.http_status == 429
    assert "First" not in str(outcome.error) + outcome.answer


def test_a_body_can_say_that_trying_again_does_not_help(
    local_esp: Callable[..., LocalEsp], clock: FakeClock, settings: Any
) -> None:
    settings.EMAIL_FALLBACK_QUEUE = False
    esp = local_esp("resend")
    sender = anymail_retry.backends.RetryableResendEmailBackend(**esp.options())
    sender.retry_clock = clock
    esp.script(Rule(Status(429, kind="quota")))
    assert failure(sender).status_code == 429
    assert len(esp.requests) == 1, "a quota"
    esp.script(Rule(Status(429)))
    assert failure(sender).status_code == 429
    assert len(esp.requests) == 1 + 4, "a rate"
    esp.script(Rule(Status(429, kind="quota")))
    sender = anymail_retry.backends.RetryableResendEmailBackend(**esp.options(), http_status_retryable=[429])
    sender.retry_clock = clock
    assert failure(sender).status_code == 429
    assert len(esp.requests) == 1 + 4 + 4, "the user's own list is meant as it stands"


# --- Redirects ---


@pytest.mark.parametrize("code", [301, 302, 303])
def test_a_redirect_that_would_lose_the_post_is_not_followed(esp: LocalEsp, code: int) -> None:
    """It would become a GET, whose 200 looks like success."""
    esp.script(Redirect(code))
    error = failure(backend(esp))
    assert error.status_code == code
    assert [request.method for request in esp.requests] == ["POST"]


@pytest.mark.parametrize("code", [307, 308])
def test_a_redirect_that_keeps_the_post_is_followed(local_esp: Callable[..., LocalEsp], code: int) -> None:
    old, new = local_esp("mandrill"), local_esp("mandrill")
    old.script(Redirect(code, new.url + "/messages/send.json"))
    send(backend(old))
    (first,), (second,) = old.requests, new.requests
    assert (second.method, second.body) == ("POST", first.body)
    assert new.counts.accepted == 1


def test_after_a_redirect_failures_are_tried_again(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Redirect(308), Status(429), ResetAfterRequest())
    outcome = backend(esp, clock).deliver(message(), Delivery())
    assert [attempt.status for attempt in outcome.attempts] == [308, 429, None]
    assert outcome.verdict is Verdict.AMBIGUOUS


def test_a_redirect_to_where_nobody_listens_has_surely_sent_nothing(esp: LocalEsp, clock: FakeClock) -> None:
    """The answer of the first hop says nothing of the second."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    esp.script(Redirect(308, f"https://127.0.0.1:{port}/"))
    outcome = backend(esp, clock, total_retries=0).deliver(message(), Delivery())
    assert (outcome.verdict, outcome.http_status) == (Verdict.REFUSED, None)
    assert [attempt.phase for attempt in outcome.attempts] == [Phase.ANSWERED, Phase.CONNECT]


def test_redirects_without_end_are_requests_error(esp: LocalEsp) -> None:
    esp.script(Rule(Redirect(307)))
    assert network_error(backend(esp)) is exceptions.TooManyRedirects


# --- What the user sees ---


def test_each_retry_is_one_warning(esp: LocalEsp, clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    esp.script(Status(429, retry_after=3), ResetAfterRequest(), DropInHandshake())
    # DropInHandshake meets the connection, so it comes first
    send(backend(esp, clock, read_retries=1))
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("anymail_retry.transport", "WARNING", "Mandrill: NewConnectionError; waiting 0.0 s before try 2 of 4"),
        ("anymail_retry.transport", "WARNING", "Mandrill: HTTP 429; waiting 3.0 s before try 3 of 4"),
        ("anymail_retry.transport", "WARNING", caplog.records[-1].message),
    ]
    assert caplog.records[-1].message.startswith("Mandrill: ProtocolError; waiting 2.")
    assert caplog.records[-1].message.endswith(" s before try 4 of 4")


def test_without_a_limit_none_is_named(esp: LocalEsp, clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    esp.script(Status(429, retry_after=3))
    send(backend(esp, clock, total_retries=None))
    assert caplog.messages == ["Mandrill: HTTP 429; waiting 3.0 s before try 2"]


def test_no_secret_and_nothing_of_the_message_is_logged(
    local_esp: Callable[..., LocalEsp], clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    esp = local_esp("mandrill", api_keys=["THE-SECRET-KEY"])
    esp.script(Status(429), ResetAfterRequest(), Rule(Status(503, body="quoting THE-SECRET-KEY: Subject, Body")))
    failure(backend(esp, clock, read_retries=1, http_status_retryable=[429, 503]))
    logged = "\n".join(
        record.getMessage() for record in caplog.records if not record.name.startswith("anymail_retry.testing")
    )
    assert logged.count("waiting") == 3
    for secret in ("THE-SECRET-KEY", "Subject", "Body", "to@example.com", "from@example.com"):
        assert secret not in logged


def test_urllib3s_warning_of_others_retries_stays(esp: LocalEsp, caplog: pytest.LogCaptureFixture) -> None:
    """Ours says more, so urllib3's second one is dropped; whoever else retries still gets theirs."""
    esp.script(ResetAfterRequest())
    session = requests.Session()
    session.mount("https://", requests.adapters.HTTPAdapter(max_retries=urllib3.Retry(1, allowed_methods=None)))
    with session:
        session.post(esp.url)
    assert [record.name for record in caplog.records if record.levelno == logging.WARNING] == ["urllib3.connectionpool"]


def test_a_message_knows_its_tries(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Status(429, retry_after=3), ResetAfterRequest())
    sent = send(backend(esp, clock, read_retries=1, retry_backoff_jitter=0))
    assert [
        (attempt.phase, attempt.verdict, attempt.status, attempt.error, attempt.retry_after, attempt.waited)
        for attempt in sent.retry_history
    ] == [
        (Phase.ANSWERED, Verdict.REFUSED, 429, "", 3.0, 3.0),
        (Phase.SENT, Verdict.AMBIGUOUS, None, "ProtocolError", None, 1.0),
        (Phase.ANSWERED, Verdict.DELIVERED, 200, "", None, None),
    ]


def test_each_message_knows_its_own_tries_only(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Status(429))
    sender = backend(esp, clock)
    messages = [message(), message()]
    assert sender.send_messages(messages) == 2
    assert [[attempt.status for attempt in sent.retry_history] for sent in messages] == [[429, 200], [200]]


# --- The session of somebody else's code ---


def test_the_session_retries_for_other_requests_too(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Status(429))
    with backend(esp, clock).create_session() as session:
        assert session.post(esp.url + "/messages/send.json", data=json.dumps({"key": "k"})).status_code == 400
    assert [request.status for request in esp.requests] == [429, 400]


def test_a_streamed_answer_is_left_to_be_read(esp: LocalEsp) -> None:
    esp.script(Rule(Status(200, "streamed")))
    with backend(esp).create_session() as session, session.post(esp.url, stream=True) as answer:
        assert not answer.raw.closed
        assert answer.raw.read() == b"streamed"


@pytest.mark.parametrize("timeout", [urllib3.Timeout(30), 30, (30, 30), None])
def test_requests_forms_of_a_timeout_are_taken(esp: LocalEsp, timeout: Any) -> None:
    esp.script(Rule(Status(200)))
    with backend(esp).create_session() as session:
        assert session.post(esp.url, timeout=timeout).status_code == 200


@pytest.mark.parametrize("timeout", [(30,), (30, 30, 30), "30", 0])
def test_a_wrong_timeout_is_requests_error(esp: LocalEsp, timeout: Any) -> None:
    with backend(esp).create_session() as session, pytest.raises(ValueError, match=r"[Tt]imeout"):
        session.post(esp.url, timeout=timeout)


# --- Tools that stand in for the network in users' tests ---


def test_responses_still_intercepts(clock: FakeClock) -> None:
    sender = Retrying(api_key="k", api_url="https://esp.example/")
    with responses.RequestsMock() as mock:
        mock.post(
            "https://esp.example/messages/send.json", json=[{"email": "to@example.com", "status": "sent", "_id": "1"}]
        )
        sent = send(sender)
    assert sent.anymail_status.message_id == "1"
    assert [attempt.status for attempt in sent.retry_history] == [200]


def test_responses_sees_each_retry() -> None:
    sender = Retrying(api_key="k", api_url="https://esp.example/")
    with responses.RequestsMock() as mock:
        for _ in range(4):
            mock.post("https://esp.example/messages/send.json", status=429, json={"name": "Slow"})
        error = failure(sender)
        assert len(mock.calls) == 4
    assert error.status_code == 429
    assert error.response.json() == {"name": "Slow"}


def test_responses_tells_one_attempt_from_another() -> None:
    sender = Retrying(api_key="k", api_url="https://esp.example/")
    with responses.RequestsMock() as mock:
        mock.post("https://esp.example/messages/send.json", status=429)
        mock.post("https://esp.example/messages/send.json", json=[{"email": "to@example.com", "status": "sent"}])
        sent = send(sender)
    assert [(attempt.status, attempt.verdict) for attempt in sent.retry_history] == [
        (429, Verdict.REFUSED),
        (200, Verdict.DELIVERED),
    ]


def test_requests_mock_still_intercepts() -> None:
    sender = Retrying(api_key="k", api_url="https://esp.example/")
    with requests_mock.Mocker() as mock:
        mock.post("https://esp.example/messages/send.json", json=[{"email": "to@example.com", "status": "sent"}])
        send(sender)
        mock.post("https://esp.example/messages/send.json", status_code=503, text="down")
        error = failure(sender)
    assert (error.status_code, error.response.text) == (503, "down")


def test_vcrpy_records_and_replays(esp: LocalEsp, tmp_path: Path) -> None:
    cassette = tmp_path / "cassette.yaml"
    sender = backend(esp)
    send(sender)  # over a connection that stays open, which the cassette must not be passed by
    with vcr.use_cassette(cassette):
        recorded = send(sender)
    assert len(esp.requests) == 2
    with vcr.use_cassette(cassette) as played:
        replayed = send(sender)
        assert played.play_count == 1
    assert len(esp.requests) == 2
    assert replayed.anymail_status.message_id == recorded.anymail_status.message_id
    send(sender)
    assert len(esp.requests) == 3
