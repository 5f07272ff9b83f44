"""The doorbell: wakes those who follow a conversation, or a list, when something may have changed.

It carries no data. Whoever is woken reads the database, so a ring that is lost costs time and never a
message, and a ring too many costs a read.

- Each write of this process rings when its transaction has ended.
- One change stream rings for the writes of other processes. It is open only while somebody listens, because a
  watcher slows every write on the embedded engine. Whenever it opens, it rings for everybody, because what
  happened before is not known.
- A poll finds what both have missed: every second where there is no change stream, else seldom.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import structlog

from service.database import Change, Database
from service.documents import Conversation
from service.errors import ChatHistoryError
from service.formats import bson_codec
from service.formats.strict_json import Json

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

log = structlog.get_logger(__name__)

# The time between two polls: without a change stream, and with one.
_POLL_S, _POLL_BESIDE_WATCH_S = 1.0, 20.0
# How many conversations one query of the poll names.
_POLLED_AT_ONCE = 100
# The time until a change stream that failed is opened again, and the most of it: it doubles.
_REOPEN_S, _REOPEN_S_MAX = 1.0, 60.0
# How long the change stream stays open when nobody listens, so that a reader who returns finds it open.
_LINGER_S = 5.0
# The most conversations that wait for one who follows a list; with more, the list must be read again.
_PENDING_MOST = 1_000


class Bell:
    """The bell of one who listens. It stays rung until `wait` returns."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self.closed = False

    def ring(self) -> None:
        """Wake the one who listens, now or at the next `wait`."""
        self._rung.set()

    async def wait(self, seconds: float | None = None) -> None:
        """Return when it was rung since the last `wait`, or after so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        self._rung.clear()


class ListBell(Bell):
    """The bell of one who follows a list, with the conversations that changed, each once.

    `lost` says that not all of them are known, so that the list must be read again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pending: OrderedDict[str, Change] = OrderedDict()
        self.lost = False

    def note(self, change: Change) -> None:
        """Remember a change until it is taken; one that was created and then changed is a created one."""
        if change.kind == "removed":
            return  # that it was deleted was told before
        before = self.pending.pop(change.key, None)
        if before is not None and (before.kind, change.kind) == ("created", "changed"):
            change = before
        self.pending[change.key] = change
        if len(self.pending) > _PENDING_MOST:
            self.lose()
        self.ring()

    def lose(self) -> None:
        """Forget what waits, because it is not all."""
        self.pending.clear()
        self.lost = True
        self.ring()


class Doorbell:
    """The bells of one process, and what rings them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._bells: dict[str, set[Bell]] = {}
        self._lists: set[ListBell] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._linger: asyncio.TimerHandle | None = None
        self._watching = False
        self._closed = False

    # -- listening ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hearing(self, key: str) -> Iterator[Bell]:
        """Listen to one conversation. Whatever happens from now on rings."""
        bell = Bell()
        self._bells.setdefault(key, set()).add(bell)
        self._began(bell)
        try:
            yield bell
        finally:
            bells = self._bells[key]
            bells.discard(bell)
            if not bells:
                del self._bells[key]
            self._ended()

    @contextlib.contextmanager
    def hearing_all(self) -> Iterator[ListBell]:
        """Listen to all conversations of all tenants. Only the change stream tells which have changed."""
        bell = ListBell()
        self._lists.add(bell)
        self._began(bell)
        try:
            yield bell
        finally:
            self._lists.discard(bell)
            self._ended()

    def ring(self, key: str) -> None:
        """Wake those who listen to a conversation."""
        for bell in self._bells.get(key, ()):
            bell.ring()

    def close(self) -> None:
        """Tell all who listen that the service ends, and listen to nothing any more."""
        self._closed = True
        for bell in self._all():
            bell.closed = True
            bell.ring()
        self._stop()

    def _all(self) -> list[Bell]:
        return [*self._lists, *(bell for bells in self._bells.values() for bell in bells)]

    def _began(self, bell: Bell) -> None:
        if self._closed:
            bell.closed = True
            bell.ring()
            return
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if not self._tasks:
            self._start(self._watch())
            self._start(self._poll())

    def _ended(self) -> None:
        if not self._bells and not self._lists and not self._closed:
            self._linger = asyncio.get_running_loop().call_later(_LINGER_S, self._stop)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # In a context of its own, because a deadline of the caller's would end it.
        self._tasks.append(asyncio.create_task(work, context=contextvars.Context()))

    def _stop(self) -> None:
        self._linger = None
        self._watching = False
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    # -- what rings --------------------------------------------------------------------------------

    async def _watch(self) -> None:
        pause_s = _REOPEN_S
        while True:
            try:
                await self._database.watch(self._opened, self._changed)
            except Exception as error:  # noqa: BLE001  (whatever it is, the poll goes on, and this is tried again)
                log.warning("changes_not_watched", error=type(error).__name__, again_in_s=pause_s)
            pause_s = _REOPEN_S if self._watching else min(2 * pause_s, _REOPEN_S_MAX)
            self._watching = False
            await asyncio.sleep(pause_s)

    def _opened(self) -> None:
        self._watching = True
        for bell in self._all():
            bell.ring()
        for each in self._lists:
            each.lose()

    def _changed(self, change: Change) -> None:
        self.ring(change.key)
        for each in self._lists:
            each.note(change)

    async def _poll(self) -> None:
        """Ring for each conversation of which another version is stored than at the last look."""
        versions: dict[str, Any] = {}
        while True:
            await asyncio.sleep(_POLL_BESIDE_WATCH_S if self._watching else _POLL_S)
            if not self._watching:
                for each in self._lists:
                    each.lose()
            with contextlib.suppress(ChatHistoryError):  # those who listen meet the same error, and tell it
                stored = await self._versions(list(self._bells))
                for key in self._bells:
                    if versions.get(key) != stored.get(key):
                        self.ring(key)
                versions = stored

    async def _versions(self, keys: list[str]) -> dict[str, Any]:
        """Return what changes with each conversation's history, its owner and its end among it."""
        found: dict[str, Any] = {}
        for begin in range(0, len(keys), _POLLED_AT_ONCE):
            query: Json = {"_id": {"$in": keys[begin : begin + _POLLED_AT_ONCE]}}
            async with self._database.deadline():
                documents = await self._database.read(Conversation, query, fields=["version", "user_id"])
            for each in map(bson_codec.decode_anything, documents):
                found[each["_id"]] = each
        return found
