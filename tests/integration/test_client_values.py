"""What the clients and adapters take: every kind of message, turns of any size; and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    ChatMessageChunk,
    FunctionMessage,
    FunctionMessageChunk,
    HumanMessage,
    HumanMessageChunk,
    RemoveMessage,
    SystemMessage,
    SystemMessageChunk,
    ToolMessage,
    ToolMessageChunk,
    messages_from_dict,
    messages_to_dict,
)
from pydantic import BaseModel
from pydantic_ai.messages import ModelRequest, UserPromptPart

from chat_history_client import ApiError, AsyncChatHistoryClient, ChatHistoryClient
from chat_history_client.langchain import ChatHistoryMessages
from chat_history_client.openai_agents import ChatHistorySession
from chat_history_client.pydantic_ai import ChatHistoryStore
from tests.harness import Service, free_port, new_id, running, whole_history
from tests.integration.test_client_processes import Secure


@pytest.fixture
def history(service: Service) -> Iterator[ChatHistoryClient]:
    with ChatHistoryClient(service.url) as client:
        yield client


# -- LangChain's messages --------------------------------------------------------------------------------


class Booking(BaseModel):
    place: str
    approved: bool = False
    note: str | None = None
    stops: list[str] = []


class Trip(BaseModel):
    bookings: list[Booking] = [Booking(place="Leer")]
    price: float = 0.0


class Kept(HumanMessage):
    """A message type of an application's own, which LangChain restores as a HumanMessage."""

    level: int = 3


