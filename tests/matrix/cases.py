"""The table: every fault, and what each ESP's back end makes of it.

This is what is expected, written by hand from what the ESPs document. ``test_send.py`` and ``test_drain.py`` run every
cell of it on the wire, and ``docs/faults.rst`` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import requests
from anymail.exceptions import AnymailRecipientsRefused, AnymailRequestsAPIError
from anymail.message import AnymailMessage

from anymail_retry.testing import (
    ESPS,
    AcceptThenDrop,
    AcceptThenStall,
    DropInHandshake,
    Fault,
    Garbage200,
    HalfBody,
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

if TYPE_CHECKING:
    from anymail_retry.testing import Exchange

#: The ESPs that recognise a message that they have by its key; for the others what is ambiguous stays so.
KEYED = frozenset({"brevo", "resend", "sparkpost", "unisender_go"})

# What the caller of send() sees, with the queue on.
SENT = "sent"  # success
QUEUED = "queued"  # success, and a row
RAISED = "raised"  # the exception
WARNED = "warned"  # success, as Anymail has it; a line in the log and a signal say that it was none

# Waits between two tries, in seconds: from, to.
NONE: tuple[tuple[float, float], ...] = ()
AT_ONCE = ((0.0, 0.0), (1.0, 1.5), (2.0, 2.5))  # after a connection that broke, or never stood
PATIENT = ((0.5, 1.0), (1.0, 1.5), (2.0, 2.5))  # after an answer


def each(seconds: float) -> tuple[tuple[float, float], ...]:
    """The same wait before each of three more tries."""
    return ((seconds, seconds),) * 3


@dataclass(frozen=True)
class Ends:
    """What one message comes to that meets a fault.

    :param tries: attempts in one call.
    :param caller: what ``send()`` does, with the queue on.
    :param row: the state of a queued message after a worker has met the fault.
    :param error: what ``send()`` raises, with the queue off; None: nothing.
    :param status: the HTTP status that error, row and history carry.
    :param phases: how far each attempt came, in short; one letter for each: ``c``onnect, ``t``rust, ``s``ent,
        ``a``nswered.
    :param requests: that reach the ESP; None: as many as attempts came further than the connection.
    :param retry_after: seconds that a worker leaves the mailer alone because the ESP said so.
    """

    verdict: str
    tries: int
    caller: str
    row: str
    error: type[Exception] | None = AnymailRequestsAPIError
    status: int | None = None
    phases: str = "a"
    waits: tuple[tuple[float, float], ...] = NONE
    requests: int | None = None
    retry_after: float | None = None

    def phase(self, attempt: int) -> str:
        return self.phases[attempt] if len(self.phases) > 1 else self.phases


@dataclass(frozen=True)
class Case:
    """One fault.

    :param what: what the ESP, or the way to it, does; for the documentation.
    :param fault: the script of the local ESP; or what is done to the test's surroundings.
    :param ends: what comes of it where nothing else is said.
    :param keyed: what comes of it at an ESP with idempotency keys, if that is something else.
    :param others: what comes of it at single ESPs, and why.
    :param only: the ESPs that know this fault; all, if empty.
    :param taken: the ESP takes the message, with the first request.
    :param hangs: the timeout that a try waits for, if any: ``connect`` or ``read``.
    :param message: makes the message.
    """

    id: str
    group: str
    what: str
    fault: Rule | Fault | str
    ends: Ends
    keyed: Ends | None = None
    others: Mapping[str, tuple[Ends, str]] = field(default_factory=dict)
    only: frozenset[str] = frozenset()
    taken: bool = False
    hangs: str = ""
    message: Callable[[str], Any] | None = None

    @property
    def esps(self) -> list[str]:
        return [esp for esp in ESPS if not self.only or esp in self.only]

    def of(self, esp: str) -> Ends:
        """What comes of it at this ESP."""
        if esp in self.others:
            return self.others[esp][0]
        return self.keyed if self.keyed is not None and esp in KEYED else self.ends


def batch(subject: str) -> AnymailMessage:
    """A message that is sent to each recipient separately."""
    message = AnymailMessage(subject, "Body", "from@example.com", ["to@example.com", "other@example.com"])
    message.merge_data = {}
    return message


class WrongKey(Fault):
    """This ESP's own answer to an API key that it does not know."""

    def __repr__(self) -> str:
        return "WrongKey()"

    def apply(self, exchange: Exchange) -> None:
        exchange.answer(exchange.esp.provider.wrong_api_key())


