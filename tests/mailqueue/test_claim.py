"""Taking due rows: who gets which, and at what cost."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

import pytest
from django.db import OperationalError, connection

from anymail_retry.mailqueue.claim import Claim, Claimer, Job, Wanted, mailers_with_rows
from anymail_retry.mailqueue.clock import DatabaseClock
from anymail_retry.mailqueue.database import may_skip_locked
from anymail_retry.mailqueue.schedule import Policy
from anymail_retry.models import QueuedMessage

from .engine import OTHER, PATIENCE, PLAIN, change, end_leases, future, in_threads, mail, past, queue, statements

pytestmark = pytest.mark.django_db(transaction=True)

ALL = Wanted(rows=1000, size=10**9, at_once=1000)


def claimer(lease: float = 60.0, **attributes: Any) -> Claimer:
    made = Claimer("default", DatabaseClock("default"), lease=lease)
    vars(made).update(attributes)
    return made


class CompareAndSet(Claimer):
    """As on a database, or at an isolation level, without SKIP LOCKED."""

    def _may_skip_locked(self) -> bool:
        return False


def claim(wanted: Wanted = ALL, mailer: str = PLAIN, policy: Policy = Policy()) -> list[Job]:  # noqa: B008  # frozen
    return claimer().claim(mailer, wanted, policy).jobs


def subjects(jobs: list[Job]) -> list[str]:
    names = dict(QueuedMessage.objects.values_list("pk", "subject"))
    return [names[job.id] for job in jobs]


# --- which rows ---


def test_claim_takes_what_is_due_of_one_mailer() -> None:
    queue("due")
    queue("later", not_before=timedelta(hours=1))
    queue("another mailer's", mailer=OTHER)
    (held,) = queue("held")
    change(held, state="held", due_at=None)
    (sent,) = queue("sent")
    change(sent, state="sent", due_at=None)
    assert subjects(claim()) == ["due"]


def test_claimed_row_is_its_claimers() -> None:
    (row,) = queue()
    before = DatabaseClock("default").now()
    (job,) = claim()
    row.refresh_from_db()
    assert (row.state, row.lease, row.attempt_count) == ("sending", job.lease, 1)
    assert row.due_at is not None
    assert row.claimed_at is not None
    assert row.due_at - row.claimed_at == timedelta(seconds=60)
    assert before <= row.claimed_at
    assert job.delivery.key == row.key
    assert job.payload == row.content.payload
    assert claim() == []


def test_high_priority_goes_first_and_then_what_is_due_longest() -> None:
    for subject, priority, age in [("m2", 2, 1), ("l", 3, 99), ("m1", 2, 50), ("h2", 1, 2), ("h1", 1, 3)]:
        (row,) = queue(subject, priority=priority)
        change(row, due_at=past(age))
    assert subjects(claim()) == ["h1", "h2", "m1", "m2", "l"]


def test_claim_stops_at_its_number_of_rows() -> None:
    queue("h", priority="high")
    queue("m1", "m2", "m3")
    queue("l", priority="low")
    assert len(claim(Wanted(rows=3, size=10**9, at_once=9))) == 3
    assert len(claim(Wanted(rows=3, size=10**9, at_once=9))) == 2


def test_claim_stops_at_its_number_of_bytes_but_takes_one() -> None:
    rows = queue("a", "b", "c")
    for row in rows:
        change(row, size=100)
    assert len(claim(Wanted(rows=9, size=200, at_once=9))) == 2
    assert len(claim(Wanted(rows=9, size=1, at_once=9))) == 1


def test_mailers_are_those_that_have_rows() -> None:
    assert mailers_with_rows("default") == []
    queue(mailer="b")
    queue(mailer="a")
    queue("x", "y", mailer="c")
    assert mailers_with_rows("default") == ["a", "b", "c"]


def test_attachments_come_with_the_claim() -> None:
    message = mail()
    message.attach("a.bin", b"\0\1", "application/octet-stream")
    message.attach("b.bin", b"more", "application/octet-stream")
    from anymail_retry.mailqueue.enqueue import enqueue

    enqueue([message], mailer=PLAIN, origin="queued")
    (job,) = claim()
    assert job.bodies == [b"\0\1", b"more"]
    assert job.is_whole


def test_row_without_its_content_is_not_whole() -> None:
    (row,) = queue()
    row.content.delete()
    (job,) = claim()
    assert not job.is_whole


# --- recovery ---


def test_row_whose_lease_ended_is_claimed_again_and_may_have_been_taken() -> None:
    (row,) = queue()
    (first,) = claim()
    began = QueuedMessage.objects.get().claimed_at
    end_leases()
    (second,) = claim()
    row.refresh_from_db()
    assert (row.attempt_count, row.lease) == (2, second.lease)
    assert second.lease != first.lease
    assert second.recovered
    assert row.maybe_taken_since == second.delivery.maybe_taken_since == second.recovered_from == began
    assert row.key_used_since == second.delivery.key_used_since == began
    assert second.delivery.key == first.delivery.key


def test_first_moment_at_which_it_may_have_been_taken_stays() -> None:
    (row,) = queue()
    claim()
    long_ago = past(1000)
    change(row, maybe_taken_since=long_ago, due_at=past(1))  # under a key that was replaced
    claim()
    began = row.claimed_at
    row.refresh_from_db()
    assert row.maybe_taken_since == long_ago
    assert row.key_used_since == began


def test_waiting_row_was_not_taken() -> None:
    queue()
    (job,) = claim()
    assert not job.recovered
    assert job.delivery.maybe_taken_since is None


# --- keys ---

WINDOW = Policy(key_window=3600)


def taken(since: float, *, used: float | None = 0.0) -> dict[str, Any]:
    """Of a row that may have been taken so many seconds ago, under its present key or (``used``) one before."""
    moment = past(since)
    return {"maybe_taken_since": moment, "key_used_since": moment if used == 0.0 else used and past(used)}


@pytest.mark.parametrize(
    ("values", "policy", "renewed"),
    [
        pytest.param({}, WINDOW, False, id="never taken"),
        pytest.param(taken(60), WINDOW, False, id="the key lives"),
        pytest.param(taken(7200), WINDOW, True, id="the key is dead"),
        pytest.param(taken(7200, used=60), WINDOW, False, id="replaced before, and lives"),
        pytest.param(taken(7200, used=None), WINDOW, False, id="replaced before, and not used yet"),
        pytest.param(taken(7200, used=3601), WINDOW, True, id="replaced before, and dead"),
        pytest.param(taken(7200) | {"key_from_user": True}, WINDOW, False, id="the user's"),
        pytest.param(taken(7200), Policy(), False, id="an ESP without keys"),
        pytest.param(taken(7200), Policy(key_window=3600, on_ambiguous="hold"), False, id="to be held"),
        pytest.param({"key": ""}, Policy(), True, id="none yet"),
    ],
)
def test_dead_key_is_replaced_before_it_is_used(values: dict[str, Any], policy: Policy, renewed: bool) -> None:
    (row,) = queue()
    old = row.key
    change(row, body_digest="d" * 64, **values)
    (job,) = claim(policy=policy)
    row.refresh_from_db()
    assert row.key == job.delivery.key != ""
    assert (row.key != old) == renewed
    assert (row.body_digest, job.delivery.body_digest) == ((None, None) if renewed else ("d" * 64, "d" * 64))
    assert row.maybe_taken_since == job.delivery.maybe_taken_since
    assert row.maybe_taken_since == values.get("maybe_taken_since")  # whatever becomes of the key
    assert row.key_used_since == job.delivery.key_used_since == (None if renewed else values.get("key_used_since"))


def test_each_row_gets_a_key_of_its_own() -> None:
    for row in queue("a", "b", "c"):
        change(row, key="")
    jobs = claim()
    stored = set(QueuedMessage.objects.values_list("key", flat=True))
    assert stored == {job.delivery.key for job in jobs}
    assert len(stored) == 3


# --- what may be held is begun at once ---


def test_under_hold_only_what_threads_begin_is_claimed() -> None:
    queue("a", "b", "c", "d")
    found = claimer().claim(PLAIN, Wanted(rows=100, size=10**9, at_once=3), Policy(on_ambiguous="hold"))
    assert (len(found.jobs), found.left, found.found) == (3, 1, 4)
    assert sorted(QueuedMessage.objects.values_list("state", flat=True)) == ["queued"] + ["sending"] * 3


def test_message_that_says_hold_does_not_wait_behind_others() -> None:
    queue("resend 1", "resend 2")
    queue("hold", on_ambiguous="hold")
    queue("resend 3")
    found = claimer().claim(PLAIN, Wanted(rows=100, size=10**9, at_once=1), Policy())
    assert subjects(found.jobs) == ["resend 1", "resend 2", "resend 3"]
    assert found.left == 1


def test_live_key_makes_looking_ahead_harmless() -> None:
    queue("a", "b")
    policy = Policy(on_ambiguous="hold", key_window=3600)
    assert len(claimer().claim(PLAIN, Wanted(rows=100, size=10**9, at_once=0), policy).jobs) == 2


# --- many at a time ---


@pytest.mark.parametrize("kind", [Claimer, CompareAndSet])
def test_no_row_is_claimed_twice(kind: type[Claimer]) -> None:
    """Eight claimers with connections of their own; a claim that wins nothing of what it found asks again."""
    queue(*map(str, range(400)))

    def take_all() -> list[int]:
        mine = kind("default", DatabaseClock("default"), lease=600)
        taken: list[int] = []
        while True:
            found = mine.claim(PLAIN, Wanted(rows=7, size=10**9, at_once=7), Policy())
            taken += [job.id for job in found.jobs]
            if not found.found:
                return taken

    taken = [id_ for mine in in_threads(*[take_all] * 8) for id_ in mine]
    assert len(taken) == len(set(taken))
    if kind is CompareAndSet or connection.vendor == "sqlite":
        assert len(taken) == 400
    else:
        # With SKIP LOCKED rows that are being claimed look as if there were none; whoever has them goes on.
        assert len(taken) >= 400 - 7 * 7
        assert len(take_all()) == 400 - len(taken)


def test_lapsed_rows_are_recovered_by_one_claimer_each() -> None:
    queue(*map(str, range(40)))
    claim()
    end_leases()
    found = in_threads(*[lambda: claim(Wanted(rows=40, size=10**9, at_once=40))] * 8)
    recovered = [job.id for jobs in found for job in jobs]
    assert len(recovered) == len(set(recovered)) > 0
    assert set(QueuedMessage.objects.filter(id__in=recovered).values_list("attempt_count", flat=True)) == {2}


class Together(CompareAndSet):
    """Reads its candidates, and waits for the others to have read theirs, before it takes them."""

    def __init__(self, both_have_read: threading.Barrier) -> None:
        super().__init__("default", DatabaseClock("default"), lease=60)
        self.both_have_read = both_have_read
        self.read: list[int] = []

    def _choose(self, *args: Any, **kwargs: Any) -> Any:
        chosen, left = super()._choose(*args, **kwargs)
        self.read = [candidate.id for candidate in chosen]
        self.both_have_read.wait(PATIENCE)
        return chosen, left


@pytest.mark.parametrize("kind", ["waits", "lapsed"])
def test_row_that_two_have_read_is_taken_by_one(kind: str) -> None:
    (row,) = queue()
    if kind == "lapsed":
        claim()
        end_leases()
    barrier = threading.Barrier(2)
    both = [Together(barrier), Together(barrier)]
    found = in_threads(*[partial(one.claim, PLAIN, ALL, Policy()) for one in both])
    assert [one.read for one in both] == [[row.pk], [row.pk]]  # it was a race
    ((job,),) = [one.jobs for one in found if one.jobs]
    row.refresh_from_db()
    assert (row.state, row.lease) == ("sending", job.lease)
    assert (row.attempt_count, row.lost_count) == ((2, 1) if kind == "lapsed" else (1, 0))


MEANWHILE: dict[str, tuple[str, dict[str, Any]]] = {
    # What a candidate was when it was read, and what it has become when it is to be taken.
    "another recovered it": ("lapsed", {"state": "sending", "lease": 1, "due_at": future}),
    "its worker was late, and deferred it": ("lapsed", {"state": "deferred", "lease": None, "due_at": future}),
    "its worker was late, and it is due again": ("lapsed", {"state": "deferred", "lease": None, "due_at": past}),
    "its worker was late, and it was sent": ("lapsed", {"state": "sent", "lease": None, "due_at": None}),
    "another took it": ("waits", {"state": "sending", "lease": 1, "due_at": future}),
    "another took it and died": ("waits", {"state": "sending", "lease": 1, "due_at": past}),
    "another tried it, and it waits again": ("waits", {"state": "deferred", "lease": None, "due_at": future}),
    "it was held": ("waits", {"state": "held", "lease": None, "due_at": None}),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_row_that_changed_since_it_was_read_is_not_taken(meanwhile: str) -> None:
    was, values = MEANWHILE[meanwhile]
    became = {name: value() if callable(value) else value for name, value in values.items()}
    (row,) = queue()
    if was == "lapsed":
        claim()
        end_leases()
        row.refresh_from_db()
    before = (row.attempt_count, row.lost_count, row.maybe_taken_since)

    class Slow(CompareAndSet):
        def _choose(self, *args: Any, **kwargs: Any) -> Any:
            chosen = super()._choose(*args, **kwargs)
            change(row, **became)
            return chosen

    found = Slow("default", DatabaseClock("default"), lease=60).claim(PLAIN, ALL, Policy())
    assert found == Claim([], found=1)
    row.refresh_from_db()
    assert {name: getattr(row, name) for name in became} == became
    assert (row.attempt_count, row.lost_count, row.maybe_taken_since) == before


REPEATABLE_READ = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ",
    "mysql": "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",
}


def test_claims_under_repeatable_read_harm_no_web_request() -> None:
    """Workers claim and settle while requests store mail: no deadlock of a request's, no lost row, none twice."""
    if connection.vendor not in REPEATABLE_READ:
        pytest.skip("SQLite has no isolation levels")
    are_stored = threading.Event()
    done: list[int] = []

    def isolate() -> None:
        with connection.cursor() as cursor:
            cursor.execute(REPEATABLE_READ[connection.vendor])

    def store() -> list[int]:
        isolate()
        try:
            return [row.pk for number in range(30) for row in queue(str(number))]  # any error of its own ends the test
        finally:
            done.append(1)
            if len(done) == 3:
                are_stored.set()

    def take() -> tuple[list[int], int, list[OperationalError]]:
        """What was won, by how many claims, and the errors that the others met: the worker's own turn to try again."""
        isolate()
        mine = claimer(lease=600)
        taken: list[int] = []
        errors: list[OperationalError] = []
        claims = 0
        while len(errors) < 200:
            may_be_the_last = are_stored.is_set()
            try:
                found = mine.claim(PLAIN, Wanted(rows=5, size=10**9, at_once=5), Policy())
            except OperationalError as error:
                errors.append(error)
                mine = claimer(lease=600)
                continue
            taken += [job.id for job in found.jobs]
            claims += bool(found.jobs)
            if not found.found:
                if may_be_the_last and not mine.has_floor(PLAIN):
                    break
                mine.forget_floors()
        return taken, claims, errors

    results: list[Any] = in_threads(*[store] * 3, *[take] * 4)
    stored = [id_ for ids in results[:3] for id_ in ids]
    taken = [id_ for ids, _, _ in results[3:] for id_ in ids]
    assert len(stored) == 90
    assert len(taken) == len(set(taken))
    assert set(taken) == set(stored)
    assert sum(claims for _, claims, _ in results[3:]) >= 90 / 5


