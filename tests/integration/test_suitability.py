"""What cannot keep the promises is refused at the start, with a sentence; what will pass is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any
from unittest.mock import MagicMock

import pytest

from service.database import Database, IndexPolicy
from service.errors import UnsuitableDatabase
from service.settings import Settings
from tests.harness import Service, free_port, new_id
from tests.mongo_proxy import MongoProxy, mongo_proxied


@pytest.fixture(scope="module")
def mongo(service: Service) -> Any:
    with mongo_proxied(service.database_url, new_id("suitable")) as started:
        yield started


@pytest.fixture
async def proxy(mongo: MongoProxy, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MongoProxy]:
    monkeypatch.setattr("service.database.opening._RECONNECT_S", 0.1)
    mongo.forget()
    yield mongo
    mongo.forget()


async def open_and_close(url: str, indexes: IndexPolicy = "require", attempts: int = 1) -> bool:
    """Open a database, and tell whether it became ready."""
    settings = Settings(
        _env_file=None, mongodb_url=url, database_timeout_ms=2_000, server_selection_timeout_ms=500
    )
    database = Database(settings)
    await database.open(indexes=indexes)
    for _ in range(attempts):
        if ready := await database.is_ready():
            break
        await asyncio.sleep(0.1)
    await database.close()
    return ready


def says(proxy: MongoProxy, **changes: Any) -> None:
    """Let the server say so of itself, when the service asks; None takes a field out."""
    hello = {**proxy.engine.admin.command("hello"), **changes}
    answer = {name: value for name, value in hello.items() if value is not None}
    proxy.rule("hello", answer=answer, times=1_000, when=lambda each: "lsid" in each)


# -- what a server says of itself ------------------------------------------------------------------------


async def test_a_server_below_6_0_is_refused(proxy: MongoProxy) -> None:
    says(proxy, maxWireVersion=13)
    proxy.rule(
        "buildInfo", answer={"ok": 1.0, "version": "5.0.3"}, when=lambda each: "lsid" in each, times=10
    )
    with pytest.raises(
        UnsuitableDatabase, match=r"The database is MongoDB 5\.0\.3, and the service needs MongoDB 6\.0"
    ):
        await open_and_close(proxy.url)
    proxy.forget()
    says(proxy, maxWireVersion=17)
    assert await open_and_close(proxy.url)


async def test_a_standalone_server_is_refused(proxy: MongoProxy) -> None:
    says(proxy, setName=None)
    with pytest.raises(UnsuitableDatabase, match="standalone server"):
        await open_and_close(proxy.url)


@pytest.mark.parametrize(
    "members", [{"hosts": ["a:1", "b:1", "c:1"]}, {"hosts": ["a:1"], "arbiters": ["b:1"]}]
)
async def test_a_direct_connection_to_one_member_of_several_is_refused(
    proxy: MongoProxy, members: Any
) -> None:
    assert "directConnection=true" in proxy.url
    says(proxy, **members)
    with pytest.raises(
        UnsuitableDatabase, match="Leave `directConnection` out, and name the set: `replicaSet="
    ):
        await open_and_close(proxy.url)


async def test_a_database_that_takes_no_writes_is_not_ready(proxy: MongoProxy) -> None:
    says(proxy, isWritablePrimary=False)
    assert not await open_and_close(proxy.url)
    proxy.forget()
    says(proxy, isWritablePrimary=None, msg="isdbgrid")
    assert await open_and_close(proxy.url)


# -- a transaction over both collections -----------------------------------------------------------------


async def test_the_transaction_of_the_start_leaves_nothing(proxy: MongoProxy) -> None:
    assert await open_and_close(proxy.url)
    written = {each["insert"] for each in proxy.commands("insert") if each.get("autocommit") is False}
    assert written - {"secrets"} == {"conversations", "messages"}
    assert len(proxy.commands("abortTransaction")) == 1
    # The one that commits makes the secret of the deployment.
    assert len(proxy.commands("commitTransaction")) == 1
    for name in ("conversations", "messages"):
        assert not proxy.latest[name].count_documents({})


@pytest.mark.parametrize(
    ("verb", "code", "text", "sentence"),
    [
        ("insert", 263, "OperationNotSupportedInTransaction", "refuses a transaction over two collections"),
        ("insert", 20, "Transaction numbers are only allowed on a replica set member", r"\(code 20\)"),
        ("update", 13, "not authorized", "lacks a privilege"),
        ("delete", 8000, "user is not allowed to do action [remove]", "lacks a privilege"),
    ],
)
async def test_a_database_that_refuses_the_transaction_is_refused(
    proxy: MongoProxy, verb: str, code: int, text: str, sentence: str
) -> None:
    proxy.fail(verb, code, "No", message=text, times=1_000)
    with pytest.raises(UnsuitableDatabase, match=sentence):
        await open_and_close(proxy.url)


async def test_an_error_that_passes_is_tried_again(proxy: MongoProxy) -> None:
    rules = [
        proxy.fail("insert", 112, "WriteConflict", labels=["TransientTransactionError"]),
        proxy.fail("update", 24, "LockTimeout"),
        proxy.rule("find", drop="after", when=lambda each: each.get("autocommit") is False),
    ]
    assert await open_and_close(proxy.url, attempts=50)
    assert all(rule.done for rule in rules)


async def test_a_database_that_is_full_can_still_be_opened(proxy: MongoProxy) -> None:
    proxy.fail("insert", 8000, "AtlasError", message="you are over your space quota, using 513 MB of 512 MB")
    assert await open_and_close(proxy.url)


# -- a cluster -------------------------------------------------------------------------------------------

Key = Mapping[str, Any]


def sharded(proxy: MongoProxy, messages: Key | None, conversations: Key | None, **more: Any) -> None:
    """Let a `mongos` answer, on whose cluster the collections have these shard keys."""
    says(proxy, msg="isdbgrid", setName=None)
    keys = {"messages": messages, "conversations": conversations}
    entries = [
        {"_id": f"{proxy.database}.{name}", "key": key, "unique": False, **more}
        for name, key in keys.items()
        if key is not None
    ]
    answer = {"ok": 1.0, "cursor": {"id": 0, "ns": "config.collections", "firstBatch": entries}}
    proxy.rule("find", answer=answer, times=1_000, when=lambda each: each["$db"] == "config")


@pytest.mark.parametrize(
    ("messages", "conversations", "sentence"),
    [
        ({"conversation_id": 1, "seq": 1}, None, r'messages", {conversation_id: "hashed"}\)'),
        ({"_id": "hashed"}, {"_id": "hashed"}, r'by {_id: "hashed"}, which can put'),
        ({"user_id": 1.0}, {"_id": 1}, r"sharded by {user_id: 1}"),
        ({"conversation_id": "hashed"}, {"user_id": 1}, r'conversations", {_id: "hashed"}\)'),
        ({"conversation_id": "hashed"}, {"user_id": 1, "_id": 1}, "sharded by {user_id: 1, _id: 1}"),
    ],
)
async def test_a_shard_key_that_ends_the_promises_is_refused_with_the_line_that_mends_it(
    proxy: MongoProxy, messages: Key | None, conversations: Key | None, sentence: str
) -> None:
    sharded(proxy, messages, conversations)
    with pytest.raises(UnsuitableDatabase, match=sentence):
        await open_and_close(proxy.url)
    assert await open_and_close(proxy.url, "ignore"), "`verify` reads it all the same"


@pytest.mark.parametrize(
    ("messages", "conversations", "more"),
    [
        (None, None, {}),
        ({"conversation_id": "hashed"}, {"_id": "hashed"}, {}),
        ({"conversation_id": 1.0}, {"_id": 1.0}, {}),
        ({"_id": 1}, {"_id": 1}, {"unsplittable": True}),
    ],
)
async def test_a_cluster_that_keeps_each_conversation_on_one_shard_is_taken(
    proxy: MongoProxy, messages: Key | None, conversations: Key | None, more: Any
) -> None:
    sharded(proxy, messages, conversations, **more)
    assert await open_and_close(proxy.url)


@pytest.mark.parametrize("code", [13, 73])
async def test_where_the_shard_keys_may_not_be_read_the_grant_is_named(
    proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    log = MagicMock()
    monkeypatch.setattr("service.database.suitability.log", log)
    says(proxy, msg="isdbgrid", setName=None)
    proxy.fail("find", 11600, "InterruptedAtShutdown", times=2, when=lambda each: each["$db"] == "config")
    proxy.fail("find", code, "No", when=lambda each: each["$db"] == "config")
    assert await open_and_close(proxy.url, attempts=50)
    (warning,) = log.warning.mock_calls
    assert (
        '{resource: {db: "config", collection: "collections"}, actions: ["find"]}' in warning.kwargs["detail"]
    )


# -- the URL ---------------------------------------------------------------------------------------------


async def test_a_wrong_password_ends_the_start(service: Service) -> None:
    user, at, rest = service.database_url.partition("@")
    if not at:
        pytest.skip("the MongoDB of TEST_MONGODB_URL asks for no password")
    with pytest.raises(UnsuitableDatabase, match="refuses the user name or the password"):
        await open_and_close(f"{user}wrong@{rest}")


@pytest.mark.parametrize("password", ["p@ss", "p/ss", "p:ss", "p#ss", "p?ss", "p%ss", "p[ss"])
async def test_a_password_that_is_not_escaped_ends_the_start_and_is_not_quoted(
    service: Service, password: str
) -> None:
    rest = service.database_url.removeprefix("mongodb://").rpartition("@")[2]
    with pytest.raises(UnsuitableDatabase, match=r"escaped|percent-encoded|Port|password") as refused:
        await open_and_close(f"mongodb://chat-history:{password}@{rest}")
    assert password not in refused.value.detail
    assert "ss@" not in refused.value.detail


@pytest.mark.parametrize(
    "url",
    [
        "mongodb://",
        "mongodb://127.0.0.1:port/x",
        "mongodb://127.0.0.1/x?authMechanism=NONE",
        "mongodb://127.0.0.1/x?replicaSett=rs0",
        "mongodb://127.0.0.1/x?tls=perhaps",
        "mongodb+srv://127.0.0.1/x",
    ],
)
async def test_a_url_that_is_none_ends_the_start(url: str) -> None:
    with pytest.raises(UnsuitableDatabase, match="CHAT_MONGODB_URL"):
        await open_and_close(url)


async def test_the_name_of_another_replica_set_ends_the_start(service: Service) -> None:
    with pytest.raises(UnsuitableDatabase, match="another name than `replicaSet`"):
        await open_and_close(f"{service.database_url}&replicaSet=other")


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
async def test_a_database_that_is_away_does_not_end_the_start(host: str) -> None:
    assert not await open_and_close(f"mongodb://{host}:{free_port()}/x?directConnection=true")
