"""A store over a list of documents, for rules that only read: in memory, in order, and it notes each read.

It knows the operators that the service's filters have, and raises KeyError for any other.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import bson
from beanie import Document

from service.database import Budget, Database, Transaction
from service.documents import Conversation
from service.formats import bson_codec
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import ConversationKey, OwnerKey

T = TypeVar("T")
Json = dict[str, Any]
SETTINGS = Settings(_env_file=None)
START = datetime(2026, 1, 1, tzinfo=UTC)
KEY, OWNER = ConversationKey("c"), OwnerKey("ada")
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
    "$ne": operator.ne,
    "$in": lambda value, among: value in among,
    "$type": lambda value, kind: kind == "date" and isinstance(value, datetime),
}


def matches(query: Mapping[str, Any], document: Json) -> bool:
    """Tell whether a document matches a filter, as a database does."""
    for name, wanted in query.items():
        if isinstance(wanted, dict):
            value = document.get(name)
            if not all(value is not None and OPERATORS[sign](value, bound) for sign, bound in wanted.items()):
                return False
        elif document.get(name) != wanted:
            return False
    return True


class FakeDatabase:
    """Serves `read` from documents, as an engine that reads its whole match (`embedded`), or as MongoDB."""

    def __init__(self, documents: Iterable[Json] = (), *, embedded: bool) -> None:
        self.documents = list(documents)
        self.embedded_engine = self.limit_reads_whole_match = embedded
        self.indexes = SimpleNamespace(has_earlier_list=False, has_list=True)
        # The filter of each read, and how many documents matched it, whatever the limit.
        self.reads: list[tuple[Json, int]] = []
        self.reads_max = 100_000

    async def read(
        self,
        document: type[Document],
        query: Mapping[str, Any],
        *,
        sort: Sequence[tuple[str, int]] = (),
        limit: int = 0,
        fields: Sequence[str] | None = None,
        session: object = None,  # noqa: ARG002
        budget: Budget | None = None,
    ) -> list[bytes]:
        of_conversations = document is Conversation
        found = [
            each
            for each in self.documents
            if ("conversation_id" not in each) is of_conversations and matches(query, each)
        ]
        self.reads.append((dict(query), len(found)))
        assert len(self.reads) <= self.reads_max, "there are too many reads"
        for name, direction in reversed(sort):
            found.sort(key=lambda each, name=name: each[name], reverse=direction < 0)  # type: ignore[misc]
        if fields is not None:
            found = [{name: each[name] for name in each if name in {"_id", *fields}} for each in found]
        answer: list[bytes] = []
        for raw in map(bson.encode, found[: limit or None]):
            if budget is not None and not budget.admits(raw):
                break
            answer.append(raw)
        return answer

    @contextlib.asynccontextmanager
    async def one_view(self) -> AsyncIterator[None]:
        yield

    @contextlib.asynccontextmanager
    async def deadline(self, *, seconds: float | None = None) -> AsyncIterator[None]:  # noqa: ARG002
        yield

    async def transaction(
        self, work: Callable[[Transaction], Awaitable[T]], transaction: Transaction | None = None
    ) -> T:
        return await work(transaction or Transaction())

    async def is_ready(self) -> bool:
        return True

    def require_free_disk(self) -> None:
        """There is always room in memory."""


def fake_store(
    documents: Iterable[Json] = (), *, embedded: bool = False, **settings: Any
) -> tuple[ConversationStore, FakeDatabase]:
    """Return a store over these documents, and the database that it reads them from."""
    database = FakeDatabase(documents, embedded=embedded)
    # A copy is not validated, so a test may set limits that are too small for a service.
    return ConversationStore(cast(Database, database), SETTINGS.model_copy(update=settings)), database


def conversation(key: str = KEY, owner: str = OWNER, **fields: Any) -> Json:
    """Return a stored conversation."""
    return {
        "_id": key,
        "user_id": owner,
        "title": None,
        "metadata": {},
        "created_at": START,
        "updated_at": START,
        "active_at": fields.get("updated_at", START),
        "last_seq": 0,
        "message_count": 0,
        **fields,
    }


def message(seq: int, *, key: str = KEY, owner: str = OWNER, **fields: Any) -> Json:
    """Return a stored message."""
    return {
        "_id": f"{key}/m{seq}",
        "conversation_id": key,
        "user_id": owner,
        "seq": seq,
        "created_at": START,
        "role": "user",
        **fields,
    }


def encoded(document: Json) -> bytes:
    return bson.encode(document)


def seqs(documents: Iterable[bytes]) -> list[int]:
    return [bson_codec.decode(each)["seq"] for each in documents]
