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

import requests
from requests.sessions import merge_setting


def follow_as_post(session: requests.Session) -> None:
    """Have a session follow the redirects 307 and 308 only.

    301 to 303 would turn the POST into a GET, whose 200 looks like success.
    """
    redirect_target = _own(session, "get_redirect_target")

    def get_redirect_target(resp: requests.Response) -> Any:
        return redirect_target(resp) if resp.status_code in (307, 308) else None

    session.get_redirect_target = get_redirect_target  # type: ignore[method-assign]  # requests' hook


def read_cheaply(session: requests.Session) -> None:
    """Have a session ask once per request whether the environment names proxies.

    requests asks four times, and decodes every variable each time; that is a twentieth of a send, and the answer is
    nearly always no. Where it is yes, requests does it all.
    """
    if type(session).merge_environment_settings is not requests.Session.merge_environment_settings:
        return
    as_requests = _own(session, "merge_environment_settings")
    owner = weakref.proxy(session)

    def merge_environment_settings(url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        if not owner.trust_env or has_proxies():
            return as_requests(url, proxies, stream, verify, cert)
        if verify is True or verify is None:
            verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or verify
        return {
            "proxies": merge_setting(proxies, owner.proxies),
            "stream": merge_setting(stream, owner.stream),
            "verify": merge_setting(verify, owner.verify),
            "cert": merge_setting(cert, owner.cert),
        }

    session.merge_environment_settings = merge_environment_settings  # type: ignore[method-assign]  # as above


def has_proxies() -> bool:
    """Whether the environment or the system may name proxies, or hosts to reach without one."""
    if urllib.request.getproxies is not urllib.request.getproxies_environment:
        return True  # macOS and Windows have settings of their own for that
    return b"_proxy" in b" ".join(os.environb).lower()


def _own(session: requests.Session, name: str) -> Any:
    """A method of a session's, or what somebody put in its place."""
    return vars(session).get(name) or partial(getattr(type(session), name), weakref.proxy(session))
