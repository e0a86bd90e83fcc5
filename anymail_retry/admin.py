"""The queue in Django's admin: to look, to find, and to set right. Rows are made by sending mail, not by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.utils.translation import gettext_lazy as _

from .mailqueue import operations
from .mailqueue.database import queue_database
from .mailqueue.states import State
from .models import Attempt, MailerState, QueuedMessage

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest

    _ModelAdmin = admin.ModelAdmin[Any]
    _TabularInline = admin.TabularInline[Any, Any]
else:
    _ModelAdmin = admin.ModelAdmin
    _TabularInline = admin.TabularInline


class _ReadOnly:
    """Nothing is added, changed or deleted by a form: a worker may have the row in hand."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class AttemptInline(_ReadOnly, _TabularInline):
    model = Attempt
    fields = readonly_fields = (
        "number",
        "started_at",
        "duration_ms",
        "verdict",
        "reason",
        "http_status",
        "answer",
        "worker",
    )
    ordering = ("number",)
    extra = 0
    can_delete = False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


def _operation(name: str, description: Any, operate: Callable[[QuerySet[QueuedMessage]], operations.Change]) -> Any:
    @admin.action(description=description, permissions=["change"])
    def act(self: Any, request: HttpRequest, queryset: QuerySet[QueuedMessage]) -> None:
        change = operate(queryset)
        self.message_user(request, _("%d messages changed.") % change.changed, messages.SUCCESS)
        if change.being_sent:
            text = _("%d are being sent at this moment and were left alone.") % change.being_sent
            self.message_user(request, text, messages.WARNING)

    act.__name__ = name
    return act


@admin.register(QueuedMessage)
class QueuedMessageAdmin(_ReadOnly, _ModelAdmin):
    list_display = ("id", "state", "subject", "recipients", "mailer", "due_at", "attempt_count", "reason", "created_at")
    list_filter = ("state", "mailer", "priority", "verdict")
    search_fields = ("subject", "recipients", "=id")
    ordering = ("-id",)
    show_full_result_count = False  # counting a million rows for each page is not worth the number
    inlines = (AttemptInline,)
    exclude = ("lease", "key", "key_used_since", "body_digest")

    retry_now = _operation(
        "retry_now",
        _("Send now (deferred, held and failed ones too; what may have been taken is sent twice)"),
        lambda rows: operations.retry_now(rows, (State.QUEUED, State.DEFERRED, State.HELD, State.FAILED)),
    )
    hold = _operation("hold", _("Hold"), operations.hold)
    release = _operation("release", _("Release held messages"), operations.release)
    cancel = _operation("cancel", _("Cancel"), operations.cancel)
    actions = ("retry_now", "hold", "release", "cancel")

    def get_queryset(self, request: HttpRequest) -> QuerySet[QueuedMessage]:
        return super().get_queryset(request).using(queue_database())

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [field.name for field in self.model._meta.fields if field.name not in self.exclude]


@admin.register(MailerState)
class MailerStateAdmin(_ReadOnly, _ModelAdmin):
    list_display = ("alias", "paused_until", "pause_reason", "next_slot")

    @admin.action(description=_("Pause until resumed"), permissions=["change"])
    def pause(self, request: HttpRequest, queryset: QuerySet[MailerState]) -> None:
        for state in queryset:
            operations.pause(state.alias)

    @admin.action(description=_("Resume"), permissions=["change"])
    def resume(self, request: HttpRequest, queryset: QuerySet[MailerState]) -> None:
        for state in queryset:
            operations.resume(state.alias)

    actions = ("pause", "resume")

    def get_queryset(self, request: HttpRequest) -> QuerySet[MailerState]:
        return super().get_queryset(request).using(queue_database())

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [field.name for field in self.model._meta.fields]
