"""Keeps values that the service cannot store: NaN, infinities, lone surrogates, integers beyond 64 bits.

The service refuses them, because BSON cannot hold them. A framework has them all the same, in the results of
tools, and a refused message would cost the whole turn. So an adapter stores such a message twice: with a
readable replacement in the place of each such value, which every other reader sees, and beside it as JSON
text, as Python's `json` writes it, from which the adapter restores it. So "exact" is what `json` makes of the
message, `json.loads(json.dumps(message))`, as in a session that is a file.

| value | replacement |
| --- | --- |
| NaN, an infinity | the text `NaN`, `Infinity` or `-Infinity` |
| an integer beyond 64 bits | its digits, as text |
| a lone surrogate | the character U+FFFD |
| NUL in a key, more than 254 dots in a key | U+FFFD for each NUL or dot |
| what is nested deeper than 80 levels | its JSON text |
"""

from __future__ import annotations

import json
import math
from typing import Any

from chat_history_client.types import Item, Json

# Inside an item, beside the fields that are the item's own.
ITEM_FIELD = "chat_history_exact"
# Fewer than the service takes, because an adapter's field stands some levels inside a message.
_LEVELS = 80
_KEY_DOTS = 254
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def kept(message: Json, field: str) -> Json:
    """Return a message as it can be stored; the exact one is text in `field` if the two differ."""
    readable = replaced(message)
    if readable is message or (text := _json_text(message)) is None:
        return message
    return {**readable, field: text}


def opened(message: Json, field: str) -> Json:
    """Return a stored message with the values that `kept` was given."""
    text = message.get(field)
    return {**message, **json.loads(text)} if isinstance(text, str) else message


def kept_item(item: Item) -> Item:
    """Return an item as it can be stored, with its exact text inside if the two differ.

    An item that has the field itself is kept in the same way, so that the field always means the same.
    """
    readable = replaced(item)
    if (readable is item and ITEM_FIELD not in item) or (text := _json_text(item)) is None:
        return item
    return {**readable, ITEM_FIELD: text}


def opened_item(item: Item) -> Item:
    """Return the item that `kept_item` was given."""
    text = item.get(ITEM_FIELD)
    return dict(json.loads(text)) if isinstance(text, str) else item


def replaced(value: Any, levels: int = _LEVELS) -> Any:
    """Return a value with a replacement for each that cannot be stored; the same object if there is none.

    What is no JSON at all stays, because the client refuses it with its place.
    """
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else _json_text(value)
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else _json_text(value) or value
    if not value or not isinstance(value, dict | list | tuple):
        return value
    if not levels:
        return _text(_json_text(value) or "") or value
    return _object(value, levels) if isinstance(value, dict) else _list(value, levels)


def _object(value: dict[Any, Any], levels: int) -> Any:
    pairs = [(_key(name), replaced(each, levels - 1)) for name, each in value.items()]
    if all(a is name and b is each for (a, b), (name, each) in zip(pairs, value.items(), strict=True)):
        return value
    return dict(pairs)


def _list(value: list[Any] | tuple[Any, ...], levels: int) -> Any:
    items = [replaced(each, levels - 1) for each in value]
    return value if all(a is b for a, b in zip(items, value, strict=True)) else items


def _key(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    key = _text(name)
    key = key.replace(".", _UNKNOWN) if key.count(".") > _KEY_DOTS else key
    return key.replace("\0", _UNKNOWN) if "\0" in key else key


def _text(value: str) -> str:
    """Return a text whose lone surrogates are replaced; two that are one character are that character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def _json_text(value: Any) -> str | None:
    """Return a value as JSON text in ASCII, or None for what is no JSON (a set, a list in itself)."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return None
