"""A point in time, stored so that two of them always compare rightly."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone as django_timezone


class UTCDateTimeField(models.DateTimeField):  # type: ignore[type-arg]  # django-stubs' parameters are not there at run time
    """An aware UTC datetime, whatever ``USE_TZ``, ``TIME_ZONE`` and the database's own ``TIME_ZONE`` say.

    Django's field stores local time where ``USE_TZ`` is False (or the database has a ``TIME_ZONE``): then an hour
    comes twice each autumn, leases end early, and mail that is being sent is sent again.
    """

    def get_internal_type(self) -> str:
        return "UTCDateTimeField"  # unknown to the database back ends, so none of them converts it by USE_TZ

    def db_type(self, connection: BaseDatabaseWrapper) -> str:
        return str(connection.data_types["DateTimeField"])

    def get_prep_value(self, value: Any) -> Any:
        value = self.to_python(value)
        if not isinstance(value, datetime):
            return value
        if value.tzinfo is None:
            value = value.replace(tzinfo=django_timezone.get_default_timezone())
        return value.astimezone(timezone.utc)

    def get_db_prep_value(self, value: Any, connection: BaseDatabaseWrapper, prepared: bool = False) -> Any:
        if not prepared:
            value = self.get_prep_value(value)
        if not isinstance(value, datetime):
            return value
        if connection.vendor == "postgresql":
            return value  # a timestamp with time zone, exact by itself
        return connection.ops.adapt_datetimefield_value(value.replace(tzinfo=None))

    def from_db_value(self, value: Any, expression: Any, connection: BaseDatabaseWrapper) -> datetime | None:
        if value is None:
            return None
        if isinstance(value, str):  # SQLite, where an expression has no declared type
            value = datetime.fromisoformat(value)
        if value.tzinfo is None and connection.vendor == "postgresql":
            # With USE_TZ = False Django cuts the time zone off, after PostgreSQL converted to it.
            value = value.replace(tzinfo=django_timezone.get_default_timezone())
        moment: datetime = value.replace(tzinfo=value.tzinfo or timezone.utc)
        return moment.astimezone(timezone.utc)