def test_losing_every_row_does_not_look_like_an_empty_queue() -> None:
    queue("a", "b")

    class Slow(CompareAndSet):
        """Between its read and its UPDATE somebody else is faster."""

        def _choose(self, *args: Any, **kwargs: Any) -> Any:
            chosen = super()._choose(*args, **kwargs)
            in_threads(claim)
            return chosen

    found = Slow("default", DatabaseClock("default"), lease=60).claim(PLAIN, ALL, Policy())
    assert found == Claim([], found=2)


def test_claim_that_loses_some_rows_knows_which_it_won() -> None:
    (first, second) = queue("a", "b")

    class Slow(CompareAndSet):
        def _choose(self, *args: Any, **kwargs: Any) -> Any:
            chosen = super()._choose(*args, **kwargs)
            in_threads(lambda: claim(Wanted(rows=1, size=10**9, at_once=1)))
            return chosen

    (job,) = Slow("default", DatabaseClock("default"), lease=60).claim(PLAIN, ALL, Policy()).jobs
    assert job.id in (first.pk, second.pk)
    assert QueuedMessage.objects.get(lease=job.lease).pk == job.id
    assert QueuedMessage.objects.filter(state="sending").count() == 2


@pytest.mark.parametrize("admitted", [0, 1])
def test_admission_bounds_a_claim_and_is_undone_if_nothing_is_won(admitted: int) -> None:
    queue("a", "b", "c")

    def admit(found: int) -> int:
        assert found == 3
        QueuedMessage.objects.update(reason="admitted")
        return admitted

    found = claimer().claim(PLAIN, ALL, Policy(), admit=admit)
    assert (len(found.jobs), found.found) == (admitted, 3)
    assert QueuedMessage.objects.filter(reason="admitted").count() == (3 if admitted else 0)


