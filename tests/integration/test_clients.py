"""The clients and the adapters, against a real service; what cuts connections is the tests' own proxy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from agents import Agent, OpenAIConversationsSession, RunConfig, Runner, SessionSettings, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai import ModelMessagesTypeAdapter
from pydantic_ai.messages import (
    ImageUrl,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.test import TestModel

from chat_history_client import (
    ApiError,
    AsyncChatHistoryClient,
    ChatHistoryClient,
    Conflict,
    NotFound,
    Unavailable,
)
from chat_history_client.langchain import ChatHistoryMessages
from chat_history_client.openai_agents import ChatHistorySession
from chat_history_client.pydantic_ai import ChatHistoryStore
from tests.harness import Service, append, create, free_port, new_id, whole_history
from tests.proxy import Proxy, proxied


@pytest.fixture
def proxy(service: Service) -> Iterator[Proxy]:
    with proxied(service.port) as started:
        yield started


def says(text: str, **more: Any) -> Any:
    return {"role": "user", "content": text, **more}


# -- the client --------------------------------------------------------------------------------------


async def test_the_client_does_all_that_the_api_does(history: AsyncChatHistoryClient) -> None:
    user, conversation = new_id("user"), new_id()
    made = await history.get_or_create_conversation(user, conversation, title="t", metadata={"a": 1})
    assert made == await history.get_conversation(conversation, user_id=user)
    changed = await history.update_conversation(conversation, title=None, metadata={"b": 2})
    assert (changed["title"], changed["metadata"]) == (None, {"b": 2})
    stored = await history.add_messages(conversation, [says(f"{n}\u2028\x85\r") for n in range(120)])
    assert [message async for message in history.stream_chat_history(conversation)] == stored
    backwards = history.stream_chat_history(conversation, order="desc", limit=7)
    assert [message async for message in backwards] == stored[:-8:-1]
    page = await history.get_chat_history(conversation, last=10)
    assert (page.data, page.has_more) == (stored[-10:], True)
    assert await history.last_messages(conversation, 1_000) == stored
    assert await history.get_message(conversation, stored[3]["id"]) == stored[3]
    await history.delete_message(conversation, stored[3]["id"])
    assert await history.pop_message(conversation) == stored[-1]
    await history.delete_messages(conversation, after=50)
    assert (await history.get_chat_history(conversation, limit=100)).data == [*stored[:3], *stored[4:50]]
    await history.delete_messages(conversation)
    assert await history.pop_message(conversation) is None
    listed = await history.list_conversations(user, limit=5)
    assert [each["id"] for each in listed.data] == [conversation]
    await history.delete_conversation(conversation)
    with pytest.raises(NotFound):
        await history.get_conversation(conversation)


def test_the_synchronous_client_does_the_same(sync_history: ChatHistoryClient) -> None:
    history, user, conversation = sync_history, new_id("user"), new_id()
    made = history.get_or_create_conversation(user, conversation)
    assert made == history.get_conversation(conversation, user_id=user)
    assert history.update_conversation(conversation, title="t")["title"] == "t"
    stored = history.add_messages(conversation, [says(f"{n}\u2028\x85\r") for n in range(120)])
    assert list(history.stream_chat_history(conversation)) == stored
    assert list(history.stream_chat_history(conversation, order="desc", limit=7)) == stored[:-8:-1]
    assert history.get_chat_history(conversation, last=10).data == stored[-10:]
    assert history.get_message(conversation, stored[3]["id"]) == stored[3]
    history.delete_message(conversation, stored[3]["id"])
    assert history.pop_message(conversation) == stored[-1]
    history.delete_messages(conversation)
    assert history.pop_message(conversation) is None
    assert [each["id"] for each in history.list_conversations(user).data] == [conversation]
    history.delete_conversation(conversation)
    with pytest.raises(NotFound):
        history.get_conversation(conversation)


async def test_errors_say_what_the_service_said(history: AsyncChatHistoryClient) -> None:
    conversation = (await history.get_or_create_conversation("ada"))["id"]
    with pytest.raises(ApiError) as refused:
        await history.add_messages(conversation, [{"role": "robot"}])
    assert refused.value.status == 422
    assert refused.value.errors[0]["path"] == "$.messages[0].role"
    await history.add_messages(conversation, [says("x")], idempotency_key="k")
    with pytest.raises(Conflict):
        await history.add_messages(conversation, [says("y")], idempotency_key="k")
    for bad in ("..", "a/b", "a?b", "a#b", "%2e"):
        with pytest.raises(ApiError):
            await history.get_conversation(bad)


async def test_an_append_is_stored_once_whatever_happens_to_its_connection(
    service: Service, proxy: Proxy
) -> None:
    async with AsyncChatHistoryClient(f"http://127.0.0.1:{proxy.port}", timeout_s=5) as history:
        conversation = (await history.get_or_create_conversation("ada"))["id"]
        for before in (True, False):
            cut = proxy.cut(b"POST ", before=before, times=2)
            stored = await history.add_messages(conversation, [says("a"), says("b")])
            assert cut.done == 2
            assert len(stored) == 2
    with service.client() as client:
        assert [each["seq"] for each in whole_history(client, conversation)] == [1, 2, 3, 4]


def test_the_synchronous_client_repeats_too_and_a_deletion_done_before_is_done(proxy: Proxy) -> None:
    with ChatHistoryClient(f"http://127.0.0.1:{proxy.port}", timeout_s=5) as history:
        conversation = history.get_or_create_conversation("ada")["id"]
        cut = proxy.cut(b"POST ", before=False, times=2)
        (stored,) = history.add_messages(conversation, [says("a")])
        assert cut.done == 2
        cut = proxy.cut(b"DELETE ", before=False)
        history.delete_message(conversation, stored["id"])
        assert cut.done == 1
        with pytest.raises(NotFound):
            history.delete_message(conversation, stored["id"])


async def test_a_pop_is_never_sent_twice(service: Service, proxy: Proxy) -> None:
    async with AsyncChatHistoryClient(f"http://127.0.0.1:{proxy.port}", timeout_s=5) as history:
        conversation = (await history.get_or_create_conversation("ada"))["id"]
        stored = await history.add_messages(conversation, [says("a"), says("b"), says("c")])
        proxy.cut(b"POST ", before=False)
        with pytest.raises(httpx.TransportError):
            await history.pop_message(conversation)
    with service.client() as client:
        assert whole_history(client, conversation) == stored[:2]


async def test_a_stream_that_breaks_off_goes_on_behind_the_last_message(service: Service) -> None:
    """The answer is cut in the middle, three times; every message comes once, in order."""
    broken = 0

    class Breaking(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await super().handle_async_request(request)
            if request.method == "GET":
                stream: Any = response.stream

                async def some() -> AsyncIterator[bytes]:
                    nonlocal broken
                    sent = 0
                    async for chunk in stream:
                        if broken < 3 and sent + len(chunk) > 20_000:
                            broken += 1
                            yield chunk[: len(chunk) // 2]
                            await response.aclose()
                            raise httpx.ReadError("cut")
                        sent += len(chunk)
                        yield chunk

                return httpx.Response(200, headers=response.headers, content=some())
            return response

    async with AsyncChatHistoryClient(service.url, transport=Breaking()) as history:
        conversation = (await history.get_or_create_conversation("ada"))["id"]
        stored = await history.add_messages(conversation, [says(f"{n}" + "x" * 500) for n in range(300)])
        assert [message async for message in history.stream_chat_history(conversation)] == stored
        assert broken == 3
        broken = 0
        some = history.stream_chat_history(conversation, order="desc", limit=250)
        assert [message async for message in some] == stored[:-251:-1]


async def test_a_service_that_stays_away_is_an_error_in_time() -> None:
    async with AsyncChatHistoryClient(f"http://127.0.0.1:{free_port()}", retry_s=0.5) as history:
        with pytest.raises(httpx.ConnectError):
            await history.add_messages("c", [says("x")])


async def test_a_503_is_waited_out_as_long_as_it_says() -> None:
    answers = [httpx.Response(503, headers={"Retry-After": "0"}, json={"type": "x"})] * 3
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Idempotency-Key"])
        return answers.pop() if answers else httpx.Response(201, json={"data": []})

    async with AsyncChatHistoryClient("http://x", transport=httpx.MockTransport(answer)) as history:
        assert await history.add_messages("c", [says("x")]) == []
    assert len(seen) == 4
    assert len(set(seen)) == 1
    gone = httpx.MockTransport(lambda _: httpx.Response(503))
    async with AsyncChatHistoryClient("http://x", transport=gone, retry_s=0.3) as history:
        with pytest.raises(Unavailable):
            await history.get_conversation("c")


def test_one_client_serves_several_event_loops_and_threads(service: Service) -> None:
    history, conversation = AsyncChatHistoryClient(service.url), new_id()
    failures: list[Exception] = []

    async def some(number: int) -> None:
        await history.get_or_create_conversation("ada", conversation)
        for turn in range(5):
            await history.add_messages(conversation, [says(f"{number}/{turn}")])
        await history.aclose()

    def run(number: int) -> None:
        try:
            asyncio.run(some(number))
        except Exception as error:  # noqa: BLE001  (told to the test's own thread)
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with service.client() as client:
        assert len(whole_history(client, conversation)) == 20


# -- the Agents SDK ------------------------------------------------------------------------------------

ANSWERS = ("At 14:05.", "You asked for Emden.")
GIVEN: list[Any] = [
    {"role": "user", "content": "plain text"},
    {"role": "user", "content": [{"type": "input_text", "text": "part"}], "type": "message"},
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "t", "annotations": []}],
    },
    {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "…"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}', "id": "fc_1"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "done"},
    {"id": "rs_1", "type": "reasoning", "summary": []},
    {"type": "of_next_month", "anything": {"a.b": [1, None, {"$ref": 1}]}},
    {"neither": "type nor role"},
]


async def test_a_session_gives_back_exactly_what_it_was_given(
    history: AsyncChatHistoryClient, service: Service
) -> None:
    session = ChatHistorySession(new_id("session"), history)
    assert await session.get_items() == []
    assert await session.pop_item() is None
    await session.clear_session()
    await session.add_items([])
    await session.add_items(GIVEN)
    found = await session.get_items()
    assert found == GIVEN
    assert [list(each) for each in found] == [list(each) for each in GIVEN]
    assert await session.get_items(limit=3) == GIVEN[-3:]
    assert await session.get_items(limit=0) == []
    limited = ChatHistorySession(session.session_id, history, session_settings=SessionSettings(limit=2))
    assert await limited.get_items() == GIVEN[-2:]
    assert [await session.pop_item() for _ in range(3)] == GIVEN[:-4:-1]
    # The same conversation, seen natively and through `/v1`.
    with service.client() as client:
        call = whole_history(client, session.session_id)[4]["tool_calls"][0]
        assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
        items = client.get(f"/v1/conversations/{session.session_id}/items?order=asc").json()["data"]
        assert [item["type"] for item in items] == ["message"] * 3 + ["reasoning"] + ["function_call"] * 2 + [
            "function_call_output"
        ]
    await session.clear_session()
    assert await session.get_items() == []


async def test_a_session_stores_a_batch_with_one_request_and_once(proxy: Proxy) -> None:
    async with AsyncChatHistoryClient(f"http://127.0.0.1:{proxy.port}", timeout_s=5) as history:
        session = ChatHistorySession(new_id("session"), history)
        await session.add_items([says("first")])
        cut = proxy.cut(b"POST ", before=False, times=2)
        await session.add_items([says(f"{n}") for n in range(1_000)])
        assert cut.done == 2
        assert len(await session.get_items()) == 1_001


async def test_a_session_reads_what_was_appended_natively(client: httpx.Client, service: Service) -> None:
    conversation = create(client, new_id(), user="default")
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    append(
        client,
        conversation,
        says("hi"),
        {"role": "assistant", "content": "ok", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    )
    async with AsyncChatHistoryClient(service.url) as history:
        items: Any = await ChatHistorySession(conversation, history).get_items()
        assert [item["type"] for item in items] == [
            "message",
            "message",
            "function_call",
            "function_call",
            "function_call_output",
        ]
        assert not any("id" in item for item in items)
        assert len(await ChatHistorySession(conversation, history).get_items(limit=4)) == 4


def a_turn_with_a_tool() -> ScriptedModel:
    """A model that calls a tool, sees its result, and answers; then answers again."""
    call = function_call("high_tide", {"place": "Emden"}, call_id="call_1", item_id="fc_1")
    answers = [assistant_message(text, item_id=f"msg_{n}") for n, text in enumerate(ANSWERS)]
    return ScriptedModel([[call], *([each] for each in answers)])


@function_tool
def high_tide(place: str) -> str:
    return f"{place}: 14:05"


async def run_two_turns(session: Any) -> Any:
    model = a_turn_with_a_tool()
    agent = Agent(name="tides", model=model, tools=[high_tide])
    config = RunConfig(tracing_disabled=True)
    first = await Runner.run(agent, "When is high tide in Emden?", session=session, run_config=config)
    assert first.final_output == ANSWERS[0]
    second = await Runner.run(agent, "Where did I ask for?", session=session, run_config=config)
    assert second.final_output == ANSWERS[1]
    assert model.last_call is not None
    return model.last_call.input


async def test_an_agent_of_the_sdk_remembers_with_our_session(history: AsyncChatHistoryClient) -> None:
    seen = await run_two_turns(ChatHistorySession(new_id("session"), history))
    assert [item.get("type", "message") for item in seen] == [
        "message",
        "function_call",
        "function_call_output",
        "message",
        "message",
    ]
    assert seen[2]["output"] == "Emden: 14:05"


async def test_an_agent_of_the_sdk_remembers_with_openais_own_session(service: Service) -> None:
    async with AsyncOpenAI(base_url=service.url + "/v1", api_key="none") as ai:
        session = OpenAIConversationsSession(openai_client=ai)
        seen = await run_two_turns(session)
        assert [item["type"] for item in seen[:-1]] == [
            "message",
            "function_call",
            "function_call_output",
            "message",
        ]
        items: Any = await session.get_items()
        assert len(items) == 6
        assert await session.get_items(limit=2) == items[-2:]
        assert await session.pop_item() == items[-1]
        assert await session.get_items() == items[:-1]
        # More than a page, and more than one request of twenty.
        await session.add_items([says(f"{n}") for n in range(45)])
        items = await session.get_items()
        texts = [item["content"][0]["text"] for item in items[-45:]]
        assert texts == [f"{n}" for n in range(45)]
        conversation = session.session_id
        await session.clear_session()
        with service.client() as client:
            assert client.get(f"/conversations/{conversation}").status_code == 404


async def test_openais_own_session_behaves_over_http_as_its_own_tests_say(service: Service) -> None:
    """What the SDK's tests of it ask of a stubbed client, asked of the service."""
    async with AsyncOpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as ai:
        session = OpenAIConversationsSession(openai_client=ai)
        # It makes no conversation before it needs one.
        await session.add_items([])
        await session.clear_session()
        with pytest.raises(ValueError, match="not yet available"):
            _ = session.session_id
        assert await session.pop_item() is None
        first = session.session_id
        await session.clear_session()
        # First writes at once share one conversation.
        await asyncio.gather(*(session.add_items([says(f"{n}")]) for n in range(5)))
        second = session.session_id
        assert second != first
        assert len(await session.get_items()) == 5
        # A limit beyond a page is cut behind the paging; order is that of adding, over many requests.
        await session.add_items([says(f"{n}") for n in range(250)])
        found: Any = await session.get_items(limit=220)
        assert [item["content"][0]["text"] for item in found] == [f"{n}" for n in range(30, 250)]
        assert await session.get_items(limit=0) == []
        # Ids that the model gave are kept, of types that nobody has heard of, too.
        program: Any = {"id": "prog_1", "type": "program", "call_id": "c", "code": "x", "fingerprint": "f"}
        await session.add_items([program])
        assert (await session.get_items(limit=1)) == [program]
        assert await session.pop_item() == program
        # Two sessions are two conversations.
        other = OpenAIConversationsSession(openai_client=ai)
        await other.add_items([says("other")])
        assert other.session_id != second
        assert len(await other.get_items()) == 1
        # What is refused is refused whole, and what was there stays.
        wrong: Any = [says("fine"), {"type": "x", "id": "no\nid"}]
        with pytest.raises(BadRequestError) as refused:
            await session.add_items(wrong)
        assert refused.value.param == "items[1].id"
        assert len(await session.get_items()) == 255
        # Deleted by somebody else, it is an error, and the session keeps its id.
        await ai.conversations.delete(second)
        with pytest.raises(NotFoundError):
            await session.clear_session()
        assert session.session_id == second
        resumed = OpenAIConversationsSession(conversation_id=other.session_id, openai_client=ai)
        assert await resumed.get_items() == await other.get_items()


