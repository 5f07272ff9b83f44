"""The fields of a conversation as they are stored: metadata, expiry, and the limits of their size."""

from __future__ import annotations

import secrets
from datetime import datetime

import bson

from service import clock
from service.documents import Conversation
from service.errors import InvalidRequest
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import retention
from service.history.store import ConversationStore
from service.settings import MESSAGE_BYTES_MAX, METADATA_BYTES_MAX
from service.tenancy import ConversationKey

# The bytes of BSON around the metadata in `{"metadata": …}`.
_AROUND_METADATA_BYTES = len(bson.encode({"metadata": {}})) - len(bson.encode({}))


def first_rewrites() -> int:
    """Return the `rewrites` of a new conversation, another one each time.

    A conversation that is deleted and made again under the same id is then not taken for the one before.
    """
    return secrets.randbelow(2**31)


def expiry_fields(
    store: ConversationStore, key: ConversationKey, expires_at: datetime | None, active: datetime
) -> Json:
    """Return an expiry, and with it the time at which the sweep looks at the conversation."""
    expires_at = clock.to_milliseconds(expires_at) if expires_at else None
    due_at = retention.due_at(store.settings, key, expires_at=expires_at, active=active)
    return {"expires_at": expires_at, "due_at": due_at}


def metadata_fields(store: ConversationStore, metadata: Json | None) -> tuple[Json, InvalidRequest | None]:
    """Check metadata, and return it with its exact copy where the engine would change its order.

    The second result is the error to raise for metadata that is new, and larger than new metadata may be.
    """
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise InvalidRequest.at(("metadata",), "must be an object")
    raw = bson_codec.encode({"metadata": metadata}, keep_exact_copy=False)
    # Only the embedded engine reads its storage through PyMongo, which would reorder the keys of a DBRef.
    changed = store.database.embedded_engine and bson_codec.changes_when_decoded_as_dbref(raw)
    size, too_large = len(raw) - _AROUND_METADATA_BYTES, None
    if size > METADATA_BYTES_MAX:
        why = (
            f"has {size} bytes as BSON, and metadata may have {METADATA_BYTES_MAX}. Store content in messages"
        )
        too_large = InvalidRequest.at(("metadata",), why)
    return {"metadata": metadata, "exact_metadata": raw if changed else None}, too_large


def refuse_oversize(conversation: Conversation, given: str) -> None:
    """Refuse a conversation whose title and metadata together leave no room for the service's own fields.

    Each may be within its own limit. `given` is the field that a caller can make smaller.
    """
    held = {name: getattr(conversation, name) for name in ("title", "metadata", "exact_metadata")}
    if len(bson.encode(held)) > MESSAGE_BYTES_MAX:
        raise oversize(given)


def oversize(given: str) -> InvalidRequest:
    """Return the error for a title and metadata that are too large together."""
    why = f"makes title and metadata together larger than {MESSAGE_BYTES_MAX} bytes as BSON"
    return InvalidRequest.at((given,), why)