# --- what can come of a fault --------------------------------------------------------------------------------------

DELIVERED = Ends("delivered", 1, SENT, "sent", None)
REFUSED = Ends("refused", 4, QUEUED, "deferred", waits=PATIENT)
UNCONNECTED = Ends("refused", 4, QUEUED, "deferred", requests.ConnectionError, phases="c", waits=AT_ONCE)
BLOCKED = Ends("blocked", 1, QUEUED, "deferred")
PERMANENT = Ends("permanent", 1, RAISED, "failed")
AMBIGUOUS = Ends("ambiguous", 1, QUEUED, "deferred")
AMBIGUOUS_UNDER_KEY = replace(AMBIGUOUS, tries=4, waits=PATIENT)
UNANSWERED = replace(AMBIGUOUS, error=requests.ConnectionError, phases="s")
UNANSWERED_UNDER_KEY = replace(UNANSWERED, tries=4, waits=AT_ONCE)
NOT_UNDERSTOOD = Ends("ambiguous", 1, RAISED, "held")
NOBODY = replace(PERMANENT, caller=WARNED, error=None)
RECIPIENTS_REFUSED = replace(PERMANENT, error=AnymailRecipientsRefused)


def answers(status: int, ends: Ends) -> Ends:
    """The same for an answer with this status."""
    return replace(ends, status=status)


def exceptions(status: int, ends: Ends, reasons: Mapping[str, str]) -> dict[str, tuple[Ends, str]]:
    """ESPs whose answer with this status means something else, and why."""
    return {esp: (answers(status, ends), why) for esp, why in reasons.items()}


def ambiguous(status: int, what: str, *, taken: bool, others: Mapping[str, tuple[Ends, str]] | None = None) -> Case:
    """A status that leaves it open whether the message was taken."""
    return Case(
        f"{status}, {'accepted' if taken else 'not accepted'}",
        "Answers that leave it open",
        what,
        Rule(Status(status, accepted=taken)),
        answers(status, AMBIGUOUS),
        keyed=answers(status, AMBIGUOUS_UNDER_KEY),
        others=others or {},
        taken=taken,
    )


def rate_limit(name: str, what: str, header: float | str | None, **ends: Any) -> Case:
    """A 429 that says how long to wait, or tries to."""
    return Case(
        f"429, {name}",
        "Answers that refuse for now",
        what,
        Rule(Status(429, retry_after=header)),
        answers(429, replace(REFUSED, **ends)),
    )


def refusal(name: str, esp: str, what: str, status: int, body: Any, ends: Ends, **more: Any) -> Case:
    """An answer that one ESP gives."""
    fault = body if isinstance(body, Fault) else Status(status, body, accepted=more.get("taken", False))
    group = "Success that is none" if status < 300 else "One ESP's own errors"
    return Case(name, group, what, Rule(fault), answers(status, ends), only=frozenset({esp}), **more)


# --- the table -----------------------------------------------------------------------------------------------------

CONNECTING = "Before the connection stands"
SENDING = "After the request, without an answer"
LATER = "Answers that refuse for now"
OPEN = "Answers that leave it open"
NEVER = "Answers that refuse for good, or until somebody acts"
TORN = "A status line, and a body that breaks"
MOVED = "Redirects and kept-open connections"

REFUSED_503 = {
    "mailersend": "announces maintenance with it",
    "mandrill": "ServiceUnavailable: down for maintenance",
    "postmark": "announces a planned outage with it",
    "sparkpost": "documents it as: try again later",
}

