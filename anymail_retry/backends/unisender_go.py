"""Unisender Go (UniOne), with retries and the fallback queue."""

from __future__ import annotations

import anymail.backends.unisender_go

from ..idempotency import IdempotencyKey
from ..mailqueue.fallback import FallbackQueueMixin
from ..transport.mixins import RetryMixin
from ..verdict import AnswerRule, Verdict


class EmailBackend(FallbackQueueMixin, RetryMixin, anymail.backends.unisender_go.EmailBackend):
    """Anymail's Unisender Go back end with retries, idempotency keys and the fallback queue.

    The key is remembered for a minute only, so that it protects the tries of one call and hardly any later ones.
    """

    # Statuses and codes: https://godocs.unisender.ru/web-api-ref, https://docs.unione.io/en/web-api-ref (Web API 1.87,
    # read 2026-11).
    refused_statuses = frozenset({429})
    answers = (
        # 120: the sender's DKIM. 908: no owner of the project. Other 500s (150: unknown) leave it open.
        AnswerRule(Verdict.PERMANENT, status=500, path="code", values=frozenset({"120", "908"})),
        # 105, 106: the API or the user is switched off. 215, 1575: the user may not send.
        AnswerRule(Verdict.BLOCKED, path="code", values=frozenset({"105", "106", "215", "1575"}), reason="account"),
        # 901, 906: daily limit. 902: limit of the free tariff. 904: no funds. 905: limit of the plan.
        AnswerRule(Verdict.BLOCKED, path="code", values=frozenset({"901", "902", "904", "905", "906"}), reason="quota"),
        # Not one recipient that may be sent to; Anymail has no ``AnymailRecipientsRefused`` for it.
        AnswerRule(Verdict.PERMANENT, status=400, path="code", values=frozenset({"204"}), reason="recipients refused"),
    )
    # Anymail's "failed" is Unisender Go's "temporary_unavailable" (anymail/backends/unisender_go.py, 15.2).
    none_accepted = Verdict.REFUSED
    # "message.idempotence_key": Anymail's payload data is what goes under "message".
    idempotency = IdempotencyKey(
        place="body",
        name="idempotence_key",
        window=60,
        grammar=r".{1,64}",
        duplicate=AnswerRule(Verdict.DELIVERED, status=400, path="code", values=frozenset({"1573"})),
    )


RetryableUnisenderGoEmailBackend = EmailBackend
