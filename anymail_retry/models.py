"""The queue's tables. The row of a message is small and hot; its content, attachments and history live off it."""

from __future__ import annotations

from typing import ClassVar

from django.db import models

from .mailqueue.fields import UTCDateTimeField
from .mailqueue.states import OnAmbiguous, Origin, Priority, State


class MailerState(models.Model):
    """What the workers have to agree on about one mailer. Made when it is first needed."""

    alias = models.CharField(max_length=200, primary_key=True, help_text="MAILERS alias, or dotted path of a back end")
    #: NULL: running. The value is also the fence of the one probe that may end the pause.
    paused_until = UTCDateTimeField(null=True, blank=True)
    pause_reason = models.CharField(max_length=200, blank=True, default="")
    #: Length of the present pause, which the next one is derived from.
    pause_seconds = models.PositiveIntegerField(default=0)
    #: The message that caused the last pause. The probe is another one, if another is due.
    paused_by = models.BigIntegerField(null=True, blank=True)
    #: The first moment at which a send may begin, under a rate limit.
    next_slot = UTCDateTimeField(null=True, blank=True)

    class Meta:
        verbose_name = "mailer"

    def __str__(self) -> str:
        return f"{self.alias} (paused: {self.pause_reason})" if self.paused_until else self.alias


class QueuedMessage(models.Model):
    """One message on its way, or after it. Everything that claiming and settling touch, and nothing large."""

    mailer = models.CharField(max_length=200, help_text="MAILERS alias, or dotted path of a back end")
    priority = models.PositiveSmallIntegerField(choices=Priority.choices, default=Priority.MEDIUM)
    #: When a worker has to look at this row: the not-before (or, if sooner, the expiry) of a waiting one, the end of
    #: the lease of one that is being sent. NULL: no worker need look again (terminal, held).
    due_at = UTCDateTimeField(null=True, blank=True)
    state = models.CharField(max_length=10, choices=State.choices, default=State.QUEUED)
    #: Random per claim: whoever holds another value has lost the row.
    lease = models.BigIntegerField(null=True, blank=True)
    #: When the present (or last) lease was taken: if its worker died, the message may have been taken since then.
    claimed_at = UTCDateTimeField(null=True, blank=True)
    #: Counted at the claim, so that a message that kills its worker is counted too.
    attempt_count = models.PositiveIntegerField(default=0)
    #: The last so many claims ended without a result: their workers died, or lost the row.
    lost_count = models.PositiveSmallIntegerField(default=0)
    #: Bytes of payload and attachments: what a claim's memory is bounded by.
    size = models.PositiveIntegerField(default=0)
    attachment_count = models.PositiveIntegerField(default=0)

    origin = models.CharField(max_length=8, choices=Origin.choices)
    #: Sent by what this library told: by a handler of its log, or a receiver of its signals. Nothing more is told of
    #: it than stands here, or there would be no end.
    is_report = models.BooleanField(default=False)
    created_at = UTCDateTimeField()
    not_before = UTCDateTimeField(null=True, blank=True)
    expires_at = UTCDateTimeField(null=True, blank=True)
    ended_at = UTCDateTimeField(null=True, blank=True)
    #: Empty: as the mailer says.
    on_ambiguous = models.CharField(max_length=6, choices=OnAmbiguous.choices, blank=True, default="")

    #: Idempotency key; empty: the next claim makes one. Stored before the send that it is for.
    key = models.CharField("idempotency key", max_length=256, blank=True, default="")
    key_from_user = models.BooleanField(default=False)
    #: Since when the ESP may have the message, under whatever key; and since when it may know this one.
    maybe_taken_since = UTCDateTimeField(null=True, blank=True)
    key_used_since = UTCDateTimeField(null=True, blank=True)
    body_digest = models.CharField(max_length=64, null=True, blank=True)

    #: What the last attempt came to.
    verdict = models.CharField(max_length=10, blank=True, default="")
    reason = models.CharField(max_length=200, blank=True, default="")
    http_status = models.PositiveSmallIntegerField(null=True, blank=True)
    #: The ESP's own words.
    answer = models.CharField(max_length=500, blank=True, default="")

    #: For people to find the message by. Shortened, and never read back into a message. No subject where the content
    #: is encrypted.
    subject = models.CharField(max_length=200, blank=True, default="")
    recipients = models.CharField(max_length=200, blank=True, default="")

    objects: ClassVar[models.Manager[QueuedMessage]] = models.Manager()

    class Meta:
        verbose_name = "queued message"
        indexes: ClassVar = [
            # The only index of the engine, for claims and recovery alike. Each further one is paid for at every
            # claim and settle.
            models.Index(fields=["mailer", "priority", "due_at"], name="anymail_retry_claim"),
        ]

    def __str__(self) -> str:
        return f"{self.subject or '(no subject)'} to {self.recipients or '(nobody)'}: {self.state}"


