"""Amazon SES by real boto3 against a local server: botocore's retries by our settings, and the verdicts."""

from __future__ import annotations

import functools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, NamedTuple

import botocore.endpoint
import botocore.session
import pytest
from anymail.exceptions import AnymailAPIError
from anymail.message import AnymailMessage
from botocore.config import Config
from botocore.exceptions import ClientError, NoCredentialsError
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from anymail_retry.backends.amazon_ses import READ_TIMEOUT, EmailBackend
from anymail_retry.delivery import Delivery, deliver
from anymail_retry.testing import LocalEsp
from anymail_retry.transport.mixins import DeliveryMixin
from anymail_retry.verdict import Outcome, Phase, Verdict
from tests.transport.clock import FakeClock
from tests.transport.servers import forward_proxy, serving

DELIVERED, REFUSED, AMBIGUOUS = Verdict.DELIVERED, Verdict.REFUSED, Verdict.AMBIGUOUS
BLOCKED, PERMANENT = Verdict.BLOCKED, Verdict.PERMANENT


class Step(NamedTuple):
    """What SES does with one request."""

    status: int
    code: str
    body: Any
    headers: dict[str, str] = {}  # never changed


OK = Step(200, "", {"MessageId": "0100"})
GARBAGE = Step(200, "", "<html>")
DROP = Step(0, "drop", None)
STALL = Step(0, "stall", None)


def failure(status: int, code: str, message: str = "...", **headers: str) -> Step:
    return Step(status, code, {"message": message}, {name.replace("_", "-"): value for name, value in headers.items()})


def bulk(*statuses: str) -> Step:
    entries = [{"Status": status, "MessageId": "0100"} for status in statuses]
    return Step(200, "", {"BulkEmailEntryResults": entries})


RATE = failure(429, "TooManyRequestsException", "Too many requests")
DAILY_QUOTA = failure(400, "ThrottlingException", "Daily message quota exceeded.")
INTERNAL = failure(500, "InternalServiceErrorException")


