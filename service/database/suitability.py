"""Refuses, at the start, a MongoDB on which the service cannot keep its promises, and says what to do.

- A server below 6.0, a standalone server, and `directConnection` to one member of several are refused by what
  the server says of itself (`tests/integration/test_suitability.py`).
- A cluster is refused whose shard keys can put the messages of one conversation on several shards: an `_id`
  is unique on each shard only, so a repeated append would be stored twice.
- Whatever looks like MongoDB and has no transactions over two collections, and a user without a privilege,
  are found by running such a transaction, and aborting it.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping
from typing import Any

import structlog
from pymongo.client_session import ClientSession
from pymongo.errors import OperationFailure

from service.clock import now
from service.database.driver import Connection, pymongo_collection, pymongo_session
from service.database.driver_errors import domain_error, is_unavailable, refusal
from service.documents import Conversation, Message
from service.errors import StorageFull, UnsuitableDatabase

log = structlog.get_logger(__name__)

# MongoDB 6.0.
_WIRE_VERSION_MIN = 17
# DocumentValidationFailure and DuplicateKey: an operator's own rules and indexes, which the documents of the
# attempt need not obey.
_AGAINST_RULES = {121, 11000}

STANDALONE = (
    "This MongoDB is a standalone server, which has no transactions. Start it as a replica set of one: "
    "`mongod --replSet rs0`, and once `mongosh --eval 'rs.initiate()'`."
)
_TOO_OLD = "The database is MongoDB {version}, and the service needs MongoDB 6.0 or later. Upgrade MongoDB."
_DIRECT = (
    "CHAT_MONGODB_URL says `directConnection=true`, and names one of the {members} members of the replica "
    "set {name}. After a fail-over, that member would take no writes. Leave `directConnection` out, and name "
    "the set: `replicaSet={name}`."
)
_NO_TRANSACTIONS = (
    "This database refuses a transaction over two collections (code {code}), without which nothing can be "
    "stored. Use MongoDB 6.0 or later, as a replica set or a sharded cluster."
)
_MESSAGES_SPLIT = (
    "The collection `{namespace}` is sharded by {key}, which can put the messages of one conversation on "
    "several shards, so that a repeated append is stored twice. Look with `chat-history verify` for such "
    "messages, because resharding fails where an `_id` is there twice. Then run this in mongosh, and start "
    'the service again: sh.reshardCollection("{namespace}", {{conversation_id: "hashed"}})'
)
_CHECKPOINTS_SPLIT = (
    "The collection `{namespace}` is sharded by {key}, so the id of a checkpoint is unique on each shard "
    "only. Run this in mongosh, and start the service again: "
    'sh.reshardCollection("{namespace}", {{conversation_id: "hashed"}})'
)
_CONVERSATIONS_SPLIT = (
    "The collection `{namespace}` is sharded by {key}, so the id of a conversation is unique on each shard "
    "only. Run this in mongosh, and start the service again: "
    'sh.reshardCollection("{namespace}", {{_id: "hashed"}})'
)
_KEYS_UNKNOWN = (
    "The database refuses to say how the collections are sharded (code {code}), so a shard key that splits "
    "conversations is not found. Grant the user a role with this privilege, which is made in the database "
    "`admin`: "
    '{{resource: {{db: "config", collection: "collections"}}, actions: ["find"]}}'
)


def is_cluster(hello: Mapping[str, Any]) -> bool:
    """Tell whether a `mongos` answered."""
    return bool(hello.get("msg") == "isdbgrid")


def takes_writes(hello: Mapping[str, Any]) -> bool:
    """Tell whether the server that answered is a primary, or a `mongos`, which finds the primaries."""
    return bool(hello.get("isWritablePrimary")) or is_cluster(hello)


def require_suitable(hello: Mapping[str, Any], version: str, *, direct: bool) -> None:
    """Raise UnsuitableDatabase unless the server can keep the promises, by what it says of itself."""
    if hello.get("maxWireVersion", 0) < _WIRE_VERSION_MIN:
        raise UnsuitableDatabase(_TOO_OLD.format(version=version))
    if "setName" not in hello and not is_cluster(hello):
        raise UnsuitableDatabase(STANDALONE)
    members = sum(len(hello.get(kind, ())) for kind in ("hosts", "passives", "arbiters"))
    if direct and members > 1:
        raise UnsuitableDatabase(_DIRECT.format(members=members, name=hello["setName"]))


async def require_shard_keys(connection: Connection) -> None:
    """Raise UnsuitableDatabase if a cluster shards the collections so that the promises end.

    Raises PyMongoError where the question may be answered later. Where it is refused, the service does
    without.
    """
    name = connection.database().name
    wanted = {
        f"{name}.messages": ("conversation_id", _MESSAGES_SPLIT),
        f"{name}.checkpoints": ("conversation_id", _CHECKPOINTS_SPLIT),
        f"{name}.conversations": ("_id", _CONVERSATIONS_SPLIT),
    }
    try:
        found = (
            await connection.database("config").collections.find({"_id": {"$in": [*wanted]}}).to_list(None)
        )
    except OperationFailure as error:
        if is_unavailable(error):
            raise
        log.warning("shard_keys_unknown", detail=_KEYS_UNKNOWN.format(code=error.code), code=error.code)
        return
    for each in found:
        # A collection that is not sharded has an entry, too, from MongoDB 8.0 on.
        if each.get("unsplittable") or each.get("dropped"):
            continue
        field, sentence = wanted[each["_id"]]
        if [*each["key"]] != [field]:
            raise UnsuitableDatabase(sentence.format(namespace=each["_id"], key=_shown(each["key"])))


def _shown(key: Mapping[str, Any]) -> str:
    fields = (
        f'{field}: "{kind}"' if isinstance(kind, str) else f"{field}: {kind:g}" for field, kind in key.items()
    )
    return f"{{{', '.join(fields)}}}"


async def prove_transactions(connection: Connection) -> None:
    """Insert, change, find and remove in both collections in one transaction, and abort it.

    Raises UnsuitableDatabase where the database refuses that for good, and PyMongoError where it may succeed
    later. A database that is full can still be read, so it is not refused.
    """
    session = connection.start_transaction()
    try:
        attempt = functools.partial(_attempt, pymongo_session(session))
        await connection.run_in_thread(attempt)
    except OperationFailure as error:
        if (refused := refusal(error)) is not None:
            raise UnsuitableDatabase(refused.detail) from error
        if isinstance(domain_error(error), StorageFull) or error.code in _AGAINST_RULES:
            log.warning("transactions_not_proved", code=error.code)
            return
        if is_unavailable(error):
            raise
        raise UnsuitableDatabase(_NO_TRANSACTIONS.format(code=error.code)) from error
    finally:
        await session.end_session()


def _attempt(session: ClientSession) -> None:
    """Do what appends and deletions do, and abort, so that nothing of it is ever seen.

    Of the same conversation in both collections, so that a cluster with zones needs one shard only.
    """
    key = f"start/{secrets.token_hex(16)}"
    conversations, messages = pymongo_collection(Conversation), pymongo_collection(Message)
    conversations.insert_one({"_id": key, "user_id": key, "updated_at": now()}, session=session)
    conversations.update_one({"_id": key}, {"$inc": {"last_seq": 1}}, session=session)
    message: Any = {"_id": f"{key}/1", "conversation_id": key, "user_id": key, "seq": 1, "created_at": now()}
    messages.insert_one(message, session=session)
    messages.find_one({"_id": message["_id"], "conversation_id": key}, session=session)
    messages.delete_one({"_id": message["_id"], "conversation_id": key}, session=session)
    session.abort_transaction()
