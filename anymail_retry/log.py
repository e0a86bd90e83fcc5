"""Loggers that do not chase their own tail.

A site may have its log mailed to the ADMINS. A failing ESP would then be reported by a mail, whose failure would be
reported by a mail, and so on without end. So nothing is reported on what itself reports: what is logged while one of
our own records, or a receiver of our signals, is being handled is dropped; and a message that is queued meanwhile is
marked as a report, for the worker to do the same. Nor does a report that fails become a failure of what it reports on:
since Django 6.1 ``AdminEmailHandler`` raises what sending its mail raises.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger]
else:
    Adapter = logging.LoggerAdapter  # cannot be subscripted before Python 3.11

_reporting: ContextVar[bool] = ContextVar("anymail_retry_reporting", default=False)


def is_reporting() -> bool:
    """Whether what happens now is itself a report, and not reported on."""
    return _reporting.get()


@contextmanager
def reporting(it_is: bool = True) -> Iterator[None]:
    """What happens in this context is a report.

    :param it_is: ``False``: nothing is changed.
    """
    token = _reporting.set(it_is or _reporting.get())
    try:
        yield
    finally:
        _reporting.reset(token)


#: What makes a record name the line that logs. From Python 3.11 on the frames of logging itself do not count.
_STACKLEVEL = 2 if sys.version_info >= (3, 11) else 3


class _Logger(Adapter):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if is_reporting() or not self.isEnabledFor(level):
            return
        with reporting():
            try:
                super().log(level, msg, *args, stacklevel=_STACKLEVEL, **kwargs)
            except Exception:
                if logging.raiseExceptions:  # despite its name: whether such errors are shown
                    traceback.print_exc(file=sys.stderr)


def get_logger(name: str) -> Adapter:
    """A logger under ``anymail_retry``: ``transport`` or ``queue``."""
    return _Logger(logging.getLogger(f"anymail_retry.{name}"), {})