class LocalSes(ThreadingHTTPServer):
    """Answers step by step as told, and then as a healthy SES does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.steps: list[Step] = []
        self.requests: list[str] = []
        self.agents: list[str] = []
        #: Called when a request has been read.
        self.meanwhile: Callable[[], object] = lambda: None
        self.done = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalSes

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(self.path)
        self.server.agents.append(self.headers["User-Agent"])
        self.server.meanwhile()
        status, code, body, headers = self.server.steps.pop(0) if self.server.steps else OK
        if status == 0:
            if code == "stall":
                self.server.done.wait(60)
            self.close_connection = True
            return
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        if code:
            self.send_header("x-amzn-ErrorType", code)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def ses() -> Iterator[LocalSes]:
    with LocalSes() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.done.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, clock: FakeClock) -> None:
    """No configuration, credentials or proxy of this machine's; and nobody waits, neither we nor botocore."""
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_MAX_ATTEMPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(botocore.endpoint, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(DeliveryMixin, "retry_clock", clock)


@functools.cache
def botocore_session() -> botocore.session.Session:
    """One for all tests: it keeps the service's model, which takes long to read."""
    return botocore.session.Session()


def options(url: str, **client: Any) -> dict[str, Any]:
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return {
        "AMAZON_SES_SESSION_PARAMS": {"botocore_session": botocore_session()},
        "AMAZON_SES_CLIENT_PARAMS": {"endpoint_url": url, "region_name": "eu-north-1", **keys, **client},
    }


def message(**attributes: Any) -> AnymailMessage:
    made = AnymailMessage("Subject", "Body", "from@example.com", ["to@example.com"])
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def mailing() -> AnymailMessage:
    made = message(subject="", body="", template_id="reminder", merge_data={})
    made.to = ["one@example.com", "two@example.com"]
    return made


def send(
    url: str, made: AnymailMessage | None = None, client: dict[str, Any] | None = None, **settings: Any
) -> Outcome:
    with override_settings(ANYMAIL=options(url, **(client or {})), EMAIL_FALLBACK_QUEUE=False, **settings):
        return deliver(EmailBackend(), made or message(), Delivery())


@pytest.mark.parametrize(
    ("steps", "requests", "verdict", "reason"),
    [
        pytest.param([OK], 1, DELIVERED, "", id="accepted"),
        pytest.param([RATE, RATE, OK], 3, DELIVERED, "", id="rate limit, twice"),
        pytest.param([RATE] * 9, 4, REFUSED, "", id="rate limit, until the tries are used up"),
        pytest.param([failure(400, "LimitExceededException")] * 9, 4, REFUSED, "", id="throttled under another name"),
        pytest.param([failure(503, "ServiceUnavailable")] * 9, 4, REFUSED, "", id="unavailable"),
        pytest.param([DAILY_QUOTA], 1, BLOCKED, "quota", id="daily quota: no waiting cures it"),
        pytest.param([failure(400, "SendingPausedException")], 1, BLOCKED, "account", id="paused"),
        pytest.param([failure(403, "UnrecognizedClientException")], 1, BLOCKED, "credentials", id="wrong key"),
        pytest.param([failure(400, "MessageRejected")], 1, PERMANENT, "", id="rejected"),
        pytest.param([INTERNAL], 1, AMBIGUOUS, "", id="internal error: may have been taken"),
        pytest.param([failure(503, "", "upstream")], 1, AMBIGUOUS, "", id="503 of who knows whom"),
        pytest.param([DROP], 1, AMBIGUOUS, "no answer", id="dropped after the request"),
        pytest.param([RATE, DROP], 2, AMBIGUOUS, "no answer", id="rate limit, then dropped"),
        pytest.param([GARBAGE], 1, AMBIGUOUS, "accepted?", id="accepted and not understood"),
    ],
)
def test_sending_one_message_comes_to(
    ses: LocalSes, steps: list[Step], requests: int, verdict: Verdict, reason: str
) -> None:
    ses.steps = steps
    made = message()
    outcome = send(ses.url, made)
    assert len(ses.requests) == requests
    assert (outcome.verdict, outcome.reason) == (verdict, reason)
    assert len(made.retry_history) == requests
    assert outcome.hold is (reason == "accepted?")


@pytest.mark.parametrize(
    ("step", "verdict", "reason"),
    [
        pytest.param(bulk("SUCCESS", "SUCCESS"), DELIVERED, "", id="accepted"),
        pytest.param(bulk("SUCCESS", "FAILED"), DELIVERED, "", id="accepted in part"),
        pytest.param(bulk("FAILED", "FAILED"), PERMANENT, "no recipient accepted", id="failed, which Anymail raises"),
        pytest.param(
            bulk("FAILED", "MESSAGE_REJECTED"),
            PERMANENT,
            "no recipient accepted",
            id="failed, which Anymail does not raise",
        ),
        pytest.param(bulk("TRANSIENT_FAILURE", "ACCOUNT_THROTTLED"), REFUSED, "no recipient accepted", id="for later"),
        pytest.param(bulk("ACCOUNT_DAILY_QUOTA_EXCEEDED"), BLOCKED, "account", id="daily quota"),
    ],
)
def test_sending_a_mailing_comes_to(ses: LocalSes, step: Step, verdict: Verdict, reason: str) -> None:
    ses.steps = [step]
    made = mailing()
    made.to = made.to[: len(step[2]["BulkEmailEntryResults"])]
    outcome = send(ses.url, made)
    assert len(ses.requests) == 1
    assert (outcome.verdict, outcome.reason) == (verdict, reason)


def test_refused_connections_are_tried_again_and_surely_not_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    outcome = send(url)
    assert (outcome.verdict, outcome.reason) == (REFUSED, "no connection")
    assert [(attempt.phase, attempt.verdict) for attempt in outcome.attempts] == [(Phase.CONNECT, REFUSED)] * 4


@pytest.mark.parametrize("step", [DROP, STALL], ids=["dropped", "silent"])
def test_a_lost_answer_behind_a_proxy_may_have_been_taken_and_ends_the_call(
    ses: LocalSes, monkeypatch: pytest.MonkeyPatch, step: Step
) -> None:
    """urllib3 calls the drop a proxy error, and botocore on its own tries that again."""
    ses.steps = [step]
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(forward_proxy) as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        outcome = send(ses.url, client={"config": Config(read_timeout=0.3)})
    assert (outcome.verdict, outcome.reason) == (AMBIGUOUS, "no answer")
    assert len(ses.requests) == 1


def test_a_proxy_that_is_not_there_has_surely_sent_nothing(ses: LocalSes, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
    outcome = send(ses.url)
    assert (outcome.verdict, outcome.reason) == (REFUSED, "no connection")
    assert [attempt.phase for attempt in outcome.attempts] == [Phase.CONNECT] * 4
    assert ses.requests == []


def test_a_read_timeout_may_have_been_taken_and_ends_the_call(ses: LocalSes) -> None:
    ses.steps = [STALL, OK]
    outcome = send(ses.url, client={"config": Config(read_timeout=0.3)})
    assert (outcome.verdict, outcome.reason) == (AMBIGUOUS, "no answer")
    assert len(ses.requests) == 1


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        pytest.param([DROP, OK], {"EMAIL_READ_RETRIES": 1}, id="after a drop"),
        pytest.param([INTERNAL, OK], {"EMAIL_HTTP_STATUS_RETRYABLE": [429, 500]}, id="after a 500"),
    ],
)
def test_what_may_have_been_taken_is_tried_again_where_the_user_asks_for_it(
    ses: LocalSes, steps: list[Step], settings: dict[str, Any]
) -> None:
    ses.steps = steps
    assert send(ses.url, **settings).verdict is DELIVERED
    assert len(ses.requests) == 2


