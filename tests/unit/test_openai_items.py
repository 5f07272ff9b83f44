"""Items and messages, each as the other: any item comes back equal, any message reads as some items."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from service.documents import MessageFields
from service.formats import message_turns, openai_items
from tests.strategies import ids, messages, objects, texts, values

KINDS = ["message", "function_call", "function_call_output", "reasoning", "of_next_month", "custom_output"]
ROLES = ["user", "assistant", "system", "developer", "tool", "critic", ""]


@st.composite
def items(draw: Any) -> dict[str, Any]:
    """Any item that the API takes: its known fields as they should be or not, others, in any order."""
    kind = draw(st.sampled_from(KINDS))
    content = st.one_of(st.none(), texts, st.lists(values, max_size=3))
    known: dict[str, Any] = {
        "content": content if kind == "message" else values,
        "call_id": st.one_of(texts, values),
        "name": st.one_of(texts, values),
        "arguments": st.one_of(texts, values),
        "output": st.one_of(texts, st.lists(values, max_size=2), values),
        "status": st.one_of(st.none(), texts),
    }
    item = draw(st.fixed_dictionaries({"type": st.just(kind)}, optional=known))
    if kind == "message" or draw(st.booleans()):
        item["role"] = draw(st.sampled_from(ROLES))
    if kind == "message" and draw(st.booleans()):
        del item["type"]
    item |= {
        name: value for name, value in draw(objects).items() if name not in {"id", "type", "role", *known}
    }
    return {name: item[name] for name in draw(st.permutations(list(item)))}


@given(items())
def test_an_item_comes_back_equal_from_the_message_that_it_is_stored_as(item: dict[str, Any]) -> None:
    before = copy.deepcopy(item)
    message = openai_items.message_of(item)
    assert item == before
    MessageFields.model_validate(message)
    found = openai_items.original(message)
    assert found == item
    assert list(found or {}) == list(item)


@given(items())
def test_what_is_filled_in_is_filled_in_once(item: dict[str, Any]) -> None:
    filled = openai_items.completed(item)
    assert openai_items.completed(filled) == filled
    assert isinstance(filled["type"], str)
    stored = {"id": "m", **openai_items.message_of(filled)}
    assert openai_items.items_of(stored) == [{"id": "m", **filled}]


@given(messages(), ids)
def test_any_native_message_reads_as_items_with_ids_of_their_own(
    message: dict[str, Any], message_id: str
) -> None:
    read = openai_items.items_of({**message, "id": message_id})
    shown = [item["id"] for item in read]
    assert shown[0] == message_id or openai_items.looks_like_part(message_id)
    assert len(set(shown)) == len(shown)
    assert {openai_items.message_id(each) for each in shown} == {message_id}
    assert all(isinstance(item["type"], str) for item in read)


def test_no_item_of_a_message_has_the_id_of_another_messages_item() -> None:
    calls = {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}, {"id": "2"}]}
    names = [
        "m",
        "m,1",
        "m,,0",
        "m,,1",
        "m,,1,,0",
        "m,,2",
        "m,,01",
        "m,",
        "m,,,1",
        ",,1",
        "m,,x",
        "m\u2028,,1",
    ]
    items = {name: [each["id"] for each in openai_items.items_of({**calls, "id": name})] for name in names}
    shown = [each for own in items.values() for each in own]
    assert len(set(shown)) == len(shown) == 3 * len(names)
    assert all(openai_items.message_id(each) == name for name, own in items.items() for each in own)
    assert items["m"] == ["m", "m,,1", "m,,2"]
    assert items["m,,1"] == ["m,,1,,0", "m,,1,,1", "m,,1,,2"]
    assert items["m,1"][0] == "m,1"


@given(messages(), values)
def test_a_message_that_only_looks_like_an_item_is_read_all_the_same(message: Any, item: Any) -> None:
    assert openai_items.items_of({**message, "id": "m", message_turns.ITEM: item})


def test_nothing_is_stored_twice() -> None:
    item = {"type": "function_call_output", "call_id": "c", "output": "x" * 1_000}
    message = openai_items.message_of(item)
    assert message == {
        "role": "tool",
        "tool_call_id": "c",
        "content": "x" * 1_000,
        "openai_item": {"type": "function_call_output", "call_id": None, "output": None},
    }
    assert openai_items.message_of({"id": "fco_1", **item}) == message
