"""The service module on mongomock: rules and shapes only, for mongomock has no transactions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import bson
import pytest
from beanie import Document, init_beanie
from mongomock_motor import AsyncMongoMockClient
from pymongo.errors import BulkWriteError, DuplicateKeyError

from service.chat_service import ChatService
from service.database import Database, IndexPolicy, Transaction
from service.documents import Conversation, Message
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import TenantScope


class MockDatabase(Database):
    """Runs the work of a transaction once, without one; what it would roll back stays."""

    async def open(self, *, indexes: IndexPolicy = "require") -> None:  # noqa: ARG002
        client: Any = AsyncMongoMockClient(tz_aware=True)
        await init_beanie(client["unit"], document_models=[Conversation, Message])
        await Conversation.find_all().delete()
        await Message.find_all().delete()

    def require_free_disk(self) -> None:
        """There is always room in memory."""

    async def secret(self) -> bytes:
        return b"the same in every test"

    @contextlib.asynccontextmanager
    async def deadline(self, *, seconds: float | None = None) -> AsyncIterator[None]:  # noqa: ARG002
        yield

    async def transaction(self, work: Any, transaction: Transaction | None = None) -> Any:
        return await work(transaction or Transaction())

    async def read(self, document: type[Document], query: Any, **options: Any) -> list[bytes]:
        cursor = document.get_motor_collection().find(dict(query))
        if options.get("sort"):
            cursor = cursor.sort(list(options["sort"]))
        if options.get("limit"):
            cursor = cursor.limit(options["limit"])
        return [bson.encode(each) for each in await cursor.to_list(None)]

    async def update(
        self, document: type[Document], query: Any, changes: Any, _session: Any, _fields: Any = None
    ) -> bytes | None:
        result = await document.get_motor_collection().update_one(query, changes)
        found = await self.read(document, {"_id": query["_id"]}) if result.matched_count else []
        return found[0] if found else None

    async def insert(self, document: type[Document], documents: Sequence[bytes], _session: Any) -> None:
        options: bson.CodecOptions[dict[str, Any]] = bson.CodecOptions(tz_aware=True)
        decoded = [bson.decode(each, options) for each in documents]
        try:
            await document.get_motor_collection().insert_many(decoded)
        except BulkWriteError as error:
            raise DuplicateKeyError(str(error)) from error


@pytest.fixture(scope="session")
def documents() -> None:
    """Let the documents' models be used, which Beanie refuses to before it knows a database."""
    client: Any = AsyncMongoMockClient(tz_aware=True)
    asyncio.run(init_beanie(client["unit"], document_models=[Conversation, Message]))


@pytest.fixture
async def chat() -> ChatService:
    settings = Settings(_env_file=None)
    database = MockDatabase(settings)
    await database.open()
    return ChatService(ConversationStore(database, settings), TenantScope())
