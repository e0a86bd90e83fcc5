"""The verdicts: what one answer means, how far a failed attempt came, and what a whole delivery came to."""

from __future__ import annotations

import json
import socket
import ssl
from http.client import RemoteDisconnected
from typing import Any, NamedTuple

import pytest
import requests
import urllib3
from anymail.exceptions import (
    AnymailAPIError,
    AnymailConfigurationError,
    AnymailError,
    AnymailInvalidAddress,
    AnymailRecipientsRefused,
    AnymailRequestsAPIError,
    AnymailSerializationError,
    AnymailUnsupportedFeature,
)
from django.core.exceptions import ImproperlyConfigured
from hypothesis import given
from hypothesis import strategies as st
from urllib3.util.ssl_match_hostname import CertificateError

from anymail_retry.exceptions import BodyChanged, CircuitOpen, InvalidIdempotencyKey
from anymail_retry.idempotency import IdempotencyKey
from anymail_retry.verdict import (
    ANSWER_LENGTH,
    IN_PROGRESS,
    Answer,
    AnswerRule,
    Attempt,
    EspFacts,
    Outcome,
    Phase,
    Verdict,
    causes,
    judge_answer,
    judge_delivery,
    phase_of,
)

DELIVERED, REFUSED, AMBIGUOUS = Verdict.DELIVERED, Verdict.REFUSED, Verdict.AMBIGUOUS
BLOCKED, PERMANENT = Verdict.BLOCKED, Verdict.PERMANENT


def answer(status: int, body: Any = "", **kwargs: Any) -> Answer:
    return Answer(status, body.encode() if isinstance(body, str) else json.dumps(body).encode(), **kwargs)


# --- Answers ---


@pytest.mark.parametrize(
    ("path", "found"),
    [
        pytest.param("code", [17], id="a field"),
        pytest.param("errors.0.code", ["a"], id="an item of a list"),
        pytest.param("errors.1.code", ["b"], id="another"),
        pytest.param("errors.2.code", [None], id="an item that is not there"),
        pytest.param("errors.x.code", [None], id="a name where there is a list"),
        pytest.param("code.deeper", [None], id="deeper than there is"),
        pytest.param("missing", [None], id="a field that is not there"),
        pytest.param("errors.*.code", ["a", "b", None], id="a field of every item, one without"),
        pytest.param("failed.*", ["x", "y"], id="every value of an object"),
        pytest.param("empty.*.code", [], id="every item of none"),
        pytest.param("code.*", [None], id="every item of what has none"),
    ],
)
def test_a_path_finds(path: str, found: list[Any]) -> None:
    body = {"code": 17, "errors": [{"code": "a"}, {"code": "b"}, {}], "failed": {"1": "x", "2": "y"}, "empty": []}
    assert answer(400, body).find(path) == found


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>", id="a page"),
        pytest.param(b'{"code": ', id="half of it"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(b"[" * 100_000, id="nested without end"),
        pytest.param(b'"code"', id="a bare text"),
    ],
)
def test_a_body_that_is_no_json_has_nothing_at_any_path(body: bytes) -> None:
    assert Answer(500, body).find("code") == [None]
    assert not AnswerRule(PERMANENT, path="code", unless=frozenset({"0"})).matches(Answer(500, body))


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        pytest.param(AnswerRule(BLOCKED, status=422), True, id="status"),
        pytest.param(AnswerRule(BLOCKED, status=400), False, id="another status"),
        pytest.param(AnswerRule(BLOCKED, path="code"), True, id="something at the path"),
        pytest.param(AnswerRule(BLOCKED, path="zero"), False, id="zero at the path"),
        pytest.param(AnswerRule(BLOCKED, path="code", values=frozenset({"405"})), True, id="a number as text"),
        pytest.param(AnswerRule(BLOCKED, path="code", values=frozenset({"406"})), False, id="another value"),
        pytest.param(AnswerRule(BLOCKED, path="nothing", values=frozenset({"None"})), True, id="null as text"),
        pytest.param(AnswerRule(BLOCKED, path="code", unless=frozenset({"0"})), True, id="not the exception"),
        pytest.param(AnswerRule(BLOCKED, path="zero", unless=frozenset({"0"})), False, id="the exception"),
        pytest.param(AnswerRule(BLOCKED, path="missing", unless=frozenset({"0"})), False, id="nothing there"),
        pytest.param(AnswerRule(BLOCKED, text="OUT OF credits"), True, id="text in any case"),
        pytest.param(AnswerRule(BLOCKED, text="phrase of"), True, id="text in the status line"),
        pytest.param(AnswerRule(BLOCKED, text="elsewhere"), False, id="another text"),
        pytest.param(AnswerRule(BLOCKED, path="code", text="elsewhere"), False, id="one of two conditions"),
        pytest.param(AnswerRule(BLOCKED, path="items.*.n", values=frozenset({"1", "2"})), True, id="every item"),
        pytest.param(AnswerRule(BLOCKED, path="items.*.n", values=frozenset({"1"})), False, id="not every item"),
        pytest.param(AnswerRule(BLOCKED, path="items.*.n", unless=frozenset({"2"})), False, id="one item excepted"),
        pytest.param(AnswerRule(BLOCKED, path="none.*.n", unless=frozenset({"2"})), False, id="no item at all"),
    ],
)
def test_a_rule_matches_when_all_its_conditions_hold(rule: AnswerRule, matches: bool) -> None:
    body = {"code": 405, "zero": 0, "message": "Out of Credits", "items": [{"n": 1}, {"n": 2}], "none": []}
    assert rule.matches(answer(422, {**body, "nothing": None}, phrase="Phrase of the line")) is matches


