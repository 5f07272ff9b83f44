"""Erases a user's conversations, and keeps a receipt that can be asked for.

- An erasure is a document, the job, which names the user and counts what is gone. Each conversation is
  counted in the transaction in which it is gone, so it is counted once, however often the erasure is
  interrupted (tests/integration/test_erasures.py).
- When nothing is left, one transaction removes the job and stores the receipt, which names nobody.
- Any number of processes may be at work with one job. If all of them die, the sweep of another one goes on.
- A conversation that is created for the user before the job ends is removed, too; one that is created after
  it stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from pymongo.errors import DuplicateKeyError

from service.database import Transaction
from service.documents import ERASURE_IDLE, RECEIPT_KEPT, Conversation, Erasure, ErasureReceipt
from service.errors import ChatHistoryError, ConversationNotFound, DatabaseUnavailable, ErasureNotFound
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import deleting
from service.history.store import ConversationStore
from service.tenancy import OWNER_WHILE_DELETED, ConversationKey, ConversationRef, OwnerKey

log = structlog.get_logger(__name__)

_PAGE_ITEMS = 100
_ALIVE_EVERY_S = 15.0
# For so long a sweep waits for one erasure. After that the erasure goes on beside the sweep.
_SWEEP_WAIT_S = 30.0
_ATTEMPTS = 5


@dataclass(frozen=True)
class RemovedCounts:
    """How much an erasure or an expiry removed, or would remove."""

    conversations: int
    messages: int


@dataclass(frozen=True)
class ErasureState:
    """How far an erasure is: what is gone so far, or, when it is done, all that was removed."""

    id: str
    done: bool
    removed: RemovedCounts


async def resume_erasures(store: ConversationStore) -> int:
    """Resume erasures that nobody is at work with, of all tenants; return how many have ended."""
    idle = {"active_at": {"$lt": datetime.now(UTC) - ERASURE_IDLE}}
    async with store.deadline():
        begun = await store.database.read(Erasure, idle, fields=["_id"])
    owners = [OwnerKey(bson_codec.decode_anything(each)["_id"]) for each in begun]

    async def resume(owner: OwnerKey) -> bool:
        return (await erase(store, owner, _SWEEP_WAIT_S)).done

    return await store.for_each("erasure_not_finished", owners, resume)


async def erase(store: ConversationStore, owner: OwnerKey, wait_s: float) -> ErasureState:
    """Remove everything of an owner; see `UserData.erase`. The erasure goes on after `wait_s` seconds."""
    erasure_id = await _begin(store, owner)
    job = (owner, erasure_id)
    task = store.erasures.get(job)
    if task is None:
        # Callers in one process wait for the same work, because they would only collide.
        task = store.erasures[job] = store.start(_erase_all(store, owner, erasure_id))
        task.add_done_callback(functools.partial(_note_end, store, job))
    await asyncio.wait({task}, timeout=wait_s)
    if task.done() and not task.cancelled():
        state: ErasureState = task.result()
        return state
    return await find(store, owner, erasure_id)


def _note_end(store: ConversationStore, job: tuple[OwnerKey, str], task: asyncio.Task[ErasureState]) -> None:
    """Forget a task, and log its error, because its caller may have been answered already."""
    store.erasures.pop(job, None)
    if not task.cancelled() and (error := task.exception()) is not None:
        problem = error.slug() if isinstance(error, ChatHistoryError) else type(error).__name__
        log.warning("erasure_interrupted", problem=problem)


async def find(store: ConversationStore, owner: OwnerKey, erasure_id: str) -> ErasureState:
    """Return how far an erasure is; see `UserData.erasure`."""
    async with store.reading():
        # The job first: the transaction that removes the job stores the receipt.
        named: Json = {"_id": owner, "erasure_id": erasure_id}
        going_on = await store.database.read(Erasure, named, limit=1)
        if going_on:
            return ErasureState(erasure_id, False, _counts(Erasure, going_on[0]))
        ended = await store.database.read(ErasureReceipt, {"_id": _digest(owner, erasure_id)}, limit=1)
        if ended:
            return ErasureState(erasure_id, True, _counts(ErasureReceipt, ended[0]))
    raise ErasureNotFound(
        f"This user has no such erasure, or it ended more than {RECEIPT_KEPT.days} days ago. Erase the user "
        "again to be sure that nothing is left."
    )


def _counts(document: type[Erasure] | type[ErasureReceipt], raw: bytes) -> RemovedCounts:
    found = document.model_validate(bson_codec.decode_anything(raw))
    return RemovedCounts(found.conversations, found.messages)


def _digest(owner: OwnerKey, erasure_id: str) -> str:
    """Return the `_id` of a receipt, from which nobody can guess the user without the random id."""
    return hashlib.sha256(f"{erasure_id}/{owner}".encode()).hexdigest()


async def _begin(store: ConversationStore, owner: OwnerKey) -> str:
    """Begin the erasure, or take up the one that is going on; return its id."""

    async def begin(transaction: Transaction) -> str:
        now, session = datetime.now(UTC), transaction.session
        found = await store.database.update(
            Erasure, {"_id": owner}, {"$set": {"active_at": now}}, session, ["erasure_id"]
        )
        known = bson_codec.decode_anything(found).get("erasure_id") if found is not None else None
        if known:
            return str(known)
        new = secrets.token_hex(16)
        if found is None:
            # Committed before anything is removed, so that an erasure that is interrupted can be found.
            await Erasure(id=owner, erasure_id=new, active_at=now).insert(session=session)
        else:
            # An older version began it.
            named = {"_id": owner}
            await store.database.update(Erasure, named, {"$set": {"erasure_id": new}}, session, [])
        return new

    for _ in range(_ATTEMPTS):
        async with store.deadline():
            with contextlib.suppress(DuplicateKeyError):  # another request has just begun it; look again
                return await store.database.transaction(begin)
    raise DatabaseUnavailable("Other requests begin and end erasures of this user all the time. Try again.")


async def _erase_all(store: ConversationStore, owner: OwnerKey, erasure_id: str) -> ErasureState:
    count = functools.partial(_count, store, owner, erasure_id)
    async with _saying_that_it_goes_on(store, owner):
        while refs := await _some_of_owner(store, owner):
            for ref in refs:
                # Another request may have deleted it first.
                with contextlib.suppress(ConversationNotFound):
                    await deleting.delete_conversation(store, ref, within_transaction=count)
    return await _finish(store, owner, erasure_id)


@contextlib.asynccontextmanager
async def _saying_that_it_goes_on(store: ConversationStore, owner: OwnerKey) -> AsyncIterator[None]:
    """Move `active_at` while the work inside runs, also during a conversation that takes minutes."""

    async def alive(transaction: Transaction) -> None:
        now = {"$set": {"active_at": datetime.now(UTC)}}
        await store.database.update(Erasure, {"_id": owner}, now, transaction.session, [])

    async def say() -> None:
        while True:
            await asyncio.sleep(_ALIVE_EVERY_S)
            # If it cannot be said, another process may join in, which does no harm.
            with contextlib.suppress(ChatHistoryError):
                async with store.deadline():
                    await store.database.transaction(alive)

    saying = store.start(say())
    try:
        yield
    finally:
        saying.cancel()


async def _count(
    store: ConversationStore, owner: OwnerKey, erasure_id: str, transaction: Transaction, messages: int
) -> None:
    """Count one conversation, in the transaction in which it is gone: the two commit together."""
    now, session = datetime.now(UTC), transaction.session
    gone = {"$inc": {"conversations": 1, "messages": messages}, "$set": {"active_at": now}}
    if await store.database.update(Erasure, {"_id": owner}, gone, session, []) is None:
        # Another process has ended this erasure meanwhile. `_finish` adds to its receipt.
        again = Erasure(id=owner, erasure_id=erasure_id, active_at=now, conversations=1, messages=messages)
        await again.insert(session=session)


async def _some_of_owner(store: ConversationStore, owner: OwnerKey) -> list[ConversationRef]:
    """Return some of a user's conversations, well formed or not, or of the user's unfinished imports.

    They are read without what the conversations hold, because that may be large.
    """
    async with store.deadline():
        query: Json = {"user_id": owner}
        found = await store.database.read(Conversation, query, limit=_PAGE_ITEMS, fields=["_id"])
        if found:
            keys = [bson_codec.decode_anything(each)["_id"] for each in found]
            return [ConversationRef(ConversationKey(key), owner) for key in keys]
        # `importing` has no index and is not in the filter, because few conversations are being deleted or
        # imported, and each further field of a filter costs the embedded engine more than reading them.
        query = {"user_id": OWNER_WHILE_DELETED}
        unfinished = await store.database.read(Conversation, query, fields=["_id", "importing"])
    return [
        ConversationRef(ConversationKey(each["_id"]), OWNER_WHILE_DELETED, {"importing": owner})
        for each in map(bson_codec.decode_anything, unfinished)
        if each.get("importing") == owner
    ]


async def _finish(store: ConversationStore, owner: OwnerKey, erasure_id: str) -> ErasureState:
    """Remove the job, which names the user, and store what it counted as the receipt: both commit together.

    If the process dies before the commit, the sweep ends the job; if it dies after it, the receipt is there.
    """

    async def finish(transaction: Transaction) -> None:
        session = transaction.session
        job = await Erasure.find_one({"_id": owner, "erasure_id": erasure_id}, session=session)
        if job is None:
            # An earlier run of this, or another process, has stored the receipt.
            transaction.wrote = False
            return
        await job.delete(session=session)
        named = {"_id": _digest(owner, erasure_id)}
        more = {"$inc": {"conversations": job.conversations, "messages": job.messages}}
        if await store.database.update(ErasureReceipt, named, more, session, []) is None:
            await ErasureReceipt(
                id=named["_id"],
                ended_at=datetime.now(UTC),
                conversations=job.conversations,
                messages=job.messages,
            ).insert(session=session)

    async with store.deadline():
        await store.database.transaction(finish)
    return await find(store, owner, erasure_id)
