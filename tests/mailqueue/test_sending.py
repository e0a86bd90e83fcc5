"""The threads that send: which job comes next, and what one job may cost the others."""

from __future__ import annotations

import threading
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connection, connections

from anymail_retry.delivery import Delivery
from anymail_retry.mailqueue import mailers, sending
from anymail_retry.mailqueue.claim import Job
from anymail_retry.mailqueue.clock import steady
from anymail_retry.mailqueue.sending import Closed, Inbox, Sender, Sent
from anymail_retry.mailqueue.serialization import pack
from anymail_retry.models import QueuedMessage
from anymail_retry.verdict import Outcome, Verdict

from .engine import BROKEN, DELIVERED, OTHER, PATIENCE, PLAIN, Script, mail

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)


class Moment:
    """A steady clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def job(mailer: str = PLAIN, priority: int = 2, **values: Any) -> Job:
    return Job(
        **{
            "id": 1,
            "lease": 1,
            "mailer": mailer,
            "priority": priority,
            "number": 1,
            "lost": 0,
            "due_at": NOW,
            "origin": "queued",
            "waits_since": NOW,
            "expires_at": None,
            "on_ambiguous": "",
            "delivery": Delivery(),
            "size": 1,
            "attachment_count": 0,
            "payload": pack(mail()).payload,
            "leased_until": steady() + 3600,
            **values,
        }
    )


def inbox(threads: int = 20, moment: Moment | None = None) -> Inbox:
    return Inbox(threads, moment or Moment())


def take(box: Inbox, number: int = 1) -> list[Job]:
    """Take until there is nothing, or so many."""
    taken: list[Job] = []
    while len(taken) < number and (one := box.take(timeout=0)) is not None:
        taken.append(one)
    return taken


# --- which job is next ---


def test_mailer_that_is_alone_may_have_every_thread() -> None:
    box = inbox()
    box.put([job() for _ in range(30)])
    assert len(take(box, 20)) == 20


def test_no_mailer_takes_more_than_three_quarters_while_another_has_mail() -> None:
    box = inbox()
    box.put([job(PLAIN) for _ in range(30)])
    box.put([job(OTHER)])
    taken = take(box, 99)
    assert len([one for one in taken if one.mailer == PLAIN]) == 15
    assert len([one for one in taken if one.mailer == OTHER]) == 1


def test_mailer_had_mail_a_while_ago() -> None:
    moment = Moment()
    box = inbox(moment=moment)
    box.put([job(OTHER)])
    box.done(take(box)[0])
    moment.now += sending.ACTIVE_FOR - 1
    box.put([job(PLAIN) for _ in range(30)])
    assert len(take(box, 99)) == 15  # a hung mailer must not take the threads between two mails of a healthy one
    moment.now += 2
    assert len(take(box, 99)) == 5  # long enough ago: all twenty


def test_mailer_with_the_fewest_sends_under_way_is_next() -> None:
    box = inbox()
    box.put([job(PLAIN) for _ in range(5)])
    take(box, 3)
    box.put([job(OTHER) for _ in range(5)])
    assert [one.mailer for one in take(box, 4)] == [OTHER, OTHER, OTHER, PLAIN]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_mailer_has_its_turn_though_there_are_as_many_as_threads(threads: int) -> None:
    box = inbox(threads=threads)
    for name in "abc":
        box.put([job(name) for _ in range(20)])
    order: list[str] = []
    flying = take(box, threads)
    while flying:
        first = flying.pop(0)
        order.append(first.mailer)
        box.done(first)
        flying += take(box, 1)
    assert {order.count(name) for name in "abc"} == {20}
    assert all(order[:9].count(name) == 3 for name in "abc")


def test_one_thread_serves_everybody() -> None:
    box = inbox(threads=1)
    box.put([job(PLAIN), job(OTHER)])
    served = []
    for _ in range(2):
        (one,) = take(box)
        served.append(one.mailer)
        box.done(one)
    assert sorted(served) == sorted([PLAIN, OTHER])


def test_high_priority_overtakes_what_waits() -> None:
    box = inbox()
    box.put([job(priority=3), job(priority=2)])
    box.put([job(priority=1)])
    box.put([job(priority=3, at_once=True)])
    assert [(one.at_once, one.priority) for one in take(box, 4)] == [(True, 3), (False, 1), (False, 2), (False, 3)]


def test_job_waits_for_its_slot_and_others_do_not() -> None:
    moment = Moment()
    box = inbox(moment=moment)
    box.put([job(PLAIN, starts_at=moment.now + 5, id=1), job(OTHER, id=2)])
    assert [one.id for one in take(box, 9)] == [2]
    moment.now += 5
    assert [one.id for one in take(box, 9)] == [1]


def test_thread_wakes_for_a_slot() -> None:
    box = Inbox(1, steady)
    box.put([job(starts_at=steady() + 0.2)])
    began = steady()
    assert box.take(timeout=PATIENCE) is not None
    assert steady() - began >= 0.2


def test_thread_wakes_for_a_job() -> None:
    box = Inbox(1, steady)
    threading.Timer(0.05, lambda: box.put([job()])).start()
    assert box.take(timeout=PATIENCE) is not None


def test_closed_inbox_gives_out_nothing() -> None:
    box = inbox()
    box.put([job()])
    box.close()
    with pytest.raises(Closed):
        box.take(timeout=PATIENCE)
    assert box.waiting() == 1


def test_what_waits_can_be_taken_out_again() -> None:
    box = inbox()
    box.put([job(PLAIN), job(PLAIN, probe=NOW), job(OTHER)])
    assert [one.mailer for one in box.remove_of(PLAIN)] == [PLAIN]
    assert box.waiting(PLAIN) == 1  # the probe stays
    assert len(box.remove()) == 2
    assert box.is_idle()


def test_free_is_what_threads_would_begin_at_once() -> None:
    box = inbox(threads=8)
    assert box.free(PLAIN) == 8
    box.put([job(PLAIN) for _ in range(3)])
    take(box, 2)
    assert (box.free(PLAIN), box.free(OTHER)) == (5, 5)
    box.put([job(OTHER)])
    assert (box.free(PLAIN), box.free(OTHER)) == (3, 4)  # of its six each, and of the four that are left


# --- what a thread does with it ---


class Desk:
    """A sender thread, and what it reports."""

    def __init__(self, **options: Any) -> None:
        self.inbox = Inbox(1, steady)
        self.reports: list[Sent] = []
        self.reported = threading.Condition()
        found = {name: mailers.find(name) for name in (PLAIN, OTHER, BROKEN)}
        self.sender = Sender(self.inbox, found, self._report, **{"steady": steady, "lease_needed": 30.0, **options})
        self.sender.start()

    def _report(self, sent: Sent) -> None:
        with self.reported:
            self.reports.append(sent)
            self.reported.notify_all()

    def send(self, *jobs: Job) -> list[Outcome | None]:
        before = len(self.reports)
        self.inbox.put(jobs)
        with self.reported:
            assert self.reported.wait_for(lambda: len(self.reports) == before + len(jobs), PATIENCE)
        return [sent.outcome for sent in self.reports[before:]]

    def close(self) -> None:
        self.inbox.close()
        self.sender.join(PATIENCE)
        assert not self.sender.is_alive()


@pytest.fixture
def desk(script: Script) -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


def test_back_end_stays_open_for_many_messages_and_is_closed_in_the_end(desk: Desk, script: Script) -> None:
    desk.send(job(), job(OTHER), job(), job())
    assert len({id(send.backend) for send in script.sends}) == 2
    assert len(script.opened) == 2
    assert script.closed == []
    desk.close()
    assert set(map(id, script.closed)) == {id(backend) for backend in script.opened}


def test_idle_thread_closes_its_back_ends(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "IDLE", 0.01)
    desk = Desk()
    desk.send(job())
    waited = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        if script.closed:
            break
        waited.wait(0.02)
    assert len(script.closed) == 1
    desk.send(job())
    assert len(script.opened) == 2
    desk.close()


@pytest.mark.parametrize(("left", "begun"), [(60.0, True), (-0.001, False)])
def test_nothing_is_begun_that_has_expired(desk: Desk, script: Script, left: float, begun: bool) -> None:
    assert desk.send(job(expires_at_moment=steady() + left)) == [DELIVERED if begun else None]
    assert bool(script.sends) is begun


def test_connection_to_a_mailer_that_had_nothing_for_a_while_is_made_anew(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread was busy with others meanwhile; the server may have hung up, which an SMTP server does not say."""
    monkeypatch.setattr(sending, "IDLE", 0.05)
    desk = Desk()
    desk.send(job(PLAIN))
    end = steady() + 0.1
    while steady() < end:
        desk.send(job(OTHER))
    desk.send(job(PLAIN))
    desk.close()
    plain = [backend for backend in script.opened if type(backend).__name__ == "PlainBackend"]
    assert len(plain) == 2


