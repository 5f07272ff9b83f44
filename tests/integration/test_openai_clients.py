"""OpenAI's clients in their own habits: repeated requests, ids of one's own, and URLs that lead astray."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from agents.memory import OpenAIConversationsSession
from openai import AsyncOpenAI, OpenAI

from chat_history_client import ApiError, AsyncChatHistoryClient, ChatHistoryClient, NotFound
from chat_history_client.openai_agents import ChatHistorySession
from tests.harness import Service, append, contents, create, new_id, whole_history
from tests.proxy import Proxy

APPEND = b"/items HTTP/1.1"


class RepeatingOpenAI(OpenAI):
    """The client of docs/clients/openai.md, which keeps one key for all attempts of a call."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idempotency_header = "Idempotency-Key"


class AsyncRepeatingOpenAI(AsyncOpenAI):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idempotency_header = "Idempotency-Key"


@pytest.fixture
def proxy(service: Service) -> Iterator[Proxy]:
    started = Proxy(service.port).start()
    yield started
    started.stop()


def through(proxy: Proxy, kind: type[OpenAI] = RepeatingOpenAI) -> OpenAI:
    return kind(base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key="none")


def says(text: str) -> Any:
    return {"type": "message", "role": "user", "content": text}


def texts(client: httpx.Client, conversation: str) -> list[str]:
    return [parts[0]["text"] for parts in contents(whole_history(client, conversation))]


# -- a lost answer -----------------------------------------------------------------------------------


def test_an_item_whose_answer_is_lost_is_stored_once_with_a_key_and_twice_without(
    client: httpx.Client, conversation: str, proxy: Proxy
) -> None:
    lost = proxy.cut(APPEND, before=False)
    with through(proxy) as ai:
        made = ai.conversations.items.create(conversation, items=[says("once")])
    assert lost.done == 1
    assert texts(client, conversation) == ["once"]
    assert made.data[0].id == whole_history(client, conversation)[0]["id"]
    # Without a key nothing tells a repetition from a second request: docs/decisions/0013.
    lost = proxy.cut(APPEND, before=False)
    with through(proxy, OpenAI) as ai:
        ai.conversations.items.create(conversation, items=[says("twice")])
    assert lost.done == 1
    assert texts(client, conversation) == ["once", "twice", "twice"]


async def test_the_asynchronous_client_keeps_its_key_too(
    client: httpx.Client, conversation: str, proxy: Proxy
) -> None:
    lost = proxy.cut(APPEND, before=False, times=2)  # all attempts but the last
    url = f"http://127.0.0.1:{proxy.port}/v1"
    async with AsyncRepeatingOpenAI(base_url=url, api_key="none") as ai:
        await ai.conversations.items.create(conversation, items=[says("once")])
    assert lost.done == 2
    assert texts(client, conversation) == ["once"]


def test_a_copy_of_the_client_keeps_its_key_too(
    client: httpx.Client, conversation: str, proxy: Proxy
) -> None:
    lost = proxy.cut(APPEND, before=False)
    with through(proxy) as ai:
        ai.with_options(timeout=20).conversations.items.create(conversation, items=[says("once")])
    assert lost.done == 1
    assert texts(client, conversation) == ["once"]


def test_a_conversation_whose_answer_is_lost_is_created_once(client: httpx.Client, proxy: Proxy) -> None:
    user = new_id("user")
    lost = proxy.cut(b"POST /v1/conversations HTTP/1.1", before=False)
    with through(proxy) as ai:
        made = ai.conversations.create(items=[says("first")], extra_headers={"X-User-Id": user})
    assert lost.done == 1
    listed = client.get("/conversations", params={"user_id": user}).json()["data"]
    assert [each["id"] for each in listed] == [made.id]
    assert texts(client, made.id) == ["first"]


def test_a_key_of_ones_own_in_a_header_serves_without_a_class(
    client: httpx.Client, conversation: str, proxy: Proxy
) -> None:
    lost = proxy.cut(APPEND, before=False)
    with through(proxy, OpenAI) as ai:
        key = {"Idempotency-Key": "turn-1"}
        ai.conversations.items.create(conversation, items=[says("once")], extra_headers=key)
    assert lost.done == 1
    assert texts(client, conversation) == ["once"]


def test_an_item_whose_first_attempt_came_to_nothing_is_stored(
    client: httpx.Client, conversation: str, proxy: Proxy
) -> None:
    with through(proxy) as ai:
        for _ in range(2):
            # The second time the newest item is equal, and yet it is another one.
            lost = proxy.cut(APPEND, before=True)
            ai.conversations.items.create(conversation, items=[says("yes")])
            assert lost.done == 1
    assert texts(client, conversation) == ["yes", "yes"]


