"""What a failed send means: five verdicts, decided from facts by pure functions.

Two outcomes (ok, error) are not enough: whoever has only two either loses mail or sends it twice. What matters about
a failure is whether the ESP may have taken the message, and whether trying again can help:

=============  ================================  ==========================  =======================================
verdict        meaning                           HTTP retry in the call      after that
=============  ================================  ==========================  =======================================
``DELIVERED``  the ESP took it                   no                          done
``REFUSED``    surely not taken, may work later  yes                         queued
``AMBIGUOUS``  may have been taken               only under a live           queued, by the ``on_ambiguous`` policy
                                                 idempotency key
``BLOCKED``    the account's trouble             no                          queued; the mailer pauses
``PERMANENT``  this message can never go         no                          raised; in the worker: failed
=============  ================================  ==========================  =======================================

Nothing here does I/O, reads a setting or keeps state.
"""

from __future__ import annotations

import enum
import json
import socket
import ssl
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, ClassVar

import requests
import urllib3.exceptions
from anymail.exceptions import (
    AnymailError,
    AnymailInvalidAddress,
    AnymailRecipientsRefused,
    AnymailSerializationError,
    AnymailUnsupportedFeature,
)
from django.core.exceptions import ImproperlyConfigured
from urllib3.util.ssl_match_hostname import CertificateError

from .exceptions import BodyChanged, CircuitOpen, InvalidIdempotencyKey

if TYPE_CHECKING:
    from .idempotency import IdempotencyKey

#: How much of an answer is kept and logged, in characters.
ANSWER_LENGTH = 500


#: The reason of an :class:`AnswerRule` for "another request under this key is being worked on".
IN_PROGRESS = "in progress"


class Verdict(str, enum.Enum):
    """What one attempt, or a whole delivery, came to. See the module's table."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    AMBIGUOUS = "ambiguous"
    BLOCKED = "blocked"
    PERMANENT = "permanent"

    def __str__(self) -> str:
        return self.value


class Phase(str, enum.Enum):
    """How far an attempt came, which decides whether the ESP may have seen the request."""

    #: The connection never stood: DNS, refused, connect timeout, TLS handshake. Nothing was sent.
    CONNECT = "connect"
    #: The server's certificate was not trusted. Nothing was sent, and trying again does not help.
    CERTIFICATE = "certificate"
    #: The request was (or may have been) sent, and no status line came back.
    SENT = "sent"
    #: A status line came back.
    ANSWERED = "answered"


PHASE_VERDICT = {
    Phase.CONNECT: Verdict.REFUSED,
    Phase.CERTIFICATE: Verdict.BLOCKED,
    Phase.SENT: Verdict.AMBIGUOUS,
}


@dataclass(frozen=True)
class Attempt:
    """One try on the wire, as it stands in ``message.retry_history`` and in the queue's attempts."""

    phase: Phase
    verdict: Verdict
    status: int | None = None
    #: Name of the error's class, where no status line came back.
    error: str = ""
    #: Seconds that the ESP asked to wait, by its ``Retry-After``.
    retry_after: float | None = None
    #: Seconds waited after this attempt, before the next one.
    waited: float | None = None


@dataclass(frozen=True)
class Answer:
    """An ESP's HTTP answer: its status line and as much of the body as could be read."""

    status: int
    body: bytes = b""
    encoding: str = "utf-8"
    #: What the status line says behind the number; some errors say it nowhere else.
    phrase: str = ""

    @classmethod
    def of(cls, response: Any) -> Answer | None:
        """The answer in a ``requests.Response`` (or a test double that stands for one), or in what boto3 makes of one;
        None for anything else."""
        if isinstance(response, Mapping):
            return cls._of_boto3(response)
        status = getattr(response, "status_code", None)
        if not isinstance(status, int):
            return None
        try:
            body = response.content
        except (requests.RequestException, RuntimeError, AttributeError):
            body = b""  # the body broke; the status line still counts
        phrase = getattr(response, "reason", None)
        return cls(
            status,
            body if isinstance(body, bytes) else b"",
            getattr(response, "encoding", None) or "utf-8",
            phrase if isinstance(phrase, str) else "",
        )

    @classmethod
    def _of_boto3(cls, parsed: Mapping[str, Any]) -> Answer | None:
        metadata = parsed.get("ResponseMetadata")
        status = metadata.get("HTTPStatusCode") if isinstance(metadata, Mapping) else None
        if not isinstance(status, int):
            return None
        content = {name: value for name, value in parsed.items() if name != "ResponseMetadata"}
        return cls(status, json.dumps(content, default=str).encode())

    @property
    def is_2xx(self) -> bool:
        return 200 <= self.status < 300

    @cached_property
    def text(self) -> str:
        try:
            return self.body.decode(self.encoding, "replace")
        except (LookupError, UnicodeError):  # a charset that Python does not know, or one that ignores "replace"
            return self.body.decode("utf-8", "replace")

    @cached_property
    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def words(self) -> str:
        return self.text or self.phrase

    def find(self, path: str) -> list[Any]:
        """The values at a dotted path into the JSON body (``errors.0.code``, ``*.ErrorCode``).

        ``*`` stands for each item of a list or an object. What is not there is None.
        """
        found = [self.json]
        for step in path.split("."):
            found = [item for value in found for item in _items(value, step)]
        return found


