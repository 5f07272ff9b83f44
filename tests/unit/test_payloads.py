"""What JSON may be stored, and how it is refused."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest, MalformedBody
from service.formats import bson_codec, strict_json
from service.settings import MESSAGE_BYTES_MAX


def nested(levels: int, inner: Any = 1) -> Any:
    value = inner
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def refusal(value: Any) -> tuple[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        strict_json.check(value)
    (fault,) = caught.value.faults
    return fault.path, fault.message


@pytest.mark.parametrize(
    ("text", "path", "why"),
    [
        ('{"a": [1, {"b.c": 9223372036854775808}]}', '$.a[1]["b.c"]', "beyond 64 bits"),
        ('{"a": -9223372036854775809}', "$.a", "beyond 64 bits"),
        (f'{{"a": {"9" * 5000}}}', "$.a", "beyond 64 bits"),
        ('{"a": 1e400}', "$.a", "beyond the range of a double"),
        ('{"a": -1e400}', "$.a", "beyond the range of a double"),
        ('{"a": 1e-400}', "$.a", "too small for a double"),
        ('{"a": NaN}', "$.a", "NaN is not JSON"),
        ("[Infinity, -Infinity]", "$[0]", "Infinity is not JSON"),
        ('{"a": "\\ud800"}', "$.a", "lone surrogate"),
        ('{"\\udfff": 1}', '$["\\udfff"]', "lone surrogate"),
        ('{"a\\u0000b": 1}', '$["a\\u0000b"]', "NUL"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "$.a", 'the key "b" stands twice'),
        ('{"b": 1, "b": 1}', "$", 'the key "b" stands twice'),
        (json.dumps(nested(91)), "$" + ".a[0]" * 45, "more than 90 levels"),
    ],
)
def test_json_that_bson_cannot_hold_is_refused_with_its_path(text: str, path: str, why: str) -> None:
    found, message = refusal(strict_json.parse(text.encode()))
    assert found == path or (path.endswith("[0]") and found.startswith(path[:20])), found
    assert why in message


def test_90_levels_are_held_and_91_are_not() -> None:
    strict_json.check(strict_json.parse(json.dumps(nested(90)).encode()))
    path, message = refusal(nested(91))
    assert len(json.dumps(nested(91))) > 91
    assert path.count("a") + path.count("[0]") == 90
    assert "90 levels" in message


@pytest.mark.parametrize("levels", [1_000, 5_000, 100_000])
def test_thousands_of_levels_are_refused_with_their_path(levels: int) -> None:
    text = '{"role": "user", "x\\"[": ["]", ' + '{"a": [' * levels + "]}" * levels + "]}"
    with pytest.raises(InvalidRequest) as caught:
        strict_json.check(strict_json.parse(text.encode()))
    path = caught.value.faults[0].path
    assert path.startswith('$["x\\"["][1].a[0].a[0]')
    assert len(path) < 1000


def test_deep_nesting_that_never_closes_is_an_error_too() -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000):
        with pytest.raises((InvalidRequest, MalformedBody)):
            strict_json.check(strict_json.parse(text.encode()))


@pytest.mark.parametrize("value", [datetime.now(), b"x", {1: 2}, {"a": (1, 2)}, {"a": {3}}, object()])  # noqa: DTZ005
def test_what_is_no_json_is_refused_from_python_too(value: Any) -> None:
    refusal(value)


def test_a_long_key_is_cut_in_a_path() -> None:
    path, _ = refusal({"k" * 10_000: 2**64})
    assert len(path) < 200


keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
references = st.sampled_from(["$ref", "$id", "$db", "x", "", "a.b", "$set"])
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.dictionaries(references, inner),
    max_leaves=12,
)


def exactly(value: Any) -> str:
    """Equal only for equal JSON: order of keys, 1 and 1.0, 0.0 and -0.0 all count."""
    return json.dumps(value)


@given(st.dictionaries((keys | references).filter(lambda key: key != "_id"), json_values))
def test_any_json_comes_out_of_bson_as_it_went_in(fields: dict[str, Any]) -> None:
    parsed = strict_json.parse(json.dumps(fields).encode())
    raw = bson_codec.encode(parsed, keep_exact_copy=False)
    assert exactly(bson_codec.decode(raw)) == exactly(fields)
    assert bson_codec.json_equal(bson_codec.decode(raw), fields)


@given(st.dictionaries(references, json_values))
def test_an_engine_that_makes_dbrefs_cannot_bend_what_it_is_given(fields: dict[str, Any]) -> None:
    raw = bson_codec.encode({"v": fields}, keep_exact_copy=True)
    bent_by_the_engine = bson.encode(bson.decode(raw))
    assert exactly(bson_codec.decode(bent_by_the_engine)) == exactly({"v": fields})


def test_a_copy_is_kept_only_where_the_engine_would_bend() -> None:
    for harmless in ({"$ref": "a", "$id": 1}, {"$id": 1}, {"text": "$ref"}):
        assert bson_codec.EXACT_COPY.encode() not in bson_codec.encode({"v": harmless}, keep_exact_copy=True)
    assert bson_codec.EXACT_COPY.encode() in bson_codec.encode(
        {"v": {"$id": 1, "$ref": "a"}}, keep_exact_copy=True
    )


def test_splice_joins_documents() -> None:
    one, two = {"a": 1, "b": "x"}, {"c": [1.5, None]}
    assert bson.decode(bson_codec.concat_documents(bson.encode(one), bson.encode(two))) == {**one, **two}


def test_a_message_just_under_the_limit_is_encoded_and_just_over_it_refused() -> None:
    overhead = len(bson.encode({"content": ""}))
    fits = MESSAGE_BYTES_MAX - overhead
    assert len(bson_codec.encode({"content": "x" * fits}, keep_exact_copy=True)) == MESSAGE_BYTES_MAX
    with pytest.raises(InvalidRequest) as caught:
        bson_codec.encode({"content": "x" * (fits + 1)}, ("messages", 3), keep_exact_copy=True)
    assert caught.value.faults[0].path == "$.messages[3]"


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        (1, 1.0, False),
        (1, True, False),
        ([1, 2], [2, 1], False),
        ({"a": None}, {}, False),
    ],
)
def test_same_tells_json_apart_as_json_does(one: Any, other: Any, equal: bool) -> None:
    assert bson_codec.json_equal(one, other) is equal
