"""The plain design: the chat history that people write with FastAPI and SQLModel, as an expert writes it.

Two tables, `AsyncSession`, response models, an index for each query. It has the paths, bodies and answers of the
service for what is measured, but none of its promises: no idempotency key, no order beyond the clock, no lock. Run
with uvicorn; `BENCH_SQL_URL` names the database.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import uuid4

from fastapi import Depends, FastAPI, HTTPException, Query
from pydantic import BaseModel, ConfigDict
from pydantic import Field as ReadFrom
from sqlalchemy import JSON, Column, DateTime, event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlmodel import Field, Index, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession


def _now() -> datetime:
    return datetime.now(UTC)


def _time() -> Any:
    return DateTime(timezone=True)


class Conversation(SQLModel, table=True):
    """A conversation; its index serves the list of a user's conversations, newest first."""

    __table_args__ = (Index("of_user", "user_id", "updated_at", "id"),)
    id: str = Field(primary_key=True)
    user_id: str
    title: str | None = None
    about: dict[str, Any] = Field(default_factory=dict, sa_column=Column("metadata", JSON, nullable=False))
    created_at: datetime = Field(default_factory=_now, sa_type=_time())
    updated_at: datetime = Field(default_factory=_now, sa_type=_time())
    last_seq: int = 0
    message_count: int = 0


class Message(SQLModel, table=True):
    """A message; its index serves pages and the newest messages."""

    __table_args__ = (Index("of_conversation", "conversation_id", "created_at", "id"),)
    id: str = Field(primary_key=True)
    conversation_id: str = Field(foreign_key="conversation.id")
    user_id: str
    seq: int
    created_at: datetime = Field(default_factory=_now, sa_type=_time())
    role: str
    content: str | None = None
    tool_calls: list[Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    tool_call_id: str | None = None
    name: str | None = None


class NewConversation(SQLModel):
    """The body that creates a conversation."""

    user_id: str
    id: str
    title: str | None = None


class NewMessage(SQLModel):
    """The body that appends a message."""

    role: str
    content: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class _Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class ConversationOut(_Answer):
    """A conversation as it is answered."""

    id: str
    user_id: str
    title: str | None
    metadata: dict[str, Any] = ReadFrom(validation_alias="about")  # the ORM has another `metadata`
    created_at: datetime
    updated_at: datetime
    last_seq: int
    message_count: int


class MessageOut(_Answer):
    """A message as it is answered."""

    id: str
    conversation_id: str
    user_id: str
    seq: int
    created_at: datetime
    role: str
    content: str | None
    tool_calls: list[Any] | None
    tool_call_id: str | None
    name: str | None


class ConversationPage(_Answer):
    """A page of conversations."""

    data: list[ConversationOut]
    has_more: bool
    next: str | None


class MessagePage(_Answer):
    """A page of messages."""

    data: list[MessageOut]
    has_more: bool
    next: str | None


def make_engine(url: str) -> AsyncEngine:
    """Open the database as an expert would: durable, and with a connection for each of 16 clients."""
    if url.startswith("sqlite"):
        engine = create_async_engine(url)
        event.listen(engine.sync_engine, "connect", _make_durable)
        return engine
    # The planner's compiler costs more than such queries do.
    return create_async_engine(
        url, pool_size=16, max_overflow=0, connect_args={"server_settings": {"jit": "off"}}
    )


def _make_durable(connection: Any, _: Any) -> None:
    for setting in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine = make_engine(os.environ["BENCH_SQL_URL"])
    app.state.sessions = async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)
    yield
    await engine.dispose()


app = FastAPI(lifespan=_lifespan)


async def _session() -> AsyncIterator[AsyncSession]:
    async with app.state.sessions() as session:
        yield session


Session = Annotated[AsyncSession, Depends(_session)]


async def _conversation(session: Session, conversation_id: str) -> Conversation:
    found = await session.get(Conversation, conversation_id)
    if found is None:
        raise HTTPException(404, "There is no such conversation.")
    return found


Found = Annotated[Conversation, Depends(_conversation)]


@app.post("/conversations", status_code=201, response_model=ConversationOut)
async def create_conversation(session: Session, body: NewConversation) -> Conversation:
    """Create a conversation."""
    conversation = Conversation(id=body.id, user_id=body.user_id, title=body.title)
    session.add(conversation)
    await session.commit()
    return conversation


@app.get("/conversations", response_model=ConversationPage)
async def list_conversations(
    session: Session, user_id: str, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    """List the conversations of a user, newest first."""
    newest = (col(Conversation.updated_at).desc(), col(Conversation.id).desc())
    query = select(Conversation).where(Conversation.user_id == user_id).order_by(*newest).limit(limit + 1)
    found = (await session.exec(query)).all()
    more = len(found) > limit
    return {"data": found[:limit], "has_more": more, "next": found[limit - 1].id if more else None}


@app.post(
    "/conversations/{conversation_id}/messages",
    status_code=201,
    response_model=MessageOut,
    response_model_exclude_none=True,
)
async def add_message(session: Session, conversation: Found, body: NewMessage) -> Message:
    """Append a message."""
    conversation.last_seq += 1
    conversation.message_count += 1
    conversation.updated_at = _now()
    message = Message(
        id=f"msg_{uuid4().hex}",
        conversation_id=conversation.id,
        user_id=conversation.user_id,
        seq=conversation.last_seq,
        **body.model_dump(),
    )
    session.add(message)
    await session.commit()
    return message


@app.get(
    "/conversations/{conversation_id}/messages",
    response_model=MessagePage,
    response_model_exclude_none=True,
)
async def read_messages(
    session: Session,
    conversation: Found,
    last: Annotated[int | None, Query(ge=1, le=1000)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Read the newest messages, or the first page."""
    order = (col(Message.created_at), col(Message.id))
    query = select(Message).where(Message.conversation_id == conversation.id)
    if last is not None:
        newest = query.order_by(*(each.desc() for each in order)).limit(last + 1)
        found = list(reversed((await session.exec(newest)).all()))
        return {"data": found[-last:], "has_more": len(found) > last, "next": found[-1].id if found else None}
    found = list((await session.exec(query.order_by(*order).limit(limit + 1))).all())
    more = len(found) > limit
    return {"data": found[:limit], "has_more": more, "next": found[limit - 1].id if more else None}
