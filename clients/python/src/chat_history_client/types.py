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
ContextFormat: TypeAlias = Literal["native", "openai", "responses", "anthropic"]
Repair: TypeAlias = Literal["placeholder", "none"]


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


class Checkpoint(TypedDict):
    """A summary of the history up to a seq."""

    id: str
    conversation_id: str
    user_id: str
    upto_seq: int
    created_at: str
    summary: str
    metadata: Json | None


class LeftOut(TypedDict):
    """How much of a conversation is not in its context; `tokens` is None where they are not known."""

    messages: int
    tokens: int | None


class ContextCall(TypedDict):
    """A call of a tool without a result."""

    tool_call_id: str
    name: str
    message_id: str


class Context(TypedDict):
    """What a model is to be sent, and what the service says of it; see docs/context.md.

    `system` is there only in the form `anthropic`.
    """

    system: NotRequired[list[Json]]
    messages: list[Json]
    from_seq: int | None
    to_seq: int | None
    last_seq: int
    version: int
    tokens: int
    tokens_estimated: bool
    over_budget: bool
    left_out: LeftOut
    checkpoint: Checkpoint | None
    open_tool_calls: list[ContextCall]
    synthetic: list[ContextCall]


class MessageEvent(TypedDict):
    """`message`: a new one. `updated`: one as it stands now, in the place of the one with its `seq`.

    `id` is the seq after which a later `tail` goes on.
    """

    event: Literal["message", "updated"]
    data: Message
    id: NotRequired[int]


class DeletedMessages(TypedDict):
    """The seqs where no message stands any more: `after` < seq <= `upto`."""

    after: int
    upto: int


class DeletedEvent(TypedDict):
    """Messages were deleted; some of them may have been gone before."""

    event: Literal["deleted"]
    data: DeletedMessages


class LastSeq(TypedDict):
    """The newest seq of a conversation."""

    last_seq: int


class HeadEvent(TypedDict):
    """All that was there has been told; what follows is new. It comes once."""

    event: Literal["head"]
    data: LastSeq
    id: NotRequired[int]


class GoneEvent(TypedDict):
    """The conversation was deleted. It is the last event."""

    event: Literal["gone"]
    data: Json


# What `tail` yields; `event` tells which one it is.
HistoryEvent: TypeAlias = MessageEvent | DeletedEvent | HeadEvent | GoneEvent


class ConversationEvent(TypedDict):
    """A conversation was created or changed, and is now as `data` says."""

    event: Literal["created", "changed"]
    data: Conversation


class ConversationId(TypedDict):
    """The id of a conversation."""

    id: str


class ConversationDeletedEvent(TypedDict):
    """A conversation was deleted."""

    event: Literal["deleted"]
    data: ConversationId


class ListHeadEvent(TypedDict):
    """The list is to be read now, because not every earlier change has been told."""

    event: Literal["head"]
    data: Json


# What `tail_conversations` yields.
ListEvent: TypeAlias = ConversationEvent | ConversationDeletedEvent | ListHeadEvent


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