def test_the_first_rule_that_matches_decides_and_before_any_status() -> None:
    class Facts(EspFacts):
        answers = (
            AnswerRule(PERMANENT, path="name", values=frozenset({"Wrong"}), reason="first"),
            AnswerRule(BLOCKED, path="name", reason="second"),
        )

    assert judge_answer(answer(429, {"name": "Wrong"}), Facts) == (PERMANENT, "first")
    assert judge_answer(answer(200, {"name": "Other"}), Facts) == (BLOCKED, "second")
    assert judge_answer(answer(429, {}), Facts) == (REFUSED, "")


def response_of(status: int, content: Any, reason: Any = "Reason") -> requests.Response:
    response = requests.Response()
    response.status_code, response.reason, response._content = status, reason, content
    return response


def test_an_answer_is_read_from_requests_response() -> None:
    read = Answer.of(response_of(422, b'{"code": 1}'))
    assert read == Answer(422, b'{"code": 1}', "utf-8", "Reason")
    assert read is not None
    assert read.words == '{"code": 1}'


def test_a_broken_body_leaves_the_status() -> None:
    class Broken(requests.Response):
        @property
        def content(self) -> Any:
            raise requests.exceptions.ChunkedEncodingError("half")

    response = Broken()
    response.status_code = 200
    assert Answer.of(response) == Answer(200)


@pytest.mark.parametrize("nothing", [None, "text", object(), {}, {"ResponseMetadata": {}}, {"ResponseMetadata": None}])
def test_no_answer_is_read_from_what_is_none(nothing: Any) -> None:
    assert Answer.of(nothing) is None


def test_an_answer_is_read_from_what_boto3_parsed_without_its_headers() -> None:
    parsed = {
        "Error": {"Code": "Throttling", "Message": "..."},
        "ResponseMetadata": {"HTTPStatusCode": 400, "HTTPHeaders": {"secret": "x"}},
    }
    read = Answer.of(parsed)
    assert read is not None
    assert read.status == 400
    assert read.find("Error.Code") == ["Throttling"]
    assert "secret" not in read.text


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "no such charset", "undefined", "idna", "hex"])
@pytest.mark.parametrize("body", [b"\xe9" * 2000, b"." * 2000], ids=["no text", "text"])
def test_an_answer_in_any_charset_has_a_bounded_text(encoding: str, body: bytes) -> None:
    assert len(Answer(500, body, encoding).words) == 2000
    outcome = judge_delivery(EspFacts, error=api_error(500), answer=Answer(500, body, encoding), statuses=None)
    assert len(outcome.answer) == ANSWER_LENGTH


def test_the_status_line_speaks_where_there_is_no_body() -> None:
    assert Answer(500, b"", phrase="Cannot convert data from Null value").words == "Cannot convert data from Null value"


# --- How far an attempt came ---

REFUSED_CONNECTION = urllib3.exceptions.NewConnectionError(None, "refused")  # type: ignore[arg-type]  # no connection here
UNRESOLVED = urllib3.exceptions.NameResolutionError("esp.example", None, socket.gaierror(-2, "unknown"))  # type: ignore[arg-type]  # as above
RESET = urllib3.exceptions.ProtocolError("Connection aborted.", ConnectionResetError(104, "reset"))
STALLED = urllib3.exceptions.ReadTimeoutError(None, "/", "Read timed out.")  # type: ignore[arg-type]  # as above
UNTRUSTED = urllib3.exceptions.SSLError(ssl.SSLCertVerificationError(1, "self-signed certificate"))
BAD_RECORD = urllib3.exceptions.SSLError(ssl.SSLError(1, "bad record mac"))


