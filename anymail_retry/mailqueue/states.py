"""The words in which a row says where it is in its life."""

from __future__ import annotations

from django.db import models


class State(models.TextChoices):
    """Where a message is. Its life ends in ``sent``, ``failed`` or ``cancelled``."""

    QUEUED = "queued"
    SENDING = "sending"
    DEFERRED = "deferred"
    HELD = "held"
    SENT = "sent"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: States of a row that waits for a worker.
WAITING = (State.QUEUED, State.DEFERRED)
#: States that end a row's life.
TERMINAL = (State.SENT, State.FAILED, State.CANCELLED)


class Priority(models.IntegerChoices):
    """Due mail of a higher priority is sent first."""

    HIGH = 1
    MEDIUM = 2
    LOW = 3


class Origin(models.TextChoices):
    """How a message came into the queue, which decides whether ``pre_send`` has still to fire."""

    #: A send that failed; the message is as ``pre_send`` left it.
    FALLBACK = "fallback"
    #: Stored first; the message is as the caller made it.
    QUEUED = "queued"


class OnAmbiguous(models.TextChoices):
    """What happens to a message that the ESP may have taken, where no idempotency key protects it."""

    RESEND = "resend"
    HOLD = "hold"
