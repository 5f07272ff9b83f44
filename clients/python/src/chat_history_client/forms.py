"""Histories in the forms that models take: Chat Completions, Anthropic's Messages, and Gemini's contents.

The native API stores a message as it was written, and returns it so. These functions take what it returns, in
whatever forms it was written, and give what one model's API takes. They are pure. A message that was written
in Anthropic's or in Gemini's form is returned in that form as it is, signatures of its reasoning included;
reasoning of other forms is left out, because no model takes another's.

OpenAI's Responses API takes what `stream_items` of the client yields.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from chat_history_client._message_parts import (
    Call,
    Content,
    Media,
    Part,
    Reasoning,
    Result,
    Text,
    as_object,
    as_text,
    data_url,
    plain_text,
)
from chat_history_client._message_turns import Turn, turns_of
from chat_history_client.types import Json, Message

_SYSTEM = frozenset({"system", "developer"})


def chat_completions(messages: Iterable[Message]) -> list[Json]:
    """Return `messages` of OpenAI's Chat Completions API.

    A `tool` message takes texts only, so the pictures of results follow them as a message of the user.
    """
    found: list[Json] = []
    for is_tool, turns in groupby(turns_of(messages), lambda turn: turn.role == "tool"):
        if is_tool:
            found += _chat_results([part for turn in turns for part in turn.parts])
        else:
            found += (_chat_message(turn) for turn in turns if _is_said(turn))
    return found


def anthropic(messages: Iterable[Message]) -> Json:
    """Return `system` and `messages` of Anthropic's Messages API; `system` only if there is any."""
    turns = turns_of(messages)
    system = _system_text(turns)
    said = _neighbours(turns, _is_anthropic, _anthropic_part, {"assistant": "assistant"}, "content")
    return {**({"system": system} if system else {}), "messages": said}


def gemini(messages: Iterable[Message]) -> Json:
    """Return `system_instruction` and `contents` of Gemini's API; the former only if there is any."""
    turns = turns_of(messages)
    system = _system_text(turns)
    said = _neighbours(turns, _is_gemini, _gemini_parts, {"assistant": "model"}, "parts")
    instruction = {"system_instruction": {"parts": [{"text": system}]}} if system else {}
    return {**instruction, "contents": said}


# -- what all of them need -------------------------------------------------------------------------------


def _is_said(turn: Turn) -> bool:
    """Tell whether a turn has anything that a model takes: no empty text, and no other model's reasoning."""
    return any(not isinstance(part, Reasoning) and part != Text("") for part in turn.parts)


def _system_text(turns: Iterable[Turn]) -> str:
    parts = (part for turn in turns if turn.role in _SYSTEM for part in turn.parts)
    return plain_text(part for part in parts if isinstance(part, Content))


def _neighbours(
    turns: Sequence[Turn], is_own: Any, write: Any, roles: dict[str, str], field: str
) -> list[Json]:
    """Return messages, in each of which the neighbouring turns of a role are one, as these APIs ask for."""
    pairs: list[tuple[str, list[Json]]] = []
    said = (turn for turn in turns if turn.role not in _SYSTEM)
    for _, group in groupby(said, lambda turn: id(turn.message)):
        of_message = list(group)
        if is_own(of_message[0].message):
            message = of_message[0].message
            pairs.append((roles.get(of_message[0].role, "user"), list(message[field])))
            continue
        for turn in of_message:
            written = [each for part in turn.parts for each in write(part)]
            pairs.append((roles.get(turn.role, "user"), written))
    grouped = groupby((pair for pair in pairs if pair[1]), lambda pair: pair[0])
    return [{"role": role, field: [part for _, parts in same for part in parts]} for role, same in grouped]


# -- Chat Completions ------------------------------------------------------------------------------------


def _chat_message(turn: Turn) -> Json:
    content = [part for part in turn.parts if isinstance(part, Content)]
    name = turn.message.get("name")
    message: Json = {"role": turn.role, "content": _chat_content(content)}
    if isinstance(name, str):
        message["name"] = name
    calls = [_chat_call(part) for part in turn.parts if isinstance(part, Call)]
    return {**message, "tool_calls": calls} if calls else message


