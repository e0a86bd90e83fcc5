"""The queue in Django's admin: to look, to find, and to set right. Rows are made by sending mail, not by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from email.message import Message
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.core.mail import EmailMessage
from django.db import transaction
from django.db.models import Q
from django.template.defaultfilters import filesizeformat
from django.template.loader import render_to_string
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.http import urlencode
from django.utils.text import Truncator
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from . import conf
from .mailqueue import gate, operations
from .mailqueue.claim import mailers_with_rows
from .mailqueue.clock import clock_of
from .mailqueue.database import queue_database, storable
from .mailqueue.mailers import MailerGone, find
from .mailqueue.states import TERMINAL, WAITING, State
from .models import Attempt, MailerState, QueuedMessage
from .verdict import Verdict

if TYPE_CHECKING:
    from django.db.models import Model, QuerySet
    from django.http import HttpRequest, HttpResponse

    _BaseModelAdmin = admin.options.BaseModelAdmin[Any]
    _ModelAdmin = admin.ModelAdmin[Any]
    _TabularInline = admin.TabularInline[Any, Any]
else:
    _BaseModelAdmin = object
    _ModelAdmin = admin.ModelAdmin
    _TabularInline = admin.TabularInline

#: Rows that one statement names: SQLite before 3.32 takes 999 parameters.
CHUNK = 500
#: Rows that are listed, or errors that are told, one by one.
LISTED = 20
#: Characters of a stored text that are shown.
SHOWN = 10_000
#: Bytes of a message that is read to be shown.
LARGEST_SHOWN = 32_000_000


class _ReadOnly(_BaseModelAdmin):
    """Nothing is added, changed or deleted by a form: a worker may have the row in hand, and a form would write back
    all columns as they were when it was loaded. Actions ask for the permission without an object, and have it."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return obj is None and super().has_change_permission(request)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).using(queue_database())


# --- how things are shown ---


def _seconds(moment: datetime | None) -> str | None:
    """A time as it is compared with logs: to the second, in the current time zone."""
    return None if moment is None else f"{timezone.localtime(moment):%Y-%m-%d %H:%M:%S}"


def _time(name: str, description: Any) -> Any:
    @admin.display(description=description, ordering=name)
    def show(self: Any, row: Any) -> Any:
        return _seconds(getattr(row, name)) or self.get_empty_value_display()

    return show


def _short_time(name: str, description: Any) -> Any:
    """A column: of today's times the time alone."""

    @admin.display(description=description, ordering=name)
    def show(self: Any, row: Any) -> Any:
        text = _seconds(getattr(row, name))
        if text is None:
            return None
        today = f"{timezone.localdate():%Y-%m-%d} "
        return format_html('<span class="nowrap" title="{}">{}</span>', text, text.removeprefix(today))

    return show


def _shortened(text: str, length: int) -> Any:
    short = Truncator(text).chars(length)
    return text if short == text else format_html('<span title="{}">{}</span>', text, short)


def _short_name(mailer: str) -> str:
    """The part of a dotted path that tells one back end from another."""
    if mailer in (conf.mailers() or ()):
        return mailer
    parts = [part.removeprefix("Retryable").removesuffix("EmailBackend") for part in mailer.split(".")]
    return next((part for part in reversed(parts) if part), mailer)


class _MailerFilter(admin.SimpleListFilter):
    title = _("mailer")
    parameter_name = "mailer"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        alias = queue_database()
        names = mailers_with_rows(alias)
        times = Counter(map(_short_name, names))
        return [(name, short if times[short := _short_name(name)] == 1 else name) for name in names]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(mailer=self.value()) if self.value() else queryset


class _VerdictFilter(admin.SimpleListFilter):
    title = _("verdict")
    parameter_name = "verdict"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(verdict.value, verdict.value) for verdict in Verdict]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(verdict=self.value()) if self.value() else queryset


# --- the stored message, as plain text ---


def _preview(row: QueuedMessage) -> str:
    """What of a message can be shown; whatever is wrong with it is said there, too."""
    try:
        return render_to_string("admin/anymail_retry/content.html", _content(row))
    except ValueError as error:
        problem = str(error)
    except Exception as error:  # whatever was stored; its text would quote the content
        problem = f"the content of message {row.pk} cannot be shown: {type(error).__name__}"
    return render_to_string("admin/anymail_retry/content.html", {"problem": problem})


def _content(row: QueuedMessage) -> dict[str, Any]:
    if row.size > LARGEST_SHOWN:
        raise ValueError(f"the content is not shown: it has {filesizeformat(row.size)}")
    message = operations.stored_message(row)
    parts = [(_kind(message.content_subtype), message.body)]
    parts += [(_kind(mimetype), content) for content, mimetype in getattr(message, "alternatives", ())]
    return {
        "headers": [(name, storable(value, 1000)) for name, value in _headers(message)],
        "parts": [(name, storable(str(text), SHOWN), len(str(text)) > SHOWN) for name, text in parts if text],
    }


