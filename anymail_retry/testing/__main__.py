"""A local ESP started by hand: ``python -m anymail_retry.testing --esp resend --fault 503 --every 3``."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Sequence

from anymail_retry import testing
from anymail_retry.testing import ESPS, Fault, HandshakeFault, LocalEsp, Rule, Status


def fault(text: str) -> Fault:
    """A fault by its class name, or by an HTTP status."""
    if text.isdigit():
        return Status(int(text))
    kind = getattr(testing, text, None)
    if not (isinstance(kind, type) and issubclass(kind, Fault)) or kind in {Fault, HandshakeFault}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an HTTP status nor a fault such as AcceptThenDrop")
    try:
        return kind()
    except TypeError as error:
        raise argparse.ArgumentTypeError(f"{text} needs arguments: {error}") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m anymail_retry.testing",
        description="A local ESP: accepts mail by an ESP's API and delivers none of it.",
    )
    result.add_argument("--esp", choices=ESPS, default="mandrill")
    result.add_argument("--http", action="store_true", help="plain HTTP instead of HTTPS")
    result.add_argument("--host", default="127.0.0.1")
    result.add_argument("--port", type=int, default=0, help="default: any free port")
    result.add_argument("--latency", type=float, default=0.0, metavar="SECONDS")
    result.add_argument("--fault", type=fault, help="an HTTP status, or a fault by its name in anymail_retry.testing")
    result.add_argument("--every", type=int, default=1, metavar="N", help="each Nth request meets the fault")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until Ctrl-C; print the settings to paste, then each request."""
    options = parser().parse_args(arguments)
    log = logging.getLogger("anymail_retry.testing")
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.DEBUG)
    with LocalEsp(
        options.esp, tls=not options.http, latency=options.latency, host=options.host, port=options.port
    ) as esp:
        if options.fault:
            esp.script(Rule(options.fault, every=options.every))
        say(f"{esp.provider.name} at {esp.origin}, until Ctrl-C. In the settings of your site:\n")
        say("ANYMAIL = {")
        for name, value in esp.settings().items():
            say(f'    "{name}": "{value}",')
        say("}\n")
        for name, value in esp.environ.items():
            say(f"In its environment, so that it trusts the certificate: {name}={value}\n")
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what runs in its background with SIGINT ignored
            signal.signal(number, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say(f"\n{esp.counts.requests} requests, {esp.counts.accepted} accepted")
    return 0


def say(line: str) -> None:
    """Print at once, into a pipe too."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
