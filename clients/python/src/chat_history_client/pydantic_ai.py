"""Pydantic AI's message history, kept by the service (the extra `pydantic-ai`).

Each ModelMessage is one message, through Pydantic AI's own adapter: `pydantic_ai` holds it as native JSON,
but for its texts, which are the message's content parts, and its tool calls, which are the message's, each in
its order. It is restored equal. A message with a value that the service cannot store (NaN, half an emoji) is
kept whole in `pydantic_ai_exact`, as `_exact` says; Pydantic AI's adapter itself would write NaN as null.

A message that was written in another form is read by `_message_turns`.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import groupby
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter

from chat_history_client import AsyncChatHistoryClient
from chat_history_client._adapters import aread
from chat_history_client._exact import kept, opened, replaced
from chat_history_client._message_parts import Call, Media, Part, Reasoning, Result, Text, as_text
from chat_history_client._message_turns import PYDANTIC_AI as FIELD
from chat_history_client._message_turns import PYDANTIC_AI_TEXTS, Turn, pydantic_ai_parts, turns_of
from chat_history_client.types import Json

EXACT_FIELD = "pydantic_ai_exact"
_CALL = ("tool_name", "args", "tool_call_id")
# The fields of parts that hold any JSON of the application's or of its tools.
_OPEN_FIELDS = ("content", "args")
# More than any value has that Python itself can write as JSON.
_ANY_LEVELS = 1_000


class ChatHistoryStore:
    """Saves and loads what `agent.run(message_history=…)` takes and `result.new_messages()` returns.

    A list is stored together or not at all, and once, whatever happens to the connection. The conversation is
    made by the first `load` or `save`, and belongs to `user_id`; if it is another user's, either raises
    Conflict.
    """

    def __init__(self, client: AsyncChatHistoryClient, *, user_id: str = "default") -> None:
        self._client = client
        self._user_id = user_id

    async def load(self, conversation_id: str) -> list[ModelMessage]:
        """Return the whole history, oldest first; empty where nothing was saved yet."""
        return restored(await aread(self._client, conversation_id, self._user_id))

    async def save(self, conversation_id: str, messages: Sequence[ModelMessage]) -> None:
        """Append messages, in as few batches as the service takes, each of which is stored whole.

        When a batch is refused, those before it stay stored; see `add_all_messages` of the client. A
        caller who is cancelled meanwhile is cancelled when they are stored.
        """
        await self._client.add_all_messages(conversation_id, stored_as(messages), user_id=self._user_id)


def stored_as(messages: Sequence[ModelMessage]) -> list[Json]:
    """Return the native messages that messages are stored as."""
    dumped = ModelMessagesTypeAdapter.dump_python(list(map(_dumpable, messages)), mode="json")
    for message, json in zip(messages, dumped, strict=True):
        for part, part_json in zip(message.parts, json["parts"], strict=True):
            fields = [name for name in _OPEN_FIELDS if name in part_json and hasattr(part, name)]
            part_json |= {name: _as_given(getattr(part, name), part_json[name]) for name in fields}
    return [kept(_stored_as(each), EXACT_FIELD) for each in dumped]


def _dumpable(message: ModelMessage) -> ModelMessage:
    """Return a message without the values at which Pydantic fails, or that it changes."""
    safe = copy(message)
    safe.parts = [_dumpable_part(part) for part in message.parts]
    return safe


def _dumpable_part(part: Any) -> Any:
    safe = copy(part)
    for name in _OPEN_FIELDS:
        if (value := getattr(part, name, None)) is not None:
            readable = replaced(value, _ANY_LEVELS)
            if readable is not value:
                setattr(safe, name, readable)
    return safe


def _as_given(given: Any, dumped: Any) -> Any:
    """Return a value as it was given if it is JSON; else as it was dumped, but for the JSON in it."""
    if _is_json(given):
        return given
    if isinstance(given, dict) and isinstance(dumped, dict) and len(given) == len(dumped):
        pairs = zip(given.values(), dumped.items(), strict=True)
        return {name: _as_given(value, other) for value, (name, other) in pairs}
    if isinstance(given, list | tuple) and isinstance(dumped, list) and len(given) == len(dumped):
        return [_as_given(value, other) for value, other in zip(given, dumped, strict=True)]
    return dumped


def _is_json(value: Any) -> bool:
    if type(value) is dict:
        return all(type(name) is str and _is_json(each) for name, each in value.items())
    if type(value) is list:
        return all(map(_is_json, value))
    return value is None or type(value) in {str, int, float, bool}


def _stored_as(message: Json) -> Json:
    texts: list[Json] = []
    calls: list[Json] = []
    rest = []
    for part in message["parts"]:
        if _is_text(part):
            texts.append({"type": "text", "text": part["content"]})
            rest.append(_without(part, "content"))
        elif part.get("part_kind") == "tool-call":
            calls.append({"name": part["tool_name"], "args": part["args"], "id": part["tool_call_id"]})
            rest.append(_without(part, *_CALL))
        else:
            rest.append(part)
    native: Json = {"role": _role(message), "content": texts or None}
    if calls:
        native["tool_calls"] = calls
    returned = [part["tool_call_id"] for part in rest if part.get("part_kind") == "tool-return"]
    if native["role"] == "tool" and len(returned) == 1:
        native["tool_call_id"] = returned[0]
    return {**native, FIELD: {**message, "parts": rest}}


def _without(part: Json, *names: str) -> Json:
    return {name: value for name, value in part.items() if name not in names}


def _is_text(part: Json) -> bool:
    return part.get("part_kind") in PYDANTIC_AI_TEXTS and isinstance(part.get("content"), str)


def _role(message: Json) -> str:
    if message["kind"] == "response":
        return "assistant"
    kinds = {part.get("part_kind") for part in message["parts"]}
    if "user-prompt" in kinds:
        return "user"
    return "system" if kinds == {"system-prompt"} else "tool" if "tool-return" in kinds else "user"


def restored(messages: Sequence[Json]) -> list[ModelMessage]:
    """Return stored messages as Pydantic AI's, also those that were written in another form."""
    groups: list[list[Turn]] = []
    for _, turns in groupby(turns_of(messages), _group):
        groups.append(list(turns))
    read = [each for turns in groups for each in _read(turns)]
    found = ModelMessagesTypeAdapter.validate_python([json for json, _ in read])
    for message, (_, exact) in zip(found, read, strict=True):
        for part, part_json in zip(message.parts, exact, strict=True):
            _restore_exactly(part, part_json)
    return found