def _items(value: Any, step: str) -> list[Any]:
    if step == "*":
        if isinstance(value, dict):
            return list(value.values())
        return value if isinstance(value, list) else [None]
    if isinstance(value, dict):
        return [value.get(step)]
    if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
        return [value[int(step)]]
    return [None]


@dataclass(frozen=True)
class AnswerRule:
    """One thing that an ESP is known to answer, recognised by status and body.

    A rule matches when every condition that it states holds; of a path with ``*``, when it holds for every item and
    there is one.

    :param status: the HTTP status; None for any.
    :param path: dotted path into the JSON body, as of :meth:`Answer.find`.
    :param values: what stands at the path, compared as text; empty: anything but nothing, false or zero.
    :param unless: matches only when something stands at the path, and is *not* one of these.
    :param text: contained in the body or in the status line's phrase, in any case.
    :param reason: a short code for the row and the log.
    """

    verdict: Verdict
    status: int | None = None
    path: str = ""
    values: frozenset[str] = frozenset()
    unless: frozenset[str] = frozenset()
    text: str = ""
    reason: str = ""

    def matches(self, answer: Answer) -> bool:
        if self.status is not None and answer.status != self.status:
            return False
        if self.text and self.text.lower() not in f"{answer.phrase}\n{answer.text}".lower():
            return False
        if not self.path:
            return True
        found = answer.find(self.path)
        return bool(found) and all(map(self._accepts, found))

    def _accepts(self, value: Any) -> bool:
        if self.values:
            return str(value) in self.values
        if self.unless:
            return value is not None and str(value) not in self.unless
        return bool(value)


#: requests' complaints about the URL or the headers of a request, which Anymail wraps as API errors.
REQUEST_ERRORS = (
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidHeader,
    requests.exceptions.InvalidProxyURL,
)


class EspFacts:
    """What is known of one ESP, as class attributes of its back end; these are the defaults for an unknown one.

    Code, system checks, the table in the docs and the tests read these same attributes.
    """

    #: Statuses by which the ESP says that it did not take the message, and that it may work later.
    refused_statuses: ClassVar[frozenset[int]] = frozenset({429})
    #: Statuses that leave open whether the message was taken.
    ambiguous_statuses: ClassVar[frozenset[int]] = frozenset(
        {408, 500, 502, 503, 504, 520, 521, 522, 523, 524, 525, 526, 527}
    )
    #: Statuses that speak of the account, not of the message.
    blocked_statuses: ClassVar[frozenset[int]] = frozenset({401, 402})
    #: Answers whose body decides, before any status does; the first that matches counts. One for a 2xx says that
    #: this 2xx is a refusal.
    answers: ClassVar[tuple[AnswerRule, ...]] = ()
    #: What it means when the ESP answered, no recipient was accepted, and Anymail raises nothing. AMBIGUOUS: that
    #: "failed" is Anymail's guess at an answer that it did not understand.
    none_accepted: ClassVar[Verdict] = Verdict.PERMANENT
    #: Errors of the ESP's client library that end a send before it began, and that time may cure.
    refused_errors: ClassVar[tuple[type[Exception], ...]] = ()
    #: Errors of the ESP's client library that say that it is not set up: never queued, always raised.
    configuration_errors: ClassVar[tuple[type[Exception], ...]] = REQUEST_ERRORS
    #: Where the ESP takes an idempotency key; None: nowhere.
    idempotency: ClassVar[IdempotencyKey | None] = None
    #: Seconds that a kept-open connection may idle; None: ``EMAIL_CONNECTION_MAX_IDLE`` alone decides.
    connection_max_idle: ClassVar[float | None] = None


