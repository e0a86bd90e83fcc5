"""The admin: to look, to find, and to set right; never to edit by hand what a worker may hold."""

from __future__ import annotations

import html
import re
from datetime import timedelta
from email.mime.base import MIMEBase
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.core.mail import EmailMessage, EmailMultiAlternatives
from django.db import connections
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from anymail_retry.mailqueue import operations
from anymail_retry.mailqueue.clock import clock_of
from anymail_retry.mailqueue.enqueue import enqueue
from anymail_retry.mailqueue.states import State
from anymail_retry.models import Attempt, MailerState, MessageContent, QueuedMessage
from tests.mailqueue.engine import change, past

if TYPE_CHECKING:
    from pytest_django.fixtures import SettingsWrapper

pytestmark = pytest.mark.django_db

LIST = "admin:anymail_retry_queuedmessage_changelist"
DETAIL = "admin:anymail_retry_queuedmessage_change"
MAILERS = "admin:anymail_retry_mailerstate_changelist"


def queued(subject: str = "Subject", mailer: str = "default", **values: Any) -> QueuedMessage:
    return queued_message(EmailMessage(subject, "body", "from@example.com", ["to@example.com"]), mailer, **values)


def queued_message(message: EmailMessage, mailer: str = "default", **values: Any) -> QueuedMessage:
    (row,) = enqueue([message], mailer=mailer, origin="queued")
    return change(row, **values) if values else row


def list_page(client: Client, **query: str) -> str:
    answer = client.get(reverse(LIST), query)
    assert answer.status_code == 200
    return answer.content.decode()


def detail_page(client: Client, row: QueuedMessage) -> str:
    answer = client.get(reverse(DETAIL, args=[row.pk]))
    assert answer.status_code == 200
    return answer.content.decode()


def act(client: Client, action: str, *rows: QueuedMessage, **data: Any) -> str:
    answer = client.post(
        reverse(LIST), {"action": action, "_selected_action": [row.pk for row in rows], **data}, follow=True
    )
    assert answer.status_code == 200
    return html.unescape(answer.content.decode())


def confirmed(client: Client, action: str, *rows: QueuedMessage) -> str:
    return act(client, action, *rows, confirmed="yes")


def told(page: str) -> list[tuple[str, str]]:
    """The messages on a page: level and text."""
    return re.findall(r'<li class="(success|warning|error)">(.*?)</li>', page)