def test_nothing_is_begun_on_a_short_lease(desk: Desk, script: Script) -> None:
    assert desk.send(job(leased_until=steady() + 29)) == [None]
    assert script.sends == []
    assert desk.send(job(leased_until=steady() + 3600)) == [DELIVERED]


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param("", id="empty"),
        pytest.param("not JSON", id="not JSON"),
        pytest.param('{"v": 99}', id="from the future"),
        pytest.param('{"v": 1, "class": "os.system", "fields": {}}', id="of another class"),
        pytest.param("[]", id="not an object"),
    ],
)
def test_message_that_cannot_be_decoded_is_held(desk: Desk, script: Script, payload: str) -> None:
    (outcome,) = desk.send(job(payload=payload))
    assert outcome is not None
    assert (outcome.hold, outcome.verdict) == (True, None)
    assert outcome.reason.startswith("cannot be decoded")
    assert desk.send(job()) == [DELIVERED]


@pytest.mark.parametrize("error", [RuntimeError("bug"), SystemExit(1), KeyboardInterrupt(), MemoryError()])
def test_back_end_that_raises_anything_costs_one_message(desk: Desk, script: Script, error: BaseException) -> None:
    def fail(message: Any, delivery: Delivery) -> Outcome:
        raise error

    script.behaviour = fail
    (outcome,) = desk.send(job())
    assert outcome is not None
    assert (outcome.hold, outcome.verdict) == (True, Verdict.AMBIGUOUS)
    script.behaviour = lambda message, delivery: DELIVERED
    assert desk.send(job()) == [DELIVERED]
    assert len(script.opened) == 2  # the back end that raised is not used again


