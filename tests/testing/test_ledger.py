"""Accounting: what was lost, what came twice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anymail_retry.testing import Accepted, Ledger, message_id_of
from anymail_retry.testing.ledger import find_marker


def accepted(marker: str, *recipients: str, api_key: str = "k") -> Accepted:
    return Accepted(
        number=1,
        time=0.0,
        esp="Mandrill",
        recipients=recipients or ("to@example.com",),
        subject="Subject",
        marker=marker,
        idempotency_key=None,
        api_key=api_key,
        message_ids=(),
        request=1,
        body=b"{}",
    )


LEDGER = Ledger([accepted("a"), accepted("b"), accepted("a"), accepted("c", api_key="other"), accepted("a")])


def test_lost_are_the_expected_that_never_came() -> None:
    assert LEDGER.lost(["z", "a", "y", "z"]) == ["z", "y"]
    assert LEDGER.lost(["a", "b"]) == []
    assert Ledger().lost(["a"]) == ["a"]


def test_duplicates_come_more_than_once() -> None:
    assert LEDGER.duplicates() == {"a": 3}
    assert LEDGER.duplicates(["b", "c", "z"]) == {}
    assert LEDGER.duplicates(["b", "a"]) == {"a": 3}


def test_counts_by_any_attribute() -> None:
    assert LEDGER.count_by("marker") == {"a": 3, "b": 1, "c": 1}
    assert LEDGER.count_by("marker")["z"] == 0
    assert LEDGER.count_by("api_key") == {"k": 4, "other": 1}


def test_deliveries_count_each_recipient_of_a_batch() -> None:
    ledger = Ledger([accepted("a", "x@example.com", "cc@example.com", "y@example.com", "cc@example.com")])
    assert ledger.deliveries() == {("a", "x@example.com"): 1, ("a", "y@example.com"): 1, ("a", "cc@example.com"): 2}


def test_message_id_is_the_marker() -> None:
    assert message_id_of(LEDGER[1]) == "b"


@pytest.mark.parametrize(
    ("data", "marker"),
    [
        pytest.param({"headers": {"X-Message-Marker": "m"}}, "m", id="headers as an object"),
        pytest.param({"headers": {"x-message-MARKER": "m"}}, "m", id="in any case"),
        pytest.param({"headers": [{"name": "X-Message-Marker", "value": "m"}]}, "m", id="headers as a list"),
        pytest.param({"Headers": [{"Name": "X-Message-Marker", "Value": "m"}]}, "m", id="Postmark's spelling"),
        pytest.param({"headers": [{"value": "m", "key": "X-Message-Marker"}]}, "m", id="Scaleway's spelling"),
        pytest.param({"h:X-Message-Marker": ["m"]}, "m", id="Mailgun's form"),
        pytest.param({"v:marker": ["m"]}, "m", id="Mailgun's metadata"),
        pytest.param({"metadata": {"marker": "m"}}, "m", id="metadata"),
        pytest.param({"metadata": {"marker": 17}}, "17", id="a number"),
        pytest.param({"headers": {"X-Metadata": '{"a": 1, "marker": "m"}'}}, "m", id="metadata in a header"),
        pytest.param({"metadata": {"marker": "no"}, "z": {"X-Message-Marker": "m"}}, "m", id="the header goes first"),
        pytest.param([{"a": 1}, {"metadata": {"marker": "m"}}], "m", id="in a batch"),
        pytest.param({"text": '{"marker": broken'}, "Subject", id="no JSON"),
        pytest.param({"text": "marker: x", "subject": "marker"}, "Subject", id="mere text"),
        pytest.param({"headers": {}}, "Subject", id="none"),
        pytest.param({"headers": {"X-Message-Marker": ""}}, "", id="empty, but there"),
    ],
)
def test_marker_is_found(data: Any, marker: str) -> None:
    assert find_marker(data, "Subject", json.dumps(data).encode()) == marker
