"""Reads all conversations and all messages in the order of their keys, page by page, for `verify`.

Each document is visited, whatever types its fields have, because by hand anything can be stored. No page is
larger than a window, and each command has a deadline of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from beanie import Document
from pymongo import ASCENDING

from service.database import Database
from service.documents import Checkpoint, Conversation, Message
from service.errors import MalformedDocument
from service.formats import bson_codec
from service.formats.strict_json import Json

# How many keys of conversations are read at once. Many, because the embedded engine has no index for a range
# of `_id`, so there each of these reads looks at all conversations.
_KEYS = 10_000
_PAGE_ITEMS = 1_000
# On the embedded engine a long conversation is read in windows of `seq`, wider where nothing is left.
_WINDOW_SEQS, _WINDOW_SEQS_MAX = 1_000, 64_000
# The deadline of a read for which the embedded engine looks at a whole collection or conversation.
_SCAN_S = 60.0
# The fields that the invariants are about. The content of a message is not read, because it may be large.
_FIELDS = ("conversation_id", "user_id", "seq", "created_at", "revision", "updated_at")
_BY_SEQ = [("seq", ASCENDING)]
_BY_CONVERSATION = [("conversation_id", ASCENDING), ("seq", ASCENDING)]
_BY_CHECKPOINT = [("conversation_id", ASCENDING), ("upto_seq", ASCENDING)]
# Every type but text, in two conditions that an index serves on MongoDB. `None` is `null` and a missing
# field. An array matches by its elements, so one of texts is in a range, and an empty one is named here.
_NO_TEXT: Json = {
    "$type": [
        "minKey",
        "number",
        "object",
        "binData",
        "objectId",
        "bool",
        "date",
        "timestamp",
        "regex",
        "dbPointer",
        "javascript",
        "javascriptWithScope",
        "maxKey",
    ]
}
_NOTHING: Json = {"$in": [None, []]}
# What no window of numbers matches: every other type, a missing field, and NaN.
_NO_NUMBER: Json = {"$not": {"$gte": float("-inf")}}


def after(key: str) -> str:
    """Return the first of all texts that come after a key."""
    return f"{key}\0"


@dataclass(frozen=True)
class KeyRange:
    """The keys from `low` on, below `high`; None is no bound.

    Keys that are no text belong to the range without `low`, so ranges that meet have each key once.
    """

    low: str | None = None
    high: str | None = None

    def filter(self) -> Json:
        """Return the condition on a field that is such a key."""
        bounds = {"$gte": self.low or ""}
        return bounds if self.high is None else {**bounds, "$lt": self.high}

    def has(self, key: str | None) -> bool:
        """Tell whether a key is in the range. The order of texts is the same here as in the database."""
        return key is not None and (self.low or "") <= key and (self.high is None or key < self.high)


EVERYTHING = KeyRange()


class Walk:
    """Reads one database in order. Its pages are decoded, whether they are well formed or not."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def keys(self, within: KeyRange) -> list[str]:
        """Return the first keys of the conversations in a range, and fewer than `_KEYS` only at its end."""
        async with self._database.deadline(seconds=self._scan_s()):
            found = await self._database.read(
                Conversation, {"_id": within.filter()}, sort=[("_id", ASCENDING)], limit=_KEYS, fields=["_id"]
            )
        keys = [bson_codec.decode_anything(each)["_id"] for each in found]
        if len(keys) == _KEYS and keys[-1] < (within.low or ""):
            # Read by its replacement, it would come again and again.
            raise MalformedDocument("The `_id` of a conversation is no UTF-8. Correct or remove it by hand.")
        return keys

    def is_last(self, keys: list[str]) -> bool:
        """Tell whether no key comes after these, which `keys` returned."""
        return len(keys) < _KEYS

    async def without_text_key(self, document: type[Document]) -> AsyncIterator[list[Json]]:
        """Yield the conversations, or the messages, whose key of a conversation is not a text."""
        name = "_id" if document is Conversation else "conversation_id"
        for condition in (_NOTHING, _NO_TEXT):
            async for page in self._pages(document, {name: condition}, (), scan=True):
                yield page

    async def between(self, within: KeyRange) -> AsyncIterator[list[Json]]:
        """Yield the messages whose `conversation_id` is in a range, in its order and that of `seq`."""
        async for page in self._pages(Message, {"conversation_id": within.filter()}, _BY_CONVERSATION):
            yield page

    async def checkpoints(self, within: KeyRange) -> AsyncIterator[list[Json]]:
        """Yield the checkpoints of the conversations in a range, in the order of these."""
        query = {"conversation_id": within.filter()}
        async for page in self._pages(Checkpoint, query, _BY_CHECKPOINT, scan=True):
            yield page

    async def of_conversation(self, key: str, last_seq: int) -> AsyncIterator[list[Json]]:
        """Yield all messages of a conversation: in the order of `seq`, and then those without a number."""
        if last_seq <= _WINDOW_SEQS or not self._database.limit_reads_whole_match:
            async for page in self._pages(Message, {"conversation_id": key}, _BY_SEQ):
                yield page
            return
        low, width = 0, _WINDOW_SEQS
        window: Json = {"$lte": low}
        while True:
            found = False
            async for page in self._pages(Message, {"conversation_id": key, "seq": window}, _BY_SEQ):
                found = True
                yield page
            if "$lte" not in window:
                break
            low = window["$lte"]
            width = _WINDOW_SEQS if found else min(2 * width, _WINDOW_SEQS_MAX)
            window = {"$gt": low, "$lte": low + width} if low < last_seq else {"$gt": low}
        others: Json = {"conversation_id": key, "seq": _NO_NUMBER}
        async for page in self._pages(Message, others, (), scan=True):
            yield page

    async def _pages(
        self,
        document: type[Document],
        query: Json,
        sort: Any,
        *,
        scan: bool = False,
    ) -> AsyncIterator[list[Json]]:
        fields = {Message: _FIELDS, Checkpoint: ("conversation_id",)}.get(document, ("_id",))
        pages = self._database.pages(
            document,
            query,
            sort=sort,
            fields=fields,
            size=_PAGE_ITEMS,
            seconds=self._scan_s() if scan else None,
        )
        async for page in pages:
            yield list(map(bson_codec.decode_anything, page))

    def _scan_s(self) -> float | None:
        return _SCAN_S if self._database.limit_reads_whole_match else None
