"""Idempotency keys: the ESP's promise not to send the same delivery twice.

A key belongs to one *delivery*: one ``send()`` and the queue row that it may leave. It does not belong to the message
object, because one ``EmailMessage`` sent three times is three mails. Only a key that the user gave, as
``message.idempotency_key`` or in one of Anymail's own ways, stays with the message.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .exceptions import BodyChanged, InvalidIdempotencyKey

if TYPE_CHECKING:
    from .delivery import Delivery
    from .verdict import AnswerRule


@dataclass(frozen=True)
class IdempotencyKey:
    """Where and how an ESP takes an idempotency key; a class attribute of its back end.

    :param place: ``header``: a header of the HTTP request; ``body``: a field of the payload's data.
    :param name: the header's name, or the dotted path into ``payload.data``.
    :param window: seconds for which the ESP remembers a key.
    :param grammar: regular expression that a key matches in full.
    :param compares_body: the ESP refuses a known key with another body, so an equal body has to be sent again.
    :param duplicate: how the ESP says that it has this delivery already, where it does not replay its first answer.
    :param conflict: how the ESP says that this key came with another body before.
    """

    place: Literal["header", "body"]
    name: str
    window: float
    grammar: str
    compares_body: bool = False
    duplicate: AnswerRule | None = None
    conflict: AnswerRule | None = None

    def check(self, key: str) -> None:
        """Raise :exc:`~anymail_retry.exceptions.InvalidIdempotencyKey` for a key that the ESP would not take."""
        if not re.fullmatch(self.grammar, key):
            raise InvalidIdempotencyKey(f"idempotency_key {key!r} does not match {self.grammar!r}, this ESP's grammar")

    def given(self, payload: Any) -> str | None:
        """The key that is in the payload already: the user's, given in Anymail's own ways."""
        fields, name = self._fields(payload)
        return fields.get(name) if fields is not None else None

    def put(self, payload: Any, key: str) -> None:
        """Put the key into the payload."""
        fields, name = self._fields(payload, create=True)
        assert fields is not None  # create=True makes what is missing
        fields[name] = key

    def _fields(self, payload: Any, *, create: bool = False) -> tuple[dict[str, Any] | None, str]:
        if self.place == "header":
            return payload.headers, self.name
        *path, name = self.name.split(".")
        fields = payload.data
        for step in path:
            if create:
                fields = fields.setdefault(step, {})
            elif (fields := fields.get(step)) is None:
                return None, name
        return fields, name


def apply(spec: IdempotencyKey, payload: Any, message: Any, delivery: Delivery) -> None:
    """Put this delivery's key into the payload, and see to it that an ESP that compares bodies gets an equal one.

    :raises anymail_retry.exceptions.InvalidIdempotencyKey: the user's key is not in the ESP's grammar.
    """
    users = getattr(message, "idempotency_key", None)
    if users is None:
        users = spec.given(payload)
    if users is not None and str(users) != delivery.key:  # ours may stand there since an earlier request
        delivery.key, delivery.key_from_user = str(users), True  # a UUID or a number is as good
        delivery.key_used_since = None  # what was taken was not taken under this one, and its body says nothing
    spec.check(delivery.key)
    spec.put(payload, delivery.key)
    if spec.compares_body:
        _watch_body(payload, delivery)


def _watch_body(payload: Any, delivery: Delivery) -> None:
    """Have the payload compare its body with the delivery's first one, before the request is made."""
    serialize = payload.serialize_data  # destructive in Anymail, so it is wrapped rather than called twice

    def serialize_and_compare() -> Any:
        body = serialize()
        digest = hashlib.sha256(body if isinstance(body, bytes) else str(body).encode()).hexdigest()
        forms = (digest,) if delivery.digest_forms is None else delivery.digest_forms(digest)
        if delivery.key_used_since is not None and delivery.body_digest not in (None, *forms):
            raise BodyChanged(
                "The message now makes another body than the one that the ESP may have taken under this"
                " idempotency key. Not sent: the ESP would refuse it."
            )
        delivery.body_digest = forms[0]
        return body

    payload.serialize_data = serialize_and_compare
