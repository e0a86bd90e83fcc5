"""A site that sends mail, configured in each of the ways that the installed Django knows."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import django
import pytest
from django.conf import settings as current_settings
from django.core import mail

from anymail_retry import close_connections, reset_breakers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_django.fixtures import SettingsWrapper

    from anymail_retry.testing import ScriptedEsp

MANDRILL = "anymail_retry.backends.mandrill.EmailBackend"
SMTP = "django.core.mail.backends.smtp.EmailBackend"

#: ``EMAIL_BACKEND`` and its like, or ``MAILERS``.
WAYS = ("legacy", "mailers") if django.VERSION >= (6, 1) else ("legacy",)

#: The setting, as the installed Django wants it.
ADMINS = ["anna@example.com"] if django.VERSION >= (6, 0) else [("Anna", "anna@example.com")]


class Site:
    """The mail settings of one test, in one way.

    :param way: ``legacy`` or ``mailers``.
    """

    def __init__(self, settings: SettingsWrapper, way: str) -> None:
        self.settings = settings
        self.way = way
        #: The name by which a queued message knows the back end that sends.
        self.mailer = ""
        if way == "legacy" and hasattr(current_settings, "MAILERS"):
            del settings.MAILERS
        if way == "mailers" and not hasattr(current_settings, "MAILERS"):
            del settings.EMAIL_BACKEND  # Django allows one or the other

    def esp(self, esp: ScriptedEsp, backend: str = MANDRILL, **options: Any) -> None:
        """Send through this back end, to this ESP."""
        prefix = esp.provider.name.upper().replace(" ", "_")
        anymail = {f"{prefix}_{name.upper()}": value for name, value in {**esp.options(), **options}.items()}
        self._mailers({"default": {"BACKEND": backend, "OPTIONS": {**esp.options(), **options}}})
        self._legacy(EMAIL_BACKEND=backend, ANYMAIL=anymail)
        self.mailer = "default" if self.way == "mailers" else backend

    def smtp(self, port: int, wrapper: str = "", **options: Any) -> None:
        """Send through Django's SMTP back end, with a wrapper before it or not."""
        entry = {"BACKEND": SMTP, "OPTIONS": {"host": "127.0.0.1", "port": port, "timeout": 10, **options}}
        names = {"username": "EMAIL_HOST_USER", "password": "EMAIL_HOST_PASSWORD", "timeout": "EMAIL_TIMEOUT"}
        legacy = {"EMAIL_HOST": "127.0.0.1", "EMAIL_PORT": port, "EMAIL_TIMEOUT": 10}
        self._behind(wrapper, entry, {**legacy, **{names[name]: value for name, value in options.items()}})

    def behind(self, wrapper: str, backend: str, esp: ScriptedEsp | None = None, **wrapper_options: Any) -> None:
        """Send through a wrapper, and this back end behind it."""
        options = esp.options() if esp is not None else {}
        legacy = {"ANYMAIL": esp.settings()} if esp is not None else {}
        self._behind(wrapper, {"BACKEND": backend, "OPTIONS": options}, legacy, **wrapper_options)

    def _behind(self, wrapper: str, entry: dict[str, Any], legacy: dict[str, Any], **wrapper_options: Any) -> None:
        backend = entry["BACKEND"]
        if not wrapper:
            self._mailers({"default": entry})
            self._legacy(EMAIL_BACKEND=backend, **legacy)
            self.mailer = "default" if self.way == "mailers" else backend
            return
        path = f"anymail_retry.backends.{wrapper}.EmailBackend"
        options = {"using": "inner", **wrapper_options}
        self._mailers({"default": {"BACKEND": path, "OPTIONS": options}, "inner": entry})
        name = {"fallback": "EMAIL_FALLBACK_BACKEND", "queued": "EMAIL_QUEUE_BACKEND"}[wrapper]
        ours = {f"EMAIL_{option.upper()}": value for option, value in wrapper_options.items()}
        self._legacy(EMAIL_BACKEND=path, **{name: backend}, **ours, **legacy)
        self.mailer = "inner" if self.way == "mailers" else backend

    def _mailers(self, mailers: dict[str, Any]) -> None:
        if self.way == "mailers":
            self.settings.MAILERS = mailers

    def _legacy(self, **values: Any) -> None:
        if self.way == "legacy":
            with warnings.catch_warnings():
                # Django 6.1 warns of each of its own, as it should; a site may keep them until 2028.
                warnings.filterwarnings("ignore", r"The EMAIL_\w+ setting is deprecated", PendingDeprecationWarning)
                for name, value in values.items():
                    setattr(self.settings, name, value)

    def connection(self, **options: Any) -> Any:
        """``django.core.mail.get_connection(**options)``, of which Django 6.1 warns."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PendingDeprecationWarning)
            return mail.get_connection(**options)


@pytest.fixture(params=WAYS)
def site(request: pytest.FixtureRequest, settings: SettingsWrapper) -> Iterator[Site]:
    """A site in each way, whose breakers and connections nobody has used before and nobody will after."""
    reset_breakers()
    yield Site(settings, request.param)
    close_connections()
    reset_breakers()


def message(subject: str = "Subject", to: str = "to@example.com", **fields: Any) -> Any:
    """A message; ``Any``, because Anymail and this package hang attributes on it."""
    return mail.EmailMessage(subject, "Body", "from@example.com", [to], **fields)


def words(error: BaseException) -> str:
    """All that an error says: its text and its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])
