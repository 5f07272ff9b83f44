"""Exports: everything of a user written as lines, and such a file read back, strictly.

The last line says how many conversations and messages there were, so that an export that was cut short is not
taken for a whole one.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from service.chat_service import ChatService, ConversationRecord, ListPosition
from service.documents import Time, Title
from service.errors import ChatHistoryError, ConversationNotFound, InvalidRequest, MalformedDocument
from service.formats import strict_json
from service.formats.strict_json import Json
from service.tenancy import Id
from service.user_data.erasure import RemovedCounts
from service.user_data.times import Times

if TYPE_CHECKING:
    from service.user_data import UserData

FORMAT_VERSION = 1
_PAGE_ITEMS = 100

# Every JSON parser holds a number of this size exactly, and there is room for messages that are appended
# after an import.
ExportedSeq = Annotated[int, Field(ge=0, le=2**53)]
_Time = Annotated[Time, Field(strict=False)]


class ExportedCheckpoint(BaseModel):
    """A checkpoint as an export has it, in the line of its conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    upto_seq: Annotated[int, Field(ge=1, le=2**53)]
    created_at: _Time
    summary: str
    metadata: dict[str, Any] | None = None


class ExportedConversation(BaseModel):
    """A conversation as an export has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Id
    user_id: Id
    title: Title | None
    metadata: dict[str, Any]
    created_at: _Time
    updated_at: _Time
    # Exports of the earliest services have neither this nor a version.
    active_at: _Time | None = None
    last_seq: ExportedSeq
    message_count: ExportedSeq
    version: ExportedSeq = 0
    expires_at: _Time | None = None
    checkpoints: list[ExportedCheckpoint] = Field(default_factory=list)


async def count(chat: ChatService, user_id: str) -> RemovedCounts:
    """Return how many conversations and messages a user has."""
    conversations = messages = 0
    async for each in _conversations(chat, user_id):
        conversations += 1
        messages += each.message_count
    return RemovedCounts(conversations, messages)


async def export(chat: ChatService, user_id: str) -> AsyncIterator[list[Json]]:
    """Yield everything of a user, in parts; see `UserData.export`."""
    began = datetime.now(UTC)
    ids: dict[str, None] = {}
    async for each in _conversations(chat, user_id):
        ids[each.id] = None
    # A conversation with activity meanwhile moves to the front of the list, past the page that is being read.
    # So the front is read once more. The minute is for clocks of other processes that are behind.
    async for each in _conversations(chat, user_id):
        if each.updated_at < began - timedelta(minutes=1):
            break
        ids[each.id] = None
    yield [{"type": "export", "version": FORMAT_VERSION, "user_id": user_id, "created_at": began}]
    conversations = messages = 0
    for conversation_id in ids:
        try:
            conversation = await chat.get_conversation(conversation_id, user_id)
            # Messages that are appended meanwhile are not counted in `conversation`, so they stay out.
            beyond = conversation.last_seq + 1
            parts = chat.stream_chat_history(conversation_id, user_id, before=beyond)
            first = await anext(parts)
            checkpoints = await chat.list_checkpoints(conversation_id, user_id)
        except ConversationNotFound:
            continue  # deleted meanwhile
        conversations += 1
        messages += len(first)
        head = {"type": "conversation", **_exported(conversation), **_with(checkpoints)}
        yield [head, *({"type": "message", "message": each} for each in first)]
        async for part in parts:
            messages += len(part)
            yield [{"type": "message", "message": each} for each in part]
    yield [{"type": "end", "conversations": conversations, "messages": messages}]


def _exported(conversation: ConversationRecord) -> Json:
    names = (name for name in ExportedConversation.model_fields if name != "checkpoints")
    return {name: getattr(conversation, name) for name in names}


def _with(checkpoints: list[Json]) -> Json:
    """Return the field of the checkpoints, oldest first; without any, earlier versions can read the line."""
    names = ExportedCheckpoint.model_fields
    shown = [{name: each[name] for name in names} for each in reversed(checkpoints)]
    return {"checkpoints": shown} if shown else {}


async def _conversations(chat: ChatService, user_id: str) -> AsyncIterator[ConversationRecord]:
    """Yield a user's conversations, latest activity first: all of them, or MalformedDocument."""
    after: ListPosition | None = None
    while True:
        page = await chat.list_conversations(user_id, limit=_PAGE_ITEMS, after=after)
        if page.left_out:
            raise MalformedDocument(
                f"The conversation {page.left_out[0]} is not well formed, so not all data of this user "
                "can be read. `chat-history verify` names all such conversations. Correct or remove them."
            )
        for each in page.conversations:
            yield each
        after = page.next
        if after is None:
            return


