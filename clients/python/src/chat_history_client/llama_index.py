"""LlamaIndex's chat store, kept by the service (the extra `llama-index`).

A message is stored as a native document: its role, its text or its blocks as LlamaIndex writes them, and the
id of the call that it answers. What else it writes of a message stands in `llama_index`. It is restored
equal. A message with a value that the service cannot store (NaN, half an emoji) is kept whole in
`llama_index_exact`, as `_exact` says.

A message that was written in another form is read by `_message_turns`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import groupby
from typing import Any
from uuid import uuid4

from llama_index.core.base.llms.types import (
    AudioBlock,
    ChatMessage,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    VideoBlock,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.storage.chat_store.base import BaseChatStore

from chat_history_client import ApiError, ChatHistoryClient, NotFound
from chat_history_client._adapters import read
from chat_history_client._appending import BATCH_ITEMS
from chat_history_client._exact import kept, opened
from chat_history_client._message_parts import (
    Call,
    Media,
    Other,
    Part,
    Reasoning,
    Result,
    Text,
    as_text,
    plain_text,
)
from chat_history_client._message_turns import Turn, turns_of
from chat_history_client.types import Json

FIELD = "llama_index"
EXACT_FIELD = "llama_index_exact"
_ROLES = {"function": "tool", "chatbot": "assistant"}
_FILE_BLOCKS = {
    "image": (ImageBlock, "image", "image_mimetype"),
    "audio": (AudioBlock, "audio", None),
    "video": (VideoBlock, "video", "video_mimetype"),
    "file": (DocumentBlock, "data", "document_mimetype"),
}


class ChatHistoryChatStore(BaseChatStore):
    """A chat store whose keys are conversations of `user_id`, for `ChatMemoryBuffer` and others.

    A key that is another user's conversation raises Conflict when it is read. `set_messages` keeps what the
    history begins with already, and changes the rest in one step; a list that is too large for one request is
    appended after a deletion. The asynchronous methods are LlamaIndex's own, which call the synchronous ones
    in a thread.
    """

    _client: ChatHistoryClient = PrivateAttr()
    _user_id: str = PrivateAttr()

    def __init__(self, client: ChatHistoryClient, *, user_id: str = "default") -> None:
        super().__init__()
        self._client = client
        self._user_id = user_id

    @classmethod
    def class_name(cls) -> str:
        """Return the name by which LlamaIndex knows this class."""
        return "ChatHistoryChatStore"

    def get_messages(self, key: str) -> list[ChatMessage]:
        """Return the whole history, oldest first."""
        return [message for _, messages in self._read(key) for message in messages]

    def set_messages(self, key: str, messages: list[ChatMessage]) -> None:
        """Make the history exactly these messages, and keep the stored ones that it begins with."""
        same, after = 0, 0
        for stored, found in self._read(key):
            if messages[same : same + len(found)] != found:
                self._replace(key, after, messages[same:])
                return
            same, after = same + len(found), stored[-1]["seq"]
        self._append(key, messages[same:])

    def add_message(self, key: str, message: ChatMessage) -> None:
        """Append a message."""
        self._append(key, [message])

    def delete_messages(self, key: str) -> list[ChatMessage] | None:
        """Delete all messages and return them, or None if there are none; the conversation stays."""
        messages = self.get_messages(key)
        self._client.delete_messages(key, user_id=self._user_id)
        return messages or None

    def delete_message(self, key: str, idx: int) -> ChatMessage | None:
        """Delete the message at a place and return it, or None if there is none."""
        rows = [(stored, found, each) for stored, found in self._read(key) for each in found]
        if not -len(rows) <= idx < len(rows):
            return None
        stored, found, message = rows[idx]
        if len(found) > 1:
            raise ValueError("This message is stored together with others. Delete them with `set_messages`.")
        for each in stored:
            self._client.delete_message(key, each["id"], user_id=self._user_id)
        return message

    def delete_last_message(self, key: str) -> ChatMessage | None:
        """Take the newest message, or None if there is none; no two callers get the same one."""
        try:
            taken = self._client.pop_message(key, user_id=self._user_id)
        except NotFound:
            return None
        return None if taken is None else restored([taken])[-1]

    def get_keys(self) -> list[str]:
        """Return the ids of all conversations of the user, latest activity first."""
        return [each["id"] for each in self._client.stream_conversations(self._user_id)]

    def _replace(self, key: str, after: int, messages: Sequence[ChatMessage]) -> None:
        """Put messages in the place of those behind a seq, in one step if a request holds them."""
        if len(messages) <= BATCH_ITEMS:
            new = [{"id": uuid4().hex, **stored_as(each)} for each in messages]
            try:
                self._client.put_messages(key, new, after=after, user_id=self._user_id)
            except ApiError as error:
                if error.status != 413:
                    raise
            else:
                return
        self._client.delete_messages(key, after=after, user_id=self._user_id)
        self._append(key, messages)

    def _append(self, key: str, messages: Sequence[ChatMessage]) -> None:
        self._client.add_all_messages(key, list(map(stored_as, messages)), user_id=self._user_id)

    def _read(self, key: str) -> list[tuple[list[Json], list[ChatMessage]]]:
        return _grouped(read(self._client, key, self._user_id))


def stored_as(message: ChatMessage) -> Json:
    """Return the native message that a message is stored as."""
    own: Json = _plain(message.model_dump())
    blocks, role = own.pop("blocks"), own["role"]
    native: Json = {"role": _ROLES.get(role, role), "content": blocks}
    if len(blocks) == 1 and blocks[0].keys() == {"block_type", "text"}:
        native["content"] = blocks[0]["text"]
    for name, kind in (("tool_call_id", str), ("tool_calls", list)):
        if isinstance(own["additional_kwargs"].get(name), kind):
            native[name] = own["additional_kwargs"].pop(name)
    return kept({**native, FIELD: own}, EXACT_FIELD)


def _plain(value: Any) -> Any:
    """Return a dumped value as JSON; LlamaIndex holds the content of files as base64 in bytes."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)  # a URL or a path


