"""What the back ends that stand before another one have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.core.mail.backends.base import BaseEmailBackend
from django.utils.module_loading import import_string

from .. import conf
from .fallback import options_of_its_own
from .mailers import canonical, make, path_of

if TYPE_CHECKING:
    from typing_extensions import Self


class WrappingBackend(BaseEmailBackend):
    """Stands before the mailer that ``using``, or a setting, names.

    Follows Django's convention for wrapping back ends (DEP 18): ``OPTIONS = {"using": "<alias>"}``. Without MAILERS
    a setting holds the dotted path instead. What is behind has to be a back end that sends: never another of these.
    """

    #: Name, without ``EMAIL_``, of the setting that names the back end behind this one where MAILERS is not used.
    setting: ClassVar[str]
    #: The options that it has besides ``using``.
    own_settings: ClassVar[tuple[conf.Setting, ...]] = ()

    #: Names of the options that this object alone was made with.
    own_options: frozenset[str] = frozenset()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        backend = super().__new__(cls)
        backend.own_options = options_of_its_own(kwargs) - {"using"}
        return backend

    def __init__(self, fail_silently: bool = False, *, using: str | None = None, **kwargs: Any) -> None:
        self.options = conf.take_options(self.own_settings, kwargs)
        # What was given for this one object alone (an account, say) is meant for the back end that sends.
        forwarded = {name: kwargs[name] for name in conf.own_keywords(kwargs) & set(kwargs)}
        if kwargs.get("alias") is None:
            kwargs = {}
        super().__init__(**kwargs)
        self.fail_silently = fail_silently
        self._forwarded = {name: value for name, value in forwarded.items() if name != "fail_silently"}
        #: The name of the mailer behind this one, as the queue keeps it.
        self.mailer: str = behind(type(self), getattr(self, "alias", None), using)

    def make_inner(self, **options: Any) -> BaseEmailBackend:
        """The back end behind this one, with these options in addition to its own."""
        options = {**self._forwarded, **options}
        configured = conf.mailers()
        if configured is None:
            return make(import_string(self.mailer), options)
        if not options:
            from django.core.mail import mailers  # Django 6.1

            return mailers[self.mailer]
        entry = configured[self.mailer]
        return make(
            import_string(entry.path),
            # As Django's get_connection(**options) does it: those that the back end does not know are passed over.
            {**entry.options, **options, "alias": self.mailer, "_ignore_unknown_kwargs": set(options)},
        )

    @classmethod
    def behind(cls, alias: str | None, using: str | None) -> str:
        """The name of the mailer behind this back end; see :func:`behind`."""
        return behind(cls, alias, using)

    @classmethod
    def check_mailer(cls, name: str, alias: str | None, options: Mapping[str, Any]) -> Iterator[checks.CheckMessage]:
        """System check: there is a back end behind this one, and it is one that sends."""
        try:
            behind(cls, alias, options.get("using"))
        except ImproperlyConfigured as error:
            yield checks.Error(f"{name}: {error}", id="anymail_retry.E008")


def behind(cls: type[WrappingBackend], alias: str | None, using: str | None) -> str:
    """The name of the mailer behind a wrapping back end.

    :param alias: of the wrapping one; None: it is named in ``EMAIL_BACKEND``, or nowhere.
    :param using: its option.
    :raises ImproperlyConfigured: there is none, or it is a wrapping one itself; says what to write.
    """
    path = path_of(cls)
    configured = conf.mailers()
    if configured is None:
        name = conf.SETTINGS[cls.setting].full_name
        mailer = using or conf.get(cls.setting)
        where, backend_path = name, mailer
        if mailer is None:
            raise ImproperlyConfigured(
                f'{path} needs a back end to send through. Write, for example: {name} = "{conf.DEFAULT_BACKEND}"'
            )
    else:
        mailer, where = using, '"using"'
        if mailer is None:
            raise ImproperlyConfigured(
                f"{path} needs the alias of the mailer to send through. Add to its entry in MAILERS:"
                ' "OPTIONS": {"using": "<alias>"}'
            )
        if mailer == alias:
            raise ImproperlyConfigured(f'The mailer {alias!r} sends through itself. Change its "using".')
        if mailer not in configured:
            raise ImproperlyConfigured(
                f'{mailer!r}, in "using", is no alias in MAILERS. Its aliases are: {", ".join(configured)}.'
            )
        backend_path = configured[mailer].path
    try:
        backend = import_string(backend_path)
    except ImportError as error:
        raise ImproperlyConfigured(f"{where} names {backend_path!r}, which cannot be imported: {error}") from error
    if isinstance(backend, type) and issubclass(backend, WrappingBackend):
        raise ImproperlyConfigured(
            f"{where} names {mailer!r}, which sends nothing itself but stands before another. Name the one that sends."
        )
    return mailer if configured is not None else canonical(mailer, backend)
