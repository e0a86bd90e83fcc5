"""``RetryMixin`` in a user's own subclass, the way Anymail's documentation has it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import requests
from anymail.exceptions import AnymailAPIError, AnymailCancelSend, AnymailRequestsAPIError
from anymail.signals import pre_send
from django.core import mail

from anymail_retry import RetryMixin, RetryPolicy
from anymail_retry.backends.brevo import EmailBackend as Brevo
from anymail_retry.delivery import Delivery, deliver
from anymail_retry.testing import AcceptThenDrop, HalfBody, LocalEsp, ResetAfterRequest, Rule, Status
from anymail_retry.transport.adapter import RetryAdapter
from anymail_retry.verdict import Verdict
from tests.sites import Site, site

from .clock import FakeClock
from .mail import Plain, Retrying, backend, failure, message, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["site"]  # a fixture


def test_it_works_by_its_path_in_the_settings(site: Site, esp: LocalEsp) -> None:
    site.esp(esp, "tests.transport.mail.Retrying", total_retries=1, retry_backoff_factor=0, retry_backoff_jitter=0)
    esp.script(Status(429))
    assert mail.send_mail("Subject", "Body", "from@example.com", ["to@example.com"]) == 1
    esp.script(Status(429), Status(429))
    with pytest.raises(AnymailRequestsAPIError):
        mail.send_mail("Subject", "Body", "from@example.com", ["to@example.com"])
    assert len(esp.requests) == 4


def test_the_policy_is_there_to_be_read(esp: LocalEsp) -> None:
    assert backend(esp, total_retries=7).retry_policy == RetryPolicy(total=7)


def test_both_schemes_retry(esp: LocalEsp) -> None:
    session = backend(esp).create_session()
    assert isinstance(session.get_adapter("https://esp.example/"), RetryAdapter)
    assert isinstance(session.get_adapter("http://postal.example/"), RetryAdapter)


def test_a_subclass_may_change_the_session_as_anymail_documents_it(esp: LocalEsp) -> None:
    class Own(Retrying):
        def create_session(self) -> requests.Session:
            session = super().create_session()
            session.headers["X-Own"] = "1"
            return session

    send(Own(**esp.options()))
    assert esp.requests[0].headers["x-own"] == "1"
    assert "django-anymail" in esp.requests[0].headers["user-agent"]


def test_an_adapter_that_a_subclass_mounts_is_used(esp: LocalEsp) -> None:
    class Own(Retrying):
        def create_session(self) -> requests.Session:
            session = super().create_session()
            session.mount("https://", requests.adapters.HTTPAdapter(max_retries=0))
            return session

    esp.script(Status(429))
    outcome = Own(**esp.options()).deliver(message(), Delivery())
    assert (outcome.verdict, outcome.http_status) == (Verdict.REFUSED, 429)
    assert len(esp.requests) == 1


def test_a_duplicate_answer_through_an_adapter_of_the_users_is_success_too(
    local_esp: Callable[..., LocalEsp], settings: SettingsWrapper
) -> None:
    settings.EMAIL_FALLBACK_QUEUE = False

    class Own(Brevo):
        def create_session(self) -> requests.Session:
            session = super().create_session()
            session.mount("https://", requests.adapters.HTTPAdapter())
            return session

    esp = local_esp("brevo")
    delivery = Delivery()
    esp.script(AcceptThenDrop())
    assert Own(**esp.options()).deliver(message(), delivery).verdict is Verdict.AMBIGUOUS
    sent = message()
    assert Own(**esp.options()).deliver(sent, delivery).verdict is Verdict.DELIVERED
    assert sent.anymail_status.status == {"queued"}
    assert len(esp.ledger) == 1


def test_a_request_of_the_users_own_before_the_message_is_no_attempt_of_it(esp: LocalEsp, clock: FakeClock) -> None:
    class Own(Retrying):
        def build_message_payload(self, message: Any, defaults: Any) -> Any:
            self.session.post(self.api_url)
            return super().build_message_payload(message, defaults)

    esp.script(Status(500), ResetAfterRequest())
    outcome = Own(**esp.options()).deliver(message(), Delivery())
    assert [request.path == esp.requests[0].path for request in esp.requests] == [True, False]
    assert outcome.http_status is None, "the answer to the first request is none to the second"
    assert [attempt.error for attempt in outcome.attempts] == ["ProtocolError"]


def test_a_session_that_fails_says_nothing_by_the_status_of_the_send_before(esp: LocalEsp) -> None:
    class Own(Retrying):
        def create_session(self) -> requests.Session:
            raise AnymailAPIError("no token")

    sent = send(backend(esp))
    assert sent.anymail_status.status == {"sent"}
    outcome = Own(**esp.options()).deliver(sent, Delivery())
    assert outcome.verdict is not Verdict.DELIVERED
    assert isinstance(outcome.error, AnymailAPIError)


def test_a_session_between_mixin_and_back_end_is_the_one_that_retries(esp: LocalEsp, clock: FakeClock) -> None:
    class Traced(Plain):  # type: ignore[misc,valid-type]  # Anymail has no annotations
        def create_session(self) -> requests.Session:
            session: requests.Session = super().create_session()
            session.headers["X-Trace"] = "1"
            return session

    class Own(RetryMixin, Traced):
        retry_clock = clock

    esp.script(Status(429))
    send(Own(**esp.options()))
    assert [request.headers["x-trace"] for request in esp.requests] == ["1", "1"]


def test_listed_after_the_back_end_it_is_refused() -> None:
    with pytest.raises(TypeError, match=r"class Wrong\(RetryMixin, EmailBackend\)"):

        class Wrong(Plain, RetryMixin):  # type: ignore[misc,valid-type]  # Anymail has no annotations
            pass


def test_debug_output_of_anymail_still_comes(esp: LocalEsp, capsys: pytest.CaptureFixture[str]) -> None:
    send(Retrying(**esp.options(), debug_api_requests=True))
    assert "===== Anymail API request" in capsys.readouterr().out


# --- What a send gives back ---


@pytest.fixture
def cancelled() -> Iterator[None]:
    def cancel(**kwargs: Any) -> None:
        raise AnymailCancelSend

    pre_send.connect(cancel)
    yield
    pre_send.disconnect(cancel)


@pytest.mark.usefixtures("cancelled")
def test_a_cancelled_message_is_not_sent_and_no_error(esp: LocalEsp) -> None:
    assert backend(esp).send_messages([message()]) == 0
    outcome = deliver(backend(esp), message(), Delivery())
    assert (outcome.verdict, outcome.reason) == (None, "cancelled")
    assert esp.requests == []


def test_a_message_without_recipients_is_not_sent_and_no_error(esp: LocalEsp) -> None:
    nobody = message()
    nobody.to = []
    assert backend(esp).send_messages([nobody]) == 0
    assert deliver(backend(esp), nobody, Delivery()).verdict is None


def test_pre_send_is_not_fired_again_for_a_message_that_it_has_seen(esp: LocalEsp) -> None:
    fired = []

    def count(**kwargs: Any) -> None:
        fired.append(kwargs["message"])

    pre_send.connect(count)
    try:
        assert backend(esp).deliver(message(), Delivery()).verdict is Verdict.DELIVERED
        assert len(fired) == 1
        assert backend(esp).deliver(message(), Delivery(pre_send_done=True)).verdict is Verdict.DELIVERED
        assert len(fired) == 1
    finally:
        pre_send.disconnect(count)


def test_deliver_raises_nothing_and_tells_everything(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(Rule(Status(429, body={"name": "Slow"}, retry_after=7)))
    sent = message()
    outcome = deliver(backend(esp, clock, total_retries=1), sent, Delivery())
    assert isinstance(outcome.error, AnymailRequestsAPIError)
    assert (outcome.verdict, outcome.http_status, outcome.retry_after) == (Verdict.REFUSED, 429, 7.0)
    assert "Slow" in outcome.answer
    assert outcome.attempts == sent.retry_history
    assert [attempt.status for attempt in outcome.attempts] == [429, 429]


def test_the_worst_try_counts(esp: LocalEsp, clock: FakeClock) -> None:
    """The message may have been taken by the first; that the last was refused does not undo it."""
    esp.script(ResetAfterRequest(), Rule(Status(429)))
    outcome = backend(esp, clock, read_retries=1).deliver(message(), Delivery())
    assert outcome.http_status == 429
    assert outcome.verdict is Verdict.AMBIGUOUS


def test_fail_silently_is_as_in_anymail(esp: LocalEsp) -> None:
    esp.script(Rule(Status(500)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Anymail 15.2: it will go
        silent = Retrying(**esp.options(), fail_silently=True)
    assert silent.send_messages([message()]) == 0
    assert silent.send_messages([message(), message()]) == 0
    assert len(esp.requests) == 3


def test_without_a_queue_the_first_error_ends_a_batch_as_in_anymail(esp: LocalEsp) -> None:
    esp.script(Rule(Status(500), nth=2))
    with pytest.raises(AnymailRequestsAPIError):
        backend(esp).send_messages([message("one"), message("two"), message("three")])
    assert [accepted.subject for accepted in esp.ledger] == ["one"]


def test_a_batch_is_one_session(esp: LocalEsp) -> None:
    sessions = []

    class Counting(Retrying):
        def create_session(self) -> requests.Session:
            sessions.append(super().create_session())
            return sessions[-1]

    assert Counting(**esp.options()).send_messages([message(), message(), message()]) == 3
    assert len(sessions) == 1


def test_each_message_of_a_batch_has_its_own_deadline(esp: LocalEsp, clock: FakeClock) -> None:
    esp.script(*[Rule(Status(429, retry_after=5), nth=nth) for nth in (1, 3, 5)])
    sender = backend(esp, clock, retry_deadline=8)
    assert sender.send_messages([message(), message(), message()]) == 3
    assert clock.waits == [5.0, 5.0, 5.0]


def test_an_error_after_the_status_line_is_an_anymail_error_still(esp: LocalEsp) -> None:
    esp.script(HalfBody())
    assert isinstance(failure(backend(esp)), AnymailAPIError)
