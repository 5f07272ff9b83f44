"""A page costs the page: counted in commands and in documents that the engine looked at, not in time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import httpx
import pytest
from pymongo import MongoClient, monitoring
from pymongo.database import Database as MongoDatabase

from service.app import create_app
from service.chat_service import ChatService, ContextRequest, ShortenedResults
from service.database import Database
from service.errors import ConversationNotFound
from service.formats import bson_codec
from service.history.listing import window_filter
from service.history.store import ConversationStore
from service.settings import WINDOW_SEQS_MAX, Settings
from service.tenancy import OwnerKey, TenantScope, escaped
from service.user_data import UserData
from tests.harness import Service, new_id

LONG, MIDDLE, SHORT = 100_000, 500, 50
START = datetime(2026, 1, 1, tzinfo=UTC)
# The tokens of each message.
TOKENS = 100


class Commands(monitoring.CommandListener):
    """Every command that the driver sends to our database, in order.

    But for what a process asks three times a second while it keeps anything: whether somebody was erased.
    """

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.answers: list[Any] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        own = event.database_name != "admin" or event.command_name == "commitTransaction"
        if own and event.command.get("find") not in {"erasures", "erasure_receipts"}:
            self.sent.append(event.command)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.answers.append(event.reply)

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


@pytest.fixture(scope="module")
def operator(service: Service) -> Iterator[MongoDatabase[dict[str, Any]]]:
    with MongoClient[dict[str, Any]](service.database_url) as client:
        yield client.get_default_database()


@pytest.fixture(scope="module")
def talks(operator: MongoDatabase[dict[str, Any]]) -> dict[int, str]:
    """A conversation of 100,000 messages, one of 500 and one of 50, as the service would have stored them."""
    made = {}
    for size in (LONG, MIDDLE, SHORT):
        conversation = made[size] = new_id()
        about: dict[str, Any] = {"user_id": "ada", "title": None, "metadata": {}, "exact_metadata": None}
        end = START + timedelta(seconds=size)
        counts = {"created_at": START, "updated_at": end, "last_seq": size, "message_count": size}
        totals = {"tokens_total": size * TOKENS, "turns_total": size // 2}
        operator.conversations.insert_one({"_id": conversation, **about, **counts, **totals})
        # The engine ends each call with a transaction, so few large calls cost it less than many small ones.
        for first in range(1, size + 1, 10_000):
            operator.messages.insert_many(
                {
                    "_id": f"{conversation}/m{seq}",
                    "conversation_id": conversation,
                    "user_id": "ada",
                    "seq": seq,
                    "created_at": START + timedelta(seconds=seq),
                    "role": "system" if seq == 7 else "assistant" if seq % 2 else "user",
                    "content": f"{seq}",
                    "token_count": TOKENS,
                    "_tokens_before": (seq - 1) * TOKENS,
                    "_turns_before": (seq - 1) // 2,
                }
                for seq in range(first, min(first + 10_000, size + 1))
            )
    return made


@pytest.fixture
async def counted(service: Service) -> AsyncIterator[tuple[ChatService, Commands, Database]]:
    """The service module itself, on the engine, with every command counted."""
    settings = Settings(mongodb_url=service.database_url, database_timeout_ms=60_000)
    commands = Commands()
    monitoring.register(commands)
    database = Database(settings)
    await database.open()
    monitoring._LISTENERS.command_listeners.remove(commands)
    commands.sent.clear()
    store = ConversationStore(database, settings)
    yield ChatService(store, TenantScope()), commands, database
    await store.close()
    await database.close()


READS: list[tuple[str, dict[str, Any]]] = [
    ("the first page", {}),
    ("the last page", {"last": 50}),
    ("a page in the middle", {"after": LONG // 2}),
    ("a page in the middle, backwards", {"before": LONG // 2, "order": "desc"}),
    ("a page of one role", {"after": LONG // 2, "role": "user"}),
    ("a role that hardly occurs", {"role": "system"}),
    ("from a time on", {"since": START + timedelta(seconds=LONG // 3)}),
    ("up to a time", {"until": START + timedelta(seconds=LONG // 3), "last": 50}),
]
# A time is found by halves on this engine, which takes the logarithm of the conversation.
TIME_STEPS = 17


@pytest.mark.parametrize(("which", "query"), READS, ids=[name for name, _ in READS])
async def test_a_page_costs_the_same_in_a_conversation_of_100000_messages_as_in_one_of_50(
    counted: Any,
    talks: dict[int, str],
    operator: MongoDatabase[dict[str, Any]],
    which: str,
    query: dict[str, Any],
) -> None:
    chat, commands, _ = counted
    page = await chat.get_chat_history(talks[LONG], **query)
    assert len(page.messages) == (1 if query.get("role") == "system" else 50)
    finds = [each for each in commands.sent if each["find"] == "messages"]
    by_time = "since" in query or "until" in query
    # A role that hardly occurs is looked for in windows that are empty, and cost next to nothing.
    windows = LONG // WINDOW_SEQS_MAX if which == "a role that hardly occurs" else 0
    assert len(finds) <= (1 if not ({"role"} & set(query) or by_time) else TIME_STEPS + 3 + windows), which
    looked_at = [_examined(operator, each) for each in finds]
    assert all(plan in INDEXES for plan, _ in looked_at), looked_at
    assert max(count for _, count in looked_at) <= 130
    assert sum(count for _, count in looked_at) <= 51 + 51 + (1 + TIME_STEPS) * 2 + 64 * by_time


async def test_a_page_that_was_read_before_costs_one_command(counted: Any) -> None:
    """The conversation is read, which tells that nothing has changed but what this process has appended.

    What another process has appended is read.
    """
    chat, commands, database = counted
    other = ChatService(ConversationStore(database, Settings()), TenantScope())
    made, _ = await chat.get_or_create_conversation("ada")
    messages = [{"role": "user", "content": f"{n}"} for n in range(80)]
    await chat.add_messages(made.id, messages)

    async def newest() -> tuple[list[bytes], list[str]]:
        commands.sent.clear()
        found = await chat.get_encoded_history(made.id, last=50)
        return found.messages, [each["find"] for each in commands.sent]

    cold, read = await newest()
    assert read == ["conversations", "messages"]
    assert await newest() == (cold, ["conversations"])
    (new,) = (await chat.add_message(made.id, {"role": "user", "content": "new"})).messages
    warm, read = await newest()
    assert (warm[:-1], read) == (cold[1:], ["conversations"])
    assert b'"content":"new"' in warm[-1]
    cold = warm
    (new,) = (await other.add_message(made.id, {"role": "user", "content": "newer"})).messages
    warm, read = await newest()
    # The second look tells that nothing was deleted or replaced while the new message was read.
    assert (warm[:-1], read) == (cold[1:], ["conversations", "messages", "conversations"])
    assert b'"content":"newer"' in warm[-1]
    assert commands.sent[1]["filter"]["seq"] == {"$gt": new["seq"] - 1, "$lte": new["seq"]}
    assert await newest() == (warm, ["conversations"])
    await chat.delete_message(made.id, new["id"])
    again, read = await newest()
    assert (again, "messages" in read) == (cold, True)


CONTEXTS = [
    ContextRequest("tokens", 8_000, form="openai", repair=True),
    ContextRequest("tokens", 8_000, shortened=ShortenedResults(3, 50)),
    ContextRequest("messages", 80),
    ContextRequest("turns", 40),
]


@pytest.mark.parametrize("wanted", CONTEXTS, ids=lambda wanted: f"{wanted.unit}-{wanted.form}")
async def test_a_context_costs_the_same_in_a_conversation_of_100000_messages_as_in_one_of_500(
    counted: Any, talks: dict[int, str], operator: MongoDatabase[dict[str, Any]], wanted: ContextRequest
) -> None:
    chat, commands, _ = counted
    costs = []
    for size in (LONG, MIDDLE):
        commands.sent.clear()
        made = await chat.get_context(talks[size], wanted)
        assert 50 <= len(made["messages"]) <= 80
        finds = [each for each in commands.sent if each["find"] != "conversations"]
        costs.append([(each["find"], *_examined(operator, each)) for each in finds])
        assert len(commands.sent) == 1 + len(finds)
    assert costs[0] == costs[1]
    # The head, two parts of the end, and the user's message before them.
    assert len(costs[0]) <= 1 + 2 + 2
    assert sum(count for _, _, count in costs[0]) <= 2 + 2 * 64 + 2


INDEXES = {"conversation_id_1_seq_1", "conversation_id_1_created_at_1", "conversation_id_1_role_1_seq_1"}


def _examined(operator: MongoDatabase[dict[str, Any]], find: Any) -> tuple[str, int]:
    """The index that serves a find that was sent, and how many documents it makes the engine look at.

    The embedded engine looks at all that the filter matches, whatever its own statistics say.
    """
    names = ("find", "filter", "sort", "limit")
    command = {name: find[name] for name in names if name in find}
    explained = operator.command("explain", command, verbosity="executionStats")
    plan = explained["queryPlanner"]["winningPlan"]
    while plan["stage"] != "IXSCAN":
        plan = plan["inputStage"]
    if "secantusVersion" in operator.command("buildInfo"):
        return plan["indexName"], operator[find["find"]].count_documents(find["filter"])
    return plan["indexName"], explained["executionStats"]["totalDocsExamined"]


async def test_times_use_the_index_of_times(counted: Any, talks: Any, operator: Any) -> None:
    chat, commands, _ = counted
    await chat.get_chat_history(talks[LONG], since=START + timedelta(seconds=80_000))
    plans = [_examined(operator, each)[0] for each in commands.sent if each["find"] == "messages"]
    assert plans.count("conversation_id_1_created_at_1") == 1


async def test_a_role_uses_the_index_of_roles(counted: Any, talks: Any, operator: Any) -> None:
    chat, commands, _ = counted
    await chat.get_chat_history(talks[LONG], after=100, role="user")
    plans = {_examined(operator, each)[0] for each in commands.sent if each["find"] == "messages"}
    assert plans == {"conversation_id_1_role_1_seq_1"}


async def test_the_list_costs_the_page_and_uses_its_index(counted: Any, operator: Any) -> None:
    chat, commands, _ = counted
    user = new_id("user")
    start = datetime.now(UTC) - timedelta(minutes=3_000)
    operator.conversations.insert_many(
        {
            "_id": f"{user}-{n}",
            "user_id": user,
            "metadata": {},
            "created_at": start,
            "updated_at": start + timedelta(minutes=n),
            "active_at": start + timedelta(minutes=n),
            "last_seq": 0,
            "message_count": 0,
        }
        for n in range(3_000)
    )
    after = None
    for page_number in range(4):
        commands.sent.clear()
        page = await chat.list_conversations(user, limit=20, after=after)
        expected = [f"{user}-{2999 - page_number * 20 - n}" for n in range(20)]
        assert [each.id for each in page.conversations] == expected
        assert page.has_more
        looked_at = 0
        for find in commands.sent:
            plan, count = _examined(operator, find)
            assert plan == "user_id_1_active_at_-1__id_1"
            looked_at += count
        # A window is at most eight times as wide as the one before it.
        assert looked_at <= 20 * 8 + 20
        after = page.next


def test_a_window_of_the_list_has_its_beginning_and_not_its_end(operator: Any) -> None:
    user, millisecond = new_id("user"), timedelta(milliseconds=1)
    operator.conversations.insert_many(
        {"_id": f"{user}-{n}", "user_id": user, "active_at": START + n * millisecond} for n in range(40)
    )
    for begin, end in ((0, 1), (7, 8), (0, 40), (13, 13), (5, 39)):
        query = window_filter(OwnerKey(user), START + begin * millisecond, START + end * millisecond)
        found = {each["_id"] for each in operator.conversations.find(query)}
        assert found == {f"{user}-{n}" for n in range(begin, end)}


async def test_on_mongodb_one_query_reads_the_same(counted: Any, talks: Any) -> None:
    """MongoDB cuts a read at its limit, so there the service asks once; here only the answers count."""
    chat, commands, database = counted
    queries: list[dict[str, Any]] = [
        {},
        {"after": 20, "limit": 7},
        {"last": 9},
        {"order": "desc", "before": 30},
        {"role": "user", "limit": 9},
        {"since": START + timedelta(seconds=10), "until": START + timedelta(seconds=30)},
        {"until": START + timedelta(seconds=3)},
    ]
    here = [await chat.get_chat_history(talks[SHORT], **query) for query in queries]
    listed = await chat.list_conversations("ada", limit=3)
    database.embedded_engine = False
    commands.sent.clear()
    assert [await chat.get_chat_history(talks[SHORT], **query) for query in queries] == here
    assert len(commands.sent) == len(queries) * 2 + 6  # a conversation and a page each; two for each time
    assert await chat.list_conversations("ada", limit=3) == listed


async def test_an_append_is_three_round_trips_and_the_first_one_four_in_one_transaction(counted: Any) -> None:
    chat, commands, _ = counted
    conversation, _ = await chat.get_or_create_conversation("ada", new_id())
    for number, size in enumerate((1, 4, 1_000)):
        commands.sent.clear()
        await chat.add_messages(conversation.id, [{"role": "user", "content": "x"}] * size)
        # The process has not appended to it before, so it must read what it counts from.
        first = ["find"] if number == 0 else []
        sent = [next(iter(each)) for each in commands.sent]
        assert sent == ["update", *first, "insert", "commitTransaction"]
        assert len({each["txnNumber"] for each in commands.sent}) == 1
        assert commands.sent[-1]["writeConcern"] == {"w": "majority", "j": True}


async def test_a_pop_is_seven_round_trips_all_of_them_in_its_transaction(counted: Any) -> None:
    chat, commands, _ = counted
    conversation, _ = await chat.get_or_create_conversation("ada", new_id())
    await chat.add_messages(conversation.id, [{"role": "user"}] * 3)
    commands.sent.clear()
    await chat.pop_message(conversation.id)
    sent = [next(iter(each)) for each in commands.sent]
    # Locked, found, deleted, and uncounted with the part of the history that changed.
    assert sent == ["update", "find", "find", "delete", "update", "find", "commitTransaction"]
    assert len({each["txnNumber"] for each in commands.sent}) == 1


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "mongodb"])
async def test_a_call_on_messages_moves_neither_title_nor_metadata(counted: Any, embedded: bool) -> None:
    chat, commands, database = counted
    database.embedded_engine = embedded
    large = {"$ref": "m" * 60_000, "$id": 1}  # an object whose exact copy the embedded engine keeps, too
    conversation, _ = await chat.get_or_create_conversation("ada", new_id(), title="T", metadata={"x": large})
    key = conversation.id
    calls: list[Any] = [
        lambda: chat.add_messages(key, [{"role": "user", "id": f"m{n}"} for n in range(5)]),
        lambda: chat.add_messages(key, [{"role": "user", "id": f"m{n}"} for n in range(5)]),  # a replay
        lambda: chat.get_chat_history(key, last=3),
        lambda: chat.get_chat_history(key, since=START, role="user"),
        lambda: anext(chat.stream_chat_history(key)),
        lambda: chat.get_message(key, "m1"),
        lambda: chat.get_context(key, CONTEXTS[0]),
        lambda: chat.delete_message(key, "m1"),
        lambda: chat.pop_message(key),
        lambda: chat.delete_messages(key, after=1),
        lambda: chat.delete_conversation(key),
    ]
    for number, call in enumerate(calls):
        commands.sent.clear()
        commands.answers.clear()
        await call()
        assert sum(len(bson.encode(each)) for each in (*commands.sent, *commands.answers)) < 12_000, number
        assert not any({"title", "metadata", "exact_metadata"} & _names(each) for each in commands.answers)


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "mongodb"])
async def test_an_import_moves_the_metadata_once_and_counts_nothing(counted: Any, embedded: bool) -> None:
    chat, commands, database = counted
    database.embedded_engine = embedded
    user_data = UserData(ConversationStore(database, chat._store.settings), TenantScope())
    at, size, key = START.isoformat(), 1_100, new_id()  # three batches
    exported = {
        "id": key,
        "user_id": "ada",
        "title": "T",
        "metadata": {"x": "m" * 60_000},
        "created_at": at,
        "updated_at": at,
        "last_seq": size,
        "message_count": size,
    }
    service_fields = {"conversation_id": key, "user_id": "ada", "created_at": at}
    messages = [{"id": f"m{n}", "seq": n, "role": "user", **service_fields} for n in range(1, size + 1)]
    for stored in (size, None):  # then the same once more, which finds it stored
        commands.sent.clear()
        commands.answers.clear()
        assert await user_data.import_conversation(exported, messages, dry_run=False) == stored
        assert not any({"title", "metadata", "exact_metadata"} & _names(each) for each in commands.answers)
        sent = [len(bson.encode(each)) for each in commands.sent if "insert" not in each]
        assert sum(sent) < (80_000 if stored else 20_000)
        # The one count is that of what an older version left, before the id is taken: it matches nothing.
        counts = [each for each in commands.sent if next(iter(each)) in {"aggregate", "count"}]
        assert len(counts) == (1 if stored else 0)
        assert not counts or commands.sent.index(counts[0]) <= 1


def _names(answer: Any) -> set[str]:
    """The names of all fields of the documents in an answer."""
    found = [answer.get("value") or {}]
    for batch in (answer.get("cursor") or {}).get("firstBatch", []):
        # A raw cursor's batch is one element: documents that stand one after the other.
        found += map(bson.decode, bson_codec.iter_documents(batch)) if isinstance(batch, bytes) else [batch]
    return {name for each in found for name in each}


async def test_every_write_is_part_of_a_transaction(counted: Any) -> None:
    chat, commands, _ = counted
    conversation, _ = await chat.get_or_create_conversation("ada", new_id())
    stored = await chat.add_messages(conversation.id, [{"role": "user"}] * 5)
    await chat.update_conversation(conversation.id, title="x")
    await chat.delete_message(conversation.id, stored.messages[0]["id"])
    await chat.pop_message(conversation.id)
    await chat.start_conversation("ada", [{"role": "user"}])
    await chat.delete_messages(conversation.id, after=3)
    await chat.delete_conversation(conversation.id)
    writes = [each for each in commands.sent if next(iter(each)) in {"insert", "update", "delete"}]
    assert len(writes) == 20
    assert all(each["autocommit"] is False for each in writes)


async def test_reads_are_of_what_a_majority_has(counted: Any, talks: Any) -> None:
    chat, commands, _ = counted
    await chat.get_chat_history(talks[SHORT])
    assert [each["readConcern"]["level"] for each in commands.sent] == ["majority", "majority"]


def test_the_indexes_are_the_ones_that_documents_declares(operator: Any) -> None:
    messages = operator.messages.index_information()
    assert set(messages) == {"_id_", *INDEXES}
    assert messages["conversation_id_1_seq_1"]["unique"]
    conversations = operator.conversations.index_information()
    listed, owned = "user_id_1_active_at_-1__id_1", "user_id_1__id_1"
    assert set(conversations) == {"_id_", listed, owned, "due_at_1__id_1_all"}
    asked = {"_id": "c", "user_id": "ada"}
    assert _examined(operator, {"find": "conversations", "filter": asked, "limit": 1})[0] == owned


@pytest.mark.parametrize("form", ["{}", "auth0|{}/%2F 张"])
async def test_what_is_not_yours_costs_what_is_not_there(counted: Any, form: str) -> None:
    """The same commands, answered alike: there is no work by whose time one could tell the two apart."""
    chat, commands, _ = counted
    hers, missing, other = (form.format(new_id()) for _ in range(3))
    await chat.get_or_create_conversation(form.format("ada"), hers)
    stored = (await chat.add_message(hers, {"role": "user"}, idempotency_key="k")).messages[0]
    verbs: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (chat.get_conversation, (), {}),
        (chat.update_conversation, (), {"title": "x"}),
        (chat.get_chat_history, (), {"last": 5}),
        (chat.get_message, (stored["id"],), {}),
        (chat.add_message, ({"role": "user"},), {"idempotency_key": "k"}),
        (chat.delete_message, (stored["id"],), {}),
        (chat.pop_message, (), {}),
        (chat.delete_messages, (), {}),
        (chat.get_context, (CONTEXTS[0],), {}),
        (chat.create_checkpoint, (1, "s"), {}),
        (chat.list_checkpoints, (), {}),
        (chat.delete_checkpoint, ("cp_1",), {}),
        (chat.delete_conversation, (), {}),
    ]
    for verb, arguments, options in verbs:
        shapes = []
        for conversation in (hers, missing, other):
            commands.sent.clear()
            with pytest.raises(ConversationNotFound):
                await verb(conversation, *arguments, user_id=form.format("bob"), **options)
            text = str([_without_times(each) for each in commands.sent])
            shapes.append(text.replace(escaped(conversation), "ID"))
        assert shapes[0] == shapes[1] == shapes[2], verb


# `maxTimeMS` is what is left of the deadline, which a busy machine makes differ.
_OF_THE_MOMENT = {"lsid", "txnNumber", "$clusterTime", "maxTimeMS"}


def _without_times(command: Any) -> Any:
    """A command as what it asks for: without the session, its number, and the clock."""
    asked = {name: value for name, value in command.items() if name not in _OF_THE_MOMENT}
    for update in asked.get("updates", []):
        update["u"].pop("$max", None)
    return asked


async def test_a_page_of_the_console_costs_the_same_commands_of_100000_messages_as_of_500(
    service: Service, talks: dict[int, str]
) -> None:
    commands = Commands()
    monitoring.register(commands)
    app = create_app(Settings(_env_file=None, mongodb_url=service.database_url))
    sent: dict[tuple[str, int], list[tuple[str, Any]]] = {}
    try:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http,
        ):
            await http.get("/console/state")  # reads the secret
            for which in ("", "&before=50", "&after=40", "&seq=60"):
                for size in (LONG, MIDDLE):
                    conversation = talks[size]
                    commands.sent.clear()
                    page = await http.get(f"/console/conversation?id={conversation}{which}")
                    assert page.status_code == 200
                    # Those of the maintenance, which works beside it, are about other conversations.
                    sought = [each for each in commands.sent if "find" in each]
                    finds = [each for each in sought if conversation in each["filter"].values()]
                    sent[which, size] = [(each["find"], each.get("limit")) for each in finds]
    finally:
        monitoring._LISTENERS.command_listeners.remove(commands)
    for which in ("", "&before=50", "&after=40", "&seq=60"):
        assert sent[which, LONG] == sent[which, MIDDLE], which
        assert len(sent[which, LONG]) <= 4
