"""Writing down what sending came to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from django.db import connections
from django.db.models import Case, F, Field, Q, Value, When

from .. import signals
from ..log import get_logger, reporting
from ..models import AttachmentBody, Attempt, MessageAttachment, MessageContent, QueuedMessage
from ..verdict import Outcome, Verdict
from .claim import Job
from .database import errors_of, first_line, is_there, own_transaction, storable
from .schedule import Fate
from .statements import delete, insert_many, update
from .states import State

logger = get_logger("queue")

#: Results are written so many seconds after the first of them, to be within 50 ms of the answer.
INTERVAL = 0.03

#: Tries of one batch before each of its results is tried by itself.
BATCH_TRIES = 3

#: Seconds after which a result that was refused by itself is tried again.
LATER = 5.0

#: Rows in one guarded UPDATE: each needs a few parameters per column, and SQLite before 3.32 takes 999 in all.
ROWS_IN_UPDATE = 50

#: The columns that an attempt leaves its mark on, beside those that are the same for every row.
COLUMNS = (
    "state",
    "due_at",
    "ended_at",
    "attempt_count",
    "lost_count",
    "key",
    "key_from_user",
    "maybe_taken_since",
    "key_used_since",
    "body_digest",
    "verdict",
    "reason",
    "http_status",
    "answer",
)

#: What the columns of an attempt hold that nothing is said about.
NO_ATTEMPT = {field.attname: field.get_default() for field in Attempt._meta.concrete_fields if not field.primary_key}

SIGNALS = {
    State.SENT: signals.message_sent,
    State.DEFERRED: signals.message_deferred,
    State.HELD: signals.message_held,
    State.FAILED: signals.message_failed,
}

LEVELS = {State.HELD: logging.WARNING, State.FAILED: logging.ERROR}


@dataclass(frozen=True, eq=False)
class Result:
    """What one job came to.

    :param outcome: None: it was not begun.
    :param started_at: by the database's clock.
    :param seconds: how long sending took; None: unknown.
    """

    job: Job
    fate: Fate
    outcome: Outcome | None = None
    started_at: datetime | None = None
    seconds: float | None = None

    @property
    def is_a_fact(self) -> bool:
        """The ESP took it, which no lost lease and no other worker's result can change."""
        return self.outcome is not None and self.outcome.verdict is Verdict.DELIVERED


