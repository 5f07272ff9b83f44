"""Clients of the Chat History Database, to run beside an agent: over HTTP, with retries that store once.

`chat_history_client.openai_agents`, `.langchain` and `.pydantic_ai` are what these frameworks ask for, each
with an extra of its name.
"""

from chat_history_client._async.client import AsyncChatHistoryClient
from chat_history_client._sync.client import ChatHistoryClient
from chat_history_client.errors import ApiError, Conflict, NotFound, Stale, Unavailable
from chat_history_client.types import (
    Checkpoint,
    Context,
    Conversation,
    ConversationPage,
    EraseReceipt,
    HistoryEvent,
    HistoryFilters,
    Item,
    ListEvent,
    Message,
    MessageItems,
    MessagePage,
    Page,
)

__all__ = [
    "ApiError",
    "AsyncChatHistoryClient",
    "ChatHistoryClient",
    "Checkpoint",
    "Conflict",
    "Context",
    "Conversation",
    "ConversationPage",
    "EraseReceipt",
    "HistoryEvent",
    "HistoryFilters",
    "Item",
    "ListEvent",
    "Message",
    "MessageItems",
    "MessagePage",
    "NotFound",
    "Page",
    "Stale",
    "Unavailable",
]