def test_the_worst_attempt_counts(ses: LocalSes) -> None:
    ses.steps = [DROP, *[RATE] * 9]
    outcome = send(ses.url, EMAIL_READ_RETRIES=1, EMAIL_TOTAL_RETRIES=1)
    assert outcome.http_status == 429
    assert outcome.verdict is AMBIGUOUS


@pytest.mark.parametrize(
    ("settings", "requests"),
    [
        pytest.param({"EMAIL_TOTAL_RETRIES": 0}, 1, id="none"),
        pytest.param({"EMAIL_TOTAL_RETRIES": 1}, 2, id="one"),
        pytest.param({"EMAIL_TOTAL_RETRIES": None}, 10, id="no limit: until it works"),
        pytest.param({"EMAIL_HTTP_STATUS_RETRIES": 2}, 3, id="two after answers"),
        pytest.param({"EMAIL_CONNECT_RETRIES": 0, "EMAIL_READ_RETRIES": 0}, 4, id="none of another kind"),
        pytest.param({"EMAIL_HTTP_STATUS_RETRYABLE": [500]}, 1, id="only after others"),
        pytest.param({"EMAIL_HTTP_STATUS_RETRYABLE": [429]}, 4, id="after this one"),
        pytest.param({}, 4, id="the default"),
    ],
)
def test_a_refused_request_is_tried_as_often_as_the_settings_say(
    ses: LocalSes, settings: dict[str, Any], requests: int
) -> None:
    ses.steps = [RATE] * 9
    send(ses.url, **settings)
    assert len(ses.requests) == requests


@pytest.mark.parametrize(
    ("step", "settings", "requests"),
    [
        pytest.param(DROP, {"EMAIL_READ_RETRIES": 2}, 3, id="two after no answer"),
        pytest.param(DROP, {"EMAIL_READ_RETRIES": 9}, 4, id="nine, and three in all"),
        pytest.param(DROP, {"EMAIL_READ_RETRIES": None, "EMAIL_HTTP_STATUS_RETRIES": 0}, 4, id="none after answers"),
        pytest.param(
            failure(400, "LimitExceededException"), {"EMAIL_HTTP_STATUS_RETRYABLE": [429]}, 1, id="a status is a status"
        ),
        pytest.param(
            failure(400, "MessageRejected"), {"EMAIL_HTTP_STATUS_RETRYABLE": [400]}, 4, id="whatever it means"
        ),
        pytest.param(DAILY_QUOTA, {}, 1, id="a quota"),
        pytest.param(bulk("TRANSIENT_FAILURE"), {"EMAIL_HTTP_STATUS_RETRYABLE": [429]}, 1, id="never after a 2xx"),
    ],
)
def test_any_other_failure_is_tried_as_often_as_the_settings_say(
    ses: LocalSes, step: Step, settings: dict[str, Any], requests: int
) -> None:
    ses.steps = [step] * 9
    made = mailing() if step.status == 200 else message()
    made.to = made.to[:1]
    send(ses.url, made, **settings)
    assert len(ses.requests) == requests


