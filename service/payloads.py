"""What JSON may be stored, checked once, and how it goes into BSON and comes out equal.

A value is parsed strictly (`parse`), walked once for what BSON cannot hold and encoded once
(`encode`), and decoded once (`decode`). In between it is bytes. The invariants:

- What `parse` accepts and `encode` takes comes out of `decode` equal, keys in the same order
  (tests/integration/test_exactness.py).
- Everything else is refused with the JSON path of the first place that cannot be held; nothing is
  dropped, rounded or renamed.

Two things bend JSON silently, and both are met here. PyMongo turns `{"$ref": …, "$id": …}` into a
DBRef, so `decode` never lets it see such a key. The embedded engine, being built on PyMongo, does the
same when it reads its own storage, and then writes the keys back in its own order; for exactly those
values `encode` keeps a copy beside the native fields (`EXACT_COPY`), which `decode` prefers.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import bson
from bson.binary import Binary
from bson.codec_options import CodecOptions, DatetimeConversion

from service.errors import BodyTooLarge, ChatHistoryError, Fault, InvalidRequest, MalformedBody
from service.settings import JSON_LEVELS_MAX, KEY_DOTS_MAX, MESSAGE_BYTES_MAX

T = TypeVar("T")
Path = tuple[str | int, ...]
_Found = tuple[list[str | int], str]

# A field of our own in the stored document, present only where the embedded engine would reorder keys.
EXACT_COPY = "_exact_bson"

# More than any double needs when all its digits are written out.
_NUMBER_CHARS = 2_000
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PATH_KEY_CHARS = 80
_PATH_CHARS = 1_000


def json_path(path: Path) -> str:
    """Render a path as JSON path: `$.messages[3].tool_calls["a.b"]`; long keys and paths are cut."""
    return cut("$" + "".join(_path_step(step) for step in path), _PATH_CHARS)


def cut(text: str, most: int = _PATH_KEY_CHARS) -> str:
    """Return the text, or its beginning, where an answer quotes what may be of any length."""
    return text if len(text) <= most else text[:most] + "…"


def _path_step(step: str | int) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    step = cut(step)
    return f".{step}" if _IDENTIFIER.match(step) else f"[{json.dumps(step)}]"


# -- parsing ---------------------------------------------------------------------------------------


class _Unholdable:
    """Stands in the parsed tree for what Python would have bent, until the walk names its path."""

    def __init__(self, why: str) -> None:
        self.why = why


class UnholdableObject(dict[str, Any]):
    """A JSON object with a key that stands twice: dropping either value would be a loss."""

    why = ""


def parse(body: bytes | bytearray) -> Any:
    """Parse a request body as strict JSON: UTF-8, no byte order mark, no NaN, no infinities.

    What is JSON but cannot be kept exactly (duplicate keys, huge numbers) stands in the result as a
    marker, which `check` and `encode` refuse with its path. A bytearray is emptied, to save its memory.
    Raises MalformedBody for what is not JSON, InvalidRequest for what is nested too deep to be parsed.
    """
    if body.startswith(b"\xef\xbb\xbf"):
        raise MalformedBody("The body starts with a byte order mark; send UTF-8 without one.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The body is not UTF-8 at byte {error.start}.") from error
    if isinstance(body, bytearray):
        body.clear()
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedBody(f"{error.msg} at line {error.lineno}, column {error.colno}.") from error
    except RecursionError as error:
        raise _refusal(_path_of_depth(text, JSON_LEVELS_MAX), _TOO_DEEP) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    refused = UnholdableObject(value)
    refused.why = f"the key {json.dumps(twice[:_PATH_KEY_CHARS])} stands twice in this object"
    return refused


def _integer(text: str) -> Any:
    if len(text) < 19:
        return int(text)
    if len(text) > 20 or not _INT64_MIN <= (value := int(text)) <= _INT64_MAX:
        return _Unholdable("an integer beyond 64 bits cannot be stored exactly")
    return value


def _float(text: str) -> Any:
    if len(text) > _NUMBER_CHARS:
        return _Unholdable(f"a number of more than {_NUMBER_CHARS} characters cannot be stored")
    value = float(text)
    if math.isinf(value):
        return _Unholdable("a number beyond the range of a double cannot be stored")
    if value == 0 and re.search(r"[1-9]", re.split("[eE]", text)[0]):
        return _Unholdable("a number too small for a double would be stored as 0")
    return value


def _constant(text: str) -> Any:
    return _Unholdable(f"{text} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)
_STRUCTURE = re.compile(r'["\[\]{},:]')


def _path_of_depth(text: str, levels: int) -> Path:
    """Return the path of the first value that lies deeper than `levels` containers.

    Runs only on text that is nested deeper than the parser goes, so it needs no stack of its own.
    """
    path: list[int | slice] = []  # a key as where it stands
    last_string, at = slice(0, 0), 0
    while match := _STRUCTURE.search(text, at):
        at, lexeme = match.end(), match[0]
        if lexeme == '"':
            end = _end_of_string(text, at)
            last_string, at = slice(at, end), end + 1
        elif lexeme in "[{":
            if len(path) == levels:
                break
            path.append(0 if lexeme == "[" else slice(0, 0))
        elif lexeme in "]}":
            del path[-1:]
        elif path and lexeme == "," and isinstance(path[-1], int):
            path[-1] += 1
        elif path and lexeme == ":":
            path[-1] = last_string
    return tuple(step if isinstance(step, int) else _key(text[step]) for step in path)


_IN_STRING = re.compile(r'(?:[^"\\]+|\\.)++', re.DOTALL)


def _end_of_string(text: str, start: int) -> int:
    """Return where the quote stands that ends the string that begins at `start`, or the end of the text.

    A text may be nothing but escapes, so none of them may cost a step; and each search holds up all threads.
    """
    while (inside := _IN_STRING.match(text, start, start + _SCANNED_BYTES)) is not None:
        start = inside.end()
    return start if text.startswith('"', start) else len(text)


def _key(quoted: str) -> str:
    try:
        return str(json.loads(f'"{quoted}"', strict=False))
    except json.JSONDecodeError:
        return quoted  # an escape that is none: the text is not JSON, but too deep it is


# -- large bodies ----------------------------------------------------------------------------------

# What is smaller is worked on at once: it takes the loop no more than some 30 ms, whatever is in it.
_LARGE_BYTES = 64 * 1024
_SCANNED_BYTES = 256 * 1024
# About what CPython takes for each: an empty list or dict, a key with its place, an item, a string.
_CONTAINER_BYTES, _KEY_BYTES, _ITEM_BYTES, _STRING_BYTES = 64, 100, 32, 56
# One, so that the memory of what is parsed is bounded, and because a second could not run beside it anyway.
_BESIDE = ThreadPoolExecutor(1, thread_name_prefix="large-json")


async def beside(size: int, work: Callable[[], T]) -> T:
    """Do work on JSON or BSON of this many bytes: at once, or in a thread of its own where it is large.

    The work must wait for nothing, and keep nothing of what it parses but its result.
    """
    if size <= _LARGE_BYTES:
        return work()
    done = await asyncio.get_running_loop().run_in_executor(_BESIDE, _without_collections, work)
    if isinstance(done, ChatHistoryError):
        raise done
    return done


def _without_collections(work: Callable[[], T]) -> T | ChatHistoryError:
    """Return what the work returns, or our error that it raises.

    A collection of garbage walks over every object that was parsed, in which there is never a cycle, and
    holds up all threads meanwhile.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return work()
    except ChatHistoryError as error:
        # Their frames would keep what was parsed.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error
    finally:
        if enabled:
            gc.enable()


