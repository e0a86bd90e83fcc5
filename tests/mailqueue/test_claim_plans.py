"""Which plans the database makes for the queries of a claim, among many rows.

A file of its own: its rows are there for all of its tests, which roll back.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.db import connection
from django.db.models import F

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
        assert " range " in plan  # by due_at too, and not all of a mailer's and a priority's
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


def test_floor_is_where_mariadb_begins_to_read(plans: Claimer) -> None:
    """PostgreSQL is asked in test_beside_others.py. Here too what was sent stays in the index: for this transaction."""
    if connection.vendor != "mysql":
        pytest.skip("a query to MariaDB")
    now = datetime.now(timezone.utc)
    due = plans.rows.filter(mailer=PLAIN, priority=2, due_at__lte=now)
    for _ in range(3):
        due.update(due_at=F("due_at") + timedelta(microseconds=1))  # a place in the index that stays, each time
    oldest = list(due.order_by("due_at").values_list("id", "due_at")[:1500])
    plans.rows.filter(id__in=[id_ for id_, _ in oldest]).update(state="sent", due_at=None)
    without = pages_read(plans, now)
    plans._floors[PLAIN, 2] = oldest[-1][1]
    with_floor = pages_read(plans, now)
    assert without > 1500  # it looks for each dead entry's row in the table
    assert with_floor < without / 3


def test_mariadb_keeps_to_the_range_where_nearly_all_is_due(plans: Claimer) -> None:
    if not getattr(connection, "mysql_is_mariadb", False):
        pytest.skip("a query to MariaDB")
    now = datetime.now(timezone.utc)
    plans.rows.filter(due_at__gt=now).update(due_at=past(60))
    equal = plans.rows.filter(mailer=PLAIN, priority=2, due_at__lte=now).order_by("due_at")
    assert " ref " in equal[:100].explain()  # which begins with what was sent
    assert " range " in plans.due(PLAIN, 2, now)[:100].explain()


def pages_read(claimer: Claimer, now: datetime) -> int:
    sql, params = claimer.due(PLAIN, 2, now)[:100].query.sql_with_params()
    with connection.cursor() as cursor:
        cursor.execute(f"ANALYZE FORMAT=JSON {sql}", params)
        table = json.loads(cursor.fetchone()[0])["query_block"]["nested_loop"][0]["table"]
    assert table["r_rows"] == 100
    if "pages_accessed" not in table["r_engine_stats"]:
        pytest.skip("this server does not say how many pages a query read")
    return int(table["r_engine_stats"]["pages_accessed"])


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