def exhausted(reason: Exception) -> urllib3.exceptions.MaxRetryError:
    return urllib3.exceptions.MaxRetryError(None, "/", reason)  # type: ignore[arg-type]  # no pool here


def as_anymail_raises(error: Exception) -> AnymailError:
    """As ``anymail.backends.base_requests`` wraps what requests raises."""
    wrapper = type("AnymailRequestsAPIError", (AnymailRequestsAPIError, type(error)), {})
    try:
        raise wrapper("Error posting to https://esp.example/:") from error
    except AnymailError as raised:
        return raised


class BotocoreLike(Exception):
    """botocore's errors keep what they wrap among their keywords."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("Could not connect")
        self.kwargs = kwargs


PHASES = [
    pytest.param(REFUSED_CONNECTION, Phase.CONNECT, id="refused"),
    pytest.param(UNRESOLVED, Phase.CONNECT, id="unknown name"),
    pytest.param(urllib3.exceptions.ConnectTimeoutError("timed out"), Phase.CONNECT, id="connect timeout"),
    pytest.param(urllib3.exceptions.ProxyError("no", OSError("403")), Phase.CONNECT, id="proxy not reached"),
    pytest.param(urllib3.exceptions.ProxyError("no", REFUSED_CONNECTION), Phase.CONNECT, id="proxy refuses"),
    pytest.param(
        urllib3.exceptions.ProxyError("no", ConnectionRefusedError()), Phase.CONNECT, id="proxy refuses, bare"
    ),
    pytest.param(
        urllib3.exceptions.ProxyError("no", RemoteDisconnected()),
        Phase.SENT,
        id="dropped behind a proxy, by plain urllib3",
    ),
    pytest.param(
        urllib3.exceptions.ProxyError("no", ConnectionResetError()),
        Phase.SENT,
        id="reset behind a proxy, by plain urllib3",
    ),
    pytest.param(socket.gaierror(-3, "try again"), Phase.CONNECT, id="name look-up, bare"),
    pytest.param(UNTRUSTED, Phase.CERTIFICATE, id="untrusted certificate"),
    pytest.param(urllib3.exceptions.SSLError(CertificateError("no match")), Phase.CERTIFICATE, id="another host's"),
    pytest.param(urllib3.exceptions.ProxyError("no", UNTRUSTED), Phase.CERTIFICATE, id="the proxy's certificate"),
    pytest.param(RESET, Phase.SENT, id="reset"),
    pytest.param(STALLED, Phase.SENT, id="read timeout"),
    pytest.param(BAD_RECORD, Phase.SENT, id="TLS error after the request"),
    pytest.param(urllib3.exceptions.IncompleteRead(1, 2), Phase.SENT, id="half a body"),
    pytest.param(requests.ConnectTimeout(exhausted(REFUSED_CONNECTION)), Phase.CONNECT, id="wrapped twice"),
    pytest.param(requests.ConnectionError(exhausted(UNRESOLVED)), Phase.CONNECT, id="wrapped by requests"),
    pytest.param(requests.ConnectionError(exhausted(STALLED)), Phase.SENT, id="retries used up on read timeouts"),
    pytest.param(requests.exceptions.SSLError(exhausted(UNTRUSTED)), Phase.CERTIFICATE, id="certificate, wrapped"),
    pytest.param(requests.exceptions.ProxyError(exhausted(REFUSED_CONNECTION)), Phase.CONNECT, id="proxy refused"),
    pytest.param(requests.ConnectTimeout(), Phase.CONNECT, id="connect timeout without a cause"),
    pytest.param(requests.ReadTimeout(), Phase.SENT, id="read timeout without a cause"),
    pytest.param(requests.ConnectionError("?"), Phase.SENT, id="connection error without a cause"),
    pytest.param(as_anymail_raises(requests.ConnectionError(RESET)), Phase.SENT, id="as Anymail raises a reset"),
    pytest.param(
        as_anymail_raises(requests.ConnectionError(exhausted(REFUSED_CONNECTION))),
        Phase.CONNECT,
        id="as Anymail raises a refused connection",
    ),
    pytest.param(BotocoreLike(error=REFUSED_CONNECTION), Phase.CONNECT, id="by keyword: refused"),
    pytest.param(BotocoreLike(error=STALLED), Phase.SENT, id="by keyword: read timeout"),
    pytest.param(BotocoreLike(provider="env"), None, id="by keyword: nothing"),
    pytest.param(requests.exceptions.MissingSchema("no scheme"), None, id="no URL"),
    pytest.param(AnymailUnsupportedFeature("no"), None, id="Anymail's own"),
    pytest.param(ValueError("?"), None, id="anything else"),
]


@pytest.mark.parametrize(("error", "phase"), PHASES)
def test_an_error_tells_how_far_the_attempt_came(error: Exception, phase: Phase | None) -> None:
    assert phase_of(error) is phase


def test_errors_that_wrap_each_other_in_a_circle_are_met_once() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(causes(first)) == [first, second]


# --- A whole delivery ---


class Keyed(EspFacts):
    """An ESP with idempotency keys and with every way to answer to them."""

    answers = (
        AnswerRule(REFUSED, status=409, path="name", values=frozenset({"in_progress"}), reason=IN_PROGRESS),
        AnswerRule(BLOCKED, status=403, path="name", values=frozenset({"suspended"}), reason="account"),
    )
    idempotency = IdempotencyKey(
        place="header",
        name="Idempotency-Key",
        window=60,
        grammar=".+",
        duplicate=AnswerRule(DELIVERED, status=400, path="name", values=frozenset({"duplicate"})),
        conflict=AnswerRule(PERMANENT, status=409, path="name", values=frozenset({"other_body"})),
    )


class Says200(EspFacts):
    """An ESP whose 2xx may be a refusal, and for which a failed recipient is one for later."""

    answers = (
        AnswerRule(BLOCKED, status=200, path="code", values=frozenset({"suspended"}), reason="account"),
        AnswerRule(PERMANENT, status=200, path="status", unless=frozenset({"success"}), reason="refused"),
    )
    none_accepted = REFUSED


class Guesses(EspFacts):
    """An ESP of whose answers Anymail's parser makes "failed" where it does not understand them."""

    none_accepted = AMBIGUOUS