# --- the floor ---


def test_scan_starts_where_the_last_claim_found_its_first_row() -> None:
    moment = [0.0]
    mine = Claimer("default", DatabaseClock("default", steady=lambda: moment[0]), lease=60)
    (row,) = queue("old")
    change(row, due_at=past(100))
    assert len(mine.claim(PLAIN, ALL, Policy()).jobs) == 1
    (late,) = queue("committed late")
    change(late, due_at=past(200))
    (new,) = queue("new")
    change(new, due_at=past(50))
    assert subjects(mine.claim(PLAIN, ALL, Policy()).jobs) == ["new"]
    moment[0] += 5.0
    assert subjects(mine.claim(PLAIN, ALL, Policy()).jobs) == ["committed late"]


# --- leases ---


def test_renewed_lease_ends_later() -> None:
    queue("a", "b")
    mine = claimer()
    jobs = mine.claim(PLAIN, ALL, Policy()).jobs
    QueuedMessage.objects.update(due_at=past())
    until = [job.leased_until for job in jobs]
    assert mine.renew(jobs) == []
    assert all(job.leased_until > before for job, before in zip(jobs, until, strict=True))
    assert QueuedMessage.objects.filter(due_at__gt=datetime.now(timezone.utc)).count() == 2


def test_lease_that_another_took_is_not_renewed() -> None:
    queue("a", "b")
    mine = claimer()
    jobs = mine.claim(PLAIN, ALL, Policy()).jobs
    lost = change(QueuedMessage.objects.get(pk=jobs[0].id), lease=1)
    until = jobs[0].leased_until
    assert mine.renew(jobs) == [jobs[0]]
    assert jobs[0].leased_until == until
    lost.refresh_from_db()
    assert lost.lease == 1


