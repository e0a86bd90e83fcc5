"""One cell of the matrix: a message meets a fault at one ESP, on one path; and what is seen of it."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from django.conf import settings
from django.core.mail import EmailMessage

from anymail_retry import RetryMixin, reset_breakers
from anymail_retry.mailqueue.clock import DatabaseClock
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.worker import Totals, Worker
from anymail_retry.models import MailerState, QueuedMessage
from anymail_retry.testing import ESPS
from tests.sites import Site
from tests.transport.clock import FakeClock

from .cases import CASES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from pytest_django.fixtures import SettingsWrapper

    from anymail_retry.testing import LocalEsp

    from .cases import Case, Ends


class Cell:
    """The surroundings of one message.

    Waits between tries take no time: ``clock`` keeps them. What waits in the queue is made due by moving the worker's
    clock, and the ESP's with it.
    """

    def __init__(
        self, esp: LocalEsp, settings: SettingsWrapper, monkeypatch: pytest.MonkeyPatch, way: str, untrusted: str
    ) -> None:
        self.esp = esp
        self.settings = settings
        self.monkeypatch = monkeypatch
        self.site = Site(settings, way)
        self.untrusted = untrusted
        self.clock = FakeClock()
        #: Seconds by which time has moved on.
        self.passed = 0.0
        monkeypatch.setattr(RetryMixin, "retry_clock", self.clock)
        for name, value in esp.environ.items():
            monkeypatch.setenv(name, value)
        self._use(esp.url)

    def _use(self, url: str) -> None:
        self.url = url
        self.site.esp(self.esp, f"anymail_retry.backends.{self.esp.esp}.EmailBackend", api_url=url)

    @contextmanager
    def fault(self, case: Case) -> Iterator[None]:
        """The time in which the fault lasts."""
        timeouts = self._timeouts(case)
        for name, value in timeouts.items():
            setattr(self.settings, name, value)
        self._begin(case)
        try:
            yield
        finally:
            self._end()
            for name in timeouts:
                delattr(self.settings, name)

    def _timeouts(self, case: Case) -> dict[str, Any]:
        """Short ones for what hangs, where nothing else has to be in time."""
        if case.hangs == "connect":
            return {"EMAIL_CONNECT_TIMEOUT": 0.05}
        if case.hangs == "read":
            last_try_succeeds = case.of(self.esp.esp).verdict == "delivered"
            return {"ANYMAIL_REQUESTS_TIMEOUT": (10.0, 1.0 if last_try_succeeds else 0.15)}
        return {}

    def _begin(self, case: Case) -> None:
        fault = case.fault
        if not isinstance(fault, str):
            self.esp.script(fault)
        elif fault == "no such host":
            self._use(self.esp.url.replace(self.esp.host, "esp.invalid"))
        elif fault == "refuse":
            self.esp.stop_listening()
        elif fault == "black hole":
            self.esp.black_hole()
        elif fault == "untrusted":
            self.monkeypatch.setenv("REQUESTS_CA_BUNDLE", self.untrusted)
        elif fault == "idle":
            EmailMessage("Before", "Body", "from@example.com", ["before@example.com"]).send()
            assert self.esp.close_idle_connections() == 1
        else:
            raise ValueError(fault)

    def _end(self) -> None:
        self.esp.script()
        self.esp.release()
        self.esp.start_listening()
        self.monkeypatch.setenv("REQUESTS_CA_BUNDLE", self.esp.ca_file)
        self._use(self.esp.url)

    # --- sending ---

    def queue(self, message: EmailMessage) -> QueuedMessage:
        """Store a message, as the queue-first back end does."""
        (row,) = enqueue([message], mailer=self.site.mailer, origin="queued")
        return row

    def drain(self) -> Totals:
        """Have a worker send what is due."""
        clock = DatabaseClock("default", read=lambda alias: self.now())
        return Worker(threads=1, clock=clock).drain()

    def now(self) -> datetime:
        return datetime.now(timezone.utc) + timedelta(seconds=self.passed)

    def wait_until_due(self, row: QueuedMessage) -> None:
        """Let time pass until a worker would send this message."""
        row.refresh_from_db()
        assert row.due_at is not None
        paused = MailerState.objects.filter(alias=row.mailer).values_list("paused_until", flat=True).first()
        seconds = (max(row.due_at, paused or row.due_at) - self.now()).total_seconds() + 0.001
        if seconds > 0:
            self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        self.passed += seconds
        self.esp.advance(seconds)
        self.clock.now += seconds

    @property
    def pauses(self) -> bool:
        """Whether the mailer pauses."""
        return MailerState.objects.filter(alias=self.site.mailer, paused_until__isnull=False).exists()

    def accepted(self, message: EmailMessage) -> int:
        """How often the ESP has taken the message."""
        return self.esp.ledger.count_by("subject")[message.subject]


def fresh(esp: LocalEsp) -> None:
    """Nothing of the cell before is left."""
    reset_breakers()
    esp.reset()
    esp.close_idle_connections()


# --- cells as tests ---

#: On a database server two are enough: it is the same to it who fails.
HERE = ESPS if "sqlite" in settings.DATABASES["default"]["ENGINE"] else ("mandrill", "resend")


def cells(
    wanted: Callable[[Case, Ends], bool] = lambda case, ends: True, esps: Collection[str] = ESPS
) -> pytest.MarkDecorator:
    """A test for each cell of the table that is wanted; of what only one ESP knows, at that one always."""
    rows = [
        pytest.param(esp, case, id=f"{esp}-{case.id}")
        for esp in HERE
        for case in CASES
        if esp in case.esps and wanted(case, case.of(esp)) and (esp in esps or len(case.only) == 1)
    ]
    return pytest.mark.parametrize(("esp", "case"), rows, indirect=["esp"])


def make(case: Case) -> Any:
    if case.message is not None:
        return case.message("Subject")
    return EmailMessage("Subject", "Body", "from@example.com", ["to@example.com"])


def send(message: Any, by: Any = None) -> Any:
    """Send a message; what was raised, or None."""
    try:
        count = message.send() if by is None else by.send_messages([message])
    except Exception as error:
        return error
    assert count == 1
    return None