class Setup(Exception):
    """An error of a client library that is not set up."""


class Elsewhere(Exception):
    """An error of a client library before the request."""


class WithLibrary(EspFacts):
    configuration_errors = (Setup,)
    refused_errors = (Elsewhere,)


def api_error(status: int, cause: Exception | None = None) -> AnymailError:
    error = AnymailRequestsAPIError(response=response_of(status, b""))
    error.__cause__ = cause
    return error


def caused(cause: Exception) -> AnymailError:
    error = AnymailAPIError("wrapped")
    error.__cause__ = cause
    return error


READ_TIMEOUT = as_anymail_raises(requests.ReadTimeout(STALLED))
NO_CONNECTION = as_anymail_raises(requests.ConnectionError(exhausted(REFUSED_CONNECTION)))
WRONG_CERTIFICATE = as_anymail_raises(requests.exceptions.SSLError(UNTRUSTED))


class Delivery(NamedTuple):
    """What is known when a delivery is judged; and what must come of it."""

    verdict: Verdict
    reason: str = ""
    status: int | None = None
    body: Any = ""
    statuses: list[str | None] | None = None
    error: Exception | None = None
    facts: type[EspFacts] = EspFacts
    maybe_taken: bool = False
    key_is_live: bool = False
    key_from_user: bool = False
    hold: bool = False
    anticipated: bool = True


def judge(case: Delivery) -> Outcome:
    return judge_delivery(
        case.facts,
        error=case.error,
        answer=None if case.status is None else answer(case.status, case.body),
        statuses=case.statuses,
        maybe_taken=case.maybe_taken,
        key_is_live=case.key_is_live,
        key_from_user=case.key_from_user,
    )


def row(rule: str, verdict: Verdict, reason: str = "", **known: Any) -> Any:
    return pytest.param(Delivery(verdict, reason, **known), id=rule)


