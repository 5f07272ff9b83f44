"""OpenAI's items and our messages, each read as the other (docs/decisions/0005-openai-items.md).

An item is stored as a message whose native fields say what it is (its role and content, or the tool call that
it is), and `openai_item` holds the item itself, in its own order of keys, without what the native fields
hold: nothing is stored twice, and the item comes back equal. Item types are open, so one that is not known
here is held whole by `openai_item`.

A message that was written natively is one item or several: the message itself, if it says anything, and one
`function_call` for each of its tool calls. The first carries the message's id; the others the id, a comma and
their place, which no message's id can look like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from service.roles import ROLES

Json = dict[str, Any]

ITEM = "openai_item"

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


def kind(item: Json) -> Any:
    """Return the item's type; an item that has none, and a role, is a message."""
    return item.get("type", "message" if "role" in item else None)


def id_prefix(item: Json) -> str:
    """Return how the id of such an item begins (`msg`, `fc`, `rs` …)."""
    return _ID_PREFIXES.get(str(kind(item)), "item")


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
    """Say an item as a native message does, as far as that can say it."""
    match item:
        case {"role": role, **fields} if kind(item) == "message":
            native = {"role": role if role in ROLES else "assistant"}
            return native | ({"content": fields["content"]} if "content" in fields else {})
        case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(said)}:
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": said}}
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
    read = [completed(item)] if isinstance(kind(item), str) else list(_read(message))
    ids = (message["id"], *(f"{message['id']},{place}" for place in range(1, len(read))))
    return [{"id": each_id, **_without_id(each)} for each_id, each in zip(ids, read, strict=True)]


def message_id(item_id: str) -> str:
    """Return the id of the message that an item with this id is, or is a part of."""
    return item_id.partition(",")[0]


def _without_id(item: Json) -> Json:
    return {name: value for name, value in item.items() if name != "id"}


def _read(message: Json) -> Iterator[Json]:
    role, content = message.get("role"), message.get("content")
    if role == "tool":
        output = (
            "" if content is None else content if isinstance(content, str) else _read_parts(content, role)
        )
        call_id = message.get("tool_call_id") or ""
        yield {"type": "function_call_output", "call_id": call_id, "output": output, "status": "completed"}
        return
    calls = message.get("tool_calls")
    calls = [] if calls is None else calls if isinstance(calls, list) else [calls]
    if content is not None or not calls:
        parts = _read_parts(content, role) if isinstance(content, list) else _parts(content, role)
        yield {"type": "message", "role": role, "content": parts, "status": "completed"}
    yield from map(_read_call, calls)


def _read_parts(parts: list[Any], role: Any) -> list[Json]:
    return [_read_part(each, role) for each in parts]


def _read_part(part: Any, role: Any) -> Json:
    """Read a part of a native content: as Chat Completions has them, or as items have them already."""
    match part:
        case {"type": "text", "text": str(text)}:
            return _text_part(text, role)
        case {"type": "image_url", "image_url": {"url": str(url), **more}}:
            return {"type": "input_image", "image_url": url, "detail": more.get("detail", "auto")}
        case {"type": str()}:
            return dict(part)
        case str():
            return _text_part(part, role)
    return _text_part(json.dumps(part, ensure_ascii=False), role)


def _read_call(call: Any) -> Json:
    """Read a tool call in any of the forms that are about; one in no known form is told as JSON."""
    match call:
        case {"function": {"name": str(name), "arguments": arguments}}:
            pass
        case {"name": str(name), "args": arguments} | {"name": str(name), "arguments": arguments}:
            pass
        case _:
            name, arguments = "unknown", json.dumps(call, ensure_ascii=False)
    call_id = call.get("id") if isinstance(call, dict) else None
    return {
        "type": "function_call",
        "call_id": call_id if isinstance(call_id, str) else "",
        "name": name,
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
        "status": "completed",
    }
