"""A cluster of two shards: a router before two real engines, which keeps the documented rules of a cluster.

A real cluster is hard to come by in a test. The router answers as a `mongos` does, and passes each command
on to the shards that the shard keys name. It keeps the documented rules that the service must live with:

- An `_id` is unique on each shard only.
- A command whose filter does not name the shard key goes to all shards, and the answers are merged. A write
  of one document that names neither the shard key nor an `_id` is refused, with the code of a `mongos` of
  MongoDB 6.0.
- A transaction over both shards commits on one of them first. `late_commits` says how much later the other
  follows. Reads with read concern `majority` do not wait for the other shard. Reads with read concern
  `snapshot`, reads after a cluster time that is later than the beginning of the commit, and reads in
  transactions do wait.
- All reads of a snapshot session see one point in time of all shards.

Where the router is stricter than a cluster, it only makes callers wait longer: a commit waits while a
snapshot is being taken, and a read waits for a commit also where the commit is of other documents. Where it
is weaker, it shows less than a cluster: a transaction's snapshots of two shards are of two moments.
Sessions end with the process. No user and password is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import bson
import pymongo
from bson.raw_bson import RawBSONDocument
from bson.timestamp import Timestamp

from service.embedded import guard
from tests.harness import free_port
from tests.mongo_proxy import OP_MSG, Document, answer_to, failure, parsed, receive
from tests.proxy import Proxy

HALF, QUARTER = 0, 2**62
_RAW: bson.CodecOptions[Any] = bson.CodecOptions(document_class=RawBSONDocument)
_ALL = frozenset({0, 1})
_PRIMARY = frozenset({0})
_FIRST_BATCH = 101
_BATCH_BYTES = 16 * 1024 * 1024
_TRANSACTION_FIELDS = ("lsid", "txnNumber", "autocommit", "startTransaction", "readConcern")
_READS = {"find", "aggregate"}
# What reads in a transaction, and so waits for a commit that has reached one shard.
_WAITS = _READS | {"update", "delete", "findAndModify"}
# What is done on each shard that has a part of the collection.
_DEFINES = {"createIndexes", "dropIndexes", "collMod", "drop", "create"}
_EVERYWHERE = {"dropDatabase", "endSessions", "killSessions"}
_ANYWHERE = {"hello", "ismaster", "ping", "buildinfo", "listcollections", "listindexes"}


# -- shard keys ---------------------------------------------------------------------------------------------


def hashed(value: Any) -> int:
    """Return the 64-bit number by which a shard key is hashed; another one than MongoDB's, and as even."""
    digest = hashlib.md5(repr(value).encode(), usedforsecurity=False).digest()
    return int(struct.unpack_from("<q", digest)[0])


def equals(condition: Any) -> list[Any] | None:
    """Return the values that a condition of a filter names by equality or `$in`, or None."""
    if not isinstance(condition, Mapping):
        return [condition]
    if [*condition] == ["$eq"]:
        return [condition["$eq"]]
    return list(condition["$in"]) if "$in" in condition else None


@dataclass(frozen=True)
class ShardKey:
    """A shard key, and which shard has which part: `splits` are the bounds between the parts.

    A key of one field is hashed. Of a key of two fields, the second alone decides, which is a number: so each
    value of the first is split at the same number.
    """

    fields: Mapping[str, int | str]
    splits: tuple[float, ...]
    shards: tuple[int, ...]

    @property
    def first(self) -> str:
        return next(iter(self.fields))

    def is_named_in(self, query: Mapping[str, Any]) -> bool:
        """Tell whether a filter names the first field of the key by equality or `$in`."""
        return self.first in query and equals(query[self.first]) is not None

    def of_document(self, document: Mapping[str, Any]) -> int:
        value = document[[*self.fields][-1]]
        return self._shards_between(*[hashed(value) if len(self.fields) == 1 else value] * 2).pop()

    def of_filter(self, query: Mapping[str, Any]) -> frozenset[int]:
        """Return the shards that may have what a filter matches."""
        if not self.is_named_in(query):
            return _ALL
        if len(self.fields) == 1:
            values = map(hashed, equals(query[self.first]) or [])
            return frozenset().union(*(self._shards_between(value, value) for value in values))
        condition = query.get([*self.fields][-1], {})
        if not isinstance(condition, Mapping):
            return frozenset(self._shards_between(condition, condition))
        low = max(condition.get("$gt", float("-inf")) + 1, condition.get("$gte", float("-inf")))
        high = min(condition.get("$lt", float("inf")) - 1, condition.get("$lte", float("inf")))
        return frozenset(self._shards_between(low, high)) or _PRIMARY

    def _shards_between(self, low: float, high: float) -> set[int]:
        bounds = [float("-inf"), *self.splits, float("inf")]
        parts = zip(bounds[:-1], bounds[1:], self.shards, strict=True)
        return {shard for begin, end, shard in parts if begin <= high and low < end}


