"""The collections: their fields, and each index with the query that it serves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal

from beanie import Document
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
)
from pymongo import ASCENDING, DESCENDING, IndexModel

from service.formats.openai_items import Role


def in_utc(time: datetime) -> datetime:
    """Return an aware time in UTC. Raises ValueError where it has no year from 1 to 9999 there."""
    try:
        return time.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("must lie in the years 1 to 9999, in UTC") from error


# A time in any zone that is one in UTC, too, since neither Python nor BSON's readers have any other.
Time = Annotated[AwareDatetime, AfterValidator(in_utc)]
Seq = Annotated[int, Field(ge=0, le=2**63 - 1)]
Title = Annotated[str, StringConstraints(max_length=1_000)]

# An import without activity for so long was interrupted.
IDLE = timedelta(minutes=10)
# The same of an erasure, which says every few seconds that it goes on.
ERASURE_IDLE = timedelta(minutes=1)
# For so long the receipt of an erasure can be asked for.
RECEIPT_KEPT = timedelta(days=7)


class Conversation(Document):
    """One conversation. `last_seq` and `message_count` change only with the messages they count."""

    id: str  # type: ignore[assignment]  # Beanie's own id is an ObjectId; ours is the caller's
    user_id: str
    title: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    # `metadata` as BSON, where the embedded engine would reorder its keys (see `bson_codec`).
    exact_metadata: bytes | None = None
    created_at: datetime
    # The time of the latest change of any kind.
    updated_at: datetime
    # The time of the latest message, or of the creation. It orders the list and begins the retention, and a
    # new title or a deletion does not move it. Earlier versions had none (see `maintenance/due_times.py`).
    active_at: datetime | None = None
    last_seq: int = 0
    message_count: int = 0
    # How often the history changed; and a number that goes up with each change that is no append, from a
    # random beginning. While `rewrites` stays the same, so do the messages that a reader knows.
    version: int = 0
    rewrites: int = 0
    # How often anything changed that is not the history: the title, the metadata, the expiry. Its `ETag` has
    # it beside the version.
    edits: int = 0
    # In which parts of the history messages were deleted or replaced (`history/rewrites.py`).
    rewritten: list[list[int]] = Field(default_factory=list)
    # The tokens and the turns of all messages that were ever appended, by which `context` cuts a history.
    # They do not fall when messages are deleted, so the totals of later messages stay above those before.
    tokens_total: int = 0
    turns_total: int = 0
    # The `upto_seq` of the newest checkpoint, or 0, so that a call without checkpoints asks for none.
    checkpoint_seq: int = 0
    # The time from which it is removed, or None for never.
    expires_at: datetime | None = None
    # The time at which the sweep looks at it, or None for never: not after the time from which it is removed
    # (`history/retention.py`).
    due_at: datetime | None = None
    # Its owner before its deletion began, for those who follow that user's list (`history/live.py`).
    deleted_owner: str | None = None
    # The owner that it gets with the last batch, while an import is storing its messages. Until then its
    # `user_id` is OWNER_WHILE_DELETED, and `updated_at` is the time of the latest batch.
    importing: str | None = None

    class Settings:
        """Beanie's settings of the collection."""

        name = "conversations"
        keep_nulls = True
        indexes: ClassVar = [
            # The list: one user's conversations, latest activity first; `_id` makes the order total,
            # so that a cursor stands at one place. `OWNER_WHILE_DELETED` finds interrupted deletions with it.
            IndexModel(
                [("user_id", ASCENDING), ("active_at", DESCENDING), ("_id", ASCENDING)],
                name="user_id_1_active_at_-1__id_1",
            ),
            # One conversation of one user, as every call with an owner reads it. Without this index another
            # user's conversation would be read before it is refused, and one that does not exist would not:
            # 50 µs, by which a caller could tell the two apart.
            IndexModel([("user_id", ASCENDING), ("_id", ASCENDING)], name="user_id_1__id_1"),
        ]


# The list's index of versions that had no `active_at`. While it is there, conversations may be there that
# have no `active_at`, and the list is in the order of this index until all have one.
EARLIER_LIST_INDEX = {"user_id": ASCENDING, "updated_at": DESCENDING, "_id": ASCENDING}
# The conversations that the sweep looks at, in its order; only those that are ever removed have an entry. It
# is no TTL index, because that would leave their messages behind. A query must name the filter's `$type`, or
# the server does not use the index.
BY_DUE_TIME = IndexModel(
    [("due_at", ASCENDING), ("_id", ASCENDING)],
    name="due_at_1__id_1",
    partialFilterExpression={"due_at": {"$type": "date"}},
)
# The same for the embedded engine, which uses no partial index, and no index at all for `$type`. It has a
# name of its own, because a copy of the engine's data that is restored on MongoDB brings its indexes along.
BY_DUE_TIME_EMBEDDED = IndexModel([("due_at", ASCENDING), ("_id", ASCENDING)], name="due_at_1__id_1_all")


class MessageFields(BaseModel):
    """The fields of a message that its caller may give: these, and any other that is not the service's."""

    model_config = ConfigDict(extra="allow")

    role: Role
    content: str | list[Any] | None = Field(None, description="Text, a list of parts (any JSON), or null.")
    tool_calls: Any = Field(None, description="Any JSON; stored natively, so it can be queried.")
    tool_call_id: str | None = None
    name: str | None = None
    metadata: dict[str, Any] | None = None