@dataclass(frozen=True)
class Outcome:
    """What a delivery came to, for whoever must decide what happens next."""

    #: None: nothing was to be sent (cancelled by a ``pre_send`` receiver, or no recipients).
    verdict: Verdict | None
    #: A short code for the row and the log: ``accepted?``, ``key conflict``, ``cancelled``, ``configuration``, ...
    reason: str = ""
    #: Only a person can decide; never send it again by itself.
    hold: bool = False
    #: What the direct path raises.
    error: Exception | None = None
    http_status: int | None = None
    #: The ESP's own words, at most :data:`ANSWER_LENGTH` characters.
    answer: str = ""
    #: Seconds that the ESP asked to wait.
    retry_after: float | None = None
    attempts: tuple[Attempt, ...] = ()
    #: False: anticipated nowhere, so never queued and never swallowed (configuration and programming errors).
    anticipated: bool = True

    @property
    def may_be_queued(self) -> bool:
        """Whether sending this message later can help, and can be decided without a person."""
        return (
            self.anticipated and not self.hold and self.verdict in (Verdict.REFUSED, Verdict.AMBIGUOUS, Verdict.BLOCKED)
        )


# --- one attempt -------------------------------------------------------------------------------------------------


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and everything that it wraps, outermost first.

    requests and urllib3 wrap by argument as well as by cause: ``ConnectionError(MaxRetryError(reason=...))``; botocore
    by keyword: ``EndpointConnectionError(error=...)``.
    """
    seen: set[int] = set()
    pending = [error]
    while pending:
        error = pending.pop(0)
        if not isinstance(error, BaseException) or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        keywords = getattr(error, "kwargs", None)
        pending += [
            getattr(error, "reason", None),
            getattr(error, "original_error", None),
            keywords.get("error") if isinstance(keywords, dict) else None,
            *error.args[:2],
            error.__cause__,
        ]


#: Why there is no answer.
PHASE_REASON = {
    Phase.CONNECT: "no connection",
    Phase.CERTIFICATE: "certificate not trusted",
    Phase.SENT: "no answer",
}

#: What can only happen before the connection stands. Everything that our connection class meets before its connect()
#: returns arrives as one of these. Of urllib3's ProxyError see :func:`_is_a_drop`.
CONNECT_ERRORS = (
    urllib3.exceptions.ConnectTimeoutError,
    urllib3.exceptions.NameResolutionError,
    urllib3.exceptions.ProxyError,
    socket.gaierror,
)


#: A certificate that is not trusted, or another host's. urllib3 compares the names itself where Python's ssl cannot
#: (LibreSSL, PyOpenSSL), and raises a ValueError of its own.
CERTIFICATE_ERRORS = (ssl.SSLCertVerificationError, CertificateError)


def _is_a_drop(error: BaseException) -> bool:
    """Whether this is urllib3's ProxyError for a connection that was dropped, perhaps after the request.

    http.client's ``getresponse()`` closes such a connection, and urllib3 (2.x) then takes it for one that never reached
    its proxy. A proxy that cannot be reached is a ``NewConnectionError`` in there, one that opens no tunnel a bare
    ``OSError``; one that hangs up while it is asked to cannot be told from a drop.
    """
    if not isinstance(error, urllib3.exceptions.ProxyError):
        return False
    reason = error.original_error
    return isinstance(reason, ConnectionError) and not isinstance(reason, ConnectionRefusedError)


def phase_of(error: BaseException) -> Phase | None:
    """How far the attempt came that ended in this error; None if the error is not the network's."""
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, CERTIFICATE_ERRORS):
            return Phase.CERTIFICATE
    for cause in chain:
        if isinstance(cause, CONNECT_ERRORS) and not _is_a_drop(cause):
            return Phase.CONNECT
    for cause in chain:
        if isinstance(cause, urllib3.exceptions.HTTPError | HTTPException | OSError) and not isinstance(
            cause, requests.RequestException
        ):
            return Phase.SENT
    if isinstance(error, requests.ConnectTimeout):
        return Phase.CONNECT
    if isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError):
        return Phase.SENT
    return None


