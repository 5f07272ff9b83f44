"""Turns stored messages into what a page shows of them. Pure; what is stored may have any form.

Each message is read in whatever form it was written, as elsewhere in the service (`message_turns`). Its parts
are a text, a tool's call or result, reasoning, a picture, or anything else as JSON. Nothing here is HTML: the
templates escape every text.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from service.formats import message_parts, message_turns
from service.formats.json_answers import dumps
from service.formats.strict_json import Json

# A longer text is cut, and the page has a link to the whole message.
TEXT_CHARS_MAX = 8_000
# Arguments that are longer are not parsed to be indented, because only their beginning is shown.
_INDENTED_CHARS_MAX = 200_000
# A picture is put into the page, although it is shown only after a click, so it must not be too large.
_PICTURE_CHARS_MAX = 300_000
# The fields that are shown as parts, or beside them.
_SHOWN_FIELDS = frozenset(
    {"id", "conversation_id", "user_id", "seq", "created_at", "role", "content", "parts", "tool_calls"}
    | {"tool_call_id", "reasoning_content"}
    | {message_turns.ITEM, message_turns.LANGCHAIN, message_turns.PYDANTIC_AI}
)
_PICTURE_TYPES = ("png", "jpeg", "gif", "webp", "avif")

Kind = Literal["text", "call", "result", "reasoning", "media", "json"]


@dataclass(frozen=True)
class Part:
    """One thing that a message holds. `other_seq` is the message with the result of a call, or with its call.

    `picture` is an address that a page may load after a click, and empty for an address that it may not.
    """

    kind: Kind
    text: str = ""
    name: str = ""
    call_id: str = ""
    picture: str = ""
    cut: bool = False
    other_seq: int | None = None


@dataclass(frozen=True)
class ShownMessage:
    """A message as a page shows it."""

    id: str
    seq: int
    role: str
    created_at: datetime
    bytes: int
    parts: Sequence[Part]
    # Tells a page whether it has the message as it stands.
    checksum: str


def shown(messages: Sequence[Json]) -> list[ShownMessage]:
    """Return the messages of a page, with each call paired with its result if both are on the page."""
    read = [(message, list(map(_cut, parts_of(message)))) for message in messages]
    calls = _seqs(read, "call")
    results = _seqs(read, "result")
    pairs = {"call": results, "result": calls}
    return [
        ShownMessage(
            id=message["id"],
            seq=message["seq"],
            role=str(message.get("role")),
            created_at=_time(message["created_at"]),
            bytes=len(stored := dumps(message)),
            parts=[replace(part, other_seq=pairs.get(part.kind, {}).get(part.call_id)) for part in parts],
            checksum=f"{zlib.crc32(stored):08x}",
        )
        for message, parts in read
    ]


def _time(given: datetime | str) -> datetime:
    """Return the time of a message, which may be as the API sends it."""
    return datetime.fromisoformat(given) if isinstance(given, str) else given


def _seqs(read: Sequence[tuple[Json, Sequence[Part]]], kind: Kind) -> dict[str, int]:
    return {
        part.call_id: message["seq"]
        for message, parts in read
        for part in parts
        if part.kind == kind and part.call_id
    }


def _cut(part: Part) -> Part:
    if len(part.text) <= TEXT_CHARS_MAX:
        return part
    return replace(part, text=part.text[:TEXT_CHARS_MAX], cut=True)


# -- the parts of a message ------------------------------------------------------------------------


def parts_of(message: Json) -> Iterator[Part]:
    """Yield what a message holds, in order, uncut."""
    for turn in message_turns.read(message):
        yield from map(_part, turn.parts)
    rest = {name: value for name, value in message.items() if name not in _SHOWN_FIELDS}
    if rest:
        yield Part("json", indented(rest), name="Other fields")


def _part(part: message_parts.Part) -> Part:
    match part:
        case message_parts.Text(text):
            return Part("text", text)
        case message_parts.Reasoning(text):
            return Part("reasoning", text or indented(part.given))
        case message_parts.Call():
            return Part("call", _arguments(part.arguments), part.name, part.id)
        case message_parts.Result():
            return Part("result", _text_of(part.content), part.name, part.call_id)
        case message_parts.Media():
            url = message_parts.data_url(part)
            named = part.kind if part.kind != "image" else "picture"
            return Part("media", url or part.file_id, named, picture=url if _may_be_loaded(url) else "")
    kind = part.given.get("type") if isinstance(part.given, dict) else None
    return Part("json", indented(part.given), name=kind if isinstance(kind, str) else "Part")


def _text_of(content: Sequence[message_parts.Content]) -> str:
    """Return the content of a result as text, indented if it is JSON."""
    text = message_parts.plain_text(content)
    return _arguments(text) if text[:1] in {"{", "["} else text


def _may_be_loaded(url: str) -> bool:
    """Tell whether a page may load a picture after a click: from a link of https, or inline and not large."""
    if url.startswith("https://"):
        return len(url) <= TEXT_CHARS_MAX
    inline = url.startswith(tuple(f"data:image/{each};base64," for each in _PICTURE_TYPES))
    return inline and len(url) <= _PICTURE_CHARS_MAX


def _arguments(given: Any) -> str:
    """Return arguments indented; a text that is not JSON, or is very long, stays as it is."""
    if not isinstance(given, str):
        return indented(given)
    if len(given) > _INDENTED_CHARS_MAX:
        return given
    try:
        return indented(json.loads(given))
    except (ValueError, RecursionError):
        return given


def indented(value: Any) -> str:
    """Return a value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


# -- words -----------------------------------------------------------------------------------------

_UNITS = (("year", 365 * 86_400), ("month", 30 * 86_400), ("day", 86_400), ("hour", 3_600), ("minute", 60))


def ago(time: datetime, now: datetime | None = None) -> str:
    """Say how long ago a time was: "3 minutes ago"."""
    passed = (now or datetime.now(UTC)) - time
    if passed < timedelta(seconds=10):
        return "just now"
    seconds = int(passed.total_seconds())
    for unit, length in _UNITS:
        if seconds >= length:
            return _count(seconds // length, unit) + " ago"
    return _count(seconds, "second") + " ago"


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def size(number: int) -> str:
    """Say a number of bytes: "12.3 kB"."""
    if number < 1_000:
        return f"{number} B"
    amount, unit = number / 1_000, "kB"
    for larger in ("MB", "GB"):
        if amount >= 1_000:
            amount, unit = amount / 1_000, larger
    return f"{amount:.1f} {unit}"


# -- downloads -------------------------------------------------------------------------------------


def as_markdown(message: Json) -> str:
    """Return a message as Markdown: a heading, its texts as they are, and all else as fenced blocks."""
    blocks = [
        f"## {message['seq']}. {message.get('role')}\n\n*{message['created_at']:%Y-%m-%d %H:%M:%S} UTC*"
    ]
    for part in parts_of(message):
        if part.kind == "text":
            blocks.append(part.text)
        else:
            label = {"call": f"Tool call: {part.name}", "result": "Tool result", "json": part.name}
            fence = _fence(part.text)
            blocks.append(
                f"**{label.get(part.kind, part.kind.capitalize())}**\n\n{fence}\n{part.text}\n{fence}"
            )
    return "\n\n".join(blocks) + "\n\n"


def _fence(text: str) -> str:
    """Return a fence that is longer than every fence in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return fence