Keys = Mapping[str, ShardKey]

# As docs/mongodb.md says, without zones: the two collections lie differently on the shards, so that half of
# all conversations are on another shard than their messages.
BY_CONVERSATION: Keys = {
    "conversations": ShardKey({"_id": "hashed"}, (HALF,), (0, 1)),
    "messages": ShardKey({"conversation_id": "hashed"}, (-QUARTER, HALF, QUARTER), (0, 1, 0, 1)),
    "checkpoints": ShardKey({"conversation_id": "hashed"}, (-QUARTER, HALF, QUARTER), (0, 1, 0, 1)),
}
# With the same zones for both.
WITH_ZONES: Keys = {
    "conversations": ShardKey({"_id": "hashed"}, (HALF,), (0, 1)),
    "messages": ShardKey({"conversation_id": "hashed"}, (HALF,), (0, 1)),
    "checkpoints": ShardKey({"conversation_id": "hashed"}, (HALF,), (0, 1)),
}


def split_at(seq: int) -> Keys:
    """Return the keys of an earlier README, on a cluster where each conversation is split at this seq."""
    return {
        "conversations": BY_CONVERSATION["conversations"],
        "messages": ShardKey({"conversation_id": 1, "seq": 1}, (seq,), (0, 1)),
    }


# -- what the router keeps ----------------------------------------------------------------------------------


@dataclass
class Routed:
    """One command that the router saw, with the shards that it went to."""

    name: str
    document: Document
    shards: frozenset[int] = frozenset()

    @property
    def collection(self) -> str:
        return str(self.document.get(self.name, ""))

    @property
    def in_transaction(self) -> bool:
        return self.document.get("autocommit") is False

    def filters(self) -> list[Mapping[str, Any]]:
        """Return what the command is about: its filters, or the documents that it inserts."""
        document = self.document
        if self.name == "insert":
            return list(document["documents"])
        if self.name in {"update", "delete"}:
            return [each["q"] for each in document[f"{self.name}s"]]
        if self.name == "aggregate":
            return [stage.get("$match", {}) for stage in document["pipeline"][:1]]
        return [document.get("filter") or document.get("query") or {}]


@dataclass
class _Transaction:
    """A transaction, which has sessions of its own on the shards.

    A shard would end what is left of a transaction when its session begins another one, and a commit may
    still be on its way there when the client has its answer.
    """

    began: Timestamp
    within: Document
    shards: list[int] = field(default_factory=list)
    ending: asyncio.Task[Document] | None = None


@dataclass
class _Commit:
    """A commit that is under way, and the shards that it has not reached."""

    began: Timestamp
    left: set[int]


@dataclass
class _Cursor:
    """What is left of an answer: on a shard, or here."""

    shard: int | None = None
    documents: list[Any] = field(default_factory=list)


