"""The pieces of stored messages, their tokens and turns, and which result answers which call.

A message is read as pieces: items of OpenAI's Responses API, each a text, a call, a result or a reasoning
(`openai_items.as_given`). Blocks of Anthropic's Messages API are pieces, too, and keep the block as it was
written, because a model takes its own thinking back only unchanged.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from service.formats import openai_items
from service.formats.message_turns import ITEM
from service.formats.strict_json import Json

# A token count of a caller above this one is not taken, so that no sum leaves 64 bits.
TOKENS_MAX = 10**9
_BYTES_OF_A_TOKEN = 4
# A picture or a file costs a model about as much as this many bytes of text, however large it is.
_BINARY_BYTES = 4_096
_BINARY_KEYS = frozenset({"data", "file_data"})
# The fields of a message that no model sees. The form of the rest (`"role":`) stands for the frame that every
# message costs.
_UNSEEN = frozenset(
    {"id", "conversation_id", "user_id", "seq", "created_at", "updated_at", "revision"}
    | {"metadata", "token_count"}
)
NO_RESULT = "[No result of this call is stored.]"
_LEFT_OUT = "[This result was left out. It is stored in the message {id}.]"
_SUMMARY = "[Summary of the conversation up to message {seq}]\n{summary}"
_ANTHROPIC_BLOCKS = frozenset({"tool_use", "tool_result", "thinking", "redacted_thinking"})
_KNOWN_PARTS = frozenset({"text", "image_url", "image", "document", "input_audio", "file"})


# -- tokens ----------------------------------------------------------------------------------------


def tokens_of(message: Json) -> tuple[int, bool]:
    """Return the tokens of a message, and whether they are an estimate.

    They are its `token_count` where that is an integer from 0 to TOKENS_MAX. The estimate is a quarter of the
    bytes of its JSON, without its id, its metadata and the service's own fields. A text that holds a picture
    or a file as base64 counts as `_BINARY_BYTES`. It depends on nothing else, so it is the same everywhere.
    """
    given = message.get("token_count")
    if type(given) is int and 0 <= given <= TOKENS_MAX:
        return given, False
    seen = {name: value for name, value in message.items() if name not in _UNSEEN}
    size = len(orjson.dumps(seen, default=str))
    if size > _BINARY_BYTES:
        size -= _binary_excess(seen)
    return -(-size // _BYTES_OF_A_TOKEN), True


def _binary_excess(value: Any, key: str = "") -> int:
    """Return by how many bytes the texts that hold pictures and files are larger than they count."""
    if isinstance(value, dict):
        return sum(_binary_excess(item, name) for name, item in value.items())
    if isinstance(value, list):
        return sum(_binary_excess(item, key) for item in value)
    if not isinstance(value, str) or len(value) <= _BINARY_BYTES or not value.isascii():
        return 0
    return len(value) - _BINARY_BYTES if key in _BINARY_KEYS or value.startswith("data:") else 0


# -- pieces ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Piece:
    """One item that a message holds; `block` is the block of Anthropic's API that it was written as.

    `given` are the parts of a content of which nothing is lost where they stay as they were written.
    """

    message: Json
    item: Json
    block: Json | None = None
    given: list[Any] | None = None
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", str(openai_items.kind(self.item)))

    @property
    def content(self) -> Any:
        """Return what a `message` says."""
        return self.item.get("content") if self.given is None else self.given

    @property
    def call_id(self) -> str:
        """Return the id that pairs a call with its result, or an empty text."""
        call_id = self.item.get("call_id")
        return call_id if isinstance(call_id, str) else ""

    @property
    def is_call(self) -> bool:
        """Tell whether it calls a tool that the agent runs, so that it needs a result."""
        return self.kind.endswith("_call") and isinstance(self.item.get("call_id"), str)

    @property
    def is_result(self) -> bool:
        """Tell whether it is the result of a call."""
        return self.kind.endswith("_output") and isinstance(self.item.get("call_id"), str)

    @property
    def is_assistants(self) -> bool:
        """Tell whether a model said it."""
        return self.message.get("role") in {"assistant", "model"} and not self.is_result

    @property
    def is_item(self) -> bool:
        """Tell whether it was stored as an item, of which several messages make one answer."""
        return ITEM in self.message


def pieces(message: Json) -> list[Piece]:
    """Return what a stored message holds, in order."""
    content = message.get("content")
    if ITEM not in message and isinstance(content, list):
        if any(map(_is_block, content)):
            return list(_of_blocks(message, content))
        return _of_items(message, message, content)
    return _of_items(message, message)


def begins_turn(message: Json) -> bool:
    """Tell whether a turn begins at this message: a user's, without results of tools."""
    if message.get("role") != "user":
        return False
    return isinstance(message.get("content"), str) or not any(each.is_result for each in pieces(message))


def continues_answer(before: Piece, piece: Piece) -> bool:
    """Tell whether two neighbouring pieces are of one answer: of one message, or items that belong together.

    A `message` ends a group of items, because a model takes what follows it without it.
    """
    if not (before.is_assistants and piece.is_assistants):
        return False
    same = before.message is piece.message
    return same or (before.is_item and piece.is_item and before.kind != "message" != piece.kind)


