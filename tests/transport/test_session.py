"""What requests reads from the environment is obeyed as requests obeys it; and sessions leave no garbage."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import pytest
import requests

from anymail_retry.transport.session import has_netrc, has_proxies, read_environment_once

from .mail import backend, send

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
    read_environment_once(cheap)
    for trust_env, verify in itertools.product([True, False], [None, True, False, "/ca.pem"]):
        merged = []
        for session in (plain, cheap):
            session.trust_env = trust_env
            vars(session).update(own)
            proxies = dict(given.get("proxies", {}))
            merged.append(session.merge_environment_settings(URL, proxies, None, verify, given.get("cert")))
        assert merged[0] == merged[1], (trust_env, verify)


def test_a_change_counts_from_the_next_session_on(environment: pytest.MonkeyPatch) -> None:
    before = requests.Session()
    read_environment_once(before)
    environment.setenv("HTTPS_PROXY", "http://proxy:1")
    after = requests.Session()
    read_environment_once(after)
    assert before.merge_environment_settings(URL, {}, None, None, None)["proxies"] == {}
    assert after.merge_environment_settings(URL, {}, None, None, None)["proxies"]["https"] == "http://proxy:1"


@pytest.fixture
def home(environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home directory."""
    environment.delenv("NETRC", raising=False)
    environment.setenv("HOME", str(tmp_path))
    return tmp_path


PASSWORD = "machine api.example.com login me password secret"
HEADER = "Basic " + b64encode(b"me:secret").decode()


@pytest.mark.parametrize(
    ("file", "variable", "trust_env", "own", "header"),
    [
        pytest.param(None, None, True, None, None, id="no file"),
        pytest.param(".netrc", None, True, None, HEADER, id="a file"),
        pytest.param("_netrc", None, True, None, HEADER, id="by its other name"),
        pytest.param("secrets", "secrets", True, None, HEADER, id="by the variable"),
        pytest.param(".netrc", "elsewhere", True, None, None, id="the variable hides the file"),
        pytest.param(".netrc", None, False, None, None, id="not trusted"),
        pytest.param(None, None, True, ("user", "own"), "Basic dXNlcjpvd24=", id="the session's own"),
    ],
)
def test_passwords_are_found_as_by_requests(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str | None,
    variable: str | None,
    trust_env: bool,
    own: tuple[str, str] | None,
    header: str | None,
) -> None:
    if file is not None:
        (home / file).write_text(PASSWORD)
    if variable is not None:
        monkeypatch.setenv("NETRC", str(home / variable))
    plain, ours = requests.Session(), requests.Session()
    read_environment_once(ours)
    for session in (plain, ours):
        session.trust_env, session.auth = trust_env, own
        assert session.prepare_request(requests.Request("POST", URL)).headers.get("Authorization") == header
        assert session.trust_env is trust_env


def test_threads_that_share_a_session_do_not_disturb_one_another(home: Path) -> None:
    session, seen = requests.Session(), []
    read_environment_once(session)

    def look(request: requests.PreparedRequest) -> requests.PreparedRequest:
        seen.append(session.trust_env)  # as another thread would find it, in the middle of this one's request
        return request

    session.prepare_request(requests.Request("POST", URL, auth=look))
    assert seen == [True]


def test_passwords_are_looked_for_once_per_session(home: Path) -> None:
    assert not has_netrc()
    session = requests.Session()
    read_environment_once(session)
    (home / ".netrc").write_text(PASSWORD)
    assert has_netrc()
    assert "Authorization" not in session.prepare_request(requests.Request("POST", URL)).headers


def test_a_session_with_a_way_of_its_own_keeps_it() -> None:
    class Own(requests.Session):
        def merge_environment_settings(self, *args: Any) -> dict[str, Any]:
            return {"proxies": {"https": "http://own:1"}}

        def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
            assert self.trust_env
            return super().prepare_request(request)

    session = Own()
    read_environment_once(session)
    assert session.merge_environment_settings(URL, {}, None, None, None) == {"proxies": {"https": "http://own:1"}}
    session.prepare_request(requests.Request("POST", URL))


def test_what_somebody_hung_on_a_session_stays() -> None:
    session = requests.Session()
    own: dict[str, Any] = {"prepare_request": lambda request: None, "merge_environment_settings": lambda *args: {}}
    vars(session).update(own)
    read_environment_once(session)
    assert {name: vars(session)[name] for name in own} == own


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
