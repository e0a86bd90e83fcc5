"""The messages that this site sends."""

from __future__ import annotations

from django.core.mail import EmailMultiAlternatives
from django.template.loader import render_to_string
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy as _

SITE_NAME = "The Corner Bookshop"

# Lazy, as strings of a module have to be: translated when a message is sent, in the language of that moment. These
# texts are in the catalogues of Django's own admin.
THANKS = _("Thanks for using our site!")
RESET_LINK = _("Please go to the following page and choose a new password:")


def order_confirmation(name: str, email: str, book: str) -> EmailMultiAlternatives:
    """Text and HTML, made from templates in the active language."""
    context = {"name": name, "book": book, "thanks": THANKS, "site_name": SITE_NAME}
    message = EmailMultiAlternatives(
        subject=format_lazy("{book}: {thanks}", book=book, thanks=THANKS),
        body=render_to_string("demo_site/mail/order.txt", context),
        to=[email],
    )
    message.attach_alternative(render_to_string("demo_site/mail/order.html", context), "text/html")
    return message


def password_reset(email: str, link: str) -> EmailMultiAlternatives:
    """Subject and body are still lazy here."""
    return EmailMultiAlternatives(
        subject=_("Password reset on %(site_name)s") % {"site_name": SITE_NAME},
        body=format_lazy("{reset_link}\n\n{link}\n\n{thanks}\n", reset_link=RESET_LINK, link=link, thanks=THANKS),
        to=[email],
    )
