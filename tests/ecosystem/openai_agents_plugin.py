"""For the tests of the Agents SDK: `SQLiteSession` is our session, its file a set of conversations."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import agents

from chat_history_client import AsyncChatHistoryClient
from chat_history_client.openai_agents import ChatHistorySession

_client = AsyncChatHistoryClient(os.environ["COMPAT_URL"])


class SQLiteSession(ChatHistorySession):
    """Two sessions of one id and one file are one conversation; each in memory is one of its own."""

    def __init__(
        self, session_id: str, db_path: str | Path = ":memory:", *, session_settings: Any = None
    ) -> None:
        place = uuid4().hex if str(db_path) == ":memory:" else str(db_path)
        conversation = f"sdk_{hashlib.sha256(f'{place}/{session_id}'.encode()).hexdigest()[:40]}"
        super().__init__(session_id, _client, conversation_id=conversation, session_settings=session_settings)

    def close(self) -> None:
        """Nothing to close."""


agents.SQLiteSession = SQLiteSession  # type: ignore[misc,assignment]