def require_parsable(body: bytes | bytearray, parsed_bytes_max: int) -> None:
    """Refuse a large body that would take too much memory once it is parsed, before it is.

    The estimate is made of what stands outside strings, so a text costs what it is long. Raises
    BodyTooLarge, or InvalidRequest for what is nested so deep that no parser would go there.
    """
    if len(body) <= _LARGE_BYTES:
        return
    parsed = depth = read = 0
    for piece, strings in _outside_strings(body):
        read = min(len(body), read + _SCANNED_BYTES)
        opened = piece.count(b"[") + piece.count(b"{")
        keys = piece.count(b":")
        depth += opened - piece.count(b"]") - piece.count(b"}")
        parsed += opened * _CONTAINER_BYTES + keys * _KEY_BYTES + piece.count(b",") * _ITEM_BYTES
        parsed += max(0, strings - keys) * _STRING_BYTES
        if depth > _DEPTH_MAX:
            text = body[:read].decode("utf-8", "replace")
            raise _refusal(_path_of_depth(text, JSON_LEVELS_MAX), _TOO_DEEP)
        if parsed > parsed_bytes_max:
            raise BodyTooLarge(
                f"The body has so many values that they would take more than {parsed_bytes_max} bytes of "
                "memory. Send them in smaller requests, or as text."
            )


# The parser gives up at Python's limit of recursion, which is 1,000 by default.
_DEPTH_MAX = 1_000


def _outside_strings(body: bytes | bytearray) -> Iterator[tuple[bytes, int]]:
    """Yield, piece by piece, what stands outside of strings, and how many strings begin or end there.

    Pieces are small because each of these calls holds up all threads.
    """
    inside, start = False, 0
    while start < len(body):
        piece = bytes(body[start : start + _SCANNED_BYTES])
        start += len(piece)
        if start < len(body) and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            # An escape is not cut in two.
            piece, start = piece[:-1], start - 1
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield b"".join(parts[inside::2]), len(parts) // 2
        inside ^= len(parts) % 2 == 0


# -- checking --------------------------------------------------------------------------------------


def check(value: Any, at: Path = ()) -> None:
    """Refuse, with its path below `at`, the first thing in `value` that BSON cannot hold exactly."""
    found = _fault(value, JSON_LEVELS_MAX)
    if found is not None:
        steps, why = found
        raise _refusal((*at, *reversed(steps)), why)


