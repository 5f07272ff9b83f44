"""The context of a model call over HTTP; tests/integration/test_flat_cost.py counts what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pymongo import MongoClient
from pymongo.database import Database as MongoDatabase

from service.formats.message_pieces import begins_turn, tokens_of
from tests.harness import Service, append, create, history, new_id

Json = dict[str, Any]


@pytest.fixture(scope="module")
def operator(service: Service) -> Iterator[MongoDatabase[Json]]:
    with MongoClient[Json](service.database_url) as client:
        yield client.get_default_database()


def call(call_id: str, name: str = "search", arguments: str = '{"q": "x"}') -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, content: Any = "found") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def context(client: httpx.Client, conversation: str, **query: Any) -> Any:
    if not {"max_tokens", "max_messages", "max_turns"} & set(query):
        query["max_tokens"] = 100_000
    answer = client.get(f"/conversations/{conversation}/context", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


PICTURE = "data:image/png;base64,iVBORw0KGgo="
AGENT: list[Json] = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": PICTURE}},
        ],
    },
    {"role": "assistant", "content": "I look.", "tool_calls": [call("c1"), call("c2", "look", "{}")]},
    result("c2", "a cat"),
    result("c1", "cats"),
    {"role": "assistant", "content": "A cat."},
]


def test_the_context_of_a_short_conversation_is_all_of_it(client: httpx.Client, conversation: str) -> None:
    stored = append(client, conversation, *AGENT)
    made = context(client, conversation)
    assert made == {
        "messages": stored,
        "from_seq": 2,
        "to_seq": 8,
        "last_seq": 8,
        "version": 1,
        "tokens": sum(tokens_of(each)[0] for each in AGENT),
        "tokens_estimated": True,
        "over_budget": False,
        "left_out": {"messages": 0, "tokens": 0},
        "checkpoint": None,
        "open_tool_calls": [],
        "synthetic": [],
    }


def test_each_format_says_the_same(client: httpx.Client, conversation: str) -> None:
    append(client, conversation, *AGENT)
    assert context(client, conversation, format="openai")["messages"] == [
        *AGENT[:5],
        AGENT[6],  # the results in the order of the calls
        AGENT[5],
        AGENT[7],
    ]
    made = context(client, conversation, format="anthropic")
    assert made["system"] == [{"type": "text", "text": "You help."}]
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    assert made["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is this?"}, {"type": "image", "source": source}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "search", "input": {"q": "x"}},
                {"type": "tool_use", "id": "c2", "name": "look", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "cats"},
                {"type": "tool_result", "tool_use_id": "c2", "content": "a cat"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    items = context(client, conversation, format="responses")["messages"]
    assert [each["type"] for each in items] == [
        *("message", "message", "message", "message", "message"),
        *("function_call", "function_call", "function_call_output", "function_call_output", "message"),
    ]
    assert [each.get("call_id") for each in items[5:9]] == ["c1", "c2", "c1", "c2"]


def test_missing_results_are_filled_in_and_open_calls_are_named(client: httpx.Client) -> None:
    conversation = create(client, new_id())
    stored = append(
        client,
        conversation,
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call("c1"), call("c2")]},
        result("c1"),
        {"role": "user", "content": "never mind"},
        {"role": "assistant", "content": None, "tool_calls": [call("c3"), call("c4", "look")]},
        result("c3"),
    )
    synthetic = [{"tool_call_id": "c2", "name": "search", "message_id": stored[1]["id"]}]
    unanswered = [{"tool_call_id": "c4", "name": "look", "message_id": stored[4]["id"]}]
    for form in ("openai", "responses", "anthropic"):
        made = context(client, conversation, format=form)
        assert (made["synthetic"], made["open_tool_calls"]) == (synthetic, unanswered)
        assert str(made["messages"]).count("No result of this call is stored") == 1
        made = context(client, conversation, format=form, repair="none")
        assert (made["synthetic"], made["open_tool_calls"]) == ([], unanswered)
    sent = context(client, conversation, format="openai")["messages"]
    assert [each.get("tool_call_id") for each in sent] == [None, None, "c1", "c2", None, None, "c3"]
    native = context(client, conversation)
    assert native["messages"] == stored
    assert context(client, conversation, repair="placeholder")["messages"][3] == {
        "role": "tool",
        "tool_call_id": "c2",
        "content": "[No result of this call is stored.]",
    }


def test_what_came_through_openais_api_is_the_same_context(client: httpx.Client) -> None:
    conversation = create(client, new_id())
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "abc"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": "2"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
    ]
    answer = client.post(f"/conversations/{conversation}/messages", json={"items": items})
    answer.raise_for_status()
    assert context(client, conversation, format="responses")["messages"] == items
    calls = [call("c1", "f", "{}"), call("c2", "f", "{}")]
    assert context(client, conversation, format="openai")["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        result("c1", "1"),
        result("c2", "2"),
        {"role": "assistant", "content": "b"},
    ]


def test_what_an_agent_of_anthropic_wrote_comes_back_equal(client: httpx.Client, conversation: str) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "sig"}
    messages: list[Json] = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                thought,
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"b": 1, "a": 2}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "r", "is_error": True},
                {"type": "text", "text": "and now?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "done"}]},
    ]
    append(client, conversation, *messages)
    made = context(client, conversation, format="anthropic")
    assert made["messages"] == messages
    chat = context(client, conversation, format="openai")["messages"]
    assert chat[1] == {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [call("t1", "f", '{"b": 1, "a": 2}')],
    }
    assert [each["role"] for each in chat] == ["user", "assistant", "tool", "user", "assistant"]
    # A user's message with results begins no turn.
    assert context(client, conversation, max_turns=1)["from_seq"] == 1


def test_a_cut_stands_still_and_is_the_same_on_every_process(
    client: httpx.Client, second_service: Service
) -> None:
    conversation, places = create(client, new_id()), []
    with second_service.client() as other:
        for turn in range(40):
            asked = {"role": "user", "content": f"q{turn} " + "x" * 200}
            append(client, conversation, asked, {"role": "assistant", "content": "y" * 200})
            query = {"max_tokens": 1_000, "format": "openai"}
            made = context(client, conversation, **query)
            assert made == context(other, conversation, **query)
            assert made["tokens"] <= 1_000
            places.append(made["from_seq"])
    assert places == sorted(places)
    assert len(set(places)) < 20
    kept = context(client, conversation, max_messages=10)
    assert len(kept["messages"]) <= 10
    assert kept["left_out"]["messages"] == 80 - len(kept["messages"])
    assert len(context(client, conversation, max_turns=3, keep_ratio=1)["messages"]) == 6


def test_a_regenerated_answer_moves_no_cut(client: httpx.Client) -> None:
    conversation = create(client, new_id())
    for _ in range(30):
        append(
            client,
            conversation,
            {"role": "user", "content": "x" * 200},
            {"role": "assistant", "content": "y" * 200},
        )
    before = context(client, conversation, max_tokens=1_500)["from_seq"]
    for _ in range(4):
        client.delete(f"/conversations/{conversation}/messages", params={"after": 59}).raise_for_status()
        append(client, conversation, {"role": "assistant", "content": "z" * 200})
        assert context(client, conversation, max_tokens=1_500)["from_seq"] == before
        client.post(f"/conversations/{conversation}/pop").raise_for_status()
        append(client, conversation, {"role": "assistant", "content": "z" * 200})
        assert context(client, conversation, max_tokens=1_500)["from_seq"] == before
        client.delete(f"/conversations/{conversation}/messages", params={"after": 59}).raise_for_status()


def test_the_token_counts_of_callers_count(client: httpx.Client, conversation: str) -> None:
    said = [{"role": "user", "content": "x" * 4_000, "token_count": 10} for _ in range(20)]
    append(client, conversation, *said)
    made = context(client, conversation, max_tokens=100, keep_ratio=1)
    assert (made["tokens"], made["tokens_estimated"], len(made["messages"])) == (100, False, 10)


def test_totals_are_the_services_own(client: httpx.Client, conversation: str, operator: Any) -> None:
    for name in ("_tokens_before", "_turns_before"):
        answer = client.post(f"/conversations/{conversation}/messages", json={"role": "user", name: 5})
        assert answer.status_code == 422
        assert name in answer.json()["detail"]
    append(client, conversation, *AGENT)
    append(client, conversation, AGENT[1])
    shown = history(client, conversation)["data"]
    assert not any(name.startswith("_") for each in shown for name in each)
    tokens = turns = 0
    for each in operator.messages.find({"conversation_id": conversation}).sort("seq", 1):
        assert (each["_tokens_before"], each["_turns_before"]) == (tokens, turns)
        tokens, turns = tokens + tokens_of(shown[each["seq"] - 1])[0], turns + begins_turn(each)
    about = operator.conversations.find_one({"_id": conversation})
    assert (about["tokens_total"], about["turns_total"]) == (tokens, turns)


def test_large_messages_are_cut_by_the_bytes_of_an_answer(client: httpx.Client, conversation: str) -> None:
    """32 MiB is the most of an answer, whatever the budget: pictures count as few tokens."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 6_000_000}}
    for _ in range(8):
        append(
            client,
            conversation,
            {"role": "user", "content": [picture]},
            {"role": "assistant", "content": "a"},
        )
    made = context(client, conversation)
    assert len(made["messages"]) == 10
    assert made["left_out"]["messages"] == 6


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"max_tokens": "10", "max_turns": "1"},
        {"max_tokens": "0"},
        {"max_tokens": "-5"},
        {"max_tokens": "1e3"},
        {"max_turns": "5", "keep_ratio": "1.5"},
        {"max_turns": "5", "keep_ratio": "nan"},
        {"max_turns": "5", "format": "gemini"},
        {"max_turns": "5", "repair": "yes"},
        {"max_turns": "5", "tool_results": "keep"},
        {"max_turns": "5", "tool_results": "over:2,keep:3,"},
        {"max_turns": "5", "tool_results": "keep:-1"},
        {"max_turns": "5", "other": "1"},
    ],
)
def test_a_wrong_question_is_refused(client: httpx.Client, conversation: str, query: dict[str, str]) -> None:
    answer = client.get(f"/conversations/{conversation}/context", params=query)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"].endswith(".")
