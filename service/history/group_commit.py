"""Appends to one conversation that wait for each other are stored in one transaction.

The transaction costs most of an append, so the throughput of a conversation grows with the number of its
writers. Each append keeps its own ids and its own answer: one that was stored before, or that is refused, is
taken out of the group, and the rest is stored.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections import deque
from dataclasses import dataclass

from pymongo.errors import DuplicateKeyError

from service.database import Transaction
from service.database.driver_errors import NO_ANSWER
from service.documents import Message
from service.errors import BatchTooLarge, ChatHistoryError, DatabaseUnavailable
from service.formats import bson_codec
from service.history import appending, encoded_pages
from service.history.appending import AppendResult
from service.history.conditions import Condition
from service.history.new_messages import PreparedBatch
from service.history.store import ConversationStore
from service.telemetry import metrics
from service.tenancy import ConversationRef, message_document_id

# How large the messages of a group are at most, beside those of its first batch.
_GROUP_BYTES_MAX = 8 * 1024 * 1024


async def append(
    store: ConversationStore,
    ref: ConversationRef,
    batch: PreparedBatch,
    condition: Condition | None = None,
) -> AppendResult:
    """Store a batch once, or return what an earlier request stored.

    An append with a condition waits for its turn and goes alone: of several that are based on the same
    history only one can be stored. Raises ConversationNotFound, IdempotencyConflict, Stale, BrokenCounter.
    """
    store.database.require_free_disk()
    async with store.deadline():
        if condition is not None or store.is_free(ref):
            transaction = Transaction(in_one_thread=True)
            result = await appending.append_alone(store, ref, batch, transaction, condition)
        else:
            result = await _append_in_group(store, ref, batch)
    metrics.count("replays" if result.replayed else "appends")
    if not result.replayed:
        metrics.count("messages_appended", len(result.documents))
    return result


@dataclass(eq=False)
class _Waiting:
    """An append that waits for another one to the same conversation, and the answer that it waits for."""

    batch: PreparedBatch
    answer: asyncio.Future[AppendResult]

    def succeed(self, result: AppendResult) -> None:
        """Answer, unless the caller is gone."""
        if not self.answer.done():
            self.answer.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless the caller is gone."""
        if not self.answer.done():
            self.answer.set_exception(error)


async def _append_in_group(
    store: ConversationStore, ref: ConversationRef, batch: PreparedBatch
) -> AppendResult:
    """Wait until the batch is stored, in one transaction with the others that wait at the same time.

    The transaction costs most of an append, so the throughput of a conversation grows with the number of its
    writers. A task of its own stores the groups, so that no caller's deadline ends the others' transaction.
    """
    waiting = _Waiting(batch, asyncio.get_running_loop().create_future())
    queue = store.append_queues.get((ref.key, ref.owner))
    if queue is None:
        queue = store.append_queues[ref.key, ref.owner] = deque()
        store.start(_store_queue(store, ref, queue))
    queue.append(waiting)
    try:
        return await waiting.answer
    finally:
        # The caller was cancelled, or its deadline is over: what is not under way yet is not stored.
        if waiting in queue:
            queue.remove(waiting)


async def _store_queue(store: ConversationStore, ref: ConversationRef, queue: deque[_Waiting]) -> None:
    """Store what waits, group by group, until nothing waits."""
    group: list[_Waiting] = []
    try:
        while queue:
            try:
                async with store.turn(ref):
                    group = _next_group(queue, store.settings.batch_items_max)
                    alone, transaction = await _store_group(store, ref, group)
            except DatabaseUnavailable as error:  # no turn came in time
                while queue:
                    queue.popleft().fail(error)
                return
            for waiting in alone:
                store.start(_store_alone(store, ref, waiting, transaction.may_have_committed))
            group = []
    finally:
        del store.append_queues[ref.key, ref.owner]
        for waiting in (*group, *queue):  # left only where this task was ended, or failed
            waiting.fail(DatabaseUnavailable(NO_ANSWER))


