"""The two collections: their fields, and each index with the query that it serves."""

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
    WithJsonSchema,
)
from pymongo import ASCENDING, DESCENDING, IndexModel

from service.roles import Role


def _not_a_path_step(value: str) -> str:
    if value in {".", ".."}:
        raise ValueError("'.' and '..' cannot stand in a URL's path")
    return value


Id = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9._:@~-]{1,128}$"),
    AfterValidator(_not_a_path_step),
    WithJsonSchema({"type": "string", "pattern": r"^(?!\.{1,2}$)[A-Za-z0-9._:@~-]{1,128}$"}),
]


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

# The owner of a conversation that is being deleted. No id is empty, so it is nobody's, every query
# that asks for an owner misses it, and the index of owners finds it again after a crash.
NOBODY = ""
# An erasure or an import that has done nothing for so long was interrupted.
IDLE = timedelta(minutes=10)


class Conversation(Document):
    """One conversation. `last_seq` and `message_count` change only with the messages they count."""

    id: str  # type: ignore[assignment]  # Beanie's own id is an ObjectId; ours is the caller's
    user_id: str
    title: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    # `metadata` as BSON, where the embedded engine would reorder its keys (see `payloads`).
    exact_metadata: bytes | None = None
    created_at: datetime
    updated_at: datetime
    last_seq: int = 0
    message_count: int = 0
    # From when on it is removed, if ever.
    expires_at: datetime | None = None
    # Whose it becomes with the last batch of the import that is storing its messages; until then it is
    # NOBODY's, and `updated_at` is the time of the latest batch.
    importing: str | None = None

    class Settings:
        """Beanie's settings of the collection."""

        name = "conversations"
        keep_nulls = True
        indexes: ClassVar = [
            # The list: one user's conversations, latest activity first; `_id` makes the order total,
            # so that a cursor stands at one place. `NOBODY` finds interrupted deletions with it.
            IndexModel(
                [("user_id", ASCENDING), ("updated_at", DESCENDING), ("_id", ASCENDING)],
                name="user_id_1_updated_at_-1__id_1",
            ),
            # One conversation of one user, as every call that names an owner asks. Without it a conversation
            # that is somebody else's is read before it is refused, and one that is not there is not: 50 µs,
            # by which the two could be told apart.
            IndexModel([("user_id", ASCENDING), ("_id", ASCENDING)], name="user_id_1__id_1"),
            # Those whose time has come. No TTL index: that would leave their messages behind.
            IndexModel([("expires_at", ASCENDING)], name="expires_at_1"),
        ]


# Those without activity, made only where a retention in days is set: it costs each append an entry.
BY_ACTIVITY = IndexModel([("updated_at", ASCENDING)], name="updated_at_1")


class MessageFields(BaseModel):
    """What a caller may say in a message: these fields, and any other that is not the service's."""

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
    in the caller's order, each a field of its own.
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
            # The history, and every page of it: one conversation, a range of seq, in order. Unique,
            # so that no fault of ours could ever give a seq twice.
            IndexModel(
                [("conversation_id", ASCENDING), ("seq", ASCENDING)],
                name="conversation_id_1_seq_1",
                unique=True,
            ),
            # Where a time range begins and ends: one conversation, the first message from a time on.
            IndexModel(
                [("conversation_id", ASCENDING), ("created_at", ASCENDING)],
                name="conversation_id_1_created_at_1",
            ),
            # A history of one role only, which without it would read all that it leaves out.
            IndexModel(
                [("conversation_id", ASCENDING), ("role", ASCENDING), ("seq", ASCENDING)],
                name="conversation_id_1_role_1_seq_1",
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

    `method` is an HTTP method, or `COMMAND` for the command line (`status` is then its exit code) and `TASK`
    for what the service does by itself. `calls` is how many calls the line is for, where it is several.
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
    """The erasure of a user that is going on: who, and what is gone already. It ends with itself erased."""

    id: str  # type: ignore[assignment]  # the owner's key
    active_at: datetime
    conversations: int = 0
    messages: int = 0

    class Settings:
        """Beanie's settings of the collection."""

        name = "erasures"


class Secret(Document):
    """A secret that all processes of a deployment share; the first that needs it makes it."""

    id: str  # type: ignore[assignment]  # what it is for
    value: bytes

    class Settings:
        """Beanie's settings of the collection; a secret is looked up by its `_id`."""

        name = "secrets"


# What only the service sets in a message. `_id` and `_exact_bson` are how it stores one.
OWNED_FIELDS = ("conversation_id", "user_id", "seq", "created_at", "_id", "_exact_bson")