@pytest.mark.parametrize(("tried", "state"), [(0, "queued"), (1, "deferred")])
def test_row_that_is_given_back_was_never_claimed(tried: int, state: str) -> None:
    (row,) = queue()
    change(row, attempt_count=tried)
    mine = claimer()
    jobs = mine.claim(PLAIN, ALL, Policy()).jobs
    with statements() as found:
        mine.give_back(jobs)
    assert len(found) == 1
    row.refresh_from_db()
    assert (row.state, row.lease, row.attempt_count, row.maybe_taken_since) == (state, None, tried, None)
    assert len(claim()) == 1


def test_row_that_was_lost_is_not_given_back() -> None:
    (row,) = queue()
    mine = claimer()
    jobs = mine.claim(PLAIN, ALL, Policy()).jobs
    change(row, lease=1)
    mine.give_back(jobs)
    row.refresh_from_db()
    assert (row.state, row.lease) == ("sending", 1)


# --- what it costs ---


def test_claim_is_at_most_five_statements() -> None:
    queue("h", priority="high")
    queue("m", "m2")
    queue("l", priority="low")
    mine = claimer()
    mine.claim(OTHER, ALL, Policy())  # asks for the time and the isolation level
    with statements() as found:
        assert len(mine.claim(PLAIN, ALL, Policy()).jobs) == 4
    assert len(found) <= 5
    assert len([sql for sql in found if sql.startswith("UPDATE")]) == 1


