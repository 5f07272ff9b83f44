"""A proxy that understands MongoDB's protocol, and answers chosen commands as a replica set would.

A real MongoDB in trouble is hard to come by in a test. This proxy stands between the service and the engine.
It hides that the engine is the embedded one, so that the service takes its MongoDB paths. It keeps every
command that it saw. It answers chosen commands with an error, a write concern error, a delay or a lost
connection. It plays a replica set whose majority lags behind its primary (see `lag`). With `sharded` it says
that it is a cluster's router.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

import bson
import pymongo
from pymongo.uri_parser import parse_uri

from tests.harness import on_database
from tests.proxy import Proxy

Document = dict[str, Any]
Commits = Literal["wait", "fail", "succeed"]

_HEADER = struct.Struct("<iiii")  # length, request id, response to, operation
_OP_REPLY, _OP_QUERY, OP_MSG = 1, 2004, 2013
_MORE_TO_COME = 2
_READS = {"find", "aggregate", "count", "distinct"}
_HELLO = {"hello", "ismaster", "isMaster"}
# Codes that mean "nobody knows whether this commit lasts", with the names that MongoDB gives them.
TIMED_OUT: Document = {
    "code": 64,
    "codeName": "WriteConcernTimeout",
    "errmsg": "waiting for replication timed out",
    "errInfo": {"wtimeout": True},
}
EXPIRED: Document = {"code": 50, "codeName": "MaxTimeMSExpired", "errmsg": "operation exceeded time limit"}


def failure(code: int, name: str, message: str = "", labels: Sequence[str] = ()) -> Document:
    """The answer of a MongoDB that refuses a command, or could not finish it."""
    answer: Document = {"ok": 0.0, "code": code, "codeName": name, "errmsg": message or name}
    return answer | ({"errorLabels": list(labels)} if labels else {})


@dataclass
class Command:
    """One command that the proxy saw, with all of its documents, and the answer once there is one."""

    name: str
    document: Document
    answer: Document | None = None

    @property
    def in_transaction(self) -> bool:
        return self.document.get("autocommit") is False

    @property
    def is_majority_read(self) -> bool:
        concern = self.document.get("readConcern") or {}
        return self.name in _READS and not self.in_transaction and concern.get("level") == "majority"


@dataclass
class Rule:
    """What to do with the next `times` commands of a name that `when` accepts.

    `answer` takes the place of the engine's own, which then never sees the command; `concern` is put into the
    engine's answer as its `writeConcernError`, and `labels` with it; `drop` cuts the connection before the
    command is passed on, or before its answer is.
    """

    name: str
    when: Callable[[Document], bool] = lambda _: True
    times: int = 1
    answer: Document | None = None
    concern: Document | None = None
    labels: Sequence[str] = ()
    delay_s: float = 0.0
    drop: Literal["", "before", "after"] = ""
    call: Callable[[], None] | None = None
    done: int = 0

    def applies(self, command: Command) -> bool:
        if self.done >= self.times or self.name not in ("*", command.name) or not self.when(command.document):
            return False
        self.done += 1
        return True


@dataclass
class Message:
    """One message of the protocol: its bytes, and the document in it where it has one that is understood."""

    raw: bytes
    flags: int = 0
    document: Document = field(default_factory=dict)

    @property
    def request_id(self) -> int:
        return int(_HEADER.unpack_from(self.raw)[1])

    @property
    def operation(self) -> int:
        return int(_HEADER.unpack_from(self.raw)[3])

    def with_document(self, document: Document) -> bytes:
        """The same message with another document; document sequences are part of it."""
        _, request_id, response_to, operation = _HEADER.unpack_from(self.raw)
        if operation == _OP_REPLY:
            body = self.raw[16:36] + bson.encode(document)
        elif operation == _OP_QUERY:
            end = self.raw.index(b"\0", 20) + 9
            body = self.raw[16:end] + bson.encode(document)
        else:
            body = struct.pack("<iB", self.flags, 0) + bson.encode(document)
        return _HEADER.pack(16 + len(body), request_id, response_to, operation) + body


class MongoProxy(Proxy):
    """Stands before an engine, for one database of it; `url` is where the service connects."""

    def __init__(self, url: str, database: str, *, hide_engine: bool = True, sharded: bool = False) -> None:
        host, port = parse_uri(url)["nodelist"][0]
        assert host in {"127.0.0.1", "localhost"}, "the engine must be on this machine"
        super().__init__(int(port))
        self._target_url = urlsplit(url)
        self.database = database
        self.hide_engine = hide_engine
        self.sharded = sharded
        self.rules: list[Rule] = []
        self.seen: list[Command] = []
        self._lagging = False
        self._commits: Commits = "wait"
        self._caught_up = asyncio.Event()
        self._old_cursors: set[int] = set()
        self._engine: pymongo.MongoClient[Document] | None = None

    @property
    def url(self) -> str:
        return self._url(self.port, self.database)

    @property
    def engine(self) -> pymongo.MongoClient[Document]:
        """A client of the engine itself, past the proxy."""
        if self._engine is None:
            self._engine = pymongo.MongoClient(self._url(self.target), tz_aware=True)
        return self._engine

    def _url(self, port: int, database: str = "") -> str:
        """Name the engine at a port, with the user, password and options by which it was named to us."""
        user, at, _ = self._target_url.netloc.rpartition("@")
        options = {
            **dict(parse_qsl(self._target_url.query)),
            "directConnection": "true",
            "retryWrites": "false",
        }
        return f"mongodb://{user}{at}127.0.0.1:{port}/{database}?{urlencode(options)}"

    @property
    def latest(self) -> Any:
        """The database as it is on the primary, past the proxy."""
        return self.engine[self.database]

    def stop(self) -> None:
        self.forget()
        self.catch_up()
        super().stop()
        if self._engine is not None:
            self._engine.close()

    # -- rules ---------------------------------------------------------------------------------------

    def rule(self, name: str, **options: Any) -> Rule:
        """Do with the next commands of this name ("*": any) what the options of `Rule` say."""
        self.rules.append(Rule(name, **options))
        return self.rules[-1]

    def fail(self, name: str, code: int, code_name: str, **options: Any) -> Rule:
        """Refuse a command with this error, without passing it on; `labels` are its error labels."""
        answer = failure(code, code_name, options.pop("message", ""), options.pop("labels", ()))
        return self.rule(name, answer=answer, **options)

    def unknown_commit(self, *, before: bool = False, **options: Any) -> Rule:
        """Lose the connection at a commit: after the engine has it, or before.

        The driver sends a commit again by itself, so both of its attempts are lost, unless `times` says else.
        """
        return self.rule("commitTransaction", drop="before" if before else "after", **{"times": 2, **options})

    def forget(self) -> None:
        """Drop all rules, and what was seen."""
        self.rules.clear()
        self.seen.clear()

    def commands(self, *names: str) -> list[Document]:
        """The commands of these names that were seen, in order."""
        return [each.document for each in list(self.seen) if each.name in names]

    def wrote(self, verb: str, collection: str) -> Callable[[Document], bool]:
        """For `when`: accept the commit of a transaction that sent such a command."""

        def when(commit: Document) -> bool:
            mine = (commit["lsid"], commit["txnNumber"])
            sent = [each for each in self.commands(verb) if each[verb] == collection]
            return any((each.get("lsid"), each.get("txnNumber")) == mine for each in sent)

        return when

    # -- a majority that lags --------------------------------------------------------------------------

    def lag(self, *, commits: Commits = "wait") -> None:
        """From now on a majority read outside of a transaction sees the database as it is now.

        The primary goes on: transactions read and write the latest, and their commits take effect there. What
        a commit answers is chosen by `commits`, also for transactions that only read, since MongoDB makes
        those wait for the majority, too: "wait" until `catch_up`, or until the command's own time is over and
        it ends with MaxTimeMSExpired; "fail" at once with a write concern error (`wtimeout`); or "succeed".
        """
        self._copy(self.database, self.database_of_majority)
        self._commits = commits
        self._loop.call_soon_threadsafe(self._caught_up.clear)
        self._lagging = True

    def catch_up(self) -> None:
        """End the lag: what the primary has is the majority's."""
        self._lagging = False
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._caught_up.set)

    def fail_over(self) -> None:
        """End the lag the other way: the primary is lost, and with it all that no majority had."""
        self._copy(self.database_of_majority, self.database)
        self.catch_up()

    @property
    def database_of_majority(self) -> str:
        return f"{self.database}_majority"

    def _copy(self, source: str, target: str) -> None:
        names = set(self.engine[source].list_collection_names())
        for name in names | set(self.engine[target].list_collection_names()):
            found = list(self.engine[source][name].find({}, {})) if name in names else []
            self.engine[target][name].delete_many({})
            if found:
                self.engine[target][name].insert_many(found)

    # -- in the thread -------------------------------------------------------------------------------

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there_reader: asyncio.StreamReader,
        there_writer: asyncio.StreamWriter,
    ) -> None:
        """Take a message, pass it on or not, and answer it, one after the other, until either side ends."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                request = await receive(reader)
                await self._open.wait()
                command = Command(next(iter(request.document), ""), request.document)
                self.seen.append(command)
                rule = next((each for each in self.rules if each.applies(command)), None) or Rule("")
                if rule.call is not None:
                    await asyncio.to_thread(rule.call)
                await asyncio.sleep(rule.delay_s)
                if rule.drop == "before":
                    return
                if rule.answer is not None:
                    writer.write(answer_to(request, rule.answer))
                    await writer.drain()
                    continue
                was_lagging = self._lagging
                there_writer.write(self._forwarded(command, request))
                await there_writer.drain()
                if request.flags & _MORE_TO_COME:
                    continue
                answer = await receive(there_reader)
                document = await self._answered(command, answer.document, rule, was_lagging)
                command.answer = document
                await self._open.wait()
                if rule.drop == "after":
                    return
                raw = answer.raw if document is answer.document else answer.with_document(document)
                writer.write(raw)
                await writer.drain()

    def _forwarded(self, command: Command, request: Message) -> bytes:
        """The request as the engine gets it."""
        document = command.document
        if command.name in _HELLO and "compression" in document:
            # A compressed message would be one that nobody here can read.
            return request.with_document({**document, "compression": []})
        old_read = self._lagging and command.is_majority_read and document.get("$db") == self.database
        if old_read or document.get("getMore") in self._old_cursors:
            return request.with_document({**document, "$db": self.database_of_majority})
        return request.raw

    async def _answered(self, command: Command, answer: Document, rule: Rule, was_lagging: bool) -> Document:
        """The engine's answer as the service gets it."""
        if command.name in _HELLO:
            # Without a topologyVersion the driver polls; with one it would let answers come unasked.
            hidden = {"topologyVersion", "compression"} | ({"setName"} if self.sharded else set())
            answer = {k: v for k, v in answer.items() if k not in hidden}
            return {**answer, "msg": "isdbgrid"} if self.sharded else answer
        if command.name.lower() == "buildinfo" and self.hide_engine:
            return {k: v for k, v in answer.items() if not k.startswith("secantus")}
        cursor = answer.get("cursor")
        if isinstance(cursor, dict) and str(cursor.get("ns", "")).startswith(f"{self.database_of_majority}."):
            self._old_cursors.add(cursor["id"])
            self._old_cursors.discard(0)
            return {
                **answer,
                "cursor": {**cursor, "ns": cursor["ns"].replace(self.database_of_majority, self.database, 1)},
            }
        concern, labels = rule.concern, list(rule.labels)
        if command.name == "commitTransaction" and was_lagging and answer.get("ok") and concern is None:
            concern = await self._wait_for_the_majority(command.document)
        if concern is not None:
            answer = {**answer, "writeConcernError": concern}
        return {**answer, "errorLabels": labels} if labels else answer

    async def _wait_for_the_majority(self, commit: Document) -> Document | None:
        """Let a commit wait as MongoDB does, and return the write concern error that it then ends with."""
        if self._commits == "succeed":
            return None
        if self._commits == "fail":
            return TIMED_OUT
        concern_ms = (commit.get("writeConcern") or {}).get("wtimeout")
        most_ms = commit.get("maxTimeMS") or concern_ms
        try:
            # A little less than the command has, so that the driver hears this answer before its own clock.
            async with asyncio.timeout(most_ms * 0.0009 if most_ms else None):
                await self._caught_up.wait()
        except TimeoutError:
            return EXPIRED if commit.get("maxTimeMS") else TIMED_OUT
        return None