#: What goes wrong between two hosts, whichever library meets it.
NETWORK_ERRORS = (
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    ssl.SSLError,
    HTTPException,
    urllib3.exceptions.HTTPError,
    requests.ConnectionError,
    requests.Timeout,
)


#: OSErrors that tell of a mistake on this machine: a certificate file that is not there, a URL that is none.
MISTAKES = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, *REQUEST_ERRORS)


def is_of_the_system(error: BaseException) -> bool:
    """Whether an error of a library that is not known here tells of the network's trouble, or of this machine's, and
    not of a mistake."""
    if isinstance(error, OSError):
        return not isinstance(error, MISTAKES)
    chain = list(causes(error))
    return any(isinstance(cause, NETWORK_ERRORS) for cause in chain) and not any(
        isinstance(cause, ImproperlyConfigured) for cause in chain
    )


def judge_answer(answer: Answer, facts: type[EspFacts] | EspFacts) -> tuple[Verdict, str]:
    """The verdict on one answer by itself, and the reason where a rule of the ESP gave it.

    ``DELIVERED`` here means only that the status line says so: whether the ESP's parser agrees is
    :func:`judge_delivery`'s to ask.
    """
    for rule in facts.answers:
        if rule.matches(answer):
            return rule.verdict, rule.reason
    if answer.is_2xx:
        return Verdict.DELIVERED, ""
    if answer.status in facts.refused_statuses:
        return Verdict.REFUSED, ""
    if answer.status in facts.ambiguous_statuses or answer.status >= 500:
        return Verdict.AMBIGUOUS, ""
    if answer.status in facts.blocked_statuses:
        return Verdict.BLOCKED, ""
    return Verdict.PERMANENT, ""


# --- a whole delivery --------------------------------------------------------------------------------------------

#: Anymail's and our own refusals before and after the request: this message, as it is, can never go.
PERMANENT_ERRORS = (
    AnymailRecipientsRefused,
    AnymailInvalidAddress,
    AnymailUnsupportedFeature,
    AnymailSerializationError,
    InvalidIdempotencyKey,
)

#: Statuses by which Anymail says that one recipient will not get it.
NOT_ACCEPTED = frozenset({"invalid", "rejected", "failed"})


