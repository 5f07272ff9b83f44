"""Ids, and the keys that stand for them in the database. Every key starts with its tenant.

A conversation of a tenant has the key `<tenant>/<id>`, its messages `<tenant>/<id>/<message id>`, its owner
`<tenant>/<user id>`. Without a tenant there is no prefix. Keys are types of their own, and for a caller's
request only a TenantScope makes them, so no query reaches another tenant's data.

An id is any text within ID_RULE, and stands in a key as it is, so that a shell shows it. Only `/` becomes
`%2F` there, and `%` becomes `%25`. So every slash of a key separates two parts, different ids have different
keys (`a/b` is `a%2Fb`, and `a%2Fb` is `a%252Fb`), and no two keys of different tenants are equal. Ids are
compared as they are: Unicode is not normalised, and the composed and the decomposed form of `é` are two ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NewType, TypeGuard

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.errors import ConversationNotFound

# The `_id` of a conversation, and the `user_id` of its owner, as they are in the database.
ConversationKey = NewType("ConversationKey", str)
OwnerKey = NewType("OwnerKey", str)
# The owner of a conversation while it is being deleted or imported. User ids are never empty, so no caller's
# query matches it, and the index on `user_id` finds it again after a crash.
OWNER_WHILE_DELETED = OwnerKey("")
# The character that comes after the slash, so the keys of a tenant end before the tenant's name with it.
_AFTER_SLASH = chr(ord("/") + 1)
ID_BYTES_MAX = 1_500
ID_RULE = f"must be text of 1 to {ID_BYTES_MAX:,} bytes in UTF-8 without control characters (and not . or ..)"
# The control characters of Unicode (its category Cc).
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def is_valid_id(value: Any) -> TypeGuard[str]:
    """Tell whether a conversation, a message, a user or a tenant may have this id.

    `.` and `..` are not ids, because clients and proxies take them for steps of a URL's path.
    """
    return (
        isinstance(value, str)
        and 0 < _utf8_bytes(value) <= ID_BYTES_MAX
        and _CONTROL.search(value) is None
        and value not in {".", ".."}
    )


def _utf8_bytes(text: str) -> int:
    """Return the length of a text in UTF-8, or 0 where it has a lone surrogate, which UTF-8 cannot hold."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def _checked(value: str) -> str:
    if not is_valid_id(value):
        raise PydanticCustomError("id", ID_RULE)
    return value


Id = Annotated[
    str,
    AfterValidator(_checked),
    WithJsonSchema(
        {
            "type": "string",
            "minLength": 1,
            "maxLength": ID_BYTES_MAX,
            "pattern": r"^(?!\.{1,2}$)[^\u0000-\u001F\u007F-\u009F]+$",
            "description": f"Text of 1 to {ID_BYTES_MAX:,} bytes in UTF-8, without control characters; `.` "
            "and `..` alone are refused. In a URL it is percent-encoded, `/` as `%2F`.",
        }
    ),
]
_ESCAPED = re.compile("%(25|2F)")


def escaped(text: str) -> str:
    """Return a text in which every slash is `%2F` and every percent sign `%25`, and the rest as it is."""
    return text.replace("%", "%25").replace("/", "%2F") if "%" in text or "/" in text else text


def unescaped(text: str) -> str:
    """Return the text that `escaped` was given."""
    if "%" not in text:
        return text
    return _ESCAPED.sub(lambda found: "%" if found[1] == "25" else "/", text)


@dataclass(frozen=True)
class ConversationRef:
    """One conversation that a call means: its key, and the owner that it must have.

    `owner` is None where the conversation may be any user's. `conditions` are further fields that it must
    match.
    """

    key: ConversationKey
    owner: OwnerKey | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def filter(self) -> dict[str, Any]:
        """Return the filter of this conversation; it matches no deleted one unless the owner says so."""
        owner = {"$ne": OWNER_WHILE_DELETED} if self.owner is None else self.owner
        return {"_id": self.key, "user_id": owner, **self.conditions}


@dataclass(frozen=True)
class TenantScope:
    """The data that a caller can reach: one tenant (or none), and of it one user, or all of its users.

    With a `user_id` only the conversations of that user exist, whatever user a call asks for.
    """

    tenant: str = ""
    user_id: str | None = None

    @property
    def prefix(self) -> str:
        """The beginning of every key of the tenant."""
        return f"{escaped(self.tenant)}/" if self.tenant else ""

    @property
    def end(self) -> str | None:
        """The first text behind all keys of the tenant, or None where every key is in reach."""
        return f"{escaped(self.tenant)}{_AFTER_SLASH}" if self.tenant else None

    def conversation(self, conversation_id: str, user_id: str | None = None) -> ConversationRef:
        """Return the conversation with this id, of this user or of any. Raises ConversationNotFound."""
        owner = self.user_id if self.user_id is not None else user_id
        key = self.conversation_key(conversation_id)
        return ConversationRef(key, None if owner is None else self.owner_key(owner))

    def conversation_key(self, conversation_id: str) -> ConversationKey:
        """Return the key of a conversation. Raises ConversationNotFound for what cannot be an id."""
        return ConversationKey(self._key(conversation_id))

    def owner_key(self, user_id: str) -> OwnerKey:
        """Return the key of the owner of what this user creates. Raises ConversationNotFound for no id."""
        return OwnerKey(self._key(user_id if self.user_id is None else self.user_id))

    def _key(self, local: str) -> str:
        if not _utf8_bytes(local):
            raise ConversationNotFound("There is no such conversation: an id is UTF-8 text and not empty.")
        return f"{self.prefix}{escaped(local)}"


def message_document_id(key: ConversationKey, message_id: str) -> str:
    """Return the `_id` of a conversation's message."""
    return f"{key}/{escaped(message_id)}"


def conversation_key_of(document_id: str) -> ConversationKey:
    """Return the key of the conversation of a message with this `_id`."""
    return ConversationKey(document_id.rpartition("/")[0])


def tenant_of(key: str) -> str:
    """Return the tenant of a conversation's or an owner's key, which is empty where there is none."""
    return unescaped(key.partition("/")[0]) if "/" in key else ""


def local_id(key: str) -> str:
    """Return the id that a key ends with: the conversation's, the user's or the message's."""
    return unescaped(key[key.rfind("/") + 1 :])


def is_key(key: str) -> bool:
    """Tell whether a TenantScope could have made this key of a conversation or an owner."""
    parts = key.split("/")
    return len(parts) <= 2 and all(map(is_key_part, parts))


def is_message_key(document_id: str, key: str) -> bool:
    """Tell whether this can be the `_id` of a message of the conversation with this key."""
    prefix, _, part = document_id.rpartition("/")
    return prefix == key and is_key_part(part)


def is_key_part(part: str) -> bool:
    """Tell whether this is an id as it stands in a key."""
    return is_valid_id(unescaped(part)) and escaped(unescaped(part)) == part
