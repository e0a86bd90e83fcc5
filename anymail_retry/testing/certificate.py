"""The certificate authority of this process: one, so that one CA bundle trusts every local ESP it starts."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import ssl
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Authority:
    """A certificate authority, in a form that another process can take over."""

    certificate: bytes
    private_key: bytes
    #: Path of the certificate as a PEM file; gone when the process that made it ends.
    file: str

    def server_context(self, host: str) -> ssl.SSLContext:
        """TLS for a server that is reached by this name or address, or by any of this machine's own."""
        identities = dict.fromkeys([host, "127.0.0.1", "::1", "localhost"])
        leaf = _trustme().CA.from_pem(self.certificate, self.private_key).issue_cert(*identities)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf.configure_cert(context)
        return context


def authority() -> Authority:
    """The authority of this process, made when first asked for; raises ``ImportError`` without trustme."""
    with _making:
        return _make()


_making = threading.Lock()  # or two threads would make one each


@functools.cache
def _make() -> Authority:
    ca = _trustme().CA(organization_name="anymail_retry.testing")
    folder = tempfile.mkdtemp(prefix="local-esp-")
    atexit.register(_remove, folder, os.getpid())
    file = Path(folder, "ca.pem")
    ca.cert_pem.write_to_path(str(file))
    return Authority(ca.cert_pem.bytes(), ca.private_key_pem.bytes(), str(file))


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves it to its parent
        shutil.rmtree(folder, ignore_errors=True)


def _trustme() -> ModuleType:
    try:
        import trustme
    except ImportError as error:
        raise ImportError(
            "A local ESP on HTTPS makes its certificate with trustme:"
            ' pip install "django-anymail-retry[testing]" (or start it with tls=False).'
        ) from error
    return trustme
