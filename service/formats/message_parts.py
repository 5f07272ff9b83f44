"""Reads a part of a stored message by its shape, in whatever form it was written.

A message is stored exactly as it was written: in the form of Chat Completions, Anthropic, Gemini or OpenAI's
items, or by an adapter of a framework. Each reader (`/v1`, every adapter, `chat_history_client.forms`) shows
messages of other forms from these parts. So each form has one way in, here and in `message_turns`, and one
way out, at its reader. Nothing here changes what is stored. tests/integration/test_adapter_matrix.py writes
in each form and reads in each other.

This file is also the client's, as `_message_parts.py`, because neither distribution needs the other:
`make client` copies it, and a test compares the two. So it imports the standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """A text. `given` is the part as it was written, here and in the other classes."""

    text: str
    given: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Media:
    """A picture (`image`), `audio`, `video` or `file`: by its URL, as base64, or as a file's id."""

    kind: str
    url: str = ""
    data: str = ""
    media_type: str = ""
    file_id: str = ""
    name: str = ""
    detail: str = field(default="", compare=False)
    given: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Reasoning:
    """What a model thought, as far as it is a text."""

    text: str
    given: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Call:
    """A call of a tool. `arguments` are JSON, or JSON text, as the model's form has them."""

    id: str
    name: str
    arguments: Any
    given: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Other:
    """A part of a kind that only its own form knows."""

    given: Any


Content: TypeAlias = Text | Media | Other


@dataclass(frozen=True)
class Result:
    """The result of a call, paired by the call's id; `name` is empty where the form does not say it."""

    call_id: str
    name: str
    content: tuple[Content, ...]
    failed: bool = False
    given: Any = field(default=None, compare=False)


Part: TypeAlias = Text | Media | Reasoning | Call | Result | Other


