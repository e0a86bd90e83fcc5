"""Every dotted path that a user may write in ``EMAIL_BACKEND`` or ``MAILERS``.

``Retryable<ESP>EmailBackend`` is found here by name, and its module imported only then (Amazon SES needs boto3).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: The modules that hold a back end, by the name of its class.
BACKENDS = {
    "RetryableAmazonSESEmailBackend": "amazon_ses",
    "RetryableBrevoEmailBackend": "brevo",
    "RetryableMailerSendEmailBackend": "mailersend",
    "RetryableMailgunEmailBackend": "mailgun",
    "RetryableMailjetEmailBackend": "mailjet",
    "RetryableMailtrapEmailBackend": "mailtrap",
    "RetryableMandrillEmailBackend": "mandrill",
    "RetryablePostalEmailBackend": "postal",
    "RetryablePostmarkEmailBackend": "postmark",
    "RetryableResendEmailBackend": "resend",
    "RetryableScalewayEmailBackend": "scaleway",
    "RetryableSendGridEmailBackend": "sendgrid",
    "RetryableSparkPostEmailBackend": "sparkpost",
    "RetryableUnisenderGoEmailBackend": "unisender_go",
}

__all__ = [*BACKENDS]  # noqa: PLE0604  # the names are strings, which ruff cannot see through the unpacking


def __getattr__(name: str) -> Any:
    try:
        module = BACKENDS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *BACKENDS})
