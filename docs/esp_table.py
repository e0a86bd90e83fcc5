"""Writes ``esps.rst`` from the facts that the back ends carry: ``python docs/esp_table.py > docs/esps.rst``."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anymail_retry.verdict import AnswerRule, EspFacts

HEAD = """\
What each ESP means by its answers
==================================

Made from the class attributes of the back ends, which name the source and the date of each fact. *Surely not taken*
and *may have been taken* are what a status says where no rule below looks into the body. The table of ``verdicts``
says what follows from each.

"""

#: What is to be said of one back end besides, by its module.
NOTES = {
    "amazon_ses": """\
By boto3, in whose own loop our settings decide. These mean nothing there: ``EMAIL_OTHER_RETRIES``,
``EMAIL_CONNECTION_MAX_IDLE`` and ``EMAIL_BREAKER_FAILURES``. A deadline sets the read timeout, to half of what
connecting leaves of it (all, where there are no retries); no try is begun that might pass it. In
``AMAZON_SES_CLIENT_PARAMS["config"]`` your own timeouts go over these, and your own ``retries`` leave it all to
botocore, which tries again what SES may have taken.
""",
}

TAIL = """\
An ESP without idempotency keys cannot recognise a repetition. What it may have taken is therefore never sent again
within a call, unless ``EMAIL_READ_RETRIES`` or ``EMAIL_HTTP_STATUS_RETRYABLE`` ask for it; from the queue it is, by
``EMAIL_QUEUE_ON_AMBIGUOUS``.
"""


def page() -> str:
    """The whole page."""
    from anymail_retry.backends import BACKENDS

    return HEAD + "".join(section(name, module) for name, module in BACKENDS.items()) + TAIL


def section(name: str, module: str) -> str:
    backend: type[EspFacts] = import_module(f"anymail_retry.backends.{module}").EmailBackend
    title = str(backend.esp_name)  # type: ignore[attr-defined]  # Anymail's
    key = backend.idempotency
    lines = [
        ("Back end", f"``anymail_retry.backends.{name}``"),
        ("Surely not taken", statuses(backend.refused_statuses)),
        ("May have been taken", statuses(backend.ambiguous_statuses - backend.refused_statuses)),
        ("The account's trouble", statuses(backend.blocked_statuses)),
        ("Nobody accepted, nothing raised", f"``{backend.none_accepted}``"),
        (
            "Idempotency key",
            f"{'HTTP header' if key.place == 'header' else 'field'} ``{key.name}``, for {duration(key.window)}"
            if key
            else "none",
        ),
    ]
    text = f"{title}\n{'-' * len(title)}\n\n"
    if module in NOTES:
        text += f"{NOTES[module]}\n"
    text += "".join(f":{label}: {value}\n" for label, value in lines)
    if backend.answers:
        text += "\nAnswers that mean something else than their status, the first that fits:\n\n"
        text += "".join(f"* {rule(answer)}\n" for answer in backend.answers)
    return text + "\n\n"


def statuses(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


def duration(seconds: float) -> str:
    unit, length = next(unit for unit in (("hour", 3600), ("minute", 60), ("second", 1)) if seconds >= unit[1])
    return f"{seconds / length:g} {unit}{'' if seconds == length else 's'}"


def rule(answer: AnswerRule) -> str:
    """One rule, as a sentence."""
    conditions = [f"status {answer.status}"] if answer.status else []
    if answer.values:
        conditions.append(f"``{answer.path}`` {values(answer.values)}")
    elif answer.unless:
        conditions.append(f"``{answer.path}`` other than {values(answer.unless)}")
    elif answer.path:
        conditions.append(f"any ``{answer.path}``")
    if answer.text:
        conditions.append(f'the text "{answer.text}"')
    reason = f" ({answer.reason})" if answer.reason else ""
    return f"{', '.join(conditions)}: ``{answer.verdict}``{reason}"


def values(names: Iterable[str]) -> str:
    by_number = sorted(
        names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )
    return ", ".join(f"``{name}``" for name in by_number)


if __name__ == "__main__":
    import django
    from django.conf import settings

    sys.path.insert(0, str(Path(__file__).parent.parent))
    settings.configure()
    django.setup()
    sys.stdout.write(page())