# -- LangChain -----------------------------------------------------------------------------------------

CALLS = [{"name": "f", "args": {"a": 1, "b": [1.5, None]}, "id": "c", "type": "tool_call"}]
MESSAGES: list[BaseMessage] = [
    SystemMessage("be nice"),
    HumanMessage("hi", id="h1", name="ada"),
    HumanMessage([{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "u"}}]),
    AIMessage(
        "", tool_calls=CALLS, usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
    ),
    AIMessage("", invalid_tool_calls=[{"name": "f", "args": "{", "id": "c", "error": None}]),
    ToolMessage("done", tool_call_id="c", artifact={"a": [1]}, status="error", name="f"),
    AIMessage(
        ["a", {"type": "reasoning", "x": 1}],
        additional_kwargs={"k": {"a.b": 1}},
        response_metadata={"m": "x"},
    ),
    AIMessageChunk(content="half"),
    ChatMessage(content="odd", role="critic"),
    ChatMessage(content="even", role="assistant"),
    FunctionMessage(content="old", name="f"),
]


def test_langchain_messages_are_restored_equal(sync_history: ChatHistoryClient, client: httpx.Client) -> None:
    history = ChatHistoryMessages(new_id("session"), sync_history)
    assert history.messages == []
    history.clear()
    history.add_messages(MESSAGES)
    assert history.messages == MESSAGES
    assert list(map(type, history.messages)) == list(map(type, MESSAGES))
    history.add_user_message("more")
    assert history.messages[-1] == HumanMessage("more")
    # Natively they are what they are, and nothing is there twice.
    stored = whole_history(client, history.session_id)
    assert stored[3]["role"] == "assistant"
    assert stored[3]["tool_calls"] == CALLS
    assert "tool_calls" not in stored[3]["langchain"]
    assert (stored[5]["role"], stored[5]["tool_call_id"], stored[5]["content"]) == ("tool", "c", "done")
    items = client.get(f"/v1/conversations/{history.session_id}/items?order=asc").json()["data"]
    assert items[3]["arguments"] == '{"a": 1, "b": [1.5, null]}'
    history.clear()
    assert history.messages == []


