"""The ``HTTPAdapter`` that is mounted on Anymail's sessions."""

from __future__ import annotations

import ssl
from dataclasses import replace
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import MaxRetryError, ReadTimeoutError, SSLError
from urllib3.response import BaseHTTPResponse

from ..delivery import Delivery, current_delivery
from ..verdict import Answer, EspFacts, causes
from . import pools
from .clock import SYSTEM_CLOCK, Clock
from .policy import RetryPolicy
from .retry import Call, retry_for
from .timeout import DeadlineTimeout


class RetryAdapter(HTTPAdapter):
    """Sends by a :class:`~anymail_retry.transport.policy.RetryPolicy`, over this process's shared connections.

    One per session, and it owns nothing, so closing it closes no connection.

    :param max_idle: seconds that a kept-open connection may idle; 0: connections are the adapter's own, and are closed
        with it, as requests has it.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        facts: type[EspFacts] | EspFacts = EspFacts,
        esp_name: str = "ESP",
        max_idle: float = 15.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.policy = policy
        self.facts = facts
        self.esp_name = esp_name
        self.max_idle = max_idle
        self.clock = clock
        super().__init__()

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        self._pool_connections, self._pool_maxsize, self._pool_block = pools.MAX_HOSTS, pools.MAX_SOCKETS, True
        self._own = pools.make(max_idle=float("inf")) if self.max_idle == 0 else None

    def close(self) -> None:
        if self._own is not None:
            self._own.close_idle()

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        delivery, facts = current_delivery(), self.facts
        if delivery is None or not delivery.is_posting:
            # Somebody else's request over this session: what becomes of it says nothing of the message, and it carries
            # no key by which the ESP would recognise it.
            delivery, facts = Delivery(), EspFacts
        delivery.answer = None
        policy = replace(self.policy, total=0) if delivery.is_probe else self.policy
        call = Call(delivery, policy, facts, self.esp_name, self.clock, delivery.ends_at)
        if isinstance(timeout, tuple) and len(timeout) == 2:
            timeout = DeadlineTimeout(*timeout, delivery.ends_at, self.clock)
        elif timeout is None or isinstance(timeout, int | float):
            connect = self.policy.connect_timeout
            if timeout is not None:
                connect = min(connect, timeout)
            timeout = DeadlineTimeout(connect, timeout, delivery.ends_at, self.clock)
        try:
            return self._send(call, request, stream, timeout, verify, cert, proxies)
        finally:
            call.end()

    def _send(
        self,
        call: Call,
        request: requests.PreparedRequest,
        stream: bool,
        timeout: Any,
        verify: Any,
        cert: Any,
        proxies: Any,
    ) -> requests.Response:
        try:
            response = _OneRequest(self, call).send(request, stream, timeout, verify, cert, proxies)
        except requests.ConnectionError as error:
            as_once = _as_if_tried_once(error)
            if as_once is error:
                raise
            raise as_once from error
        if stream:
            call.answered(response.raw, Answer(response.status_code), response.headers)
            return response
        # requests would read the body after the adapter returned, and an error there would hide that a status line
        # came: an accepted message would look like a read timeout.
        try:
            response.content  # noqa: B018  # reading it is the point
        except requests.RequestException as error:
            error.response = response
            raise
        finally:
            call.delivery.answer = Answer.of(response)
            if call.delivery.answer is not None:  # it is the network's, and not something that a test put in its place
                call.answered(response.raw, call.delivery.answer, response.headers)
        return response


class _OneRequest(HTTPAdapter):
    """requests' adapter for the length of one request: ``max_retries`` is per request, an adapter is not."""

    def __init__(self, adapter: RetryAdapter, call: Call) -> None:
        self._adapter = adapter
        self._call = call
        self._pools = adapter._own or pools.shared(adapter.max_idle)
        self.config = {}
        self.max_retries = retry_for(call)
        self.poolmanager = self._pools.manager
        self.proxy_manager = {}
        self._pool_connections, self._pool_maxsize, self._pool_block = pools.MAX_HOSTS, pools.MAX_SOCKETS, True

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        proxies = self._pools.proxies
        if proxy not in proxies:
            # Complete before another thread sees it, and made by one thread alone to remain.
            proxies.setdefault(proxy, self._pools.adopt(super().proxy_manager_for(proxy, **proxy_kwargs)))
        return proxies[proxy]

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> Any:
        # Of what is false requests has a pool of their own for False alone.
        return super().build_connection_pool_key_attributes(request, verify or False, cert)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        # The pool is for these alone, so it is enough to look once whether the files are there.
        if getattr(conn, "verifies_by", None) != (verify, cert):
            super().cert_verify(conn, url, verify, cert)
            conn.verifies_by = verify, cert

    def build_response(self, req: requests.PreparedRequest, resp: BaseHTTPResponse) -> requests.Response:
        response = super().build_response(req, self._call.readable(resp))
        response.connection = self._adapter
        return response


def _as_if_tried_once(error: requests.ConnectionError) -> requests.RequestException:
    """The exception of the class that a single attempt would have raised.

    After used-up retries requests raises its ConnectionError for nearly everything, so that a user's
    ``except requests.Timeout`` would no longer catch a read timeout.
    """
    exhausted = error.args[0] if error.args else None
    if type(error) is not requests.ConnectionError or not isinstance(exhausted, MaxRetryError):
        return error
    if isinstance(exhausted.reason, ReadTimeoutError):
        return requests.ReadTimeout(exhausted, request=error.request)
    if any(isinstance(cause, ssl.SSLError | SSLError) for cause in causes(exhausted.reason)):
        return requests.exceptions.SSLError(exhausted, request=error.request)
    return error