def _is_block(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _ANTHROPIC_BLOCKS


def _of_items(message: Json, said: Json, content: list[Any] | None = None) -> list[Piece]:
    """Read what a message says, or a part of it, as items; a content in a known form is kept beside them."""
    is_known = content is not None and all(
        isinstance(part, dict) and part.get("type") in _KNOWN_PARTS for part in content
    )
    given = content if is_known else None
    read = openai_items.as_given({"id": "", **said})
    return [
        Piece(message, item, given=given if openai_items.kind(item) == "message" else None) for item in read
    ]


def _of_blocks(message: Json, content: list[Any]) -> Iterator[Piece]:
    for is_block, parts in itertools.groupby(content, _is_block):
        if is_block:
            yield from (Piece(message, _item_of_block(part), part) for part in parts)
        else:
            said = list(parts)
            yield from _of_items(message, {"role": message.get("role"), "content": said}, said)
    # A framework may repeat the calls of the content as `tool_calls`.
    known = {part.get("id") for part in content if isinstance(part, dict)}
    calls = message.get("tool_calls")
    if isinstance(calls, list) and (
        more := [each for each in calls if not (isinstance(each, dict) and each.get("id") in known)]
    ):
        yield from _of_items(message, {"role": "assistant", "content": None, "tool_calls": more})


def _item_of_block(block: Json) -> Json:
    match block:
        case {"type": "tool_use", "id": str(call_id), "name": str(name)}:
            arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
            return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}
        case {"type": "tool_result", "tool_use_id": str(call_id)}:
            output = block.get("content") or ""
            return {"type": "function_call_output", "call_id": call_id, "output": output}
    return {"type": "reasoning", "summary": []}


# -- calls and results -----------------------------------------------------------------------------


def answers(found: Sequence[Piece]) -> dict[int, int]:
    """Pair calls with results, as places in a list: a result answers the latest open call of its id."""
    waiting: dict[str, list[int]] = {}
    paired: dict[int, int] = {}
    for place, piece in enumerate(found):
        if piece.is_call:
            waiting.setdefault(piece.call_id, []).append(place)
        elif piece.is_result and waiting.get(piece.call_id):
            paired[waiting[piece.call_id].pop()] = place
    return paired


def _calls_by_end(found: Sequence[Piece]) -> dict[int, list[int]]:
    """Return the calls of each answer, by the place at which the conversation goes on behind it."""
    calls: dict[int, list[int]] = {}
    pending: list[int] = []
    for place, piece in enumerate(found):
        if piece.is_result:
            continue
        # Behind a result, nothing continues the answer.
        if pending and not continues_answer(found[place - 1], piece):
            calls[place], pending = pending, []
        if piece.is_call:
            pending.append(place)
    return {**calls, len(found): pending}


def unanswered_in_time(found: Sequence[Piece]) -> list[int]:
    """Return the places of the calls that had no result yet when the conversation went on."""
    paired, end = answers(found), len(found)
    by_end = _calls_by_end(found).items()
    return [call for place, calls in by_end if place < end for call in calls if paired.get(call, end) > place]


@dataclass
class Arranged:
    """Pieces in the order that providers require: behind the calls of an answer, the results of all of them.

    `synthetic` has the calls that got NO_RESULT, and `open_calls` those that the end leaves open.
    """

    pieces: list[Piece] = field(default_factory=list)
    synthetic: list[Piece] = field(default_factory=list)
    open_calls: list[Piece] = field(default_factory=list)


def arrange(found: Sequence[Piece], *, repair: bool) -> Arranged:
    """Move each result behind its call, drop results without a call, and fill in those that are missing.

    A call that the end of the conversation leaves open gets none, because its result may still come.
    """
    paired, by_end, arranged = answers(found), _calls_by_end(found), Arranged()
    for place in range(len(found) + 1):
        for call in by_end.get(place, ()):
            if call in paired:
                arranged.pieces.append(found[paired[call]])
            elif place == len(found):
                arranged.open_calls.append(found[call])
            elif repair:
                arranged.synthetic.append(found[call])
                arranged.pieces.append(_no_result(found[call]))
        if place < len(found) and not found[place].is_result:
            arranged.pieces.append(found[place])
    return arranged


def no_result_message(call_id: str) -> Json:
    """Return the message that stands for a result that is not stored."""
    return {"role": "tool", "tool_call_id": call_id, "content": NO_RESULT}


def _no_result(call: Piece) -> Piece:
    kind = f"{call.kind}_output"
    return Piece(
        no_result_message(call.call_id), {"type": kind, "call_id": call.call_id, "output": NO_RESULT}
    )


def name_of(call: Piece) -> str:
    """Return the name of the tool that is called."""
    name = call.item.get("name")
    return name if isinstance(name, str) else call.kind


def without_result(message: Json) -> Json:
    """Return a message with its results replaced by a text that names the message."""
    text = _LEFT_OUT.format(id=message["id"])
    shortened = {name: value for name, value in message.items() if name != "token_count"}
    content, item = message.get("content"), message.get(ITEM)
    if isinstance(content, list) and any(map(_is_block, content)):
        is_result = [_is_block(part) and part["type"] == "tool_result" for part in content]
        shortened["content"] = [
            {**part, "content": text} if result else part
            for part, result in zip(content, is_result, strict=True)
        ]
    elif isinstance(item, dict) and content is None:
        shortened[ITEM] = {**item, "output": text}
    else:
        shortened["content"] = text
    return shortened


def summary_message(upto_seq: int, summary: str) -> Json:
    """Return the message as which a model gets the summary of a checkpoint.

    It is a user's, because the summary tells what people and tools said, and must not rule like a system
    message.
    """
    return {"role": "user", "content": _SUMMARY.format(seq=upto_seq, summary=summary)}
