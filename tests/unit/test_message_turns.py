"""The one reading of stored messages: every reader reads every shape that could be a part, and none fails."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_history_client import agent_framework, forms, langchain, pydantic_ai
from service.formats import message_turns, openai_items
from service.formats.message_parts import Call, Media, Reasoning, Result, Text, part_of
from tests.strategies import objects, values

TAGS = [
    *("text", "input_text", "refusal", "image_url", "input_image", "image", "audio", "file", "document"),
    *("tool_use", "tool_result", "thinking", "reasoning", "function_call", "function_call_output", "uri"),
    *("tool_call", "binary", "image-url", "text_reasoning", "function_result", "data", "unknown"),
]
NAMES = [
    *("text", "image_url", "url", "source", "data", "file", "base64", "mime_type", "media_type", "file_id"),
    *("id", "name", "input", "args", "arguments", "call_id", "tool_use_id", "content", "output", "summary"),
    *("thinking", "reasoning", "functionCall", "function_response", "inlineData", "fileData", "thought"),
    *("items", "result", "format", "tool_name", "tool_call_id", "part_kind", "is_error", "response", "uri"),
]
KINDS = [
    "system-prompt",
    "user-prompt",
    "tool-return",
    "retry-prompt",
    "text",
    "tool-call",
    "thinking",
    "file",
]
LEAVES = values | st.sampled_from(["x", "data:image/png;base64,AAAA", "https://x/y.png", "image/png"])


def shapes(inner: Any) -> Any:
    tagged = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, inner))
    tag = st.sampled_from(["type", "kind", "block_type", "role"])
    return st.builds(lambda part, name, value: {name: value, **part}, tagged, tag, st.sampled_from(TAGS))


PARTS = shapes(LEAVES | shapes(LEAVES) | st.lists(shapes(LEAVES), max_size=2))
LISTS = st.lists(PARTS | values, max_size=3)
PYDANTIC_AI = st.fixed_dictionaries(
    {
        "parts": st.lists(
            st.fixed_dictionaries({"part_kind": st.sampled_from(KINDS)}, optional={"content": LEAVES | LISTS})
        )
    }
)


@st.composite
def odd_messages(draw: Any) -> dict[str, Any]:
    """A message of any known fields, with values that its writer's form would have, or not."""
    optional = {
        "content": st.none() | st.text(max_size=5) | LISTS,
        "parts": values | LISTS,
        "tool_calls": values | LISTS,
        "tool_call_id": st.none() | st.text(max_size=5),
        "name": st.none() | st.text(max_size=5),
        "reasoning_content": values,
        "pydantic_ai": values | PYDANTIC_AI,
        "langchain": values
        | st.fixed_dictionaries({"additional_kwargs": values, "invalid_tool_calls": LISTS}),
        "openai_item": values | PARTS | objects,
    }
    role = st.sampled_from(sorted(openai_items.ROLES))
    message = draw(st.fixed_dictionaries({"role": role}, optional=optional))
    return {"id": "m", "seq": 1, **message}


@given(odd_messages())
def test_no_message_keeps_the_items_of_a_conversation_from_being_read(message: dict[str, Any]) -> None:
    items = openai_items.items_of(message)
    assert items
    assert all(isinstance(item["type"], str) for item in items)
    json.dumps(items)


@given(st.lists(odd_messages(), max_size=3))
def test_no_message_keeps_a_conversation_from_being_read_in_another_form(messages: list[Any]) -> None:
    messages = [{**message, "id": f"m{place}", "seq": place} for place, message in enumerate(messages)]
    for write in (forms.chat_completions, forms.anthropic, forms.gemini):
        json.dumps(write(messages))
    own = ("langchain", "pydantic_ai")
    foreign = [{name: value for name, value in each.items() if name not in own} for each in messages]
    langchain.restored(foreign)
    pydantic_ai.restored(foreign)
    agent_framework.restored(foreign)


