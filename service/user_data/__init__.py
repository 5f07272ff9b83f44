"""All data of a user: erasing, exporting and importing it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from service.chat_service import ChatService
from service.formats.strict_json import Json
from service.history.store import ConversationStore
from service.tenancy import TenantScope
from service.user_data import erasure, exporting, importing
from service.user_data.erasure import ErasureState, RemovedCounts


class UserData:
    """The verbs on a user's data as a whole, limited to a tenant, or to one user of it."""

    def __init__(self, store: ConversationStore, scope: TenantScope) -> None:
        self._store = store
        self._scope = scope

    async def count(self, user_id: str) -> RemovedCounts:
        """Return what `erase` would remove."""
        return await exporting.count(ChatService(self._store, self._scope), user_id)

    async def erase(self, user_id: str) -> ErasureState:
        """Remove everything of a user, and return how much that was, an interrupted erasure included.

        Each conversation is gone at once and whole. Conversations created meanwhile are removed, too. What
        takes longer than one call may goes on without it; `erasure` then says how far it is.
        """
        wait_s = self._store.settings.database_timeout_ms / 1000
        return await erasure.erase(self._store, self._scope.owner_key(user_id), wait_s)

    async def erasure(self, user_id: str, erasure_id: str) -> ErasureState:
        """Return how far an erasure is, for some days after its end too. Raises ErasureNotFound."""
        return await erasure.find(self._store, self._scope.owner_key(user_id), erasure_id)

    def export(self, user_id: str) -> AsyncIterator[list[Json]]:
        """Yield everything of a user, in parts: a head, each conversation and its messages, an end.

        It has every conversation that the user had when it began, each as it is when its turn comes.
        """
        return exporting.export(ChatService(self._store, self._scope), user_id)

    async def import_conversation(
        self, conversation: Json, messages: Iterable[Json], *, dry_run: bool
    ) -> int | None:
        """Store a conversation as an export has it, ids and times included; return how many messages.

        None says that all of it was stored already. Raises InvalidRequest for lines that are no export, and
        ConversationIdTaken where a conversation with other content has its id.
        """
        return await importing.import_conversation(
            self._store, self._scope, conversation, messages, dry_run=dry_run
        )
