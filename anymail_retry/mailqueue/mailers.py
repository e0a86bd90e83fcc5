"""From the name of a mailer, which is all that a row keeps, back to a back end that sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import django
from anymail.backends.base import AnymailBaseBackend
from django.core.mail.backends import smtp
from django.core.mail.backends.base import BaseEmailBackend
from django.utils.module_loading import import_string

from .. import conf
from .schedule import Policy


class MailerGone(LookupError):
    """No mailer has this name any more. The text says what to add."""


@dataclass(frozen=True)
class Mailer:
    """One mailer, as the settings describe it now.

    :param options: of its entry in ``MAILERS``; empty elsewhere.
    :param alias: its alias in ``MAILERS``; None: the name is the dotted path of the back end.
    """

    name: str
    backend_class: type[BaseEmailBackend]
    options: Mapping[str, Any]
    alias: str | None

    @property
    def key_window(self) -> float | None:
        """Seconds for which the ESP remembers an idempotency key; None: it takes none."""
        spec = getattr(self.backend_class, "idempotency", None)
        return None if spec is None else float(spec.window)

    @property
    def policy(self) -> Policy:
        return Policy.from_settings(esp_name=self._esp_name, options=self.options, key_window=self.key_window)

    @property
    def rate(self) -> float | None:
        """Sends that may begin per second, over all workers; None: no limit."""
        rate: float | None = conf.get("QUEUE_RATE", esp_name=self._esp_name, options=self.options)
        return rate

    @property
    def sends_mime(self) -> bool:
        """Whether the back end sends the message as MIME, with its own Message-ID."""
        sends_mime: bool = getattr(
            self.backend_class, "sends_mime", not issubclass(self.backend_class, AnymailBaseBackend)
        )
        return sends_mime

    def make(self) -> BaseEmailBackend:
        """A new back end, whose failed sends are left to the worker. Raises whatever its constructor raises."""
        backend: Any
        if self.alias is None:
            backend = make(self.backend_class, {})
        else:
            from django.core.mail import mailers

            backend = mailers[self.alias]
        if hasattr(backend, "fallback"):
            backend.fallback = None  # a drain must never make a row
        backend.fail_silently = False  # nor must it fail unseen
        return backend  # type: ignore[no-any-return]  # Any, because not every back end has the attribute

    @property
    def _esp_name(self) -> str | None:
        return getattr(self.backend_class, "esp_name", None)


def make(backend_class: type[BaseEmailBackend], options: Mapping[str, Any]) -> BaseEmailBackend:
    """A back end that is not made by Django, with these options."""
    init: Any = backend_class.__init__
    if django.VERSION >= (6, 1) and init is smtp.EmailBackend.__init__:
        # Django makes it without an alias where there is no MAILERS, and warns whoever else does.
        options = {"alias": None, **options}
    return backend_class(**options)


def path_of(backend: Any) -> str:
    """Where a back end is defined."""
    return f"{backend.__module__}.{backend.__qualname__}"


def canonical(path: str, backend: Any = None) -> str:
    """The one name of a back end without an alias: where it is defined, by whichever name it was imported.

    :param backend: what the path leads to, if that is known.
    """
    name = path_of(backend or import_string(path))
    return path if "<locals>" in name else name


def find(name: str) -> Mailer:
    """The mailer of this name.

    Under ``MAILERS`` a dotted path, which a row has from the time before, means the one entry with that back end.

    :raises MailerGone: there is none, or more than one.
    """
    configured = conf.mailers()
    then = "; then: manage.py retry_deferred --held"
    alias: str | None
    if configured is not None and name in configured:
        alias, path = name, configured[name].path
    elif "." in name:
        alias, path = None, name
    else:
        where = "MAILERS" if configured is not None else "MAILERS, which these settings do not have"
        raise MailerGone(f"mailer {name!r} is gone: add it to {where}{then}")
    try:
        backend_class = import_string(path)
    except ImportError as error:
        raise MailerGone(f"mailer {name!r} is gone ({error}): bring {path} back{then}") from error
    if configured is not None and alias is None:
        aliases = [other for other, entry in configured.items() if _leads_to(entry.path, backend_class)]
        if len(aliases) > 1:
            several = ", ".join(map(repr, aliases))
            raise MailerGone(f"{name!r} may be any of {several}: give MAILERS an entry of this very name{then}")
        alias = aliases[0] if aliases else None
    options = configured[alias].options if configured is not None and alias is not None else {}
    behind = getattr(backend_class, "behind", None)
    if behind is not None:
        # It was a mailer of its own when the row was written; now it stands before another and would only store.
        return find(behind(alias, options.get("using")))
    return Mailer(alias or canonical(name, backend_class), backend_class, options, alias)


def _leads_to(path: str, backend_class: Any) -> bool:
    try:
        return import_string(path) is backend_class
    except ImportError:
        return False
