"""Mail taken over from django-mailer and post_office, with the real packages and their own tables."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import django
import pytest
from django.apps import apps
from django.contrib import admin
from django.core import mail
from django.core.files.base import ContentFile
from django.core.mail import EmailMessage, EmailMultiAlternatives
from django.core.management import CommandError, call_command
from django.db import connection, connections, transaction

from anymail_retry.mailqueue import importing
from anymail_retry.mailqueue.worker import Worker
from anymail_retry.models import QueuedMessage
from tests.sites import WAYS, Site

from .observed import observe
from .test_replica import replica

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pytest_django.fixtures import SettingsWrapper

__all__ = ["replica"]  # a fixture

pytest.importorskip("mailer", reason="django-mailer is not installed")
pytest.importorskip("post_office", reason="django-post-office is not installed")

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("theirs"),
    # What the two packages do on Django 6.1, and post_office with its lock file.
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

LOCMEM = "django.core.mail.backends.locmem.EmailBackend"
DUMMY = "django.core.mail.backends.dummy.EmailBackend"

#: A pickle that names a module which is gone.
GONE = base64.encodebytes(b"cshop_that_closed.mail\nReceipt\n.").decode()


#: Kills the process that decodes it: os.kill(os.getpid(), 9).
DEADLY = base64.encodebytes(b"cos\nkill\n(cos\ngetpid\n(tRI9\ntR.").decode()


class Overriding(EmailMessage):
    def message(self, *args: Any, **kwargs: Any) -> Any:
        return super().message(*args, **kwargs)


@pytest.fixture
def theirs(transactional_db: None, settings: SettingsWrapper, tmp_path: Path) -> Iterator[None]:
    """Both packages, installed and with their tables, for one test."""
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "mailer", "post_office"]
    settings.MAILER_USE_FILE_LOCK = False
    settings.MEDIA_ROOT = str(tmp_path)
    models = [*apps.get_app_config("mailer").get_models(), *apps.get_app_config("post_office").get_models()]
    with connection.schema_editor() as editor:
        for model in models:
            editor.create_model(model)
    yield
    for model in filter(admin.site.is_registered, models):
        admin.site.unregister(model)
    with connection.constraint_checks_disabled(), connection.schema_editor() as editor:
        for model in reversed(models):
            editor.delete_model(model)


def run(*args: str) -> str:
    out = io.StringIO()
    call_command("import_mailer_queue", *args, stdout=out, stderr=out)
    return out.getvalue()


def mailer_row(subject: str = "Subject", priority: int = 2, **values: Any) -> Any:
    from mailer.models import Message

    row = Message(priority=priority)
    row.email = values.pop("email", None) or EmailMessage(subject, "Body", "from@example.com", ["to@example.com"])
    for name, value in values.items():
        setattr(row, name, value)
    row.save()
    return row


def post(subject: str = "Subject", **values: Any) -> Any:
    from post_office import mail as post_office_mail

    given = {"recipients": "to@example.com", "sender": "from@example.com", "message": "Body", "subject": subject}
    return post_office_mail.send(**{**given, **values})


def left_there() -> int:
    from mailer.models import Message
    from post_office.models import Email

    return Message.objects.count() + Email.objects.filter(status__in=[2, 3]).count()


def rows() -> dict[str, QueuedMessage]:
    return {row.subject: row for row in QueuedMessage.objects.all()}


def delivered(message: EmailMessage) -> Any:
    headers = {name: value for name, value in message.extra_headers.items() if name != "Message-ID"}
    message.extra_headers = headers  # each sender makes one of its own
    return observe(message)


def awkward() -> list[EmailMessage]:
    html = EmailMultiAlternatives("HTML", "text", "Ä <a@example.com>", ["to@example.com"], bcc=["bcc@example.com"])
    html.attach_alternative("<b>Grüße</b>", "text/html")
    html.attach("a.bin", b"\0\xff", "application/x-custom")
    anymail: Any = EmailMessage("Anymail {{ x }}", "b", "from@example.com", ["a@example.com", "b@example.com"])
    anymail.template_id, anymail.merge_data, anymail.tags = "welcome", {"a@example.com": {"n": 1}}, ["t"]
    plain = EmailMessage("Plain", "b", "f@example.com", ["to@example.com"], cc=["c@example.com"], headers={"X-A": "1"})
    return [html, anymail, plain]


# --- the same mail ---


@pytest.mark.skipif(django.VERSION[:3] == (5, 2, 0), reason="Django 5.2.0 cannot pickle a message with attachments")
def test_django_mailers_mail_is_what_it_would_have_sent(settings: SettingsWrapper) -> None:
    from mailer.engine import send_all

    Site(settings, "legacy")  # django-mailer knows nothing else
    settings.MAILER_EMAIL_BACKEND = LOCMEM
    for message in awkward():
        mailer_row(email=message)
    send_all()
    wanted = {message.subject: delivered(message) for message in mail.outbox}
    mail.outbox.clear()
    for message in awkward():
        mailer_row(email=message)
    assert run("--from", "mailer", "--mailer", LOCMEM) == "django-mailer: took 3, left 0\n"
    Worker().drain()
    assert {message.subject: delivered(message) for message in mail.outbox} == wanted
    assert len(wanted) == 3


def test_post_offices_mail_is_what_it_would_have_sent(settings: SettingsWrapper) -> None:
    from post_office.mail import send_queued
    from post_office.models import EmailTemplate

    Site(settings, "legacy")
    settings.POST_OFFICE = {"BACKENDS": {"default": LOCMEM}}
    template = EmailTemplate.objects.create(
        name="t", subject="Hi {{ n }}", content="{{ n }}", html_content="<i>{{ n }}"
    )

    def fill() -> None:
        post("Plain", headers={"X-A": "1", "Reply-To": "r@example.com"}, cc=["c@example.com"], bcc=["b@example.com"])
        post("HTML", html_message="<b>Grüße</b>", attachments={"a.csv": ContentFile(b"1,2")})
        post("", message="", template=template, context={"n": "Ada"}, render_on_delivery=True)

    fill()
    send_queued()
    wanted = {message.subject: delivered(message) for message in mail.outbox}
    assert set(wanted) == {"Plain", "HTML", "Hi Ada"}
    mail.outbox.clear()
    fill()
    assert run("--from", "post_office") == "django-post_office: took 3, left 0\n"
    Worker().drain()
    assert {message.subject: delivered(message) for message in mail.outbox} == wanted


# --- what a row becomes ---


def test_a_row_keeps_its_age_and_its_priority(settings: SettingsWrapper) -> None:
    settings.MAILER_EMAIL_MAX_RETRIES = 3
    since = datetime(2030, 1, 2, tzinfo=timezone.utc) - timedelta(days=3000)
    mailer_row("high", priority=1, when_added=since)
    mailer_row("deferred", priority=4, retry_count=2)
    over = mailer_row("over", priority=4, retry_count=3)
    report = json.loads(run("--from", "mailer", "--json"))["mailer"]
    assert report["taken"] == 2
    assert report["left"] == {str(over.pk): "given up: out of retries (MAILER_EMAIL_MAX_RETRIES)"}
    taken = rows()
    assert (taken["high"].priority, taken["high"].created_at) == (1, since)
    assert (taken["deferred"].priority, taken["deferred"].state) == (2, "queued")
    assert taken["deferred"].due_at is not None
    assert taken["deferred"].due_at <= datetime.now(timezone.utc)


def test_scheduled_and_expiring_mail_keeps_its_times() -> None:
    later = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=2)
    post("scheduled", scheduled_time=later, expires_at=later + timedelta(days=1), priority="low")
    expired = post("expired", expires_at=later - timedelta(days=4))
    post("sent", priority="high").__class__.objects.filter(subject="sent").update(status=0)
    report = json.loads(run("--from", "post_office", "--mailer", LOCMEM, "--json"))["post_office"]
    assert report["left"] == {str(expired.pk): "expired"}
    (row,) = QueuedMessage.objects.all()
    assert (row.subject, row.priority, row.not_before, row.due_at) == ("scheduled", 3, later, later)
    assert row.expires_at == later + timedelta(days=1)


def test_addresses_on_the_dont_send_list_are_not_sent_to() -> None:
    from mailer.models import DontSendEntry

    DontSendEntry.objects.create(to_address="No@example.com", when_added=datetime.now(timezone.utc))
    nobody = mailer_row(email=EmailMessage("nobody", "b", "f@example.com", ["N <no@EXAMPLE.com>"]))
    some = mailer_row(email=EmailMessage("some", "b", "f@example.com", ["a@example.com"], bcc=["no@example.com"]))
    report = json.loads(run("--from", "mailer", "--mailer", LOCMEM, "--json"))["mailer"]
    assert report["left"] == {str(nobody.pk): "all of its recipients are on the don't-send list"}
    assert report["left_out"] == {str(some.pk): 1}
    Worker().drain()
    assert [message.recipients() for message in mail.outbox] == [["a@example.com"]]


# --- nothing lost, nothing twice ---


def test_what_cannot_be_taken_stays_and_is_named_without_its_content() -> None:
    mailer_row("good")
    bad = {
        mailer_row(message_data=GONE): "cannot be decoded: there is no module 'shop_that_closed'",
        mailer_row(message_data="?"): "cannot be decoded",
        mailer_row(email=Overriding("secret", "secret", "f@example.com", ["secret@example.com"])): (
            "message(): Overriding overrides it, and code cannot be stored"
        ),
    }
    mailer_row("good too")
    words = run("--from", "mailer")
    assert words.startswith("django-mailer: took 2, left 3\n")
    assert "secret" not in words
    for row, reason in bad.items():
        assert f"  left 1 ({row.pk}): {reason}" in words
        row.refresh_from_db()
    assert set(rows()) == {"good", "good too"}
    with pytest.raises(SystemExit) as exit_:
        run("--exit-code")
    assert exit_.value.code == 1
    assert QueuedMessage.objects.count() == 2


def test_a_second_run_takes_nothing() -> None:
    mailer_row()
    post()
    assert run("--mailer", LOCMEM) == "django-mailer: took 1, left 0\ndjango-post_office: took 1, left 0\n"
    assert (
        run("--mailer", LOCMEM, "--exit-code") == "django-mailer: took 0, left 0\ndjango-post_office: took 0, left 0\n"
    )
    assert (left_there(), QueuedMessage.objects.count()) == (0, 2)


def test_a_dry_run_says_the_same_and_changes_nothing() -> None:
    mailer_row()
    mailer_row(message_data=GONE)
    assert run("--from", "mailer", "--dry-run").startswith("django-mailer: would take 1, leave 1\n")
    assert (left_there(), QueuedMessage.objects.count()) == (2, 0)


def test_killed_in_the_middle_both_queues_are_as_they_were(process_env: Mapping[str, str]) -> None:
    mailer_row("first")
    killer = mailer_row(message_data=DEADLY)
    env = {**process_env, "DJANGO_SETTINGS_MODULE": "tests.mailqueue.import_settings"}
    command = [sys.executable, "-m", "django", "import_mailer_queue", "--from", "mailer", "--mailer", LOCMEM]
    assert subprocess.run(command, env=env, check=False, timeout=120).returncode == -signal.SIGKILL
    assert (left_there(), QueuedMessage.objects.count()) == (2, 0)
    killer.delete()
    assert subprocess.run(command, env=env, check=False, timeout=120).returncode == 0
    assert (left_there(), set(rows())) == (0, {"first"})


def test_two_imports_at_once_take_each_message_once() -> None:
    names = {f"m{number}" for number in range(30)}
    for name in sorted(names):
        mailer_row(name)
    taken: list[int] = []
    start = threading.Barrier(2, timeout=60)

    def import_() -> None:
        try:
            source = importing.DjangoMailer(LOCMEM)
            start.wait()
            taken.append(importing.take_over(source, batch=3).taken)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=import_) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    importing.take_over(importing.DjangoMailer(LOCMEM))  # what each found locked by the other
    assert len(taken) == 2
    assert sorted(QueuedMessage.objects.values_list("subject", flat=True)) == sorted(names)
    assert left_there() == 0


def test_a_row_that_its_own_worker_is_sending_is_left_alone() -> None:
    if not connection.features.has_select_for_update_skip_locked:
        pytest.skip("this database does not pass over locked rows")
    sending, _ = mailer_row("sending"), mailer_row("free")
    reports = []

    def import_() -> None:
        try:
            reports.append(importing.take_over(importing.DjangoMailer(LOCMEM)))
        finally:
            connections.close_all()

    with transaction.atomic():  # as django-mailer does it
        type(sending).objects.select_for_update().get(pk=sending.pk)
        thread = threading.Thread(target=import_)
        thread.start()
        thread.join(60)
    (report,) = reports
    assert report.left == {sending.pk: "locked: it is being sent, or taken by another import"}
    assert set(rows()) == {"free"}


def test_it_waits_for_post_offices_own_sender() -> None:
    from post_office.lockfile import FileLock, default_lockfile

    post()
    with FileLock(default_lockfile), pytest.raises(CommandError, match="A send_queued_mail"):
        run("--from", "post_office", "--mailer", LOCMEM)
    assert (left_there(), QueuedMessage.objects.count()) == (1, 0)


def test_where_rows_cannot_be_locked_django_mailers_file_lock_is_held(
    settings: SettingsWrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if connection.features.has_select_for_update:
        pytest.skip("this database locks rows")
    from mailer import engine

    settings.MAILER_USE_FILE_LOCK = True
    monkeypatch.setattr(engine, "LOCK_PATH", str(tmp_path / "send_mail"))  # read when it is imported
    mailer_row()
    (tmp_path / "send_mail.lock").touch()  # of another process
    with pytest.raises(CommandError, match=r"delete .*send_mail\.lock"):
        run("--from", "mailer", "--mailer", LOCMEM)
    (tmp_path / "send_mail.lock").unlink()
    assert run("--from", "mailer", "--mailer", LOCMEM) == "django-mailer: took 1, left 0\n"
    assert not (tmp_path / "send_mail.lock").exists()


# --- which mailer ---


@pytest.mark.parametrize("way", WAYS)
def test_django_mailers_mail_goes_where_mail_that_is_queued_goes(settings: SettingsWrapper, way: str) -> None:
    site = Site(settings, way)
    site.behind("queued", DUMMY)
    mailer_row()
    run("--from", "mailer")
    assert [row.mailer for row in rows().values()] == [site.mailer]


@pytest.mark.parametrize("way", WAYS)
def test_post_offices_mail_goes_by_its_backend_alias(settings: SettingsWrapper, way: str) -> None:
    site = Site(settings, way)
    site.behind("queued", LOCMEM)
    settings.POST_OFFICE = {"BACKENDS": {"default": LOCMEM, "bulk": DUMMY}}
    if way == "mailers":
        settings.MAILERS = {**settings.MAILERS, "bulk": {"BACKEND": DUMMY}}
    post("default")
    post("bulk", backend="bulk")
    gone = post("gone")
    type(gone).objects.filter(pk=gone.pk).update(backend_alias="gone")
    report = json.loads(run("--from", "post_office", "--json"))["post_office"]
    assert "'gone'" in report["left"][str(gone.pk)]
    assert "--mailer" in report["left"][str(gone.pk)]
    taken = {name: row.mailer for name, row in rows().items()}
    assert taken == {"default": site.mailer, "bulk": "bulk" if way == "mailers" else DUMMY}


@pytest.mark.parametrize("path", ["mailer.backend.DbBackend", "post_office.EmailBackend"])
@pytest.mark.parametrize("source", ["mailer", "post_office"])
def test_a_back_end_that_stores_is_refused(path: str, source: str) -> None:
    with pytest.raises(CommandError, match="does not send"):
        run("--from", source, "--mailer", path)


def test_a_mailer_that_is_not_there_is_refused() -> None:
    with pytest.raises(CommandError, match="There is no mailer 'nope'"):
        run("--mailer", "nope")


# --- where it cannot be ---


def test_without_either_it_says_what_to_add(settings: SettingsWrapper) -> None:
    installed = settings.INSTALLED_APPS
    settings.INSTALLED_APPS = [name for name in installed if name not in importing.SOURCES]
    with pytest.raises(CommandError, match="Add to INSTALLED_APPS"):
        run()
    with pytest.raises(CommandError, match='Add to INSTALLED_APPS, until its mail is taken over: "mailer"'):
        run("--from", "mailer")
    settings.INSTALLED_APPS = installed


@pytest.mark.parametrize(("version", "named"), [("2.2", "django-mailer 2.2;"), ("", "of an unknown version")])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, named: str) -> None:
    import mailer

    monkeypatch.setattr(mailer, "__version__", version)
    with pytest.raises(CommandError, match=named):
        run("--from", "mailer")


@pytest.mark.django_db(transaction=True, databases=["default", "queue"])
def test_two_databases_are_refused(settings: SettingsWrapper) -> None:
    settings.EMAIL_QUEUE_DATABASE = "queue"
    mailer_row()
    with pytest.raises(CommandError, match="no transaction spans both"):
        run("--from", "mailer", "--mailer", LOCMEM)
    assert left_there() == 1


def test_two_aliases_of_one_database_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = connections["queue"].settings_dict
    monkeypatch.setitem(ours, "NAME", connection.settings_dict["NAME"])
    assert importing.is_same_database("default", "queue")
    monkeypatch.setitem(ours, "OPTIONS", {"options": "-c search_path=other"})
    assert not importing.is_same_database("default", "queue")


@pytest.mark.django_db(transaction=True, databases=["default", "queue"])
def test_a_replica_is_not_read(request: pytest.FixtureRequest) -> None:
    """Nor does post_office on our behalf: a replica that is late has not got the attachments yet."""
    mailer_row("from django-mailer")
    post(subject="from post_office", attachments={"a.bin": ContentFile(b"\0\xff")})
    request.getfixturevalue("replica")
    run("--mailer", LOCMEM)
    taken = dict(QueuedMessage.objects.using("default").values_list("subject", "attachment_count"))
    assert taken == {"from django-mailer": 0, "from post_office": 1}
