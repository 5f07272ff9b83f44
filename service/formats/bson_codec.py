"""JSON values as BSON and back, equal, keys in the same order.

Two things change JSON silently on this way. PyMongo turns `{"$ref": …, "$id": …}` into a DBRef, so `decode`
never lets it see such a key. The embedded engine, being built on PyMongo, does the same when it reads its own
storage, and then writes the keys back in its own order; for exactly those values `encode` keeps a copy beside
the native fields (`EXACT_COPY`), which `decode` prefers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import bson
from bson.binary import Binary
from bson.codec_options import CodecOptions, DatetimeConversion

from service.errors import InvalidRequest, Path
from service.formats.strict_json import LARGE_BYTES, check, key_fault
from service.settings import MESSAGE_BYTES_MAX

# A field of our own in the stored document, present only where the embedded engine would reorder keys.
EXACT_COPY = "_exact_bson"
_DATES_IN_UTC: CodecOptions[dict[str, Any]] = CodecOptions(tz_aware=True)
_DATES_WITHOUT_ZONE: CodecOptions[dict[str, Any]] = CodecOptions()


class NeverDBRef(dict[str, Any]):
    """Hides `$ref` from PyMongo's decoder, which would make a DBRef of the object and lose its order."""

    def __getitem__(self, key: str) -> Any:
        if key == "$ref":
            raise KeyError(key)
        return super().__getitem__(key)


_WHATEVER_IT_IS: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True,
    unicode_decode_error_handler="replace",
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)
_WITHOUT_DBREFS = CodecOptions(document_class=NeverDBRef, tz_aware=True)


def encode(fields: Mapping[str, Any], at: Path = (), *, keep_exact_copy: bool) -> bytes:
    """Check a JSON object and encode it as BSON, or raise InvalidRequest with the path, below `at`.

    `keep_exact_copy` is for an engine that reads its storage through PyMongo: an object that such a
    reading would change gets its own BSON beside it, as one more field, `EXACT_COPY`.
    """
    for key, value in fields.items():
        # Each field by itself, so that the levels are counted from its value on.
        if (why := key_fault(key)) is not None:
            raise InvalidRequest.at((*at, str(key)), why)
        check(value, (*at, key))
    raw = bson.encode(fields)
    if keep_exact_copy and changes_when_decoded_as_dbref(raw):
        raw = concat_documents(raw, bson.encode({EXACT_COPY: Binary(raw)}))
    if len(raw) > MESSAGE_BYTES_MAX:
        raise InvalidRequest.at(
            at, f"has {len(raw)} bytes as BSON, and at most {MESSAGE_BYTES_MAX} can be stored"
        )
    return raw


def changes_when_decoded_as_dbref(raw: bytes) -> bool:
    """Tell whether a reader that makes DBRefs would write these BSON bytes back differently."""
    return b"$ref" in raw and bson.encode(bson.decode(raw)) != raw


def concat_documents(*documents: bytes) -> bytes:
    """Join BSON documents into one that has the elements of all of them, in their order.

    A BSON document is its length (int32, little-endian, itself included), its elements, and a NUL.
    """
    elements = b"".join(document[4:-1] for document in documents)
    return (len(elements) + 5).to_bytes(4, "little") + elements + b"\0"


def decode(raw: bytes) -> dict[str, Any]:
    """Decode a stored document into plain dicts and lists, dates in UTC, never a DBRef."""
    if b"$ref" not in raw:
        return bson.decode(raw, _DATES_IN_UTC)
    document = to_plain(bson.decode(raw, _WITHOUT_DBREFS))
    if not isinstance(document.get(EXACT_COPY), bytes):  # no JSON value is bytes, so bytes are a copy of ours
        return cast("dict[str, Any]", document)
    exact = decode(document.pop(EXACT_COPY))
    return {**document, **exact}


def decode_anything(raw: bytes) -> dict[str, Any]:
    """Decode a stored document that may not be well formed, for its ids and its types only."""
    return bson.decode(raw, _WHATEVER_IT_IS)


def iter_documents(documents: bytes) -> Iterator[bytes]:
    """Yield the BSON documents that stand one after the other; each begins with its length."""
    position = 0
    while position < len(documents):
        end = position + int.from_bytes(documents[position : position + 4], "little")
        yield documents[position:end]
        position = end


def decode_all(documents: Sequence[bytes], *, with_zones: bool = True) -> list[dict[str, Any]]:
    """Decode stored documents as `decode` does, many at once where none of them has a `$ref`.

    So many are no larger together than LARGE_BYTES, because each call holds up all threads. Dates in UTC
    without their zone (or, of some documents, with it) take half the time.
    """
    options, found = _DATES_IN_UTC if with_zones else _DATES_WITHOUT_ZONE, list[dict[str, Any]]()
    for part in _parts(documents):
        together = b"".join(part)
        found += map(decode, part) if b"$ref" in together else bson.decode_all(together, options)
    return found


def _parts(documents: Sequence[bytes]) -> Iterator[list[bytes]]:
    part, size = list[bytes](), 0
    for document in documents:
        if part and size + len(document) > LARGE_BYTES:
            yield part
            part, size = [], 0
        part.append(document)
        size += len(document)
    if part:
        yield part


def to_plain(value: Any) -> Any:
    """Return the same JSON made of plain dicts and lists."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return value


def json_equal(one: Any, other: Any) -> bool:
    """Tell whether two JSON values are equal, `1` and `1.0` and `true` being three, in any key order."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
