"""The admin: to look, to find, and to set right; never to edit by hand what a worker may hold."""

from __future__ import annotations

import pytest
from django.core.mail import EmailMessage
from django.test import Client
from django.urls import reverse

from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.states import State
from anymail_retry.models import MailerState, QueuedMessage

pytestmark = pytest.mark.django_db

LIST = "admin:anymail_retry_queuedmessage_changelist"


def queued(subject: str) -> QueuedMessage:
    (row,) = enqueue(
        [EmailMessage(subject, "body", "from@example.com", ["to@example.com"])], mailer="default", origin="queued"
    )
    return row


def act(admin_client: Client, action: str, *rows: QueuedMessage) -> str:
    answer = admin_client.post(
        reverse(LIST), {"action": action, "_selected_action": [row.pk for row in rows]}, follow=True
    )
    assert answer.status_code == 200
    return answer.content.decode()


def test_the_list_shows_each_message_and_finds_one_by_subject(admin_client: Client) -> None:
    queued("Your invoice")
    queued("Your password")
    page = admin_client.get(reverse(LIST)).content.decode()
    assert "Your invoice" in page
    assert "Your password" in page
    found = admin_client.get(reverse(LIST), {"q": "invoice"}).content.decode()
    assert "Your invoice" in found
    assert "Your password" not in found


def test_a_message_shows_its_fields_and_neither_key_nor_form(admin_client: Client) -> None:
    row = queued("Look at me")
    page = admin_client.get(reverse("admin:anymail_retry_queuedmessage_change", args=[row.pk])).content.decode()
    assert "Look at me" in page
    assert row.key not in page
    assert 'name="subject"' not in page


def test_nothing_is_added_or_deleted_by_hand(admin_client: Client) -> None:
    row = queued("Keep me")
    assert admin_client.get(reverse("admin:anymail_retry_queuedmessage_add")).status_code == 403
    assert admin_client.get(reverse("admin:anymail_retry_queuedmessage_delete", args=[row.pk])).status_code == 403
    assert "delete_selected" not in admin_client.get(reverse(LIST)).content.decode()


@pytest.mark.parametrize(
    ("action", "before", "after"),
    [
        pytest.param("hold", State.QUEUED, State.HELD, id="a waiting message is held"),
        pytest.param("release", State.HELD, State.DEFERRED, id="a held message goes on"),
        pytest.param("cancel", State.DEFERRED, State.CANCELLED, id="a waiting message is given up"),
        pytest.param("retry_now", State.FAILED, State.DEFERRED, id="a failed message is tried again"),
        pytest.param("cancel", State.SENDING, State.SENDING, id="a message that is being sent is left alone"),
        pytest.param("retry_now", State.SENT, State.SENT, id="sent is final"),
    ],
)
def test_actions_change_the_state_only_where_no_worker_is_at_work(
    admin_client: Client, action: str, before: State, after: State
) -> None:
    row = queued("Act on me")
    QueuedMessage.objects.filter(pk=row.pk).update(state=before)
    page = act(admin_client, action, row)
    row.refresh_from_db()
    assert row.state == after
    assert ("being sent at this moment" in page) == (before is State.SENDING)


def test_a_mailer_is_paused_and_resumed(admin_client: Client) -> None:
    MailerState.objects.create(alias="default")
    url = reverse("admin:anymail_retry_mailerstate_changelist")
    for action, is_paused in (("pause", True), ("resume", False)):
        admin_client.post(url, {"action": action, "_selected_action": ["default"]})
        assert (MailerState.objects.get().paused_until is not None) is is_paused
