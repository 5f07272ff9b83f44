"""Whose data a caller can reach, and how that is part of every key in the database.

A conversation of a tenant has the key `<tenant>/<id>`, its messages `<tenant>/<id>/<message id>`, its owner
`<tenant>/<user id>`; without a tenant there is no prefix, so that a shell shows plain ids. No id has a slash,
so no two of different tenants are ever equal, and no query that names a conversation or an owner can find
another tenant's: keys are types of their own, and only a Scope makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from service.errors import ConversationNotFound, MessageNotFound

Key = NewType("Key", str)
Owner = NewType("Owner", str)


@dataclass(frozen=True)
class Scope:
    """One tenant (or none), and of it one user, or all of them.

    With a `user_id` only that user's conversations exist, whatever user a call asks for.
    """

    tenant: str = ""
    user_id: str | None = None

    @property
    def prefix(self) -> str:
        """What every key of the tenant begins with."""
        return f"{self.tenant}/" if self.tenant else ""

    def key(self, conversation_id: str) -> Key:
        """Return the key of a conversation. What is no id is the id of none (ConversationNotFound)."""
        if "/" in conversation_id:
            raise ConversationNotFound("No id has a slash.")
        return Key(f"{self.prefix}{conversation_id}")

    def owner(self, user_id: str | None) -> Owner | None:
        """Return the owner that a conversation must have, or None for any of the tenant's."""
        user_id = user_id if self.user_id is None else self.user_id
        return None if user_id is None else self.owner_of(user_id)

    def owner_of(self, user_id: str) -> Owner:
        """Return the owner of what this user makes."""
        user_id = user_id if self.user_id is None else self.user_id
        if "/" in user_id:
            raise ConversationNotFound("No id has a slash.")
        return Owner(f"{self.prefix}{user_id}")


def message_key(key: Key, message_id: str) -> str:
    """Return the key of a conversation's message. Raises MessageNotFound for what is no id."""
    if "/" in message_id:
        raise MessageNotFound("No id has a slash.")
    return f"{key}/{message_id}"


def own_id(key: str) -> str:
    """Return the id that a key is of: what stands behind the last slash."""
    return key.rpartition("/")[2]
