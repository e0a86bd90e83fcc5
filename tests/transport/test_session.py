"""What requests reads from the environment is obeyed as requests obeys it; and sessions leave no garbage."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import requests

from anymail_retry.transport.session import has_proxies, read_cheaply

from .mail import backend, send

if TYPE_CHECKING:
    from collections.abc import Callable

    from anymail_retry.testing import LocalEsp

URL = "https://api.example.com/send"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without whatever the machine has there."""
    for name in list(os.environ):
        if name.lower().endswith(("_proxy", "_ca_bundle")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"HTTPS_PROXY": "http://proxy:1"}, id="a proxy"),
        pytest.param({"https_proxy": "http://proxy:1"}, id="a proxy in lower case"),
        pytest.param({"Https_Proxy": "http://proxy:1"}, id="a proxy in any case"),
        pytest.param({"ALL_PROXY": "socks5://proxy:1"}, id="a proxy for all"),
        pytest.param({"HTTPS_PROXY": "http://proxy:1", "NO_PROXY": "example.com"}, id="not for this host"),
        pytest.param({"HTTPS_PROXY": "http://proxy:1", "NO_PROXY": "example.org"}, id="not for another host"),
        pytest.param({"REQUESTS_CA_BUNDLE": "/requests.pem"}, id="a CA bundle"),
        pytest.param({"CURL_CA_BUNDLE": "/curl.pem"}, id="curl's CA bundle"),
        pytest.param({"REQUESTS_CA_BUNDLE": "/requests.pem", "CURL_CA_BUNDLE": "/curl.pem"}, id="both"),
        pytest.param({"REQUESTS_CA_BUNDLE": ""}, id="an empty one"),
    ],
)
@pytest.mark.parametrize(
    ("own", "given"),
    [
        pytest.param({}, {}, id="nothing of the session's"),
        pytest.param({"proxies": {"https": "http://own:1"}, "verify": "/own.pem", "cert": "/own.crt"}, {}, id="own"),
        pytest.param({"verify": False}, {"proxies": {"https": "http://given:1"}, "cert": ("/c", "/k")}, id="given"),
        pytest.param({"proxies": {"https": None, "http": "http://own:1"}}, {"proxies": {"http": None}}, id="none"),
    ],
)
def test_is_merged_as_by_requests(
    environment: pytest.MonkeyPatch,
    variables: dict[str, str],
    own: dict[str, Any],
    given: dict[str, Any],
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    plain, cheap = requests.Session(), requests.Session()
    read_cheaply(cheap)
    for trust_env, verify in itertools.product([True, False], [None, True, False, "/ca.pem"]):
        merged = []
        for session in (plain, cheap):
            session.trust_env = trust_env
            vars(session).update(own)
            proxies = dict(given.get("proxies", {}))
            merged.append(session.merge_environment_settings(URL, proxies, None, verify, given.get("cert")))
        assert merged[0] == merged[1], (trust_env, verify)


def test_a_change_counts_from_the_next_request_on(environment: pytest.MonkeyPatch) -> None:
    session = requests.Session()
    read_cheaply(session)
    assert session.merge_environment_settings(URL, {}, None, None, None)["proxies"] == {}
    environment.setenv("HTTPS_PROXY", "http://proxy:1")
    assert session.merge_environment_settings(URL, {}, None, None, None)["proxies"]["https"] == "http://proxy:1"


def test_a_session_with_a_way_of_its_own_keeps_it() -> None:
    class Own(requests.Session):
        def merge_environment_settings(self, *args: Any) -> dict[str, Any]:
            return {"proxies": {"https": "http://own:1"}}

    session = Own()
    read_cheaply(session)
    assert session.merge_environment_settings(URL, {}, None, None, None) == {"proxies": {"https": "http://own:1"}}


def test_systems_with_proxy_settings_of_their_own_are_asked(
    environment: pytest.MonkeyPatch,
) -> None:
    assert not has_proxies()
    environment.setattr("urllib.request.getproxies", dict)  # as macOS and Windows have it
    assert has_proxies()


def test_a_back_end_for_one_message_goes_when_it_is_no_longer_used(local_esp: Callable[..., LocalEsp]) -> None:
    esp = local_esp("mandrill")
    send(backend(esp))
    gc.collect()
    gc.disable()
    try:
        sender = backend(esp)
        send(sender)
        gone = weakref.ref(sender), weakref.ref(sender.create_session())
        del sender
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()