class _Shard:
    """One connection to an engine."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, document: Mapping[str, Any]) -> Document:
        """Send a command and return its answer, in which the documents are undecoded."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = struct.pack("<iB", 0, 0) + bson.encode(document)
        writer.write(struct.pack("<iiii", 16 + len(body), 1, 0, OP_MSG) + body)
        await writer.drain()
        answer = dict((parsed((await receive(reader)).raw, _RAW))[1])
        answer.pop("$clusterTime", None)
        answer.pop("operationTime", None)
        return answer

    async def documents(self, command: Mapping[str, Any], limit: int = 0) -> list[Any] | Document:
        """Return all documents of an answer with a cursor, or the answer if the command failed."""
        answer = await self.ask(command)
        found: list[Any] = []
        batch = "firstBatch"
        while True:
            if not answer.get("ok"):
                return answer
            cursor = answer["cursor"]
            found += cursor[batch]
            if not cursor["id"] or (limit and len(found) >= limit):
                return found
            batch = "nextBatch"
            collection = cursor["ns"].partition(".")[2]
            more = {"getMore": cursor["id"], "collection": collection, "$db": command["$db"]}
            answer = await self.ask(more | _transaction_of(command))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()


def _own_session() -> Document:
    return {"lsid": {"id": bson.Binary.from_uuid(uuid4())}, "txnNumber": bson.Int64(1), "autocommit": False}


def _transaction_of(command: Mapping[str, Any]) -> Document:
    return {name: command[name] for name in ("lsid", "txnNumber", "autocommit") if name in command}


# -- the router ---------------------------------------------------------------------------------------------