def _headers(message: EmailMessage) -> Iterator[tuple[Any, str]]:
    yield _("From"), str(message.from_email)
    for name, addresses in (
        (_("To"), message.to),
        (_("Cc"), message.cc),
        (_("Bcc"), message.bcc),
        (_("Reply-To"), message.reply_to),
    ):
        if addresses:
            yield name, ", ".join(map(str, addresses))
    yield _("Subject"), str(message.subject)
    template = getattr(message, "template_id", None)
    if isinstance(template, str | int):
        yield _("Template"), str(template)
    for attachment in message.attachments[:LISTED]:
        yield _("Attachment"), _attachment(attachment)
    if len(message.attachments) > LISTED:
        yield _("Attachments"), str(len(message.attachments))


def _attachment(attachment: Any) -> str:
    name, content, kind = (
        (attachment.get_filename(), attachment.get_payload(decode=True), attachment.get_content_type())
        if isinstance(attachment, Message)
        else attachment
    )
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    size = filesizeformat(len(content)) if isinstance(content, bytes) else _("a message")
    return f"{name or '–'} ({kind or '–'}, {size})"


def _kind(subtype: str) -> Any:
    return {"plain": _("Text"), "html": _("HTML source"), "text/html": _("HTML source")}.get(subtype, subtype)


# --- actions ---


@dataclass
class _Done:
    """What an action came to: the rows that it changed, and the states of those that it left alone."""

    changed: list[Any] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


_Operate = Callable[["list[int]", str], _Done]


def _by_state(
    operate: Callable[[QuerySet[QueuedMessage], str], object], takes: Collection[State], gives: Collection[State]
) -> _Operate:
    """An operation on rows in some states, with an account of which rows it changed.

    :param takes: states that it changes.
    :param gives: states that it leaves rows in.
    """

    def act(pks: list[int], user: str) -> _Done:
        done = _Done()
        alias = queue_database()
        for start in range(0, len(pks), CHUNK):
            rows = QueuedMessage.objects.using(alias).filter(pk__in=pks[start : start + CHUNK])
            before = dict(rows.values_list("pk", "state"))
            with transaction.atomic(using=alias):
                operate(rows, user)
                after = dict(rows.values_list("pk", "state"))
            for pk, state in after.items():
                if state in gives and before.get(pk) in takes:
                    done.changed.append(pk)
                else:
                    done.left[state] += 1
        return done

    return act


def _send_again(pks: list[int], user: str) -> _Done:
    done = _Done()
    for pk in pks:
        try:
            operations.send_again(QueuedMessage(pk=pk))
        except ValueError as error:
            done.errors.append(str(error))
        else:
            done.changed.append(pk)
    return done


def _left_alone(left: Counter[str]) -> str:
    words = {State.SENDING.value: _("being sent")}
    return ", ".join(f"{number} {words.get(state, state)}" for state, number in sorted(left.items()))


def _log(request: HttpRequest, model: type[Model], pks: Iterable[Any], what: Any) -> None:
    """Have Django's own history say who did what. It outlives the rows, so it names no recipient and no subject."""
    kind = ContentType.objects.get_for_model(model)
    user: Any = request.user.pk
    LogEntry.objects.bulk_create(
        (
            LogEntry(
                user_id=user,
                content_type=kind,
                object_id=str(pk),
                object_repr=f"{model._meta.verbose_name} {pk}"[:200],
                action_flag=CHANGE,
                change_message=str(what),
            )
            for pk in pks
        ),
        batch_size=CHUNK,
    )


def _action(
    name: str,
    label: Any,
    done_word: Any,
    operate: _Operate,
    *,
    takes: Collection[State],
    risk: Q | None = None,
    warning: Any = "",
) -> Any:
    """An action on messages.

    :param takes: states of the rows that it changes.
    :param risk: which of these rows a person has to confirm first; None: none.
    :param warning: what may happen to them.
    """

    @admin.action(description=label, permissions=["change"])
    def act(self: QueuedMessageAdmin, request: HttpRequest, queryset: QuerySet[QueuedMessage]) -> HttpResponse | None:
        if risk is not None and "confirmed" not in request.POST:
            at_risk = queryset.filter(risk, state__in=takes)
            if at_risk.exists():
                return self.confirm(request, at_risk, action=name, label=label, warning=warning)
        done = operate(list(queryset.values_list("pk", flat=True)), request.user.get_username())
        _log(request, QueuedMessage, done.changed, label)
        number = len(done.changed)
        text = ngettext("%(number)d message %(done)s", "%(number)d messages %(done)s", number) % {
            "number": number,
            "done": done_word,
        }
        if done.left:
            text += "; " + _("%(number)d left alone: %(states)s") % {
                "number": done.left.total(),
                "states": _left_alone(done.left),
            }
        self.message_user(request, f"{text}.", messages.SUCCESS if number else messages.WARNING)
        for error in done.errors[:LISTED]:
            self.message_user(request, f"{error[:1].upper()}{error[1:]}.", messages.ERROR)
        if len(done.errors) > LISTED:
            more = len(done.errors) - LISTED
            self.message_user(request, _("And %d more like these.") % more, messages.ERROR)
        return None

    act.__name__ = name
    return act


