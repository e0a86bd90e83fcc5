"""Signals, all sent with ``sender`` = the back end's class or the queue's model.

None of them carries a secret; a receiver that raises is logged and changes nothing.
"""

from __future__ import annotations

from django.dispatch import Signal

#: A circuit breaker opened or closed. ``state``: a :class:`~anymail_retry.transport.breaker.BreakerState`.
breaker_changed = Signal()

#: A message was kept in the queue. Sent after the transaction it belongs to is committed. ``queued_message``: its row.
message_queued = Signal()

#: A queued message was accepted by the ESP. ``queued_message``, ``outcome``.
message_sent = Signal()

#: A queued message will be tried again. ``queued_message``, ``outcome``.
message_deferred = Signal()

#: A queued message waits for a person. ``queued_message``, ``outcome``.
message_held = Signal()

#: A message will not be delivered: failed for good in the queue (``queued_message`` is its row), or sent directly
#: and accepted for no recipient though nothing was raised (``message``). ``outcome`` in both cases; what does not
#: apply is None.
message_failed = Signal()