def restored(messages: Sequence[Json]) -> list[ChatMessage]:
    """Return stored messages as LlamaIndex's, also those that were written in another form."""
    return [message for _, found in _grouped(messages) for message in found]


def _grouped(messages: Sequence[Json]) -> list[tuple[list[Json], list[ChatMessage]]]:
    """Return what each stored message reads as; the items of one answer are several, and read as one."""
    groups = []
    for _, group in groupby(turns_of(messages), lambda turn: turn.message["id"]):
        turns = list(group)
        own = opened(turns[0].message, EXACT_FIELD)
        is_own = isinstance(own.get(FIELD), dict)
        found = [_restored(own)] if is_own else [message for turn in turns for message in _foreign(turn)]
        groups.append(([turns[0].message, *turns[-1].more_messages], found))
    return groups


def _restored(message: Json) -> ChatMessage:
    content, own = message.get("content"), message[FIELD]
    blocks = [{"block_type": "text", "text": content}] if isinstance(content, str) else content
    moved = {name: message[name] for name in ("tool_call_id", "tool_calls") if name in message}
    more = {**own.get("additional_kwargs", {}), **moved}
    return ChatMessage.model_validate({**own, "blocks": blocks, "additional_kwargs": more})


def _foreign(turn: Turn) -> Iterator[ChatMessage]:
    """Yield what one speaker says: one message, or one for each result of a tool."""
    results = [part for part in turn.parts if isinstance(part, Result)]
    for result in results:
        pair = {"tool_call_id": result.call_id} | ({"name": result.name} if result.name else {})
        blocks = [block for part in result.content for block in _blocks(part)]
        yield ChatMessage(role=MessageRole.TOOL, blocks=blocks, additional_kwargs=pair)
    if not results:
        blocks = [block for part in turn.parts for block in _blocks(part)]
        yield ChatMessage(role=MessageRole(turn.role), blocks=blocks)


def _blocks(part: Part) -> Iterator[Any]:
    match part:
        case Text(text):
            yield TextBlock(text=text)
        case Reasoning(text) if text:
            yield ThinkingBlock(content=text)
        case Media(kind, url, data, media_type) if url or data:
            block, content, mime_type = _FILE_BLOCKS[kind]
            place = {"url": url} if url else {content: data.encode()}
            form = {mime_type: media_type} if mime_type else {"format": media_type.partition("/")[2]}
            yield block(**place, **(form if media_type else {}))
        case Call(call_id, name, arguments):
            given = arguments if isinstance(arguments, str | dict) else as_text(arguments)
            yield ToolCallBlock(tool_call_id=call_id, tool_name=name, tool_kwargs=given)
        case Media() | Other():
            yield TextBlock(text=plain_text([part]))
