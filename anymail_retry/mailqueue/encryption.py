"""Encryption at rest: a message's payload and the bytes of its attachments, by ``EMAIL_QUEUE_ENCRYPTION_KEYS``.

The tokens are those of Fernet (``cryptography``): AES-128-CBC under an HMAC-SHA256. A payload is stored as the text
of its token, told from JSON by how it begins; an attachment as the token's bytes, a quarter shorter. Whether a
message's attachments are encrypted, and under which key, its payload tells: both are always written together, and a
body is shared only by messages that were encrypted under the same key.

Digests are HMACs, by keys derived from these: a plain SHA-256 would let whoever reads the database try out every
one-time code that there is.
"""

from __future__ import annotations

import base64
import functools
import hmac
from collections.abc import Iterable, Sequence

from django.core.exceptions import ImproperlyConfigured

from .. import conf
from ..exceptions import PayloadError

#: Stands in a row's subject, which may hold a one-time code.
SUBJECT = "(encrypted)"

#: What every token begins with: the version, and the first bytes of the time, until the year 2106.
_TOKEN = "gAAAA"  # noqa: S105  # no password

#: Bytes of a token beside what is encrypted: version, time, initialisation vector and HMAC.
_OVERHEAD = 1 + 8 + 16 + 32
_BLOCK = 16


class CannotDecrypt(PayloadError):
    """No key fits, or the content was damaged. Its row is held, and its content kept."""

    def __init__(self) -> None:
        super().__init__("no key in EMAIL_QUEUE_ENCRYPTION_KEYS fits")


class Cipher:
    """Encrypts under the first of some keys, and decrypts under any. Its ``repr`` has none of them.

    :param keys: Fernet keys, at least one.
    :raises ImproperlyConfigured: ``cryptography`` is not installed; says what to run.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        try:
            from cryptography.fernet import Fernet, InvalidToken, MultiFernet
        except ImportError:
            raise ImproperlyConfigured(
                "EMAIL_QUEUE_ENCRYPTION_KEYS is set, but the package cryptography is not installed."
                ' Run: pip install "django-anymail-retry[encryption]"'
            ) from None
        fernets = [Fernet(key) for key in keys]
        self._first = fernets[0]
        self._any = MultiFernet(fernets)
        self._invalid = InvalidToken
        secrets = [base64.urlsafe_b64decode(key) for key in keys]
        self._attachment_key = _derived(secrets[0], b"attachment")
        self._request_keys = [_derived(secret, b"request") for secret in secrets]

    def encrypt_text(self, text: str) -> str:
        return self._first.encrypt(text.encode()).decode("ascii")

    def decrypt_text(self, token: str) -> str:
        """:raises CannotDecrypt: no key fits."""
        return self._decrypt(token.encode()).decode()

    def encrypt(self, data: bytes) -> bytes:
        return base64.urlsafe_b64decode(self._first.encrypt(data))

    def decrypt(self, data: bytes) -> bytes:
        """:raises CannotDecrypt: no key fits."""
        return self._decrypt(base64.urlsafe_b64encode(data))

    def _decrypt(self, token: bytes) -> bytes:
        try:
            return self._any.decrypt(token)
        except self._invalid:
            raise CannotDecrypt from None

    def is_under_first_key(self, token: str) -> bool:
        try:
            self._first.decrypt(token.encode())
        except self._invalid:
            return False
        return True

    def attachment_digest(self, data: bytes) -> str:
        """By which messages under the same first key find bytes that they share."""
        return _hmac(self._attachment_key, data)

    def request_digests(self, sha256: str) -> tuple[str, ...]:
        """What the SHA-256 of a request body may look like in a row: under the first key (as it is stored now), under
        the others, and plain."""
        return (*(_hmac(key, sha256.encode()) for key in self._request_keys), sha256)


def cipher() -> Cipher | None:
    """The cipher of ``EMAIL_QUEUE_ENCRYPTION_KEYS``; None: nothing is encrypted.

    :raises ImproperlyConfigured: a key is none, or ``cryptography`` is not installed.
    """
    keys: tuple[str, ...] = conf.get("QUEUE_ENCRYPTION_KEYS")
    return _cipher(keys) if keys else None


@functools.lru_cache(maxsize=8)
def _cipher(keys: tuple[str, ...]) -> Cipher:
    return Cipher(keys)


def stored_size(payload: str, bodies: Iterable[bytes], cipher: Cipher | None) -> int:
    """Bytes of a message in the database, from its payload as it is stored and its bytes before they are encrypted."""
    sizes = map(len, bodies)
    return len(payload) + sum(sizes if cipher is None else (_OVERHEAD + (n // _BLOCK + 1) * _BLOCK for n in sizes))


def is_encrypted(payload: str) -> bool:
    return payload.startswith(_TOKEN)


def decrypted(cipher: Cipher | None, payload: str, bodies: Sequence[bytes]) -> tuple[str, Sequence[bytes]]:
    """A payload and its bodies as they were before they were encrypted, if they were.

    :raises CannotDecrypt: no key fits.
    """
    if not is_encrypted(payload):
        return payload, bodies
    if cipher is None:
        raise CannotDecrypt
    return cipher.decrypt_text(payload), [cipher.decrypt(body) for body in bodies]


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return hmac.digest(secret, b"anymail_retry " + purpose, "sha256")


def _hmac(key: bytes, data: bytes) -> str:
    return hmac.digest(key, data, "sha256").hex()
