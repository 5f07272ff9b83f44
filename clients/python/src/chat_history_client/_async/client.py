"""The API as Python calls. The modules of `_sync` are generated from those of `_async`, by `make client`.

Calls are repeated, by tenacity, until there is an answer or `retry_s` is over: after a lost connection, and
after a 503 or 429, whose `Retry-After` is kept to. An append carries an idempotency key that is made once for
all its repetitions, so it is stored once. A failure that no repetition can mend (a certificate that is not
trusted, a header that HTTP cannot carry) is raised at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from chat_history_client import _requests as requests
from chat_history_client._async.context import Contexts
from chat_history_client._async.reading import Reading
from chat_history_client._async.writing import Writing
from chat_history_client._requests import UNSET, Expected
from chat_history_client._stream import ExportStream
from chat_history_client.types import Conversation, ConversationPage, EraseReceipt, Json, Time


class AsyncChatHistoryClient(Reading, Writing, Contexts):
    """A client of the service; one may be used from several threads and processes, and from event loops.

    `base_url` is the service's, or else the environment's `CHAT_HISTORY_URL`, or else http://127.0.0.1:8000.
    `api_key` is an API key or a token, or else `CHAT_HISTORY_API_KEY`; "" sends none. `timeout_s` is that of
    one attempt, `retry_s` is how long a call is repeated, and `headers` go with every request. `transport` is
    httpx's, or a function that makes one, which is needed where there are several event loops or processes.

    Calls raise ApiError and its kinds, or httpx.TransportError when no attempt had an answer. A `base_url` or
    a header that cannot work is a ValueError at once. A value that is not JSON (a set, bytes, a time, a key
    that is not a string) is a TypeError that names its place. Where `user_id` may be given, the conversation
    must be that user's.

    In the asynchronous client a write that is cancelled is finished first, within `retry_s + timeout_s`: its
    outcome is settled when the CancelledError comes. So it is not lost, nor does it show up later. Reads are
    cancelled at once.
    """

    # -- conversations -----------------------------------------------------------------------------

    async def get_or_create_conversation(
        self,
        user_id: str,
        conversation_id: str | None = None,
        *,
        title: str | None = None,
        metadata: Json | None = None,
        expires_at: Time | None = None,
    ) -> Conversation:
        """Return the user's conversation with this id, or create it; without an id, create one.

        `title`, `metadata` and `expires_at` are those of a new conversation, which the service removes, with
        its messages, from `expires_at` on.
        """
        call = requests.create(
            user_id, conversation_id, title=title, metadata=metadata, expires_at=expires_at
        )
        conversation: Conversation = await self._do(call)
        return conversation

    async def get_conversation(self, conversation_id: str, *, user_id: str | None = None) -> Conversation:
        """Read a conversation."""
        conversation: Conversation = await self._do(requests.read_conversation(conversation_id, user_id))
        return conversation

    async def update_conversation(
        self,
        conversation_id: str,
        *,
        title: str | None = UNSET,
        metadata: Json | None = UNSET,
        expires_at: Time | None = UNSET,
        user_id: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
    ) -> Conversation:
        """Change the title, the metadata as a whole, or the expiry; None clears, the rest stays.

        The conditions are those of `delete_messages`.
        """
        changes = {"title": title, "metadata": metadata, "expires_at": expires_at}
        expected = Expected(expected_last_seq, expected_version)
        call = requests.update(conversation_id, user_id, changes, expected)
        conversation: Conversation = await self._do(call)
        return conversation

    async def delete_conversation(
        self,
        conversation_id: str,
        *,
        user_id: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
    ) -> None:
        """Delete a conversation with all its messages. The conditions are those of `delete_messages`."""
        expected = Expected(expected_last_seq, expected_version)
        await self._do(requests.delete_conversation(conversation_id, user_id, expected))

    async def list_conversations(
        self, user_id: str | None, *, limit: int | None = None, cursor: str | None = None
    ) -> ConversationPage:
        """Return a page of a user's conversations, latest activity first; `next` is the next `cursor`.

        With None it is a page of all users' conversations, for which the key must have the scope `admin`.
        """
        return requests.page_of(await self._do(requests.list_conversations(user_id, limit, cursor)))

    async def stream_conversations(self, user_id: str | None) -> AsyncGenerator[Conversation, None]:
        """Yield all conversations of a user, or of all users, latest activity first, page by page."""
        page = await self.list_conversations(user_id)
        while True:
            for conversation in page.data:
                yield conversation
            if not page.has_more:
                return
            page = await self.list_conversations(user_id, cursor=page.next)

    # -- users -------------------------------------------------------------------------------------

    async def erase_user(self, user_id: str, *, dry_run: bool = False, wait_s: float = 3600) -> EraseReceipt:
        """Erase a user, with all conversations and messages, or count what that would remove.

        The service goes on with a large erasure by itself, and this asks for its receipt until it has ended,
        for `wait_s` seconds, and then raises TimeoutError; the erasure goes on nevertheless. An erasure that
        was interrupted goes on when it is repeated, as this does after a lost connection. If the answer to a
        finished erasure was lost, the receipt of the repetition counts nothing.
        """
        return await self._erase(user_id, dry_run, wait_s)

    def export_user(self, user_id: str) -> AsyncGenerator[Json, None]:
        """Yield everything of a user, line by line, as `chat-history import` takes it back.

        An export that breaks off after its first line raises httpx.TransportError: begin a new one.
        """
        return self._stream(ExportStream(user_id))