class MessageContent(models.Model):
    """What is sent, without the attachments' bytes. Deleted when it was sent, unless ``EMAIL_QUEUE_KEEP_CONTENT``."""

    message = models.OneToOneField(QueuedMessage, on_delete=models.CASCADE, primary_key=True, related_name="content")
    #: Versioned JSON in ASCII, or where it is encrypted a token; text, because jsonb reorders keys and refuses NUL.
    payload = models.TextField()

    def __str__(self) -> str:
        return f"content of message {self.pk}"


class AttachmentBody(models.Model):
    """The bytes of one attachment: private to one message, or shareable by all that carry the same bytes.

    No unique key, no lock and no count stand between two transactions that store the same bytes: a caller's
    transaction never waits for another's. Age keeps sharing and deleting apart instead
    (:mod:`anymail_retry.mailqueue.bodies`).
    """

    #: SHA-256 (encrypted: HMAC-SHA256) in hex of a shareable body. NULL: private, and deleted with its message.
    digest = models.CharField(max_length=64, null=True, blank=True)
    created_at = UTCDateTimeField()
    data = models.BinaryField()  # the last column: what scans the others does not read it

    class Meta:
        verbose_name_plural = "attachment bodies"
        indexes: ClassVar = [models.Index(fields=["digest", "created_at"], name="anymail_retry_digest")]

    def __str__(self) -> str:
        return f"attachment body {self.pk}"


class MessageAttachment(models.Model):
    """Which bytes a message carries, and at which place."""

    message = models.ForeignKey(QueuedMessage, on_delete=models.CASCADE, related_name="attachments")
    # Without a constraint: PostgreSQL would check it at the caller's COMMIT, and fail that.
    body = models.ForeignKey(AttachmentBody, on_delete=models.DO_NOTHING, db_constraint=False, related_name="links")
    position = models.PositiveIntegerField()

    def __str__(self) -> str:
        return f"attachment {self.position} of message {self.message_id}"


class Attempt(models.Model):
    """One try of the worker to send a message."""

    # Without a constraint: a message that was deleted while it was being sent must not make its result unwritable.
    message = models.ForeignKey(QueuedMessage, on_delete=models.CASCADE, db_constraint=False, related_name="attempts")
    number = models.PositiveIntegerField()
    started_at = UTCDateTimeField()
    duration_ms = models.PositiveIntegerField(null=True)
    #: Empty: there was nothing to send.
    verdict = models.CharField(max_length=10, blank=True, default="")
    reason = models.CharField(max_length=200, blank=True, default="")
    http_status = models.PositiveSmallIntegerField(null=True)
    answer = models.CharField(max_length=500, blank=True, default="")
    #: Host and process id.
    worker = models.CharField(max_length=100, blank=True, default="")

    def __str__(self) -> str:
        return f"attempt {self.number} on message {self.message_id}: {self.verdict or 'nothing sent'}"