class Settler:
    """Collects the results of one worker, and writes them in batches.

    :param worker: its name, for the history.
    :param keep_content: keep what was sent, too.
    """

    def __init__(self, alias: str, *, worker: str, keep_content: bool, steady: Callable[[], float]) -> None:
        self.alias = alias
        self.worker = worker[:100]
        self.keep_content = keep_content
        self.steady = steady
        self._pending: list[Result] = []
        self._failures = 0
        #: When the pending results have to be written, by the steady clock; None: there are none.
        self.due_at: float | None = None

    def add(self, result: Result) -> None:
        self._pending.append(result)
        if self.due_at is None:
            self.due_at = self.steady() + INTERVAL

    def flush(self, now: datetime) -> tuple[list[Result], list[Result]]:
        """Write what is pending. The results that are done with, and of these the ones that counted: the others had
        lost their row.

        :raises django.db.Error: nothing was written; it stays pending.
        """
        results = list(self._pending)
        try:
            written = self.settle(results, now)
        except Exception as error:
            trouble = isinstance(error, errors_of(self.alias))
            self._failures += 1
            if trouble and (self._failures < BATCH_TRIES or connections[self.alias].in_atomic_block):
                raise
            if trouble and not is_there(self.alias):
                raise
            results, written = self._settle_one_by_one(results, now)
            if trouble and not results:
                raise  # nothing is taken, so it is not for what these results say
        done = set(results)
        self._pending = [result for result in self._pending if result not in done]
        if self._pending:
            self.due_at = self.steady() + LATER
        else:
            self._failures, self.due_at = 0, None
        return results, written

    def _settle_one_by_one(self, results: Iterable[Result], now: datetime) -> tuple[list[Result], list[Result]]:
        """A result that the database does not take costs only its words; one that it does not take without them
        either is tried again for as long as this process lives."""
        done: list[Result] = []
        written: list[Result] = []
        for result in results:
            for bare in (False, True):
                try:
                    written += self.settle([result], now, bare=bare)
                    done.append(result)
                    break
                except Exception as error:
                    if isinstance(error, errors_of(self.alias)) and not is_there(self.alias):
                        # The others would meet the same, each for as long as it takes to find nobody.
                        return done, written
                    logger.error(
                        "%s: the result of message %s is refused: %s: %s",
                        result.job.mailer,
                        result.job.id,
                        type(error).__name__,
                        first_line(error),
                    )
        return done, written

    def settle(self, results: Sequence[Result], now: datetime, *, bare: bool = False) -> list[Result]:
        """Write results, in one transaction. Those that counted: the others had lost their row.

        Three statements where all were delivered and none has attachments.

        :param bare: only what decides about the row; no words of the ESP's, no history.
        """
        facts = [result for result in results if result.is_a_fact]
        others = [result for result in results if not result.is_a_fact]
        written = list(facts)
        with own_transaction(self.alias):
            if facts:
                self._write_delivered(facts, now)
            for start in range(0, len(others), ROWS_IN_UPDATE):
                written += self._write_guarded(others[start : start + ROWS_IN_UPDATE], now, bare=bare)
            attempts = [] if bare else [attempt for result in results for attempt in self._attempts(result)]
            if attempts:
                insert_many(self.alias, Attempt, attempts)
            if facts and not self.keep_content:
                self._delete_content([result.job for result in facts])
        return written

    def announce(self, results: Iterable[Result]) -> list[Callable[[], None]]:
        """Log results that are written and committed, and give the calls by which receivers hear of them. Neither of
        reports.

        The calls are left to the worker, because receivers may take their time.
        """
        results = [result for result in results if not result.job.is_report]
        heard = [
            result
            for result in results
            if (signal := SIGNALS.get(result.fate.state)) is not None and signal.has_listeners(QueuedMessage)
        ]
        rows = QueuedMessage.objects.using(self.alias).in_bulk([result.job.id for result in heard]) if heard else {}
        for result in results:
            _log(result)
        return [
            partial(_signal, result, rows[result.job.id])
            for result in heard
            if result.job.id in rows  # not deleted meanwhile
        ]

    def _write_delivered(self, results: Sequence[Result], now: datetime) -> None:
        # Without the lease, over any state: another worker may have the row by now, and must not undo this.
        update(
            self.alias,
            [result.job.id for result in results],
            {
                "state": State.SENT,
                "due_at": None,
                "lease": None,
                "ended_at": now,
                "verdict": Verdict.DELIVERED.value,
                "reason": "",
                "http_status": None,
                "answer": "",
            },
        )

    def _write_guarded(self, results: Sequence[Result], now: datetime, *, bare: bool) -> list[Result]:
        """One UPDATE for results of every kind; each row only while its lease is the one that the result is of."""
        mine = Q()
        for lease in {result.job.lease for result in results}:
            mine |= Q(lease=lease, id__in=[result.job.id for result in results if result.job.lease == lease])
        rows = QueuedMessage.objects.using(self.alias).filter(mine)
        values = {result.job.id: self._values(result, now, bare=bare) for result in results}
        if rows.update(**_by_row(values), lease=None) == len(results):
            return list(results)
        states = QueuedMessage.objects.using(self.alias).filter(id__in=list(values), lease=None)
        found = dict(states.values_list("id", "state"))
        return [result for result in results if found.get(result.job.id) == result.fate.state]

    def _values(self, result: Result, now: datetime, *, bare: bool) -> dict[str, Any]:
        job, fate, outcome = result.job, result.fate, result.outcome
        delivery = job.delivery
        values: dict[str, Any] = {
            "state": fate.state,
            "due_at": fate.due_at,
            "ended_at": now if fate.state in (State.FAILED, State.CANCELLED) else None,
            "attempt_count": job.number if outcome is not None else job.number - 1,
            "lost_count": job.lost if outcome is None else 0,
            "key": delivery.key,
            "key_from_user": delivery.key_from_user,
            "maybe_taken_since": delivery.maybe_taken_since,
            "key_used_since": delivery.key_used_since,
            "body_digest": delivery.body_digest,
            "reason": "" if bare else storable(fate.reason, 200),
        }
        if outcome is None or bare:
            return values
        return values | {
            "verdict": str(outcome.verdict or ""),
            "http_status": outcome.http_status,
            "answer": storable(outcome.answer, 500),
        }

    def _attempts(self, result: Result) -> Iterator[dict[str, Any]]:
        """The rows of the history that a result makes."""
        job, outcome = result.job, result.outcome
        if job.direct is not None:
            yield {
                **NO_ATTEMPT,
                "message_id": job.id,
                "number": 1,
                "started_at": job.direct.at,
                "verdict": job.direct.verdict,
                "reason": job.direct.reason,
                "http_status": job.direct.http_status,
                "answer": job.direct.answer,
            }
        if job.recovered and job.recovered_from is not None:
            yield {
                **NO_ATTEMPT,
                "message_id": job.id,
                "number": job.number - 1,
                "started_at": job.recovered_from,
                "verdict": Verdict.AMBIGUOUS.value,
                "reason": "its worker died or lost it",
            }
        if outcome is not None and result.started_at is not None:
            yield {
                "message_id": job.id,
                "number": job.number,
                "started_at": result.started_at,
                "duration_ms": None if result.seconds is None else max(0, round(result.seconds * 1000)),
                "verdict": str(outcome.verdict or ""),
                "reason": storable(outcome.reason, 200),
                "http_status": outcome.http_status,
                "answer": storable(outcome.answer, 500),
                "worker": self.worker,
            }

    def _delete_content(self, jobs: Collection[Job]) -> None:
        delete(self.alias, MessageContent, "message", [job.id for job in jobs])
        attached = [job for job in jobs if job.attachments]
        if not attached:
            return
        delete(self.alias, MessageAttachment, "message", [job.id for job in attached])
        delete(
            self.alias, AttachmentBody, "id", [body for job in attached for body in job.private_bodies], null="digest"
        )


