"""A site that reads from a replica: the queue never does, because a replica is late.

Here, everything by which people look at the queue and set it right. Enqueuing and the worker are asked in
test_enqueue.py, importing in test_importing.py.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from django.core.management import call_command
from django.db import connections
from django.urls import reverse

from anymail_retry.mailqueue import operations, status
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.models import AttachmentBody, Attempt, MailerState, QueuedMessage

from .engine import PLAIN, mail, past
from .test_enqueue import _forbidden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.test import Client
    from pytest_django.fixtures import SettingsWrapper

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "queue"])

REPLICA = "queue"


class Router:
    """Reads of these apps go to a replica."""

    def __init__(self, *apps: str) -> None:
        self.apps = apps

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return REPLICA if model._meta.app_label in self.apps else "default"

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"

    def allow_relation(self, one: Any, other: Any, **hints: Any) -> bool:
        return True


@pytest.fixture
def replica(settings: SettingsWrapper) -> Iterator[None]:
    """Whatever asks it fails."""
    settings.DATABASE_ROUTERS = [Router("anymail_retry", "mailer", "post_office")]
    with connections[REPLICA].execute_wrapper(_forbidden):
        with pytest.raises(AssertionError, match="asked the replica"):
            QueuedMessage.objects.count()  # who does not name the database
        yield


def rows(*states: str) -> list[QueuedMessage]:
    """One row in each state, with an attachment and a history."""
    made = []
    for state in states:
        message = mail(state)
        message.attach("a.txt", "text", "text/plain")
        (row,) = enqueue([message], mailer=PLAIN, origin="queued")
        waits = state in ("queued", "deferred")
        values = {"state": state, "due_at": past() if waits else None, "ended_at": None if waits else past(86400 * 99)}
        primary().filter(pk=row.pk).update(**values)
        row.refresh_from_db(using="default")
        Attempt.objects.using("default").create(message=row, number=1, started_at=past(), verdict="refused")
        made.append(row)
    return made


def primary() -> Any:
    return QueuedMessage.objects.using("default")


def state_of(row: QueuedMessage) -> str:
    state: str = primary().values_list("state", flat=True).get(pk=row.pk)
    return state


OPERATIONS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    # What is done to a row in which state, and what it becomes. The rows are chosen as a site would: by any alias.
    "retry_now": ("deferred", operations.retry_now, "deferred"),
    "retry_now of what failed": ("failed", lambda rows: operations.retry_now(rows, ["failed"]), "deferred"),  # type: ignore[list-item]
    "hold": ("queued", operations.hold, "held"),
    "release": ("held", operations.release, "deferred"),
    "cancel": ("queued", operations.cancel, "cancelled"),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.usefixtures("replica")
def test_operations_do_not_ask_it(name: str) -> None:
    was, operate, became = OPERATIONS[name]
    (row,) = rows(was)
    assert operate(QueuedMessage.objects.filter(pk=row.pk)).changed == 1
    assert state_of(row) == became


@pytest.mark.usefixtures("replica")
def test_operations_on_one_message_do_not_ask_it() -> None:
    (sent,) = rows("sent")
    assert operations.stored_message(sent).attachments[0][1] == "text"  # type: ignore[index]  # a tuple
    assert state_of(operations.send_again(sent)) == "queued"


@pytest.mark.usefixtures("replica")
def test_operations_on_mailers_do_not_ask_it() -> None:
    rows("queued")
    assert PLAIN in operations.mailers()
    operations.pause(PLAIN)
    assert MailerState.objects.using("default").get(alias=PLAIN).paused_until is not None
    assert operations.resume(PLAIN)


@pytest.mark.usefixtures("replica")
def test_status_does_not_ask_it() -> None:
    rows("queued", "deferred", "failed")
    assert sum(one.due for one in status.status() if one.mailer == PLAIN) == 2
    assert status.remaining().waiting == 2


def run(command: str, *args: str) -> str:
    out = io.StringIO()
    call_command(command, *args, stdout=out, stderr=out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("mail_queue_status", []),
        ("mail_queue_status", ["--json"]),
        ("retry_deferred", []),
        ("retry_deferred", ["--failed", "--held"]),
        ("purge_mail_log", ["30"]),
        ("purge_mail_log", ["30", "--result=all", "--json"]),
        ("send_mail", []),
    ],
)
@pytest.mark.usefixtures("replica", "script")
def test_commands_do_not_ask_it(command: str, args: list[str]) -> None:
    rows("queued", "deferred", "held", "failed", "sent")
    AttachmentBody.objects.using("default").create(digest="d" * 64, data=b"unlinked", created_at=past(86400))
    run(command, *args)
    assert primary().filter(state="sent").exists() == (command != "purge_mail_log")


PAGES = {
    "the list": ("changelist", "queuedmessage"),
    "a message": ("change", "queuedmessage"),
    "the mailers": ("changelist", "mailerstate"),
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("replica")
def test_pages_of_the_admin_do_not_ask_it(admin_client: Client, page: str) -> None:
    row, *_ = rows("queued", "deferred", "failed", "sent")
    MailerState.objects.using("default").create(alias=PLAIN)
    kind, model = PAGES[page]
    url = reverse(f"admin:anymail_retry_{model}_{kind}", args=[row.pk] if kind == "change" else [])
    answer = admin_client.get(url)
    assert answer.status_code == 200
    assert "EmailBackend" in answer.content.decode() or "PlainBackend" in answer.content.decode()


@pytest.mark.parametrize(
    ("action", "was", "became"),
    [("hold", "queued", "held"), ("cancel", "queued", "cancelled"), ("release", "held", "deferred")],
)
@pytest.mark.usefixtures("replica")
def test_actions_of_the_admin_do_not_ask_it(admin_client: Client, action: str, was: str, became: str) -> None:
    (row,) = rows(was)
    url = reverse("admin:anymail_retry_queuedmessage_changelist")
    answer = admin_client.post(url, {"action": action, "_selected_action": [row.pk], "confirmed": "yes"}, follow=True)
    assert answer.status_code == 200
    assert state_of(row) == became
