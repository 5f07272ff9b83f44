"""Tells what is wrong with a conversation, or with a message; pure, for `verify`."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from bson import Code

from service.documents import Conversation
from service.errors import MalformedDocument
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history.records import printable_id, was_replaced
from service.tenancy import is_message_key, local_id

# How many faults of one conversation are held until it is known that it did not change meanwhile.
_HELD = 1_000
UNKNOWN = "left: the right value is not known"
FOR_AN_OPERATOR = "left: correct it, or remove it"
_CONVERSATION_KINDS = {
    "user_id": str,
    "created_at": datetime,
    "updated_at": datetime,
    "last_seq": int,
    "message_count": int,
}
_MESSAGE_KINDS = {"_id": str, "conversation_id": str, "seq": int, "created_at": datetime}


@dataclass
class Findings:
    """What was found among a conversation's messages, read in the order of `seq`.

    `faults` are whole violations, each with its outcome; of more than _HELD only the number is known.
    `of_another_user` counts all messages that say so, `count` all but those that an interrupted import left.
    """

    count: int = 0
    last_seq: int = 0
    last_time: datetime | None = None
    newest: datetime | None = None
    faults: list[tuple[str, str]] = field(default_factory=list)
    more_faults: int = 0
    checkpoint_seq: int = 0
    malformed: int = 0
    of_another_user: int = 0

    def add(self, what: str, outcome: str = UNKNOWN) -> None:
        """Keep a fault, or only count it."""
        if len(self.faults) < _HELD:
            self.faults.append((what, outcome))
        else:
            self.more_faults += 1


@dataclass(frozen=True)
class Violation:
    """An invariant that does not hold: where, which, and whether it was repaired (or why it was not)."""

    conversation_id: str
    what: str
    outcome: str = ""

    def __str__(self) -> str:
        return f"{self.conversation_id}: {self.what}" + (f" ({self.outcome})" if self.outcome else "")


@dataclass
class Report:
    """The result of a walk: how much was read, and how many violations were found, and are left."""

    conversations: int = 0
    messages: int = 0
    violations: int = 0
    left: int = 0

    def __str__(self) -> str:
        return (
            f"{self.conversations} conversations, {self.messages} messages, "
            f"{self.violations} violations, {self.left} left"
        )


def document(raw: bytes) -> Conversation:
    """Read a conversation. Types are checked first, because the model takes text for a counter, too."""
    fields = bson_codec.decode(raw)
    if any(not isinstance(fields.get(name), kind) for name, kind in _CONVERSATION_KINDS.items()):
        raise MalformedDocument("A field of the conversation is of another type.")
    conversation: Conversation = Conversation.model_validate(fields)
    return conversation


def _is_text(value: object) -> bool:
    """Tell whether a value is a text, which code (a type of BSON) is not, although Python says so."""
    return isinstance(value, str) and not isinstance(value, Code)


def place_of(message: Json) -> str | None:
    """Return the key of a conversation among whose messages a walk in order takes this one, if any.

    An array matches each of its elements, so it comes several times; it is taken at the first of its texts.
    """
    key = message.get("conversation_id")
    if isinstance(key, list):
        return min(filter(_is_text, key), default=None)
    return key if _is_text(key) else None


def wrong_fields(message: Json) -> list[str]:
    """Name the fields of a message that are of a wrong type."""
    kinds: dict[str, type] = {**_MESSAGE_KINDS, **({"revision": int} if was_replaced(message) else {})}
    return [
        name
        for name, kind in kinds.items()
        if not isinstance(message.get(name), kind) or isinstance(message[name], bool | Code)
    ]


def malformed(message: Json) -> str:
    """Say of a message that fields of it are of a wrong type, without their values."""
    wrong = ", its ".join(wrong_fields(message))
    return f"the message {printable_id(message['_id'])} is not well formed: its {wrong}"


def is_of_another(message: Json, conversation: Conversation) -> bool:
    """Tell whether a message says that it is not of the conversation's user."""
    return bool(message.get("user_id") != conversation.user_id)


def is_behind(message: Json, conversation: Conversation) -> bool:
    """Tell whether a message stands behind the conversation's last one."""
    seq = message.get("seq")
    return isinstance(seq, int) and seq > conversation.last_seq


def check_message(message: Json, conversation: Conversation, findings: Findings) -> None:
    """Note one message, which comes in the order of `seq`, and what is wrong with it."""
    if wrong_fields(message):
        findings.malformed += 1
        findings.add(malformed(message), FOR_AN_OPERATOR)
    if is_of_another(message, conversation):
        findings.of_another_user += 1
        if is_behind(message, conversation):
            return
    findings.count += 1
    if not isinstance(message["_id"], str):
        return
    _check_id(message["_id"], conversation, findings)
    if isinstance(message.get("seq"), int) and isinstance(message.get("created_at"), datetime):
        _check_order(message, findings)


def _check_id(key: str, conversation: Conversation, findings: Findings) -> None:
    if not is_message_key(key, conversation.id):
        findings.add(f"the message {printable_id(key)!r} has an id that is not well formed")


def _check_order(message: Json, findings: Findings) -> None:
    seq, time = message["seq"], message["created_at"]
    if seq < 1:
        findings.add(f"the message {local_id(message['_id'])} has seq {seq}")
    elif seq == findings.last_seq:
        findings.add(f"seq {seq} stands twice")
    findings.last_seq = seq
    if findings.last_time is not None and time < findings.last_time:
        findings.add(f"created_at runs backwards at seq {seq}")
    findings.last_time = time
    findings.newest = max(time, findings.newest or time)