class MongoRouter(Proxy):
    """Stands before two engines, for one database of them; `url` is where the service connects.

    `late_commits` is asked at each commit over both shards for the seconds by which the second shard commits
    later than the first, which is the one that took part first. A negative number lets the other one commit
    first. With `answers_early` a commit is answered as soon as it is decided, as servers
    before 6.1 do.
    """

    def __init__(self, ports: Sequence[int], database: str, *, keys: Keys = BY_CONVERSATION) -> None:
        super().__init__(ports[0])
        self._ports = tuple(ports)
        self.database = database
        self.keys = keys
        self.late_commits: Callable[[], float] = lambda: 0.0
        self.answers_early = False
        self.seen: list[Routed] = []
        # Commits that reached one shard and were refused by the other, and errors of the router itself.
        self.torn: list[Document] = []
        self.failed: list[Exception] = []
        # The shards of each transaction that committed, in the order in which they committed.
        self.commits: list[tuple[int, ...]] = []
        self._transactions: dict[tuple[bytes, int], _Transaction] = {}
        self._under_way: list[_Commit] = []
        self._changed = asyncio.Condition()
        self._snapshots_wanted = 0
        self._views: dict[Timestamp, list[Document]] = {}
        self._cursors: dict[int, _Cursor] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._clients: list[pymongo.MongoClient[Document]] = []

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/{self.database}"

    def shard(self, number: int) -> Any:
        """The part of the database that one shard has, past the router."""
        if not self._clients:
            self._clients = [
                pymongo.MongoClient(f"mongodb://127.0.0.1:{port}/?directConnection=true", tz_aware=True)
                for port in self._ports
            ]
        return self._clients[number][self.database]

    def stop(self) -> None:
        super().stop()
        for client in self._clients:
            client.close()

    def require_faultless(self) -> None:
        """Fail where the router itself has failed, or tore a transaction: such a run proves nothing."""
        assert not self.failed, self.failed
        assert not self.torn, self.torn

    def forget(self) -> None:
        """Drop what was seen."""
        self.seen.clear()
        self.commits.clear()

    def is_split(self, conversation: str) -> bool:
        """Tell whether a conversation and its messages are on different shards."""
        home = self.keys["conversations"].of_filter({"_id": conversation})
        return home != self.keys["messages"].of_filter({"conversation_id": conversation})

    # -- in the thread -------------------------------------------------------------------------------

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *_: Any) -> None:
        shards = [_Shard(port) for port in self._ports]
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    request = await receive(reader)
                    await self._open.wait()
                    self.seen.append(Routed(next(iter(request.document)), request.document))
                    # The first `hello` is in an older form of the protocol, and has no documents in it.
                    is_message = request.operation == OP_MSG
                    raw = parsed(request.raw, _RAW)[1] if is_message else request.document
                    try:
                        answer = await _Call(self, shards, self.seen[-1], raw).answer()
                    except (OSError, asyncio.IncompleteReadError):
                        return
                    except Exception as error:  # noqa: BLE001  (`require_faultless` tells of it)
                        self.failed.append(error)
                        return
                    writer.write(answer_to(request, {**answer, "operationTime": self.now()}))
                    await writer.drain()
        finally:
            for shard in shards:
                shard.close()

    def now(self) -> Timestamp:
        """Return the cluster's time, which is later at each call."""
        return Timestamp(int(time.time()), next(self._numbers))

    @contextlib.asynccontextmanager
    async def connections(self) -> AsyncIterator[list[_Shard]]:
        shards = [_Shard(port) for port in self._ports]
        try:
            yield shards
        finally:
            for shard in shards:
                shard.close()

    # -- transactions --------------------------------------------------------------------------------

    def transaction(self, command: Mapping[str, Any]) -> _Transaction | None:
        key = (bytes(command["lsid"]["id"]), command["txnNumber"])
        if command.get("startTransaction"):
            self._transactions[key] = _Transaction(self.now(), _own_session())
        return self._transactions.get(key)

    async def wait_for_commits(self, shards: Iterable[int], before: Timestamp) -> None:
        """Wait until each commit that began before this time has reached these shards."""

        def are_done() -> bool:
            mine = [each for each in self._under_way if each.began <= before]
            return not any(each.left & {*shards} for each in mine)

        async with self._changed:
            await self._changed.wait_for(are_done)

    async def kill(self, sessions: Iterable[Mapping[str, Any]]) -> None:
        """Abort what is open in these sessions."""
        ids = {bytes(each["id"]) for each in sessions}
        for (session, _), transaction in list(self._transactions.items()):
            if session in ids:
                await self.end(transaction, {"abortTransaction": 1, "$db": "admin", **transaction.within})

    async def end(self, transaction: _Transaction, command: Document) -> Document:
        """Commit or abort on each shard that takes part, once however often it is asked for."""
        if transaction.ending is None:
            decided = asyncio.Event()
            work = self._commit if "commitTransaction" in command else self._abort
            transaction.ending = asyncio.create_task(work(transaction, command, decided))
            self._tasks.add(transaction.ending)
            transaction.ending.add_done_callback(self._tasks.discard)
            if self.answers_early and work == self._commit:
                await decided.wait()
                if not transaction.ending.done():
                    return {"ok": 1.0}
        return await asyncio.shield(transaction.ending)

    async def _abort(self, of: _Transaction, command: Document, _: asyncio.Event) -> Document:
        async with self.connections() as shards:
            answers = [await shards[each].ask(command) for each in of.shards]
        return next((each for each in answers if not each.get("ok")), {"ok": 1.0})

    async def _commit(self, of: _Transaction, command: Document, decided: asyncio.Event) -> Document:
        order, late_s = list(of.shards), self.late_commits() if len(of.shards) > 1 else 0.0
        if late_s < 0:
            order.reverse()
        async with self._changed:
            await self._changed.wait_for(lambda: not self._snapshots_wanted)
            commit = _Commit(self.now(), set(order))
            self._under_way.append(commit)
        answer: Document = {"ok": 1.0}
        try:
            async with self.connections() as shards:
                for number, shard in enumerate(order):
                    await asyncio.sleep(abs(late_s) if number else 0)
                    answer = await shards[shard].ask(command)
                    if not answer.get("ok"):
                        if number:
                            self.torn.append(answer)
                        return answer
                    await self._reached(commit, {shard})
                    decided.set()
            self.commits.append(tuple(order))
            return answer
        finally:
            decided.set()
            await self._reached(commit, {*order})
            self._under_way.remove(commit)

    async def _reached(self, commit: _Commit, shards: set[int]) -> None:
        async with self._changed:
            commit.left -= shards
            self._changed.notify_all()

    # -- snapshots -----------------------------------------------------------------------------------

    async def view(self, time: Timestamp | None) -> tuple[Timestamp, list[Document]]:
        """Return a point in time of all shards: a transaction on each, which the reads of the view join."""
        if time is not None:
            return time, self._views[time]
        async with self._changed:
            self._snapshots_wanted += 1
            await self._changed.wait_for(lambda: not any(each.left for each in self._under_way))
        try:
            taken = [await self._snapshot(port) for port in self._ports]
        finally:
            async with self._changed:
                self._snapshots_wanted -= 1
                self._changed.notify_all()
        time = self.now()
        self._views[time] = taken
        if len(self._views) > 20:
            await self._forget_view(self._views.pop(next(iter(self._views))))
        return time, taken

    async def _snapshot(self, port: int) -> Document:
        within = _own_session()
        first = {"find": "conversations", "filter": {"_id": ""}, "$db": self.database, **within}
        shard = _Shard(port)
        await shard.ask({**first, "startTransaction": True, "readConcern": {"level": "snapshot"}})
        shard.close()
        return within

    async def _forget_view(self, view: list[Document]) -> None:
        async with self.connections() as shards:
            for shard, within in zip(shards, view, strict=True):
                await shard.ask({"abortTransaction": 1, "$db": "admin", **within})

    # -- cursors -------------------------------------------------------------------------------------

    def remember(self, cursor: _Cursor, number: int | None = None) -> int:
        number = number or (2**40 + next(self._numbers))
        self._cursors[number] = cursor
        return number

    def cursor(self, number: int) -> _Cursor | None:
        return self._cursors.pop(number, None)