def _group(turn: Turn) -> Any:
    """Group the turns of one stored message, and the results that other forms store one by one."""
    is_result = turn.role == "tool" and pydantic_ai_parts(turn.message) is None
    return "tool" if is_result else turn.message["id"]


def _read(turns: list[Turn]) -> Iterator[tuple[Json, list[Json]]]:
    """Yield messages as Pydantic AI reads them, each with its exact parts, if it was stored as such."""
    message = turns[0].message
    parts = pydantic_ai_parts(message)
    if parts is not None:
        exact = pydantic_ai_parts(opened(message, EXACT_FIELD))
        yield {**message[FIELD], "parts": parts}, exact or parts
    elif turns[0].role == "tool":
        results = [part for turn in turns for part in _parts(turn)]
        yield {"kind": "request", "parts": results}, results
    else:
        for turn in turns:
            kind = "response" if turn.role == "assistant" else "request"
            said = _parts(turn)
            yield {"kind": kind, "parts": said}, said


def _restore_exactly(part: Any, json: Json) -> None:
    """Put the values in that could not be validated, because Pydantic takes no half an emoji."""
    for name in _OPEN_FIELDS:
        if name in json and replaced(json[name]) is not json[name]:
            setattr(part, name, _exactly(getattr(part, name), json[name]))


def _exactly(value: Any, json: Any) -> Any:
    """Return a restored value with the JSON in it as it was; a picture beside a text stays as it is."""
    if isinstance(value, list | tuple) and isinstance(json, list) and len(value) == len(json):
        return [_exactly(each, other) for each, other in zip(value, json, strict=True)]
    return json if value is None or isinstance(value, str | int | float | dict) else value


# -- messages of other forms ---------------------------------------------------------------------------


def _parts(turn: Turn) -> list[Json]:
    """Return the parts of a turn; in a request, the texts and pictures of a user are one prompt."""
    if turn.role == "user":
        return [{"part_kind": "user-prompt", "content": _prompt(turn.parts)}]
    kind = "text" if turn.role == "assistant" else "system-prompt"
    return [json for part in turn.parts for json in _part(part, kind)]


def _prompt(parts: Sequence[Part]) -> str | list[Any]:
    """Return the content of a user's prompt: a text, or a list of texts and pictures."""
    match parts:
        case ():
            return ""
        case (Text(text),):
            return text
    return [_content(part) for part in parts if isinstance(part, Text | Media)]


def _content(part: Text | Media) -> Any:
    if isinstance(part, Text):
        return part.text
    media_type = part.media_type or "application/octet-stream"
    if part.data:
        if not _is_base64(part.data):
            return as_text(part.given)
        return {"kind": "binary", "data": part.data, "media_type": media_type}
    kind = "document" if part.kind == "file" else part.kind
    if not part.url:
        return f"[{kind} {part.file_id}]"
    return {"kind": f"{kind}-url", "url": part.url, **({"media_type": media_type} if part.media_type else {})}


def _is_base64(data: str) -> bool:
    try:
        return bool(b64decode(data, validate=True))
    except ValueError:
        return False


def _part(part: Part, text_kind: str) -> Iterator[Json]:
    match part:
        case Text(text):
            yield {"part_kind": text_kind, "content": text}
        case Media(data=data) if text_kind == "text" and data and _is_base64(data):
            yield {"part_kind": "file", "content": _content(part)}
        case Reasoning(text) if text:
            yield {"part_kind": "thinking", "content": text}
        case Call(call_id, name, arguments):
            given = arguments if isinstance(arguments, str | dict | None) else as_text(arguments)
            yield {"part_kind": "tool-call", "tool_name": name, "args": given, "tool_call_id": call_id}
        case Result(call_id, name, content):
            pair = {"tool_name": name or "unknown", "tool_call_id": call_id}
            outcome = {"outcome": "failed"} if part.failed else {}
            yield {"part_kind": "tool-return", **pair, "content": _output(content), **outcome}


def _output(content: Sequence[Any]) -> Any:
    """Return what a tool returned: a text, or a list of texts and pictures."""
    if all(isinstance(part, Text) for part in content):
        return "\n".join(part.text for part in content)
    return [_content(part) if isinstance(part, Text | Media) else part.given for part in content]
