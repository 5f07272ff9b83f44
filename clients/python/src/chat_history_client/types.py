"""The arguments and the results of the calls, as types.

Conversations and messages are plain dicts, as the API has them, so they can be stored and compared as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, NotRequired, TypeAlias, TypedDict, TypeVar

Json: TypeAlias = dict[str, Any]
# A message has `role`, and when it is stored `id`, `conversation_id`, `user_id`, `seq` and `created_at`. Its
# other fields are the caller's own and can be any JSON, for which a TypedDict has no words.
Message: TypeAlias = dict[str, Any]
# An item of OpenAI's Responses API or of its Agents SDK, of any type.
Item: TypeAlias = dict[str, Any]
# An aware datetime, or a text in RFC 3339, such as a message's `created_at`.
Time: TypeAlias = datetime | str
Role: TypeAlias = Literal["user", "assistant", "tool", "system", "developer", "model"]
Order: TypeAlias = Literal["asc", "desc"]


class Conversation(TypedDict):
    """A conversation. Times are texts in RFC 3339; `expires_at` is there only where it is set."""

    id: str
    user_id: str
    title: str | None
    metadata: Json
    created_at: str
    updated_at: str
    active_at: str
    last_seq: int
    message_count: int
    version: int
    expires_at: NotRequired[str]


class MessageItems(TypedDict):
    """A stored message as items: what the service says of it, then the items."""

    id: str
    conversation_id: str
    user_id: str
    seq: int
    created_at: str
    items: list[Item]


class EraseReceipt(TypedDict):
    """How much an erasure removed or, with `dry_run`, would remove."""

    user_id: str
    conversations: int
    messages: int
    dry_run: bool


class HistoryFilters(TypedDict, total=False):
    """The messages to read: `after` and `before` are seqs, both excluded; the times are both included.

    With `user_id` the conversation must be that user's.
    """

    user_id: str | None
    after: int | None
    before: int | None
    since: Time | None
    until: Time | None
    role: Role | None


D = TypeVar("D")
N = TypeVar("N")


@dataclass(frozen=True)
class Page(Generic[D, N]):
    """A page: what was found, and, while `has_more`, the position to go on from."""

    data: list[D]
    has_more: bool
    next: N | None


# `next` is the `cursor` of the next page.
ConversationPage: TypeAlias = Page[Conversation, str]
# `next` is the seq to go on from: `after` of the next page, or `before` where the newest come first.
MessagePage: TypeAlias = Page[Message, int]