def _by_row(values: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Per column one expression that gives each row its own value, or the value that all have in common."""
    expressions: dict[str, Any] = {}
    for column in COLUMNS:
        wanted = {row: own[column] for row, own in values.items() if column in own}
        if not wanted:
            continue
        first = next(iter(wanted.values()))
        if len(wanted) == len(values) and all(value == first for value in wanted.values()):
            expressions[column] = first
            continue
        model_field: Field[Any, Any] = QueuedMessage._meta.get_field(column)  # type: ignore[assignment]  # not a relation
        expressions[column] = Case(
            *[When(id=row, then=Value(value, output_field=model_field)) for row, value in wanted.items()],
            default=F(column),
            output_field=model_field,
        )
    return expressions


def _signal(result: Result, row: QueuedMessage) -> None:
    with reporting():
        SIGNALS[result.fate.state].send_robust(QueuedMessage, queued_message=row, message=None, outcome=result.outcome)


def _log(result: Result) -> None:
    """One line per row, without what the ESP said: it may quote the message."""
    job, fate, outcome = result.job, result.fate, result.outcome
    level = LEVELS.get(fate.state, logging.INFO)
    if not logger.isEnabledFor(level):
        return
    details: list[object] = [fate.reason]
    if outcome is not None:
        details = [outcome.verdict, fate.reason, outcome.http_status]
    due = f" until {fate.due_at:%Y-%m-%d %H:%M:%S} UTC" if fate.due_at else ""
    logger.log(
        level,
        "%s: message %s %s%s, attempt %s (%s)%s",
        job.mailer,
        job.id,
        fate.state,
        due,
        job.number,
        ", ".join(str(detail) for detail in details if detail),
        "; it may have been taken" if job.delivery.maybe_taken_since and fate.due_at else "",
    )
