"""Repairs what `verify` finds and needs no guess: each in a transaction of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from beanie import Document

from service.database import Database, Transaction
from service.documents import Conversation, Message
from service.formats.strict_json import Json
from service.maintenance.findings import is_behind, is_of_another, place_of, wrong_fields
from service.maintenance.walk import Walk
from service.tenancy import conversation_key_of

# It tells readers that the messages of a conversation are not those that they know.
_REWRITTEN = {"$inc": {"version": 1, "rewrites": 1}}
# How many messages one transaction removes, because one call has one deadline for it.
_REMOVED_AT_ONCE = 100


class Repairs:
    """Notes violations, and corrects them where it is active."""

    def __init__(
        self, database: Database, walk: Walk, note: Callable[[str, str, str], None], *, active: bool
    ) -> None:
        self._database = database
        self._walk = walk
        self._note = note
        self._active = active

    async def correct(self, kind: type[Document], key: str, change: dict[str, Any], violation: str) -> None:
        """Note a violation, and with `repair` correct the one document that it is in.

        Counters are corrected by a difference, so that a write that commits meanwhile is not undone. The
        owner of a message is that of its conversation by definition, so to correct it is no guess.
        """
        conversation_id = conversation_key_of(key) if kind is Message else key

        async def change_it(transaction: Transaction) -> None:
            named = {"_id": key}
            if kind is Message:
                # Named, so that a sharded cluster asks only the shard that has the conversation.
                named["conversation_id"] = conversation_id
                # Both commit together, so nobody takes what was read before for what is stored now.
                conversation = Conversation.find_one({"_id": conversation_id})
                await conversation.update_one(_REWRITTEN, session=transaction.session)
            await kind.find_one(named).update_one(change, session=transaction.session)

        if self._active:
            async with self._database.deadline():
                await self._database.transaction(change_it)
        self._note(conversation_id, violation, "repaired" if self._active else "")

    async def check_owners(self, conversation: Conversation) -> None:
        """Note the messages that say that they are another user's, and with `repair` give or remove them.

        Those behind the last message were left by an interrupted import, before another user took the
        conversation's id. They were never shown or counted in this conversation, and its owner must not get
        them. They are read again here, so that any number of them is no matter of memory.
        """
        leftovers = 0
        async for page in self._walk.of_conversation(conversation.id, conversation.last_seq):
            behind = []
            for message in page:
                if place_of(message) != conversation.id or not is_of_another(message, conversation):
                    continue
                if is_behind(message, conversation):
                    behind.append(message)
                elif not wrong_fields(message):
                    what = f"the message {message['_id']} says that it is another user's"
                    await self.correct(
                        Message, message["_id"], {"$set": {"user_id": conversation.user_id}}, what
                    )
            leftovers += len(behind)
            await self._remove(conversation.id, behind)
        if leftovers:
            what = f"{leftovers} messages of another user stand behind its last one"
            self._note(conversation.id, what, "repaired: removed" if self._active else "")

    async def _remove(self, key: str, messages: list[Json]) -> None:
        """Remove messages, with `repair`, in parts, because one call has one deadline."""

        async def remove(some: list[Json], transaction: Transaction) -> None:
            for message in some:
                named = {"_id": message["_id"], "conversation_id": key, "user_id": message.get("user_id")}
                await Message.find(named).delete(session=transaction.session)
            await Conversation.find_one({"_id": key}).update_one(_REWRITTEN, session=transaction.session)

        for begin in range(0, len(messages) if self._active else 0, _REMOVED_AT_ONCE):
            some = messages[begin : begin + _REMOVED_AT_ONCE]
            # If the process dies between two parts, the next walk finds the rest.
            async with self._database.deadline():
                await self._database.transaction(functools.partial(remove, some))
