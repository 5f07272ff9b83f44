"""The chat store of LlamaIndex, with LlamaIndex's own classes; `make compat` runs this, against a service."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.storage.chat_store import SimpleChatStore

from chat_history_client import ChatHistoryClient, Conflict, forms
from chat_history_client.llama_index import ChatHistoryChatStore

PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR a picture").decode()
EMDEN, LEER = {"place": "Emden"}, {"place": "Leer"}
MESSAGES = [
    ChatMessage("Answer in one line.", role="system"),
    ChatMessage(
        role="user",
        blocks=[TextBlock(text="When?"), ImageBlock(image=PICTURE.encode(), image_mimetype="image/png")],
    ),
    ChatMessage(
        role="assistant",
        blocks=[
            ThinkingBlock(content="Two places."),
            ToolCallBlock(tool_call_id="a", tool_name="look_up", tool_kwargs=EMDEN),
            ToolCallBlock(tool_call_id="b", tool_name="look_up", tool_kwargs=LEER),
        ],
    ),
    ChatMessage("14:05", role="tool", additional_kwargs={"tool_call_id": "a", "name": "look_up"}),
    ChatMessage("15:10", role="tool", additional_kwargs={"tool_call_id": "b", "name": "look_up"}),
    ChatMessage("At 14:05.", role="assistant"),
]
CALLS = [("a", "look_up", EMDEN), ("b", "look_up", LEER)]


@pytest.fixture
def history() -> Iterator[ChatHistoryClient]:
    with ChatHistoryClient(os.environ["COMPAT_URL"]) as client:
        yield client


@pytest.fixture
def key() -> str:
    return f"llama-{uuid4().hex}"


@pytest.fixture
def store(history: ChatHistoryClient) -> ChatHistoryChatStore:
    return ChatHistoryChatStore(history, user_id=f"user-{uuid4().hex}")


def test_it_does_what_llama_indexs_own_store_does(store: ChatHistoryChatStore, key: str) -> None:
    own = SimpleChatStore()
    steps: list[Any] = [
        lambda each: each.get_messages(key),
        lambda each: each.delete_message(key, 0),
        lambda each: each.set_messages(key, list(MESSAGES)),
        lambda each: each.get_messages(key),
        lambda each: each.add_message(key, ChatMessage("And now?", role="user")),
        lambda each: each.delete_message(key, 99),
        lambda each: each.delete_message(key, 1),
        lambda each: each.delete_last_message(key),
        lambda each: each.set_messages(key, [*MESSAGES[:1], ChatMessage("Else", role="user")]),
        lambda each: each.get_messages(key),
        lambda each: each.delete_messages(key),
        lambda each: each.get_messages(key),
    ]
    for place, step in enumerate(steps):
        assert step(store) == step(own), place
    assert store.get_keys() == [key]
    assert store.delete_last_message("nobody") is None


def test_a_set_keeps_what_the_history_begins_with(
    store: ChatHistoryChatStore, history: ChatHistoryClient, key: str
) -> None:
    store.set_messages(key, MESSAGES[:3])
    before = list(history.stream_chat_history(key))
    store.set_messages(key, list(MESSAGES))
    after = list(history.stream_chat_history(key))
    assert after[:3] == before
    assert [each["role"] for each in after] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert store.get_messages(key) == MESSAGES


def test_a_set_is_one_change_of_the_history(
    store: ChatHistoryChatStore, history: ChatHistoryClient, key: str
) -> None:
    store.set_messages(key, list(MESSAGES))
    before = history.get_conversation(key)
    changed = [*MESSAGES[:2], ChatMessage("Else", role="assistant")]
    store.set_messages(key, changed)
    assert store.get_messages(key) == changed
    after = history.get_conversation(key)
    assert (after["version"], after["message_count"]) == (before["version"] + 1, 3)
    # More than a request holds is changed nevertheless.
    many = [ChatMessage(f"{number}", role="user") for number in range(1_100)]
    store.set_messages(key, many)
    assert store.get_messages(key) == many
    store.set_messages(key, [])
    assert store.get_messages(key) == []


def test_others_read_what_it_wrote(store: ChatHistoryChatStore, history: ChatHistoryClient, key: str) -> None:
    store.set_messages(key, list(MESSAGES))
    chat = forms.chat_completions(history.stream_chat_history(key))
    assert [message["role"] for message in chat] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert chat[1]["content"][1]["image_url"]["url"] == f"data:image/png;base64,{PICTURE}"
    calls = [(call["id"], call["function"]["name"]) for call in chat[2]["tool_calls"]]
    assert calls == [(call_id, name) for call_id, name, _ in CALLS]
    assert [(each["tool_call_id"], each["content"]) for each in chat[3:5]] == [("a", "14:05"), ("b", "15:10")]
    items = list(history.stream_items(key))
    assert [item["type"] for item in items] == [
        "message",
        "message",
        "reasoning",
        "function_call",
        "function_call",
        "function_call_output",
        "function_call_output",
        "message",
    ]


ITEMS: list[Any] = [
    {"role": "user", "content": [{"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}"}]},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Two places."}]},
    {"type": "function_call", "call_id": "a", "name": "look_up", "arguments": json.dumps(EMDEN)},
    {"type": "function_call", "call_id": "b", "name": "look_up", "arguments": json.dumps(LEER)},
    {"type": "function_call_output", "call_id": "a", "output": "14:05"},
    {"type": "function_call_output", "call_id": "b", "output": "15:10"},
    {"role": "assistant", "content": "At 14:05."},
]


def test_it_reads_what_others_wrote(history: ChatHistoryClient, key: str) -> None:
    history.add_all_items(key, ITEMS, user_id="ada")
    store = ChatHistoryChatStore(history, user_id="ada")
    user, answer, first, second, last = store.get_messages(key)
    (picture,) = user.blocks
    assert isinstance(picture, ImageBlock)
    assert (picture.image, picture.image_mimetype) == (PICTURE.encode(), "image/png")
    calls = [block for block in answer.blocks if isinstance(block, ToolCallBlock)]
    assert [(call.tool_call_id, call.tool_name, json.loads(str(call.tool_kwargs))) for call in calls] == CALLS
    assert [(each.content, each.additional_kwargs["tool_call_id"]) for each in (first, second)] == [
        ("14:05", "a"),
        ("15:10", "b"),
    ]
    assert last.content == "At 14:05."
    # The answer is three items, which go together.
    assert store.delete_message(key, 1) == answer
    assert list(history.stream_items(key)) == [ITEMS[0], *ITEMS[4:]]
    store.set_messages(key, store.get_messages(key)[:2])
    assert list(history.stream_items(key)) == [ITEMS[0], ITEMS[4]]


def test_it_keeps_what_the_service_cannot_store(
    store: ChatHistoryChatStore, history: ChatHistoryClient, key: str
) -> None:
    odd = {"nan": math.nan, "large": 2**64, "half": "\ud83d", "key": {"a\0": 1}}
    given = [
        ChatMessage("half \ud83d", role="tool", additional_kwargs={"tool_call_id": "a", **odd}),
        ChatMessage(
            role="assistant", blocks=[ToolCallBlock(tool_call_id="a", tool_name="f", tool_kwargs=odd)]
        ),
    ]
    store.set_messages(key, given)
    assert [json.dumps(each.model_dump(), sort_keys=True) for each in store.get_messages(key)] == [
        json.dumps(each.model_dump(), sort_keys=True) for each in given
    ]
    assert next(history.stream_chat_history(key))["content"] == "half \ufffd"


def test_the_second_user_of_a_key_is_told_at_the_first_read(
    store: ChatHistoryChatStore, history: ChatHistoryClient, key: str
) -> None:
    assert store.get_messages(key) == []
    with pytest.raises(Conflict, match="belongs to another user than 'grace'"):
        ChatHistoryChatStore(history, user_id="grace").get_messages(key)


async def test_a_memory_of_llama_index_remembers(store: ChatHistoryChatStore, key: str) -> None:
    memory = ChatMemoryBuffer.from_defaults(
        chat_store=store, chat_store_key=key, token_limit=10_000, tokenizer_fn=str.split
    )
    for message in MESSAGES:
        await memory.aput(message)
    other = ChatMemoryBuffer.from_defaults(
        chat_store=store, chat_store_key=key, token_limit=10_000, tokenizer_fn=str.split
    )
    assert await other.aget_all() == MESSAGES
    memory.reset()
    assert other.get_all() == []


def test_the_example_of_the_documents_works() -> None:
    page = (Path(__file__).parents[2] / "docs" / "clients" / "llama-index.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", os.environ["COMPAT_URL"]), names)
    names["memory"].put(MESSAGES[0])
    assert names["store"].get_messages("ada-llama") == [MESSAGES[0]]
    names["memory"].reset()
    names["history"].close()
