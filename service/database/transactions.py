"""Runs transactions, again where they collide or lose their connection, and ends those that were lost.

- The work of a transaction may run several times, so it must be written to run again.
- When a commit ends without an answer, nobody knows whether it took effect. `may_have_committed` tells the
  next run so, which finds out by looking for the ids that it is about to insert
  (`tests/integration/test_decisions.py`).
- A transaction that is open on the server locks its conversation until the server ends it after a minute.
  So an abandoned transaction is aborted, and one that lost its connection has its session killed
  (`tests/integration/test_mongo_outages.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import pymongo
import structlog
from pymongo.client_session import ClientSession
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from service.database.driver import Connection, Session, has_sent, pymongo_session
from service.database.driver_errors import is_outage, is_unavailable, reason, worth_another_run
from service.telemetry import metrics

T = TypeVar("T")
log = structlog.get_logger(__name__)

_RETRY_PAUSE_MAX_S = 0.03
# How often each lost session is killed once the database answers again: a lost statement may arrive late, and
# would open the transaction again. One command kills at most so many.
KILL_ATTEMPTS = 5
_KILLS_AT_ONCE = 1_000
_KILL_INTERVAL_S = 1.0
_KILL_TIMEOUT_S = 1.0
# The pauses while the database does not answer: the first, and the longest, to which they double.
_KILL_PAUSE_S, _KILL_PAUSE_MAX_S = 0.1, 5.0
# The server ends a transaction that is older than 60 s, and looks for such transactions every 30 s. After
# this time a lost session needs no killing.
_SERVER_ENDS_S = 90.0
# The most lost sessions that are kept, so that a long outage does not fill the memory.
_LOST_MAX = 10_000
# For how long no session is killed after the server has refused to kill one.
_REFUSED_S = 600.0
_ABORT_TIMEOUT_S = 2.0
_CLOSE_TIMEOUT_S = 1.0


@dataclass
class Transaction:
    """The argument of a transaction's work: the session, and what an earlier run may have done.

    Work that changes nothing in a run sets `wrote` to False: if the commit of that run ends without an
    answer, there is nothing that may have taken effect. With `in_one_thread` the work waits for nothing but
    `Database.read`, `update`, `insert` and `replace`, so all of it and the commit run in one thread.
    """

    session: Session | None = None
    may_have_committed: bool = False
    wrote: bool = True
    in_one_thread: bool = False


@dataclass(slots=True)
class LostSession:
    """A session whose transaction may still be open on the server, where nobody would end it.

    `in_use` is the session itself, where a thread of the driver was still at work with it.
    """

    id: Mapping[str, Any]
    in_use: ClientSession | None
    since: float
    kills_left: int = KILL_ATTEMPTS

    @property
    def has_sent(self) -> bool:
        """Tell whether the server may know of the transaction."""
        return self.in_use is None or has_sent(self.in_use)


class Transactions:
    """Runs transactions on a connection. `timeout_s` bounds the time in which one is run again."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        # The event loop keeps only weak references to tasks, so these keep them until they are done.
        self._background: set[asyncio.Task[None]] = set()
        self._lost_sessions: dict[bytes, LostSession] = {}
        self._no_kills_until = 0.0
        self._killing: asyncio.Task[None] | None = None

    async def run(
        self, work: Callable[[Transaction], Awaitable[T]], transaction: Transaction | None = None
    ) -> T:
        """Run `work` in a transaction, again where it collided or lost its connection, and commit.

        The writes become visible together, at the commit, or never. If the process dies before the commit,
        nothing happened; if it dies just after, everything did and only the answer is lost, so callers
        retry with a key. A caller that passes `transaction` can read from it, after an exception too,
        whether an attempt may have committed.
        """
        transaction = transaction or Transaction()
        try:
            return await self._run_once(transaction, work)
        except PyMongoError as error:
            if not worth_another_run(error):
                raise
        # The waits are random, so that two transactions that collided do not collide again. They are short
        # and stay short, because a transaction takes milliseconds, and because another process that got the
        # conversation first goes on with its own queue while this one waits.
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(worth_another_run),
            wait=wait_random_exponential(multiplier=0.005, max=_RETRY_PAUSE_MAX_S),
            stop=stop_after_delay(self._timeout_s),
            reraise=True,
        ):
            metrics.count("transaction_retries")
            with attempt:
                return await self._run_once(transaction, work)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def close(self) -> None:
        """Stop killing sessions, and wait, within a bound, for aborts that are under way."""
        if self._killing is not None:
            self._killing.cancel()
            await asyncio.wait([self._killing])
        self._lost_sessions.clear()
        if self._background:
            await asyncio.wait(self._background, timeout=_CLOSE_TIMEOUT_S)

    # -- one run -----------------------------------------------------------------------------------

    async def _run_once(self, transaction: Transaction, work: Callable[[Transaction], Awaitable[T]]) -> T:
        session = self._connection.start_transaction()
        transaction.session = session
        transaction.wrote = True

        async def work_and_commit() -> T:
            result = await work(transaction)
            try:
                # The commit: with its acknowledgement, a majority has everything that `work` wrote in its
                # journal. If the process dies before it, the server aborts the transaction.
                await self._connection.run_in_thread(pymongo_session(session).commit_transaction)
            except PyMongoError:
                # The driver has asked twice already. A refusal may be the answer of a server that
                # restarted and forgot a transaction that it had committed, so it proves nothing either.
                transaction.may_have_committed |= transaction.wrote
                raise
            return result

        try:
            if transaction.in_one_thread:
                # Each change of thread costs the event loop about as much as the driver's part of a command.
                result = await self._connection.run_whole_in_thread(work_and_commit)
            else:
                result = await work_and_commit()
        except BaseException as error:
            await self._abandon_failed(session, error)
            raise
        # Later reads of this process see this commit, also where another primary answers them.
        self._connection.note_commit(pymongo_session(session))
        # The transaction has committed, so this sends nothing, and needs no thread.
        pymongo_session(session).end_session()
        return result

    async def _abandon_failed(self, session: Session, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            # A thread of the driver still works with this session, so it must not be ended here.
            self._lose(session, in_use=True)
            return
        abandoned = self._start(self._abandon(session, lost=isinstance(error, ConnectionFailure)))
        if not is_outage(error):
            # The abort frees the conversation's lock, which the next run would otherwise collide with. In
            # an outage nobody waits for the abort, because the call's time is better spent on an answer.
            await asyncio.shield(abandoned)

    async def _abandon(self, session: Session, *, lost: bool) -> None:
        """Abort, so that the conversation is not locked until the server finds the transaction too old.

        A statement that was lost on its way may still arrive after the abort, when the network heals, and
        would lock the conversation for a minute; so a lost session is killed, and killed again.
        """
        if not has_sent(pymongo_session(session)):
            pymongo_session(session).end_session()  # sends nothing, so it needs no thread
            return
        if lost:
            self._lose(session)
        # The deadline keeps aborts from piling up for as long as the database does not answer.
        with contextlib.suppress(PyMongoError), pymongo.timeout(_ABORT_TIMEOUT_S):
            await session.end_session()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something outside of the call that asked for it, and of its deadline."""
        task = asyncio.create_task(work, context=contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # -- killing lost sessions ---------------------------------------------------------------------

    def _lose(self, session: Session, *, in_use: bool = False) -> None:
        """Have the session killed. Where too many are lost, the oldest is forgotten."""
        now, own = time.monotonic(), pymongo_session(session)
        if now < self._no_kills_until:
            return
        if len(self._lost_sessions) >= _LOST_MAX:
            self._lost_sessions.pop(next(iter(self._lost_sessions)))
        key = bytes(own.session_id["id"])
        self._lost_sessions[key] = LostSession(own.session_id, own if in_use else None, now)
        if self._killing is None or self._killing.done():
            self._killing = self._start(self._kill_lost_sessions())

    async def _kill_lost_sessions(self) -> None:
        """Kill the lost sessions once a second, while the database answers, a few times each."""
        pause = _KILL_PAUSE_S
        while self._lost_sessions and self._connection.is_connected:
            chosen = self._next_to_kill()
            try:
                if chosen:
                    with pymongo.timeout(_KILL_TIMEOUT_S):
                        ids = [self._lost_sessions[key].id for key in chosen]
                        await self._connection.command("killSessions", ids)
            except PyMongoError as error:
                if isinstance(error, OperationFailure) and not is_unavailable(error):
                    self._give_up_killing(error)
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, _KILL_PAUSE_MAX_S)
                continue
            pause = _KILL_PAUSE_S
            for key in chosen:
                # Another task may have removed it, or replaced it, while the command ran.
                lost = self._lost_sessions.get(key)
                if lost is not None:
                    lost.kills_left -= 1
                    if not lost.kills_left:
                        del self._lost_sessions[key]
            await asyncio.sleep(_KILL_INTERVAL_S)

    def _next_to_kill(self) -> list[bytes]:
        """Choose the sessions to kill next, least killed first; forget the sessions that need no kill."""
        now = time.monotonic()
        # By then the thread that was at work with a session has given up, and sends nothing any more.
        settled_s = 2 * self._timeout_s
        for key, lost in list(self._lost_sessions.items()):
            if now - lost.since > (_SERVER_ENDS_S if lost.has_sent else min(settled_s, _SERVER_ENDS_S)):
                del self._lost_sessions[key]
        sent = [key for key, lost in self._lost_sessions.items() if lost.has_sent]
        return sorted(sent, key=lambda key: -self._lost_sessions[key].kills_left)[:_KILLS_AT_ONCE]

    def _give_up_killing(self, error: OperationFailure) -> None:
        """Take a refusal for the answer: this user, or this MongoDB, kills no sessions."""
        self._lost_sessions.clear()
        self._no_kills_until = time.monotonic() + _REFUSED_S
        log.warning("sessions_not_killed", code=error.code, reason=reason(error), again_in_s=_REFUSED_S)


# -- views: one point in time for several reads -----------------------------------------------------

# A transaction that wrote to two shards becomes visible on one of them first. A majority read does not wait
# for the other, so it could show a later message while an earlier one still appears. A snapshot waits.
_VIEW: ContextVar[ClientSession | None] = ContextVar("view", default=None)


def view_session() -> ClientSession | None:
    """Return the session of the view that the running call reads in, or None."""
    return _VIEW.get()


@contextlib.asynccontextmanager
async def snapshot_view(connection: Connection) -> AsyncIterator[None]:
    """Let all reads inside see the point in time that the server chooses at the first of them."""
    view = connection.snapshot_session()
    before = _VIEW.set(view)
    in_use = False
    try:
        yield
    except asyncio.CancelledError:
        in_use = True  # by a thread of the driver, which may still be reading
        raise
    finally:
        _VIEW.reset(before)
        if not in_use:
            # This gives the session back to the driver's pool, and sends nothing. A session that is in use is
            # left to the server, which forgets it.
            view.end_session()
