"""The pieces of a conversation in the forms of the providers, each form one pure function.

The pieces are those that `message_pieces.arrange` has put in order. A form leaves out what it has no place
for: reasoning of other providers, and the calls of hosted tools.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from service.formats.message_pieces import Piece, continues_answer, name_of
from service.formats.strict_json import Json

_BEGIN = "[The conversation begins here.]"
_ANTHROPIC_ID = re.compile(r"[A-Za-z0-9_-]+")


# -- contents --------------------------------------------------------------------------------------


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [] if content is None else [content]


def _text(part: Any) -> str | None:
    """Return the text of a part, or None where it is no text."""
    match part:
        case str():
            return part
        case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
            return text
        case {"type": "refusal", "refusal": str(text)}:
            return text
    return None


def _picture(part: Any) -> str | None:
    """Return the URL of a picture, which may hold the picture itself, or None where it is none."""
    match part:
        case {"type": "input_image", "image_url": str(url)} | {"type": "image_url", "image_url": str(url)}:
            return url
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            return url
        case {"type": "image", "source": {"type": "base64", "media_type": str(kind), "data": str(data)}}:
            return f"data:{kind};base64,{data}"
        case {"type": "image", "source": {"type": "url", "url": str(url)}}:
            return url
    return None


def _plain(part: Any) -> str:
    """Return a part as text, for a place that takes nothing else."""
    text = _text(part)
    if text is not None:
        return text
    return "[image]" if _picture(part) is not None else json.dumps(part, ensure_ascii=False)


# -- Chat Completions ------------------------------------------------------------------------------

_CHAT_PARTS = frozenset({"image_url", "input_audio", "file"})


def chat_completions(found: Sequence[Piece]) -> list[Json]:
    """Return arranged pieces as the `messages` of OpenAI's Chat Completions."""
    made: list[Json] = []
    before: Piece | None = None
    for piece in found:
        if piece.is_call:
            together = before is not None and continues_answer(before, piece)
            # A `message` item and the calls behind it are one answer here.
            together = together or (before is not None and before.is_item and before.is_assistants)
            if not together or made[-1]["role"] != "assistant":
                made.append({"role": "assistant", "content": None})
            made[-1].setdefault("tool_calls", []).append(_chat_call(piece))
        elif piece.is_result:
            made.append({"role": "tool", "tool_call_id": piece.call_id, "content": _chat_output(piece.item)})
        elif piece.kind == "message":
            made.append(_chat_message(piece))
        else:
            continue
        before = piece
    return made


def _chat_message(piece: Piece) -> Json:
    role = "assistant" if piece.is_assistants else str(piece.message.get("role"))
    name = piece.message.get("name")
    named = {"name": name} if isinstance(name, str) and name else {}
    return {"role": role, "content": _chat_content(piece.content, role), **named}


def _chat_content(content: Any, role: str) -> str | list[Json]:
    parts = _parts(content)
    if len(parts) == 1 and (text := _text(parts[0])) is not None:
        return text
    return [_chat_part(part, role) for part in parts] or ""


def _chat_part(part: Any, role: str) -> Json:
    if role == "user":
        if isinstance(part, dict) and part.get("type") in _CHAT_PARTS:
            return part
        if (url := _picture(part)) is not None:
            return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "text", "text": _plain(part)}


def _chat_output(item: Json) -> str | list[Json]:
    output = item.get("output")
    return output if isinstance(output, str) else _chat_content(output, "tool")


def _chat_call(call: Piece) -> Json:
    if call.kind == "custom_tool_call":
        custom = {"name": name_of(call), "input": str(call.item.get("input", ""))}
        return {"id": call.call_id, "type": "custom", "custom": custom}
    function = {"name": name_of(call), "arguments": _arguments(call)}
    return {"id": call.call_id, "type": "function", "function": function}


