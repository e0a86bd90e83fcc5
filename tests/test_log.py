"""The loggers: a record names its line, and a log that is mailed does not chase its own tail."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import pytest
from anymail.exceptions import AnymailAPIError
from django.utils.log import AdminEmailHandler

from anymail_retry import send_mail
from anymail_retry.log import get_logger
from anymail_retry.mailqueue import crash_mail
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import QueuedMessage
from anymail_retry.signals import message_failed, message_queued, message_sent
from anymail_retry.testing import LocalEsp, Rule, Status
from anymail_retry.testing.pytest import local_esp
from tests.sites import ADMINS, MANDRILL, Site, message, site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anymail_retry.mailqueue.worker import Totals

__all__ = ["local_esp", "site"]  # fixtures

# Django's handler asks for it, and Anymail will drop it.
pytestmark = pytest.mark.filterwarnings("ignore:Anymail will drop support for fail_silently:DeprecationWarning")


# --- Records ---


def test_record_names_the_logger_and_the_line_that_logs(caplog: pytest.LogCaptureFixture) -> None:
    get_logger("queue").warning("%s to %s", "hello", "you")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("anymail_retry.queue", "WARNING", "hello to you")
    assert (record.filename, record.funcName) == (
        "test_log.py",
        "test_record_names_the_logger_and_the_line_that_logs",
    )


def test_record_of_an_exception_has_it(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        get_logger("queue").exception("it failed")
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
    assert record.levelname == "ERROR"
    assert record.funcName == "test_record_of_an_exception_has_it"


class Reporting(logging.Handler):
    """A handler whose own work is logged: as a handler that sends mail, whose mail fails."""

    def __init__(self, *loggers: str) -> None:
        super().__init__()
        self.loggers = loggers
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())
        for name in self.loggers:
            get_logger(name).error("could not report: %s", record.getMessage())


@pytest.fixture
def reporting() -> Iterator[Reporting]:
    handler = Reporting("queue", "transport")
    logging.getLogger("anymail_retry").addHandler(handler)
    yield handler
    logging.getLogger("anymail_retry").removeHandler(handler)


def test_what_is_logged_while_a_record_is_handled_is_dropped(reporting: Reporting) -> None:
    get_logger("queue").error("first")
    get_logger("transport").error("second")
    assert reporting.seen == ["first", "second"]


class Raising(logging.Handler):
    """A handler that fails: as Django's since 6.1, where the mail cannot be sent."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ZeroDivisionError(record.getMessage())