A_2XX_ENDS_THE_SENDING = [
    row("accepted", DELIVERED, status=200, statuses=["sent"]),
    row("accepted for one of two", DELIVERED, status=200, statuses=["rejected", "queued"]),
    row("accepted, status unknown", DELIVERED, status=202, statuses=["unknown"]),
    row("accepted, the parser knows no status", DELIVERED, status=202, statuses=[None]),
    row("accepted, then a receiver raised", DELIVERED, status=200, statuses=["sent"], error=ValueError("receiver")),
    row(
        "accepted, then a receiver was not set up",
        DELIVERED,
        status=200,
        statuses=["sent"],
        error=ImproperlyConfigured("receiver"),
    ),
    row(
        "accepted, then a receiver met a network error",
        DELIVERED,
        status=200,
        statuses=["sent"],
        error=ConnectionRefusedError("receiver's own"),
    ),
    row(
        "not understood",
        AMBIGUOUS,
        "accepted?",
        status=200,
        body="<html>",
        error=api_error(200),
        hold=True,
    ),
    row(
        "half a body",
        AMBIGUOUS,
        "accepted?",
        status=200,
        error=as_anymail_raises(requests.exceptions.ChunkedEncodingError("half")),
        hold=True,
    ),
    row("a stalled body", AMBIGUOUS, "accepted?", status=200, error=READ_TIMEOUT, hold=True),
    row(
        "no recipient in it",
        AMBIGUOUS,
        "accepted?",
        status=200,
        statuses=[],
        error=AnymailRecipientsRefused(),
        hold=True,
    ),
    row(
        "a fact: the account",
        BLOCKED,
        "account",
        status=200,
        body={"code": "suspended"},
        facts=Says200,
        error=api_error(200),
    ),
    row(
        "a fact: refused",
        PERMANENT,
        "refused",
        status=200,
        body={"status": "error"},
        facts=Says200,
        error=api_error(200),
    ),
    row(
        "every recipient refused",
        PERMANENT,
        "recipients refused",
        status=200,
        statuses=["rejected", "invalid"],
        error=AnymailRecipientsRefused(),
    ),
]

NO_RECIPIENT_ACCEPTED = [
    row("in silence", PERMANENT, "no recipient accepted", status=200, statuses=["failed"]),
    row("in silence, by a guess", AMBIGUOUS, "accepted?", status=200, statuses=["failed"], facts=Guesses, hold=True),
    row("all refused is no guess", PERMANENT, "recipients refused", status=200, statuses=["rejected"], facts=Guesses),
    row(
        "in silence, for later by a fact",
        REFUSED,
        "no recipient accepted",
        status=200,
        statuses=["failed"],
        facts=Says200,
    ),
    row(
        "some refused, some failed",
        REFUSED,
        "no recipient accepted",
        status=200,
        statuses=["rejected", "failed"],
        facts=Says200,
    ),
    row(
        "all refused is never for later",
        PERMANENT,
        "recipients refused",
        status=200,
        statuses=["rejected"],
        facts=Says200,
    ),
    row(
        "a fact about the answer goes before",
        BLOCKED,
        "account",
        status=200,
        body={"code": "suspended"},
        statuses=["failed"],
        facts=Says200,
    ),
    row("a 4xx that was sent in part", DELIVERED, status=400, statuses=["failed", "sent"]),
    row("a 4xx of which nothing was sent", PERMANENT, "no recipient accepted", status=400, statuses=["failed"]),
    row(
        "a 4xx: one address wrong, of the others nothing is known",
        PERMANENT,
        "recipients refused",
        status=422,
        statuses=["invalid", "unknown"],
    ),
    row("a 4xx with a rate limit", REFUSED, "no recipient accepted", status=429, statuses=["failed"]),
]

STATUSES = [
    row("rate limit", REFUSED, status=429, error=api_error(429)),
    row("undocumented 503", AMBIGUOUS, status=503, error=api_error(503)),
    row("internal error", AMBIGUOUS, status=500, error=api_error(500)),
    row("edge", AMBIGUOUS, status=524, error=api_error(524)),
    row("unknown 5xx", AMBIGUOUS, status=599, error=api_error(599)),
    row("wrong API key", BLOCKED, status=401, error=api_error(401)),
    row("a 403 is this message's", PERMANENT, status=403, error=api_error(403)),
    row(
        "but for a fact", BLOCKED, "account", status=403, body={"name": "suspended"}, facts=Keyed, error=api_error(403)
    ),
    row("wrong request", PERMANENT, status=422, error=api_error(422)),
    row("redirect that is not followed", PERMANENT, status=302, error=api_error(302)),
    row("status known, body broken", AMBIGUOUS, status=503, error=READ_TIMEOUT),
]