def listed(value: Any) -> list[Any]:
    """Return a list as it is, and any other value as a list of it; None is an empty list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def as_text(value: Any) -> str:
    """Return a text as it is, and any other JSON as JSON text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_object(arguments: Any) -> Json | None:
    """Return the arguments of a call as an object, or None where they are none."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return None
    arguments = {} if arguments is None else arguments
    return arguments if isinstance(arguments, dict) else None


def data_url(media: Media) -> str:
    """Return where a reader finds the content: its URL, or the content itself as a `data:` URL."""
    return media.url or (f"data:{media.media_type};base64,{media.data}" if media.data else "")


def plain_text(content: Iterable[Content]) -> str:
    """Return content as one text, for a form that takes no parts there."""
    texts = (each.text if isinstance(each, Text) else as_text(each.given) for each in content)
    return "\n".join(texts)


def call_of(call: Any) -> Call:
    """Read a tool call in any of the known forms; a call in another form is told as JSON text."""
    match call:
        case {"function": {"name": str(name), "arguments": arguments}}:
            pass
        case {"name": str(name), "args": arguments} | {"name": str(name), "arguments": arguments}:
            pass
        case {"name": str(name), "input": arguments} | {"custom": {"name": str(name), "input": arguments}}:
            pass
        case _:
            name, arguments = "unknown", json.dumps(call, ensure_ascii=False)
    call_id = call.get("id") if isinstance(call, dict) else None
    return Call(call_id if isinstance(call_id, str) else "", name, arguments, call)


def result_of(call_id: Any, name: Any, value: Any, *, failed: bool = False, given: Any = None) -> Result:
    """Return the result of a call, whose value is a text, a list of parts, or any JSON."""
    content = _result_content(value)
    named = name if isinstance(name, str) else ""
    return Result(call_id if isinstance(call_id, str) else "", named, content, failed, given)


def _result_content(value: Any) -> tuple[Content, ...]:
    """Read the value of a result; JSON that is neither a text nor a list of parts is told as JSON text."""
    if isinstance(value, list) and value:
        parts = [part_of(each) for each in value]
        if all(isinstance(part, Text | Media) or _is_typed(part) for part in parts):
            return tuple(part for part in parts if isinstance(part, Text | Media | Other))
    return () if value is None else (Text(as_text(value)),)


def _is_typed(part: Part) -> bool:
    return (
        isinstance(part, Other) and isinstance(part.given, dict) and isinstance(part.given.get("type"), str)
    )


# -- a part ----------------------------------------------------------------------------------------


def part_of(part: Any) -> Part:
    """Read a part of a content by its shape, in whichever form it is."""
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, dict):
        return Other(part)
    return _text_part(part) or _tool_part(part) or _media_part(part) or _gemini_part(part) or Other(part)


def _text_part(part: Json) -> Part | None:  # noqa: PLR0911  (a case for each shape)
    match part:
        case {"type": "text" | "input_text" | "output_text", "text": str(text)} | {
            "type": "refusal",
            "refusal": str(text),
        }:
            return Text(text, part)
        case {"block_type": "text", "text": str(text)} | {"kind": "text-content", "content": str(text)}:
            return Text(text, part)
        case {"type": "document", "source": {"type": "text", "data": str(text)}}:
            return Text(text, part)
        case {"type": "thinking", "thinking": str(text)} | {"type": "reasoning", "reasoning": str(text)}:
            return Reasoning(text, part)
        case {"type": "text_reasoning", "text": str(text)} | {"block_type": "thinking", "content": str(text)}:
            return Reasoning(text, part)
        case {"type": "redacted_thinking"}:
            return Reasoning("", part)
        case {"type": "reasoning", **fields}:
            told = [*listed(fields.get("summary")), *listed(fields.get("content"))]
            texts = [each.get("text") for each in told if isinstance(each, dict)]
            return Reasoning("\n".join(text for text in texts if isinstance(text, str)), part)
    return None


def _tool_part(part: Json) -> Part | None:  # noqa: PLR0911  (a case for each shape)
    match part:
        case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": arguments}:
            return Call(call_id, name, arguments, part)
        case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": arguments}:
            return Call(call_id, name, arguments, part)
        case {"type": "custom_tool_call", "call_id": str(call_id), "name": str(name), "input": arguments}:
            return Call(call_id, name, arguments, part)
        case {"type": "tool_call", "name": str(name), "args": arguments, **more}:
            return Call(str(more.get("id") or ""), name, arguments, part)
        case {"block_type": "tool_call", "tool_name": str(name), "tool_kwargs": arguments, **more}:
            return Call(str(more.get("tool_call_id") or ""), name, arguments, part)
        case {"type": "tool_result", "tool_use_id": str(call_id), **more}:
            failed = more.get("is_error") is True
            return result_of(call_id, None, more.get("content"), failed=failed, given=part)
        case {
            "type": "function_call_output" | "custom_tool_call_output",
            "call_id": call_id,
            "output": value,
        }:
            return result_of(call_id, None, value, given=part)
        case {"type": "function_result", "call_id": call_id, **more}:
            items = listed(more.get("items"))
            told_apart = [
                each for each in items if not (isinstance(each, dict) and each.get("type") == "text")
            ]
            value = items if told_apart else more.get("result")
            return result_of(call_id, None, value, failed=bool(more.get("exception")), given=part)
    return None


_MEDIA_KINDS = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "input_audio": "audio",
    "video": "video",
    "file": "file",
    "input_file": "file",
    "document": "file",
    "uri": "",
    "data": "",
    "image-url": "image",
    "audio-url": "audio",
    "video-url": "video",
    "document-url": "file",
    "binary": "",
    "uploaded-file": "",
}


def _media_part(part: Json) -> Part | None:
    """Read a picture, a sound, a film or a file; all forms differ in their names for the same five facts."""
    tag = part.get("type") or part.get("block_type") or part.get("kind")
    if not isinstance(tag, str) or tag not in _MEDIA_KINDS:
        return None
    inner: Json = next(
        (part[name] for name in ("source", "file", tag) if isinstance(part.get(name), dict)), {}
    )
    facts = {**part, **inner}
    media_type = _first(facts, "media_type", "mime_type", "image_mimetype", "document_mimetype")
    if not media_type and (form := _first(facts, "format")):
        media_type = f"{_MEDIA_KINDS[tag]}/{form}"
    found = Media(
        _MEDIA_KINDS[tag],
        _first(facts, "url", "image_url", "file_url", "uri"),
        _first(facts, "base64", "data", "file_data", "image", "audio", "video"),
        media_type,
        _first(facts, "file_id"),
        _first(facts, "filename", "title"),
        _first(facts, "detail"),
        part,
    )
    return _complete(found)


def _first(facts: Any, *names: str) -> str:
    return next((facts[name] for name in names if isinstance(facts.get(name), str) and facts[name]), "")


def _complete(media: Media) -> Media | None:
    """Read a `data:` URL as the content that it has, and a kind that is not said from the media type."""
    for place in (media.url, media.data):
        if place.startswith("data:") and ";base64," in place:
            head, _, data = place.partition(";base64,")
            media_type = head.removeprefix("data:") or media.media_type
            media = replace(media, url="", data=data, media_type=media_type)
    if not (media.url or media.data or media.file_id):
        return None
    return replace(media, kind=media.kind or _kind_of(media.media_type))


def _kind_of(media_type: str) -> str:
    """Return the kind of a part whose form says its media type only."""
    kind = media_type.partition("/")[0]
    return kind if kind in {"image", "audio", "video"} else "file"


# -- Gemini ----------------------------------------------------------------------------------------


def _gemini_part(part: Json) -> Part | None:  # noqa: PLR0911  (a case for each shape)
    """Read a part of Gemini, whose kind is the name of its field, in camel case or in snake case."""
    snake = {_GEMINI_NAMES.get(name, name): value for name, value in part.items()}
    match snake:
        case {"text": str(text), "thought": True}:
            return Reasoning(text, part)
        case {"text": str(text)} if "type" not in part:
            return Text(text, part)
        case {"inline_data": {"data": str(data), **more}}:
            return _complete(Media("", data=data, media_type=_mime_type(more), given=part))
        case {"file_data": {**more}} if uri := _first(more, "file_uri", "fileUri"):
            return _complete(Media("", uri, media_type=_mime_type(more), given=part))
        case {"function_call": {"name": str(name), **more}}:
            return Call(_first(more, "id"), name, more.get("args"), part)
        case {"function_response": {"name": str(name), **more}}:
            value, failed = _gemini_output(more.get("response"))
            return result_of(more.get("id"), name, value, failed=failed, given=part)
    return None


def _mime_type(blob: Any) -> str:
    return _first(blob, "mime_type", "mimeType")


_GEMINI_NAMES = {
    "inlineData": "inline_data",
    "fileData": "file_data",
    "functionCall": "function_call",
    "functionResponse": "function_response",
}


def _gemini_output(response: Any) -> tuple[Any, bool]:
    """Return the value in a response, which Gemini wraps in an object with one of three names."""
    if isinstance(response, dict) and len(response) == 1:
        ((name, value),) = response.items()
        if name in {"output", "result", "error"}:
            return value, name == "error"
    return response, False


def is_gemini_tool(given: Any) -> bool:
    """Tell whether a part is a call or a response in Gemini's form, which may have no id."""
    names = {_GEMINI_NAMES.get(name, name) for name in given} if isinstance(given, dict) else set()
    return bool({"function_call", "function_response"} & names)