class _Call:
    """One command on its way through the router."""

    def __init__(self, router: MongoRouter, shards: list[_Shard], seen: Routed, raw: Document) -> None:
        self._router = router
        self._shards = shards
        self._seen = seen
        self._name = seen.name
        self._raw = {name: value for name, value in raw.items() if name != "$clusterTime"}
        self._concern = dict(raw.get("readConcern") or {})
        self._transaction: _Transaction | None = None
        self._time: Timestamp | None = self._concern.pop("afterClusterTime", None)
        if "readConcern" in raw:
            self._raw["readConcern"] = self._concern

    async def answer(self) -> Document:
        if self._name.lower() in _ANYWHERE:
            return _as_a_mongos(await self._shards[0].ask({**self._raw, **_no_compression(self._raw)}))
        if self._raw["$db"] == "config":
            return self._config()
        work: Callable[[], Awaitable[Document]] | None = {
            "find": self._find,
            "aggregate": self._aggregate,
            "getMore": self._more,
            "killCursors": self._kill_cursors,
            "insert": self._insert,
            "update": self._update,
            "delete": self._delete,
            "findAndModify": self._find_and_modify,
            "commitTransaction": self._end,
            "abortTransaction": self._end,
            **dict.fromkeys(_DEFINES, self._define),
            **dict.fromkeys(_EVERYWHERE, self._tell_all),
        }.get(self._name)
        if work is None:
            return failure(59, "CommandNotFound", f"this router does not know {self._name}")
        if self._seen.in_transaction:
            self._transaction = self._router.transaction(self._raw)
            if self._transaction is None:
                return failure(251, "NoSuchTransaction", labels=["TransientTransactionError"])
            self._raw |= self._transaction.within
        return await work()

    async def _end(self) -> Document:
        assert self._transaction is not None
        self._raw.pop("recoveryToken", None)
        self._seen.shards = frozenset(self._transaction.shards)
        return await self._router.end(self._transaction, self._raw)

    async def _tell_all(self) -> Document:
        self._seen.shards = _ALL
        await self._router.kill(self._raw.get("killSessions", []))
        return await self._ask_each(_ALL)

    async def _ask_each(self, shards: frozenset[int]) -> Document:
        """Ask shards for the same, and return the answer of one that failed, or else the first."""
        answers = [await self._shards[each].ask(self._raw) for each in sorted(shards)]
        return next((each for each in answers if not each.get("ok")), answers[0])

    # -- passing on ----------------------------------------------------------------------------------

    @property
    def _key(self) -> ShardKey | None:
        mine = self._raw["$db"] == self._router.database
        return self._router.keys.get(self._seen.collection) if mine else None

    def _targets(self, filters: Iterable[Mapping[str, Any]]) -> frozenset[int]:
        key = self._key
        if key is None:
            return _PRIMARY
        return frozenset().union(*map(key.of_filter, filters))

    async def _admitted(self, shards: frozenset[int]) -> None:
        """Note where the command goes, and wait as its read concern wants it."""
        self._seen.shards |= shards
        if self._transaction is not None and self._name in _WAITS:
            await self._router.wait_for_commits(shards, self._transaction.began)
        elif self._time is not None:
            await self._router.wait_for_commits(shards, self._time)

    def _for(self, shard: int) -> Document:
        """The command as this shard gets it: the first in a transaction begins it there."""
        if self._transaction is None:
            return self._raw
        command = {k: v for k, v in self._raw.items() if k not in {"startTransaction", "readConcern"}}
        if shard not in self._transaction.shards:
            self._transaction.shards.append(shard)
            command |= {"startTransaction": True, "readConcern": {"level": "snapshot"}}
        return command

    async def _ask(self, shard: int, **changed: Any) -> Document:
        return await self._shards[shard].ask({**self._for(shard), **changed})

    # -- reads ---------------------------------------------------------------------------------------

    async def _find(self) -> Document:
        shards = self._targets(self._seen.filters())
        if self._transaction is None and self._concern.get("level") in {"snapshot", "linearizable"}:
            return await self._find_in_view(shards)
        await self._admitted(shards)
        if len(shards) > 1:
            return self._batch(await self._merged([self._for(each) for each in sorted(shards)]))
        return await self._pass_on(*shards)

    async def _pass_on(self, shard: int) -> Document:
        answer = await self._ask(shard)
        if answer.get("ok") and answer["cursor"]["id"]:
            assert answer["cursor"]["id"] not in self._router._cursors
            self._router.remember(_Cursor(shard), answer["cursor"]["id"])
        return answer

    async def _find_in_view(self, shards: frozenset[int]) -> Document:
        self._seen.shards |= shards
        time, view = await self._router.view(self._concern.get("atClusterTime"))
        plain = {k: v for k, v in self._raw.items() if k not in _TRANSACTION_FIELDS}
        answer = self._batch(
            await self._merged([{**plain, **view[each]} for each in sorted(shards)], [*shards])
        )
        if answer.get("ok"):
            answer["cursor"]["atClusterTime"] = time
        return answer

    async def _merged(self, commands: list[Document], shards: Sequence[int] = (0, 1)) -> list[Any] | Document:
        """Find on several shards, and merge in the order that is asked for."""
        sort = dict(self._raw.get("sort") or {})
        limit, wanted = int(self._raw.get("limit", 0)), self._raw.get("projection")
        # The shards send the fields by which they sort, too, as they do to a `mongos`.
        projection = {**wanted, **dict.fromkeys(sort, 1)} if wanted else None
        found: list[Any] = []
        for shard, command in zip(sorted(shards), commands, strict=True):
            changed = {**command, **({"projection": projection} if projection else {})}
            part = await self._shards[shard].documents(changed, limit)
            if isinstance(part, dict):
                return part
            found += part
        if sort and len(commands) > 1:
            found.sort(key=functools.cmp_to_key(functools.partial(_compare, sort)))
        found = found[: limit or None]
        extra = {*sort} - {*wanted, "_id"} if wanted else set()
        return [{k: v for k, v in each.items() if k not in extra} for each in found] if extra else found

    async def _aggregate(self) -> Document:
        shards = self._targets(self._seen.filters())
        await self._admitted(shards)
        if len(shards) == 1:
            return await self._pass_on(*shards)
        found: list[Any] = []
        for shard in sorted(shards):
            part = await self._shards[shard].documents(self._for(shard))
            if isinstance(part, dict):
                return part
            found += part
        stages = [next(iter(each)) for each in self._raw["pipeline"]]
        if stages[-1:] == ["$group"] and not {*stages[:-1]} - {"$match", "$project"}:
            return self._batch(_grouped(self._raw["pipeline"][-1]["$group"], found))
        if not {*stages} - {"$match", "$project"}:
            return self._batch(found)
        return failure(59, "CommandNotFound", f"this router cannot merge {stages}")

    def _batch(self, found: list[Any] | Document) -> Document:
        """The first batch of an answer that was merged here."""
        if isinstance(found, dict):
            return found
        options = self._raw if self._name == "find" else self._raw.get("cursor", {})
        size = int(options.get("batchSize") or _FIRST_BATCH)
        return {
            "cursor": {"firstBatch": (first := _cut(found, size)), **self._rest(found[len(first) :])},
            "ok": 1.0,
        }

    def _rest(self, left: list[Any], collection: str = "") -> Document:
        number = self._router.remember(_Cursor(documents=left)) if left else 0
        return {"id": bson.Int64(number), "ns": f"{self._raw['$db']}.{collection or self._seen.collection}"}

    async def _more(self) -> Document:
        cursor = self._router.cursor(self._raw["getMore"])
        if cursor is None:
            return failure(43, "CursorNotFound")
        if cursor.shard is None:
            batch = _cut(cursor.documents, int(self._raw.get("batchSize") or len(cursor.documents)))
            rest = self._rest(cursor.documents[len(batch) :], self._raw["collection"])
            return {"cursor": {"nextBatch": batch, **rest}, "ok": 1.0}
        self._seen.shards = frozenset({cursor.shard})
        answer = await self._shards[cursor.shard].ask(self._raw)
        if answer.get("ok") and answer["cursor"]["id"]:
            self._router.remember(cursor, answer["cursor"]["id"])
        return answer

    async def _kill_cursors(self) -> Document:
        for number in self._raw["cursors"]:
            cursor = self._router.cursor(number)
            if cursor is not None and cursor.shard is not None:
                await self._shards[cursor.shard].ask({**self._raw, "cursors": [number]})
        return {"cursorsKilled": self._raw["cursors"], "ok": 1.0}

    def _config(self) -> Document:
        """What `config.collections` has: the sharded collections, and their keys."""
        entries = [
            {"_id": f"{self._router.database}.{name}", "key": dict(key.fields), "unique": False}
            for name, key in self._router.keys.items()
        ]
        found = entries if self._raw.get("find") == "collections" else []
        return {"cursor": {"id": 0, "ns": f"config.{self._seen.collection}", "firstBatch": found}, "ok": 1.0}

    # -- writes --------------------------------------------------------------------------------------

    async def _insert(self) -> Document:
        key, parts = self._key, dict[int, list[int]]()
        for index, document in enumerate(self._raw["documents"]):
            parts.setdefault(key.of_document(document) if key else 0, []).append(index)
        await self._admitted(frozenset(parts))
        total, errors = 0, list[Document]()
        for shard, indexes in parts.items():
            answer = await self._ask(shard, documents=[self._raw["documents"][each] for each in indexes])
            if not answer.get("ok"):
                return answer
            total += answer["n"]
            errors += [{**each, "index": indexes[each["index"]]} for each in answer.get("writeErrors", [])]
            if errors and self._raw.get("ordered", True):
                break
        return {"n": total, "ok": 1.0, **({"writeErrors": errors} if errors else {})}

    async def _update(self) -> Document:
        def refusal(each: Mapping[str, Any]) -> Document | None:
            if each.get("upsert") and not self._names_key(each["q"]):
                return failure(61, "ShardKeyNotFound", "An upsert must contain the shard key")
            if each.get("multi") or self._names_key(each["q"]) or _names_id(each["q"]):
                return None
            return failure(72, "InvalidOptions", "A {multi:false} update must contain _id or the shard key")

        return await self._change_each("updates", refusal)

    async def _delete(self) -> Document:
        def refusal(each: Mapping[str, Any]) -> Document | None:
            if not each["limit"] or self._names_key(each["q"]) or _names_id(each["q"]):
                return None
            return failure(61, "ShardKeyNotFound", "A single delete must contain _id or the shard key")

        return await self._change_each("deletes", refusal)

    async def _change_each(
        self, kind: str, refusal: Callable[[Mapping[str, Any]], Document | None]
    ) -> Document:
        """Send each change to the shards that its filter names, and add up what the shards answer."""
        total: Document = {"n": 0, "ok": 1.0}
        for each in self._raw[kind]:
            if (refused := refusal(each)) is not None:
                return refused
            shards = self._targets([each["q"]])
            await self._admitted(shards)
            for shard in sorted(shards):
                answer = await self._ask(shard, **{kind: [each]})
                if not answer.get("ok") or answer.get("writeErrors"):
                    return answer
                for name in ("n", "nModified"):
                    if name in answer:
                        total[name] = total.get(name, 0) + answer[name]
                if "upserted" in answer:
                    total["upserted"] = answer["upserted"]
        return total

    async def _find_and_modify(self) -> Document:
        query = self._raw.get("query", {})
        if not self._names_key(query):
            return failure(
                61, "ShardKeyNotFound", "Query for sharded findAndModify must contain the shard key"
            )
        shards = self._targets([query])
        await self._admitted(shards)
        return await self._ask(*shards)

    def _names_key(self, query: Mapping[str, Any]) -> bool:
        return self._key is None or (self._key.is_named_in(query) and len(self._key.of_filter(query)) == 1)

    async def _define(self) -> Document:
        """Do on each shard what is done to a collection. A unique index must begin with the shard key."""
        key = self._key
        for index in self._raw.get("indexes", []):
            if key and index.get("unique") and [*index["key"]][: len(key.fields)] != [*key.fields]:
                return failure(67, "CannotCreateIndex", "cannot create unique index over the shard key")
        self._seen.shards = _ALL if key else _PRIMARY
        return await self._ask_each(self._seen.shards)