def judge_delivery(
    facts: type[EspFacts] | EspFacts,
    *,
    error: Exception | None,
    answer: Answer | None,
    statuses: Iterable[str | None] | None,
    attempts: tuple[Attempt, ...] = (),
    maybe_taken: bool = False,
    key_is_live: bool = False,
    key_from_user: bool = False,
    secrets: Collection[str] = (),
) -> Outcome:
    """What a delivery came to, from everything that happened to it under its present idempotency key.

    :param error: what sending raised, if it raised.
    :param answer: the last answer whose status line arrived.
    :param statuses: the recipients' statuses by the ESP's own parser; None if it did not get as far as that.
    :param attempts: every attempt of this call, in order.
    :param maybe_taken: an attempt of an earlier call, or one of these, was AMBIGUOUS.
    :param key_is_live: all those attempts were made inside the ESP's window for the key.
    :param key_from_user: the key is the user's own.
    :param secrets: what must not stand in the outcome.
    """
    retry_after = attempts[-1].retry_after if attempts else None

    def outcome(verdict: Verdict, reason: str = "", *, hold: bool = False, anticipated: bool = True) -> Outcome:
        return Outcome(
            verdict,
            reason,
            hold=hold,
            error=error,
            http_status=answer.status if answer else None,
            answer=excerpt(answer.words if answer else _words(error), secrets),
            retry_after=retry_after,
            attempts=attempts,
            anticipated=anticipated,
        )

    if answer is not None:
        key = facts.idempotency
        if key is not None and key.conflict is not None and key.conflict.matches(answer):
            # Proof that an earlier request under this key reached the ESP.
            if maybe_taken:
                return outcome(Verdict.AMBIGUOUS, "key conflict", hold=True)
            return outcome(Verdict.PERMANENT, "key conflict")
        if key is not None and key.duplicate is not None and key.duplicate.matches(answer):
            if maybe_taken or key_from_user:
                return outcome(Verdict.DELIVERED, "duplicate answer")
            # Every earlier attempt was surely refused: the key is used up, the message was not taken.
            return outcome(Verdict.REFUSED, "key used up")
        verdict, reason = judge_answer(answer, facts)
        known = frozenset(statuses or ())
        accepted = known - NOT_ACCEPTED
        if not answer.is_2xx:
            # Mailjet reports what it sent in a 4xx too; an "unknown" (Postmark, beside one invalid address) is no
            # acceptance there.
            accepted &= {"sent", "queued"}
        elif verdict is not Verdict.DELIVERED:
            accepted -= {"unknown"}  # nor here (Postmark, in words that Anymail does not understand)
        if accepted:
            return outcome(Verdict.DELIVERED)
        if verdict is Verdict.DELIVERED:
            refused = facts.none_accepted if "failed" in known else Verdict.PERMANENT
            if not known or refused is Verdict.AMBIGUOUS:
                return outcome(Verdict.AMBIGUOUS, "accepted?", hold=True)
            verdict = refused
        if known and not reason:
            reason = "no recipient accepted" if "failed" in known else "recipients refused"
        return with_the_past(outcome(verdict, reason), maybe_taken, key_is_live)

    if error is None:
        raise ValueError("a delivery without an answer and without an error has no verdict")
    chain = list(causes(error))
    if any(isinstance(cause, (ImproperlyConfigured, *facts.configuration_errors)) for cause in chain):
        return outcome(Verdict.BLOCKED, "configuration", anticipated=False)
    if isinstance(error, CircuitOpen):
        retry_after = error.retry_after
        return with_the_past(outcome(Verdict.REFUSED, "circuit open"), maybe_taken, key_is_live)
    if isinstance(error, BodyChanged):
        return outcome(Verdict.AMBIGUOUS, "body changed", hold=True)
    if isinstance(error, PERMANENT_ERRORS):
        return with_the_past(outcome(Verdict.PERMANENT, type(error).__name__), maybe_taken, key_is_live)
    if not isinstance(error, AnymailError):
        # Anymail wraps what the network does. A bare OSError is somebody else's: a receiver's, an attachment's file.
        return outcome(Verdict.PERMANENT, f"error: {type(error).__name__}", hold=True, anticipated=False)
    if any(isinstance(cause, facts.refused_errors) for cause in chain):
        return with_the_past(outcome(Verdict.REFUSED, "not sent"), maybe_taken, key_is_live)
    phase = phase_of(error)
    if phase is not None:
        return with_the_past(outcome(PHASE_VERDICT[phase], PHASE_REASON[phase]), maybe_taken, key_is_live)
    return outcome(Verdict.PERMANENT, type(error).__name__, hold=maybe_taken)


def with_the_past(outcome: Outcome, maybe_taken: bool, key_is_live: bool) -> Outcome:
    """Once an attempt was AMBIGUOUS, a later refusal does not undo it; only an answer under the same key does.

    :param maybe_taken: an earlier attempt was AMBIGUOUS.
    :param key_is_live: the key that it was made under is this one's, and live.
    """
    if not maybe_taken or not outcome.anticipated or outcome.verdict in (Verdict.DELIVERED, Verdict.AMBIGUOUS):
        return outcome
    fields = {**outcome.__dict__, "verdict": Verdict.AMBIGUOUS}
    if outcome.verdict is Verdict.PERMANENT:
        if key_is_live and outcome.http_status is not None:
            return outcome
        fields.update(hold=True, reason=f"maybe taken, then: {outcome.reason or outcome.http_status}")
    return Outcome(**fields)


def excerpt(text: str, secrets: Collection[str] = ()) -> str:
    """The beginning of a text, for a row or a log: an ESP may quote the key that it refuses."""
    for secret in secrets:  # before it is cut, or a part of one remains
        text = text.replace(secret, "***")
    return text[:ANSWER_LENGTH]


def _words(error: Exception | None) -> str:
    """What an error says, for a row or a log: never the text of Anymail's API errors, which may quote the request."""
    if error is None:
        return ""
    if isinstance(error, (*PERMANENT_ERRORS, BodyChanged, CircuitOpen)):
        return " ".join(map(str, error.args))
    inner = [cause for cause in causes(error) if not isinstance(cause, AnymailError)]
    return str(inner[-1]) if inner else type(error).__name__