Progress = Callable[[int], None]


@dataclass
class ImportCounts:
    """How much an import stored, and how many conversations were stored already."""

    conversations: int = 0
    messages: int = 0
    already_stored: int = 0
    user_id: str | None = None  # the user that the file names
    changed: Counter[str] = field(default_factory=Counter)  # the times that were changed, by kind


class _Lines:
    """The lines of a file as JSON objects. `next` is the one that was read and not used yet."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self.number = 0
        self.next: Json | None = None
        self.advance()

    def advance(self) -> None:
        """Read the next line; `next` is None behind the last."""
        line = self._file.readline()
        self.number += 1
        self._progress(self._file.tell())
        if not line:
            self.next = None
            return
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        value = strict_json.parse(line)
        strict_json.check(value)
        if not isinstance(value, dict):
            raise InvalidRequest("A line of an export must be a JSON object.")
        self.next = value

    def first_message(self) -> Json:
        """Return the message that is next, or an empty object where none is."""
        message = (self.next or {}).get("message")
        return message if isinstance(message, dict) else {}

    def messages(self) -> Iterator[Json]:
        """Yield the messages that follow, up to the next conversation or the end."""
        while self.next is not None and self.next.get("type") == "message":
            message = self.next.get("message")
            if not isinstance(message, dict):
                raise InvalidRequest("The field `message` of a line must be a JSON object.")
            yield message
            self.advance()


async def import_file(
    user_data: UserData,
    path: Path,
    counts: ImportCounts,
    *,
    user_id: str | None = None,
    dry_run: bool = False,
    progress: Progress = lambda _: None,
    name: str | None = None,
) -> None:
    """Import one export, of the user `user_id` alone if that is given. Errors call the file by its `name`.

    Counts into `counts`, which are right also where it fails. Raises InvalidRequest, with the line, and what
    `UserData.import_conversation` raises.
    """
    with path.open("rb") as file:
        lines: _Lines | None = None
        try:
            lines = _Lines(file, progress)
            await _import(user_data, lines, counts, user_id, dry_run=dry_run)
        except ChatHistoryError as error:
            number = lines.number if lines is not None else 1
            raise type(error)(
                f"{name or path}, line {number}: {error.detail or error.title}", error.faults
            ) from error


async def _import(
    user_data: UserData, lines: _Lines, counts: ImportCounts, user_id: str | None, *, dry_run: bool
) -> None:
    head = lines.next
    if head is None or head.get("type") != "export" or head.get("version") != FORMAT_VERSION:
        raise InvalidRequest(f"The file is not an export of version {FORMAT_VERSION}.")
    _require_owner(head, user_id)
    counts.user_id = str(head.get("user_id"))
    lines.advance()
    total = 0
    while lines.next is not None and lines.next.get("type") == "conversation":
        _require_owner(lines.next, user_id)
        conversation = {name: value for name, value in lines.next.items() if name != "type"}
        lines.advance()
        times = Times(counts.changed)
        conversation = times.of_conversation(conversation, lines.first_message(), head.get("created_at"))
        stored = await user_data.import_conversation(
            conversation, times.of_messages(lines.messages()), dry_run=dry_run
        )
        total += 1
        counts.already_stored += stored is None
        counts.conversations += stored is not None
        counts.messages += stored or 0
    end = lines.next
    if end is None or end.get("type") != "end" or end.get("conversations") != total:
        raise InvalidRequest(
            "The export was cut short: its last line is missing, or counts other conversations. Export again."
        )


def _require_owner(line: Json, user_id: str | None) -> None:
    """Raise InvalidRequest for a line of another user; `importing` checks the messages."""
    if user_id is not None and line.get("user_id") != user_id:
        raise InvalidRequest(
            f"The `user_id` of this line is not {user_id!r}, the only user that this import takes."
        )
