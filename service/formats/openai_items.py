"""OpenAI's items and our messages, each read as the other (docs/decisions/0005-openai-items.md).

An item is stored as a message whose native fields say what it is (its role and content, or the tool call that
it is), and `openai_item` holds the item itself, in its own order of keys, without what the native fields
hold: nothing is stored twice, and the item comes back equal. Item types are open, so one that is not known
here is held whole by `openai_item`.

A message that was written in any other form is one item or several, as `message_turns` reads it: what it
says, what it thought, and each call and each result of a tool. The first carries the message's id; the others
the id, two commas and their place. A message whose own id ends so has items from the place 0 on, so no two
items of a conversation have the same id.

The native API takes items as well, exactly as they are: nothing is filled in, and an item's id stays in the
item (`message_of(item, keep_id=True)`, and `as_given` for reading them).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, Literal, get_args

from service.formats import message_turns
from service.formats.message_parts import (
    Call,
    Content,
    Media,
    Other,
    Part,
    Reasoning,
    Result,
    Text,
    as_text,
    data_url,
)
from service.formats.message_turns import ITEM, Turn
from service.formats.strict_json import Json

# The roles that a message may have. `model` is Gemini's word for `assistant`: stored as it is, read as that.
Role = Literal["user", "assistant", "tool", "system", "developer", "model"]
ROLES: frozenset[str] = frozenset(get_args(Role))
# The field in which a session keeps what BSON cannot hold, as JSON text (chat_history_client/_exact.py).
EXACT = "chat_history_exact"

_ID_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
    "web_search_call": "ws",
    "file_search_call": "fs",
    "computer_call": "cu",
    "computer_call_output": "cuo",
    "code_interpreter_call": "ci",
    "image_generation_call": "ig",
    "local_shell_call": "lsh",
    "shell_call": "sh",
    "apply_patch_call": "apc",
    "mcp_call": "mcp",
    "mcp_list_tools": "mcpl",
    "mcp_approval_request": "mcpr",
    "mcp_approval_response": "mcpa",
    "compaction": "cmp",
}
# The types whose `status` OpenAI's client requires in an answer, and OpenAI fills in
# (openai.types.conversations.ConversationItem, version 3.57).
_WITH_STATUS = frozenset(
    {
        "message",
        "function_call",
        "function_call_output",
        "file_search_call",
        "web_search_call",
        "image_generation_call",
        "computer_call",
        "computer_call_output",
        "tool_search_call",
        "tool_search_output",
        "program_output",
        "code_interpreter_call",
        "local_shell_call",
        "shell_call",
        "shell_call_output",
        "apply_patch_call",
        "apply_patch_call_output",
    }
)
_CALL_FIELDS = ("call_id", "name", "arguments")
# The ids that a native append makes; those that `/v1` makes have no dot.
_NATIVE_ID = re.compile(r"(?:idem|msg)_[0-9a-f]{32}\.[0-9]+")
_PART = re.compile(r"(?P<message>.*),,(?:0|[1-9][0-9]*)", re.DOTALL)


def kind(item: Json) -> Any:
    """Return the item's type; an item that has none, and a role, is a message."""
    return item.get("type", "message" if "role" in item else None)


def id_prefix(item: Json) -> str:
    """Return how the id of such an item begins (`msg`, `fc`, `rs` …)."""
    return _ID_PREFIXES.get(str(kind(item)), "item")


def message_faults(item: Json) -> dict[str, str]:
    """Return the fields without which an item that is a message cannot be stored, each with the reason."""
    if kind(item) != "message":
        return {}
    faults = {}
    if not isinstance(item.get("role"), str):
        faults["role"] = "must be a string"
    if not isinstance(item.get("content"), str | list | None):
        faults["content"] = "must be a string or a list of parts"
    return faults


def completed(item: Json) -> Json:
    """Fill in what OpenAI fills in: the type, the status, and a message's text as parts."""
    filled = item if "type" in item else {"type": kind(item), **item}
    if filled["type"] == "message":
        filled = {**filled, "content": _parts(item.get("content"), item.get("role"))}
    if filled["type"] in _WITH_STATUS and filled.get("status") is None:
        filled = {**filled, "status": "completed"}
    return filled


def _parts(content: Any, role: Any) -> list[Any]:
    if content is None:
        return []
    return [_text_part(content, role)] if isinstance(content, str) else content


def _text_part(text: str, role: Any) -> Json:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}


# -- an item as a message --------------------------------------------------------------------------


def message_of(item: Json, *, keep_id: bool = False) -> Json:
    """Return the message that an item is stored as; the item's `id` is left out, or kept in `openai_item`."""
    native = _native(item)
    if kind(item) == "message" and item["role"] in ROLES:
        held: tuple[str, ...] = ("role", "content")
    elif kind(item) == "function_call" and "tool_calls" in native:
        held = _CALL_FIELDS
    elif kind(item) == "function_call_output" and "tool_call_id" in native:
        held = ("call_id", "output")
    else:
        held = ("content",) if kind(item) == "message" else ()
    rest = {name: None if name in held else value for name, value in item.items() if keep_id or name != "id"}
    return {**native, ITEM: rest}


def _native(item: Json) -> Json:
    """Return the native fields of an item, as far as a native message has them."""
    match item:
        case {"role": role, **fields} if kind(item) == "message":
            native = {"role": role if role in ROLES else "assistant"}
            return native | ({"content": fields["content"]} if "content" in fields else {})
        case {
            "type": "function_call",
            "call_id": str(call_id),
            "name": str(name),
            "arguments": str(arguments),
        }:
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case {"type": "function_call_output", "call_id": str(call_id), "output": str() | list() as output}:
            return {"role": "tool", "tool_call_id": call_id, "content": output}
    outputs = str(kind(item)).endswith(("_output", "_response"))
    return {"role": "tool" if outputs else "assistant", "content": None}