def test_attachments_are_one_statement_more() -> None:
    from anymail_retry.mailqueue.enqueue import enqueue

    messages = [mail(), mail(), mail()]
    for message in messages:
        message.attach("a.bin", b"1", "application/octet-stream")
        message.attach("b.bin", b"2", "application/octet-stream")
    enqueue(messages, mailer=PLAIN, origin="queued")
    mine = claimer()
    mine.claim(OTHER, ALL, Policy())
    with statements() as found:
        assert all(job.is_whole for job in mine.claim(PLAIN, ALL, Policy()).jobs)
    assert len(found) <= 6


def test_skip_locked_is_used_only_under_read_committed() -> None:
    if connection.vendor == "sqlite":
        assert not may_skip_locked("default")
        return
    assert may_skip_locked("default")
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        else:
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    try:
        assert not may_skip_locked("default")
    finally:
        connection.close()


def test_reading_attachments_leaves_no_cursor_open_outside_a_transaction() -> None:
    """One that outlives its transaction (WITH HOLD) would be asked of another server behind a pooler."""
    if connection.vendor != "postgresql":
        pytest.skip("PostgreSQL alone has cursors of the server's")
    from anymail_retry.mailqueue.enqueue import enqueue

    message = mail()
    message.attach("a.bin", b"1", "application/octet-stream")
    enqueue([message], mailer=PLAIN, origin="queued")
    cursors: list[list[bool]] = []

    def look(execute: Any, sql: str, *args: Any) -> Any:
        result = execute(sql, *args)
        if "anymail_retry_attachmentbody" in sql:
            cursors.append(open_cursors())
        return result

    with connection.execute_wrapper(look):
        assert claim()[0].bodies == [b"1"]
    assert cursors == [[False]]  # there is one while rows are read, and it ends with the transaction
    assert open_cursors() == []


def open_cursors() -> list[bool]:
    """Of each that is open in this session, whether it outlives its transaction."""
    with connection.connection.cursor() as cursor:  # the driver's, whose statements are not looked at
        cursor.execute("SELECT is_holdable FROM pg_cursors WHERE name <> ''")
        return [holds for (holds,) in cursor.fetchall()]