READ: list[tuple[Any, Any]] = [
    ("a", Text("a")),
    ({"type": "text", "text": "a"}, Text("a")),
    ({"type": "refusal", "refusal": "a"}, Text("a")),
    ({"type": "document", "source": {"type": "text", "data": "a"}}, Text("a")),
    ({"type": "image_url", "image_url": "https://x"}, Media("image", "https://x")),
    ({"type": "image_url", "image_url": {"url": "u"}}, Media("image", "u")),
    (
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A"}},
        Media("image", data="A", media_type="image/png"),
    ),
    ({"type": "image", "source": {"type": "file", "file_id": "f"}}, Media("image", file_id="f")),
    (
        {"type": "image", "source_type": "base64", "data": "A", "mime_type": "image/png"},
        Media("image", data="A", media_type="image/png"),
    ),
    ({"type": "input_image", "file_id": "f", "detail": "low"}, Media("image", file_id="f")),
    (
        {"type": "input_audio", "input_audio": {"data": "A", "format": "wav"}},
        Media("audio", data="A", media_type="audio/wav"),
    ),
    (
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,A", "filename": "a.pdf"}},
        Media("file", data="A", media_type="application/pdf", name="a.pdf"),
    ),
    (
        {"kind": "binary", "data": "A", "media_type": "audio/mpeg"},
        Media("audio", data="A", media_type="audio/mpeg"),
    ),
    (
        {"file_data": {"file_uri": "gs://x", "mime_type": "video/mp4"}},
        Media("video", "gs://x", media_type="video/mp4"),
    ),
    ({"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "x"}, Call("c", "f", "x")),
    ({"type": "tool_use", "id": "c", "name": "f", "input": {}}, Call("c", "f", {})),
    ({"functionCall": {"name": "f", "args": {"a": 1}}}, Call("", "f", {"a": 1})),
    ({"type": "tool_result", "tool_use_id": "c", "is_error": True}, Result("c", "", (), failed=True)),
    (
        {"function_response": {"id": "c", "name": "f", "response": {"error": "no"}}},
        Result("c", "f", (Text("no"),), failed=True),
    ),
    (
        {"functionResponse": {"name": "f", "response": {"a": 1, "b": 2}}},
        Result("", "f", (Text('{"a": 1, "b": 2}'),)),
    ),
    ({"type": "thinking", "thinking": "hm", "signature": "s"}, Reasoning("hm")),
    ({"text": "hm", "thought": True}, Reasoning("hm")),
    ({"type": "reasoning", "summary": [{"text": "a"}], "content": [{"text": "b"}]}, Reasoning("a\nb")),
]


@pytest.mark.parametrize(("part", "expected"), READ, ids=map(str, range(len(READ))))
def test_a_part_is_read_by_its_shape(part: Any, expected: Any) -> None:
    assert part_of(part) == expected
    assert part_of(part).given == (None if isinstance(part, str) else part)


def test_a_call_that_stands_in_the_content_and_in_the_tool_calls_is_one_call() -> None:
    """LangChain's models of Anthropic say each call twice, the first time without its arguments."""
    message = {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}, {"type": "tool_use", "id": "c", "name": "f", "input": {}}],
        "tool_calls": [{"id": "c", "name": "f", "args": {"a": 1}}],
    }
    (turn,) = message_turns.read(message)
    assert turn.parts == (Text("a"), Call("c", "f", {"a": 1}))


def test_a_call_that_langchain_calls_invalid_is_a_call_for_the_others_so_that_its_result_is_paired() -> None:
    invalid = [{"name": "f", "args": "{", "id": "c", "error": None}]
    message = {"role": "assistant", "content": "", "langchain": {"type": "ai", "invalid_tool_calls": invalid}}
    (turn,) = message_turns.read(message)
    assert turn.parts == (Call("c", "f", "{"),)


def test_the_results_pictures_of_a_tool_follow_the_results_in_chat_completions() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "https://x"}}]
    messages = [
        {"id": f"m{n}", "seq": n, "role": "tool", "tool_call_id": f"{n}", "content": parts} for n in range(2)
    ]
    found = forms.chat_completions(messages)
    assert [each["role"] for each in found] == ["tool", "tool", "user"]
    assert [each["content"] for each in found[:2]] == ["a", "a"]
    assert found[2]["content"] == [parts[1]] * 2