def original(message: Json) -> Json | None:
    """Return the item that a message was stored as, equal to what `message_of` was given; else None.

    A message that only looks like one, being written natively, is read as far as it makes sense.
    """
    rest = message.get(ITEM)
    if not isinstance(rest, dict):
        return None
    natives = _natives(kind(rest), message)
    return {name: natives.get(name) if value is None else value for name, value in rest.items()}


def _natives(item_kind: Any, message: Json) -> Json:
    """Return what the native fields hold of an item of this type."""
    if item_kind == "message":
        return {"role": message.get("role"), "content": message.get("content")}
    if item_kind == "function_call_output":
        return {"call_id": message.get("tool_call_id"), "output": message.get("content")}
    match message.get("tool_calls"):
        case [{"id": call_id, "function": {"name": name, "arguments": arguments}}] if (
            item_kind == "function_call"
        ):
            return {"call_id": call_id, "name": name, "arguments": arguments}
    return {}


# -- a message as items ----------------------------------------------------------------------------


def items_of(message: Json) -> list[Json]:
    """Return a stored message as items, in order, ids included; there is at least one."""
    item = original(message) or {}
    if _NATIVE_ID.fullmatch(message["id"]):
        item.pop(EXACT, None)  # no model takes it; the session reads it through `as_given`
    read = [completed(item)] if isinstance(kind(item), str) else list(_read(message))
    own = message["id"]
    first = f"{own},,0" if looks_like_part(own) else own
    ids = (first, *(f"{own},,{place}" for place in range(1, len(read))))
    return [{"id": each_id, **_without_id(each)} for each_id, each in zip(ids, read, strict=True)]


def as_given(message: Json) -> list[Json]:
    """Return the item that a native append was given, equal to it; of any other message, what a model takes.

    An item that came through `/v1` keeps its id, which is the model's. The ids of the items of a native
    message are left out, because the service made them and no model knows them.
    """
    item = original(message)
    if item is not None and ("id" in item or _NATIVE_ID.fullmatch(message["id"])):
        return [item]
    read = items_of(message)
    return read if item is not None else list(map(_without_id, read))


def message_id(item_id: str) -> str:
    """Return the id of the message that an item with this id is, or is a part of."""
    part = _PART.fullmatch(item_id)
    return item_id if part is None else part["message"]


def looks_like_part(message_id: str) -> bool:
    """Tell whether an id ends as that of a part of a message, so that `items_of` must tell the two apart."""
    return _PART.fullmatch(message_id) is not None


def _without_id(item: Json) -> Json:
    return {name: value for name, value in item.items() if name != "id"}


def _read(message: Json) -> Iterator[Json]:
    for turn in message_turns.read(message):
        yield from _read_turn(turn)


def _read_turn(turn: Turn) -> Iterator[Json]:
    """Read what one speaker says: a message for the texts and pictures, an item for each other part."""
    if not turn.parts:
        yield _message_item(turn.role, ())
    for is_content, parts in groupby(turn.parts, lambda part: isinstance(part, Content)):
        if is_content:
            yield _message_item(turn.role, parts)
        else:
            yield from map(_read_part, parts)


def _message_item(role: str, parts: Iterable[Part]) -> Json:
    content = [_content_part(part, role) for part in parts]
    return {"type": "message", "role": role, "content": content, "status": "completed"}


def _read_part(part: Part) -> Json:
    match part:
        case Call(call_id, name, arguments):
            call = {"call_id": call_id, "name": name, "arguments": as_text(arguments)}
            return {"type": "function_call", **call, "status": "completed"}
        case Result(call_id, _, content):
            output = _output(content)
            return {
                "type": "function_call_output",
                "call_id": call_id,
                "output": output,
                "status": "completed",
            }
        case Reasoning(text):
            return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}] if text else []}
    raise AssertionError("unreachable: content is read by `_content_part`")


def _output(content: tuple[Content, ...]) -> str | list[Json]:
    """Return the output of a call: a text if it was written as one, else its parts."""
    match content:
        case ():
            return ""
        case (Text(text, None),):
            return text
    return [_content_part(part, "tool") for part in content]


# The types of parts that items have themselves.
_ITEM_PARTS = frozenset(
    {"input_text", "output_text", "refusal", "input_image", "input_file", "input_audio", "summary_text"}
)


def _content_part(part: Any, role: str) -> Json:
    """Write a part as items have it; a part that items have already stays as it is."""
    given = part.given if isinstance(part.given, dict) else {}
    if given.get("type") in _ITEM_PARTS:
        return dict(given)
    match part:
        case Text(text):
            return _text_part(text, role)
        case Media():
            return _media_part(part)
        case Other() if isinstance(given.get("type"), str):
            return dict(given)
    return _text_part(json.dumps(part.given, ensure_ascii=False), role)


def _media_part(media: Media) -> Json:
    place = {"file_id": media.file_id} if media.file_id else {}
    if media.kind == "image":
        place |= {"image_url": data_url(media)} if media.url or media.data else {}
        return {"type": "input_image", **place, "detail": media.detail or "auto"}
    if media.kind == "audio" and media.data:
        audio = {"data": media.data, "format": media.media_type.partition("/")[2]}
        return {"type": "input_audio", "input_audio": audio}
    place |= {"filename": media.name} if media.name else {}
    place |= {"file_url": media.url} if media.url else {"file_data": data_url(media)} if media.data else {}
    return {"type": "input_file", **place}