def _next_group(queue: deque[_Waiting], items_max: int) -> list[_Waiting]:
    """Take from the queue what one transaction holds: at least one batch, in the order in which they came."""
    group: list[_Waiting] = []
    items = size = 0
    while queue:
        messages = queue[0].batch.messages
        items += len(messages)
        size += sum(len(message.fields) for message in messages)
        if group and (items > items_max or size > _GROUP_BYTES_MAX):
            break
        group.append(queue.popleft())
    return group


async def _store_group(
    store: ConversationStore, ref: ConversationRef, group: list[_Waiting]
) -> tuple[list[_Waiting], Transaction]:
    """Store the batches of a group in one transaction, each with its own ids and its own answer.

    A batch of which a message is stored already makes the database refuse the transaction. It is taken out,
    and the rest is stored. Returns the batches that must be stored by themselves, and the transaction, which
    knows whether a run of it may have committed.
    """
    transaction = Transaction(in_one_thread=True)
    alone: list[_Waiting] = []
    while group:
        try:
            result = await _insert_all(store, ref, group, transaction)
        except BatchTooLarge as error:
            if len(group) > 1:
                return [*alone, *group], transaction  # each may be small enough
            group[0].fail(error)
            break
        except Exception as error:  # noqa: BLE001  (all that wait for this transaction are told)
            for waiting in group:
                waiting.fail(error)
            break
        if not isinstance(result, DuplicateKeyError):
            for waiting, documents in zip(group, result, strict=True):
                waiting.succeed(AppendResult(documents, replayed=False))
            break
        duplicates = await _duplicates(store, ref, group, result)
        alone += [waiting for waiting in group if waiting in duplicates]
        group = [waiting for waiting in group if waiting not in duplicates]
    return alone, transaction


async def _insert_all(
    store: ConversationStore, ref: ConversationRef, group: list[_Waiting], transaction: Transaction
) -> list[list[bytes]] | DuplicateKeyError:
    """Return the stored documents of each batch, or the error for a message id that is stored already."""
    work = functools.partial(appending.insert, store, ref, [waiting.batch for waiting in group])
    generation = store.kept_pages.generation
    async with store.deadline():  # of the group: no caller's own, which may be nearly over
        try:
            of, batches = await store.run(work, transaction)
        except DuplicateKeyError as error:
            if appending.is_broken_counter(error):
                raise appending.broken_counter(ref.key) from error
            return error
        finally:
            store.doorbell.ring(ref.key)
    await encoded_pages.keep_appended(store, of, [*itertools.chain.from_iterable(batches)], generation)
    return batches


async def _duplicates(
    store: ConversationStore, ref: ConversationRef, group: list[_Waiting], error: DuplicateKeyError
) -> list[_Waiting]:
    """Return the batches of a group of which a message is stored: the one that was refused, and all others.

    The others are looked for outside of the transaction, so one may be missing: it is refused the next time.
    """
    place = (error.details or {}).get("writeErrors", [{}])[0].get("index", 0)
    ends = itertools.accumulate(len(waiting.batch.messages) for waiting in group)
    refused = next(waiting for waiting, end in zip(group, ends, strict=True) if place < end)
    ids = {message_document_id(ref.key, each): waiting for waiting in group for each in waiting.batch.ids}
    named = {"_id": {"$in": list(ids)}, "conversation_id": ref.key}
    try:
        async with store.deadline():
            found = await store.database.read(Message, named, fields=["_id"])
    except ChatHistoryError:
        found = []
    return [refused, *(ids[bson_codec.decode_anything(each)["_id"]] for each in found)]


async def _store_alone(
    store: ConversationStore, ref: ConversationRef, waiting: _Waiting, may_have_committed: bool
) -> None:
    """Store a batch that a group could not take, or answer that an earlier request stored it.

    If a run of the group's transaction may have committed, the messages may be this request's own.
    """
    transaction = Transaction(may_have_committed=may_have_committed, in_one_thread=True)
    try:
        async with store.deadline():
            result = await appending.append_alone(store, ref, waiting.batch, transaction)
    except Exception as error:  # noqa: BLE001  (whatever it is, the one that waits is told)
        waiting.fail(error)
    else:
        waiting.succeed(result)
