"""The database's clock, and points in time that compare rightly in every time zone."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
from django.db import connection, connections
from django.db.models import Q

from anymail_retry.mailqueue.clock import DatabaseClock, clock_of, read_database_time, steady
from anymail_retry.models import QueuedMessage

from .engine import queue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_django.fixtures import SettingsWrapper

EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)

SESSION_TIME_ZONE = {"postgresql": "SET TIME ZONE '{}'", "mysql": "SET time_zone = '{}'"}


class Hands:
    """A steady clock that is moved by hand, and a database's clock that says what it is told."""

    def __init__(self) -> None:
        self.moment = 1000.0
        self.database = EPOCH
        self.questions = 0
        self.answer_takes = 0.0

    def steady(self) -> float:
        return self.moment

    def read(self, alias: str) -> datetime:
        self.questions += 1
        self.moment += self.answer_takes
        self.database += timedelta(seconds=self.answer_takes)
        return self.database - timedelta(seconds=self.answer_takes / 2)

    def clock(self) -> DatabaseClock:
        return DatabaseClock("default", read=self.read, steady=self.steady)

    def pass_by(self, seconds: float) -> None:
        self.moment += seconds
        self.database += timedelta(seconds=seconds)


@pytest.fixture
def hands() -> Hands:
    return Hands()


def test_time_goes_on_between_two_questions(hands: Hands) -> None:
    clock = hands.clock()
    assert clock.now() == EPOCH
    hands.pass_by(59)
    assert clock.now() == EPOCH + timedelta(seconds=59)
    assert hands.questions == 1


def test_database_is_asked_once_a_minute(hands: Hands) -> None:
    clock = hands.clock()
    clock.now()
    hands.pass_by(60)
    hands.database += timedelta(seconds=120)  # somebody set it right
    assert clock.now() == EPOCH + timedelta(seconds=180)
    assert hands.questions == 2


def test_what_an_answer_takes_is_halved(hands: Hands) -> None:
    clock = hands.clock()
    hands.answer_takes = 0.5
    assert clock.now() == hands.database


def test_slow_answer_does_not_replace_a_good_one(hands: Hands) -> None:
    clock = hands.clock()
    clock.now()
    hands.pass_by(60)
    hands.answer_takes = 30.0
    hands.database += timedelta(hours=5)  # would be believed
    assert clock.now() < EPOCH + timedelta(hours=1)


def test_moments_and_times_are_each_others_inverse(hands: Hands) -> None:
    clock = hands.clock()
    assert clock.moment(EPOCH + timedelta(seconds=7)) == pytest.approx(hands.moment + 7)
    assert clock.at(clock.moment(EPOCH)) == EPOCH


def test_reading_a_moment_asks_nothing(hands: Hands) -> None:
    clock = hands.clock()
    clock.now()
    hands.pass_by(3600)
    clock.at(hands.moment)
    assert hands.questions == 1


def test_steady_clock_is_steady() -> None:
    before = steady()
    time.sleep(0.01)
    assert steady() >= before + 0.01


# --- each vendor ---


@pytest.fixture(params=["Pacific/Tongatapu", "America/St_Johns", "UTC"])
def odd_session(request: pytest.FixtureRequest, db: None) -> Iterator[str]:
    """A database session in some time zone."""
    statement = SESSION_TIME_ZONE.get(connection.vendor)
    if statement is not None:
        with connection.cursor() as cursor:
            offset = datetime.now(ZoneInfo(request.param)).strftime("%z")
            cursor.execute(
                statement.format(f"{offset[:3]}:{offset[3:]}" if connection.vendor == "mysql" else request.param)
            )
    yield request.param
    connection.close()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("use_tz", [True, False])
def test_database_time_is_utc_in_every_session(odd_session: str, settings: SettingsWrapper, use_tz: bool) -> None:
    settings.USE_TZ = use_tz
    off = read_database_time("default") - datetime.now(timezone.utc)
    assert abs(off) < timedelta(minutes=5)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("use_tz", [True, False])
def test_message_is_due_at_once_in_every_session(odd_session: str, settings: SettingsWrapper, use_tz: bool) -> None:
    settings.USE_TZ = use_tz
    (row,) = queue()
    now = clock_of("default").now()
    assert QueuedMessage.objects.filter(due_at__lte=now, due_at__gt=now - timedelta(minutes=5)).get() == row


# --- the field ---

#: The hour that comes twice in Helsinki: 01:30 UTC and 00:30 UTC are both 03:30 there.
TWICE = [datetime(2026, 10, 25, hour, 30, tzinfo=timezone.utc) for hour in (0, 1)]


@pytest.fixture(params=["USE_TZ", "no USE_TZ", "database in local time"])
def zoned(request: pytest.FixtureRequest, transactional_db: None, settings: SettingsWrapper) -> Iterator[None]:
    """Each way in which Django may convert what is stored."""
    settings.USE_TZ = request.param != "no USE_TZ"
    if request.param == "database in local time" and connection.vendor != "postgresql":
        connection.settings_dict["TIME_ZONE"] = "Europe/Helsinki"
    connections["default"].close()
    for name in ("timezone", "timezone_name"):
        connection.__dict__.pop(name, None)
        vars(connections["default"]).pop(name, None)
    yield
    connection.settings_dict["TIME_ZONE"] = None
    connections["default"].close()
    for name in ("timezone", "timezone_name"):
        vars(connections["default"]).pop(name, None)


@pytest.mark.usefixtures("zoned")
@pytest.mark.parametrize("time", TWICE)
def test_hour_that_comes_twice_is_compared_rightly(time: datetime) -> None:
    queue()
    QueuedMessage.objects.update(due_at=time)
    second = timedelta(seconds=1)
    assert QueuedMessage.objects.filter(due_at__lte=time, due_at__gt=time - second).exists()
    assert not QueuedMessage.objects.filter(Q(due_at__lt=time) | Q(due_at__gt=time)).exists()
    assert QueuedMessage.objects.filter(due_at__lte=TWICE[0]).exists() == (time == TWICE[0])


@pytest.mark.usefixtures("zoned")
@pytest.mark.parametrize(
    "time",
    [
        pytest.param(datetime(2026, 7, 1, 12, 0, 0, 123456, tzinfo=timezone.utc), id="summer, microseconds"),
        pytest.param(datetime(2026, 1, 1, 0, 0, tzinfo=timezone.utc), id="winter, whole seconds"),
        pytest.param(datetime(9999, 1, 1, tzinfo=timezone.utc), id="the end of time"),
    ],
)
def test_time_comes_back_as_it_was(time: datetime) -> None:
    (row,) = queue()
    QueuedMessage.objects.update(due_at=time.astimezone(ZoneInfo("Asia/Kolkata")))
    row.refresh_from_db()
    assert row.due_at == time
    assert row.due_at is not None
    assert row.due_at.utcoffset() == timedelta(0)
    assert QueuedMessage.objects.filter(due_at=row.due_at).exists()  # what a fence is compared by


@pytest.mark.django_db
def test_naive_time_is_local_time(settings: SettingsWrapper) -> None:
    settings.USE_TZ = False
    (row,) = queue()
    row.due_at = datetime(2026, 7, 1, 12, 0)  # noqa: DTZ001  # what a site without USE_TZ has
    row.save()
    row.refresh_from_db()
    assert row.due_at == datetime(2026, 7, 1, 9, 0, tzinfo=timezone.utc)
