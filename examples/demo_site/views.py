from __future__ import annotations

from anymail.exceptions import AnymailError
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils import translation

from . import mails
from .forms import OrderForm


def order(request: HttpRequest) -> HttpResponse:
    """Take an order and confirm it by mail. Whether the ESP is up is not this view's concern."""
    form = OrderForm(request.POST or None)
    if not form.is_valid():
        return render(request, "demo_site/order.html", {"form": form})

    data = form.cleaned_data
    with translation.override(data["language"]):
        message = mails.order_confirmation(data["name"], data["email"], data["book"])
        try:
            message.send()
        except AnymailError as error:
            # What a later attempt could not cure either, such as an address that is none.
            messages.error(request, f"We could not send you a confirmation: {type(error).__name__}.")
            return redirect("order")

    # Only this page, being a demonstration, asks which way the message took.
    if getattr(message, "queued_message", None) is not None:
        messages.warning(
            request, f"The ESP did not take the confirmation. It waits in the queue: {message.queued_message}"
        )
    else:
        messages.success(request, f"The ESP took the confirmation to {data['email']}.")
    return redirect("order")
