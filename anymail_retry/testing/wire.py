"""HTTP/1.1 messages by hand: small, since every request of a benchmark passes through here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple

JSON = "application/json"  # MailerSend's parser in Anymail wants it without a charset
HTML = "text/html; charset=utf-8"


class RawRequest(NamedTuple):
    """One request as read off the wire."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    head: bytes
    body: bytes


@dataclass(frozen=True)
class Answer:
    """One HTTP answer. The length of the body is declared when it is sent."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def with_headers(self, headers: Mapping[str, str]) -> Answer:
        """The same answer with more headers."""
        return dataclasses.replace(self, headers={**self.headers, **headers})

    def head(self, *, close: bool = False) -> bytes:
        """Status line and headers as sent, up to and with the blank line."""
        lines = [f"HTTP/1.1 {self.status} {reason(self.status)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += [f"Content-Length: {len(self.body)}"]
        if close:
            lines += ["Connection: close"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def reason(status: int) -> str:
    """The reason phrase; never empty, so that a status of no standard (SparkPost's 420, an edge's 520) has one."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Status"


def json_answer(status: int, value: Any, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(value).encode(), {"Content-Type": JSON, **(headers or {})})


def page(status: int) -> Answer:
    """The HTML page of a proxy or an edge in front of the ESP."""
    title = f"{status} {reason(status)}"
    html = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
    return Answer(status, html.encode(), {"Content-Type": HTML})


def parse_head(head: bytes) -> tuple[str, str, str, dict[str, str]]:
    """Method, path, version and headers; raises ``ValueError`` where it is no HTTP."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, version = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return method, path, version, headers