def _chat_content(content: Sequence[Content]) -> str | list[Json] | None:
    if not content:
        return None
    if all(isinstance(part, Text) for part in content):
        return plain_text(content)
    return [_chat_part(part) for part in content]


def _chat_part(part: Content) -> Json:
    if not isinstance(part, Media):
        return {"type": "text", "text": plain_text([part])}
    if part.kind == "image" and not part.file_id:
        return {"type": "image_url", "image_url": {"url": data_url(part)} | _given("detail", part.detail)}
    if part.kind == "audio" and part.data:
        audio = {"data": part.data, "format": part.media_type.partition("/")[2]}
        return {"type": "input_audio", "input_audio": audio}
    file = _given("file_id", part.file_id) or _given("file_data", data_url(part))
    return {"type": "file", "file": file | _given("filename", part.name)}


def _given(name: str, value: str) -> dict[str, str]:
    return {name: value} if value else {}


def _chat_call(call: Call) -> Json:
    function = {"name": call.name, "arguments": _arguments_text(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments_text(arguments: Any) -> str:
    return "{}" if arguments is None else as_text(arguments)


def _chat_results(parts: Sequence[Part]) -> Iterator[Json]:
    """Yield the results that follow each other, and then their pictures, which stand in no result."""
    pictures: list[Content] = []
    for part in parts:
        if not isinstance(part, Result):
            continue
        texts = [each for each in part.content if not isinstance(each, Media)]
        pictures += (each for each in part.content if isinstance(each, Media))
        yield {"role": "tool", "tool_call_id": part.call_id, "content": plain_text(texts)}
    if pictures:
        yield {"role": "user", "content": _chat_content(pictures)}


# -- Anthropic -------------------------------------------------------------------------------------------

_ANTHROPIC_TYPES = frozenset({"tool_use", "tool_result", "thinking", "redacted_thinking"})


def _is_anthropic(message: Message) -> bool:
    """Tell whether a message was written in Anthropic's form, by the parts that no other form has."""
    content = message.get("content")
    if not isinstance(content, list) or "tool_calls" in message or message.get("role") == "tool":
        return False
    parts = [part for part in content if isinstance(part, dict)]
    return any(part.get("type") in _ANTHROPIC_TYPES or "source" in part for part in parts)


def _anthropic_part(part: Part) -> Iterator[Json]:
    match part:
        case Text(text) if text:
            yield {"type": "text", "text": text}
        case Media():
            yield _anthropic_media(part)
        case Call(call_id, name, arguments):
            given = as_object(arguments)
            given = {"arguments": arguments} if given is None else given
            yield {"type": "tool_use", "id": call_id, "name": name, "input": given}
        case Result(call_id, _, content):
            blocks = [block for each in content for block in _anthropic_part(each)]
            failed = {"is_error": True} if part.failed else {}
            yield {"type": "tool_result", "tool_use_id": call_id, "content": blocks, **failed}


def _anthropic_media(media: Media) -> Json:
    if media.data:
        source = {"type": "base64", "media_type": media.media_type, "data": media.data}
    elif media.url:
        source = {"type": "url", "url": media.url}
    else:
        source = {"type": "file", "file_id": media.file_id}
    return {"type": "image" if media.kind == "image" else "document", "source": source}


# -- Gemini ----------------------------------------------------------------------------------------------


def _is_gemini(message: Message) -> bool:
    return isinstance(message.get("parts"), list) and message.get("content") is None


def _gemini_parts(part: Part) -> Iterator[Json]:
    match part:
        case Text(text) if text:
            yield {"text": text}
        case Media():
            yield _gemini_media(part)
        case Call(call_id, name, arguments):
            given = as_object(arguments)
            given = {"arguments": arguments} if given is None else given
            yield {"function_call": {"id": call_id, "name": name, "args": given}}
        case Result(call_id, name, content):
            texts = [each for each in content if not isinstance(each, Media)]
            response = {"error" if part.failed else "output": plain_text(texts)}
            yield {"function_response": {"id": call_id, "name": name, "response": response}}
            yield from (_gemini_media(each) for each in content if isinstance(each, Media))


def _gemini_media(media: Media) -> Json:
    if media.data:
        return {"inline_data": {"mime_type": media.media_type, "data": media.data}}
    return {"file_data": {"file_uri": media.url or media.file_id} | _given("mime_type", media.media_type)}
