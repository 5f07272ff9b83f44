"""Adapters with a limit in tokens: what the model is sent is the service's context, and the history stays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from agents import Agent, RunConfig, Runner, SessionSettings, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from chat_history_client import AsyncChatHistoryClient, ChatHistoryClient, Conflict
from chat_history_client.langchain_agents import ChatHistoryMiddleware
from chat_history_client.openai_agents import ChatHistorySession
from tests.harness import new_id
from tests.integration.test_adapters import Scripted

TURNS = 12
TOKENS = 1_500
RESULT = "14:05 " * 120


def moves(beginnings: list[Any]) -> int:
    """How often the beginning of what is sent has moved."""
    return sum(before != after for before, after in pairwise(beginnings))


# -- the Agents SDK --------------------------------------------------------------------------------------


@function_tool
def look_up(place: str) -> str:
    return f"{place}: {RESULT}"


async def test_a_session_with_a_limit_in_tokens_sends_the_context(history: AsyncChatHistoryClient) -> None:
    answers: list[Any] = []
    for turn in range(TURNS):
        answers += [
            [function_call("look_up", {"place": "Emden"}, call_id=f"call_{turn}", item_id=f"fc_{turn}")],
            [assistant_message(f"Answer {turn}", item_id=f"msg_{turn}")],
        ]
    model = ScriptedModel(answers)
    agent, config = Agent(name="tides", model=model, tools=[look_up]), RunConfig(tracing_disabled=True)
    name = new_id("session")
    beginnings = []
    for turn in range(TURNS):
        # Another process begins with the name of the session only.
        session = ChatHistorySession(name, history, max_context_tokens=TOKENS)
        before = await session.get_items()
        await Runner.run(agent, f"Question {turn}", session=session, run_config=config)
        assert model.last_call is not None
        sent: Any = model.last_call.input
        assert sent[: len(before)] == before
        calls, results = (
            [item["call_id"] for item in sent if item.get("type") == kind]
            for kind in ("function_call", "function_call_output")
        )
        assert calls == results
        assert sent[0]["role"] == "user"
        beginnings.append(sent[0]["content"])
    whole = await ChatHistorySession(name, history).get_items()
    assert len(whole) == 4 * TURNS
    context = await history.get_context(name, max_tokens=TOKENS, format="responses")
    limited = ChatHistorySession(name, history, max_context_tokens=TOKENS)
    assert await limited.get_items() == context["messages"] == whole[-len(context["messages"]) :]
    assert 0 < context["tokens"] <= TOKENS
    assert 0 < moves(beginnings) < TURNS / 2
    # A number of items is what it is without the limit, wherever it is said.
    assert await limited.get_items(limit=30) == whole[-30:]
    counted = SessionSettings(limit=30)
    both = ChatHistorySession(name, history, max_context_tokens=TOKENS, session_settings=counted)
    assert await both.get_items() == whole[-30:]


async def test_a_session_with_a_limit_keeps_odd_values_and_its_owner(history: AsyncChatHistoryClient) -> None:
    name = new_id("session")
    session = ChatHistorySession(name, history, user_id="ada", max_context_tokens=TOKENS)
    assert await session.get_items() == []
    with pytest.raises(Conflict):
        await ChatHistorySession(name, history, user_id="grace", max_context_tokens=TOKENS).get_items()
    items: list[Any] = [
        {"role": "user", "content": "half \ud83d"},
        {"type": "of_next_month", "value": 2**64},
        {"role": "assistant", "content": "fine"},
    ]
    await session.add_items(items)
    assert await session.get_items() == items
    await history.create_checkpoint(name, 3, "The gist.")
    summary: Any = await session.get_items()
    assert [item["role"] for item in summary] == ["user"]
    assert "The gist." in str(summary[0]["content"])


# -- LangChain's agents ----------------------------------------------------------------------------------


# What LangChain says of a message beside its text counts, too.
MORE_TOKENS = 4_000


@tool
def high_tide(place: str) -> str:
    """Tell the time of the next high tide."""
    return f"{place}: {RESULT}"


def script() -> Scripted:
    answers: list[Any] = []
    for turn in range(TURNS):
        answers += [[{"name": "high_tide", "args": {"place": "Emden"}, "id": f"c{turn}"}], f"Answer {turn}"]
    return Scripted(answers=answers, sent=[])


def is_whole(messages: list[BaseMessage]) -> bool:
    """Tell whether each call is followed by its result, and no result is without its call."""
    calls = [call["id"] for each in messages if isinstance(each, AIMessage) for call in each.tool_calls]
    return calls == [each.tool_call_id for each in messages if isinstance(each, ToolMessage)]


@pytest.mark.parametrize("with_checkpointer", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_the_middleware_with_a_limit_in_tokens_begins_with_the_context(
    history: AsyncChatHistoryClient,
    sync_history: ChatHistoryClient,
    with_checkpointer: bool,
    asynchronous: bool,
) -> None:
    thread, model = new_id(), script()
    middleware = ChatHistoryMiddleware(sync_history, async_client=history, max_context_tokens=MORE_TOKENS)
    agent = create_agent(
        model,
        [high_tide],
        middleware=[middleware],
        checkpointer=InMemorySaver() if with_checkpointer else None,
    )
    config: Any = {"configurable": {"thread_id": thread, "user_id": "ada"}}
    beginnings = []
    for turn in range(TURNS):
        asked: Any = {"messages": [HumanMessage(f"Question {turn}")]}
        context = (await history.get_context(thread, max_tokens=MORE_TOKENS))["messages"] if turn else []
        result = await agent.ainvoke(asked, config) if asynchronous else agent.invoke(asked, config)
        sent = model.sent[-1]
        assert [each.id for each in sent[: len(context)]] == [each["id"] for each in context]
        assert [each.type for each in sent[len(context) :]] == ["human", "ai", "tool"]
        assert is_whole(sent)
        assert sent[0].type == "human"
        assert result["messages"][:-1] == sent
        beginnings.append(sent[0].id)
    assert 0 < moves(beginnings) < TURNS / 2
    stored = [message async for message in history.stream_chat_history(thread)]
    assert [message["role"] for message in stored] == ["user", "assistant", "tool", "assistant"] * TURNS
    assert len({message["id"] for message in stored}) == 4 * TURNS


async def test_the_middleware_sends_the_summary_and_stores_neither_it_nor_what_was_cut_off(
    history: AsyncChatHistoryClient,
) -> None:
    thread, model = new_id(), Scripted(answers=["One", "Two", "Three"], sent=[])
    call = {"id": "lost", "type": "function", "function": {"name": "high_tide", "arguments": "{}"}}
    native: list[Any] = [
        {"role": "user", "content": "Early", "id": "early"},
        {"role": "assistant", "content": "Moin"},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "I do not know."},
    ]
    await history.add_messages(thread, native, create_for="ada")
    await history.create_checkpoint(thread, 2, "The gist.")
    middleware = ChatHistoryMiddleware(
        async_client=history, conversation_id=thread, user_id="ada", max_context_tokens=TOKENS
    )
    agent = create_agent(model, [high_tide], middleware=[middleware], checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": thread}}
    for text in ("Now?", "And now?", "Then?"):
        await agent.ainvoke({"messages": [HumanMessage(text)]}, config)
    first, last = model.sent[0], model.sent[-1]
    assert [each.type for each in first] == ["human", "human", "ai", "tool", "human", "ai", "human"]
    assert "The gist." in first[0].text
    assert is_whole(first)
    assert [each.text for each in last[-5:]] == ["Now?", "One", "And now?", "Two", "Then?"]
    stored = [message async for message in history.stream_chat_history(thread)]
    roles = [message["role"] for message in stored]
    assert roles == ["user", "assistant"] * 6
    assert not any("gist" in str(message["content"]) for message in stored)


async def test_a_caller_that_sends_the_whole_history_again_gets_the_context(
    history: AsyncChatHistoryClient,
) -> None:
    thread, model = new_id(), Scripted(answers=[f"Answer {turn}" for turn in range(TURNS)], sent=[])
    agent = create_agent(
        model, middleware=[ChatHistoryMiddleware(async_client=history, max_context_tokens=400)]
    )
    config: Any = {"configurable": {"thread_id": thread, "user_id": "ada"}}
    mine: list[Any] = []
    for turn in range(TURNS):
        mine.append(HumanMessage(f"Question {turn}", id=f"q{turn}"))
        result = await agent.ainvoke({"messages": mine}, config)
        mine.append(result["messages"][-1])
    assert len(model.sent[-1]) < 12
    assert model.sent[-1][-1].text == f"Question {TURNS - 1}"
    stored = [message["content"] async for message in history.stream_chat_history(thread)]
    assert stored == [message.text for message in mine]
