"""The example site's settings, with every wait shortened so that an outage fits into half a minute."""

from __future__ import annotations

import os

from demo_site.settings import *  # noqa: F403  # the whole site

EMAIL_RETRY_BACKOFF_FACTOR = 0.1
EMAIL_RETRY_BACKOFF_JITTER = 0.1
EMAIL_QUEUE_BACKOFF = 1
#: Anymail's own, 30 seconds unless set: how long the ESP may be silent.
ANYMAIL_REQUESTS_TIMEOUT = 2

# Each retry and each queued message is a line in the site's log: several hundred of them here.
_log = os.environ.get("OUTAGE_LOG")
_handler = {"class": "logging.FileHandler", "filename": _log} if _log else {"class": "logging.NullHandler"}
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "handlers": {"log": {"formatter": "line", **_handler}},
    "loggers": {"anymail_retry": {"handlers": ["log"], "level": "INFO", "propagate": False}},
}

ESP = os.environ.get("OUTAGE_ESP", "mandrill")
if ESP == "resend":
    _key, _url = os.environ["RESEND_API_KEY"], os.environ["RESEND_API_URL"]
    if "MAILERS" in globals():
        MAILERS = {
            "default": {
                "BACKEND": "anymail_retry.backends.RetryableResendEmailBackend",
                "OPTIONS": {"api_key": _key, "api_url": _url},
            }
        }
    else:
        EMAIL_BACKEND = "anymail_retry.backends.RetryableResendEmailBackend"
        ANYMAIL = {"RESEND_API_KEY": _key, "RESEND_API_URL": _url}
