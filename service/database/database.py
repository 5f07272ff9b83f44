"""Bounds every call to MongoDB by a deadline, and reads and writes documents as bytes.

- Every write is part of a transaction that commits with write concern `majority`, journalled. Every read is
  from the primary with read concern `majority`, so a fail-over cannot take back what was once read.
- A read outside of a transaction waits until the server has what this process was told is committed, or what
  a token says another process was told of (`read_after`), so a new primary, or one that was cut off, does not
  answer with an older view. On a cluster all reads inside one
  `one_view` see the same point in time (`tests/integration/test_views.py`).
- All database work inside one `deadline` shares one deadline, counted from its beginning. Only the
  errors of `service.errors` leave a call, never an error of the driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import pymongo
from beanie import Document
from bson.errors import InvalidBSON
from pydantic import ValidationError
from pymongo.errors import PyMongoError

from service.database import changes, raw_documents
from service.database.changes import Change
from service.database.driver import (
    READ_AFTER,
    Session,
    pymongo_collection,
    pymongo_session,
)
from service.database.driver_errors import NO_ANSWER, domain_error
from service.database.opening import OpenDatabase
from service.database.raw_documents import Budget
from service.database.shared import commit_of, token_of
from service.database.transactions import Transaction, snapshot_view, view_session
from service.embedded.data_directory import require_free_disk
from service.errors import (
    DatabaseUnavailable,
    MalformedDocument,
)
from service.formats.bson_codec import iter_documents

T = TypeVar("T")

# The event loop's deadline is later than the driver's by this, so that the driver can end its call by itself.
_GRACE_S = 0.2


class Database(OpenDatabase):
    """One MongoDB: deadlines, transactions, and reading and writing documents as bytes."""

    @property
    def limit_reads_whole_match(self) -> bool:
        """Tell whether the engine reads all documents that a filter matches, also where a limit is set.

        SecantusDB does, so there the filter itself must be bounded.
        """
        return self.embedded_engine

    # -- calls -------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def deadline(self, *, seconds: float | None = None) -> AsyncIterator[None]:
        """Bound all database work inside by one deadline, and turn the driver's errors into the domain's.

        `seconds` is for work that no client waits for; without it the setting counts. Raises
        DatabaseUnavailable, StorageFull, UnsuitableDatabase or MalformedDocument.
        """
        self.require_prepared()
        seconds = seconds or self._timeout_s()
        try:
            # The driver keeps its deadline in everything but connecting. There the event loop's deadline
            # ends the call, and leaves the driver's thread to end by itself.
            async with asyncio.timeout(seconds + _GRACE_S):
                with pymongo.timeout(seconds):
                    yield
        except TimeoutError as error:
            raise DatabaseUnavailable(NO_ANSWER) from error
        except PyMongoError as error:
            raise domain_error(error) from error
        except (ValidationError, InvalidBSON) as error:
            raise MalformedDocument(
                "A stored document that this call reads is not well formed. It was changed by hand."
            ) from error

    def one_view(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Let all reads inside, outside of transactions, see one point in time on a cluster.

        A replica set shows a transaction at once, so there the reads stay as they are.
        """
        return snapshot_view(self._connection) if self.sharded else contextlib.nullcontext()

    async def transaction(
        self, work: Callable[[Transaction], Awaitable[T]], transaction: Transaction | None = None
    ) -> T:
        """Run `work` in a transaction and commit, as `Transactions.run` says."""
        return await self._transactions.run(work, transaction)

    async def statistics(self) -> Mapping[str, Any]:
        """Return the server's `dbStats`. The embedded engine reads every document for it."""
        statistics: dict[str, Any] = await self._connection.database().command("dbStats")
        return statistics

    async def estimated_count(self, document: type[Document]) -> int:
        """Return how many documents the server says that it has, without counting them."""
        return await self._connection.run_in_thread(pymongo_collection(document).estimated_document_count)

    async def watch(self, opened: Callable[[], None], changed: Callable[[Change], None]) -> None:
        """Call `opened`, and then `changed` for each change of a conversation, until cancelled.

        Raises the domain's errors where there is no change stream, or no more.
        """
        self.require_prepared()
        try:
            await changes.watch(self._connection, opened, changed)
        except PyMongoError as error:
            raise domain_error(error) from error

    def require_free_disk(self) -> None:
        """Raise StorageFull while the embedded engine's disk is all but full."""
        require_free_disk(self._settings)

    @property
    def commit_token(self) -> str | None:
        """The token of the latest commit that this process was told of, for reads of other processes.

        None on the embedded engine, whose reads all see every commit.
        """
        commit = self._connection.committed
        if self.embedded_engine or self._secret is None or commit is None or not commit.cluster_time:
            return None
        return token_of(commit, self._secret)

    def read_after(self, token: str) -> None:
        """Let the reads of the running call see the commit of this token. Raises InvalidRequest."""
        if self._secret is not None and not self.embedded_engine:
            READ_AFTER.set(commit_of(token, self._secret))

    # -- documents as bytes ------------------------------------------------------------------------

    async def read(
        self,
        document: type[Document],
        query: Mapping[str, Any],
        *,
        sort: Sequence[tuple[str, int]] = (),
        limit: int = 0,
        session: Session | None = None,
        fields: Sequence[str] | None = None,
        budget: Budget | None = None,
    ) -> list[bytes]:
        """Find documents as the BSON that the server sent, undecoded: whole, or only some of their fields.

        Without a session it is a majority read that sees every commit that this process was told of, or it
        sees the point in time of `one_view`.

        With a budget the list ends before the first document that does not fit. The server sends at most
        16 MiB in one batch and is not asked for a batch after that document, so the memory used is bounded by
        the budget and one batch, and small documents still come with one command.
        """
        find = functools.partial(
            raw_documents.find,
            pymongo_collection(document),
            query,
            fields,
            sort=sort,
            limit=limit,
            budget=budget,
        )
        own_session = view_session() if session is None else pymongo_session(session)

        def find_after_commits() -> list[bytes]:
            with self._connection.session_after_commits() as within:
                return find(within)

        # The embedded engine is one server, which has its own commits.
        if own_session is None and not self.embedded_engine:
            return await self._connection.run_in_thread(find_after_commits)
        return await self._connection.run_in_thread(functools.partial(find, own_session))

    async def pages(
        self,
        document: type[Document],
        query: Mapping[str, Any],
        *,
        size: int,
        sort: Sequence[tuple[str, int]] = (),
        fields: Sequence[str] | None = None,
        seconds: float | None = None,
    ) -> AsyncIterator[list[bytes]]:
        """Find any number of documents, and yield them undecoded, at most `size` at a time.

        Only one page is held in memory. Each command has a deadline of its own (`seconds`, or the setting).
        It is a read outside of transactions, of what a majority has. The driver closes the cursor of a
        generator that is not read to its end.
        """
        cursor: Any = None
        while True:
            async with self.deadline(seconds=seconds):
                if cursor is None:
                    collection = pymongo_collection(document)
                    cursor = collection.find_raw_batches(
                        query, fields, batch_size=size, sort=list(sort) or None
                    )
                batch = await self._connection.run_in_thread(functools.partial(next, cursor, None))
            if batch is None:
                return
            if found := list(iter_documents(batch)):
                yield found

    async def update(
        self,
        document: type[Document],
        query: Mapping[str, Any],
        changes: Mapping[str, Any],
        session: Session | None,
        fields: Sequence[str] | None = None,
    ) -> bytes | None:
        """Update one document and return it as it is then stored, undecoded, or None if there is none.

        With `fields` only the `_id` and these fields are returned, so a large field is not moved.
        """
        update = raw_documents.update_and_find if self.embedded_engine else raw_documents.find_one_and_update
        arguments = (pymongo_collection(document), query, changes, fields, pymongo_session(session))
        return await self._connection.run_in_thread(functools.partial(update, *arguments))

    async def update_if_equal(
        self,
        document: type[Document],
        key: str,
        expected: Mapping[str, Any],
        changes: Mapping[str, Any],
        session: Session | None,
    ) -> bool:
        """Change the document with this `_id` if the expected fields still have these values.

        Returns whether it has; `changes` are new values, or expressions of the aggregation.
        """
        arguments = (pymongo_collection(document), key, expected, changes, pymongo_session(session))
        return await self._connection.run_in_thread(
            functools.partial(raw_documents.update_if_equal, *arguments)
        )

    async def insert(
        self, document: type[Document], documents: Sequence[bytes], session: Session | None
    ) -> None:
        """Insert documents that are BSON already. Raises DuplicateKeyError where an `_id` is taken."""
        arguments = (pymongo_collection(document), documents, pymongo_session(session))
        await self._connection.run_in_thread(functools.partial(raw_documents.insert_many, *arguments))

    async def replace(
        self, document: type[Document], documents: Sequence[bytes], session: Session | None
    ) -> None:
        """Replace the messages that have the ids of these, which are BSON already."""
        arguments = (pymongo_collection(document), documents, "conversation_id", pymongo_session(session))
        await self._connection.run_in_thread(functools.partial(raw_documents.replace_many, *arguments))
