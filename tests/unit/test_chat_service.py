"""The rules of the service module, as a Python caller meets them."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest

from service.chat_service import ChatService
from service.clock import EPOCH
from service.database import Transaction
from service.errors import (
    ConversationIdTaken,
    ConversationNotFound,
    IdempotencyConflict,
    InvalidRequest,
    MessageNotFound,
)
from service.history import creating
from service.history.store import ConversationStore
from service.tenancy import TenantScope
from tests.strategies import REAL_IDS
from tests.unit.conftest import MockDatabase


async def test_a_conversation_is_got_or_created(chat: ChatService) -> None:
    made, created = await chat.get_or_create_conversation("ada", "c", title="T", metadata={"k": [1]})
    assert created
    assert (made.id, made.user_id, made.title, made.metadata) == ("c", "ada", "T", {"k": [1]})
    again, created = await chat.get_or_create_conversation("ada", "c")
    assert not created
    assert again.metadata == {"k": [1]}
    with pytest.raises(ConversationIdTaken):
        await chat.get_or_create_conversation("bob", "c")


async def test_an_id_begins_with_the_time_so_new_ones_stand_behind_all_others(chat: ChatService) -> None:
    made, _ = await chat.get_or_create_conversation("ada")
    assert re.fullmatch(r"conv_[0-9a-f]{32}", made.id)
    assert int(made.id[5:17], 16) == round(made.created_at.timestamp() * 1000)
    times = [
        EPOCH,
        made.created_at,
        made.created_at + timedelta(milliseconds=1),
        made.created_at.replace(year=9999),
    ]
    ids = [creating.new_id(time) for time in times]
    assert ids == sorted(ids)
    assert len({creating.new_id(made.created_at) for _ in range(1_000)}) == 1_000


async def test_messages_are_plain_dicts_in_the_callers_order(chat: ChatService) -> None:
    await chat.get_or_create_conversation("ada", "c")
    said = {"content": None, "role": "assistant", "zeta": 1, "alpha": {"b": 1, "a": 2}}
    appended = await chat.add_message("c", said)
    (stored,) = appended.messages
    assert list(stored) == ["id", "conversation_id", "user_id", "seq", "created_at", *said]
    assert list(stored["alpha"]) == ["b", "a"]
    assert not appended.replayed
    page = await chat.get_chat_history("c")
    assert page.messages == [stored]
    assert type(page.messages[0]["alpha"]) is dict


async def test_seq_counts_from_1_and_batches_stand_together(chat: ChatService) -> None:
    await chat.get_or_create_conversation("ada", "c")
    await chat.add_message("c", {"role": "user", "content": "1"})
    batch = await chat.add_messages("c", [{"role": "tool", "content": str(n)} for n in (2, 3, 4)])
    assert [each["seq"] for each in batch.messages] == [2, 3, 4]
    about = await chat.get_conversation("c")
    assert (about.last_seq, about.message_count) == (4, 4)


@pytest.mark.parametrize("verb", ["get", "update", "delete", "add", "history", "cut", "message"])
async def test_somebody_elses_conversation_is_not_found_by_any_verb(chat: ChatService, verb: str) -> None:
    await chat.get_or_create_conversation("ada", "c")
    calls: dict[str, Any] = {
        "get": lambda owner: chat.get_conversation("c", owner),
        "update": lambda owner: chat.update_conversation("c", owner, title="x"),
        "delete": lambda owner: chat.delete_conversation("c", owner),
        "add": lambda owner: chat.add_message("c", {"role": "user"}, owner),
        "history": lambda owner: chat.get_chat_history("c", owner),
        "cut": lambda owner: chat.delete_messages("c", owner),
        "message": lambda owner: chat.get_message("c", "m", owner),
    }
    for owner in ("bob", ""):
        with pytest.raises(ConversationNotFound):
            await calls[verb](owner)


async def test_a_replay_is_told_from_a_conflict(chat: ChatService) -> None:
    await chat.get_or_create_conversation("ada", "c")
    message = {"role": "user", "content": "x", "id": "m"}
    first = await chat.add_message("c", message)
    again = await chat.add_message("c", message)
    assert (again.replayed, again.messages) == (True, first.messages)
    with pytest.raises(IdempotencyConflict):
        await chat.add_message("c", message | {"content": "y"})


async def test_a_commit_whose_answer_was_lost_is_found_out_by_the_ids(
    chat: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run committed, nobody knows, and the work is run again: it must not be called a replay."""

    async def commits_unheard(work: Any, transaction: Transaction | None = None) -> Any:
        transaction = transaction or Transaction()
        await work(transaction)
        transaction.may_have_committed = True
        return await work(transaction)

    monkeypatch.setattr(chat._store.database, "transaction", commits_unheard)
    _, created = await chat.get_or_create_conversation("ada", "c")
    assert created
    appended = await chat.add_messages("c", [{"role": "user", "content": n} for n in "ab"])
    assert not appended.replayed
    assert (await chat.get_chat_history("c", limit=9)).messages == appended.messages
    await chat.delete_message("c", appended.messages[0]["id"])
    assert (await chat.get_chat_history("c", limit=9)).messages == appended.messages[1:]
    await chat.delete_conversation("c")
    with pytest.raises(ConversationNotFound):
        await chat.get_conversation("c")


