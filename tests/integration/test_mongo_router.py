"""The tests' own cluster keeps the rules of a cluster that MongoDB documents, as the driver sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pymongo
import pytest
from pymongo.errors import DuplicateKeyError, OperationFailure
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from tests.harness import new_id
from tests.mongo_router import BY_CONVERSATION, WITH_ZONES, MongoRouter, routed, split_at

LATE_S = 1.0


@pytest.fixture
def router(shards: tuple[int, int]) -> Iterator[MongoRouter]:
    with routed(shards, new_id("router")) as started:
        yield started


@pytest.fixture
def there(router: MongoRouter) -> Iterator[Any]:
    """The database as the service uses it."""
    with pymongo.MongoClient[Any](router.url, w="majority", readConcernLevel="majority") as client:
        yield client[router.database]


def names(router: MongoRouter, *, split: bool) -> Iterator[str]:
    """Ids of conversations whose messages are on another shard, or on the same."""
    return (each for n in range(1_000) if router.is_split(each := f"c{n}") is split)


def append(there: Any, conversation: str, seq: int, after: Callable[[], None] = lambda: None) -> None:
    """What an append does: it changes the conversation, and inserts a message."""
    with (
        there.client.start_session() as session,
        session.start_transaction(ReadConcern("snapshot"), WriteConcern("majority", j=True)),
    ):
        there.conversations.update_one({"_id": conversation}, {"$set": {"last_seq": seq}}, session=session)
        message = {"_id": f"{conversation}/{seq}", "conversation_id": conversation, "seq": seq}
        there.messages.insert_one(message, session=session)
        after()


def seen(there: Any, conversation: str, session: Any = None) -> tuple[int, int]:
    """The last `seq` of the conversation, and of its messages."""
    found = there.conversations.find_one({"_id": conversation}, session=session)
    last = list(
        there.messages.find({"conversation_id": conversation}, session=session).sort("seq", -1).limit(1)
    )
    return found["last_seq"], last[0]["seq"] if last else 0


def test_documents_are_spread_over_both_shards_by_the_shard_key(router: MongoRouter, there: Any) -> None:
    there.messages.insert_many({"_id": f"c{n}/1", "conversation_id": f"c{n}", "n": n} for n in range(50))
    there.others.insert_many({"_id": n} for n in range(10))
    counts = [router.shard(each).messages.count_documents({}) for each in (0, 1)]
    assert sum(counts) == 50
    assert min(counts) > 5
    assert [router.shard(each).others.count_documents({}) for each in (0, 1)] == [10, 0]
    for n in range(50):
        assert there.messages.find_one({"conversation_id": f"c{n}"})["n"] == n
        # The driver asks `hello` by itself now and then.
        assert len([each for each in router.seen if each.name == "find"][-1].shards) == 1


def test_what_names_no_shard_key_is_asked_of_all_shards_and_merged(router: MongoRouter, there: Any) -> None:
    there.messages.insert_many(
        {"_id": f"c{n}/1", "conversation_id": f"c{n}", "n": n % 7, "text": "x" * 200} for n in range(400)
    )
    found = list(there.messages.find({}, {"text": 1}).sort([("n", -1), ("_id", 1)]).batch_size(30))
    assert [each["_id"] for each in found] == [
        f"c{n}/1" for n in sorted(range(400), key=lambda n: (-(n % 7), f"c{n}/1"))
    ]
    assert found[0].keys() == {"_id", "text"}
    assert sum(each.name == "getMore" for each in router.seen) >= 12
    limited = [each["n"] for each in there.messages.find({"n": {"$gt": 2}}).sort("n").limit(100)]
    assert limited == [3] * 57 + [4] * 43
    assert there.messages.count_documents({"n": 3}) == 57
    groups = list(there.messages.aggregate([{"$group": {"_id": "$n", "most": {"$max": "$_id"}}}]))
    assert sorted(each["_id"] for each in groups) == [*range(7)]
    assert {each["most"] for each in groups} == {
        max(f"c{n}/1" for n in range(400) if n % 7 == rest) for rest in range(7)
    }
    assert there.messages.delete_many({"n": 3}).deleted_count == 57
    assert there.messages.update_many({}, {"$set": {"n": 9}}).matched_count == 343


def test_an_id_is_unique_on_each_shard_only(shards: tuple[int, int]) -> None:
    with (
        routed(shards, new_id("router"), keys=split_at(4)) as router,
        pymongo.MongoClient[Any](router.url) as client,
    ):
        messages = client[router.database].messages
        messages.insert_one({"_id": "c/m", "conversation_id": "c", "seq": 3})
        with pytest.raises(DuplicateKeyError):
            messages.insert_one({"_id": "c/m", "conversation_id": "c", "seq": 2})
        messages.insert_one({"_id": "c/m", "conversation_id": "c", "seq": 4})
        assert [each["seq"] for each in messages.find({"conversation_id": "c"}).sort("seq")] == [3, 4]
        window = {"conversation_id": "c", "seq": {"$gt": 3, "$lte": 9}}
        assert [each["seq"] for each in messages.find(window)] == [4]
        assert router.seen[-1].shards == {1}


def test_a_write_of_one_document_without_the_shard_key_is_refused(there: Any) -> None:
    there.messages.insert_one({"_id": "c/1", "conversation_id": "c", "n": 1})
    change = {"$set": {"n": 2}}
    calls: list[tuple[int, Callable[[], Any]]] = [
        (72, lambda: there.messages.update_one({"n": 1}, change)),
        (61, lambda: there.messages.update_one({"n": 1}, change, upsert=True)),
        (61, lambda: there.messages.delete_one({"n": 1})),
        (61, lambda: there.messages.find_one_and_update({"_id": "c/1"}, change)),
        (67, lambda: there.messages.create_index([("n", 1)], unique=True)),
    ]
    for code, call in calls:
        with pytest.raises(OperationFailure) as raised:
            call()
        assert raised.value.code == code
    assert there.messages.find_one({"conversation_id": "c"})["n"] == 1
    named = {"_id": "c/1", "conversation_id": "c"}
    assert there.messages.find_one_and_update(named, change, return_document=True)["n"] == 2
    assert there.messages.update_one({"_id": "c/1"}, {"$set": {"n": 3}}).modified_count == 1
    there.messages.create_index([("conversation_id", 1), ("n", 1)], unique=True)


def test_an_aborted_transaction_leaves_nothing_on_either_shard(router: MongoRouter, there: Any) -> None:
    conversation = next(names(router, split=True))
    there.conversations.insert_one({"_id": conversation, "last_seq": 0})

    def fail() -> None:
        assert seen(there, conversation) == (0, 0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        append(there, conversation, 1, fail)
    assert seen(there, conversation) == (0, 0)
    append(there, conversation, 1)
    assert seen(there, conversation) == (1, 1)
    assert len(router.commits[-1]) == 2


def test_only_a_snapshot_waits_for_a_transaction_that_one_shard_has_not_committed(
    router: MongoRouter, there: Any
) -> None:
    conversation = next(names(router, split=True))
    there.conversations.insert_one({"_id": conversation, "last_seq": 0})
    router.late_commits = lambda: LATE_S
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(append, there, conversation, 1)
        while seen(there, conversation)[0] == 0:
            assert not writing.done()
        # A majority read shows the transaction on one shard, and as it was before on the other.
        assert seen(there, conversation) == (1, 0)
        with there.client.start_session(snapshot=True) as session:
            began = time.monotonic()
            assert seen(there, conversation, session) == (1, 1)
            assert time.monotonic() - began > LATE_S / 4
        writing.result()


def test_a_snapshot_session_sees_one_point_in_time_of_both_shards(router: MongoRouter, there: Any) -> None:
    conversation = next(names(router, split=True))
    there.conversations.insert_one({"_id": conversation, "last_seq": 0})
    append(there, conversation, 1)
    with there.client.start_session(snapshot=True) as session:
        assert there.conversations.find_one({"_id": conversation}, session=session)["last_seq"] == 1
        append(there, conversation, 2)
        there.messages.delete_many({"conversation_id": conversation, "seq": 1})
        assert seen(there, conversation, session) == (1, 1)
    assert seen(there, conversation) == (2, 2)


def test_a_read_after_a_commits_time_waits_for_that_commit(router: MongoRouter, there: Any) -> None:
    conversation = next(names(router, split=True))
    there.conversations.insert_one({"_id": conversation, "last_seq": 0})
    router.late_commits, router.answers_early = (lambda: LATE_S), True
    with there.client.start_session(causal_consistency=True) as session:
        with session.start_transaction(ReadConcern("snapshot"), WriteConcern("majority")):
            there.conversations.update_one({"_id": conversation}, {"$set": {"last_seq": 1}}, session=session)
            message = {"_id": f"{conversation}/1", "conversation_id": conversation, "seq": 1}
            there.messages.insert_one(message, session=session)
        assert seen(there, conversation) == (1, 0), "answered as soon as it was decided"
        assert seen(there, conversation, session) == (1, 1)


def test_with_zones_a_conversation_and_its_messages_are_on_one_shard(shards: tuple[int, int]) -> None:
    with routed(shards, "zones", keys=WITH_ZONES) as router:
        assert not any(router.is_split(f"c{n}") for n in range(100))
    with routed(shards, "zones", keys=BY_CONVERSATION) as router:
        assert 25 < sum(router.is_split(f"c{n}") for n in range(100)) < 75