@pytest.mark.parametrize(
    ("settings", "attempts"),
    [
        pytest.param({"EMAIL_CONNECT_RETRIES": 1}, 2, id="one"),
        pytest.param({"EMAIL_CONNECT_RETRIES": 0}, 1, id="none"),
        pytest.param({"EMAIL_READ_RETRIES": 0, "EMAIL_HTTP_STATUS_RETRIES": 0}, 4, id="none of another kind"),
    ],
)
def test_a_refused_connection_is_tried_as_often_as_the_settings_say(settings: dict[str, Any], attempts: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    assert len(send(url, **settings).attempts) == attempts


def test_an_untrusted_certificate_is_tried_once() -> None:
    with LocalEsp("mandrill") as esp:
        outcome = send(esp.origin)
    assert outcome.verdict is BLOCKED
    assert [attempt.phase for attempt in outcome.attempts] == [Phase.CERTIFICATE]


def test_waits_are_those_of_the_other_back_ends(
    ses: LocalSes, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    ses.steps = [failure(429, "TooManyRequestsException", Retry_After="3"), DROP, RATE, OK]
    made = message()
    send(ses.url, made, EMAIL_READ_RETRIES=1, EMAIL_RETRY_BACKOFF_FACTOR=2, EMAIL_RETRY_BACKOFF_JITTER=0)
    assert clock.waits == [3.0, 4.0, 8.0]
    assert [(attempt.status, attempt.retry_after, attempt.waited) for attempt in made.retry_history] == [
        (429, 3.0, 3.0),
        (None, None, 4.0),
        (429, None, 8.0),
        (200, None, None),
    ]
    assert [(record.levelname, record.getMessage()) for record in caplog.records if "before try" in record.msg] == [
        ("WARNING", "Amazon SES: HTTP 429; waiting 3.0 s before try 2 of 4"),
        ("WARNING", "Amazon SES: ConnectionClosedError; waiting 4.0 s before try 3 of 4"),
        ("WARNING", "Amazon SES: HTTP 429; waiting 8.0 s before try 4 of 4"),
    ]


def test_a_wait_that_nobody_sits_out_ends_the_call_and_is_handed_on(ses: LocalSes) -> None:
    ses.steps = [failure(429, "TooManyRequestsException", Retry_After="3600")]
    outcome = send(ses.url)
    assert (outcome.verdict, outcome.retry_after) == (REFUSED, 3600.0)
    assert len(ses.requests) == 1


def test_a_send_of_the_users_own_is_not_tried_again_after_no_answer_either(ses: LocalSes) -> None:
    """By itself botocore would."""
    ses.steps = [DROP]
    with override_settings(ANYMAIL=options(ses.url), EMAIL_FALLBACK_QUEUE=False):
        backend, made = EmailBackend(), message()
        backend.open()
        with pytest.raises(AnymailAPIError):
            backend.post_to_esp(backend.build_message_payload(made, backend.send_defaults), made)
        backend.close()
    assert len(ses.requests) == 1


def test_the_users_own_retries_are_obeyed_as_they_stand(ses: LocalSes) -> None:
    ses.steps = [INTERNAL] * 9
    outcome = send(ses.url, client={"config": Config(retries={"total_max_attempts": 2, "mode": "standard"})})
    assert len(ses.requests) == 2
    assert outcome.verdict is AMBIGUOUS


@pytest.mark.parametrize(
    ("seconds", "requests"),
    [
        pytest.param(0, 4, id="at once: all"),
        pytest.param(3, 3, id="3 s each: not at 10.5 or later"),
        pytest.param(8, 2, id="8 s each: not at 17"),
        pytest.param(10, 1, id="10 s: not one that might last until after 25"),
    ],
)
def test_no_attempt_begins_that_might_pass_the_deadline(
    ses: LocalSes, clock: FakeClock, seconds: float, requests: int
) -> None:
    """Which may last 5 seconds to connect and 10 to answer."""

    def take() -> None:
        clock.now += seconds

    ses.steps = [RATE] * 9
    ses.meanwhile = take
    outcome = send(ses.url, EMAIL_RETRY_DEADLINE=25)
    assert len(ses.requests) == requests
    assert outcome.verdict is REFUSED


def config_of(**settings: Any) -> Any:
    client = settings.pop("client", {})
    with override_settings(ANYMAIL=options("http://127.0.0.1:9", **client), **settings):
        backend = EmailBackend()
        backend.open()
        assert backend.client is not None
        config = backend.client.meta.config
        backend.close()
        return config


def test_timeouts_come_from_our_settings() -> None:
    config = config_of(EMAIL_FALLBACK_QUEUE=False, EMAIL_CONNECT_TIMEOUT=3)
    assert config.connect_timeout == 3
    assert config.read_timeout == READ_TIMEOUT


@pytest.mark.parametrize(
    ("settings", "timeouts"),
    [
        pytest.param({"EMAIL_FALLBACK_QUEUE": True}, (5, 10), id="25 seconds, with the queue: two tries"),
        pytest.param({"EMAIL_RETRY_DEADLINE": 25, "EMAIL_TOTAL_RETRIES": 0}, (5, 20), id="only one try"),
        pytest.param({"EMAIL_RETRY_DEADLINE": 6}, (3, 1.5), id="less than two connect timeouts"),
        pytest.param({"EMAIL_RETRY_DEADLINE": 600}, (5, READ_TIMEOUT), id="more than anybody wants"),
        pytest.param({"EMAIL_RETRY_DEADLINE": None}, (5, READ_TIMEOUT), id="none"),
        pytest.param(
            {"EMAIL_FALLBACK_QUEUE": True, "EMAIL_READ_RETRIES": 1}, (5, READ_TIMEOUT), id="the user's read retries"
        ),
    ],
)
def test_timeouts_fit_into_the_deadline(settings: dict[str, Any], timeouts: tuple[float, float]) -> None:
    config = config_of(**{"EMAIL_FALLBACK_QUEUE": False, **settings})
    assert (config.connect_timeout, config.read_timeout) == timeouts


def test_the_users_config_goes_over_ours_and_anymails_own_stays(ses: LocalSes) -> None:
    config = config_of(client={"config": {"connect_timeout": 7, "read_timeout": 8}}, EMAIL_CONNECT_TIMEOUT=3)
    assert (config.connect_timeout, config.read_timeout) == (7, 8)
    send(ses.url)
    assert "django-anymail/" in ses.agents[0]


def test_options_may_stand_in_anymails_setting_and_a_wrong_one_is_named() -> None:
    with override_settings(ANYMAIL={**options("http://127.0.0.1:9"), "AMAZON_SES_TOTAL_RETRIES": 7}):
        assert EmailBackend().retry_policy.total == 7
        assert EmailBackend(total_retries=2).retry_policy.total == 2
    with override_settings(EMAIL_TOTAL_RETRIES=-1), pytest.raises(ImproperlyConfigured, match="EMAIL_TOTAL_RETRIES"):
        EmailBackend()


def test_the_caller_gets_anymails_error_with_boto3s_words(ses: LocalSes) -> None:
    ses.steps = [failure(400, "MessageRejected", "Email address is not verified.")]
    with (
        override_settings(ANYMAIL=options(ses.url), EMAIL_FALLBACK_QUEUE=False),
        pytest.raises(AnymailAPIError, match="Email address is not verified") as raised,
    ):
        EmailBackend().send_messages([message()])
    assert isinstance(raised.value.__cause__, ClientError)
    assert raised.value.response["Error"]["Code"] == "MessageRejected"


def test_what_ended_the_call_is_raised_as_botocore_raises_it(ses: LocalSes) -> None:
    """A 500 that we do not let botocore repeat looks like one that it gave up on."""
    ses.steps = [INTERNAL]
    outcome = send(ses.url)
    assert isinstance(outcome.error, AnymailAPIError)
    assert type(outcome.error.__cause__).__name__ == "InternalServiceErrorException"
    assert outcome.http_status == 500


def test_missing_credentials_are_a_matter_of_configuration() -> None:
    client = {"aws_access_key_id": None, "aws_secret_access_key": None}
    outcome = send("http://127.0.0.1:9", client=client)
    assert isinstance(outcome.error, AnymailAPIError)
    assert isinstance(outcome.error.__cause__, NoCredentialsError)
    assert (outcome.reason, outcome.anticipated, outcome.may_be_queued) == ("configuration", False, False)


def test_one_open_client_serves_several_messages(ses: LocalSes) -> None:
    ses.steps = [RATE, OK, RATE, OK]
    with override_settings(ANYMAIL=options(ses.url), EMAIL_FALLBACK_QUEUE=False):
        first, second = message(), message()
        assert EmailBackend().send_messages([first, second]) == 2
    assert len(ses.requests) == 4
    assert [len(made.retry_history) for made in (first, second)] == [2, 2]


@pytest.mark.django_db
def test_what_ses_refuses_is_kept_in_the_queue(ses: LocalSes) -> None:
    ses.steps = [RATE] * 9
    made = message()
    with override_settings(ANYMAIL=options(ses.url), EMAIL_FALLBACK_QUEUE=True):
        assert EmailBackend().send_messages([made]) == 1
    assert made.queued_message.pk is not None
    assert {status.status for status in made.anymail_status.recipients.values()} == {"queued"}