CASES: tuple[Case, ...] = (
    Case("DNS failure", CONNECTING, "The host name is not found.", "no such host", UNCONNECTED),
    Case("connection refused", CONNECTING, "The port refuses.", "refuse", UNCONNECTED),
    Case(
        "connect timeout",
        CONNECTING,
        "The connection hangs.",
        "black hole",
        replace(UNCONNECTED, error=requests.ConnectTimeout),
        hangs="connect",
    ),
    Case(
        "untrusted certificate",
        CONNECTING,
        "The server's certificate is not trusted.",
        "untrusted",
        replace(BLOCKED, error=requests.exceptions.SSLError, phases="t"),
    ),
    Case(
        "handshake dropped",
        CONNECTING,
        "The connection is closed in the TLS handshake.",
        Rule(DropInHandshake()),
        UNCONNECTED,
    ),
    Case(
        "handshake reset",
        CONNECTING,
        "The connection is reset in the TLS handshake.",
        Rule(DropInHandshake(reset=True)),
        UNCONNECTED,
    ),
    Case(
        "handshake stalled",
        CONNECTING,
        "The TLS handshake hangs.",
        Rule(StallInHandshake()),
        replace(UNCONNECTED, error=requests.ConnectTimeout),
        hangs="connect",
    ),
    # ---
    Case(
        "reset, not accepted",
        SENDING,
        "The connection is reset after the request.",
        Rule(ResetAfterRequest()),
        UNANSWERED,
        keyed=UNANSWERED_UNDER_KEY,
    ),
    Case(
        "accepted, then dropped",
        SENDING,
        "The message is accepted, and the connection closed without an answer; each time.",
        Rule(AcceptThenDrop()),
        UNANSWERED,
        keyed=UNANSWERED_UNDER_KEY,
        taken=True,
    ),
    Case(
        "accepted, then reset once",
        SENDING,
        "The message is accepted, and the connection reset; the next request is answered.",
        Rule(AcceptThenDrop(reset=True), times=1),
        UNANSWERED,
        keyed=replace(DELIVERED, tries=2, phases="sa", waits=AT_ONCE[:1]),
        taken=True,
    ),
    Case(
        "silence, not accepted",
        SENDING,
        "No answer within the read timeout; the next request is answered.",
        Rule(Stall(), times=1),
        replace(UNANSWERED, error=requests.ReadTimeout),
        keyed=replace(DELIVERED, tries=2, phases="sa", waits=AT_ONCE[:1]),
        hangs="read",
    ),
    Case(
        "accepted, then silence",
        SENDING,
        "The message is accepted, with no answer within the read timeout; the next request is answered.",
        Rule(AcceptThenStall(), times=1),
        replace(UNANSWERED, error=requests.ReadTimeout),
        keyed=replace(DELIVERED, tries=2, phases="sa", waits=AT_ONCE[:1]),
        taken=True,
        hangs="read",
    ),
    Case(
        "TLS error, not accepted",
        SENDING,
        "TLS breaks after the request (``EMAIL_OTHER_RETRIES`` counts these: none).",
        Rule(TlsErrorAfterRequest()),
        UNANSWERED,
    ),
    Case(
        "TLS error, accepted",
        SENDING,
        "The message is accepted, and TLS breaks (``EMAIL_OTHER_RETRIES`` counts these: none).",
        Rule(TlsErrorAfterRequest(accepted=True)),
        UNANSWERED,
        taken=True,
    ),
    Case(
        "accepted, then dead",
        SENDING,
        "The message is accepted, and the ESP goes down: what follows is refused.",
        Refuse(accepted=True),
        replace(UNANSWERED, requests=1),
        keyed=replace(UNANSWERED_UNDER_KEY, phases="sccc", requests=1),
        taken=True,
    ),
    # ---
    rate_limit("no Retry-After", "A rate limit, without ``Retry-After``.", None),
    rate_limit("Retry-After: 3", "A rate limit, with seconds to wait.", 3, waits=each(3.0), retry_after=3.0),
    rate_limit("Retry-After: 0.5", "With a decimal number of seconds.", "0.5", waits=each(0.5), retry_after=0.5),
    rate_limit(
        "Retry-After: a date",
        "With an HTTP date, past after the first wait.",
        "Sun, 06 Nov 1994 08:49:44 GMT",
        waits=((7.0, 7.0), *AT_ONCE[1:]),
    ),
    rate_limit("Retry-After: garbage", "With a ``Retry-After`` that means nothing.", "soon"),
    rate_limit(
        "Retry-After: an hour", "With a wait that nobody sits out.", 3600, tries=1, waits=NONE, retry_after=3600.0
    ),
    Case(
        "429, key used up",
        LATER,
        "A rate limit after which the idempotency key counts as used: the next try takes another.",
        Rule(Status(429, uses_key=True), times=1),
        answers(429, REFUSED),
        others={
            esp: (answers(400, replace(REFUSED, tries=2, waits=PATIENT[:1])), why)
            for esp, why in {
                "brevo": "says ``duplicate_parameter`` to the second try",
                "unisender_go": "says 1573 to the second try",
            }.items()
        },
        only=KEYED,
    ),
    Case(
        "503",
        LATER,
        "Unavailable, where the ESP documents it as refused.",
        Rule(Status(503)),
        answers(503, REFUSED),
        only=frozenset(REFUSED_503),
    ),
    Case(
        "421",
        LATER,
        "Unavailable, at MailerSend only.",
        Rule(Status(421)),
        answers(421, REFUSED),
        only=frozenset({"mailersend"}),
    ),
    Case(
        "409, in progress",
        LATER,
        "Another request under this idempotency key is being worked on.",
        Rule(Status(409, kind="in progress")),
        answers(409, REFUSED),
        only=frozenset({"resend", "sparkpost"}),
    ),
    # ---
    ambiguous(500, "Internal error, nothing accepted.", taken=False),
    ambiguous(500, "Internal error, though accepted.", taken=True),
    ambiguous(502, "A proxy's, nothing accepted.", taken=False),
    ambiguous(502, "A proxy's, though accepted.", taken=True),
    ambiguous(504, "A proxy's timeout, nothing accepted.", taken=False),
    ambiguous(504, "A proxy's timeout, though accepted.", taken=True),
    ambiguous(520, "An edge's, nothing accepted.", taken=False),
    ambiguous(520, "An edge's, though accepted.", taken=True),
    ambiguous(524, "An edge's timeout, nothing accepted.", taken=False),
    ambiguous(524, "An edge's timeout, though accepted.", taken=True),
    ambiguous(408, "Request timeout, nothing accepted.", taken=False),
    replace(
        ambiguous(503, "Unavailable, where nobody documents that it refuses; nothing accepted.", taken=False),
        only=frozenset(ESPS) - REFUSED_503.keys(),
    ),
    replace(
        ambiguous(503, "Unavailable, where nobody documents that it refuses; though accepted.", taken=True),
        only=frozenset(ESPS) - REFUSED_503.keys(),
    ),
    Case(
        "503, Retry-After: 1",
        OPEN,
        "The same, with seconds to wait: no reason to send again what may have been taken.",
        Rule(Status(503, retry_after=1, accepted=True)),
        answers(503, AMBIGUOUS),
        keyed=answers(503, replace(AMBIGUOUS_UNDER_KEY, waits=each(1.0))),
        only=frozenset(ESPS) - REFUSED_503.keys(),
        taken=True,
    ),
    # ---
    Case(
        "wrong API key",
        NEVER,
        "The ESP's own answer to an API key that it does not know.",
        Rule(WrongKey()),
        answers(401, BLOCKED),
        others={"postal": (answers(200, BLOCKED), "answers 200 whatever it says")},
    ),
    Case("401", NEVER, "Unauthorized.", Rule(Status(401)), answers(401, BLOCKED)),
    Case("402", NEVER, "The account has to pay.", Rule(Status(402)), answers(402, BLOCKED)),
    Case(
        "403",
        NEVER,
        "Forbidden: this message's From, unless the ESP says otherwise.",
        Rule(Status(403)),
        answers(403, PERMANENT),
        others={
            **exceptions(
                403,
                BLOCKED,
                {
                    "brevo": "``permission_denied``: the account may not send",
                    "scaleway": "``permissions_denied``: the API key may not send",
                    "sparkpost": "``Forbidden.``: the plan or the API key lacks the right",
                },
            ),
        },
    ),
    Case("404", NEVER, "Not found.", Rule(Status(404)), answers(404, PERMANENT)),
    Case("413", NEVER, "Too large.", Rule(Status(413, retry_after=1)), answers(413, PERMANENT)),
    Case(
        "420",
        NEVER,
        "Over the sending limit, at SparkPost and Mailgun; unknown elsewhere.",
        Rule(Status(420)),
        answers(420, PERMANENT),
        others=exceptions(
            420,
            BLOCKED,
            {"mailgun": "over the limit of recipients", "sparkpost": "over the limit of the hour, day or month"},
        ),
    ),
    Case(
        "421 elsewhere",
        NEVER,
        "Means nothing at these ESPs.",
        Rule(Status(421)),
        answers(421, PERMANENT),
        only=frozenset(ESPS) - {"mailersend"},
    ),
    Case(
        "422",
        NEVER,
        "Something about this message.",
        Rule(Status(422)),
        answers(422, PERMANENT),
    ),
    # ---
    refusal("Resend: daily quota", "resend", "429, ``daily_quota_exceeded``.", 429, Status(429, kind="quota"), BLOCKED),
    refusal(
        "Resend: monthly quota",
        "resend",
        "429, ``monthly_quota_exceeded``.",
        429,
        Status(429, kind="monthly quota"),
        BLOCKED,
    ),
    refusal(
        "Resend: quota with Retry-After",
        "resend",
        "429, ``daily_quota_exceeded``, wait a second.",
        429,
        Status(429, kind="quota", retry_after=1),
        replace(BLOCKED, retry_after=1.0),
    ),
    refusal("MailerSend: daily quota", "mailersend", "429, MS42901.", 429, Status(429, kind="quota"), BLOCKED),
    refusal(
        "Mailtrap: plan used up",
        "mailtrap",
        "429, billing plan limit exhausted.",
        429,
        Status(429, kind="quota"),
        BLOCKED,
    ),
    refusal("Scaleway: quota", "scaleway", "403, ``quotas_exceeded``.", 403, Status(403, kind="quota"), BLOCKED),
    refusal("Unisender Go: daily limit", "unisender_go", "403, 901.", 403, Status(403, kind="quota"), BLOCKED),
    refusal("Unisender Go: limit", "unisender_go", "400, 906.", 400, Status(400, kind="quota"), BLOCKED),
    refusal(
        "Unisender Go: no recipient",
        "unisender_go",
        "400, 204: nobody that may be sent to.",
        400,
        Status(400, kind="recipients"),
        PERMANENT,
    ),
    refusal(
        "Unisender Go: 500, 120",
        "unisender_go",
        "500, 120: the sender's DKIM.",
        500,
        Status(500, kind="permanent"),
        PERMANENT,
    ),
    refusal("Brevo: account", "brevo", "403, ``account_under_validation``.", 403, Status(403, kind="account"), BLOCKED),
    refusal(
        "Mandrill: 500, ValidationError",
        "mandrill",
        "500 with a permanent ``name``, as all were until 2023.",
        500,
        Status(500, kind="permanent"),
        PERMANENT,
    ),
    refusal("Mandrill: 500, HTML", "mandrill", "500 without a ``name``.", 500, Status(500, "<h1>Oops</h1>"), AMBIGUOUS),
    refusal(
        "Mailjet: 500, null merge data",
        "mailjet",
        "500 that says what is wrong with the message.",
        500,
        Status(500, '{"ErrorMessage": "Cannot convert data from Null value"}'),
        PERMANENT,
    ),
    refusal(
        "Resend: 403, wrong API key",
        "resend",
        "403, ``invalid_api_key``, as documented.",
        403,
        {"statusCode": 403, "name": "invalid_api_key", "message": "API key is invalid."},
        BLOCKED,
    ),
    refusal(
        "Resend: 400, wrong API key",
        "resend",
        "400, ``validation_error`` that names the API key, as has been seen.",
        400,
        {"statusCode": 400, "name": "validation_error", "message": "API key is invalid"},
        BLOCKED,
    ),
    refusal(
        "MailerSend: 403, API key",
        "mailersend",
        "403, MS40301: the token may not send.",
        403,
        {"message": "This action is unauthorized. #MS40301"},
        BLOCKED,
    ),
    refusal(
        "SendGrid: 403, API key",
        "sendgrid",
        "403, access forbidden: the API key may not send.",
        403,
        {"errors": [{"message": "access forbidden", "field": None, "help": None}]},
        BLOCKED,
    ),
    refusal(
        "Mailgun: 403, account",
        "mailgun",
        "403, not allowed to send: the account is disabled.",
        403,
        {"message": "Domain example.com is not allowed to send: Your account is temporarily disabled."},
        BLOCKED,
    ),
    refusal(
        "Mailgun: 403, sandbox",
        "mailgun",
        "403, not an authorized recipient of a sandbox domain.",
        403,
        {"message": "Domain sandbox1.mailgun.org is not allowed to send: add the address to authorized recipients."},
        PERMANENT,
    ),
    refusal(
        "SparkPost: 403, not Forbidden",
        "sparkpost",
        "403 in other words: this message's.",
        403,
        {"errors": [{"message": "Something else."}]},
        PERMANENT,
    ),
    refusal("Postmark: 422, 300", "postmark", "Invalid From.", 422, Status(422), PERMANENT),
    refusal("Postmark: 422, 405", "postmark", "Out of credits.", 422, Status(422, kind="account"), BLOCKED),
    refusal(
        "Postmark: 422, 406",
        "postmark",
        "Inactive recipient.",
        422,
        Status(422, kind="recipients"),
        RECIPIENTS_REFUSED,
    ),
    refusal(
        "Postmark: 422, 100",
        "postmark",
        "Maintenance.",
        422,
        {"ErrorCode": 100, "Message": "Maintenance."},
        replace(REFUSED, tries=1, waits=NONE),
    ),
    refusal(
        "Resend: 409, other body",
        "resend",
        "409, ``invalid_idempotent_request``, for the first request under a key.",
        409,
        Status(409),
        PERMANENT,
    ),
    refusal(
        "SparkPost: 409, other body",
        "sparkpost",
        "409, 1600, for the first request under a key.",
        409,
        Status(409),
        PERMANENT,
    ),
    refusal(
        "Brevo: duplicate, first request",
        "brevo",
        "400, ``duplicate_parameter``, though nothing was sent under this key: the next try takes another.",
        400,
        Status(400, kind="duplicate"),
        replace(REFUSED, tries=1, waits=NONE),
    ),
    refusal(
        "Unisender Go: duplicate, first request",
        "unisender_go",
        "400, 1573, though nothing was sent under this key: the next try takes another.",
        400,
        Status(400, kind="duplicate"),
        replace(REFUSED, tries=1, waits=NONE),
    ),
    # ---
    Case(
        "200, garbage",
        TORN,
        "200, and a body that is not the ESP's.",
        Rule(Garbage200()),
        answers(200, NOT_UNDERSTOOD),
        others={
            "sendgrid": (answers(200, DELIVERED), "has no body in its answers: any 2xx is success"),
            "mailersend": (answers(200, replace(NOT_UNDERSTOOD, caller=WARNED, error=None)), "Anymail raises nothing"),
        },
        taken=True,
    ),
    Case(
        "200, half a body",
        TORN,
        "200, and the connection is closed in the body.",
        Rule(HalfBody(status=200)),
        answers(200, NOT_UNDERSTOOD),
        taken=True,
    ),
    Case(
        "200, a body that stalls",
        TORN,
        "200, and silence in the body.",
        Rule(StallInBody(status=200)),
        answers(200, NOT_UNDERSTOOD),
        taken=True,
        hangs="read",
    ),
    Case(
        "500, half a body",
        TORN,
        "500, and the connection is closed in the body: the status counts.",
        Rule(HalfBody(status=500, accepted=False)),
        answers(500, AMBIGUOUS),
        keyed=answers(500, AMBIGUOUS_UNDER_KEY),
    ),
    Case(
        "429, half a body",
        TORN,
        "429, and the connection is closed in the body: the status counts.",
        Rule(HalfBody(status=429, accepted=False)),
        answers(429, REFUSED),
    ),
    # ---
    refusal(
        "Postal: wrong API key",
        "postal",
        "``InvalidServerAPIKey``.",
        200,
        {"status": "error", "data": {"code": "InvalidServerAPIKey", "message": "The API token was not valid."}},
        BLOCKED,
    ),
    refusal(
        "Postal: wrong From",
        "postal",
        "``UnauthenticatedFromAddress``.",
        200,
        {"status": "error", "data": {"code": "UnauthenticatedFromAddress", "message": "The From is not authorised."}},
        PERMANENT,
    ),
    refusal(
        "Mailgun: wrong URL",
        "mailgun",
        "The greeting of the API.",
        200,
        "Mailgun Magnificent API",
        BLOCKED,
    ),
    refusal(
        "Postmark: 200, 405",
        "postmark",
        "``ErrorCode`` 405: out of credits.",
        200,
        {"ErrorCode": 405, "Message": "Not allowed to send."},
        BLOCKED,
    ),
    refusal(
        "Postmark: 200, 300",
        "postmark",
        "``ErrorCode`` 300: invalid From.",
        200,
        {"ErrorCode": 300, "Message": "Invalid 'From' address."},
        PERMANENT,
    ),
    refusal(
        "Postmark: 200, 406",
        "postmark",
        "``ErrorCode`` 406: inactive recipient.",
        200,
        {
            "ErrorCode": 406,
            "Message": "Found inactive addresses: to@example.com. Inactive recipients are ones that bounced.",
        },
        RECIPIENTS_REFUSED,
    ),
    refusal(
        "Postmark: 200, 406, reworded",
        "postmark",
        "The same in words that Anymail does not understand; it raises nothing.",
        200,
        {"ErrorCode": 406, "Message": "No active recipient."},
        NOBODY,
    ),
    refusal(
        "Postmark: batch, one refused",
        "postmark",
        "One message of a batch refused, the other taken: Anymail raises, and does not say which.",
        200,
        [
            {"ErrorCode": 0, "Message": "OK", "MessageID": "1", "To": "to@example.com"},
            {"ErrorCode": 405, "Message": "Not allowed to send."},
        ],
        NOT_UNDERSTOOD,
        message=batch,
        taken=True,
    ),
    refusal(
        "MailerSend: another warning",
        "mailersend",
        "Success with a warning that Anymail does not know; it raises.",
        202,
        {"message": "There are some warnings for your request.", "warnings": [{"type": "ANOTHER"}]},
        NOT_UNDERSTOOD,
        taken=True,
    ),
    refusal(
        "Mandrill: all rejected",
        "mandrill",
        "Every recipient ``rejected``.",
        200,
        [{"email": "to@example.com", "status": "rejected", "_id": "1", "reject_reason": "hard-bounce"}],
        RECIPIENTS_REFUSED,
    ),
    refusal(
        "SparkPost: all rejected",
        "sparkpost",
        "None accepted, all rejected.",
        200,
        {"results": {"total_rejected_recipients": 1, "total_accepted_recipients": 0, "id": "1"}},
        RECIPIENTS_REFUSED,
    ),
    refusal(
        "MailerSend: all suppressed",
        "mailersend",
        "``ALL_SUPPRESSED``.",
        202,
        {
            "message": "There are some warnings for your request.",
            "warnings": [
                {
                    "type": "ALL_SUPPRESSED",
                    "warning": "All of the recipients have been suppressed.",
                    "recipients": [{"email": "to@example.com", "name": "", "reasons": ["hard_bounced"]}],
                }
            ],
        },
        RECIPIENTS_REFUSED,
    ),
    refusal(
        "Unisender Go: all unavailable",
        "unisender_go",
        "Every recipient ``permanent_unavailable``.",
        200,
        {
            "status": "success",
            "job_id": "1",
            "emails": [],
            "failed_emails": {"to@example.com": "permanent_unavailable"},
        },
        RECIPIENTS_REFUSED,
    ),
    refusal(
        "Unisender Go: all temporarily unavailable",
        "unisender_go",
        "Every recipient ``temporary_unavailable``; Anymail raises nothing.",
        200,
        {
            "status": "success",
            "job_id": "1",
            "emails": [],
            "failed_emails": {"to@example.com": "temporary_unavailable"},
        },
        replace(REFUSED, tries=1, waits=NONE, caller=WARNED, error=None),
    ),
    refusal(
        "Mailtrap: batch, all failed",
        "mailtrap",
        "Every message of a batch failed; Anymail raises nothing.",
        200,
        {"success": True, "responses": [{"success": False, "errors": ["'from' is required"]}] * 2},
        NOBODY,
        message=batch,
    ),
    refusal(
        "Mailtrap: batch, one failed",
        "mailtrap",
        "One message of a batch failed, the other was taken.",
        200,
        {
            "success": True,
            "responses": [
                {"success": False, "errors": ["'to' address is invalid"]},
                {"success": True, "message_ids": ["1"]},
            ],
        },
        DELIVERED,
        message=batch,
        taken=True,
    ),
    refusal(
        "Mailjet: 400, all failed",
        "mailjet",
        "Every message failed; Anymail raises nothing.",
        400,
        Status(400),
        NOBODY,
    ),
    refusal(
        "Mailjet: 400, failed at Mailjet's end",
        "mailjet",
        "Every message failed with a ``StatusCode`` of 500; Anymail raises nothing.",
        400,
        {"Messages": [{"Status": "error", "Errors": [{"StatusCode": 500, "ErrorMessage": "Internal error."}]}]},
        replace(REFUSED, tries=1, waits=NONE, caller=WARNED, error=None),
    ),
    refusal(
        "Mailjet: 400, partial success",
        "mailjet",
        "One message of a batch failed, the other was taken: never again.",
        400,
        {
            "Messages": [
                {"Status": "error", "Errors": [{"StatusCode": 400, "ErrorMessage": "An address is invalid."}]},
                {
                    "Status": "success",
                    "To": [{"Email": "other@example.com", "MessageUUID": "1", "MessageID": 1, "MessageHref": ""}],
                    "Cc": [],
                    "Bcc": [],
                },
            ]
        },
        DELIVERED,
        message=batch,
        taken=True,
    ),
    # ---
    Case(
        "302",
        MOVED,
        "Moved: not followed, for the POST would become a GET.",
        Rule(Redirect(302)),
        answers(302, PERMANENT),
    ),
    Case(
        "307",
        MOVED,
        "Moved: followed, for the POST stays one.",
        Rule(Redirect(307), times=1),
        replace(DELIVERED, tries=2, phases="aa"),
    ),
    Case(
        "idle connection closed",
        MOVED,
        "A kept-open connection is closed by the server before the next message.",
        "idle",
        replace(DELIVERED, requests=2),
    ),
)