def test_back_end_that_returns_anything_costs_one_message(desk: Desk, script: Script) -> None:
    script.behaviour = lambda message, delivery: 1  # type: ignore[assignment,return-value]  # the point
    (outcome,) = desk.send(job())
    assert outcome is not None
    assert outcome.hold


def test_mailer_that_cannot_be_set_up_is_blocked(desk: Desk) -> None:
    (outcome,) = desk.send(job(BROKEN))
    assert outcome is not None
    assert (outcome.verdict, outcome.reason) == (Verdict.BLOCKED, "configuration")
    assert "this account is not set up" in outcome.answer


def test_message_of_a_fallback_is_as_pre_send_left_it(desk: Desk, script: Script) -> None:
    desk.send(job(delivery=Delivery(pre_send_done=True)), job())
    assert [send.pre_send_done for send in script.sends] == [True, False]


def test_every_attempt_gets_a_fresh_message(desk: Desk, script: Script) -> None:
    def change(message: Any, delivery: Delivery) -> Outcome:
        message.subject = f"[prefix] {message.subject}"
        return DELIVERED

    script.behaviour = change
    again = job()
    desk.send(again)
    desk.send(again)
    assert script.subjects == ["Subject", "Subject"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("max_age", [pytest.param(0, id="closed"), pytest.param(600, id="kept for the next send")])
def test_receiver_may_use_the_orm_in_a_sender_thread(
    desk: Desk, script: Script, monkeypatch: pytest.MonkeyPatch, max_age: int
) -> None:
    """Over a connection of the thread's own, which lives for as long as the settings say, as one of a request does."""
    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", max_age)
    used: list[Any] = []  # the thread's connection, and what it found of its predecessor's

    def look(message: Any, delivery: Delivery) -> Outcome:
        used.append((connections["default"], connections["default"].connection))
        QueuedMessage.objects.count()
        return DELIVERED

    script.behaviour = look
    assert desk.send(job()) == [DELIVERED]
    assert desk.send(job()) == [DELIVERED]
    (first, before_first), (second, before_second) = used
    assert first is second is not connection
    assert first.settings_dict["CONN_MAX_AGE"] == max_age
    assert before_first is None
    assert (before_second is not None) == (max_age > 0)
