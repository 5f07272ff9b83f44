"""Preconditions of a write: the version, or the last message, on which the caller based its decision.

A condition is judged by the transaction's first update, which locks the conversation, so nothing can come
between the judgement and the write. A write that fails it is undone. What that transaction saw may not be
durable, so another one, which commits, finds out what is answered: that an earlier request did the very same
already (a replay), that the conversation has changed (`Stale`), or that neither is so any more, and the write
is tried again (test_conditional_requests).
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from service.database import Budget, Transaction
from service.database.driver_errors import NO_ANSWER
from service.errors import DatabaseUnavailable, Stale
from service.formats.strict_json import Json
from service.history import records, seq_range
from service.history.records import ConversationState
from service.history.seq_range import SeqRange
from service.history.store import ConversationStore
from service.tenancy import ConversationRef

T = TypeVar("T")
# How much of what a caller missed an answer has.
_MISSED_ITEMS = 100
_MISSED_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Condition:
    """What must be true of a conversation: its version is one of these, and no message is behind this seq.

    A seq that is the conversation's `last_seq` is right, too, if that message has been deleted.
    """

    versions: frozenset[int] | None = None
    last_seq: int | None = None


async def require(
    store: ConversationStore,
    condition: Condition | None,
    of: ConversationState,
    transaction: Transaction,
) -> None:
    """Raise Stale unless the conversation met the condition before this transaction changed it."""
    if condition is not None and not await _is_met(store, condition, of, transaction):
        raise _stale(of)


def before(of: ConversationState, *, versions: int = 1, appended: int = 0) -> ConversationState:
    """Return the state as it was before the transaction's first update counted a change."""
    return replace(of, version=of.version - versions, last_seq=of.last_seq - appended)


async def _is_met(
    store: ConversationStore, condition: Condition, of: ConversationState, transaction: Transaction
) -> bool:
    if condition.versions is not None and of.version not in condition.versions:
        return False
    expected = condition.last_seq
    if expected is None or expected == of.last_seq:
        return True
    if expected > of.last_seq:
        return False
    # A conversation that this very transaction deletes has no owner any more.
    behind = SeqRange(of.key, expected, of.last_seq, owner=of.owner or None)
    return not await seq_range.read(store, behind, 1, backwards=False, transaction=transaction)


async def run_exclusive(
    store: ConversationStore,
    ref: ConversationRef,
    work: Callable[[Transaction], Awaitable[T]],
    condition: Condition | None,
) -> T:
    """Run a transaction that requires the condition, as `ConversationStore.run_exclusive` does.

    Raises Stale. If the commit of an earlier run had no answer, nobody can tell whether this very write has
    changed the conversation, and the answer is DatabaseUnavailable.
    """
    transaction = Transaction()
    while True:  # until the deadline of the call
        try:
            return await store.run_exclusive(ref, work, transaction)
        except Stale as error:
            if transaction.may_have_committed:
                raise DatabaseUnavailable(NO_ANSWER) from error
            await refuse_stale(store, ref, condition)


async def refuse_stale(store: ConversationStore, ref: ConversationRef, condition: Condition | None) -> None:
    """Raise Stale, with the messages that the caller missed, if there is a condition that is not met.

    It is decided in a transaction that commits. Raises ConversationNotFound.
    """
    if condition is None:
        return
    of, is_met = await store.read_committed(functools.partial(_judge, store, ref, condition))
    if not is_met:
        raise _stale(of, await _missed(store, condition, of))


def _stale(of: ConversationState, missed: list[Json] | None = None) -> Stale:
    return Stale(
        "The conversation has changed since it was read. Read what is new, decide again, and repeat the "
        "request with the new `If-Match` or `expected_last_seq`.",
        version=of.version,
        last_seq=of.last_seq,
        missed=missed,
    )


async def _judge(
    store: ConversationStore, ref: ConversationRef, condition: Condition, transaction: Transaction
) -> tuple[ConversationState, bool]:
    of = await store.state(ref, transaction)
    return of, await _is_met(store, condition, of, transaction)


async def _missed(store: ConversationStore, condition: Condition, of: ConversationState) -> list[Json] | None:
    """Return the first messages behind the seq that the caller knew; None where it named only a version."""
    if condition.last_seq is None:
        return None
    behind = SeqRange(of.key, min(condition.last_seq, of.last_seq), of.last_seq, owner=of.owner)
    budget = Budget(_MISSED_BYTES, untouched=False)  # also the first one must fit
    found = await seq_range.read(store, behind, _MISSED_ITEMS, backwards=False, budget=budget)
    return records.messages(found)
