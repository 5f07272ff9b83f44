"""What an adapter keeps that the service cannot store: stored readably, and exact on the way back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_history_client import _exact
from service.formats import strict_json

TEXTS = st.text(st.characters(codec=None, exclude_categories=()), max_size=6) | st.sampled_from(
    ["\ud83d", "a\udfffb", "\ud83d\ude00", "NaN", "", "a\0b", "." * 300, _exact.ITEM_FIELD]
)
NUMBERS = st.integers() | st.integers(-(2**70), 2**70) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=12,
)


def as_json(value: Any) -> str:
    """A text by which NaN equals itself, and keys have an order."""
    return json.dumps(json.loads(json.dumps(value)))


def is_storable(value: Any) -> bool:
    try:
        strict_json.check(value, ())
        strict_json.check(strict_json.parse(json.dumps(value, ensure_ascii=False).encode()), ())
    except Exception:  # noqa: BLE001  (whatever is the matter, it cannot be stored)
        return False
    return True


@given(VALUES)
def test_a_message_comes_back_as_json_has_it_and_is_stored_as_the_service_takes_it(value: Any) -> None:
    message = {"role": "tool", "content": "x", "own": value}
    kept = _exact.kept(message, "own_exact")
    assert is_storable(kept)
    stored = json.loads(json.dumps(kept))
    opened = _exact.opened({**stored, "id": "m", "seq": 1}, "own_exact")
    assert as_json({name: opened[name] for name in message}) == as_json(message)
    # What can be stored is stored as it is, and nothing is there twice.
    assert ("own_exact" in kept) == (kept is not message)
    if is_storable(message):
        assert kept is message


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_an_item_comes_back_also_if_it_looks_like_one_that_was_kept(item: dict[str, Any]) -> None:
    kept = _exact.kept_item(item)
    assert is_storable(kept)
    assert as_json(_exact.opened_item(json.loads(json.dumps(kept)))) == as_json(item)
    again = _exact.kept_item(kept)
    assert as_json(_exact.opened_item(json.loads(json.dumps(again)))) == as_json(kept)


REPLACED = [
    (math.nan, "NaN"),
    ([1, -math.inf], [1, "-Infinity"]),
    (2**63, "9223372036854775808"),
    (2**63 - 1, 2**63 - 1),
    (True, True),
    ("half \ud83d", "half \ufffd"),
    ("\ud83d\ude00 \ud83d", "\U0001f600 \ufffd"),
    ({"a\0": 1, "b": [2]}, {"a\ufffd": 1, "b": [2]}),
    ({"." * 255: 1}, {"\ufffd" * 255: 1}),
    ("a\0b", "a\0b"),
]


@pytest.mark.parametrize(("value", "expected"), REPLACED, ids=map(str, range(len(REPLACED))))
def test_every_other_reader_sees_a_readable_replacement(value: Any, expected: Any) -> None:
    assert _exact.replaced(value) == expected


def test_what_is_nested_too_deep_is_its_json_text() -> None:
    value: Any = "\ud83d"
    for _ in range(150):
        value = [value]
    kept = _exact.kept({"own": value}, "own_exact")
    assert is_storable(kept)
    assert _exact.opened(kept, "own_exact")["own"] == value


def test_what_is_no_json_stays_so_that_the_client_names_its_place() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value in ({1, 2}, loop, [math.nan, {1}]):
        message = {"own": value}
        assert "own_exact" not in _exact.kept(message, "own_exact")
