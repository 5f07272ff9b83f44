"""The clients' conditions, replacements, and appends that create their conversation."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from chat_history_client import AsyncChatHistoryClient, ChatHistoryClient, Conflict, NotFound, Stale
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