#: Rows that the ESP may have: the first is forgotten where a person had the row sent again, the verdict is not.
MAYBE_TAKEN = Q(maybe_taken_since__isnull=False) | Q(verdict=Verdict.AMBIGUOUS.value)

RETRIED = (*WAITING, State.HELD, State.FAILED)

TWICE = _(
    "Of the messages that you chose, the ESP may have taken these already: whoever got one gets it a second time."
    " Its own log says what it delivered."
)


class AttemptInline(_ReadOnly, _TabularInline):
    model = Attempt
    fields = readonly_fields = (
        "number",
        "started",
        "duration_ms",
        "verdict",
        "reason",
        "http_status",
        "answer",
        "worker",
    )
    ordering = ("number", "pk")
    extra = 0
    can_delete = False

    started = _time("started_at", _("started"))

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(QueuedMessage)
class QueuedMessageAdmin(_ReadOnly, _ModelAdmin):
    list_display = ("id", "state", "message", "short_mailer", "short_due", "last_answer", "short_created")
    list_filter = ("state", _MailerFilter, "priority", _VerdictFilter, "created_at")
    search_fields = ("subject", "recipients", "reason", "answer", "=id")
    ordering = ("-id",)
    show_full_result_count = False  # counting a million rows for each page is not worth the number
    inlines = (AttemptInline,)
    fieldsets = (
        (
            _("What"),
            {"fields": (("state", "priority", "origin"), "subject", "recipients", "mailer", "stored_size")},
        ),
        (_("When"), {"fields": (("created", "starts", "expires"), ("due", "ended"))}),
        (
            _("What happened"),
            {"fields": (("attempt_count", "verdict", "http_status"), "reason", "answer", "maybe_taken")},
        ),
        (_("Content"), {"fields": ("preview",)}),
        (
            _("Internals"),
            {
                "classes": ("collapse",),
                "fields": ("claimed", ("lost_count", "is_report"), "on_ambiguous", "key_from_user"),
            },
        ),
    )

    created = _time("created_at", _("created"))
    starts = _time("not_before", _("not before"))
    expires = _time("expires_at", _("expires"))
    due = _time("due_at", _("due"))
    ended = _time("ended_at", _("ended"))
    claimed = _time("claimed_at", _("last claimed"))
    maybe_taken = _time("maybe_taken_since", _("maybe taken since"))
    short_created = _short_time("created_at", _("created"))
    short_due = _short_time("due_at", _("due"))

    retry_now = _action(
        "retry_now",
        _("Send now"),
        _("due now"),
        _by_state(lambda rows, user: operations.retry_now(rows, RETRIED), RETRIED, WAITING),
        takes=RETRIED,
        risk=MAYBE_TAKEN,
        warning=TWICE,
    )
    hold = _action(
        "hold",
        _("Hold"),
        _("held"),
        _by_state(lambda rows, user: operations.hold(rows, f"held by {user}"), WAITING, (State.HELD,)),
        takes=WAITING,
    )
    release = _action(
        "release",
        _("Release held messages"),
        _("released"),
        _by_state(lambda rows, user: operations.release(rows), (State.HELD,), WAITING),
        takes=(State.HELD,),
        risk=MAYBE_TAKEN,
        warning=TWICE,
    )
    cancel = _action(
        "cancel",
        _("Cancel"),
        _("cancelled"),
        _by_state(lambda rows, user: operations.cancel(rows, f"cancelled by {user}"), RETRIED, (State.CANCELLED,)),
        takes=RETRIED,
        risk=Q(),
        warning=_(
            "These messages will not be sent, and nobody is told. You can send them again as new messages, until they"
            " are purged."
        ),
    )
    send_again = _action(
        "send_again",
        _("Send again as a new message"),
        _("queued again"),
        _send_again,
        takes=TERMINAL,
        risk=Q(state=State.SENT) | MAYBE_TAKEN,
        warning=_(
            "Of the messages that you chose, these were sent, or may have been: whoever got one gets it a second time."
        ),
    )
    actions = ("retry_now", "hold", "release", "cancel", "send_again")

    @admin.display(description=_("message"), ordering="subject")
    def message(self, row: QueuedMessage) -> Any:
        return format_html("{}<br>{}", _shortened(row.subject, 40), _shortened(row.recipients, 25))

    @admin.display(description=_("mailer"), ordering="mailer")
    def short_mailer(self, row: QueuedMessage) -> Any:
        return format_html('<span title="{}">{}</span>', row.mailer, Truncator(_short_name(row.mailer)).chars(20))

    @admin.display(description=_("last answer"))
    def last_answer(self, row: QueuedMessage) -> Any:
        said = " ".join(str(word) for word in (row.http_status, row.verdict) if word)
        return _shortened(": ".join(filter(None, (said, row.reason, row.answer))), 60)

    @admin.display(description=_("size"))
    def stored_size(self, row: QueuedMessage) -> str:
        return filesizeformat(row.size)

    @admin.display(description=_("stored message"))
    def preview(self, row: QueuedMessage) -> str:
        return _preview(row)

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        if request.user.has_perm("anymail_retry.view_messagecontent"):
            return self.fieldsets
        return [fieldset for fieldset in self.fieldsets if "preview" not in fieldset[1]["fields"]]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        return super().changelist_view(request, {"title": _("Queued messages"), **(extra_context or {})})

    def confirm(
        self, request: HttpRequest, rows: QuerySet[QueuedMessage], *, action: str, label: Any, warning: Any
    ) -> TemplateResponse:
        """Ask before an action is done. The answer is the same request, and says so."""
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "title": _("%s: are you sure?") % label,
            "opts": self.opts,
            "warning": warning,
            "rows": [(row, _seconds(row.maybe_taken_since)) for row in rows[:LISTED]],
            "more": max(0, rows.count() - LISTED),
            "action": action,
            "selected": request.POST.getlist(ACTION_CHECKBOX_NAME),
            "select_across": request.POST.get("select_across", "0"),
            "back": request.get_full_path(),
        }
        return TemplateResponse(request, "admin/anymail_retry/confirm.html", context)