def _fault(value: Any, levels: int) -> _Found | None:  # noqa: PLR0911  (a case for each type)
    """Return the first fault as its path, innermost step first, and the reason; None if there is none.

    The path is put together on the way back only, so that a value without fault costs no paths.
    """
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        return None if _encodable(value) else ([], _LONE_SURROGATE)
    if isinstance(value, int):
        return None if _INT64_MIN <= value <= _INT64_MAX else ([], "an integer beyond 64 bits")
    if isinstance(value, float):
        return None if math.isfinite(value) else ([], f"{value} is not JSON")
    if isinstance(value, _Unholdable | UnholdableObject):
        return [], value.why
    if isinstance(value, dict | list):
        if not levels:
            return [], _TOO_DEEP
        return _fault_in_object(value, levels) if isinstance(value, dict) else _fault_in_list(value, levels)
    return [], f"a {type(value).__name__} is not JSON"


def _fault_in_object(value: dict[Any, Any], levels: int) -> _Found | None:
    for key, item in value.items():
        if (why := _key_fault(key)) is not None:
            return [str(key)], why
        if (found := _fault(item, levels - 1)) is not None:
            found[0].append(key)
            return found
    return None


def _fault_in_list(value: list[Any], levels: int) -> _Found | None:
    for index, item in enumerate(value):
        if (found := _fault(item, levels - 1)) is not None:
            found[0].append(index)
            return found
    return None


def _key_fault(key: Any) -> str | None:
    if not isinstance(key, str):
        return "a key must be a string"
    if "\0" in key:
        return "a key with a NUL character cannot be stored"
    if key.count(".") > KEY_DOTS_MAX:
        return f"a key with more than {KEY_DOTS_MAX} dots cannot be stored"
    return None if _encodable(key) else _LONE_SURROGATE


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_LONE_SURROGATE = "a lone surrogate is not Unicode text and cannot be stored"


_TOO_DEEP = f"nested more than {JSON_LEVELS_MAX} levels deep"


def _refusal(path: Path, why: str) -> InvalidRequest:
    fault = Fault(json_path(path), why)
    return InvalidRequest(f"{fault.path}: {why}.", [fault])


# -- BSON ------------------------------------------------------------------------------------------

_DATES_IN_UTC: CodecOptions[dict[str, Any]] = CodecOptions(tz_aware=True)


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
    reading would bend gets its own BSON beside it, as one more field, `EXACT_COPY`.
    """
    for key, value in fields.items():
        # Each field by itself, so that the levels are counted from its value on.
        if (why := _key_fault(key)) is not None:
            raise _refusal((*at, str(key)), why)
        check(value, (*at, key))
    raw = bson.encode(fields)
    if keep_exact_copy and bends(raw):
        raw = splice(raw, bson.encode({EXACT_COPY: Binary(raw)}))
    if len(raw) > MESSAGE_BYTES_MAX:
        raise _refusal(at, f"{len(raw)} bytes as BSON, and at most {MESSAGE_BYTES_MAX} can be stored")
    return raw


def bends(raw: bytes) -> bool:
    """Tell whether a reader that makes DBRefs would write these BSON bytes back differently."""
    return b"$ref" in raw and bson.encode(bson.decode(raw)) != raw


def splice(*documents: bytes) -> bytes:
    """Join BSON documents into one that has the elements of all of them, in their order.

    A BSON document is its length (int32, little-endian, itself included), its elements, and a NUL.
    """
    elements = b"".join(document[4:-1] for document in documents)
    return (len(elements) + 5).to_bytes(4, "little") + elements + b"\0"


def decode(raw: bytes) -> dict[str, Any]:
    """Decode a stored document into plain dicts and lists, dates in UTC, never a DBRef."""
    if b"$ref" not in raw:
        return bson.decode(raw, _DATES_IN_UTC)
    document = plain(bson.decode(raw, _WITHOUT_DBREFS))
    if not isinstance(document.get(EXACT_COPY), bytes):  # which JSON cannot be
        return cast("dict[str, Any]", document)
    exact = decode(document.pop(EXACT_COPY))
    return {**document, **exact}


def decode_anything(raw: bytes) -> dict[str, Any]:
    """Decode a stored document that may not be well formed, for its ids and its types only."""
    return bson.decode(raw, _WHATEVER_IT_IS)


def split(documents: bytes) -> Iterator[bytes]:
    """Take BSON documents apart that stand one after the other; each begins with its length."""
    position = 0
    while position < len(documents):
        end = position + int.from_bytes(documents[position : position + 4], "little")
        yield documents[position:end]
        position = end


def decode_all(documents: Sequence[bytes]) -> list[dict[str, Any]]:
    """Decode stored documents as `decode` does, all at once where none of them needs its care.

    Large ones are decoded one by one, because each call holds up all threads.
    """
    if sum(map(len, documents)) > _LARGE_BYTES or b"$ref" in (together := b"".join(documents)):
        return [decode(raw) for raw in documents]
    return bson.decode_all(together, _DATES_IN_UTC)


def plain(value: Any) -> Any:
    """Return the same JSON made of plain dicts and lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def same(one: Any, other: Any) -> bool:
    """Tell whether two JSON values are equal, `1` and `1.0` and `true` being three, in any key order."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
