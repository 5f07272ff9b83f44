"""The clients' conditions, replacements, and appends that create their conversation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from chat_history_client import (
    AsyncChatHistoryClient,
    ChatHistoryClient,
    Conflict,
    NotFound,
    Stale,
    Unavailable,
)
from tests.harness import Service, contents, new_id
from tests.proxy import proxied


@pytest.fixture
async def history(service: Service) -> AsyncIterator[AsyncChatHistoryClient]:
    async with AsyncChatHistoryClient(service.url) as client:
        yield client


async def test_a_stale_append_says_what_was_missed_and_is_sent_once(
    history: AsyncChatHistoryClient,
) -> None:
    conversation = new_id()
    said = {"role": "user", "content": "a"}
    (first,) = await history.add_messages(conversation, [said], create_for="ada", expected_last_seq=0)
    missed = await history.add_message(conversation, {**said, "content": "b"}, expected_last_seq=1)
    with pytest.raises(Stale) as stale:
        await history.add_messages(conversation, [said], expected_last_seq=first["seq"])
    assert (stale.value.missed, stale.value.last_seq, stale.value.version) == ([missed], 2, 2)
    assert isinstance(stale.value, Conflict)
    with pytest.raises(Stale):
        await history.add_items(conversation, [{"type": "reasoning"}], expected_version=1)
    await history.add_items(conversation, [{"type": "reasoning"}], expected_version=2)


async def test_what_was_read_is_changed_and_put_back(history: AsyncChatHistoryClient) -> None:
    conversation = new_id()
    stored = await history.add_messages(
        conversation, [{"role": "user", "content": text} for text in "abc"], create_for="ada"
    )
    changed = await history.replace_message(conversation, stored[1]["id"], {**stored[1], "content": "B"})
    assert (changed["seq"], changed["content"], changed["revision"]) == (2, "B", 1)
    again = await history.replace_message(conversation, changed["id"], changed)
    assert again == changed
    draft = {"role": "assistant", "content": "d"}
    with pytest.raises(NotFound):
        await history.replace_message(conversation, "draft", draft)
    assert (await history.replace_message(conversation, "draft", draft, upsert=True))["seq"] == 4
    kept = (await history.get_chat_history(conversation)).data
    assert await history.put_messages(conversation, kept) == kept
    fewer = await history.put_messages(conversation, [*kept[:1], {"id": "e", **draft}], expected_last_seq=4)
    assert [(each["seq"], each["content"]) for each in fewer] == [(1, "a"), (5, "d")]
    with pytest.raises(Stale):
        await history.put_messages(conversation, kept, expected_version=1)
    assert contents(await history.put_messages(conversation, kept[1:2], after=1)) == ["B"]


def test_a_lost_answer_of_a_conditional_write_looks_like_no_conflict(service: Service) -> None:
    conversation = new_id()
    with proxied(service.port) as proxy, ChatHistoryClient(f"http://127.0.0.1:{proxy.port}") as client:
        lost = [proxy.cut(method, before=False) for method in (b"POST /", b"PUT /")]
        stored = client.add_messages(
            conversation, [{"role": "user", "content": "once"}], create_for="ada", expected_last_seq=0
        )
        assert [each["seq"] for each in stored] == [1]
        new = {"id": "n", "role": "user", "content": "two"}
        put = client.put_messages(conversation, [*stored, new], expected_last_seq=1)
        assert contents(put) == ["once", "two"]
        assert [each.done for each in lost] == [1, 1]
        assert client.get_conversation(conversation)["version"] == 2


# -- conditions of deletions and other changes -----------------------------------------------------------

Write = Callable[..., Any]
WRITES: dict[str, Write] = {
    "delete_message": lambda client, of, **given: client.delete_message(of, "m3", **given),
    "delete_messages": lambda client, of, **given: client.delete_messages(of, after=1, **given),
    "pop_message": lambda client, of, **given: client.pop_message(of, **given),
    "pop_item": lambda client, of, **given: client.pop_item(of, **given),
    "update_conversation": lambda client, of, **given: client.update_conversation(of, title="t", **given),
    "delete_conversation": lambda client, of, **given: client.delete_conversation(of, **given),
}


def three(client: ChatHistoryClient) -> str:
    conversation = new_id()
    messages = [{"role": "user", "content": text, "id": f"m{text}"} for text in "123"]
    client.add_messages(conversation, messages, create_for="ada")
    return conversation


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    ("stale", "fresh"),
    [
        ({"expected_last_seq": 2}, {"expected_last_seq": 3, "user_id": "ada"}),
        ({"expected_version": 7}, {"expected_version": 1}),
    ],
    ids=["last_seq", "version"],
)
def test_a_stale_change_is_an_error_and_a_fresh_one_is_done(
    sync_history: ChatHistoryClient, write: Write, stale: Any, fresh: Any
) -> None:
    conversation = three(sync_history)
    before = sync_history.get_conversation(conversation)
    with pytest.raises(Stale) as refused:
        write(sync_history, conversation, **stale)
    assert (refused.value.last_seq, refused.value.version) == (3, 1)
    assert [each["seq"] for each in refused.value.missed] == ([3] if "expected_last_seq" in stale else [])
    assert sync_history.get_conversation(conversation) == before
    write(sync_history, conversation, **fresh)
    listed = {each["id"]: each for each in sync_history.stream_conversations("ada")}
    assert listed.get(conversation) != before


async def test_the_asynchronous_client_has_these_conditions_too(
    history: AsyncChatHistoryClient, sync_history: ChatHistoryClient
) -> None:
    for write in WRITES.values():
        conversation = three(sync_history)
        with pytest.raises(Stale):
            await write(history, conversation, expected_version=0)
        await write(history, conversation, expected_version=1, expected_last_seq=3)


def test_a_deletion_that_was_done_but_not_answered_never_looks_stale(service: Service) -> None:
    with proxied(service.port) as proxy, ChatHistoryClient(f"http://127.0.0.1:{proxy.port}") as client:
        conversation = three(client)
        lost = proxy.cut(b"DELETE ", before=False)
        with pytest.raises(httpx.TransportError) as unknown:
            client.delete_messages(conversation, after=1, expected_version=1)
        assert (lost.done, type(unknown.value.__cause__)) == (1, Stale)
        assert client.get_conversation(conversation)["message_count"] == 1
        # One that did not arrive is repeated.
        proxy.cut(b"DELETE ", before=True)
        client.delete_message(conversation, "m1", expected_version=2)
        assert client.get_conversation(conversation)["message_count"] == 0


def test_a_change_that_was_certainly_not_done_is_stale() -> None:
    stale = {"type": "urn:chat-history:problem:stale", "version": 2, "last_seq": 4}

    def call(first: httpx.Response | Exception) -> None:
        answers = [httpx.Response(409, json=stale), first]

        def answer(request: httpx.Request) -> httpx.Response:
            del request
            answered = answers.pop()
            if isinstance(answered, Exception):
                raise answered
            return answered

        with ChatHistoryClient("http://x", transport=httpx.MockTransport(answer)) as client:
            client.delete_messages("c", expected_version=1)

    for certain in (httpx.ConnectError("x"), httpx.PoolTimeout("x"), httpx.Response(429)):
        with pytest.raises(Stale):
            call(certain)
    with pytest.raises(httpx.ReadTimeout):
        call(httpx.ReadTimeout("x"))
    with pytest.raises(Unavailable):
        call(httpx.Response(503))
