"""The dotted paths that a user may write, and what an import of them loads."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import anymail.backends
import pytest
from anymail.backends.base import AnymailBaseBackend
from anymail.backends.mandrill import EmailBackend as AnymailBackend
from django.utils.module_loading import import_string

import anymail_retry.backends
from anymail_retry.mailqueue.fallback import FallbackQueueMixin
from anymail_retry.transport.mixins import DeliveryMixin, RetryMixin

#: Modules of ``anymail.backends`` that are no ESP's.
NOT_AN_ESP = {"base", "base_requests", "console", "test"}
#: Brevo's old name, which Anymail keeps for compatibility only, with a deprecation warning.
OLD_NAMES = {"sendinblue"}
#: Our own modules that are no ESP's.
WRAPPERS = {"fallback", "queued"}


def modules_in(package: Any) -> set[str]:
    return {module.name for module in pkgutil.iter_modules(package.__path__)}


ESPS = sorted(modules_in(anymail.backends) - NOT_AN_ESP - OLD_NAMES)


def test_every_esp_of_the_installed_anymail_has_its_back_end() -> None:
    assert ESPS
    assert set(ESPS) <= modules_in(anymail_retry.backends)


def test_no_back_end_is_for_an_esp_that_anymail_does_not_know() -> None:
    assert modules_in(anymail_retry.backends) - WRAPPERS <= set(ESPS)


def test_the_table_of_names_has_each_module_once() -> None:
    assert sorted(anymail_retry.backends.BACKENDS.values()) == sorted(modules_in(anymail_retry.backends) - WRAPPERS)


@pytest.mark.parametrize("name", anymail_retry.backends.BACKENDS)
def test_a_back_end_has_both_names_in_its_module_and_one_in_the_package(name: str) -> None:
    module = anymail_retry.backends.BACKENDS[name]
    backend = import_string(f"anymail_retry.backends.{module}.EmailBackend")
    assert import_string(f"anymail_retry.backends.{module}.{name}") is backend
    assert import_string(f"anymail_retry.backends.{name}") is backend


@pytest.mark.parametrize("esp", ESPS)
def test_a_back_end_is_anymails_with_the_queue_around_the_retries(esp: str) -> None:
    backend = import_module(f"anymail_retry.backends.{esp}").EmailBackend
    anymails = import_module(f"anymail.backends.{esp}").EmailBackend
    order = [backend.__mro__.index(cls) for cls in (FallbackQueueMixin, DeliveryMixin, anymails)]
    assert order == sorted(order)
    assert backend.esp_name == anymails.esp_name


def test_the_package_lists_its_names_and_knows_no_others() -> None:
    assert set(anymail_retry.backends.__all__) == set(anymail_retry.backends.BACKENDS)
    assert set(dir(anymail_retry.backends)) >= set(anymail_retry.backends.BACKENDS)
    with pytest.raises(AttributeError, match="RetryableNobodyEmailBackend"):
        anymail_retry.backends.RetryableNobodyEmailBackend  # noqa: B018  # looking it up is the test


# --- What an import loads ---


def loaded_after(statements: str) -> set[str]:
    """The modules loaded in a fresh interpreter with Anymail's settings, after these statements."""
    env = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    env["PYTHONPATH"] = str(Path(anymail_retry.__file__).parent.parent)
    code = (
        "from django.conf import settings; settings.configure()\n"
        f"{statements}\n"
        "import sys; print(*sorted(sys.modules), sep='\\n')"
    )
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


def test_the_package_loads_a_back_end_only_when_it_is_named() -> None:
    loaded = loaded_after("import anymail_retry.backends; dir(anymail_retry.backends)")
    assert "anymail_retry.backends" in loaded
    assert {module for module in loaded if module.startswith(("anymail.backends.", "anymail_retry.backends."))} == set()
    assert {"requests", "boto3", "botocore"} & loaded == set()


def test_one_back_end_loads_no_other_and_no_boto3() -> None:
    loaded = loaded_after("from anymail_retry.backends import RetryableMandrillEmailBackend")
    ours = {module for module in loaded if module.startswith("anymail_retry.backends.")}
    assert ours == {"anymail_retry.backends.mandrill"}
    assert {"boto3", "botocore"} & loaded == set()


def test_amazon_ses_loads_boto3() -> None:
    """The two tests above would pass for ever if nothing were seen."""
    assert "boto3" in loaded_after("from anymail_retry.backends import RetryableAmazonSESEmailBackend")


# --- A subclass of the user's own ---


def test_the_retrying_mixin_behind_the_back_end_is_refused_with_the_order_to_write() -> None:
    with pytest.raises(TypeError, match=r"class EmailBackend\(RetryMixin, EmailBackend\)"):
        type("EmailBackend", (AnymailBackend, RetryMixin), {})


def test_the_queue_mixin_behind_the_back_end_is_refused_with_the_order_to_write() -> None:
    with pytest.raises(TypeError, match="FallbackQueueMixin"):
        type("EmailBackend", (RetryMixin, AnymailBackend, FallbackQueueMixin), {})


def test_the_queue_mixin_behind_the_retrying_one_is_refused_with_the_order_to_write() -> None:
    with pytest.raises(TypeError, match="FallbackQueueMixin"):
        type("EmailBackend", (RetryMixin, FallbackQueueMixin, AnymailBackend), {})


def test_the_right_order_is_taken_also_with_a_class_between() -> None:
    between = type("Between", (AnymailBackend,), {})
    first = type("First", (RetryMixin, between), {})
    assert issubclass(type("Second", (FallbackQueueMixin, first), {}), AnymailBaseBackend)