CALL: Any = {"name": "f", "args": {"a": 0, "b": None, "c": []}, "id": "c"}
CHUNK: Any = {"name": "f", "args": '{"a"', "id": "c", "index": 0}
TOOL_CALL: Any = {"type": "tool_call", **CALL}
DOCUMENT = Document("text", metadata={"source": None, "page": 0}, id=None)
COMMON: list[dict[str, Any]] = [
    {},
    {"id": "m1", "name": "ada"},
    {"additional_kwargs": {"parsed": Booking(place="Emden")}},
    {"additional_kwargs": {"parsed": Trip(), "list": [Trip(price=1.5)], "none": None, "no": False, "": ""}},
    {"response_metadata": {"model": "m", "logprobs": None, "headers": {}, "documents": [DOCUMENT]}},
    {"unknown_field": {"approved": False}, "status": "success", "example": False},
]
EMPTY: list[Any] = [None, False, 0, "", [], {}]
CONTENTS: list[Any] = ["", "text", [], ["a", {"type": "text", "text": "b"}]]
BLOCKS: list[Any] = [
    {"type": "text", "text": "a", "annotations": []},
    {"type": "reasoning", "reasoning": "hm"},
    {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
    {"type": "non_standard", "value": {"approved": False}},
]
KINDS: list[Callable[..., BaseMessage]] = [
    HumanMessage,
    AIMessage,
    SystemMessage,
    HumanMessageChunk,
    AIMessageChunk,
    SystemMessageChunk,
    Kept,
    lambda content, **more: ToolMessage(content, tool_call_id="c", **more),
    lambda content, **more: ToolMessageChunk(content=content, tool_call_id="c", **more),
    lambda content, **more: FunctionMessage(content=content, **{"name": "f", **more}),
    lambda content, **more: FunctionMessageChunk(content=content, **{"name": "f", **more}),
    lambda content, **more: ChatMessage(content=content, role="critic", **more),
    lambda content, **more: ChatMessage(content=content, role="assistant", **more),
    lambda content, **more: ChatMessageChunk(content=content, role="system", **more),
]
SPECIAL: list[BaseMessage] = [
    AIMessage("{}", additional_kwargs={"parsed": Booking(place="Emden")}),
    RemoveMessage(id="m1"),
    HumanMessage(content_blocks=BLOCKS),
    AIMessage(content_blocks=[*BLOCKS, TOOL_CALL]),
    AIMessage("", tool_calls=[CALL, CALL | {"id": None}]),
    AIMessage(
        "", tool_calls=[CALL], invalid_tool_calls=[{"name": None, "args": "{", "id": None, "error": ""}]
    ),
    AIMessage(
        "", additional_kwargs={"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
    ),
    AIMessage(
        "",
        usage_metadata={
            "input_tokens": 0,
            "output_tokens": 0,
            "total_tokens": 0,
            "input_token_details": {"cache_read": 0},
        },
    ),
    AIMessageChunk(content="", tool_call_chunks=[CHUNK], chunk_position="last"),
    AIMessageChunk(content="", tool_call_chunks=[CHUNK | {"name": None, "id": None, "index": None}]),
    ToolMessage("x", tool_call_id="c", artifact=Booking(place="Emden")),
    ToolMessage("x", tool_call_id="c", artifact=[DOCUMENT, Trip()], status="error"),
    ToolMessage("x", tool_call_id="c", artifact={"a": [0, False, None, "", {}, []]}),
    *(ToolMessage("x", tool_call_id="c", artifact=empty) for empty in EMPTY),
    ToolMessage(["a", {"type": "text", "text": ""}], tool_call_id=""),
]


def as_langchain_gives_it_back(messages: list[BaseMessage]) -> list[BaseMessage]:
    return messages_from_dict(messages_to_dict(messages))


def test_every_kind_of_langchains_messages_comes_back_as_langchain_itself_gives_it_back(
    history: ChatHistoryClient, client: httpx.Client
) -> None:
    given = [kind(content, **more) for kind in KINDS for content in CONTENTS for more in COMMON] + SPECIAL
    messages = ChatHistoryMessages(new_id(), history)
    messages.add_messages(given)
    found, expected = messages.messages, as_langchain_gives_it_back(given)
    for one, other in zip(found, expected, strict=True):
        assert one == other
        assert type(one) is type(other)
    assert messages_to_dict(found) == messages_to_dict(expected)
    # Readable natively, and nothing twice.
    for stored, message in zip(whole_history(client, messages.session_id), given, strict=True):
        assert stored["content"] == message.content
        kept = stored["langchain"]
        assert kept["type"] == message.type
        assert not {"content", "tool_calls", "tool_call_id", "name"} & (stored.keys() & kept.keys())
        assert stored.get("tool_calls", []) == getattr(message, "tool_calls", [])
        assert ("tool_calls" in stored) == bool(getattr(message, "tool_calls", []))


async def test_langchains_messages_come_back_the_same_asynchronously(service: Service) -> None:
    async with AsyncChatHistoryClient(service.url) as history:
        messages = ChatHistoryMessages(new_id(), async_client=history)
        await messages.aadd_messages(SPECIAL)
        assert await messages.aget_messages() == as_langchain_gives_it_back(SPECIAL)


def test_a_message_that_langchain_could_not_restore_is_not_stored(history: ChatHistoryClient) -> None:
    class Unknown(BaseMessage):
        type: str = "unknown"

    messages = ChatHistoryMessages(new_id(), history)
    messages.add_messages([HumanMessage("x")])
    with pytest.raises(ValueError, match="'unknown'"):
        messages.add_messages([HumanMessage("y"), Unknown(content="x")])
    artifact = {"when": datetime.now(UTC)}
    with pytest.raises(
        TypeError, match=r"\$\.messages\[1\]\.langchain\.artifact\.when: a datetime is not JSON"
    ):
        messages.add_messages([HumanMessage("y"), ToolMessage("x", tool_call_id="c", artifact=artifact)])
    assert messages.messages == [HumanMessage("x")]


# -- turns of any size -----------------------------------------------------------------------------------

SCREENSHOT = "x" * 1_700_000


async def test_a_turn_of_24_screenshots_is_kept_whole_in_every_adapter(service: Service) -> None:
    part: Any = {"type": "input_image", "image_url": SCREENSHOT}
    items: list[Any] = [{"role": "user", "content": [part]} for _ in range(24)]
    async with AsyncChatHistoryClient(service.url, timeout_s=120) as client:
        session = ChatHistorySession(new_id(), client)
        await session.add_items(items)
        assert await session.get_items() == items
        store, conversation = ChatHistoryStore(client), new_id()
        requests: list[Any] = [ModelRequest([UserPromptPart(SCREENSHOT)]) for _ in range(24)]
        await store.save(conversation, requests)
        assert (await client.get_conversation(conversation))["message_count"] == 24
        several = ChatHistoryMessages(new_id(), async_client=client)
        await several.aadd_messages([HumanMessage(SCREENSHOT)] * 24)
        assert (await client.get_conversation(several.session_id))["message_count"] == 24
    with ChatHistoryClient(service.url, timeout_s=120) as history:
        messages = ChatHistoryMessages(new_id(), history)
        messages.add_messages([HumanMessage(SCREENSHOT)] * 24)
        assert history.get_conversation(messages.session_id)["message_count"] == 24


def test_batches_are_cut_by_bytes_as_they_are_sent_and_have_keys_of_their_own() -> None:
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(201, json={"data": []})

    # Three bytes each in UTF-8, and six as an escape.
    texts = ["€" * 2_000_000] * 9 + ["\n" * 5_000_000] * 3 + ["x"] * 2_500
    with ChatHistoryClient("http://x", transport=httpx.MockTransport(answer)) as history:
        history.add_all_messages("c", [{"role": "user", "content": text} for text in texts], user_id="ada")
        history.add_all_messages("c", [], user_id="ada")
    bodies = [json.loads(request.content)["messages"] for request in sent]
    assert [message["content"] for body in bodies for message in body] == texts
    assert max(len(request.content) for request in sent) < 25 * 1024 * 1024
    assert max(map(len, bodies)) == 1_000
    assert len(sent) == 6
    assert len({request.headers["Idempotency-Key"] for request in sent}) == len(sent)


def test_a_service_that_takes_less_gets_smaller_batches(tmp_path: Path) -> None:
    with (
        running(tmp_path, body_bytes_max=10_000) as small,
        ChatHistoryClient(small.url, retry_s=1) as history,
    ):
        messages = ChatHistoryMessages(new_id(), history)
        given = [HumanMessage(f"{n}" + "x" * 3_000) for n in range(11)]
        messages.add_messages(given)
        assert [each.content for each in messages.messages] == [each.content for each in given]
        # What is too large by itself is refused; what stood before it is stored, what stood behind it is not.
        with pytest.raises(ApiError) as refused:
            messages.add_messages(
                [HumanMessage("before"), HumanMessage("x" * 20_000), HumanMessage("behind")]
            )
        assert refused.value.status == 413
        assert messages.messages[-1].content == "before"


def test_a_message_that_is_too_large_by_itself_is_an_honest_error_and_the_place_is_the_lists(
    history: ChatHistoryClient,
) -> None:
    conversation = new_id()
    messages: list[Any] = [{"role": "user", "content": SCREENSHOT}] * 15 + [{"role": "robot", "content": ""}]
    with pytest.raises(ApiError) as refused:
        history.add_all_messages(conversation, messages, user_id="ada")
    assert refused.value.status == 422
    assert refused.value.errors[0]["path"] == "$.messages[15].role"
    assert "$.messages[15].role" in refused.value.detail
    assert history.get_conversation(conversation)["message_count"] == 14
    for length, status in ((17 * 1024 * 1024, 422), (33 * 1024 * 1024, 413)):
        with pytest.raises(ApiError) as refused:
            history.add_all_messages(conversation, [{"role": "user", "content": "x" * length}], user_id="ada")
        assert refused.value.status == status
    assert history.get_conversation(conversation)["message_count"] == 14


# -- what is refused -------------------------------------------------------------------------------------


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


LOOP: dict[str, Any] = {}
LOOP["again"] = [LOOP]

REFUSED: list[tuple[Any, str]] = [
    (math.nan, ""),
    ([1, math.inf], "[1]"),
    ({"a": {"b c": -math.inf}}, '.a["b c"]'),
    ("\ud800", ""),
    ({"a": ["x", "\udfff"]}, ".a[1]"),
    ({"\ud800": 1}, '["\\ud800"]'),
    (2**63, ""),
    ([-(2**64)], "[0]"),
    (10**5_000, ""),
    ({"a\0": 1}, '["a\\u0000"]'),
    (nested(91), "[0]" * 90),
    (nested(150), "[0]" * 90),
]
TOO_DEEP = [nested(500), nested(50_000), LOOP]
NO_JSON: list[tuple[Any, str]] = [
    ({"a": {1, 2}}, r"\.a: a set is not JSON"),
    ([b"x"], r"\[0\]: a bytes is not JSON"),
    (datetime.now(UTC), ": a datetime is not JSON"),
    ({"a": [Decimal("1.5")]}, r"\.a\[0\]: a Decimal is not JSON"),
    ({"a": {1: "x"}}, r"\.a: the key 1 is a int"),
    ({None: 1}, ": the key None is a NoneType"),
    (object(), ": a object is not JSON"),
]


@pytest.fixture
def conversation(history: ChatHistoryClient) -> str:
    return str(history.get_or_create_conversation("ada", new_id())["id"])


def ways(history: ChatHistoryClient, conversation: str, value: Any) -> list[tuple[Callable[[], Any], str]]:
    """Every call that takes JSON, with the place of the value in it."""
    messages: list[Any] = [{"role": "user"}, {"role": "user", "field": value}]
    return [
        (lambda: history.add_messages(conversation, messages), "$.messages[1].field"),
        (lambda: history.add_messages(conversation, messages, idempotency_key="k"), "$.messages[1].field"),
        (lambda: history.add_all_messages(conversation, messages, user_id="ada"), "$.messages[1].field"),
        (lambda: history.get_or_create_conversation("ada", new_id(), metadata={"m": value}), "$.metadata.m"),
        (lambda: history.update_conversation(conversation, metadata={"m": value}), "$.metadata.m"),
    ]


@pytest.mark.parametrize(("value", "place"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_what_the_service_refuses_is_its_422_with_the_path(
    history: ChatHistoryClient, conversation: str, value: Any, place: str
) -> None:
    for call, at in ways(history, conversation, value):
        with pytest.raises(ApiError) as refused:
            call()
        assert refused.value.status == 422
        # A body without messages is checked before it is read, so its levels count from its beginning.
        path = refused.value.errors[0]["path"]
        assert path.startswith(at + place[:100])
        assert path in refused.value.detail
        assert refused.value.type.endswith(":invalid-request")
    assert history.get_conversation(conversation)["message_count"] == 0


@pytest.mark.parametrize("value", TOO_DEEP, ids=["500", "50000", "itself"])
def test_what_has_no_end_is_a_422_too(history: ChatHistoryClient, conversation: str, value: Any) -> None:
    for call, at in ways(history, conversation, value):
        with pytest.raises(ApiError, match="nested") as refused:
            call()
        assert refused.value.status == 422
        assert refused.value.errors[0]["path"].startswith(at)


@pytest.mark.parametrize(("value", "says"), NO_JSON)
def test_what_is_no_json_is_a_type_error_that_names_the_place(
    history: ChatHistoryClient, conversation: str, value: Any, says: str
) -> None:
    for call, at in ways(history, conversation, value):
        escaped = at.replace("$", r"\$").replace(".", r"\.").replace("[", r"\[").replace("]", r"\]")
        with pytest.raises(TypeError, match=escaped + says):
            call()
    assert history.get_conversation(conversation)["message_count"] == 0


async def test_the_asynchronous_client_and_the_adapters_refuse_the_same(
    service: Service, conversation: str
) -> None:
    async with AsyncChatHistoryClient(service.url) as history:
        with pytest.raises(ApiError) as refused:
            await history.add_messages(conversation, [{"role": "user", "content": math.nan}])
        assert refused.value.errors[0]["path"] == "$.messages[0].content"
        item: Any = {"role": "user", "content": {1}}
        with pytest.raises(TypeError, match=r"\$\.items\[0\]\.content: a set is not JSON"):
            await ChatHistorySession(conversation, history, user_id="ada").add_items([item])
        item = {"role": "user", "x": LOOP}
        with pytest.raises(ApiError, match="nested"):
            await ChatHistorySession(conversation, history, user_id="ada").add_items([item])
        with pytest.raises(TypeError, match=r"\$\.messages\[0\]"):
            await history.add_messages(conversation, [{"role": "user", "content": {1}}])


def test_ids_that_no_url_can_carry_are_a_422_and_reach_nothing(
    history: ChatHistoryClient, conversation: str
) -> None:
    """A URL drops `.` and `..`: to delete the message `..` would delete its conversation."""
    history.add_messages(conversation, [{"role": "user", "content": "x"}])

    def streamed(name: str) -> list[Any]:
        return list(history.stream_chat_history(name))

    for bad in ("", ".", "..", "\ud800", "a\0", "x" * 100_000):
        calls: list[Callable[[], Any]] = [
            partial(history.get_conversation, bad),
            partial(history.delete_conversation, bad),
            partial(history.delete_messages, bad),
            partial(history.add_messages, bad, [{"role": "user"}]),
            partial(history.pop_message, bad),
            partial(streamed, bad),
            partial(history.get_message, conversation, bad),
            partial(history.delete_message, conversation, bad),
            partial(history.get_or_create_conversation, bad),
            partial(history.get_conversation, conversation, user_id=bad),
            partial(history.list_conversations, bad),
        ]
        for place, call in enumerate(calls):
            with pytest.raises(ApiError) as refused:
                call()
            assert refused.value.status == 422, (bad[:5], place)
    for key in ("", "a\nb", "ü", "\ud800", "a b"):
        with pytest.raises(ApiError) as refused:
            history.add_messages(conversation, [{"role": "user"}], idempotency_key=key)
        assert refused.value.errors[0]["path"] == "header.Idempotency-Key"
    assert history.get_conversation(conversation)["message_count"] == 1


# -- what cannot become right ------------------------------------------------------------------------------

WRONG_URLS = [
    "127.0.0.1:8000",
    "localhost:8000",
    "localhost",
    "",
    "/conversations",
    "//localhost:8000",
    "ftp://localhost",
    "unix:/run/chat.sock",
    "mongodb://localhost",
    "http://",
    "http://:8000",
    "http://localhost:abc",
    "http://localhost:99999",
    "http://localhost:0",
    "http://localhost:-1",
    "http://[::1",
    "http://local host",
    "http://localhost\n",
    "http://xn--",
]


@pytest.mark.parametrize("url", WRONG_URLS)
@pytest.mark.parametrize("kind", [AsyncChatHistoryClient, ChatHistoryClient])
def test_a_url_that_cannot_work_is_refused_at_once(kind: Any, url: str) -> None:
    with pytest.raises(ValueError, match="`base_url`"):
        kind(url)


@pytest.mark.parametrize("kind", [AsyncChatHistoryClient, ChatHistoryClient])
@pytest.mark.parametrize("options", [{"api_key": "k\n"}, {"api_key": "ü"}, {"headers": {"X-A": "a\r\nb: c"}}])
def test_a_header_that_cannot_be_sent_is_refused_at_once_and_not_quoted(kind: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="header") as refused:
        kind("http://127.0.0.1:1", **options)
    assert "k\n" not in str(refused.value)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between the attempts of synchronous calls, none of which is waited out."""
    made: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", made.append)
    return made


def test_what_no_repetition_can_mend_is_not_repeated(
    tmp_path: Path, service: Service, waits: list[float]
) -> None:
    secure = Secure(tmp_path)
    try:
        for url in (secure.url, service.url.replace("http:", "https:")):  # not trusted; not TLS
            with ChatHistoryClient(url) as history, pytest.raises(httpx.ConnectError):
                history.get_conversation("c")
    finally:
        secure.stop()
    for error in (httpx.UnsupportedProtocol("x"), httpx.LocalProtocolError("x"), httpx.ProxyError("407 x")):

        def fail(_: httpx.Request, error: Exception = error) -> httpx.Response:
            raise error

        with (
            ChatHistoryClient("http://x", transport=httpx.MockTransport(fail)) as history,
            pytest.raises(type(error)),
        ):
            history.get_conversation("c")
    assert not waits


def test_a_refused_connection_is_repeated(waits: list[float]) -> None:
    with (
        ChatHistoryClient(f"http://127.0.0.1:{free_port()}", retry_s=0.2) as history,
        pytest.raises(httpx.ConnectError),
    ):
        history.get_conversation("c")
    assert waits


def test_an_answer_that_is_not_the_services_is_an_api_error() -> None:
    answers = [
        httpx.Response(200, text="<html>"),
        httpx.Response(307, headers={"Location": "/x"}),
        httpx.Response(403, text="no"),
    ]

    def given(answer: httpx.Response, _: httpx.Request) -> httpx.Response:
        return answer

    for answer in answers:
        transport = httpx.MockTransport(partial(given, answer))
        with ChatHistoryClient("http://x", transport=transport) as history:
            with pytest.raises(ApiError) as refused:
                history.delete_conversation("c")
            assert refused.value.status == answer.status_code
            assert refused.value.detail