@pytest.mark.parametrize("bad", [{"limit": 0}, {"limit": 1001}, {"last": 0}, {"last": 5000}])
async def test_a_page_has_limits(chat: ChatService, bad: dict[str, int]) -> None:
    await chat.get_or_create_conversation("ada", "c")
    with pytest.raises(InvalidRequest):
        await chat.get_chat_history("c", **bad)  # type: ignore[arg-type]


async def test_a_message_that_is_not_there_is_not_found(chat: ChatService) -> None:
    await chat.get_or_create_conversation("ada", "c")
    with pytest.raises(MessageNotFound):
        await chat.get_message("c", "none")


@pytest.mark.parametrize("bad", ["", "x" * 1_501, "é" * 751, ".", "..", "a\n", "\x7f", "\x85", None, 5])
async def test_ids_have_a_form(chat: ChatService, bad: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await chat.get_or_create_conversation("ada", bad if bad is not None else "")
    assert caught.value.faults[0].path == "$.id"
    with pytest.raises(InvalidRequest) as caught:
        await chat.get_or_create_conversation(bad)
    assert caught.value.faults[0].path == "$.user_id"


@pytest.mark.parametrize(
    "good", ["a", "A-Z_0.9", "user:1@example~x", "...", "a/b", "100%", "é" * 750, *REAL_IDS]
)
async def test_ids_of_that_form_are_taken(chat: ChatService, good: str) -> None:
    made, _ = await chat.get_or_create_conversation(good, good)
    assert made.id == good


class LosesItsAnswers(MockDatabase):
    """Every commit takes effect and its answer is lost, so all work is run once more."""

    async def transaction(self, work: Any, transaction: Transaction | None = None) -> Any:
        transaction = transaction or Transaction()
        await work(transaction)
        transaction.may_have_committed = True
        return await work(transaction)


async def test_work_that_had_committed_already_is_not_done_again(chat: ChatService) -> None:
    await chat.get_or_create_conversation("ada", "c")
    stored = (await chat.add_messages("c", [{"role": "user", "content": f"{n}"} for n in range(4)])).messages
    settings = chat._store.settings
    losing = ChatService(ConversationStore(LosesItsAnswers(settings), settings), TenantScope())
    assert await losing.pop_message("c") == stored[3]
    await losing.delete_message("c", stored[0]["id"])
    assert (await chat.get_chat_history("c")).messages == stored[1:3]
    appended = await losing.add_message("c", {"role": "user", "content": "once"})
    assert (appended.replayed, len((await chat.get_chat_history("c")).messages)) == (False, 3)
    assert await losing.delete_messages("c", after=2) == 2
    await losing.delete_conversation("c")
    with pytest.raises(ConversationNotFound):
        await chat.get_conversation("c")