def test_another_writer_between_the_attempts_changes_nothing(
    client: httpx.Client, conversation: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = proxy.cut(APPEND, before=False)
    between = {"role": "assistant", "content": [{"type": "output_text", "text": "between"}]}

    def pause(*_: Any) -> float:
        append(client, conversation, between)
        return 0.01

    monkeypatch.setattr(RepeatingOpenAI, "_calculate_retry_timeout", pause)
    with through(proxy) as ai:
        ai.conversations.items.create(conversation, items=[says("once")])
    assert lost.done == 1
    assert texts(client, conversation) == ["once", "between"]


def test_the_second_attempt_may_reach_another_process(
    client: httpx.Client, conversation: str, proxy: Proxy, second_service: Service
) -> None:
    with through(proxy) as ai:
        ai.conversations.retrieve(conversation)  # opens the connection to the first process
        proxy.target = second_service.port
        lost = proxy.cut(APPEND, before=False)
        ai.conversations.items.create(conversation, items=[says("once")])
    assert (lost.done, proxy.accepted) == (1, 2)
    assert texts(client, conversation) == ["once"]


# -- a conversation with an id of one's own ----------------------------------------------------------


@pytest.fixture(scope="module")
def ai(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_conversation_is_got_or_created_under_an_id_of_ones_own(ai: OpenAI, client: httpx.Client) -> None:
    mine, user = new_id(), new_id("ada")
    owner = {"X-User-Id": user}
    made = ai.conversations.create(metadata={"n": "1"}, extra_body={"id": mine}, extra_headers=owner)
    assert (made.id, made.metadata) == (mine, {"n": "1"})
    ai.conversations.items.create(mine, items=[says("x")], extra_headers=owner)
    again = ai.conversations.create(metadata={"n": "2"}, extra_body={"id": mine}, extra_headers=owner)
    assert again == made
    assert client.get(f"/conversations/{mine}").json()["user_id"] == user
    assert texts(client, mine) == ["x"]


def test_an_id_of_another_user_is_not_free(ai: OpenAI) -> None:
    mine = new_id()
    ai.conversations.create(extra_body={"id": mine}, extra_headers={"X-User-Id": "ada"})
    with pytest.raises(openai.ConflictError) as caught:
        ai.with_options(max_retries=5).conversations.create(
            extra_body={"id": mine}, extra_headers={"X-User-Id": "bob"}
        )
    assert "is not free" in str(caught.value)
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_id_of_ones_own_and_first_items_do_not_go_together(ai: OpenAI, client: httpx.Client) -> None:
    mine = new_id()
    with pytest.raises(openai.BadRequestError, match=r"\$\.items: cannot be created together"):
        ai.conversations.create(items=[says("x")], extra_body={"id": mine})
    assert client.get(f"/conversations/{mine}").status_code == 404


def test_many_who_create_one_id_at_once_get_one_conversation(ai: OpenAI) -> None:
    mine = new_id()
    made: list[Any] = []
    threads = [
        threading.Thread(target=lambda: made.append(ai.conversations.create(extra_body={"id": mine})))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert all(each == made[0] for each in made)


async def test_the_agents_session_of_openai_works_under_an_id_of_ones_own(service: Service) -> None:
    mine = new_id()
    for turn in range(2):
        async with AsyncOpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as openai_client:
            await openai_client.conversations.create(extra_body={"id": mine})
            session = OpenAIConversationsSession(conversation_id=mine, openai_client=openai_client)
            before: Any = await session.get_items()
            assert [item["content"][0]["text"] for item in before] == [f"{n}" for n in range(turn)]
            await session.add_items([says(f"{turn}")])
            assert session.session_id == mine


# -- a URL of the other API --------------------------------------------------------------------------


def test_a_native_client_with_v1_in_its_url_is_told_so(service: Service, client: httpx.Client) -> None:
    stored = create(client)
    with ChatHistoryClient(service.url + "/v1", retry_s=0) as history:
        for call in (
            lambda: history.get_or_create_conversation("ada"),
            lambda: history.add_message(stored, {"role": "user"}),
            lambda: history.get_chat_history(stored),
            lambda: list(history.stream_chat_history(stored)),
            lambda: history.list_conversations("ada"),
            lambda: history.get_conversation(new_id()),
            lambda: history.erase_user("ada"),
        ):
            with pytest.raises(ApiError, match=r"a `base_url` without `/v1`") as caught:
                call()
            assert not isinstance(caught.value, NotFound)  # adapters take that for an empty history


async def test_an_adapter_with_v1_in_its_url_does_not_read_an_empty_history(service: Service) -> None:
    async with AsyncChatHistoryClient(service.url + "/v1", retry_s=0) as history:
        session = ChatHistorySession(new_id(), history)
        for call in (session.get_items, session.pop_item, session.clear_session):
            with pytest.raises(ApiError, match=r"a `base_url` without `/v1`"):
                await call()
        with pytest.raises(ApiError, match=r"a `base_url` without `/v1`"):
            await session.add_items([says("x")])


def test_a_native_client_whose_url_leads_nowhere_does_not_read_an_empty_history(service: Service) -> None:
    with ChatHistoryClient(service.url + "/somewhere", retry_s=0) as history:
        with pytest.raises(ApiError, match="correct the `base_url`") as caught:
            history.get_chat_history("c")
        assert not isinstance(caught.value, NotFound)


def test_the_server_tells_any_client_which_api_is_where(client: httpx.Client) -> None:
    refused = client.post("/v1/conversations", json={"user_id": "ada"})
    assert refused.status_code == 400
    assert "the native API, whose base URL has no `/v1`" in refused.json()["error"]["message"]
    nowhere = client.get("/v1/conversations/c/messages")
    assert nowhere.status_code == 404
    assert "The native API has no `/v1`" in nowhere.json()["error"]["message"]


def test_an_openai_client_without_v1_in_its_url_is_told_so(service: Service) -> None:
    with OpenAI(base_url=service.url, api_key="none", max_retries=0) as ai:
        for call in (
            ai.conversations.create,
            lambda: ai.conversations.retrieve("c"),
            lambda: ai.conversations.items.create("c", items=[says("x")]),
            lambda: ai.conversations.update("c", metadata={}),
        ):
            with pytest.raises(openai.APIStatusError, match=r"a base URL that ends in `/v1`"):
                call()