async def test_langchain_does_the_same_asynchronously(history: AsyncChatHistoryClient) -> None:
    messages = ChatHistoryMessages(new_id("session"), async_client=history)
    assert await messages.aget_messages() == []
    await messages.aadd_messages(MESSAGES)
    assert await messages.aget_messages() == MESSAGES
    await messages.aclear()
    assert await messages.aget_messages() == []
    with pytest.raises(ValueError, match="ChatHistoryClient"):
        _ = messages.messages


def test_langchain_reads_what_was_appended_natively(
    sync_history: ChatHistoryClient, client: httpx.Client
) -> None:
    conversation = create(client, new_id(), user="default")
    good = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    bad = {"id": "d", "type": "function", "function": {"name": "f", "arguments": "{"}}
    append(
        client,
        conversation,
        {"role": "developer", "content": "be nice"},
        says("hi"),
        {"role": "assistant", "content": None, "tool_calls": [good, bad]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    )
    system, human, ai, tool = ChatHistoryMessages(conversation, sync_history).messages
    assert (system.type, human.type, ai.type, tool.type) == ("system", "human", "ai", "tool")
    assert isinstance(ai, AIMessage)
    assert ai.tool_calls == [{"name": "f", "args": {"a": 1}, "id": "c", "type": "tool_call"}]
    assert ai.invalid_tool_calls[0]["args"] == "{"
    assert (tool.content, tool.tool_call_id) == ("done", "c")  # type: ignore[attr-defined]


# -- Pydantic AI ---------------------------------------------------------------------------------------


async def test_pydantic_ai_messages_are_restored_equal(
    history: AsyncChatHistoryClient, client: httpx.Client
) -> None:
    store, conversation = ChatHistoryStore(history), new_id()
    assert await store.load(conversation) == []
    messages: list[Any] = [
        ModelRequest([SystemPromptPart("be nice"), UserPromptPart("hi")], instructions="now"),
        ModelResponse([ThinkingPart("hm"), TextPart("a"), ToolCallPart("f", {"a": 1}, "c"), TextPart("b")]),
        ModelResponse([ToolCallPart("f", '{"a": 1}', "d"), ToolCallPart("g", None, "e")], model_name="m"),
        ModelRequest([ToolReturnPart("f", "done", "c"), ToolReturnPart("g", {"x": [1]}, "d")]),
        ModelRequest([ToolReturnPart("g", None, "e")]),
        ModelRequest([ToolReturnPart("f", "again", "c", outcome="retried")]),
        ModelRequest([UserPromptPart(["look", ImageUrl("http://x/y.png")]), UserPromptPart("there")]),
        ModelResponse([TextPart("")], provider_details={"a.b": 1}),
    ]
    await store.save(conversation, messages)
    loaded = await store.load(conversation)
    assert ModelMessagesTypeAdapter.dump_python(loaded) == ModelMessagesTypeAdapter.dump_python(messages)
    stored = whole_history(client, conversation)
    assert [each["role"] for each in stored] == [
        "user",
        "assistant",
        "assistant",
        "tool",
        "tool",
        "tool",
        "user",
        "assistant",
    ]
    assert stored[1]["tool_calls"] == [{"name": "f", "args": {"a": 1}, "id": "c"}]
    assert [part["text"] for part in stored[1]["content"]] == ["a", "b"]
    assert stored[4]["tool_call_id"] == "e"


async def test_an_agent_of_pydantic_ai_remembers(history: AsyncChatHistoryClient) -> None:
    store, conversation = ChatHistoryStore(history), new_id()
    agent = PydanticAgent(TestModel(custom_output_text="fine"))

    @agent.tool_plain
    def tide(place: str) -> str:
        return f"{place}: 14:05"

    first = await agent.run("When?", message_history=await store.load(conversation))
    await store.save(conversation, first.new_messages())
    second = await agent.run("And now?", message_history=await store.load(conversation))
    await store.save(conversation, second.new_messages())
    loaded = await store.load(conversation)
    assert ModelMessagesTypeAdapter.dump_python(loaded) == ModelMessagesTypeAdapter.dump_python(
        second.all_messages()
    )


async def test_pydantic_ai_reads_what_was_appended_natively(
    history: AsyncChatHistoryClient, client: httpx.Client
) -> None:
    conversation = create(client, new_id(), user="default")
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    append(
        client,
        conversation,
        {"role": "system", "content": "be nice"},
        says("hi"),
        {"role": "assistant", "content": "ok", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    )
    loaded = await ChatHistoryStore(history).load(conversation)
    kinds = [[part.part_kind for part in message.parts] for message in loaded]
    assert kinds == [["system-prompt"], ["user-prompt"], ["text", "tool-call"], ["tool-return"]]
