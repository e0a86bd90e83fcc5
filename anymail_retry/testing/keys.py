"""Idempotency keys as the ESPs keep them."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from anymail_retry.testing.wire import Answer


@dataclass(frozen=True)
class KeyRules:
    """What one ESP does with a key it has seen before."""

    #: Seconds for which a key is remembered, from the acceptance on.
    window: float
    #: What a key must match as a whole.
    grammar: re.Pattern[str]
    #: The answer to a key that does not.
    invalid: Answer
    #: The answer while the first request under the key is not finished.
    in_progress: Answer
    #: The answer to the same key with another body; None: bodies are not compared.
    other_body: Answer | None = None
    #: The answer to a second request; None: the first answer is replayed.
    duplicate: Answer | None = None
    #: Added to a replayed answer.
    replay_headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Use:
    body: bytes
    answer: Answer | None = None  # None: in progress
    since: float = 0.0


class KeyStore:
    """The keys that one local ESP remembers. Not thread-safe: its owner locks."""

    def __init__(self, rules: KeyRules, clock: Callable[[], float]) -> None:
        self._rules = rules
        self._clock = clock
        self._uses: dict[Hashable, _Use] = {}

    def begin(self, owner: str | None, key: str, body: bytes) -> Answer | None:
        """The answer that the key decides, or None: go on, and :meth:`finish` or :meth:`forget` it.

        :param owner: the API key: two accounts do not share keys.
        :param body: a digest of the request body.
        """
        rules = self._rules
        if not rules.grammar.fullmatch(key):
            return rules.invalid
        use = self._uses.get((owner, key))
        if use is not None and use.answer is not None and self._clock() - use.since >= rules.window:
            use = None
        if use is None:
            self._uses[owner, key] = _Use(body)
            return None
        if use.body != body and rules.other_body is not None:
            return rules.other_body
        if use.answer is None:
            return rules.in_progress
        return rules.duplicate or use.answer.with_headers(rules.replay_headers)

    def finish(self, owner: str | None, key: str, answer: Answer) -> None:
        """Remember the answer from now on."""
        use = self._uses[owner, key]
        use.answer, use.since = answer, self._clock()

    def forget(self, owner: str | None, key: str) -> None:
        """The request came to nothing: its key is free again."""
        del self._uses[owner, key]
