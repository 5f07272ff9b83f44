"""Reads and writes documents as bytes (BSON, undecoded). Each call runs in a thread of the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import ReplaceOne, ReturnDocument
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import BulkWriteError, DuplicateKeyError

from service.formats.bson_codec import iter_documents

# Has the driver hand over a document as the bytes that the server sent.
_UNDECODED = CodecOptions(document_class=RawBSONDocument)


@dataclass
class Budget:
    """The number of bytes that an answer may still have. The first document fits whatever its size."""

    left: int
    untouched: bool = True
    spent: bool = False

    def admits(self, document: bytes) -> bool:
        """Subtract a document's size, and tell whether it fits; `spent` says that a document did not."""
        return self.admits_size(len(document))

    def admits_size(self, size: int) -> bool:
        """Do it for a document of this size."""
        self.left -= size
        self.spent = self.left < 0 and not self.untouched
        self.untouched = False
        return not self.spent


def documents_in(cursor: Any, budget: Budget | None = None) -> list[bytes]:
    """Split the batches of a raw cursor, which has no public type, into documents within the budget."""
    found: list[bytes] = []
    for batch in cursor:
        for document in iter_documents(batch):
            if budget is not None and not budget.admits(document):
                return found
            found.append(document)
    return found


def find(
    collection: Collection[dict[str, Any]],
    query: Mapping[str, Any],
    fields: Sequence[str] | None,
    session: ClientSession | None,
    *,
    sort: Sequence[tuple[str, int]] = (),
    limit: int = 0,
    budget: Budget | None = None,
) -> list[bytes]:
    """Find documents, whole or only some of their fields, as `Database.read` says."""
    with collection.find_raw_batches(
        query, fields, session=session, limit=limit, batch_size=limit, sort=list(sort) or None
    ) as cursor:
        return documents_in(cursor, budget)


def update_and_find(
    collection: Collection[dict[str, Any]],
    query: Mapping[str, Any],
    changes: Mapping[str, Any],
    fields: Sequence[str] | None,
    session: ClientSession | None,
) -> bytes | None:
    """Update a document and return it, with two commands, for the embedded engine.

    There the one command that does both scans the whole collection. The transaction of the session makes the
    two commands see the same document.
    """
    if not collection.update_one(query, changes, session=session).matched_count:
        return None
    return find(collection, {"_id": query["_id"]}, fields, session, limit=1)[0]


def update_if_equal(
    collection: Collection[dict[str, Any]],
    key: str,
    expected: Mapping[str, Any],
    changes: Mapping[str, Any],
    session: ClientSession | None,
) -> bool:
    """Change the document with this `_id` if the expected fields still have these values, and tell whether.

    `changes` are the new values, or expressions of them. It is for the embedded engine, to which the same
    condition costs several times as much in the filter as in an expression.
    """
    stored = [f"${name}" for name in expected]
    is_expected = {"$eq": [stored, {"$literal": list(expected.values())}]}
    changed = {"$mergeObjects": ["$$ROOT", changes]}
    pipeline = [{"$replaceWith": {"$cond": [is_expected, changed, "$$ROOT"]}}]
    return collection.update_one({"_id": key}, pipeline, session=session).modified_count == 1


def find_one_and_update(
    collection: Collection[dict[str, Any]],
    query: Mapping[str, Any],
    changes: Mapping[str, Any],
    fields: Sequence[str] | None,
    session: ClientSession | None,
) -> bytes | None:
    """Update a document and return it, with one command."""
    undecoded = collection.with_options(codec_options=_UNDECODED)
    found = undecoded.find_one_and_update(
        query, changes, fields, return_document=ReturnDocument.AFTER, session=session
    )
    return None if found is None else bytes(found.raw)


def replace_many(
    collection: Collection[dict[str, Any]],
    documents: Sequence[bytes],
    key: str,
    session: ClientSession | None,
) -> None:
    """Replace the documents that have the `_id` of these, and the same field `key`, with one command."""
    replacements = map(RawBSONDocument, documents)
    collection.bulk_write(
        [ReplaceOne({"_id": each["_id"], key: each[key]}, each) for each in replacements],
        session=session,
    )


def insert_many(
    collection: Collection[dict[str, Any]], documents: Sequence[bytes], session: ClientSession | None
) -> None:
    """Insert documents. Raises DuplicateKeyError where an `_id` is taken."""
    try:
        collection.insert_many([RawBSONDocument(raw) for raw in documents], session=session)
    except BulkWriteError as error:
        if any(each.get("code") == 11000 for each in error.details.get("writeErrors", [])):
            raise DuplicateKeyError(str(error), 11000, error.details) from error
        raise