THE_WORST_ATTEMPT_COUNTS = [
    row("maybe taken, then refused connections", AMBIGUOUS, "no connection", error=NO_CONNECTION, maybe_taken=True),
    row("maybe taken, then 429", AMBIGUOUS, status=429, error=api_error(429), maybe_taken=True),
    row("maybe taken, then 401", AMBIGUOUS, status=401, error=api_error(401), maybe_taken=True),
    row("maybe taken, then the breaker", AMBIGUOUS, "circuit open", error=CircuitOpen("open"), maybe_taken=True),
    row(
        "maybe taken, then wrong",
        AMBIGUOUS,
        "maybe taken, then: 422",
        status=422,
        error=api_error(422),
        maybe_taken=True,
        hold=True,
    ),
    row(
        "maybe taken, then all refused",
        AMBIGUOUS,
        "maybe taken, then: recipients refused",
        status=200,
        statuses=["rejected"],
        error=AnymailRecipientsRefused(),
        maybe_taken=True,
        hold=True,
    ),
    row(
        "maybe taken, then a message that cannot be sent",
        AMBIGUOUS,
        "maybe taken, then: AnymailUnsupportedFeature",
        error=AnymailUnsupportedFeature("no"),
        maybe_taken=True,
        key_is_live=True,
        hold=True,
    ),
    row(
        "maybe taken, then an untrusted certificate",
        AMBIGUOUS,
        "certificate not trusted",
        error=WRONG_CERTIFICATE,
        maybe_taken=True,
    ),
    row("maybe taken, then accepted", DELIVERED, status=200, statuses=["sent"], maybe_taken=True),
    row(
        "an answer under the live key settles it",
        PERMANENT,
        status=422,
        error=api_error(422),
        facts=Keyed,
        maybe_taken=True,
        key_is_live=True,
    ),
    row(
        "a rate limit under the live key does not",
        AMBIGUOUS,
        status=429,
        error=api_error(429),
        facts=Keyed,
        maybe_taken=True,
        key_is_live=True,
    ),
    row(
        "a blocked account under the live key does not",
        AMBIGUOUS,
        status=401,
        error=api_error(401),
        facts=Keyed,
        maybe_taken=True,
        key_is_live=True,
    ),
    row(
        "in progress under the live key",
        AMBIGUOUS,
        IN_PROGRESS,
        status=409,
        body={"name": "in_progress"},
        error=api_error(409),
        facts=Keyed,
        maybe_taken=True,
        key_is_live=True,
    ),
]

DUPLICATES_AND_CONFLICTS = [
    row(
        "duplicate after maybe taken",
        DELIVERED,
        "duplicate answer",
        status=400,
        body={"name": "duplicate"},
        statuses=["queued"],
        facts=Keyed,
        maybe_taken=True,
    ),
    row(
        "duplicate after maybe taken, not parsed",
        DELIVERED,
        "duplicate answer",
        status=400,
        body={"name": "duplicate"},
        error=api_error(400),
        facts=Keyed,
        maybe_taken=True,
    ),
    row(
        "duplicate of the user's own key",
        DELIVERED,
        "duplicate answer",
        status=400,
        body={"name": "duplicate"},
        error=api_error(400),
        facts=Keyed,
        key_from_user=True,
    ),
    row(
        "duplicate after sure refusals",
        REFUSED,
        "key used up",
        status=400,
        body={"name": "duplicate"},
        error=api_error(400),
        facts=Keyed,
    ),
    row(
        "other body after maybe taken",
        AMBIGUOUS,
        "key conflict",
        status=409,
        body={"name": "other_body"},
        error=api_error(409),
        facts=Keyed,
        maybe_taken=True,
        hold=True,
    ),
    row(
        "other body the first time",
        PERMANENT,
        "key conflict",
        status=409,
        body={"name": "other_body"},
        error=api_error(409),
        facts=Keyed,
        key_from_user=True,
    ),
    row(
        "in progress",
        REFUSED,
        IN_PROGRESS,
        status=409,
        body={"name": "in_progress"},
        error=api_error(409),
        facts=Keyed,
        key_from_user=True,
    ),
    row(
        "no such answer without keys",
        PERMANENT,
        status=400,
        body={"name": "duplicate"},
        error=api_error(400),
        maybe_taken=False,
    ),
    row(
        "body changed before the request",
        AMBIGUOUS,
        "body changed",
        error=BodyChanged("changed"),
        facts=Keyed,
        maybe_taken=True,
        hold=True,
    ),
    row(
        "the user's key is not in the grammar",
        PERMANENT,
        "InvalidIdempotencyKey",
        error=InvalidIdempotencyKey("no"),
        facts=Keyed,
    ),
]

WITHOUT_AN_ANSWER = [
    row("no connection", REFUSED, "no connection", error=NO_CONNECTION),
    row("read timeout", AMBIGUOUS, "no answer", error=READ_TIMEOUT),
    row("untrusted certificate", BLOCKED, "certificate not trusted", error=WRONG_CERTIFICATE),
    row("breaker open", REFUSED, "circuit open", error=CircuitOpen("open")),
    row("recipients refused", PERMANENT, "AnymailRecipientsRefused", error=AnymailRecipientsRefused()),
    row("wrong address", PERMANENT, "AnymailInvalidAddress", error=AnymailInvalidAddress("no")),
    row("unsupported feature", PERMANENT, "AnymailUnsupportedFeature", error=AnymailUnsupportedFeature("no")),
    row("cannot be serialized", PERMANENT, "AnymailSerializationError", error=AnymailSerializationError("no")),
    row("another of Anymail's errors", PERMANENT, "AnymailError", error=AnymailError("unknown sender domain")),
    row(
        "the client library failed before the request",
        REFUSED,
        "not sent",
        error=caused(Elsewhere()),
        facts=WithLibrary,
    ),
]

