"""What the adapters do beside reading each other: odd values, owners, runs of the frameworks' agents."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import agent_framework
import httpx
import pytest
from agent_framework import AgentSession, BaseChatClient, ChatResponse, Content, FunctionInvocationLayer
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    ToolMessage,
    messages_to_dict,
)
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import Field
from pydantic_ai.messages import (
    ImageUrl,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)

from chat_history_client import AsyncChatHistoryClient, ChatHistoryClient, Conflict, forms
from chat_history_client.agent_framework import ChatHistoryProvider
from chat_history_client.langchain import ChatHistoryMessages
from chat_history_client.langchain_agents import ChatHistoryMiddleware
from chat_history_client.openai_agents import ChatHistorySession
from chat_history_client.pydantic_ai import ChatHistoryStore
from tests.harness import create, keys, new_id, new_key, running, whole_history

# -- what the service cannot store ---------------------------------------------------------------------

ODD: dict[str, Any] = {
    "nan": math.nan,
    "infinity": [-math.inf, 1.5],
    "large": 2**64,
    "half an emoji": "a \ud83d b",
    "key": {"a\0": {"\ud83d": 1}},
    "looks kept": {"chat_history_exact": "{}", "langchain_exact": 1, "$json": "NaN"},
}
READABLE = {
    "nan": "NaN",
    "infinity": ["-Infinity", 1.5],
    "large": "18446744073709551616",
    "half an emoji": "a \ufffd b",
    "key": {"a\ufffd": {"\ufffd": 1}},
    "looks kept": ODD["looks kept"],
}


def told(value: Any) -> str:
    """A text by which NaN equals itself."""
    return json.dumps(value, default=lambda other: other.url)


def outputs(client: httpx.Client, conversation: str) -> list[Any]:
    """The results of tools that another reader sees."""
    answer = client.get(f"/v1/conversations/{conversation}/items?order=asc")
    assert answer.status_code == 200, answer.text
    assert 'chat_history_exact":"{\\"' not in answer.text
    return [item["output"] for item in answer.json()["data"] if item["type"] == "function_call_output"]


async def test_a_session_keeps_what_the_service_cannot_store(
    history: AsyncChatHistoryClient, client: httpx.Client
) -> None:
    session = ChatHistorySession(new_id(), history)
    items: list[Any] = [
        {"type": "function_call_output", "call_id": "a", "output": "half \ud83d"},
        {
            "type": "function_call_output",
            "call_id": "b",
            "output": [{"type": "input_text", "text": "\udfff"}],
        },
        {"type": "of_next_month", "value": ODD},
        {"role": "user", "content": "fine", "chat_history_exact": "{}"},
    ]
    await session.add_items(items)
    assert told(await session.get_items()) == told(items)
    assert told(await session.get_items(2)) == told(items[2:])
    assert outputs(client, session.session_id) == ["half \ufffd", [{"type": "input_text", "text": "\ufffd"}]]
    assert [told(await session.pop_item()) for _ in items] == list(map(told, reversed(items)))


def test_langchains_history_keeps_what_the_service_cannot_store(
    sync_history: ChatHistoryClient, client: httpx.Client
) -> None:
    messages = ChatHistoryMessages(new_id(), sync_history)
    given: list[BaseMessage] = [
        AIMessage("", tool_calls=[{"name": "f", "args": ODD, "id": "a"}]),
        ToolMessage("half \ud83d", tool_call_id="a", artifact=ODD),
        HumanMessage("fine"),
    ]
    messages.add_messages(given)
    assert told(messages_to_dict(messages.messages)) == told(messages_to_dict(given))
    assert outputs(client, messages.session_id) == ["half \ufffd"]
    stored = whole_history(client, messages.session_id)
    assert stored[0]["tool_calls"][0]["args"] == READABLE
    assert ["langchain_exact" in each for each in stored] == [True, True, False]


async def test_pydantic_ais_store_keeps_what_the_service_cannot_store(
    history: AsyncChatHistoryClient, client: httpx.Client
) -> None:
    store, conversation = ChatHistoryStore(history), new_id()
    given: list[ModelMessage] = [
        ModelResponse([ToolCallPart("f", ODD, "a"), ToolCallPart("f", "half \ud83d", "b")]),
        ModelRequest([ToolReturnPart("f", ODD, "a"), ToolReturnPart("f", "half \ud83d", "b")]),
        ModelRequest([ToolReturnPart("f", {"fine": 1}, "c")]),
        ModelRequest([UserPromptPart(["half \ud83d", ImageUrl("https://x/y.png")])]),
    ]
    await store.save(conversation, given)
    loaded = await store.load(conversation)
    for one, other in zip(loaded, given, strict=True):
        for part, expected in zip(one.parts, other.parts, strict=True):
            for name in ("content", "args"):
                assert told(getattr(part, name, None)) == told(getattr(expected, name, None))
    first, second, _ = outputs(client, conversation)
    assert json.loads(first) == READABLE
    assert second == "half \ufffd"


async def test_agent_frameworks_provider_keeps_what_the_service_cannot_store(
    history: AsyncChatHistoryClient, client: httpx.Client
) -> None:
    provider, session = ChatHistoryProvider(history), new_id()
    given = [
        agent_framework.Message("assistant", [Content.from_function_call("a", "f", arguments=ODD)]),
        agent_framework.Message("tool", [Content.from_function_result("a", result="half \ud83d")]),
        agent_framework.Message("user", ["fine"], additional_properties=ODD),
    ]
    await provider.save_messages(session, given)
    loaded = await provider.get_messages(session)
    assert told([each.to_dict() for each in loaded]) == told([each.to_dict() for each in given])
    assert outputs(client, session) == ["half \ufffd"]


# -- two users, one name -------------------------------------------------------------------------------

Read = Callable[[str, str], Awaitable[Any]]


def reads(asynchronous: AsyncChatHistoryClient, synchronous: ChatHistoryClient) -> dict[str, Read]:
    """How each adapter reads first, given the name and the user."""

    async def langchain(name: str, user: str) -> Any:
        return ChatHistoryMessages(name, synchronous, user_id=user).messages

    async def middleware(name: str, user: str) -> Any:
        agent = create_agent(
            Scripted(answers=["paid for"]), middleware=[ChatHistoryMiddleware(async_client=asynchronous)]
        )
        config: Any = {"configurable": {"thread_id": name, "user_id": user}}
        return (await agent.ainvoke({"messages": [HumanMessage("hi")]}, config))["messages"][2:]

    return {
        "session": lambda name, user: ChatHistorySession(name, asynchronous, user_id=user).get_items(),
        "session, some": lambda name, user: ChatHistorySession(name, asynchronous, user_id=user).get_items(5),
        "langchain": langchain,
        "langchain, async": lambda name, user: ChatHistoryMessages(
            name, async_client=asynchronous, user_id=user
        ).aget_messages(),
        "middleware": middleware,
        "pydantic-ai": lambda name, user: ChatHistoryStore(asynchronous, user_id=user).load(name),
        "agent-framework": lambda name, user: ChatHistoryProvider(asynchronous, user_id=user).get_messages(
            name
        ),
    }


async def test_the_second_user_of_a_name_is_told_at_the_first_read(
    history: AsyncChatHistoryClient, sync_history: ChatHistoryClient, client: httpx.Client
) -> None:
    for kind, read in reads(history, sync_history).items():
        name = create(client, new_id(), user="ada")
        with pytest.raises(Conflict) as refused:
            await read(name, "grace")
        assert refused.value.status == 409, kind
        assert refused.value.detail == (
            f"The conversation {name!r} belongs to another user than 'grace'. Give each user's conversation "
            "an id of its own, for example one that begins with the user's id."
        )
        assert whole_history(client, name) == []


async def test_a_name_that_nobody_has_begins_empty_and_is_then_the_readers(
    history: AsyncChatHistoryClient, sync_history: ChatHistoryClient
) -> None:
    for kind, read in reads(history, sync_history).items():
        name = new_id()
        assert await read(name, "ada") == [], kind
        assert (await history.get_conversation(name))["user_id"] == "ada"
        with pytest.raises(Conflict):
            await read(name, "grace")


async def test_a_key_that_may_only_read_finds_nothing_and_makes_nothing(tmp_path: Any) -> None:
    with running(tmp_path, auth="key") as guarded:
        key = new_key(guarded, "read")
        async with AsyncChatHistoryClient(guarded.url, api_key=key) as history:
            with ChatHistoryClient(guarded.url, api_key=key) as sync_history:
                for kind, read in reads(history, sync_history).items():
                    if kind != "middleware":  # which writes
                        assert await read("nobody", "ada") == [], kind
        assert "read" in keys(guarded, "list")


# -- LangChain's agents ----------------------------------------------------------------------------------


class Scripted(BaseChatModel):
    """A model that gives answers in order, and keeps what it was sent."""

    answers: list[Any]
    sent: list[Any] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        del tools, kwargs
        return self

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        del args, kwargs
        self.sent.append(list(messages))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        message = AIMessage(answer) if isinstance(answer, str) else AIMessage("", tool_calls=answer)
        return ChatResult(generations=[ChatGeneration(message=message)])


@tool
def high_tide(place: str) -> str:
    """Tell the time of the next high tide."""
    return f"{place}: 14:05"


CALLS = [
    {"name": "high_tide", "args": {"place": "Emden"}, "id": "a"},
    {"name": "high_tide", "args": {"place": "Leer"}, "id": "b"},
]
CONFIG: Any = {"configurable": {}}


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread, "user_id": "ada"}}


def asked(text: str) -> Any:
    return {"messages": [HumanMessage(text)]}


def kinds(messages: Sequence[BaseMessage]) -> list[str]:
    return [message.type for message in messages]


TURN = ["human", "ai", "tool", "tool", "ai"]


@pytest.mark.parametrize("with_checkpointer", [False, True])
async def test_an_agent_of_langchain_remembers_by_the_middleware(
    history: AsyncChatHistoryClient, with_checkpointer: bool
) -> None:
    thread, model = new_id(), Scripted(answers=[CALLS, "At 14:05.", "Emden and Leer."], sent=[])
    for_runs = InMemorySaver() if with_checkpointer else None
    agent = create_agent(
        model,
        [high_tide],
        middleware=[ChatHistoryMiddleware(async_client=history)],
        checkpointer=for_runs,
    )
    first = await agent.ainvoke(asked("When?"), config(thread))
    second = await agent.ainvoke(asked("Where did I ask for?"), config(thread))
    assert kinds(first["messages"]) == TURN
    assert kinds(model.sent[-1]) == [*TURN, "human"]
    assert kinds(second["messages"]) == [*TURN, "human", "ai"]
    stored = await ChatHistoryMessages(thread, async_client=history, user_id="ada").aget_messages()
    assert stored == second["messages"]
    assert "chat_history_stored" not in second
    ids = [message["id"] async for message in history.stream_chat_history(thread)]
    assert ids == [message.id for message in stored]


def test_it_does_the_same_synchronously_and_reads_what_others_wrote(
    sync_history: ChatHistoryClient, client: httpx.Client
) -> None:
    thread = create(client, new_id(), user="ada")
    native: list[Any] = [{"role": "user", "content": "Hello"}, {"role": "model", "parts": [{"text": "Moin"}]}]
    sync_history.add_messages(thread, native)
    # A message without an id, which LangGraph would take for a new one.
    ChatHistoryMessages(thread, sync_history, user_id="ada").add_messages([HumanMessage("No id")])
    model = Scripted(answers=[CALLS, "At 14:05."], sent=[])
    middleware = ChatHistoryMiddleware(sync_history, conversation_id=thread, user_id="ada")
    create_agent(model, [high_tide], middleware=[middleware]).invoke(asked("When?"))
    assert [message.text for message in model.sent[0]] == ["Hello", "Moin", "No id", "When?"]
    roles = [message["role"] for message in whole_history(client, thread)]
    assert roles == ["user", "model", "user", "user", "assistant", "tool", "tool", "assistant"]


async def test_a_run_that_fails_leaves_no_call_without_its_result(history: AsyncChatHistoryClient) -> None:
    thread, model = new_id(), Scripted(answers=[CALLS, RuntimeError("away")], sent=[])
    agent = create_agent(model, [high_tide], middleware=[ChatHistoryMiddleware(async_client=history)])
    with pytest.raises(RuntimeError, match="away"):
        await agent.ainvoke(asked("When?"), config(thread))
    roles = [message["role"] async for message in history.stream_chat_history(thread)]
    assert roles == ["user", "assistant", "tool", "tool"]

    @tool
    def broken(place: str) -> str:
        """Fail."""
        raise RuntimeError(place)

    thread, call = new_id(), [{"name": "broken", "args": {"place": "x"}, "id": "a"}]
    agent = create_agent(
        Scripted(answers=[call], sent=[]), [broken], middleware=[ChatHistoryMiddleware(async_client=history)]
    )
    with pytest.raises(RuntimeError):
        await agent.ainvoke(asked("When?"), config(thread))
    assert [message["role"] async for message in history.stream_chat_history(thread)] == ["user"]


async def test_a_summary_shortens_what_the_model_sees_and_not_the_history(
    history: AsyncChatHistoryClient,
) -> None:
    thread, writer = new_id(), Scripted(answers=["the gist"] * 9, sent=[])
    shorten = SummarizationMiddleware(writer, trigger=("messages", 4), keep=("messages", 2))
    model = Scripted(answers=[CALLS, "At 14:05.", "Yes.", "No."], sent=[])
    middleware: list[Any] = [ChatHistoryMiddleware(async_client=history), shorten]
    agent = create_agent(model, [high_tide], middleware=middleware)
    for text in ("When?", "Sure?", "Really?"):
        await agent.ainvoke(asked(text), config(thread))
    assert writer.sent
    assert any("the gist" in message.text for message in model.sent[-1])
    stored = await ChatHistoryMessages(thread, async_client=history, user_id="ada").aget_messages()
    assert kinds(stored) == [*TURN, "human", "ai", "human", "ai"]
    assert not any("the gist" in message.text for message in stored)


async def test_a_middleware_that_knows_no_conversation_says_so(history: AsyncChatHistoryClient) -> None:
    agent = create_agent(
        Scripted(answers=["x"], sent=[]), middleware=[ChatHistoryMiddleware(async_client=history)]
    )
    with pytest.raises(ValueError, match="thread_id"):
        await agent.ainvoke(asked("hi"))
    with pytest.raises(ValueError, match="ChatHistoryClient"):
        create_agent(
            Scripted(answers=["x"], sent=[]), middleware=[ChatHistoryMiddleware(async_client=history)]
        ).invoke(asked("hi"), config(new_id()))


def test_messages_with_ids_of_their_own_are_stored_once_by_them(
    sync_history: ChatHistoryClient, client: httpx.Client
) -> None:
    conversation = new_id()
    messages = [{"role": "user", "content": f"{n}", "id": f"m{n}"} for n in range(1_500)]
    for _ in range(2):
        sync_history.add_all_messages(conversation, messages, user_id="ada")
    assert [each["id"] for each in whole_history(client, conversation)] == [each["id"] for each in messages]


# -- agent-framework -------------------------------------------------------------------------------------


class ScriptedClient(FunctionInvocationLayer, BaseChatClient):
    """A chat client of agent-framework that gives answers in order, and keeps what it was sent."""

    def __init__(self, *answers: agent_framework.Message) -> None:
        super().__init__()
        self.answers = list(answers)
        self.sent: list[list[agent_framework.Message]] = []

    def _inner_get_response(self, *, messages: Any, stream: bool, options: Any, **kwargs: Any) -> Any:
        del options, kwargs
        assert not stream
        self.sent.append(list(messages))

        async def answer() -> Any:
            return ChatResponse(messages=[self.answers.pop(0)])

        return answer()


def look_up(place: str) -> str:
    """Tell the time of the next high tide."""
    return f"{place}: 14:05"


async def test_an_agent_of_agent_framework_remembers(
    history: AsyncChatHistoryClient, client: httpx.Client
) -> None:
    calls = [
        Content.from_function_call("a", "look_up", arguments='{"place": "Emden"}'),
        Content.from_function_call("b", "look_up", arguments='{"place": "Leer"}'),
    ]
    model = ScriptedClient(
        agent_framework.Message("assistant", calls),
        agent_framework.Message("assistant", ["At 14:05."]),
        agent_framework.Message("assistant", ["Emden and Leer."]),
    )
    provider, name = ChatHistoryProvider(history, user_id="ada"), new_id()
    agent = agent_framework.Agent(client=model, tools=[look_up], context_providers=[provider])
    first = await agent.run("When?", session=AgentSession(session_id=name))
    assert first.text == "At 14:05."
    # Another process begins with the session's id only.
    await agent.run("Where did I ask for?", session=AgentSession(session_id=name))
    seen = model.sent[-1]
    assert [message.role for message in seen] == ["user", "assistant", "tool", "assistant", "user"]
    results = [
        content for message in seen for content in message.contents if content.type == "function_result"
    ]
    assert [(each.call_id, each.result) for each in results] == [("a", "Emden: 14:05"), ("b", "Leer: 14:05")]
    chat = forms.chat_completions(whole_history(client, name))
    roles = [message["role"] for message in chat]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user", "assistant"]


async def test_agent_frameworks_messages_are_restored_equal(history: AsyncChatHistoryClient) -> None:
    provider, session = ChatHistoryProvider(history), new_id()
    messages = [
        agent_framework.Message("user", ["hi"], author_name="ada", message_id="m1"),
        agent_framework.Message("user", [Content.from_uri("https://x/y.png", media_type="image/png")]),
        agent_framework.Message("assistant", [Content.from_text_reasoning(text="hm", protected_data="sig")]),
        agent_framework.Message("tool", [Content.from_function_result("a", result={"a": 1}, exception="no")]),
        agent_framework.Message("critic", ["odd"], additional_properties={"a": {"b": None}}),
        agent_framework.Message("assistant", []),
    ]
    assert await provider.get_messages(session) == []
    await provider.save_messages(session, messages)
    loaded = await provider.get_messages(session)
    assert [each.to_dict() for each in loaded] == [each.to_dict() for each in messages]
    with pytest.raises(ValueError, match="session"):
        await provider.get_messages(None)
