"""The statements that are put together by hand do what Django's own would."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.db import DataError, connection, transaction

from anymail_retry.mailqueue.settle import NO_ATTEMPT
from anymail_retry.mailqueue.statements import delete, insert_many, update
from anymail_retry.mailqueue.states import State
from anymail_retry.models import Attempt, QueuedMessage
from anymail_retry.verdict import Verdict

from .engine import PLAIN, queue, statements

NOON = datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=timezone.utc)


def attempt(**values: Any) -> dict[str, Any]:
    return {**NO_ATTEMPT, "message_id": 1, "number": 1, "started_at": NOON, **values}


ROWS = {
    "one row": [attempt()],
    "the same row twice": [attempt(), attempt()],
    "nothing in common": [attempt(), attempt(message_id=2, number=2, started_at=NOON + timedelta(1), reason="why")],
    "NULL in some": [attempt(http_status=status, duration_ms=0) for status in (None, 200, None)],
    "NULL in all": [attempt(number=number, http_status=None) for number in range(3)],
    "members of an enumeration": [attempt(verdict=Verdict.REFUSED), attempt(verdict="sent")],
    "signs that SQL has a use for": [attempt(answer="%s %% ' \" \\ ; -- {a,b} NULL"), attempt(answer="{}")],
    "other alphabets": [attempt(answer="żółć"), attempt(answer="メール")],
    "zero and false, which are equal": [attempt(duration_ms=0), attempt(duration_ms=False)],
    "many": [attempt(message_id=number % 7 + 1, number=number) for number in range(500)],
}


@pytest.mark.django_db
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_rows_are_stored_as_by_bulk_create(rows: list[dict[str, Any]]) -> None:
    insert_many("default", Attempt, rows)
    ours = list(Attempt.objects.order_by("id").values(*NO_ATTEMPT))
    Attempt.objects.all().delete()
    Attempt.objects.bulk_create(Attempt(**row) for row in rows)
    assert ours == list(Attempt.objects.order_by("id").values(*NO_ATTEMPT))
    assert len(ours) == len(rows)


@pytest.mark.django_db
def test_ids_come_in_the_order_of_the_rows() -> None:
    queue("an older one")
    rows = [vars(QueuedMessage(mailer=PLAIN, origin="queued", created_at=NOON, subject=str(n))) for n in range(300)]
    for more in (rows, rows[:1]):
        ids = insert_many("default", QueuedMessage, more, ids=True)
        assert [QueuedMessage.objects.get(pk=pk).subject for pk in ids] == [row["subject"] for row in more]


@pytest.mark.django_db
def test_more_parameters_than_a_statement_takes_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    if connection.vendor != "sqlite":
        pytest.skip("SQLite alone limits the parameters of a statement")
    rows = [vars(QueuedMessage(mailer=PLAIN, origin="queued", created_at=NOON, subject=str(n))) for n in range(10)]
    monkeypatch.setattr(type(connection.features), "max_query_params", len(rows[0]) + 3)
    with statements() as found:
        ids = insert_many("default", QueuedMessage, rows, ids=True)
    assert len(found) > 1
    assert [QueuedMessage.objects.get(pk=pk).subject for pk in ids] == [row["subject"] for row in rows]


@pytest.mark.django_db
@pytest.mark.parametrize("others", [0, 1], ids=["alone", "among others"])
def test_what_is_too_long_is_refused_and_not_cut(others: int) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite knows no lengths")
    rows = [attempt(reason="x" * 201), *[attempt()] * others]
    with pytest.raises(DataError), transaction.atomic():
        insert_many("default", Attempt, rows)
    assert not Attempt.objects.exists()


@pytest.mark.django_db
def test_an_update_is_of_the_rows_that_it_names() -> None:
    one, two, three = queue("one", "two", "three")
    update("default", [one.pk, three.pk], {"state": State.SENT, "due_at": None, "ended_at": NOON, "answer": "100 %"})
    found = QueuedMessage.objects.order_by("id").values_list("state", "due_at", "ended_at", "answer")
    assert list(found) == [
        ("sent", None, NOON, "100 %"),
        ("queued", two.due_at, None, ""),
        ("sent", None, NOON, "100 %"),
    ]


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("values", "null", "left", "reason"),
    [
        ([], None, "abc", "no values: no rows"),
        ([1], None, "bc", "one"),
        ([1, 3, 3, 99], None, "b", "several, one of them twice, one of them of no row"),
        ([1, 3], "http_status", "bc", "of these only where it is NULL"),
    ],
)
def test_rows_are_deleted_by_their_values(values: list[int], null: str | None, left: str, reason: str) -> None:
    rows = [attempt(message_id=1, reason="a"), attempt(message_id=2, reason="b")]
    insert_many("default", Attempt, [*rows, attempt(message_id=3, reason="c", http_status=200)])
    deleted = delete("default", Attempt, "message", values, null=null)
    assert "".join(Attempt.objects.order_by("id").values_list("reason", flat=True)) == left, reason
    assert deleted == 3 - len(left), reason