def _arguments(call: Piece) -> str:
    """Return the arguments of a call as JSON text; of a call that has none, all that it says."""
    arguments = call.item.get("arguments")
    if isinstance(arguments, str):
        return arguments
    said = {
        name: value for name, value in call.item.items() if name not in {"type", "id", "call_id", "status"}
    }
    return json.dumps(said, ensure_ascii=False)


# -- Responses -------------------------------------------------------------------------------------


def responses(found: Sequence[Piece]) -> list[Json]:
    """Return arranged pieces as the `input` of OpenAI's Responses API.

    Reasoning that has neither an id nor its encrypted content is another provider's, and is left out.
    """
    return [
        piece.item
        for piece in found
        if piece.kind != "reasoning" or "id" in piece.item or "encrypted_content" in piece.item
    ]


# -- Anthropic -------------------------------------------------------------------------------------


def anthropic(found: Sequence[Piece]) -> tuple[list[Json], list[Json]]:
    """Return arranged pieces as the `system` and the `messages` of Anthropic's Messages API.

    Leading system messages are `system`; a later one is a text of the user, because the API has no other
    place for it. Neighbours of one role are one message, and the first message is the user's.
    """
    is_head = [piece.message.get("role") in {"system", "developer"} for piece in found]
    count = is_head.index(False) if False in is_head else len(found)
    system = [block for piece in found[:count] for block in _blocks(piece)]
    made: list[Json] = []
    for piece in found[count:]:
        role, blocks = "assistant" if piece.is_assistants else "user", _blocks(piece)
        if not made and role == "assistant" and blocks:
            made.append({"role": "user", "content": [{"type": "text", "text": _BEGIN}]})
        if made and made[-1]["role"] == role:
            made[-1]["content"] += blocks
        elif blocks:
            made.append({"role": role, "content": blocks})
    return system, made


def _blocks(piece: Piece) -> list[Json]:
    if piece.block is not None:
        return [piece.block]
    if piece.is_call:
        call_id = _anthropic_id(piece.call_id)
        return [{"type": "tool_use", "id": call_id, "name": name_of(piece), "input": _input(piece)}]
    if piece.is_result:
        output = piece.item.get("output")
        content = output if isinstance(output, str) else _content_blocks(output, "user")
        return [{"type": "tool_result", "tool_use_id": _anthropic_id(piece.call_id), "content": content}]
    if piece.kind == "message":
        return _content_blocks(piece.content, "assistant" if piece.is_assistants else "user")
    return []


def _content_blocks(content: Any, role: str) -> list[Json]:
    blocks = [_content_block(part, role) for part in _parts(content)]
    # The API refuses an empty text.
    return [block for block in blocks if block.get("text") != ""]


def _content_block(part: Any, role: str) -> Json:
    if role == "user" and isinstance(part, dict) and isinstance(part.get("source"), dict):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part
    url = _picture(part)
    if role != "user" or url is None:
        return {"type": "text", "text": _plain(part)}
    match = re.match(r"data:([^;,]+);base64,", url)
    if match is None:
        return {"type": "image", "source": {"type": "url", "url": url}}
    data = url[match.end() :]
    return {"type": "image", "source": {"type": "base64", "media_type": match[1], "data": data}}


def _input(call: Piece) -> Json:
    text = _arguments(call)
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


def _anthropic_id(call_id: str) -> str:
    """Return the id of a call as Anthropic's API accepts it; different ids stay different."""
    if _ANTHROPIC_ID.fullmatch(call_id):
        return call_id
    return f"call_{hashlib.sha256(call_id.encode()).hexdigest()[:24]}"


# -- the messages themselves -----------------------------------------------------------------------


def native(found: Sequence[Piece]) -> list[Json]:
    """Return the messages of arranged pieces as they are stored, each once."""
    return list({id(piece.message): piece.message for piece in found}.values())


FORMS: dict[str, Callable[[Sequence[Piece]], list[Json]]] = {
    "native": native,
    "openai": chat_completions,
    "responses": responses,
}
