"""What JSON may be stored: parsed strictly, and checked once. Large bodies are parsed in a thread.

- What `parse` accepts, `bson_codec.encode` takes, and `bson_codec.decode` returns is equal, keys in the same
  order (tests/integration/test_exactness.py).
- Everything else is refused with the JSON path of the first place that cannot be held; nothing is dropped,
  rounded or renamed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from service.errors import PATH_KEY_CHARS, BodyTooLarge, ChatHistoryError, InvalidRequest, MalformedBody, Path
from service.settings import JSON_LEVELS_MAX, KEY_DOTS_MAX

Json = dict[str, Any]
_Found = tuple[list[str | int], str]
# More than any double needs when all its digits are written out.
_NUMBER_CHARS = 2_000
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


class _Unstorable:
    """Stands in the parsed tree for a value that Python would change, until the walk names its path."""

    def __init__(self, why: str) -> None:
        self.why = why


class UnstorableObject(dict[str, Any]):
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
        raise MalformedBody(
            f"The body is not JSON at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except RecursionError as error:
        raise InvalidRequest.at(_path_of_depth(text, JSON_LEVELS_MAX), _TOO_DEEP) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    refused = UnstorableObject(value)
    refused.why = f"the key {json.dumps(twice[:PATH_KEY_CHARS])} stands twice in this object"
    return refused


def _integer(text: str) -> Any:
    if len(text) < 19:
        return int(text)
    if len(text) > 20 or not _INT64_MIN <= (value := int(text)) <= _INT64_MAX:
        return _Unstorable("an integer beyond 64 bits cannot be stored exactly")
    return value


def _float(text: str) -> Any:
    if len(text) > _NUMBER_CHARS:
        return _Unstorable(f"a number of more than {_NUMBER_CHARS} characters cannot be stored")
    value = float(text)
    if math.isinf(value):
        return _Unstorable("a number beyond the range of a double cannot be stored")
    if value == 0 and re.search(r"[1-9]", re.split("[eE]", text)[0]):
        return _Unstorable("a number too small for a double would be stored as 0")
    return value


def _constant(text: str) -> Any:
    return _Unstorable(f"{text} is not JSON")


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
        return quoted  # the escape is not valid, so the text is not JSON; it is refused for its depth


_SCANNED_BYTES = 256 * 1024
# About what CPython takes for each: an empty list or dict, a key with its place, an item, a string.
_CONTAINER_BYTES, _KEY_BYTES, _ITEM_BYTES, _STRING_BYTES = 64, 100, 32, 56


def require_parsable(body: bytes | bytearray, parsed_bytes_max: int) -> None:
    """Refuse a large body that would take too much memory once it is parsed, before it is.

    The estimate is made of what stands outside strings, so a text costs what it is long. Raises
    BodyTooLarge, or InvalidRequest for what is nested so deep that no parser would go there.
    """
    if len(body) <= LARGE_BYTES:
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
            raise InvalidRequest.at(_path_of_depth(text, JSON_LEVELS_MAX), _TOO_DEEP)
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


def check(value: Any, at: Path = ()) -> None:
    """Refuse, with its path below `at`, the first thing in `value` that BSON cannot hold exactly."""
    found = _fault(value, JSON_LEVELS_MAX)
    if found is not None:
        steps, why = found
        raise InvalidRequest.at((*at, *reversed(steps)), why)


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
    if isinstance(value, _Unstorable | UnstorableObject):
        return [], value.why
    if isinstance(value, dict | list):
        if not levels:
            return [], _TOO_DEEP
        return _fault_in_object(value, levels) if isinstance(value, dict) else _fault_in_list(value, levels)
    return [], f"a {type(value).__name__} is not JSON"


def _fault_in_object(value: dict[Any, Any], levels: int) -> _Found | None:
    for key, item in value.items():
        if (why := key_fault(key)) is not None:
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


def key_fault(key: Any) -> str | None:
    """Return why an object cannot be stored with this key, or None."""
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
_TOO_DEEP = f"is nested more than {JSON_LEVELS_MAX} levels deep"


T = TypeVar("T")
# Work on fewer bytes is done at once, because it takes the event loop no more than some 30 ms.
LARGE_BYTES = 64 * 1024
# One thread, so that the memory of parsed bodies is bounded, and because a second could not run beside it.
_BESIDE = ThreadPoolExecutor(1, thread_name_prefix="large-json")


async def beside(size: int, work: Callable[[], T]) -> T:
    """Do work on JSON or BSON of this many bytes: at once, or in a thread of its own where it is large.

    The work must wait for nothing, and keep nothing of what it parses but its result.
    """
    if size <= LARGE_BYTES:
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