@pytest.fixture
def client_with(client: Client) -> Any:
    """A client whose user has these permissions, and no others."""

    def log_in(*permissions: str) -> Client:
        user = User.objects.create_user("ada", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
        client.force_login(user)
        return client

    return log_in


# --- look, and find ---


def test_the_list_shows_each_message_and_finds_one_by_subject(admin_client: Client) -> None:
    queued("Your invoice")
    queued("Your password")
    page = list_page(admin_client)
    assert "Your invoice" in page
    assert "Your password" in page
    found = list_page(admin_client, q="invoice")
    assert "Your invoice" in found
    assert "Your password" not in found


@pytest.mark.parametrize("words", ["401", "blocked", "api key", "No such key"])
def test_the_list_shows_the_last_answer(admin_client: Client, words: str) -> None:
    queued(http_status=401, verdict="blocked", reason="api key", answer="No such key")
    assert words in list_page(admin_client)


@pytest.mark.parametrize("words", ["api key", "No such key"])
def test_a_message_is_found_by_its_last_answer(admin_client: Client, words: str) -> None:
    queued("This one", reason="api key", answer="No such key")
    queued("Another")
    found = list_page(admin_client, q=words)
    assert "This one" in found
    assert "Another" not in found


@pytest.mark.parametrize(
    ("mailer", "short"),
    [
        ("default", "default"),
        ("anymail_retry.backends.mandrill.EmailBackend", "mandrill"),
        ("anymail_retry.backends.RetryableMailgunEmailBackend", "Mailgun"),
        ("shop.mail.Invoices", "Invoices"),
    ],
)
def test_the_list_shows_mailers_by_a_short_name(admin_client: Client, mailer: str, short: str) -> None:
    queued(mailer=mailer)
    assert f'<span title="{mailer}">{short}</span>' in list_page(admin_client)


def test_long_texts_are_shortened(admin_client: Client) -> None:
    queued("A" * 100)
    page = list_page(admin_client)
    assert f'<span title="{"A" * 100}">{"A" * 39}…</span>' in page


@pytest.mark.parametrize(
    "query", [{"state__exact": "held"}, {"mailer": "other"}, {"verdict": "blocked"}, {"created_at__lt": "2020-01-01"}]
)
def test_the_list_is_filtered(admin_client: Client, query: dict[str, str]) -> None:
    queued("Not this")
    queued("But this", mailer="other", state="held", verdict="blocked", created_at=past(315_360_000))
    page = list_page(admin_client, **query)
    assert "But this" in page
    assert "Not this" not in page


def test_the_filter_tells_mailers_of_one_short_name_apart(admin_client: Client) -> None:
    names = ("one.smtp.EmailBackend", "two.smtp.EmailBackend")
    for name in names:
        queued(mailer=name)
    page = list_page(admin_client)
    assert all(f">{name}</a>" in page for name in names)


def test_times_have_seconds(admin_client: Client) -> None:
    row = queued()
    row = change(row, created_at=past(86_400))
    expected = f"{timezone.localtime(row.created_at):%Y-%m-%d %H:%M:%S}"
    assert expected in list_page(admin_client)
    assert expected in detail_page(admin_client, row)


def test_a_message_shows_its_fields_and_neither_key_nor_form(admin_client: Client) -> None:
    row = queued("Look at me")
    page = detail_page(admin_client, row)
    assert "Look at me" in page
    assert row.key not in page
    assert 'name="subject"' not in page
    assert 'name="_save"' not in page


def test_a_message_shows_its_attempts_in_order(admin_client: Client) -> None:
    row = queued()
    for number in (2, 1):
        Attempt.objects.create(message=row, number=number, started_at=past(), answer=f"answer {number}")
    page = detail_page(admin_client, row)
    assert 0 < page.index("answer 1") < page.index("answer 2")


@pytest.mark.django_db(databases=["default", "queue"])
def test_everything_is_read_from_the_queues_database(settings: SettingsWrapper, admin_client: Client) -> None:
    settings.EMAIL_QUEUE_DATABASE = "queue"
    row = enqueue([EmailMessage("Elsewhere", "the text", to=["to@example.com"])], mailer="default", origin="queued")[0]
    Attempt.objects.using("queue").create(message=row, number=1, started_at=past(), answer="the answer")
    with CaptureQueriesContext(connections["default"]) as seen:
        assert "Elsewhere" in list_page(admin_client, mailer="default", q="Elsewhere")
        detail = detail_page(admin_client, row)
        assert "the answer" in detail
        assert "the text" in detail
        assert told(act(admin_client, "hold", row)) == [("success", "1 message held.")]
        assert "maybe" not in confirmed(admin_client, "release", row)
        assert "default" in admin_client.get(reverse(MAILERS)).content.decode()
        admin_client.post(reverse(MAILERS), {"action": "pause", "_selected_action": ["default"]})
    assert not [query["sql"] for query in seen if re.search(r"\banymail_retry_\w+", query["sql"])]
    assert MailerState.objects.using("queue").get(alias="default").paused_until == operations.FOR_EVER


# --- nothing is edited by hand ---


def test_nothing_is_added_or_deleted_by_hand(admin_client: Client) -> None:
    row = queued("Keep me")
    assert admin_client.get(reverse("admin:anymail_retry_queuedmessage_add")).status_code == 403
    assert admin_client.get(reverse("admin:anymail_retry_queuedmessage_delete", args=[row.pk])).status_code == 403
    assert "delete_selected" not in list_page(admin_client)


@pytest.mark.parametrize("model", ["queuedmessage", "mailerstate"])
def test_a_form_writes_nothing(admin_client: Client, model: str) -> None:
    row = queued()
    MailerState.objects.create(alias="default")
    pk = row.pk if model == "queuedmessage" else "default"
    with CaptureQueriesContext(connections["default"]) as seen:
        answer = admin_client.post(
            reverse(f"admin:anymail_retry_{model}_change", args=[pk]),
            {
                "subject": "Changed",
                "attempts-TOTAL_FORMS": "0",
                "attempts-INITIAL_FORMS": "0",
                "_save": "Save",
            },
        )
    assert answer.status_code == 403
    assert not [query["sql"] for query in seen if query["sql"].startswith(("UPDATE", "INSERT", "DELETE"))]


def test_whoever_may_only_look_has_no_actions(client_with: Any) -> None:
    row = queued()
    client = client_with("view_queuedmessage", "view_mailerstate")
    assert 'name="action"' not in list_page(client)
    act(client, "hold", row)
    row.refresh_from_db()
    assert row.state == State.QUEUED


def test_whoever_may_change_has_the_actions(client_with: Any) -> None:
    row = queued()
    client = client_with("change_queuedmessage")
    assert "Subject" in detail_page(client, row)
    act(client, "hold", row)
    row.refresh_from_db()
    assert (row.state, row.reason) == (State.HELD, "held by ada")


# --- actions ---


@pytest.mark.parametrize(
    ("action", "before", "after"),
    [
        pytest.param("hold", State.QUEUED, State.HELD, id="a waiting message is held"),
        pytest.param("release", State.HELD, State.DEFERRED, id="a held message goes on"),
        pytest.param("cancel", State.DEFERRED, State.CANCELLED, id="a waiting message is given up"),
        pytest.param("retry_now", State.QUEUED, State.QUEUED, id="a waiting message is due now"),
        pytest.param("retry_now", State.FAILED, State.DEFERRED, id="a failed message is tried again"),
        pytest.param("cancel", State.SENDING, State.SENDING, id="a message that is being sent is left alone"),
        pytest.param("retry_now", State.SENT, State.SENT, id="sent is final"),
    ],
)
def test_actions_change_the_state_only_where_no_worker_is_at_work(
    admin_client: Client, action: str, before: State, after: State
) -> None:
    row = queued("Act on me", state=before)
    page = confirmed(admin_client, action, row)
    row.refresh_from_db()
    assert row.state == after
    changed = before not in (State.SENDING, State.SENT)
    assert [level for level, _ in told(page)] == ["success" if changed else "warning"]
    assert LogEntry.objects.count() == changed


@pytest.mark.parametrize(
    ("action", "states", "text"),
    [
        ("cancel", ["deferred"], "1 message cancelled."),
        ("cancel", ["deferred", "queued"], "2 messages cancelled."),
        ("hold", ["queued", "sent", "sending"], "1 message held; 2 left alone: 1 being sent, 1 sent."),
        ("release", ["held", "held", "failed"], "2 messages released; 1 left alone: 1 failed."),
        ("retry_now", ["failed"], "1 message due now."),
        ("retry_now", ["sending", "sending"], "0 messages due now; 2 left alone: 2 being sent."),
    ],
)
def test_an_action_says_what_it_did_and_what_not(
    admin_client: Client, action: str, states: list[str], text: str
) -> None:
    rows = [queued(state=state) for state in states]
    ((_, said),) = told(confirmed(admin_client, action, *rows))
    assert said == text


def test_many_messages_are_changed_at_once(admin_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymail_retry.admin.CHUNK", 2)
    rows = [queued() for _ in range(5)]
    page = act(admin_client, "hold", rows[0], select_across="1")
    assert told(page) == [("success", "5 messages held.")]
    assert LogEntry.objects.count() == 5


def test_the_history_says_who_did_what_and_names_no_recipient(client_with: Any) -> None:
    row = queued("A secret")
    client = client_with("change_queuedmessage")
    confirmed(client, "cancel", row)
    row.refresh_from_db()
    assert row.reason == "cancelled by ada"
    entry = LogEntry.objects.get()
    assert (entry.user.get_username(), entry.object_id) == ("ada", str(row.pk))
    assert (entry.object_repr, entry.change_message) == (f"queued message {row.pk}", "Cancel")
    history = client.get(reverse("admin:anymail_retry_queuedmessage_history", args=[row.pk])).content.decode()
    assert "Cancel" in history


# --- what has to be confirmed ---

MAYBE = {"maybe_taken_since": past(3600)}


@pytest.mark.parametrize(
    ("action", "values"),
    [
        pytest.param("cancel", {}, id="cancelling loses mail"),
        pytest.param("retry_now", {"state": "failed", **MAYBE}, id="maybe taken, and tried again"),
        pytest.param("release", {"state": "held", **MAYBE}, id="maybe taken, and released"),
        pytest.param("release", {"state": "held", "verdict": "ambiguous"}, id="maybe taken, and held a second time"),
        pytest.param("send_again", {"state": "sent"}, id="sent, and sent again"),
        pytest.param("send_again", {"state": "failed", **MAYBE}, id="maybe taken, and sent again"),
    ],
)
def test_what_may_lose_or_double_mail_is_asked_first(admin_client: Client, action: str, values: dict[str, Any]) -> None:
    row = queued("Think twice", **values)
    before = QueuedMessage.objects.values().get()
    page = act(admin_client, action, row)
    assert "are you sure?" in page
    assert "Think twice" in page
    assert QueuedMessage.objects.values().get() == before
    assert f'name="_selected_action" value="{row.pk}"' in page
    assert told(confirmed(admin_client, action, row))[0][0] == "success"


@pytest.mark.parametrize(
    ("action", "values"),
    [
        pytest.param("retry_now", {"state": "deferred"}, id="surely not taken"),
        pytest.param("hold", {"state": "deferred", **MAYBE}, id="held"),
        pytest.param("cancel", {"state": "sending"}, id="nothing to cancel"),
        pytest.param("retry_now", {"state": "sending", **MAYBE}, id="nothing to send"),
        pytest.param("send_again", {"state": "failed"}, id="failed, and sent again"),
    ],
)
def test_the_rest_is_done_at_once(admin_client: Client, action: str, values: dict[str, Any]) -> None:
    assert told(act(admin_client, action, queued(**values)))


def test_only_those_at_risk_are_shown(admin_client: Client) -> None:
    page = act(admin_client, "retry_now", queued("Harmless", state="failed"), queued("Risky", state="failed", **MAYBE))
    assert "Risky" in page
    assert f"maybe taken since {timezone.localtime(MAYBE['maybe_taken_since']):%Y-%m-%d %H:%M:%S}" in page
    assert "Harmless" not in page


def test_a_long_selection_is_cut(admin_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymail_retry.admin.LISTED", 2)
    rows = [queued() for _ in range(5)]
    page = act(admin_client, "cancel", rows[0], select_across="1")
    assert "and 3 more" in page
    assert 'name="select_across" value="1"' in page


# --- send again ---


def test_a_message_is_sent_again_as_a_new_one(admin_client: Client) -> None:
    row = queued("Once more", state="failed")
    assert told(act(admin_client, "send_again", row)) == [("success", "1 message queued again.")]
    assert set(QueuedMessage.objects.values_list("subject", "state")) == {
        ("Once more", "failed"),
        ("Once more", "queued"),
    }


def test_what_cannot_be_sent_again_says_why(admin_client: Client) -> None:
    waits, ended = queued(), queued(state="cancelled")
    MessageContent.objects.filter(message=ended).delete()
    (summary, *errors) = told(act(admin_client, "send_again", waits, ended))
    assert summary == ("warning", "0 messages queued again.")
    assert {level for level, _ in errors} == {"error"}
    said = " ".join(text for _, text in errors)
    assert f"Message {waits.pk} is queued" in said
    assert "not kept any more" in said


def test_many_errors_are_counted(admin_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymail_retry.admin.LISTED", 2)
    page = act(admin_client, "send_again", *[queued() for _ in range(5)])
    assert told(page)[-1] == ("error", "And 3 more like these.")


# --- the stored content ---


def test_the_content_is_shown_as_text(admin_client: Client) -> None:
    message = EmailMultiAlternatives(
        "Hello", "the text", "From <from@example.com>", ["a@example.com", "b@example.com"], bcc=["bcc@example.com"]
    )
    message.cc, message.reply_to = ["cc@example.com"], ["reply@example.com"]
    message.template_id = "welcome-7"  # type: ignore[attr-defined]  # Anymail's
    message.attach_alternative("<script>alert(1)</script>", "text/html")
    message.attach("bill.pdf", b"x" * 2048, "application/pdf")
    message.attach("notes.txt", "ä", "text/plain")
    part = MIMEBase("image", "png")
    part.set_payload(b"12345")
    message.attachments.append(part)
    page = detail_page(admin_client, queued_message(message))
    text = html.unescape(page).replace("\xa0", " ")
    for expected in (
        "From <from@example.com>",
        "a@example.com, b@example.com",
        "cc@example.com",
        "bcc@example.com",
        "reply@example.com",
        "welcome-7",
        "the text",
        "bill.pdf (application/pdf, 2.0 KB)",
        "notes.txt (text/plain, 2 bytes)",
        "– (image/png, 5 bytes)",
    ):
        assert expected in text
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_content_is_shown_to_those_who_may_see_it(client_with: Any) -> None:
    row = queued_message(EmailMessage("Subject", "the text", to=["to@example.com"]))
    assert "the text" not in detail_page(client_with("view_queuedmessage"), row)


def test_the_content_is_shown_by_permission(client_with: Any) -> None:
    row = queued_message(EmailMessage("Subject", "the text", to=["to@example.com"]))
    assert "the text" in detail_page(client_with("view_queuedmessage", "view_messagecontent"), row)


def test_a_long_text_is_cut(admin_client: Client) -> None:
    page = detail_page(admin_client, queued_message(EmailMessage("Subject", "x" * 10_001, to=["to@example.com"])))
    assert "x" * 10_000 in page
    assert "x" * 10_001 not in page
    assert "only the first" in page


def test_what_no_page_can_hold_is_replaced(admin_client: Client) -> None:
    message = EmailMessage("Odd \ud800", "text \udfff", to=["to@example.com"])
    assert "text ?" in detail_page(admin_client, queued_message(message))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        pytest.param(None, "is not kept any more", id="gone"),
        pytest.param("gAAAAA", "cannot be decrypted", id="no key"),
        pytest.param("{", "cannot be decoded", id="damaged"),
        pytest.param(
            '{"v": 1, "class": "EmailMessage", "fields": {"from_email": "a", "to": 7}, "user": {}}',
            "cannot be",
            id="not what it should be",
        ),
    ],
)
def test_content_that_cannot_be_shown_says_why(admin_client: Client, payload: str | None, words: str) -> None:
    row = queued()
    content = MessageContent.objects.filter(message=row)
    content.delete() if payload is None else content.update(payload=payload)
    assert words in detail_page(admin_client, row)


def test_a_message_too_large_to_look_at_is_not_loaded(admin_client: Client) -> None:
    assert "the content is not shown" in detail_page(admin_client, queued(size=100_000_000)).lower()


# --- mailers ---


def mailers_page(client: Client) -> str:
    return html.unescape(client.get(reverse(MAILERS)).content.decode())


def mailers_act(client: Client, action: str, *mailers: str) -> list[tuple[str, str]]:
    answer = client.post(reverse(MAILERS), {"action": action, "_selected_action": mailers}, follow=True)
    return told(answer.content.decode())


def test_every_mailer_is_listed_though_none_ever_paused(admin_client: Client) -> None:
    queued(mailer="gone")
    page = mailers_page(admin_client)
    assert "not paused" in page
    assert "mailer 'gone' is gone" in page
    assert "?mailer=gone" in page
    assert set(MailerState.objects.values_list("alias", flat=True)) == set(operations.mailers())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        pytest.param(600, "then one message is tried", id="by a worker"),
        pytest.param(-600, "one message is tried next", id="over"),
    ],
)
def test_a_pause_says_how_it_ends(admin_client: Client, seconds: int, words: str) -> None:
    until = clock_of("default").now() + timedelta(seconds=seconds)
    MailerState.objects.create(alias="default", paused_until=until)
    assert words in mailers_page(admin_client)


def test_a_mailer_is_paused_and_resumed(admin_client: Client, admin_user: User) -> None:
    mailers_page(admin_client)
    (mailer,) = operations.mailers()
    assert mailers_act(admin_client, "pause", mailer) == [("success", "1 mailer paused.")]
    page = mailers_page(admin_client)
    assert "paused until resumed" in page
    assert "9999" not in page
    assert f"paused by {admin_user.get_username()}" in page
    assert mailers_act(admin_client, "pause", mailer) == [
        ("warning", "0 mailers paused; 1 left alone: paused already.")
    ]
    assert mailers_act(admin_client, "resume", mailer) == [("success", "1 mailer resumed.")]
    assert MailerState.objects.get().paused_until is None
    assert mailers_act(admin_client, "resume", mailer) == [("warning", "0 mailers resumed; 1 left alone: not paused.")]
    assert [entry.change_message for entry in LogEntry.objects.order_by("id")] == ["Pause", "Resume"]


def test_a_mailer_has_a_page_of_its_own(admin_client: Client) -> None:
    operations.pause("default")
    page = admin_client.get(reverse("admin:anymail_retry_mailerstate_change", args=["default"])).content.decode()
    assert "paused until resumed" in page
    assert 'name="_save"' not in page