NEVER_QUEUED = [
    row("a setting", BLOCKED, "configuration", error=ImproperlyConfigured("no"), anticipated=False),
    row("one of Anymail's", BLOCKED, "configuration", error=AnymailConfigurationError("no"), anticipated=False),
    row(
        "no scheme",
        BLOCKED,
        "configuration",
        error=as_anymail_raises(requests.exceptions.MissingSchema("?")),
        anticipated=False,
    ),
    row(
        "a wrong URL",
        BLOCKED,
        "configuration",
        error=as_anymail_raises(requests.exceptions.InvalidURL("?")),
        anticipated=False,
    ),
    row(
        "a wrong header",
        BLOCKED,
        "configuration",
        error=as_anymail_raises(requests.exceptions.InvalidHeader("?")),
        anticipated=False,
    ),
    row(
        "a client library that is not set up",
        BLOCKED,
        "configuration",
        error=caused(Setup()),
        facts=WithLibrary,
        anticipated=False,
    ),
    row("a bug", PERMANENT, "error: KeyError", error=KeyError("x"), hold=True, anticipated=False),
    row(
        "a file of an attachment",
        PERMANENT,
        "error: FileNotFoundError",
        error=FileNotFoundError("lån.pdf"),
        hold=True,
        anticipated=False,
    ),
    row(
        "the network, in a receiver",
        PERMANENT,
        "error: ConnectionRefusedError",
        error=ConnectionRefusedError("redis"),
        hold=True,
        anticipated=False,
    ),
    row(
        "requests, in a receiver",
        PERMANENT,
        "error: ReadTimeout",
        error=requests.ReadTimeout("some API"),
        hold=True,
        anticipated=False,
    ),
]


@pytest.mark.parametrize(
    "case",
    [
        *A_2XX_ENDS_THE_SENDING,
        *NO_RECIPIENT_ACCEPTED,
        *STATUSES,
        *THE_WORST_ATTEMPT_COUNTS,
        *DUPLICATES_AND_CONFLICTS,
        *WITHOUT_AN_ANSWER,
        *NEVER_QUEUED,
    ],
)
def test_a_delivery_comes_to(case: Delivery) -> None:
    outcome = judge(case)
    assert (outcome.verdict, outcome.reason) == (case.verdict, case.reason)
    assert (outcome.hold, outcome.anticipated) == (case.hold, case.anticipated)
    assert outcome.error is case.error
    assert outcome.http_status == case.status


@pytest.mark.parametrize("case", NEVER_QUEUED)
def test_configuration_and_programming_errors_are_never_queued(case: Delivery) -> None:
    assert not judge(case).may_be_queued


@pytest.mark.parametrize(
    ("outcome", "may_be_queued"),
    [
        pytest.param(Outcome(REFUSED), True, id="refused"),
        pytest.param(Outcome(AMBIGUOUS), True, id="ambiguous"),
        pytest.param(Outcome(BLOCKED), True, id="blocked"),
        pytest.param(Outcome(PERMANENT), False, id="permanent"),
        pytest.param(Outcome(DELIVERED), False, id="delivered"),
        pytest.param(Outcome(None), False, id="cancelled"),
        pytest.param(Outcome(AMBIGUOUS, hold=True), False, id="a person must look"),
        pytest.param(Outcome(BLOCKED, anticipated=False), False, id="anticipated nowhere"),
    ],
)
def test_what_later_sending_can_cure_may_be_queued(outcome: Outcome, may_be_queued: bool) -> None:
    assert outcome.may_be_queued is may_be_queued


def test_neither_answer_nor_error_has_no_verdict() -> None:
    with pytest.raises(ValueError, match="no verdict"):
        judge(Delivery(DELIVERED))


def test_the_last_attempts_retry_after_goes_with_the_outcome() -> None:
    attempts = (
        Attempt(Phase.ANSWERED, REFUSED, 429, retry_after=1.0),
        Attempt(Phase.ANSWERED, REFUSED, 429, retry_after=3600.0),
    )
    outcome = judge_delivery(EspFacts, error=api_error(429), answer=answer(429), statuses=None, attempts=attempts)
    assert outcome.retry_after == 3600.0
    assert outcome.attempts == attempts


