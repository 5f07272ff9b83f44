"""Clients of the service, to run beside an agent: over HTTP, with retries that store once.

`pip install 'chat-history-database[client]'` has the two here; `service.clients.agents`, `.langchain` and
`.pydantic_ai` are what frameworks ask for, each with an extra of its name.
"""

from service.clients.http import (
    ApiError,
    ChatHistoryClient,
    Conflict,
    NotFound,
    Page,
    SyncChatHistoryClient,
    Unavailable,
)

__all__ = [
    "ApiError",
    "ChatHistoryClient",
    "Conflict",
    "NotFound",
    "Page",
    "SyncChatHistoryClient",
    "Unavailable",
]