# -- merging ------------------------------------------------------------------------------------------------


def _as_a_mongos(answer: Document) -> Document:
    """The answer of a `mongos`: it names no set, and nothing says that it is the embedded engine."""
    hidden = {"topologyVersion", "compression", "setName", "setVersion", "hosts", "passives", "arbiters"}
    hidden |= {"primary", "me", "electionId", "lastWrite", "secondary"}
    kept = {k: v for k, v in answer.items() if k not in hidden and not k.startswith("secantus")}
    return {**kept, "msg": "isdbgrid"} if "maxWireVersion" in kept else kept


def _no_compression(request: Document) -> Document:
    return {"compression": []} if "compression" in request else {}


def _names_id(query: Mapping[str, Any]) -> bool:
    return "_id" in query and not isinstance(query["_id"], Mapping)


def _cut(found: list[Any], size: int) -> list[Any]:
    """The documents of one batch: so many at most, and no more than fit into an answer."""
    total, end = 0, 0
    for each in found[:size]:
        total += len(each.raw) if isinstance(each, RawBSONDocument) else 100
        if total > _BATCH_BYTES and end:
            break
        end += 1
    return found[:end]


def _compare(sort: Mapping[str, int], one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    for name, direction in sort.items():
        mine, theirs = one.get(name), other.get(name)
        if mine != theirs:
            less = theirs is not None and (mine is None or mine < theirs)
            return -direction if less else direction
    return 0


def _grouped(group: Mapping[str, Any], parts: list[Any]) -> list[Document]:
    """Put the groups of several shards together. Only sums and extremes can be."""
    merge: dict[str, Callable[[Any, Any], Any]] = {"$sum": lambda a, b: a + b, "$max": max, "$min": min}
    ways = {name: merge[next(iter(how))] for name, how in group.items() if name != "_id"}
    groups: dict[bytes, Document] = {}
    for part in parts:
        name = bson.encode({"": part["_id"]})
        known = groups.setdefault(name, {})
        merged = {each: way(known[each], part[each]) if known else part[each] for each, way in ways.items()}
        groups[name] = {"_id": part["_id"], **merged}
    return list(groups.values())


# -- engines ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine() -> Iterator[int]:
    """An engine of the test's own, without users, in memory; yields its port. It ends with the test."""
    port = free_port()
    program = Path(sys.executable).parent / "secantusd-py"
    command = [sys.executable, "-I", guard.__file__, "1", str(program), "--port", str(port)]
    command += ["--storage-path", ":memory:", "--log-level", "ERROR"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        _wait_until_it_listens(process, port)
        yield port
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the engine does not listen")


@contextlib.contextmanager
def routed(ports: Sequence[int], database: str, **options: Any) -> Iterator[MongoRouter]:
    """A started router before engines on these ports, for one database of a name that nobody else uses."""
    router = MongoRouter(ports, database, **options)
    router.start()
    try:
        yield router
        router.require_faultless()
    finally:
        router.stop()
