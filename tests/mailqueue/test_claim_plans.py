"""Which plans the database makes for the queries of a claim, among many rows.

A file of its own: its rows are there for all of its tests, which roll back.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.db import connection

from anymail_retry.mailqueue.claim import Claimer
from anymail_retry.mailqueue.clock import DatabaseClock
from anymail_retry.models import QueuedMessage

from .engine import OTHER, PLAIN, future, past, statements

pytestmark = pytest.mark.django_db

MANY = 20_000


@pytest.fixture(scope="module")
def full_queue(django_db_setup: None, django_db_blocker: Any) -> Any:
    """So many rows that a plan says something: due and not due, of two mailers and three priorities, and terminal."""
    with django_db_blocker.unblock():
        now = datetime.now(timezone.utc)
        rows = []
        for number in range(MANY):
            kind = number % 4
            rows.append(
                QueuedMessage(
                    mailer=(PLAIN, OTHER)[number % 2],
                    priority=1 + number % 3,
                    state="sent" if kind == 3 else "queued",
                    due_at=None if kind == 3 else now + timedelta(seconds=number * (1 if kind == 2 else -1)),
                    origin="queued",
                    created_at=now,
                )
            )
        QueuedMessage.objects.bulk_create(rows, batch_size=2000)
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE TABLE anymail_retry_queuedmessage" if connection.vendor == "mysql" else "ANALYZE")
            if connection.vendor == "mysql":
                cursor.fetchall()
        yield
        QueuedMessage.objects.all()._raw_delete("default")


@pytest.fixture
def plans(full_queue: None, db: None) -> Claimer:
    return Claimer("default", DatabaseClock("default"), lease=60.0)


@pytest.mark.parametrize("with_floor", [False, True])
def test_claim_reads_the_index_in_order_and_sorts_nothing(plans: Claimer, with_floor: bool) -> None:
    if with_floor:
        plans._floors[PLAIN, 2] = past(4000)
    due = plans.due(PLAIN, 2, datetime.now(timezone.utc))[:100]
    if connection.vendor == "mysql":
        plan = due.explain()
        assert "anymail_retry_claim" in plan
        assert "filesort" not in plan
        return
    plan = due.explain()
    assert "anymail_retry_claim" in plan
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan
    if connection.vendor == "sqlite":
        assert "(mailer=? AND priority=? AND due_at" in plan
    else:
        assert "Index Scan" in plan
        assert "Index Cond" in plan
        condition = plan.split("Index Cond:")[1].splitlines()[0]
        assert all(column in condition for column in ("mailer", "priority", "due_at"))


def test_listing_mailers_looks_each_up_in_the_index(plans: Claimer) -> None:
    following = plans.rows.filter(mailer__gt=OTHER).order_by("mailer").values_list("mailer", flat=True)[:1]
    plan = following.explain()
    assert "anymail_retry_claim" in plan
    assert not any(word in plan for word in ("Sort", "TEMP B-TREE", "filesort"))


@pytest.mark.parametrize("with_floor", [False, True])
def test_plans_are_of_the_real_queries(plans: Claimer, with_floor: bool) -> None:
    if with_floor:
        plans._floors[PLAIN, 2] = past(4000)
    now = future(-1)
    explained = plans.due(PLAIN, 2, now)[:10]
    with statements() as of_the_plan:
        list(explained)
    with statements() as of_the_claim:
        plans._read(PLAIN, 2, now, 10, (), False)
    assert of_the_claim == of_the_plan
    assert len(of_the_claim) == 1
    if connection.features.has_select_for_update_skip_locked:
        plans._floors = {(PLAIN, 2): past(4000)} if with_floor else {}
        explained = plans.due(PLAIN, 2, now)[:10]
        with statements() as of_the_plan:
            list(explained)
        with statements() as of_the_claim:
            plans._read(PLAIN, 2, now, 10, (), True)
        assert of_the_claim == [f"{sql} FOR UPDATE SKIP LOCKED" for sql in of_the_plan]