class Message(MessageFields, Document):
    """One message as it is stored; `_id` is `"<conversation id>/<message id>"`.

    A manual reference to its conversation, not a DBRef. The fields of the caller stand after these,
    in the caller's order, each a field of its own. Between the two, a message that was replaced has
    REPLACED_FIELDS: how often it was (`revision`), and when it was last (`updated_at`).
    """

    id: str  # type: ignore[assignment]  # unique within the conversation by its form, without an index
    conversation_id: str
    user_id: str
    seq: int
    created_at: datetime

    class Settings:
        """Beanie's settings of the collection."""

        name = "messages"
        indexes: ClassVar = [
            # The history, and every page of it: one conversation, a range of seq, in order. It is unique, so
            # that the database refuses a seq that is taken, whatever fault the service may have.
            IndexModel(
                [("conversation_id", ASCENDING), ("seq", ASCENDING)],
                name="conversation_id_1_seq_1",
                unique=True,
            ),
            # The beginning and the end of a time range: one conversation, the first message from a time on.
            IndexModel(
                [("conversation_id", ASCENDING), ("created_at", ASCENDING)],
                name="conversation_id_1_created_at_1",
            ),
            # A history of one role only. Without this index it would read the messages of all roles.
            IndexModel(
                [("conversation_id", ASCENDING), ("role", ASCENDING), ("seq", ASCENDING)],
                name="conversation_id_1_role_1_seq_1",
            ),
        ]


class Checkpoint(Document):
    """The summary of a history up to a seq, as an agent wrote it; `_id` is `"<conversation id>/<its id>"`."""

    id: str  # type: ignore[assignment]  # unique within the conversation by its form
    conversation_id: str
    user_id: str
    upto_seq: int
    created_at: datetime
    summary: str
    metadata: dict[str, Any] | None = None

    class Settings:
        """Beanie's settings of the collection."""

        name = "checkpoints"
        indexes: ClassVar = [
            # The checkpoints of one conversation, newest first. Nothing makes it unique, because two of one
            # seq have the same `_id`.
            IndexModel(
                [("conversation_id", ASCENDING), ("upto_seq", ASCENDING)],
                name="conversation_id_1_upto_seq_1",
            ),
        ]


class ApiKey(Document):
    """One API key: what it may do, and the hash of its secret, which is not stored."""

    id: str  # type: ignore[assignment]  # the part of the key that names it
    secret_sha256: str
    name: str
    scopes: list[Literal["read", "write", "admin"]]
    tenant: str = ""
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None

    class Settings:
        """Beanie's settings of the collection; a key is looked up by its `_id`, and needs no other index."""

        name = "api_keys"
        keep_nulls = True


class AuditEntry(Document):
    """One line of the audit trail: who did what to which conversation, and how it ended.

    `method` is an HTTP method, or `COMMAND` for the command line (`status` is then its exit code), or `TASK`
    for maintenance. `calls` is the number of calls that the line stands for.
    """

    at: datetime
    principal: str
    tenant: str
    method: str
    route: str
    status: int
    address: str | None = None
    request_id: str = ""
    request_id_by: Literal["caller", "service"] = "service"
    conversation_id: str | None = None
    user_id: str | None = None
    calls: int = 1
    what: str | None = None

    class Settings:
        """Beanie's settings of the collection."""

        name = "audit"


class Erasure(Document):
    """The erasure of a user, while it goes on, and the count of what is gone. It is deleted when it ends.

    `active_at` is moved every few seconds by whoever is at work. `erasure_id` is random; an erasure that an
    older version began has none.
    """

    id: str  # type: ignore[assignment]  # the owner's key
    erasure_id: str = ""
    active_at: datetime
    conversations: int = 0
    messages: int = 0

    class Settings:
        """Beanie's settings of the collection."""

        name = "erasures"


class ErasureReceipt(Document):
    """The counts of an erasure that has ended. It names nobody, and is removed after RECEIPT_KEPT.

    Its `_id` is a digest of the user's key and of the erasure's random id, which is stored nowhere any more.
    So only somebody who knows both finds it, and nobody can find out whose it is by trying user ids.
    """

    id: str  # type: ignore[assignment]
    ended_at: datetime
    conversations: int
    messages: int

    class Settings:
        """Beanie's settings of the collection; a receipt is looked up by its `_id`."""

        name = "erasure_receipts"
        indexes: ClassVar = [
            # The database removes receipts by it.
            IndexModel(
                [("ended_at", ASCENDING)],
                name="ended_at_1",
                expireAfterSeconds=int(RECEIPT_KEPT.total_seconds()),
            ),
        ]


class Backfill(Document):
    """A walk over all conversations: which retention settings it is for, and how far it has come."""

    id: str  # type: ignore[assignment]  # the name of the field that the walk fills in
    settings: str
    walks: int = 0
    # The last conversation that was looked at; None at the beginning of a walk.
    position: str | None = None
    # The end of the latest walk.
    ended_at: datetime | None = None

    class Settings:
        """Beanie's settings of the collection; it has one document."""

        name = "backfills"
        keep_nulls = True


class Secret(Document):
    """A secret that all processes of a deployment share; the first that needs it makes it."""

    id: str  # type: ignore[assignment]  # the name of its use
    value: bytes

    class Settings:
        """Beanie's settings of the collection; a secret is looked up by its `_id`."""

        name = "secrets"


# The fields of the service that only a message has which was replaced. A message of an earlier version may
# have fields of its caller's with these names; its `updated_at` is then no time, which JSON does not have.
REPLACED_FIELDS = ("revision", "updated_at")
# The fields of a message that only the service sets. Those with a `_` exist only in its stored form.
SERVICE_FIELDS = (
    *("conversation_id", "user_id", "seq", "created_at"),
    *("_id", "_exact_bson", "_tokens_before", "_turns_before"),
)
