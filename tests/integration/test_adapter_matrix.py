"""One conversation, written in each form and read in each other: all see the same, over a real service.

A writer says the conversation as its framework or its model's API does; a reader returns what it sees as
`Seen`, which has no form. The cells are all pairs of the two.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import agent_framework
import httpx
import pytest
from agent_framework import Content
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic_ai.messages import (
    BinaryContent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)

from chat_history_client import AsyncChatHistoryClient, forms
from chat_history_client.agent_framework import ChatHistoryProvider
from chat_history_client.langchain import ChatHistoryMessages
from chat_history_client.openai_agents import ChatHistorySession
from chat_history_client.pydantic_ai import ChatHistoryStore
from tests.harness import Service, new_id, sent, whole_history

USER = "default"
PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\n a picture").decode()
PICTURE_URL = f"data:image/png;base64,{PICTURE}"
SYSTEM, QUESTION, THOUGHT, ANSWER = "Answer in one line.", "When can we sail?", "Two places.", "At 14:05."
EMDEN, LEER = {"place": "Emden"}, {"place": "Leer", "days": [1, 2.5, None]}
TIDE, WIND = "14:05", {"knots": 12}


@dataclass
class Seen:
    """What a reader sees of a conversation. Calls and results are `(place of the call, …)`."""

    texts: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    results: list[tuple[int, Any]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def says(self, role: str, text: str) -> None:
        self.texts.append((role, text))
        self._in_order(role)

    def shows(self, url: str) -> None:
        self.pictures.append(url)
        self._in_order("user")

    def calls_tool(self, call_id: str, name: str, arguments: Any) -> None:
        assert call_id
        assert call_id not in self.ids
        self.ids.append(call_id)
        self.calls.append((name, json.loads(arguments) if isinstance(arguments, str) else arguments))
        self._in_order("call")

    def has_result(self, call_id: str, value: Any) -> None:
        """Note a result with the place of its call; objects may be told as JSON text."""
        self.results.append((self.ids.index(call_id), _parsed(value)))
        self._in_order("result")

    def _in_order(self, kind: str) -> None:
        if self.order[-1:] != [kind]:
            self.order.append(kind)


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


EXPECTED = Seen(
    texts=[("system", SYSTEM), ("user", QUESTION), ("assistant", ANSWER)],
    pictures=[PICTURE_URL],
    # Both are calls of one tool, so that a name alone pairs no result.
    calls=[("look_up", EMDEN), ("look_up", LEER)],
    results=[(0, TIDE), (1, WIND)],
    order=["system", "user", "call", "result", "assistant"],
)


@dataclass
class World:
    """What writers and readers work with."""

    http: httpx.Client
    history: AsyncChatHistoryClient
    conversation: str


Writer: TypeAlias = Callable[[World], Awaitable[None]]
Reader: TypeAlias = Callable[[World], Awaitable[Seen]]


@pytest.fixture
async def world(service: Service, client: httpx.Client) -> AsyncIterator[World]:
    async with AsyncChatHistoryClient(service.url) as history:
        yield World(client, history, new_id())


# -- the writers ---------------------------------------------------------------------------------------

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": SYSTEM},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": QUESTION},
            {"type": "image_url", "image_url": {"url": PICTURE_URL}},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": THOUGHT,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "look_up", "arguments": json.dumps(EMDEN)}},
            {"id": "b", "type": "function", "function": {"name": "look_up", "arguments": json.dumps(LEER)}},
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": TIDE},
    {"role": "tool", "tool_call_id": "b", "content": json.dumps(WIND)},
    {"role": "assistant", "content": ANSWER},
]
ANTHROPIC: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": QUESTION},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}},
        ],
    },
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": THOUGHT, "signature": "sig"},
            {"type": "tool_use", "id": "a", "name": "look_up", "input": EMDEN},
            {"type": "tool_use", "id": "b", "name": "look_up", "input": LEER},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": TIDE},
            {
                "type": "tool_result",
                "tool_use_id": "b",
                "content": [{"type": "text", "text": json.dumps(WIND)}],
            },
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]
# The calls have no ids, as in most of Gemini's answers.
GEMINI: list[dict[str, Any]] = [
    {"role": "system", "parts": [{"text": SYSTEM}]},
    {
        "role": "user",
        "parts": [{"text": QUESTION}, {"inlineData": {"mimeType": "image/png", "data": PICTURE}}],
    },
    {
        "role": "model",
        "parts": [
            {"text": THOUGHT, "thought": True},
            {"functionCall": {"name": "look_up", "args": EMDEN}, "thoughtSignature": "sig"},
            {"functionCall": {"name": "look_up", "args": LEER}},
        ],
    },
    {
        "role": "user",
        "parts": [
            {"functionResponse": {"name": "look_up", "response": {"output": TIDE}}},
            {"functionResponse": {"name": "look_up", "response": WIND}},
        ],
    },
    {"role": "model", "parts": [{"text": ANSWER}]},
]
ITEMS: list[Any] = [
    {"role": "system", "content": SYSTEM},
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": QUESTION},
            {"type": "input_image", "image_url": PICTURE_URL, "detail": "auto"},
        ],
    },
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]},
    {"type": "function_call", "call_id": "a", "name": "look_up", "arguments": json.dumps(EMDEN)},
    {"type": "function_call", "call_id": "b", "name": "look_up", "arguments": json.dumps(LEER)},
    {"type": "function_call_output", "call_id": "a", "output": TIDE},
    {"type": "function_call_output", "call_id": "b", "output": json.dumps(WIND)},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": ANSWER}]},
]


def natively(messages: list[dict[str, Any]]) -> Writer:
    """Append messages as they are, and see them come back as they are."""

    async def write(world: World) -> None:
        await world.history.add_all_messages(world.conversation, messages, user_id=USER)
        assert list(map(sent, whole_history(world.http, world.conversation))) == messages

    return write


async def write_v1(world: World) -> None:
    await world.history.get_or_create_conversation(USER, world.conversation)
    answer = world.http.post(f"/v1/conversations/{world.conversation}/items", json={"items": ITEMS})
    assert answer.status_code == 200, answer.text


async def write_session(world: World) -> None:
    await ChatHistorySession(world.conversation, world.history).add_items(ITEMS)


async def write_langchain(world: World) -> None:
    calls: Any = [{"name": "look_up", "args": EMDEN, "id": "a"}, {"name": "look_up", "args": LEER, "id": "b"}]
    picture = {"type": "image", "base64": PICTURE, "mime_type": "image/png"}
    await ChatHistoryMessages(world.conversation, async_client=world.history).aadd_messages(
        [
            SystemMessage(SYSTEM),
            HumanMessage([{"type": "text", "text": QUESTION}, picture]),
            AIMessage("", tool_calls=calls, additional_kwargs={"reasoning_content": THOUGHT}),
            ToolMessage(TIDE, tool_call_id="a"),
            ToolMessage(json.dumps(WIND), tool_call_id="b"),
            AIMessage(ANSWER),
        ]
    )


async def write_pydantic_ai(world: World) -> None:
    picture = BinaryContent(base64.b64decode(PICTURE), media_type="image/png")
    messages: list[ModelMessage] = [
        ModelRequest([SystemPromptPart(SYSTEM), UserPromptPart([QUESTION, picture])]),
        ModelResponse(
            [ThinkingPart(THOUGHT), ToolCallPart("look_up", EMDEN, "a"), ToolCallPart("look_up", LEER, "b")]
        ),
        ModelRequest([ToolReturnPart("look_up", TIDE, "a"), ToolReturnPart("look_up", WIND, "b")]),
        ModelResponse([TextPart(ANSWER)]),
    ]
    await ChatHistoryStore(world.history).save(world.conversation, messages)


async def write_agent_framework(world: World) -> None:
    picture = Content.from_data(base64.b64decode(PICTURE), "image/png")
    calls = [
        Content.from_text_reasoning(text=THOUGHT),
        Content.from_function_call("a", "look_up", arguments=EMDEN),
        Content.from_function_call("b", "look_up", arguments=json.dumps(LEER)),
    ]
    results = [
        Content.from_function_result("a", result=TIDE),
        Content.from_function_result("b", result=WIND),
    ]
    messages = [
        agent_framework.Message("system", [SYSTEM]),
        agent_framework.Message("user", [QUESTION, picture]),
        agent_framework.Message("assistant", calls),
        agent_framework.Message("tool", results),
        agent_framework.Message("assistant", [ANSWER]),
    ]
    await ChatHistoryProvider(world.history).save_messages(world.conversation, messages)


WRITERS: dict[str, Writer] = {
    "chat-completions": natively(CHAT),
    "anthropic": natively(ANTHROPIC),
    "gemini": natively(GEMINI),
    "v1": write_v1,
    "agents": write_session,
    "langchain": write_langchain,
    "pydantic-ai": write_pydantic_ai,
    "agent-framework": write_agent_framework,
}

# -- the readers ---------------------------------------------------------------------------------------


async def read_chat_completions(world: World) -> Seen:
    seen = Seen()
    for message in forms.chat_completions(whole_history(world.http, world.conversation)):
        if message["role"] == "tool":
            seen.has_result(message["tool_call_id"], message["content"])
            continue
        content = message["content"]
        for part in content if isinstance(content, list) else [content] if content else []:
            if isinstance(part, dict) and part["type"] == "image_url":
                seen.shows(part["image_url"]["url"])
            else:
                seen.says(message["role"], part if isinstance(part, str) else part["text"])
        for call in message.get("tool_calls", []):
            seen.calls_tool(call["id"], call["function"]["name"], call["function"]["arguments"])
    return seen


async def read_anthropic(world: World) -> Seen:
    seen, form = Seen(), forms.anthropic(whole_history(world.http, world.conversation))
    seen.says("system", form["system"])
    roles = [message["role"] for message in form["messages"]]
    assert roles == ["user", "assistant"] * 2
    for message in form["messages"]:
        for block in message["content"]:
            match block:
                case {"type": "text", "text": text}:
                    seen.says(message["role"], text)
                case {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}:
                    seen.shows(f"data:{media_type};base64,{data}")
                case {"type": "tool_use", "id": call_id, "name": name, "input": arguments}:
                    seen.calls_tool(call_id, name, arguments)
                case {"type": "tool_result", "tool_use_id": call_id, "content": content}:
                    seen.has_result(call_id, content if isinstance(content, str) else content[0]["text"])
                case {"type": "thinking", "thinking": text, "signature": str()}:
                    seen.thoughts.append(text)
                case _:
                    raise AssertionError(block)
    return seen


async def read_gemini(world: World) -> Seen:
    """Pair as Gemini does where there are no ids: by name and place."""
    seen, form = Seen(), forms.gemini(whole_history(world.http, world.conversation))
    seen.says("system", form["system_instruction"]["parts"][0]["text"])
    assert [content["role"] for content in form["contents"]] == ["user", "model"] * 2
    answered = 0
    for content in form["contents"]:
        role = {"user": "user", "model": "assistant"}[content["role"]]
        for part in content["parts"]:
            blob = part.get("inlineData") or part.get("inline_data")
            call = part.get("functionCall") or part.get("function_call")
            response = part.get("functionResponse") or part.get("function_response")
            if blob:
                seen.shows(f"data:{blob.get('mimeType') or blob['mime_type']};base64,{blob['data']}")
            elif call:
                seen.calls_tool(call.get("id") or f"{len(seen.ids)}", call["name"], call["args"])
            elif response:
                assert response["name"] == "look_up"
                value = response["response"].get("output", response["response"])
                seen.has_result(response.get("id") or f"{answered}", value)
                answered += 1
            elif part.get("thought"):
                seen.thoughts.append(part["text"])
            else:
                seen.says(role, part["text"])
    return seen


def seen_in_items(items: Iterable[Any]) -> Seen:
    seen = Seen()
    for item in items:
        match item:
            case {"type": "function_call", "call_id": call_id, "name": name, "arguments": str(arguments)}:
                seen.calls_tool(call_id, name, arguments)
            case {"type": "function_call_output", "call_id": call_id, "output": output}:
                seen.has_result(call_id, output if isinstance(output, str) else output[0]["text"])
            case {"type": "reasoning", "summary": summary}:
                seen.thoughts += [part["text"] for part in summary]
            case {"role": role, "content": str(text)}:
                seen.says(role, text)
            case {"role": role, "content": parts}:
                for part in parts:
                    if part["type"] == "input_image":
                        seen.shows(part["image_url"])
                    else:
                        assert part["type"] == ("output_text" if role == "assistant" else "input_text")
                        seen.says(role, part["text"])
            case _:
                raise AssertionError(item)
    return seen


async def read_v1(world: World) -> Seen:
    answer = world.http.get(f"/v1/conversations/{world.conversation}/items?order=asc&limit=100")
    return seen_in_items(answer.json()["data"])


async def read_session(world: World) -> Seen:
    return seen_in_items(await ChatHistorySession(world.conversation, world.history).get_items())


async def read_langchain(world: World) -> Seen:
    seen, roles = Seen(), {"system": "system", "human": "user", "ai": "assistant"}
    found = await ChatHistoryMessages(world.conversation, async_client=world.history).aget_messages()
    ids = [message.id for message in found if message.id is not None]
    assert len(set(ids)) == len(ids)
    for message in found:
        if isinstance(message, ToolMessage):
            seen.has_result(message.tool_call_id, message.text)
            continue
        for block in message.content_blocks:
            match block:
                case {"type": "text", "text": text}:
                    seen.says(roles[message.type], str(text))
                case {"type": "image", "base64": data, "mime_type": media_type}:
                    seen.shows(f"data:{media_type};base64,{data}")
                case {"type": "reasoning", "reasoning": text}:
                    seen.thoughts.append(str(text))
                case {"type": "tool_call"}:
                    pass
                case _:
                    raise AssertionError(block)
        if isinstance(message, AIMessage) and message.tool_calls:
            assert len(message.tool_calls) == 2  # they were made at once
            for call in message.tool_calls:
                seen.calls_tool(call["id"] or "", call["name"], call["args"])
    return seen


async def read_pydantic_ai(world: World) -> Seen:
    seen = Seen()
    found = await ChatHistoryStore(world.history).load(world.conversation)
    assert [len(message.parts) for message in found if isinstance(message.parts[0], ToolReturnPart)] == [2]
    for part in (part for message in found for part in message.parts):
        match part:
            case SystemPromptPart(content):
                seen.says("system", content)
            case UserPromptPart(content):
                for each in [content] if isinstance(content, str) else content:
                    if isinstance(each, str):
                        seen.says("user", each)
                    else:
                        assert isinstance(each, BinaryContent)
                        seen.shows(each.data_uri)
            case TextPart(content):
                seen.says("assistant", content)
            case ThinkingPart(content):
                seen.thoughts.append(content)
            case ToolCallPart():
                seen.calls_tool(part.tool_call_id, part.tool_name, part.args)
            case ToolReturnPart():
                assert part.tool_name == "look_up"
                seen.has_result(part.tool_call_id, part.content)
            case _:
                raise AssertionError(part)
    return seen


async def read_agent_framework(world: World) -> Seen:
    seen = Seen()
    for message in await ChatHistoryProvider(world.history).get_messages(world.conversation):
        for content in message.contents:
            if content.type == "text":
                seen.says(message.role, content.text or "")
            elif content.type in {"data", "uri"}:
                seen.shows(content.uri or "")
            elif content.type == "text_reasoning":
                seen.thoughts.append(content.text or "")
            elif content.type == "function_call":
                seen.calls_tool(content.call_id or "", content.name or "", content.arguments)
            else:
                assert (message.role, content.type) == ("tool", "function_result")
                seen.has_result(content.call_id or "", content.result)
    return seen


READERS: dict[str, Reader] = {
    "chat-completions": read_chat_completions,
    "anthropic": read_anthropic,
    "gemini": read_gemini,
    "v1": read_v1,
    "agents": read_session,
    "langchain": read_langchain,
    "pydantic-ai": read_pydantic_ai,
    "agent-framework": read_agent_framework,
}
# No model takes another's reasoning, so these three show it where they wrote it themselves.
SHOWS_OWN_THOUGHTS_ONLY = {"anthropic", "gemini", "chat-completions"}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", WRITERS)
async def test_what_one_writes_every_other_reads_as_the_same(world: World, writer: str, reader: str) -> None:
    await WRITERS[writer](world)
    seen = await READERS[reader](world)
    thoughts, ids = seen.thoughts, seen.ids
    seen.thoughts, seen.ids = [], []
    assert seen == EXPECTED
    assert len(set(ids)) == 2
    if reader not in SHOWS_OWN_THOUGHTS_ONLY:
        assert thoughts == [THOUGHT]
    elif reader != "chat-completions":
        assert thoughts == ([THOUGHT] if reader == writer else [])


async def test_the_calls_of_gemini_which_have_no_ids_are_told_apart_in_every_turn(world: World) -> None:
    await natively(GEMINI)(world)
    await world.history.add_all_messages(world.conversation, GEMINI[1:], user_id=USER)
    seen = await read_v1(world)
    assert len(set(seen.ids)) == 4
    assert [place for place, _ in seen.results] == [0, 1, 2, 3]
