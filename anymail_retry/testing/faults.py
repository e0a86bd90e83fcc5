"""What can go wrong on the way to an ESP, as values: a fault, and the rule that says when.

A fault is made of what :class:`~anymail_retry.testing.exchange.Exchange` offers; your own is a subclass of
:class:`Fault` with ``apply``. "Accepted" means: in the ledger.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from anymail_retry.testing.ledger import Request
from anymail_retry.testing.wire import HTML, Answer, json_answer

if TYPE_CHECKING:
    from anymail_retry.testing.esps import Provider
    from anymail_retry.testing.exchange import Exchange
    from anymail_retry.testing.server import Connection

#: What is sent where TLS or HTTP should be: neither a TLS record nor a status line.
GARBAGE = b"\x00garbage, not a record\x00" * 4


class Fault:
    """What happens to one request in place of (or beside) a healthy answer."""

    def apply(self, exchange: Exchange) -> None:
        """Do it. Returning without an answer closes the connection."""
        raise NotImplementedError

    def check(self, provider: Provider) -> None:
        """Raise ``ValueError`` where the ESP cannot fail so."""


class HandshakeFault(Fault):
    """What happens to a new connection before any request: always sure that nothing was accepted."""

    def apply(self, exchange: Exchange) -> None:
        raise TypeError(f"{self!r} happens to a connection, not to a request")

    def meet(self, connection: Connection) -> None:
        """Do it. The connection is closed after it."""
        raise NotImplementedError


# --- before the request ---


@dataclass(frozen=True)
class DropInHandshake(HandshakeFault):
    """The connection is accepted and, once the client has spoken, closed: with a FIN, or with a RST.

    Over plain HTTP, where there is no handshake, the first bytes of a request are what the client spoke.
    """

    reset: bool = False

    def meet(self, connection: Connection) -> None:
        connection.discard_input()
        if self.reset:
            connection.reset()


@dataclass(frozen=True)
class StallInHandshake(HandshakeFault):
    """The connection is accepted and nothing is ever said, until ``esp.release()`` closes it or the client leaves."""

    def meet(self, connection: Connection) -> None:
        connection.stall()


@dataclass(frozen=True)
class Refuse(Fault):
    """The ESP goes down as this request arrives: a RST for it, no kept-alive connection left, new ones refused.

    :param seconds: it listens again, on the same port, after so long; None: after ``esp.start_listening()``.
    :param accepted: it took the message before it went down.
    """

    seconds: float | None = None
    accepted: bool = False

    def apply(self, exchange: Exchange) -> None:
        if self.accepted:
            exchange.process()
        exchange.server.stop_listening()
        exchange.reset()
        if self.seconds is not None:
            exchange.sleep(self.seconds)
            exchange.server.start_listening()


# --- after the request, without an answer ---


@dataclass(frozen=True)
class ResetAfterRequest(Fault):
    """The request is read and not accepted; RST."""

    def apply(self, exchange: Exchange) -> None:
        exchange.reset()


@dataclass(frozen=True)
class AcceptThenDrop(Fault):
    """Accepted, and the connection is closed without an answer: with a FIN, or with a RST."""

    reset: bool = False

    def apply(self, exchange: Exchange) -> None:
        exchange.process()
        if self.reset:
            exchange.reset()


@dataclass(frozen=True)
class Stall(Fault):
    """Not accepted; silence until ``esp.release()`` closes the connection or the client leaves."""

    def apply(self, exchange: Exchange) -> None:
        exchange.stall()


@dataclass(frozen=True)
class AcceptThenStall(Fault):
    """Accepted; silence until the client leaves or ``esp.release()`` lets the answer go."""

    def apply(self, exchange: Exchange) -> None:
        answer = exchange.process()
        if exchange.stall():
            exchange.answer(answer)


@dataclass(frozen=True)
class TlsErrorAfterRequest(Fault):
    """Bytes that are no TLS record in place of the answer (over plain HTTP: that are no HTTP); then closed."""

    accepted: bool = False

    def apply(self, exchange: Exchange) -> None:
        if self.accepted:
            exchange.process()
        exchange.write_beneath_tls(GARBAGE)


# --- an answer, but not the wanted one ---


@dataclass(frozen=True)
class Status(Fault):
    """Another status than success.

    :param body: None: the ESP's own error for this status, an HTML page where it has none. Else bytes, text, or
        anything that goes into JSON.
    :param headers: replace headers of the same name.
    :param retry_after: the value of ``Retry-After``, sent as written: seconds, an HTTP date, or garbage.
    :param accepted: the message was taken all the same.
    :param kind: which of the ESP's own errors, where one status has several: ``"quota"`` of 429, ...
        (``Provider.errors``).
    :param uses_key: the idempotency key counts as used by this answer.
    """

    code: int
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    retry_after: float | str | None = None
    accepted: bool = False
    kind: str | None = None
    uses_key: bool = False

    def check(self, provider: Provider) -> None:
        provider.error(self.code, self.kind)

    def apply(self, exchange: Exchange) -> None:
        if self.accepted:
            exchange.process()
        else:
            exchange.delay()
        answer = self._answer(exchange)
        if self.uses_key:
            exchange.use_key(answer)
        exchange.answer(answer)

    def _answer(self, exchange: Exchange) -> Answer:
        if self.body is None:
            answer = exchange.error(self.code, self.kind)
        elif isinstance(self.body, bytes | str):
            body = self.body.encode() if isinstance(self.body, str) else self.body
            answer = Answer(self.code, body, {"Content-Type": HTML})
        else:
            answer = json_answer(self.code, self.body)
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return answer.with_headers(headers)


@dataclass(frozen=True)
class Redirect(Fault):
    """Not accepted; a redirect to ``location``, by default to the very same URL."""

    code: int = 302
    location: str | None = None

    def apply(self, exchange: Exchange) -> None:
        location = self.location or exchange.url
        exchange.answer(Answer(self.code, headers={"Location": location}))


@dataclass(frozen=True)
class Garbage200(Fault):
    """200 with a body that is not what the ESP answers; accepted unless said otherwise."""

    accepted: bool = True
    body: bytes = b"<html>OK</html>"

    def apply(self, exchange: Exchange) -> None:
        if self.accepted:
            exchange.process()
        exchange.answer(Answer(200, self.body, {"Content-Type": HTML}))


def _body_to_cut(exchange: Exchange, status: int | None, accepted: bool) -> Answer:
    answer = exchange.process() if accepted else exchange.error(status or 500)
    if status is not None and accepted:
        answer = Answer(status, answer.body, answer.headers)
    # An ESP that answers in headers alone (MailerSend, SendGrid) has no body to cut.
    return answer if len(answer.body) > 1 else Answer(answer.status, b"{    }", answer.headers)


@dataclass(frozen=True)
class HalfBody(Fault):
    """Status line, headers, half of the body that Content-Length promises; then closed.

    :param status: None: that of the healthy answer, or 500 where not accepted.
    """

    status: int | None = None
    accepted: bool = True

    def apply(self, exchange: Exchange) -> None:
        answer = _body_to_cut(exchange, self.status, self.accepted)
        exchange.answer_partly(answer, len(answer.body) // 2)


@dataclass(frozen=True)
class StallInBody(Fault):
    """As :class:`HalfBody`, but silence in place of the close; ``esp.release()`` lets the rest go."""

    status: int | None = None
    accepted: bool = True

    def apply(self, exchange: Exchange) -> None:
        answer = _body_to_cut(exchange, self.status, self.accepted)
        sent = len(answer.body) // 2
        exchange.answer_partly(answer, sent)
        if exchange.stall():
            exchange.write(answer.body[sent:])


# --- a healthy answer ---


@dataclass(frozen=True)
class Ok(Fault):
    """No fault: accepted and answered. Holds a place in a script."""

    def apply(self, exchange: Exchange) -> None:
        exchange.answer(exchange.process())


@dataclass(frozen=True)
class Latency(Fault):
    """A slow success: the request is in progress for so long, then accepted and answered.

    :param seconds: in addition to the ESP's own latency; None: until ``esp.release()``.
    """

    seconds: float | None = None

    def apply(self, exchange: Exchange) -> None:
        exchange.answer(exchange.process(latency=self.seconds))


@dataclass(frozen=True)
class CloseIdle(Fault):
    """A success, after which the connection is closed when it was idle for ``after`` seconds, unannounced.

    For the moment of your choice use ``esp.close_idle_connections()``.
    """

    after: float = 0.0

    def apply(self, exchange: Exchange) -> None:
        exchange.connection.idle_limit = self.after
        exchange.answer(exchange.process())


# --- when ---


@dataclass(frozen=True)
class Rule:
    """When a fault happens. All conditions given must hold; with none given, always.

    Counted are the requests (for a handshake fault: the connections) since the script was set that fulfil ``when``,
    ``contains`` and ``reused``, whether or not an earlier rule took them.

    :param nth: which of the counted, from 1: a number or several (``range(3, 6)``).
    :param every: each third, say, of the counted.
    :param probability: of each of the counted, by a generator seeded with ``seed``.
    :param times: at most so often.
    :param contains: text that is in the request body as sent.
    :param reused: only requests on a connection that carried one before (True), or none before (False).
    :param when: takes the :class:`~anymail_retry.testing.Request`. For a spawned ESP a function that can be imported.
    """

    fault: Fault
    nth: int | Collection[int] | None = None
    every: int | None = None
    probability: float | None = None
    seed: int = 0
    times: int | None = None
    contains: str | None = None
    reused: bool | None = None
    when: Callable[[Request], bool] | None = None

    _about_requests: ClassVar = ("contains", "reused", "when")

    def __post_init__(self) -> None:
        if isinstance(self.fault, HandshakeFault):
            for name in self._about_requests:
                if getattr(self, name) is not None:
                    raise ValueError(f"{self.fault!r} meets a connection; {name}= asks for a request")

    def counts(self, request: Request) -> bool:
        """Whether the request is one that this rule counts."""
        return (
            (self.contains is None or self.contains.encode() in request.body)
            and (self.reused is None or self.reused is request.reused)
            and (self.when is None or bool(self.when(request)))
        )


class Script:
    """Ordered rules and how far they are. Not thread-safe: its owner locks.

    The first rule that applies decides. A bare fault stands for ``Rule(fault, times=1)``, so faults in a row meet
    one request each.
    """

    def __init__(self, rules: Sequence[Rule | Fault] = ()) -> None:
        self._rules = [_Counting(rule if isinstance(rule, Rule) else Rule(rule, times=1)) for rule in rules]

    def check(self, provider: Provider) -> None:
        """Raise ``ValueError`` where the ESP cannot fail as the rules say."""
        for live in self._rules:
            live.rule.fault.check(provider)

    def for_connection(self) -> HandshakeFault | None:
        """The fault of a new connection."""
        fault = self._decide([live for live in self._rules if isinstance(live.rule.fault, HandshakeFault)])
        assert fault is None or isinstance(fault, HandshakeFault)
        return fault

    def for_request(self, request: Request) -> Fault | None:
        """The fault of this request."""
        return self._decide(
            [
                live
                for live in self._rules
                if not isinstance(live.rule.fault, HandshakeFault) and live.rule.counts(request)
            ]
        )

    @staticmethod
    def _decide(counting: list[_Counting]) -> Fault | None:
        # All of them count (and draw), so that what one rule does never moves another's numbers.
        due = [live for live in counting if live.count()]
        if not due:
            return None
        due[0].used += 1
        return due[0].rule.fault


class _Counting:
    """One rule at work."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.seen = 0
        self.used = 0
        self._random = random.Random(rule.seed)  # noqa: S311  # repeatable on purpose

    def count(self) -> bool:
        """Count one; whether the rule applies to it."""
        rule = self.rule
        self.seen += 1
        drawn = rule.probability is None or self._random.random() < rule.probability
        nth = (rule.nth,) if isinstance(rule.nth, int) else rule.nth
        return (
            drawn
            and (nth is None or self.seen in nth)
            and (rule.every is None or self.seen % rule.every == 0)
            and (rule.times is None or self.used < rule.times)
        )