async def receive(reader: asyncio.StreamReader) -> Message:
    head = await reader.readexactly(16)
    length, _, _, operation = _HEADER.unpack(head)
    message = Message(head + await reader.readexactly(length - 16))
    if operation == OP_MSG:
        message.flags, message.document = parsed(message.raw)
    elif operation == _OP_QUERY:
        message.document = bson.decode(message.raw[message.raw.index(b"\0", 20) + 9 :])
    elif operation == _OP_REPLY:
        message.document = bson.decode(message.raw[36:])
    else:
        raise AssertionError(f"operation {operation} is not understood")
    return message


def parsed(raw: bytes, options: bson.CodecOptions[Any] | None = None) -> tuple[int, Document]:
    """Return the flags of an OP_MSG, and its command with its document sequences as lists."""
    options = options or _TIMES
    (flags,) = struct.unpack_from("<i", raw, 16)
    end = len(raw) - (4 if flags & 1 else 0)  # behind it stands a checksum
    document: Document = {}
    at, sequences = 20, {}
    while at < end:
        kind = raw[at]
        (size,) = struct.unpack_from("<i", raw, at + 1)
        section = raw[at + 1 : at + 1 + size]
        if kind == 0:
            document = bson.decode(section, options)
        else:
            name, _, documents = section[4:].partition(b"\0")
            sequences[name.decode()] = bson.decode_all(documents, options)
        at += 1 + size
    return flags, {**document, **sequences}


_TIMES: bson.CodecOptions[Document] = bson.CodecOptions(tz_aware=True)


def answer_to(request: Message, document: Document) -> bytes:
    """An answer of our own."""
    encoded = bson.encode(document)
    if request.operation == _OP_QUERY:
        body, operation = struct.pack("<iqii", 8, 0, 0, 1) + encoded, _OP_REPLY
    else:
        body, operation = struct.pack("<iB", 0, 0) + encoded, OP_MSG
    return _HEADER.pack(16 + len(body), 0, request.request_id, operation) + body


@contextlib.contextmanager
def mongo_proxied(url: str, database: str, **options: Any) -> Iterator[MongoProxy]:
    """A started proxy before the engine of `url`, for one database of a name that nobody else uses."""
    proxy = MongoProxy(url, database, **options)
    for each in (proxy.database, proxy.database_of_majority):
        on_database(url, each)  # to be dropped at the end of the run
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
