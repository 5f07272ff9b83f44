"""Reads a stored message, in whatever form it was written, as turns: who says which parts.

Like `message_parts`, which reads the parts, this file is also the client's (`_message_turns.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

from service.formats.message_parts import (
    Call,
    Json,
    Other,
    Part,
    Reasoning,
    Result,
    Text,
    as_text,
    call_of,
    is_gemini_tool,
    listed,
    part_of,
    result_of,
)

ITEM = "openai_item"
LANGCHAIN = "langchain"
PYDANTIC_AI = "pydantic_ai"


@dataclass(frozen=True)
class Turn:
    """Neighbouring parts of one speaker: `user`, `assistant`, `tool`, `system` or `developer`.

    They stand in `message`; of an answer that was stored as several items, the others are `more_messages`.
    """

    role: str
    parts: tuple[Part, ...]
    message: Json = field(repr=False)
    more_messages: tuple[Json, ...] = field(default=(), repr=False)


def read(message: Json) -> list[Turn]:
    """Return the turns of a stored message: one, or several where the message has several speakers.

    An empty text counts only where it is all that the message says.
    """
    role = "assistant" if message.get("role") == "model" else str(message.get("role"))
    spoken = [(_speaker(part, role), part) for role, part in _spoken(message, role)]
    spoken = [each for each in spoken if not _is_empty(each[1])] or spoken
    if any(isinstance(part, Call | Result) and is_gemini_tool(part.given) for _, part in spoken):
        spoken = list(_paired(spoken, message))
    turns = [
        Turn(speaker, tuple(part for _, part in said), message)
        for speaker, said in groupby(spoken, lambda each: each[0])
    ]
    return turns or [Turn(role, (), message)]


def _is_empty(part: Part) -> bool:
    return isinstance(part, Text) and not part.text


def turns_of(messages: Iterable[Json]) -> list[Turn]:
    """Return the turns of a history.

    The items of one answer of a model are one turn, and a result has the name of the call that it answers.
    """
    names: dict[str, str] = {}
    turns: list[Turn] = []
    for turn in (each for message in messages for each in read(message)):
        names |= {part.id: part.name for part in turn.parts if isinstance(part, Call)}
        named = replace(turn, parts=tuple(_named(part, names) for part in turn.parts))
        if turns and _is_same_answer(turns[-1], named):
            last = turns[-1]
            more = (*last.more_messages, turn.message)
            turns[-1] = replace(last, parts=last.parts + named.parts, more_messages=more)
        else:
            turns.append(named)
    return turns


def _named(part: Part, names: dict[str, str]) -> Part:
    if isinstance(part, Result) and not part.name:
        return replace(part, name=names.get(part.call_id, ""))
    return part


def _is_same_answer(last: Turn, turn: Turn) -> bool:
    """Tell whether two turns are items, in which form each part of an answer is a message of its own."""
    return last.role == turn.role == "assistant" and ITEM in last.message and ITEM in turn.message


# -- who says what ---------------------------------------------------------------------------------


def _speaker(part: Part, role: str) -> str:
    if isinstance(part, Result):
        return "tool"
    return "assistant" if isinstance(part, Call | Reasoning) else role


def _spoken(message: Json, role: str) -> Iterator[tuple[str, Part]]:
    """Yield the parts in their order, each with the role that says it."""
    parts = pydantic_ai_parts(message)
    if parts is not None:
        for part in parts:
            yield from ((said_by, each) for said_by, each in _pydantic_ai(part, role))
        return
    yield from ((role, part) for part in (_tool_parts(message) if role == "tool" else _parts(message)))


def _tool_parts(message: Json) -> list[Part]:
    """Return the results that a message of the role `tool` has: itself, or each of its parts."""
    parts, call_id, content = _parts(message), message.get("tool_call_id"), message.get("content")
    is_other_item = ITEM in message and call_id is None and content is None
    if is_other_item or any(isinstance(part, Result) for part in parts):
        return parts
    return [result_of(call_id, message.get("name"), content, failed=_failed(message))]


def _failed(message: Json) -> bool:
    kept = message.get(LANGCHAIN)
    return isinstance(kept, dict) and kept.get("status") == "error"


def _parts(message: Json) -> list[Part]:
    """Return the parts of a message: what it thought, what it says, the tools that it calls."""
    item, calls = message.get(ITEM), list(_calls(message))
    ids = {call.id for call in calls if call.id}
    content = [*listed(message.get("content")), *listed(message.get("parts"))]
    if isinstance(item, dict) and message.get("content") is None and not calls:
        content = [item] if item.get("type", "message") != "message" else []
    read_parts = [part_of(each) for each in content]
    # A call that stands in the content and in `tool_calls` is one call; the latter has all its arguments.
    said = [part for part in read_parts if not (isinstance(part, Call) and part.id in ids)]
    return [*_thought(message, said), *said, *calls]


def _thought(message: Json, said: list[Part]) -> Iterator[Reasoning]:
    """Yield the reasoning that stands beside the content, unless the content has it, too."""
    kept = message.get(LANGCHAIN)
    more = kept.get("additional_kwargs") if isinstance(kept, dict) else None
    for place in (message, more):
        text = place.get("reasoning_content") if isinstance(place, dict) else None
        if isinstance(text, str) and text and not any(isinstance(part, Reasoning) for part in said):
            yield Reasoning(text)


def _calls(message: Json) -> Iterator[Call]:
    yield from map(call_of, listed(message.get("tool_calls")))
    kept = message.get(LANGCHAIN)
    if isinstance(kept, dict):
        yield from map(call_of, listed(kept.get("invalid_tool_calls")))


def _paired(spoken: list[tuple[str, Part]], message: Json) -> Iterator[tuple[str, Part]]:
    """Give Gemini's calls and responses the ids that they may lack.

    Gemini pairs them by name and place, and a message with responses follows the message with the calls, so
    the id is made of the calls' `seq`, the name, and the place among those of the same name.
    """
    seen: dict[tuple[type, str], int] = {}
    for speaker, part in spoken:
        if not isinstance(part, Call | Result) or not is_gemini_tool(part.given):
            yield speaker, part
            continue
        kind = type(part), part.name
        seen[kind] = seen.get(kind, 0) + 1
        seq = message.get("seq", 0) - isinstance(part, Result)
        made = f"call_{seq}_{seen[kind]}_{part.name}"[:64]
        if isinstance(part, Call):
            yield speaker, replace(part, id=part.id or made)
        else:
            yield speaker, replace(part, call_id=part.call_id or made)


# -- Pydantic AI -----------------------------------------------------------------------------------

# The kinds of parts whose `content`, where it is text, is a part of the native content.
PYDANTIC_AI_TEXTS = frozenset({"system-prompt", "user-prompt", "tool-return", "retry-prompt", "text"})


def pydantic_ai_parts(message: Json) -> list[Json] | None:
    """Return the parts of a message that Pydantic AI's adapter stored, whole; None for any other message.

    A message that only looks like one, being written natively, is any other message.
    """
    kept = message.get(PYDANTIC_AI)
    if not isinstance(kept, dict):
        return None
    try:
        texts, calls = iter(message.get("content") or ()), iter(message.get("tool_calls") or ())
        return [_pydantic_ai_part(part, texts, calls) for part in kept["parts"]]
    except (AttributeError, KeyError, StopIteration, TypeError):
        return None


def _pydantic_ai_part(part: Json, texts: Iterator[Json], calls: Iterator[Json]) -> Json:
    if part.get("part_kind") in PYDANTIC_AI_TEXTS and "content" not in part:
        return {**part, "content": next(texts)["text"]}
    if part.get("part_kind") == "tool-call":
        call = next(calls)
        return {**part, "tool_name": call["name"], "args": call["args"], "tool_call_id": call["id"]}
    return part


def _pydantic_ai(part: Json, role: str) -> Iterator[tuple[str, Part]]:
    """Yield what a part of a request or of a response says, and who says it."""
    kind, content = part.get("part_kind"), part.get("content")
    call_id, name = part.get("tool_call_id"), part.get("tool_name")
    if kind == "tool-call":
        yield role, Call(str(call_id), str(name), part.get("args"), part)
    elif kind == "tool-return" or (kind == "retry-prompt" and name):
        failed = kind == "retry-prompt" or part.get("outcome") == "failed"
        yield role, result_of(call_id, name, content, failed=failed, given=part)
    elif kind == "thinking":
        yield role, Reasoning(str(content), part)
    elif kind == "retry-prompt":
        yield "user", Text(as_text(content), part)
    elif kind in {"system-prompt", "user-prompt", "text", "file"}:
        said_by = {"system-prompt": "system", "user-prompt": "user"}.get(kind, role)
        parts = map(part_of, listed(content))
        yield from ((said_by, each) for each in parts if not isinstance(each, Other))
