"""A local ESP that misbehaves by script: for your tests of what happens to mail when an ESP fails.

It speaks HTTPS and the API of each of Anymail's 13 requests-based ESPs, so that nothing of the code under test need
be patched. It keeps a ledger of what it accepted and a log of every request.

::

    from anymail_retry.testing import AcceptThenDrop, LocalEsp, Rule, Status

    with LocalEsp("sparkpost") as esp:
        esp.script(
            Rule(Status(429, retry_after=1), every=3),  # each third request
            Rule(AcceptThenDrop(), probability=0.1, seed=7),
        )
        ...  # send with ANYMAIL = esp.settings() and REQUESTS_CA_BUNDLE = esp.ca_file
        assert esp.ledger.lost(expected_markers) == []
        assert esp.ledger.duplicates() == {}

By hand: ``python -m anymail_retry.testing``. For pytest: ``pytest_plugins = ["anymail_retry.testing.pytest"]``.
HTTPS needs ``pip install "django-anymail-retry[testing]"``.
"""

from __future__ import annotations

from anymail_retry.testing.esps import PROVIDERS
from anymail_retry.testing.exchange import Exchange
from anymail_retry.testing.faults import (
    AcceptThenDrop,
    AcceptThenStall,
    CloseIdle,
    DropInHandshake,
    Fault,
    Garbage200,
    HalfBody,
    HandshakeFault,
    Latency,
    Ok,
    Redirect,
    Refuse,
    ResetAfterRequest,
    Rule,
    Stall,
    StallInBody,
    StallInHandshake,
    Status,
    TlsErrorAfterRequest,
)
from anymail_retry.testing.ledger import Accepted, Ledger, Request, message_id_of
from anymail_retry.testing.local import Counts, LocalEsp, ScriptedEsp
from anymail_retry.testing.process import SpawnedEsp
from anymail_retry.testing.waiting import no_waiting
from anymail_retry.testing.wire import Answer

#: The names of the ESPs.
ESPS = tuple(PROVIDERS)

__all__ = [
    "ESPS",
    "AcceptThenDrop",
    "AcceptThenStall",
    "Accepted",
    "Answer",
    "CloseIdle",
    "Counts",
    "DropInHandshake",
    "Exchange",
    "Fault",
    "Garbage200",
    "HalfBody",
    "HandshakeFault",
    "Latency",
    "Ledger",
    "LocalEsp",
    "Ok",
    "Redirect",
    "Refuse",
    "Request",
    "ResetAfterRequest",
    "Rule",
    "ScriptedEsp",
    "SpawnedEsp",
    "Stall",
    "StallInBody",
    "StallInHandshake",
    "Status",
    "TlsErrorAfterRequest",
    "message_id_of",
    "no_waiting",
]
