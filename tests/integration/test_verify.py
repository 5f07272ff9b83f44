"""`chat-history verify`: every invariant broken on purpose, named, and repaired where no guess is needed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson
import httpx
import pytest
from bson import ObjectId
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import MongoClient

from service.database import Database
from service.documents import Message
from service.history.store import ConversationStore
from service.maintenance.findings import Violation
from service.maintenance.verify import Verifier
from service.settings import Settings
from tests.harness import Service, append, command, create, on_database, running


def verify(service: Service, *options: str, **environment: str) -> tuple[int, list[str]]:
    done = command(service, "verify", *options, **environment)
    return done.returncode, (done.stdout or done.stderr).strip().splitlines()


@pytest.fixture
def broken(service: Service, client: httpx.Client, conversation: str) -> Iterator[tuple[Any, Any]]:
    """A database of its own with one sound conversation, to break, and how to verify it."""
    append(client, conversation, *({"role": "user", "content": str(n)} for n in range(5)))
    name = f"verify_{conversation[2:]}"
    url = on_database(service.database_url, name)
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        original, database = operator.get_default_database(), operator[name]
        database.conversations.insert_one(original.conversations.find_one({"_id": conversation}) or {})
        database.messages.insert_many(original.messages.find({"conversation_id": conversation}))
        yield (lambda *options: verify(service, *options, CHAT_MONGODB_URL=url)), database


def test_a_sound_database_passes_with_the_service_running_and_without(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        with service.client() as client:
            create(client, "c")
            append(client, "c", *({"role": "user", "content": "x"} for _ in range(1_000)))
            append(client, "c", *({"role": "user", "content": "x"} for _ in range(500)))
            client.delete("/conversations/c/messages?after=1200")
            create(client, "empty")
        sound = (0, ["2 conversations, 1200 messages, 0 violations, 0 left"])
        assert verify(service) == sound
        service.stop()
        assert verify(service) == sound


def first(database: Any) -> Any:
    return database.messages.find_one({"seq": 1})


def delete_one(database: Any) -> None:
    database.messages.delete_one({"seq": 3})


def lower_last_seq(database: Any) -> None:
    database.conversations.update_one({}, {"$set": {"last_seq": 4}})


def change_owner(database: Any) -> None:
    database.messages.update_one({"seq": 2}, {"$set": {"user_id": "bob"}})


def interrupt_deletion(database: Any) -> None:
    database.conversations.update_one({}, {"$set": {"user_id": ""}})


def run_backwards(database: Any) -> None:
    database.messages.update_one({"seq": 4}, {"$set": {"created_at": datetime(2000, 1, 1, tzinfo=UTC)}})


def orphan(database: Any) -> None:
    database.messages.insert_one(first(database) | {"_id": "gone/m", "conversation_id": "gone"})


def misname(database: Any) -> None:
    database.messages.insert_one(
        first(database)
        | {"_id": "c", "seq": 6, "created_at": database.messages.find_one({"seq": 5})["created_at"]}
    )
    database.conversations.update_one({}, {"$inc": {"last_seq": 1, "message_count": 1}})


def zero(database: Any) -> None:
    database.messages.update_one({"seq": 1}, {"$set": {"seq": 0}})


def double(database: Any) -> None:
    database.messages.update_one({"seq": 2}, {"$set": {"seq": 3}})


def set_back(database: Any) -> None:
    long_ago = datetime(2000, 1, 1, tzinfo=UTC)
    database.conversations.update_one({}, {"$set": {"updated_at": long_ago, "created_at": long_ago}})


def set_before_its_own_beginning(database: Any) -> None:
    database.conversations.update_one({}, {"$set": {"created_at": datetime(2100, 1, 1, tzinfo=UTC)}})


MENDED = [
    (delete_one, "message_count is 5, and there are 4 messages"),
    (lower_last_seq, "last_seq is 4, and there is a message with seq 5"),
    (change_owner, "says that it is another user's"),
    (interrupt_deletion, "its deletion was interrupted"),
    (set_back, "updated_at is 2000-01-01T00:00:00+00:00, and there is "),
    (set_before_its_own_beginning, "and there is 2100-01-01T00:00:00+00:00"),
]
LEFT = [
    (run_backwards, ": created_at runs backwards at seq 4"),
    (orphan, "gone: there are messages without this conversation"),
    (misname, "the message 'c' has an id that is not well formed"),
    (zero, "has seq 0"),
    (double, "seq 3 stands twice"),
]


@pytest.mark.parametrize(("damage", "says"), MENDED, ids=[each.__name__ for each, _ in MENDED])
def test_what_needs_no_guess_is_named_and_repaired(broken: Any, damage: Any, says: str) -> None:
    check, database = broken
    damage(database)
    code, lines = check()
    assert code == 1
    assert says in lines[0]
    assert lines[-1].endswith("1 violations, 1 left")
    code, lines = check("--repair")
    assert code == 0
    assert says in lines[0]
    assert "(repaired" in lines[0]
    code, lines = check()
    assert (code, len(lines)) == (0, 1)


def test_a_repair_of_messages_is_a_change_of_the_history(broken: Any) -> None:
    """So nobody who keeps what was read before takes it for what is stored now."""
    check, database = broken
    before = database.conversations.find_one({})
    change_owner(database)
    check("--repair")
    after = database.conversations.find_one({})
    assert after["version"] == before["version"] + 1
    assert after["rewrites"] == before["rewrites"] + 1


def test_any_number_of_messages_that_an_import_left_is_removed(broken: Any, service: Service) -> None:
    """Each part of them in the time of one call, which would not do for all of them."""
    check, database = broken
    message = first(database)
    database.messages.insert_many(
        message | {"_id": f"{message['conversation_id']}/theirs{seq}", "user_id": "another", "seq": seq}
        for seq in range(6, 2_006)
    )
    url = on_database(service.database_url, database.name)
    code, lines = verify(service, "--repair", CHAT_MONGODB_URL=url, CHAT_DATABASE_TIMEOUT_MS="2000")
    assert (code, "2000 messages of another user stand behind its last one" in lines[0]) == (0, True), lines
    assert database.messages.count_documents({}) == 5
    assert check()[0] == 0


@pytest.mark.parametrize(("damage", "says"), LEFT, ids=[each.__name__ for each, _ in LEFT])
def test_what_would_be_a_guess_is_named_and_left(broken: Any, damage: Any, says: str) -> None:
    check, database = broken
    damage(database)
    before = list(database.messages.find())
    code, lines = check("--repair")
    assert code == 1
    assert says in lines[0]
    assert "(left" in lines[0]
    assert list(database.messages.find()) == before


SECRET = "what nobody may see"
CONVERSATIONS: dict[Any, dict[str, Any]] = {
    "text-for-a-counter": {"last_seq": SECRET},
    "a-number-as-text": {"message_count": "5"},
    "a-list-for-a-title": {"title": [SECRET]},
    "text-for-a-time": {"created_at": SECRET},
    "text-for-metadata": {"metadata": SECRET},
    "no-owner": {"user_id": None, "title": SECRET},
    ObjectId("0123456789ab0123456789ab"): {"title": SECRET},
    7: {"title": SECRET},
}
MESSAGES: dict[Any, dict[str, Any]] = {
    "text-for-seq": {"seq": SECRET},
    "a-fraction-for-seq": {"seq": 2.5, "content": SECRET},
    "no-seq": {"seq": None, "content": SECRET},
    "text-for-a-time": {"seq": 7, "created_at": SECRET},
    "a-number-for-its-conversation": {"seq": 8, "conversation_id": 7, "content": SECRET},
    "no-conversation": {"seq": 9, "conversation_id": None, "content": SECRET},
    ObjectId("ba9876543210ba9876543210"): {"seq": 10, "content": SECRET},
    12: {"seq": 11, "content": SECRET},
}


def test_what_is_not_well_formed_is_named_without_its_values_and_the_rest_is_read(broken: Any) -> None:
    check, database = broken
    conversation, message = database.conversations.find_one(), first(database)
    own = conversation["_id"]
    database.conversations.insert_many(
        {**conversation, "message_count": 0, "_id": key, **wrong} for key, wrong in CONVERSATIONS.items()
    )
    # By hand, and with nothing but a key.
    bare = database.conversations.insert_one({"title": SECRET}).inserted_id
    database.conversations.insert_one({**conversation, "_id": "zz", "message_count": 3})
    names = {key: f"{own}/{key}" if isinstance(key, str) else key for key in MESSAGES}
    database.messages.insert_many({**message, "_id": names[key], **wrong} for key, wrong in MESSAGES.items())
    before = list(database.messages.find())
    code, lines = check("--repair")
    said = "\n".join(lines)
    assert code == 1, said
    named = [line for line in lines if "not well formed" in line]
    for key in [*CONVERSATIONS, bare]:
        assert f"{key}: it is not well formed (left: correct it, or remove it)" in lines
    for name in names.values():
        assert sum(f"the message {name} is not well formed" in line for line in named) == 1, name
    assert len(named) == len(CONVERSATIONS) + 1 + len(MESSAGES)
    assert SECRET not in said
    assert "Traceback" not in said
    # The walk went on, and repaired what needs no guess. What a malformed message counts for is left alone.
    assert "zz: message_count is 3, and there are 0 messages (repaired)" in lines
    assert not any(line.startswith(f"{own}: message_count") for line in lines)
    assert list(database.messages.find()) == before


def appended(client: httpx.Client, conversation: str, count: int) -> list[Any]:
    return append(client, conversation, *({"role": "user", "content": f"{n}"} for n in range(count)))


class TwoShards(Database):
    """A database whose messages are on two shards: here, and in another collection, each with unique ids."""

    def __init__(self, settings: Settings, other: Any) -> None:
        super().__init__(settings)
        self._other = other

    async def _prepare(self) -> None:
        await super()._prepare()
        self.sharded = True

    async def read(self, document: Any, query: Any, **options: Any) -> list[bytes]:
        found = await super().read(document, query, **options)
        if document is Message:
            found += [each.raw for each in self._other.find(query)]
        return sorted(found, key=lambda raw: bson.decode(raw).get("seq", 0))

    async def pages(self, document: Any, query: Any, **options: Any) -> AsyncIterator[list[bytes]]:
        size = options.pop("size")
        options.pop("seconds")
        found = await self.read(document, query, **options)
        for begin in range(0, len(found), size):
            yield found[begin : begin + size]


async def test_message_ids_that_stand_twice_on_a_cluster_are_named(
    service: Service, client: httpx.Client, conversation: str
) -> None:
    stored = [*appended(client, conversation, 1_000), *appended(client, conversation, 500)]
    raw = CodecOptions(document_class=RawBSONDocument)
    shard = on_database(service.database_url, f"shard_{conversation[2:]}")
    with MongoClient[Any](service.database_url) as operator, MongoClient[Any](shard) as second:
        other = second.get_default_database().get_collection("messages", codec_options=raw)
        here = operator.get_default_database()
        for seq, double in ((1501, 1), (1502, 1500), (1503, 1400)):  # far apart, and near
            document = here.messages.find_one({"conversation_id": conversation, "seq": double}) or {}
            about = here.conversations.find_one({"_id": conversation}) or {}
            other.insert_one({**document, "seq": seq, "created_at": about["updated_at"]})
        changes = {"$inc": {"last_seq": 3, "message_count": 3}}
        here.conversations.update_one({"_id": conversation}, changes)
        database = TwoShards(Settings(mongodb_url=service.database_url, database_timeout_ms=60_000), other)
        await database.open()
        try:
            found: list[Violation] = []
            store = ConversationStore(database, Settings())
            verifier = Verifier(store, repair=True, note=found.append)
            await verifier._verify_conversation(conversation)
        finally:
            await database.close()
    assert [str(each) for each in found] == [
        f"{conversation}: the message id {stored[double - 1]['id']} stands 2 times, at seq {double}, {seq} "
        "(left: the right value is not known)"
        for seq, double in ((1501, 1), (1503, 1400), (1502, 1500))
    ]
    assert verifier.report.messages == 1_503


def test_a_database_that_cannot_be_read_is_exit_code_2(tmp_path: Path) -> None:
    service = Service(tmp_path, mongodb_url="mongodb://127.0.0.1:1/x", server_selection_timeout_ms=300)
    code, lines = verify(service)
    assert code == 2
    assert "not reached" in lines[-1]
