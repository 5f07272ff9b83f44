"""The types with which the service writes the fields of a conversation, by which a reader needs no model."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from bson.int64 import Int64

from service.formats.strict_json import Json

_INTEGERS: set[type[Any]] = {int, Int64}
_TEXT: set[type[Any]] = {str}
_TIME: set[type[Any]] = {datetime}
_NONE: set[type[Any]] = {type(None)}
_REQUIRED = ("_id", "user_id", "created_at", "updated_at")
TYPES: dict[str, set[type[Any]]] = {
    "_id": _TEXT,
    "user_id": _TEXT,
    "title": _TEXT | _NONE,
    "metadata": {dict},
    "exact_metadata": {bytes} | _NONE,
    "created_at": _TIME,
    "updated_at": _TIME,
    "active_at": _TIME | _NONE,
    "last_seq": _INTEGERS,
    "message_count": _INTEGERS,
    "version": _INTEGERS,
    "rewrites": _INTEGERS,
    "edits": _INTEGERS,
    "rewritten": {list},
    "tokens_total": _INTEGERS,
    "turns_total": _INTEGERS,
    "checkpoint_seq": _INTEGERS,
    "expires_at": _TIME | _NONE,
    "due_at": _TIME | _NONE,
    "deleted_owner": _TEXT | _NONE,
    "importing": _TEXT | _NONE,
}


def is_as_written(conversation: Json) -> bool:
    """Tell whether each field of a decoded conversation has the very type with which the service writes it.

    The model takes every such value as it is, so it need not be asked, which costs far more. It corrects or
    refuses what somebody wrote by hand.
    """
    return (
        all(name in conversation for name in _REQUIRED)
        and all(name in TYPES and type(value) in TYPES[name] for name, value in conversation.items())
        and all(
            type(part) is list and _INTEGERS.issuperset(map(type, part))
            for part in conversation.get("rewritten", ())
        )
    )