def test_handler_that_raises_harms_nobody_and_mutes_nothing(
    reporting: Reporting, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = Raising()
    logging.getLogger("anymail_retry").addHandler(handler)
    try:
        get_logger("queue").error("first")
        get_logger("queue").error("second")
    finally:
        logging.getLogger("anymail_retry").removeHandler(handler)
    assert reporting.seen == ["first", "second"]
    assert "ZeroDivisionError: first" in capsys.readouterr().err


# --- A log that is mailed, through an ESP that is down ---


@pytest.fixture
def esp(local_esp: Callable[..., LocalEsp]) -> LocalEsp:
    return local_esp("mandrill")


@pytest.fixture
def alarmed(site: Site, esp: LocalEsp) -> Site:
    """A site whose warnings are mailed through the ESP that is down. Each send is tried twice."""
    site.esp(esp)
    site.settings.ADMINS = ADMINS
    site.settings.EMAIL_TOTAL_RETRIES = 1
    site.settings.EMAIL_RETRY_BACKOFF_FACTOR = site.settings.EMAIL_RETRY_BACKOFF_JITTER = 0
    site.settings.EMAIL_BREAKER_FAILURES = None  # it would end a loop of its own accord
    site.settings.EMAIL_SUBJECT_PREFIX = ""
    return site


@pytest.fixture(params=["WARNING", "ERROR"])
def mailed(request: pytest.FixtureRequest) -> Iterator[AdminEmailHandler]:
    """Every record of this level, whoever logs it, is mailed to the ADMINS."""
    handler = AdminEmailHandler()
    handler.setLevel(request.param)
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def subjects() -> list[str]:
    return [row.subject for row in QueuedMessage.objects.order_by("pk")]


def reports(mailed: AdminEmailHandler) -> int:
    """How many reports one failed send makes: one of its retry and one of its queueing, both of them warnings."""
    return 2 if mailed.level == logging.WARNING else 0


DOWN = pytest.mark.parametrize("down", ["refuses connections", "answers 503"])


def take_down(esp: LocalEsp, down: str) -> None:
    if down == "refuses connections":
        esp.stop_listening()
    else:
        esp.script(Rule(Status(503)))


@pytest.mark.django_db
@DOWN
def test_outage_is_reported_and_the_reports_are_not(
    alarmed: Site, esp: LocalEsp, mailed: AdminEmailHandler, down: str
) -> None:
    take_down(esp, down)
    assert message("hello").send() == 1
    assert subjects()[-1] == "hello" or reports(mailed)
    assert len(subjects()) == 1 + reports(mailed)


@pytest.mark.django_db(transaction=True)
@DOWN
def test_receiver_that_raises_is_reported_and_the_report_of_it_is_not(
    alarmed: Site, esp: LocalEsp, mailed: AdminEmailHandler, down: str
) -> None:
    """Django logs it, in a logger of its own; the report is queued as well, and that has the receiver called again."""
    take_down(esp, down)
    announced: list[str] = []

    def receiver(queued_message: QueuedMessage, **kwargs: Any) -> None:
        announced.append(queued_message.subject)
        if len(announced) > 20:
            pytest.fail("it does not end")
        raise ZeroDivisionError

    message_queued.connect(receiver)
    try:
        assert message("hello").send() == 1
        assert message("again").send() == 1
    finally:
        message_queued.disconnect(receiver)
    assert {"hello", "again"} <= set(announced)
    assert not any("Error calling" in subject for subject in announced)
    # By this handler, and by the one that Django has for its own loggers.
    assert sum("Error calling" in subject for subject in subjects()) == 2 * len(announced)


@pytest.mark.django_db
@DOWN
def test_outage_without_the_queue_ends_too(alarmed: Site, esp: LocalEsp, mailed: AdminEmailHandler, down: str) -> None:
    alarmed.settings.EMAIL_FALLBACK_QUEUE = False
    take_down(esp, down)
    with pytest.raises(AnymailAPIError):
        message("hello").send()
    if down == "answers 503":
        tried = 2 * (1 + (mailed.level == logging.WARNING))  # the message, and the report of its retry
        assert len(esp.requests) == tried


@pytest.mark.django_db(transaction=True)
@DOWN
@pytest.mark.parametrize("database", ["takes it", "fails"])
def test_crash_mail_that_is_queued_ends_too(
    alarmed: Site,
    esp: LocalEsp,
    mailed: AdminEmailHandler,
    down: str,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the database gone as well, each report is tried directly, and so is the one that it cannot be queued."""
    monkeypatch.setattr(AdminEmailHandler, "send_mail", AdminEmailHandler.send_mail)  # to be put back
    crash_mail.install()
    take_down(esp, down)
    if database == "fails":
        alarmed.settings.EMAIL_QUEUE_DATABASE = "nowhere"
    with contextlib.suppress(AnymailAPIError):  # Django's handler raises it since 6.1
        logging.getLogger("tests").error("It crashed")
    if database == "takes it":
        assert subjects() == ["ERROR: It crashed"]
        assert esp.requests == []
    elif down == "answers 503":
        told = {request.json()["message"]["subject"].partition(": ")[2] for request in esp.requests}
        assert {"It crashed", "A crash mail could not be queued, and is sent directly"} <= told
        assert len(told) <= 5


# --- ... and by a worker ---

REFUSED_FOR_GOOD = Rule(Status(400, {"status": "error", "name": "ValidationError", "message": "unsubscribed"}))


@pytest.fixture(params=["crash mail is queued", "all mail is queued first"])
def queueing(request: pytest.FixtureRequest, site: Site, esp: LocalEsp, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose crash mail waits for a worker."""
    site.settings.ADMINS = ADMINS
    site.settings.EMAIL_SUBJECT_PREFIX = ""
    if request.param == "crash mail is queued":
        site.esp(esp)
        monkeypatch.setattr(AdminEmailHandler, "send_mail", AdminEmailHandler.send_mail)  # to be put back
        crash_mail.install()
    else:
        site.behind("queued", MANDRILL, esp)
    return site


def drain() -> Totals:
    """Until nothing is due; a loop is cut off."""
    return Worker(limit=20).drain()


@pytest.mark.django_db(transaction=True)
def test_a_crash_mail_that_fails_for_good_is_reported_and_the_report_is_not(
    queueing: Site, esp: LocalEsp, mailed: AdminEmailHandler
) -> None:
    esp.script(REFUSED_FOR_GOOD)
    logging.getLogger("tests").error("It crashed")
    assert drain().failed == 2
    crash, report = QueuedMessage.objects.order_by("pk")
    assert (crash.state, crash.is_report) == ("failed", False)
    assert (report.state, report.is_report) == ("failed", True)
    assert f"message {crash.pk} failed" in report.subject
    assert report.http_status == 400  # what nobody is told stands in the row


@pytest.mark.django_db(transaction=True)
def test_retries_of_a_report_are_not_reported(queueing: Site, esp: LocalEsp, mailed: AdminEmailHandler) -> None:
    queueing.settings.EMAIL_RETRY_BACKOFF_FACTOR = queueing.settings.EMAIL_RETRY_BACKOFF_JITTER = 0
    esp.script(Rule(Status(429), nth=range(1, 40, 2)))
    logging.getLogger("tests").error("It crashed")
    assert drain().sent == 1 + (mailed.level == logging.WARNING)


@pytest.mark.django_db(transaction=True)
def test_a_receiver_that_raises_at_every_result_is_reported_and_the_report_has_no_receivers(
    queueing: Site, esp: LocalEsp, mailed: AdminEmailHandler
) -> None:
    told: list[str] = []

    def receiver(queued_message: QueuedMessage, **kwargs: Any) -> None:
        told.append(queued_message.subject)
        raise ZeroDivisionError

    message_sent.connect(receiver)
    try:
        logging.getLogger("tests").error("It crashed")
        # Each is reported by this handler, and by the one that Django has for its own loggers.
        assert drain().sent == 3
    finally:
        message_sent.disconnect(receiver)
    assert told == ["ERROR: It crashed"]


@pytest.mark.django_db(transaction=True)
def test_mail_that_a_receiver_sends_about_a_failure_has_no_receivers_of_its_own(queueing: Site, esp: LocalEsp) -> None:
    """Or a receiver of ``message_failed`` that writes to the ADMINS would do so for ever."""
    esp.script(REFUSED_FOR_GOOD)

    def receiver(queued_message: QueuedMessage, **kwargs: Any) -> None:
        send_mail("It failed", "...", None, ["admin@example.com"])

    message_failed.connect(receiver)
    try:
        send_mail("hello", "...", None, ["to@example.com"])
        assert drain().failed == 2
    finally:
        message_failed.disconnect(receiver)
    assert subjects() == ["hello", "It failed"]
