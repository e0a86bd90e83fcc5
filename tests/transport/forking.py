"""A process that sends, forks and sends again: ``python -m tests.transport.forking URL``.

On each side everything ends as processes end, urllib3's clean-up included. Exits with the number of the step that
went wrong, 0 if none did.
"""

from __future__ import annotations

import os
import sys

import django

from anymail_retry import close_connections


def main(url: str) -> int:
    django.setup()
    from .mail import Retrying, send

    def once(subject: str) -> None:
        send(Retrying(api_url=url, api_key="key"), subject)

    once("parent")
    if (child := os.fork()) == 0:
        once("child")
        once("child")
        close_connections()
        once("child")
        return 0
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        return 1
    for _ in range(5):
        once("parent")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
