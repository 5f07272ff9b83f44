"""New messages: checked, named and encoded, without a database."""

from __future__ import annotations

import re
from typing import Any

import bson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import FAULTS_MAX, InvalidRequest
from service.formats import bson_codec, strict_json
from service.history import new_messages
from service.history.new_messages import NewMessage, PreparedBatch, message_ids
from service.settings import MESSAGE_BYTES_MAX
from service.tenancy import is_valid_id
from tests import strategies

USER = {"role": "user"}
ITEMS_MAX = 5


def named(*ids: str | None, prefix: str | None = None) -> list[NewMessage]:
    return [NewMessage(USER | ({} if each is None else {"id": each}), prefix) for each in ids]


def prepare(
    *fields: Any, key: str | None = None, field: str | None = "messages", exact: bool = False
) -> PreparedBatch:
    messages = list(map(NewMessage, fields))
    return new_messages.prepare(messages, key, field=field, items_max=ITEMS_MAX, keep_exact_copy=exact)


def faults(*fields: Any, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        prepare(*fields, **options)
    return [(fault.path, fault.message) for fault in caught.value.faults]


# -- ids -------------------------------------------------------------------------------------------


def test_message_ids_come_from_the_key_or_an_own_id_or_chance() -> None:
    messages = named(None, None)
    keyed, next_id_suffix = message_ids(messages, "k")
    assert message_ids(messages, "k") == (keyed, next_id_suffix)
    assert f"idem_{message_ids(messages[:1], 'k')[1]}" == keyed[1]
    assert message_ids([*messages, *messages], "k")[0][2] == f"idem_{next_id_suffix}"
    assert message_ids(messages, "other")[0] != keyed
    mine = named(None, "mine")
    assert message_ids(mine, None) == message_ids(mine, None)
    assert message_ids(mine, None)[0][1] == "mine"
    assert message_ids(messages, None) != message_ids(messages, None)
    assert all(re.fullmatch(r"idem_[0-9a-f]{32}\.[01]", each) for each in keyed)
    # A caller may give a message an id that equals a key; the ids made from the two are different.
    assert message_ids(named("k", None), None)[0][1] != keyed[1]


def test_without_a_key_no_longer_batch_can_be_recognised() -> None:
    assert message_ids(named("mine"), None)[1] is None
    assert message_ids(named(None), None)[1] is None


keys = st.text(strategies.characters, min_size=1, max_size=300)
prefixes = st.sampled_from([None, "msg", "fc", "rs"])


@given(keys, st.integers(1, ITEMS_MAX), st.integers(1, ITEMS_MAX), prefixes)
def test_a_longer_batch_of_a_key_begins_with_the_ids_of_a_shorter(
    key: str, one: int, other: int, prefix: str | None
) -> None:
    shorter, longer = sorted((one, other))
    first, next_id_suffix = message_ids(named(*[None] * shorter, prefix=prefix), key)
    ids, _ = message_ids(named(*[None] * longer, prefix=prefix), key)
    assert ids[:shorter] == first
    assert len(set(ids)) == longer
    assert all(map(is_valid_id, ids))
    if longer > shorter:
        assert ids[shorter].partition("_")[2] == next_id_suffix


def test_ids_begin_with_the_prefix_that_the_caller_asks_for() -> None:
    messages = [NewMessage(USER, "fc"), NewMessage(USER | {"id": "own"}, "msg"), NewMessage(USER, "rs")]
    ids, next_id_suffix = message_ids(messages, "k")
    stem = new_messages.digest("k")
    assert ids == [f"fc_{stem}0000", "own", f"rs_{stem}0002"]
    assert next_id_suffix == f"{stem}0003"


def test_a_digest_is_32_hexadecimal_digits() -> None:
    assert new_messages.digest("é") == new_messages.digest("é") != new_messages.digest("e")
    assert re.fullmatch("[0-9a-f]{32}", new_messages.digest("é"))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "path", "why"),
    [
        ("text", "$.messages[0]", "must be an object"),
        (None, "$.messages[0]", "must be an object"),
        ({}, "$.messages[0].role", "required"),
        ({"role": "robot"}, "$.messages[0].role", "'user'"),
        ({"role": "r" * 1_000_000}, "$.messages[0].role", "'user'"),
        (USER | {"content": 7}, "$.messages[0].content", "valid string, or input should be a valid list"),
        (USER | {"tool_call_id": []}, "$.messages[0].tool_call_id", "valid string"),
        (USER | {"metadata": []}, "$.messages[0].metadata", "valid dict"),
        (USER | {"id": "a\n"}, "$.messages[0].id", "1 to 1,500 bytes"),
        (USER | {"id": None}, "$.messages[0].id", "1 to 1,500 bytes"),
        (USER | {"seq": 1}, "$.messages[0].seq", "is set by the service"),
        (USER | {"_exact_bson": 1}, "$.messages[0]._exact_bson", "is set by the service"),
        (USER | {"x": {"a": [1, 2**63]}}, "$.messages[0].x.a[1]", "beyond 64 bits"),
        (USER | {"a\0b": 1}, '$.messages[0]["a\\u0000b"]', "NUL"),
        (strict_json.parse(b'{"role": "user", "x": 1, "x": 2}'), "$.messages[0]", "stands twice"),
        (USER | {"x": "y" * MESSAGE_BYTES_MAX}, "$.messages[0]", "as BSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_fault_is_told_with_its_place(fields: Any, path: str, why: str) -> None:
    ((at, message),) = faults(fields)
    assert at == path
    assert why in message


def test_the_place_of_a_single_message_is_the_request_itself() -> None:
    assert faults({"role": "robot"}, field=None)[0][0] == "$.role"
    assert prepare(USER, field=None).ids


@pytest.mark.parametrize("count", [0, ITEMS_MAX + 1])
def test_a_batch_is_neither_empty_nor_too_long(count: int) -> None:
    assert faults(*[USER] * count) == [("$.messages", f"must have 1 to 5 messages, and has {count}")]


def test_every_fault_of_every_message_is_told_and_only_so_many() -> None:
    paths = [path for path, _ in faults({"role": 1, "seq": 2}, USER, {"id": ""}, field="items")]
    assert paths == ["$.items[0].seq", "$.items[0].role", "$.items[2].id", "$.items[2].role"]
    many = [NewMessage({})] * (FAULTS_MAX + 50)
    with pytest.raises(InvalidRequest) as caught:
        new_messages.prepare(many, None, field="messages", items_max=1_000, keep_exact_copy=False)
    assert len(caught.value.faults) == FAULTS_MAX
    assert "only the first 100" in caught.value.detail


def test_an_id_that_stands_twice_is_refused_at_its_second_place() -> None:
    assert faults(USER | {"id": "a"}, USER, USER | {"id": "a"}) == [
        ("$.messages[2].id", "stands twice in this batch")
    ]


def test_a_key_and_own_ids_exclude_each_other_unless_the_caller_has_prefixes() -> None:
    ((path, why),) = faults(USER | {"id": "a"}, key="k")
    assert path == "$.messages[0].id"
    assert "not both" in why
    batch = new_messages.prepare(
        named("a", None, prefix="msg"), "k", field="items", items_max=5, keep_exact_copy=False
    )
    assert batch.ids[0] == "a"


# -- what is prepared ------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(strategies.messages(), min_size=1, max_size=ITEMS_MAX), st.booleans())
def test_any_message_is_encoded_as_it_was_given(messages: list[dict[str, Any]], exact: bool) -> None:
    batch = prepare(*messages, exact=exact)
    assert len(set(batch.ids)) == len(messages)
    for given_fields, prepared in zip(messages, batch.messages, strict=True):
        decoded = bson_codec.decode(prepared.fields)
        assert list(decoded) == list(given_fields)
        assert bson_codec.json_equal(decoded, given_fields)


def test_an_exact_copy_is_kept_only_where_the_engine_needs_it() -> None:
    reference = USER | {"metadata": {"$id": 1, "$ref": "c"}}
    assert bson_codec.EXACT_COPY in bson.decode(prepare(reference, exact=True).messages[0].fields)
    assert prepare(reference, exact=False).messages[0].fields == bson.encode(reference)
    assert prepare(USER, exact=True).messages[0].fields == bson.encode(USER)


def test_an_own_id_is_no_field_of_the_message() -> None:
    (message,) = prepare({"id": "a", "role": "user", "content": "x"}).messages
    assert (message.id, bson.decode(message.fields)) == ("a", {"role": "user", "content": "x"})


@pytest.mark.parametrize(
    ("title", "why"),
    [("x" * 1_001, "at most 1000 characters"), (7, "valid string"), ("\ud800", "lone surrogate")],
    ids=["long", "number", "surrogate"],
)
def test_a_title_is_text_of_at_most_1000_characters(title: Any, why: str) -> None:
    assert new_messages.checked_title("x" * 1_000) == "x" * 1_000
    assert new_messages.checked_title(None) is None
    with pytest.raises(InvalidRequest) as caught:
        new_messages.checked_title(title)
    assert caught.value.faults[0].path == "$.title"
    assert why in caught.value.faults[0].message


@pytest.mark.parametrize(
    ("value", "why"), [("a\n", "1 to 1,500"), (7, "1 to 1,500"), ("\ud800", "surrogate")]
)
def test_an_id_is_checked_under_the_name_of_its_parameter(value: Any, why: str) -> None:
    assert new_messages.checked_id("a", "user_id") == "a"
    with pytest.raises(InvalidRequest) as caught:
        new_messages.checked_id(value, "user_id")
    assert caught.value.faults[0].path == "$.user_id"
    assert why in caught.value.faults[0].message
