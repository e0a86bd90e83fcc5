"""How often to try again, for which failures, and how long to wait: a frozen value made from the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import conf
from ..conf import UNSET, Unset
from ..verdict import EspFacts


@dataclass(frozen=True)
class RetryPolicy:
    """The retry settings of one mailer.

    A value that the user sets means exactly what urllib3's ``Retry`` says it means. What is unset is decided by what
    is known of the ESP, and by whether this delivery has a live idempotency key. All times are seconds.
    """

    #: Retries of all kinds together; None: no limit but the others'.
    total: int | None = 3
    #: Retries of connections that never stood; None: bounded by ``total``.
    connect: int | None = None
    #: Retries after the request was sent and no answer came. Unset: none, or as many as ``total`` under a live key.
    read: int | Unset | None = UNSET
    #: Retries of answers in ``status_forcelist``; None: bounded by ``total``.
    status: int | None = None
    #: Retries of other errors. TLS errors after the request are among them, so more than 0 invites duplicates.
    other: int | None = 0
    #: Statuses to try again. Unset: those by which the ESP refuses, and the ambiguous ones under a live key.
    status_forcelist: frozenset[int] | Unset = UNSET
    backoff_factor: float = 0.5
    backoff_max: float = 10.0
    backoff_jitter: float = 0.5
    #: A longer ``Retry-After`` ends the call at once; the queue takes it as its not-before.
    retry_after_max: float = 10.0
    #: No attempt and no wait begins that would pass it; None: none. Unset: the back end decides.
    deadline: float | Unset | None = UNSET
    #: Per address, where Anymail's ``requests_timeout`` is one number.
    connect_timeout: float = 5.0

    @classmethod
    def from_settings(cls, esp_name: str | None = None, options: Mapping[str, Any] | None = None) -> RetryPolicy:
        """Read the policy of a back end.

        :raises ImproperlyConfigured: a setting has the wrong type; names it and the line to write.
        """

        def read(name: str) -> Any:
            return conf.get(name, esp_name=esp_name, options=options)

        return cls(
            total=read("TOTAL_RETRIES"),
            connect=read("CONNECT_RETRIES"),
            read=read("READ_RETRIES"),
            status=read("HTTP_STATUS_RETRIES"),
            other=read("OTHER_RETRIES"),
            status_forcelist=read("HTTP_STATUS_RETRYABLE"),
            backoff_factor=read("RETRY_BACKOFF_FACTOR"),
            backoff_max=read("RETRY_BACKOFF_MAX"),
            backoff_jitter=read("RETRY_BACKOFF_JITTER"),
            retry_after_max=read("RETRY_AFTER_MAX"),
            deadline=read("RETRY_DEADLINE"),
            connect_timeout=read("CONNECT_TIMEOUT"),
        )

    def statuses(self, facts: type[EspFacts] | EspFacts, *, key_is_live: bool) -> frozenset[int]:
        """The statuses to try again in one call."""
        if not isinstance(self.status_forcelist, Unset):
            return self.status_forcelist
        if key_is_live:
            return facts.refused_statuses | facts.ambiguous_statuses
        return facts.refused_statuses

    def reads(self, *, key_is_live: bool) -> int | bool | None:
        """How often to try again after a read error, as urllib3's ``read``.

        ``False``, as requests itself has it, and not 0: with 0 a read timeout would surface as a ConnectionError.
        """
        if isinstance(self.read, Unset):
            return None if key_is_live else False
        return self.read

    @property
    def waits_for_reads(self) -> bool:
        """Whether the user asked for retries after read errors, which a deadline of one timeout would never grant."""
        return not isinstance(self.read, Unset) and (self.read is None or self.read > 0)
