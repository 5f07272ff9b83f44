"""The forms of the providers: what each requires, over generated histories, and round trips of each form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings

from service.formats import message_pieces, model_input
from service.formats.message_pieces import Arranged, Piece, arrange, continues_answer, pieces
from tests.unit.test_context_cut import histories

Json = dict[str, Any]


def stored(messages: Sequence[Json]) -> list[Json]:
    return [{"id": f"m{n}", "seq": n, **each} for n, each in enumerate(messages, 1)]


def arranged(messages: Sequence[Json], *, repair: bool = True) -> Arranged:
    return arrange([piece for each in stored(messages) for piece in pieces(each)], repair=repair)


def require_chat_completions(messages: Sequence[Json], still_open: set[str]) -> None:
    """Raise unless each result stands behind its assistant message, and each call has one, or is open."""
    waiting: set[str] = set()
    for each in messages:
        if each["role"] == "tool":
            waiting.remove(each["tool_call_id"])
            assert isinstance(each["content"], str | list)
            continue
        assert not waiting
        waiting = {call["id"] for call in each.get("tool_calls", [])}
        assert len(waiting) == len(each.get("tool_calls", []))
        assert each["content"] is not None or waiting
        if each["role"] != "user":
            parts = each["content"] if isinstance(each["content"], list) else []
            assert all(part["type"] == "text" for part in parts)
    assert waiting == still_open


def require_anthropic(messages: Sequence[Json], still_open: set[str]) -> None:
    """Raise unless the roles alternate, and each call has its result at the front of the next message."""
    waiting: set[str] = set()
    for place, each in enumerate(messages):
        assert each["role"] == ("assistant" if place % 2 else "user")
        blocks = each["content"]
        assert blocks
        assert all(block.get("text") != "" for block in blocks)
        results = [block["type"] == "tool_result" for block in blocks]
        assert results == sorted(results, reverse=True)
        answered = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        assert len(answered) == len(set(answered))
        if place + 1 < len(messages) or not still_open:
            assert set(answered) == waiting
        else:
            assert set(answered) <= waiting
        waiting -= set(answered)
        if each["role"] == "assistant":
            waiting = {block["id"] for block in blocks if block["type"] == "tool_use"}
    assert waiting == still_open


@settings(deadline=None, max_examples=300)
@given(histories())
def test_each_form_is_one_that_its_provider_takes(history: list[Json]) -> None:
    made = arranged(history)
    still_open = {each.call_id for each in made.open_calls}
    require_chat_completions(model_input.chat_completions(made.pieces), still_open)
    _, messages = model_input.anthropic(made.pieces)
    require_anthropic(messages, {model_input._anthropic_id(each) for each in still_open})
    items = model_input.responses(made.pieces)
    calls = [each["call_id"] for each in items if each["type"] == "function_call"]
    outputs = [each["call_id"] for each in items if each["type"] == "function_call_output"]
    assert set(calls) - set(outputs) == still_open
    assert len(outputs) == len(set(outputs))
    for place, each in enumerate(items):
        if each["type"] == "function_call_output":
            assert any(before.get("call_id") == each["call_id"] for before in items[:place])
    assert {each.call_id for each in made.synthetic}.isdisjoint(still_open)


@settings(deadline=None, max_examples=100)
@given(histories())
def test_what_a_form_makes_reads_as_the_same_form(history: list[Json]) -> None:
    """Each form, stored again and read again, is equal: nothing is lost or added on the way."""
    found = arranged(history).pieces
    chat = model_input.chat_completions(found)
    assert model_input.chat_completions(arranged(chat).pieces) == chat
    system, messages = model_input.anthropic(found)
    head = [{"role": "system", "content": system}] if system else []
    assert model_input.anthropic(arranged([*head, *messages]).pieces) == (system, messages)


def call(call_id: str, name: str = "f", arguments: str = "{}") -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_chat_completions_come_back_equal() -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://a/b.png", "detail": "high"}}
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    messages: list[Json] = [
        {"role": "developer", "content": "be good"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, picture, audio], "name": "ada"},
        {"role": "assistant", "content": "x", "tool_calls": [call("c1"), call("c2", "g", '{"a": [1]}')]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "content": None, "tool_calls": [call("c3")]},
        {"role": "tool", "tool_call_id": "c3", "content": ""},
        {"role": "assistant", "content": "y"},
        {"role": "assistant", "content": ""},
    ]
    expected = [{**each} for each in messages]
    expected[4]["content"] = "2"  # one text is a text
    assert model_input.chat_completions(arranged(messages).pieces) == expected


def test_a_custom_tool_and_a_computer_are_called_as_functions_where_a_form_has_no_other() -> None:
    items: list[Json] = [
        {"type": "custom_tool_call", "call_id": "c1", "name": "code", "input": "print(1)"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "1"},
        {"type": "computer_call", "call_id": "c2", "action": {"type": "click"}, "id": "cu_1"},
        {"type": "computer_call_output", "call_id": "c2", "output": {"type": "computer_screenshot"}},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    ]
    found = [Piece({"role": "assistant", "openai_item": {}}, each) for each in items]
    made = arrange(found, repair=True)
    assert (made.synthetic, made.open_calls) == ([], [])
    chat = model_input.chat_completions(made.pieces)
    assert [each["role"] for each in chat] == ["assistant", "tool", "assistant", "tool"]
    assert chat[0]["tool_calls"] == [
        {"id": "c1", "type": "custom", "custom": {"name": "code", "input": "print(1)"}}
    ]
    assert chat[2]["tool_calls"][0]["function"] == {
        "name": "computer_call",
        "arguments": '{"action": {"type": "click"}}',
    }
    assert model_input.responses(made.pieces) == items


def test_ids_that_anthropic_refuses_are_replaced_alike_in_call_and_result() -> None:
    messages: list[Json] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call("a|b:1"), call("a|b:2")]},
        {"role": "tool", "tool_call_id": "a|b:1", "content": "1"},
        {"role": "tool", "tool_call_id": "a|b:2", "content": "2"},
    ]
    _, made = model_input.anthropic(arranged(messages).pieces)
    ids = [each["id"] for each in made[1]["content"]]
    assert [each["tool_use_id"] for each in made[2]["content"]] == ids
    assert len(set(ids)) == 2
    assert all(each.replace("_", "a").isalnum() for each in ids)


def test_arguments_that_are_no_object_are_one_for_anthropic() -> None:
    calls = [call("c1", "f", "not json"), call("c2", "f", "[1]"), call("c3", "f", "")]
    _, made = model_input.anthropic(arranged([{"role": "assistant", "tool_calls": calls}]).pieces)
    assert [each["input"] for each in made[1]["content"]] == [
        {"arguments": "not json"},
        {"arguments": "[1]"},
        {},
    ]


def test_sequential_calls_stay_sequential_and_parallel_ones_parallel() -> None:
    one = {"type": "function_call", "name": "f", "arguments": "{}"}
    out = {"type": "function_call_output", "output": "r"}
    for order, roles in (
        (["c1", "r1", "c2", "r2"], ["assistant", "tool", "assistant", "tool"]),
        (["c1", "c2", "r1", "r2"], ["assistant", "tool", "tool"]),
        (["c1", "c2", "r2", "r1"], ["assistant", "tool", "tool"]),
    ):
        found = [
            Piece(
                {"role": "assistant" if each[0] == "c" else "tool", "openai_item": {}},
                {**(one if each[0] == "c" else out), "call_id": each[1]},
            )
            for each in order
        ]
        made = model_input.chat_completions(arrange(found, repair=True).pieces)
        assert [each["role"] for each in made] == roles


def test_an_id_that_is_used_again_pairs_with_the_latest_call() -> None:
    turn: list[Json] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call("same")]},
        {"role": "tool", "tool_call_id": "same", "content": "1"},
    ]
    made = arranged([*turn, *turn])
    assert (made.synthetic, made.open_calls) == ([], [])
    assert len(made.pieces) == 6


def test_a_result_that_is_left_out_names_its_message_in_each_form() -> None:
    for message in (
        {"role": "tool", "tool_call_id": "c", "content": "x" * 900, "token_count": 500},
        {
            "role": "tool",
            "content": None,
            "openai_item": {"type": "custom_tool_call_output", "call_id": "c", "output": "x" * 900},
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x" * 900}]},
    ):
        shortened = message_pieces.without_result({"id": "m7", **message})
        (piece,) = pieces(shortened)
        assert piece.call_id == "c"
        assert "m7" in str(piece.item["output"])
        assert message_pieces.tokens_of(shortened)[0] < 60


def test_pieces_of_one_message_are_one_answer() -> None:
    one, other = ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"})
    (first,), (second,) = pieces({"id": "1", **one}), pieces({"id": "2", **other})
    assert continues_answer(first, Piece(first.message, {"type": "function_call", "call_id": "c"}))
    assert not continues_answer(first, second)
