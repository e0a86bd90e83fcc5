"""What is done otherwise by the sessions that Anymail makes.

A session lives for one ``send_mail()``. What is hung on it refers to it weakly, so that it goes when it is no longer
used, and not when the garbage collector next comes by.
"""

from __future__ import annotations

import os
import urllib.request
import weakref
from functools import partial
from typing import Any

import requests.utils
from requests.sessions import merge_setting


def follow_as_post(session: requests.Session) -> None:
    """Have a session follow the redirects 307 and 308 only.

    301 to 303 would turn the POST into a GET, whose 200 looks like success.
    """
    redirect_target = _own(session, "get_redirect_target")

    def get_redirect_target(resp: requests.Response) -> Any:
        return redirect_target(resp) if resp.status_code in (307, 308) else None

    session.get_redirect_target = get_redirect_target  # type: ignore[method-assign]  # requests' hook


def read_environment_once(session: requests.Session) -> None:
    """Have a session look once for what the environment says of proxies, CA bundles and passwords (``.netrc``).

    requests looks at every request, four times for proxies and on disk for the passwords: a tenth of a send where many
    threads send at a time. Where proxies or a ``.netrc`` are found, requests does that part at every request as ever.
    """
    owner = weakref.proxy(session)
    if _is_requests_own(session, "prepare_request") and not has_netrc():
        session.prepare_request = partial(requests.Session.prepare_request, _WithoutNetrc(owner))  # type: ignore[method-assign,arg-type]  # requests' hook; as good as a session
    if _is_requests_own(session, "merge_environment_settings") and not has_proxies():
        ca_bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")

        def merge_environment_settings(url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
            if owner.trust_env and (verify is True or verify is None):
                verify = ca_bundle or verify
            return {
                "proxies": merge_setting(proxies, owner.proxies),
                "stream": merge_setting(stream, owner.stream),
                "verify": merge_setting(verify, owner.verify),
                "cert": merge_setting(cert, owner.cert),
            }

        session.merge_environment_settings = merge_environment_settings  # type: ignore[method-assign]  # as above


class _WithoutNetrc:
    """A session that has no netrc file to look into. Preparing a request needs to know of the environment only that."""

    trust_env = False

    def __init__(self, session: requests.Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def has_netrc() -> bool:
    """Whether there is a file in which requests would look for a host's password."""
    named = os.environ.get("NETRC")
    paths = [named] if named is not None else [f"~/{name}" for name in requests.utils.NETRC_FILES]
    return any(os.path.exists(os.path.expanduser(path)) for path in paths)


def has_proxies() -> bool:
    """Whether the environment or the system may name proxies, or hosts to reach without one."""
    if urllib.request.getproxies is not urllib.request.getproxies_environment:
        return True  # macOS and Windows have settings of their own for that
    return b"_proxy" in b" ".join(os.environb).lower()


def _is_requests_own(session: requests.Session, name: str) -> bool:
    """Whether neither a subclass nor anybody else has put something in the place of a method of requests'."""
    return getattr(getattr(session, name), "__func__", None) is getattr(requests.Session, name)


def _own(session: requests.Session, name: str) -> Any:
    """A method of a session's, or what somebody put in its place."""
    return vars(session).get(name) or partial(getattr(type(session), name), weakref.proxy(session))
