"""Tells whose stored messages and checkpoints are, from their bytes. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import bson

from service.formats import bson_codec
from service.tenancy import ConversationKey

# The BSON type of a string, and the beginning of an element `_id` that is one.
_BSON_STRING = 2
_ID_ELEMENT = b"\x02_id\0"


def owned_by(owner: str, raw: bytes) -> bool:
    """Tell whether a stored message says that it is this user's, without decoding the rest of it.

    Only the service's own field counts: a caller may have written a field of the same name, or the same
    bytes, into a message.
    """
    at = 4
    while raw[at] == _BSON_STRING:  # as are all fields that the service writes before this one
        end = raw.index(0, at)
        size = int.from_bytes(raw[end + 1 : end + 5], "little")
        if raw[at + 1 : end] == b"user_id":
            return raw[end + 5 : end + 4 + size] == owner.encode()
        at = end + 5 + size
    # Somebody made it by hand, in another order.
    return bson_codec.decode_anything(raw).get("user_id") == owner


def all_owned_by(owner: str, key: ConversationKey, documents: Sequence[bytes]) -> list[bytes]:
    """Return those of a conversation's stored messages that say that they are this user's.

    The service writes `_id`, `conversation_id` and `user_id` first. So all messages of one conversation have
    the same bytes behind the `_id`, and to compare these costs less than to look for the field in each.
    """
    expected = bson.encode({"conversation_id": key, "user_id": owner})[4:-1]
    size = 4 + len(_ID_ELEMENT)  # where the length of the `_id` stands, in four bytes
    text = size + 4
    return [
        raw
        for raw in documents
        if (
            raw.startswith(_ID_ELEMENT, 4)
            and raw.startswith(expected, text + int.from_bytes(raw[size:text], "little"))
        )
        or owned_by(owner, raw)
    ]
