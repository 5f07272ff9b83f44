"""Proves the invariants of `chat_service` in a database, or in a range of it; repairs what needs no guess.

The conversations are walked in the order of their keys, and between two of them the messages that belong to
neither. So memory stays that of a window, and a walk can begin and end at any key (`Verifier.position`). It
may run beside a service that writes: a conversation that changed while it was read is read again.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import TypeVar

from service import clock
from service.documents import IDLE, Checkpoint, Conversation, Message
from service.errors import DatabaseUnavailable, MalformedDocument
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history.deleting import resume_deletion
from service.history.records import printable_id
from service.history.store import ConversationStore
from service.maintenance.findings import (
    FOR_AN_OPERATOR,
    UNKNOWN,
    Findings,
    Report,
    Violation,
    check_message,
    document,
    malformed,
    place_of,
    wrong_fields,
)
from service.maintenance.repairs import Repairs
from service.maintenance.walk import EVERYTHING, KeyRange, Walk, after
from service.tenancy import OWNER_WHILE_DELETED, ConversationKey, conversation_key_of, is_key, local_id

T = TypeVar("T")
# How often a conversation is read again that somebody writes to meanwhile.
_ATTEMPTS = 5
# The pauses after which a read is repeated that found no database, as while another server becomes primary.
_PAUSES_S = (1.0, 3.0, 9.0)
# How many names of conversations are held whose counters are left alone.
_NAMES_HELD = 10_000
_NOT_WELL_FORMED = "it is not well formed"
_NO_OWNER = "left: their owner is not known"


class Verifier:
    """One walk over a database, or over a range of keys. With `repair` it repairs what needs no guess.

    Each violation is given to `note` when it is found. `position` is the key at which another walk can go on;
    what is there is verified again.
    """

    def __init__(
        self,
        store: ConversationStore,
        *,
        repair: bool,
        within: KeyRange = EVERYTHING,
        note: Callable[[Violation], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._database = store.database
        self._walk = Walk(store.database)
        self._is_repairing = repair
        self._repairs = Repairs(store.database, self._walk, self._note, active=repair)
        self._within = within
        self._tell = note
        self.report = Report()
        self.position = within.low
        self.has_read = False
        # The conversations that messages name which name no conversation by their field. Their counters are
        # left alone, because it is not known whether such a message counts.
        self._uncounted: set[str] = set()
        # Where there is no checkpoint at all, no conversation is asked for its own.
        self._has_checkpoints = False

    async def run(self, progress: Callable[[int, str], None] = lambda _done, _key: None) -> Report:
        """Read everything in the range, and return what was found. Raises DatabaseUnavailable."""
        await self._check_keys_without_text()
        await self._check_checkpoints()
        self.has_read = True
        low, high = self._within.low or "", self._within.high
        while True:
            keys = await self._patiently(functools.partial(self._walk.keys, KeyRange(low, high)))
            for key in keys:
                progress(self.report.conversations, printable_id(key))
                await self._check_between(KeyRange(low, key))
                self.position = key
                await self._verify_conversation(key)
                low = after(key)
            if self._walk.is_last(keys):
                break
        await self._check_between(KeyRange(low, high))
        return self.report

    async def _patiently(self, read: Callable[[], Awaitable[T]]) -> T:
        """Read, and read again after pauses where the database is away."""
        for pause in _PAUSES_S:
            try:
                return await read()
            except DatabaseUnavailable:
                await asyncio.sleep(pause)
        return await read()

    # -- messages without a conversation ---------------------------------------------------------------

    async def _check_keys_without_text(self) -> None:
        """Note the documents whose key of a conversation is no text; the range without `low` has them."""
        notes = self._within.low is None
        if notes:
            async for page in self._walk.without_text_key(Conversation):
                for each in page:
                    self._note(printable_id(each["_id"]), _NOT_WELL_FORMED, FOR_AN_OPERATOR)
        async for page in self._walk.without_text_key(Message):
            for each in page:
                if place_of(each) is not None:
                    continue  # an array with a text, which is found among the messages of that
                if isinstance(each["_id"], str):
                    self._uncounted.add(conversation_key_of(each["_id"]))
                if notes:
                    self._note_malformed(each)
            if len(self._uncounted) > _NAMES_HELD:
                raise MalformedDocument(
                    f"Messages of more than {_NAMES_HELD} conversations have a `conversation_id` that is "
                    "not a text. Correct or remove these messages, and verify again."
                )

    async def _check_checkpoints(self) -> None:
        """Note the conversations of checkpoints that are not there."""
        last = ""
        async for page in self._walk.checkpoints(self._within):
            self._has_checkpoints = True
            for key in dict.fromkeys(each["conversation_id"] for each in page):
                if key != last and not await self._patiently(functools.partial(self._exists, key)):
                    self._note(
                        printable_id(key), "there are checkpoints without this conversation", _NO_OWNER
                    )
                last = key

    async def _check_between(self, within: KeyRange) -> None:
        """Note the messages between two conversations. Where a conversation was created since, verify it."""
        pages = self._walk.between(within)

        async def begin() -> list[Json]:
            nonlocal pages
            pages = self._walk.between(within)
            return await anext(pages, [])

        key, is_orphan = None, False
        page = await self._patiently(begin)
        while page:
            for message in page:
                place = place_of(message)
                if not within.has(place):
                    continue  # an array, which is noted at another of its texts
                if isinstance(message["conversation_id"], list):
                    self._note_malformed(message)
                    continue
                if place != key:
                    key, is_orphan = place, await self._check_orphan(message["conversation_id"])
                if is_orphan and wrong_fields(message):
                    self._note_malformed(message)
            page = await anext(pages, [])

    async def _check_orphan(self, key: str) -> bool:
        """Look again for the conversation of a message, note if there is none, and else verify it."""
        if not await self._patiently(functools.partial(self._is_orphan, key)):
            await self._verify_conversation(key)
            return False
        self._note(printable_id(key), "there are messages without this conversation", _NO_OWNER)
        return True

    async def _is_orphan(self, key: str) -> bool:
        """Tell whether a conversation does not exist and has messages.

        It is looked for twice, because it may be created before the messages are read, and because what was
        read of them before may have been deleted with it.
        """
        named: Json = {"conversation_id": key}
        async with self._database.deadline():
            if await self._exists(key):
                return False
            has_messages = await self._database.read(Message, named, limit=1, fields=["seq"])
            return bool(has_messages) and not await self._exists(key)

    async def _exists(self, key: str) -> bool:
        return bool(await self._database.read(Conversation, {"_id": key}, limit=1, fields=["_id"]))

    # -- conversations -----------------------------------------------------------------------------

    async def _verify_conversation(self, key: str) -> None:
        try:
            conversation, findings = await self._patiently(functools.partial(self._read_unchanged, key))
            if conversation is None:
                return  # deleted since the walk began
            if conversation.user_id == OWNER_WHILE_DELETED:
                await self._check_interrupted(conversation)
                return
            self.report.conversations += 1
            self.report.messages += findings.count
            await self._check(conversation, findings)
        except MalformedDocument:
            self._note(printable_id(key), _NOT_WELL_FORMED, FOR_AN_OPERATOR)
            await self._check_types(key)

    async def _check_types(self, key: str) -> None:
        """Note the malformed messages of a conversation of which nothing else can be checked."""
        async for page in self._walk.of_conversation(key, 0):
            for message in page:
                if place_of(message) == key and wrong_fields(message):
                    self._note_malformed(message)

    async def _read_unchanged(self, key: str) -> tuple[Conversation | None, Findings]:
        """Read a conversation and its messages, again where somebody wrote to it meanwhile.

        Every write moves the conversation's counters or its `updated_at`, so one that is equal before and
        after was read as it stands.
        """
        before, findings = await self._find(key), Findings()
        for _ in range(_ATTEMPTS):
            if before is None or before.user_id == OWNER_WHILE_DELETED:
                break
            findings = await self._read(before)
            now = await self._find(key)
            if now == before:
                break
            before = now
        return before, findings

    async def _find(self, key: str) -> Conversation | None:
        async with self._database.deadline():
            found = await self._database.read(Conversation, {"_id": key}, limit=1)
            return document(found[0]) if found else None

    async def _read(self, conversation: Conversation) -> Findings:
        findings = Findings()
        async for page in self._walk.of_conversation(conversation.id, conversation.last_seq):
            before = findings.last_seq
            messages = [each for each in page if place_of(each) == conversation.id]
            for message in messages:
                check_message(message, conversation, findings)
            if self._database.sharded:
                for fault in await self._duplicate_ids(conversation.id, before, messages):
                    findings.add(fault)
        if self._has_checkpoints:
            findings.checkpoint_seq = await self._newest_checkpoint(conversation)
        return findings

    async def _newest_checkpoint(self, conversation: Conversation) -> int:
        of = {"conversation_id": conversation.id}
        async with self._database.deadline():
            found = await self._database.read(Checkpoint, of, fields=["upto_seq"])
        seqs = [bson_codec.decode_anything(each).get("upto_seq") for each in found]
        return max((each for each in seqs if isinstance(each, int)), default=0)

    async def _duplicate_ids(self, key: str, before: int, messages: list[Json]) -> list[str]:
        """Find ids of a page that stand more than once in the conversation; name each in its first page.

        A single server cannot have them. A cluster can, if it was sharded so that a conversation's messages
        are on several shards, because an `_id` is unique on each shard only.
        """
        named = {"conversation_id": key, "_id": {"$in": [each["_id"] for each in messages]}}
        async with self._database.deadline():
            found = await self._database.read(Message, named, fields=["seq"])
        seqs: dict[str, list[int]] = {}
        for message in map(bson_codec.decode_anything, found):
            if isinstance(message.get("seq"), int):  # else it is noted as one that is not well formed
                seqs.setdefault(str(message["_id"]), []).append(message["seq"])
        return [
            f"the message id {local_id(each)} stands {len(places)} times, at seq "
            + ", ".join(map(str, sorted(places)))
            for each, places in seqs.items()
            if len(places) > 1 and min(places) > before
        ]

    async def _check(self, conversation: Conversation, findings: Findings) -> None:
        for fault, outcome in findings.faults:
            self._note(conversation.id, fault, outcome)
        if findings.more_faults:
            self._note(conversation.id, f"its messages have {findings.more_faults} more faults", UNKNOWN)
        if not is_key(conversation.id) or not is_key(conversation.user_id):
            self._note(conversation.id, "its id or its user_id is not well formed", "left")
        # Where a message is not well formed, it is not known whether it counts.
        if not findings.malformed and conversation.id not in self._uncounted:
            await self._check_counters(conversation, findings)
        if findings.of_another_user:
            await self._repairs.check_owners(conversation)

    async def _check_counters(self, conversation: Conversation, findings: Findings) -> None:
        if findings.last_seq > conversation.last_seq:
            what = f"last_seq is {conversation.last_seq}, and there is a message with seq {findings.last_seq}"
            await self._repairs.correct(
                Conversation, conversation.id, {"$max": {"last_seq": findings.last_seq}}, what
            )
        if findings.count != conversation.message_count:
            what = f"message_count is {conversation.message_count}, and there are {findings.count} messages"
            change = {"$inc": {"message_count": findings.count - conversation.message_count}}
            await self._repairs.correct(Conversation, conversation.id, change, what)
        if findings.checkpoint_seq != conversation.checkpoint_seq:
            named, newest_seq = conversation.checkpoint_seq, findings.checkpoint_seq
            what = f"checkpoint_seq is {named}, and the newest checkpoint stands at seq {newest_seq}"
            change = {"$set": {"checkpoint_seq": newest_seq}}
            await self._repairs.correct(Conversation, conversation.id, change, what)
        newest = max(conversation.created_at, findings.newest or conversation.created_at)
        if newest > conversation.updated_at:
            what = f"updated_at is {conversation.updated_at.isoformat()}, and there is {newest.isoformat()}"
            await self._repairs.correct(Conversation, conversation.id, {"$max": {"updated_at": newest}}, what)

    async def _check_interrupted(self, conversation: Conversation) -> None:
        """Note an interrupted deletion or import, and with `repair` finish it."""
        verb = "deletion" if conversation.importing is None else "import"
        if conversation.importing is not None and clock.now() - conversation.updated_at < IDLE:
            return  # an import that is going on is no violation
        repaired = self._is_repairing and await resume_deletion(self._store, ConversationKey(conversation.id))
        outcome = "repaired: removed" if repaired else "the service removes the rest when it runs"
        self._note(conversation.id, f"its {verb} was interrupted", outcome)
        await self._check_types(conversation.id)

    def _note_malformed(self, message: Json) -> None:
        self._note(printable_id(message.get("conversation_id")), malformed(message), FOR_AN_OPERATOR)

    def _note(self, conversation_id: str, what: str, outcome: str) -> None:
        self.report.violations += 1
        self.report.left += not outcome.startswith("repaired")
        self._tell(Violation(conversation_id, what, outcome))