def test_an_open_breaker_says_when_to_come_again() -> None:
    assert judge(Delivery(REFUSED, error=CircuitOpen("open", retry_after=17.0))).retry_after == 17.0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(
            AnymailUnsupportedFeature("Postal does not support tags"), "Postal does not support tags", id="a refusal"
        ),
        pytest.param(InvalidIdempotencyKey("17 is no UUID"), "17 is no UUID", id="a refusal of ours"),
        pytest.param(CircuitOpen("not tried"), "not tried", id="an open breaker"),
        pytest.param(caused(ValueError("the cause")), "the cause", id="a cause"),
        pytest.param(AnymailAPIError("POST https://key@esp.example/"), "AnymailAPIError", id="no cause"),
    ],
)
def test_an_error_is_told_without_the_text_that_may_quote_the_request(error: Exception, words: str) -> None:
    assert judge(Delivery(PERMANENT, error=error)).answer == words


def test_the_esps_own_words_are_bounded() -> None:
    outcome = judge(Delivery(PERMANENT, status=400, body="x" * 10_000, error=api_error(400)))
    assert outcome.answer == "x" * ANSWER_LENGTH


@pytest.mark.parametrize("before", range(ANSWER_LENGTH - 12, ANSWER_LENGTH + 1))
def test_a_secret_is_masked_wherever_the_words_are_cut(before: int) -> None:
    error = caused(ValueError("x" * before + "Key-0123456 is wrong"))
    case = {"statuses": None, "secrets": ["Key-0123456"]}
    for outcome in (
        judge_delivery(EspFacts, error=error, answer=answer(401, str(error.__cause__)), **case),
        judge_delivery(EspFacts, error=error, answer=None, **case),
    ):
        assert outcome.answer == ("x" * before + "*** is wrong")[:ANSWER_LENGTH]


# --- For whatever may happen ---

RECIPIENTS = st.none() | st.lists(st.sampled_from(["sent", "queued", "rejected", "invalid", "failed", "unknown", None]))
ERRORS = st.sampled_from(
    [
        READ_TIMEOUT,
        NO_CONNECTION,
        WRONG_CERTIFICATE,
        api_error(500),
        AnymailRecipientsRefused(),
        AnymailUnsupportedFeature("no"),
        CircuitOpen("open"),
        BodyChanged("changed"),
        ImproperlyConfigured("no"),
        KeyError("x"),
        OSError("x"),
    ]
)
BODIES = st.sampled_from(
    ["", "<html>", {"name": "duplicate"}, {"name": "other_body"}, {"name": "in_progress"}, {"code": "suspended"}]
)
DELIVERIES = st.builds(
    Delivery,
    verdict=st.just(DELIVERED),
    status=st.none() | st.integers(100, 599),
    body=BODIES,
    statuses=RECIPIENTS,
    error=ERRORS,
    facts=st.sampled_from([EspFacts, Keyed, Says200, WithLibrary]),
    maybe_taken=st.booleans(),
    key_is_live=st.booleans(),
    key_from_user=st.booleans(),
)


@given(DELIVERIES)
def test_maybe_taken_is_never_forgotten_without_a_live_key(case: Delivery) -> None:
    """Once the ESP may have it, only "it has it", a person, or an answer under the live key can end that."""
    case = case._replace(maybe_taken=True, key_is_live=False)
    outcome = judge(case)
    if outcome.verdict is DELIVERED or outcome.hold or not outcome.anticipated:
        return
    assert outcome.verdict is AMBIGUOUS


@given(DELIVERIES)
def test_a_2xx_is_sent_again_only_where_a_fact_says_that_nothing_was_taken(case: Delivery) -> None:
    case = case._replace(status=200, facts=EspFacts)
    assert not judge(case).may_be_queued


@given(DELIVERIES)
def test_a_2xx_that_names_an_accepted_recipient_is_delivered_whatever_else_happened(case: Delivery) -> None:
    case = case._replace(status=200, statuses=[*(case.statuses or []), "queued"])
    assert judge(case).verdict is DELIVERED


@given(DELIVERIES)
def test_what_is_held_is_never_queued_and_every_verdict_keeps_its_error(case: Delivery) -> None:
    outcome = judge(case)
    assert not (outcome.hold and outcome.may_be_queued)
    assert outcome.error is case.error
    assert len(outcome.answer) <= ANSWER_LENGTH


@given(st.integers(100, 599), st.binary(max_size=200))
def test_any_answer_has_a_verdict(status: int, body: bytes) -> None:
    verdict, _ = judge_answer(Answer(status, body), Keyed)
    assert (verdict is DELIVERED) is (200 <= status < 300)
