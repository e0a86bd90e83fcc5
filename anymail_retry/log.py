"""Loggers that do not chase their own tail.

A site may have its log mailed to the ADMINS. A failing ESP would then be reported by a mail, whose failure would be
reported by a mail, and so on without end. So what is logged while one of our own records is being handled is dropped:
a mail is reported on, a mail that reports is not. Nor does a report that fails become a failure of what it reports
on: since Django 6.1 ``AdminEmailHandler`` raises what sending its mail raises.
"""

from __future__ import annotations

import logging
import sys
import traceback
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger]
else:
    Adapter = logging.LoggerAdapter  # cannot be subscripted before Python 3.11

_reporting: ContextVar[bool] = ContextVar("anymail_retry_reporting", default=False)

#: What makes a record name the line that logs. From Python 3.11 on the frames of logging itself do not count.
_STACKLEVEL = 2 if sys.version_info >= (3, 11) else 3


class _Logger(Adapter):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if _reporting.get():
            return
        token = _reporting.set(True)
        try:
            super().log(level, msg, *args, stacklevel=_STACKLEVEL, **kwargs)
        except Exception:
            if logging.raiseExceptions:  # despite its name: whether such errors are shown
                traceback.print_exc(file=sys.stderr)
        finally:
            _reporting.reset(token)


def get_logger(name: str) -> Adapter:
    """A logger under ``anymail_retry``: ``transport`` or ``queue``."""
    return _Logger(logging.getLogger(f"anymail_retry.{name}"), {})