@admin.register(MailerState)
class MailerStateAdmin(_ReadOnly, _ModelAdmin):
    list_display = ("alias", "status", "pause_reason", "mail")
    ordering = ("alias",)
    fields = ("alias", "status", "pause_reason", "slot")

    slot = _time("next_slot", _("next slot under the rate limit"))

    @admin.display(description=_("status"))
    def status(self, state: MailerState) -> Any:
        until = state.paused_until
        if until == operations.FOR_EVER:
            return _("paused until resumed")
        if until is not None and until > clock_of(queue_database()).now():
            return _("paused until %s, then one message is tried") % _seconds(until)
        if until is not None:
            return _("paused; one message is tried next")
        try:
            find(state.alias)
        except MailerGone as gone:
            return str(gone)
        except Exception as error:  # its module raises anything; the worker says the same, once it needs it
            return _("cannot be used: %s") % type(error).__name__
        return _("not paused")

    @admin.display(description=_("mail"))
    def mail(self, state: MailerState) -> Any:
        url = reverse("admin:anymail_retry_queuedmessage_changelist", current_app=self.admin_site.name)
        return format_html('<a href="{}?{}">{}</a>', url, urlencode({"mailer": state.alias}), _("show"))

    @admin.action(description=_("Pause until resumed"), permissions=["change"])
    def pause(self, request: HttpRequest, queryset: QuerySet[MailerState]) -> None:
        mailers = [state.alias for state in queryset.exclude(paused_until=operations.FOR_EVER)]
        for mailer in mailers:
            operations.pause(mailer, f"paused by {request.user.get_username()}")
        self._tell(request, mailers, _("Pause"), _("paused"), queryset.count() - len(mailers), _("paused already"))

    @admin.action(description=_("Resume"), permissions=["change"])
    def resume(self, request: HttpRequest, queryset: QuerySet[MailerState]) -> None:
        mailers = [state.alias for state in queryset if operations.resume(state.alias)]
        self._tell(request, mailers, _("Resume"), _("resumed"), queryset.count() - len(mailers), _("not paused"))

    actions = ("pause", "resume")

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        alias = queue_database()
        known = gate.read(alias)
        for mailer in operations.mailers():
            if mailer not in known:
                gate.ensure(alias, mailer)  # so that one which never paused can be
        return super().changelist_view(request, {"title": _("Mailers"), **(extra_context or {})})

    def _tell(self, request: HttpRequest, mailers: list[str], label: Any, done: Any, left: int, why: Any) -> None:
        _log(request, MailerState, mailers, label)
        number = len(mailers)
        text = ngettext("%(number)d mailer %(done)s", "%(number)d mailers %(done)s", number) % {
            "number": number,
            "done": done,
        }
        if left:
            text += "; " + _("%(number)d left alone: %(why)s") % {"number": left, "why": why}
        self.message_user(request, f"{text}.", messages.SUCCESS if number else messages.WARNING)
