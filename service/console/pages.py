"""The pages that show something: the lists, a conversation, one message, the downloads, the state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse

from service.access.authentication import Principal
from service.api import bodies, dependencies, live
from service.api.dependencies import Chat
from service.chat_service import ChatService, ContextRequest, ConversationRecord, LiveEvent, MessagePage
from service.console import rendering, showing
from service.formats.json_answers import dumps, timestamp
from service.formats.strict_json import Json

router = APIRouter(include_in_schema=False)
_LIST_ITEMS = 30
_MESSAGES = 40
# How many messages before a linked one are shown, so that the reader sees what it answers.
_BEFORE_LINKED = 5
_SEQ_MAX = 2**53
Seq = Annotated[int, Field(ge=0, le=_SEQ_MAX)]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ListQuery(_Query):
    """Which conversations: of a user, with a word in the title, behind a cursor."""

    user: str = ""
    title: str = ""
    cursor: str | None = None


class ConversationQuery(_Query):
    """Which messages of a conversation: the newest, those before or after a `seq`, or those around one."""

    id: str
    before: Seq | None = None
    after: Seq | None = None
    seq: Seq | None = None


class EventsQuery(_Query):
    """What happens to a conversation, for a page that has the messages up to a `seq`."""

    id: str
    after: Seq


class MessageQuery(_Query):
    """One message."""

    id: str
    message: str


class DownloadQuery(_Query):
    """A conversation as a file."""

    id: str
    form: Literal["ndjson", "json", "markdown"]


class ContextQuery(_Query):
    """What a model is to be sent of a conversation: at most so many tokens."""

    id: str
    tokens: Annotated[int, Field(ge=1, le=_SEQ_MAX)] = 8_000


class FileQuery(_Query):
    """The version of a file, which only makes its address a new one."""

    v: str = ""


# -- the way in ------------------------------------------------------------------------------------


@router.get("/")
async def root(request: Request) -> Response:
    """Lead browsers to the console; for other clients there is nothing here."""
    if "text/html" not in request.headers.get("accept", ""):
        raise HTTPException(404)
    return RedirectResponse("console/")


@router.get("/console")
async def without_slash() -> Response:
    """Lead to the address to which the links of the pages are relative."""
    return RedirectResponse("console/")


@router.get("/console/{name}.css")
@router.get("/console/{name}.js")
async def static_file(
    request: Request, name: str, _: Annotated[FileQuery, dependencies.query(FileQuery)]
) -> Response:
    """Return a file of the pages."""
    found = rendering.FILES.get(request.url.path.rpartition("/")[2])
    if found is None or name != "console":
        raise HTTPException(404)
    media_type, content = found
    return Response(content, media_type=media_type, headers={"Cache-Control": "max-age=31536000, immutable"})


# -- conversations ---------------------------------------------------------------------------------


@router.get("/console/")
async def conversations(
    request: Request, chat: Chat, query: Annotated[ListQuery, dependencies.query(ListQuery)]
) -> Response:
    """List the conversations of a user, or to an administrator those of all users, latest activity first."""
    principal: Principal = request.state.principal
    user = principal.scope.user_id or query.user or None
    shown: dict[str, Any] = {"query": query, "user": user, "rows": None, "next": ""}
    if user is not None or "admin" in principal.permissions:
        if user is not None:
            dependencies.audit(request, user)
        after = bodies.position(query.cursor) if query.cursor else None
        page = await chat.list_conversations(user, limit=_LIST_ITEMS, after=after)
        shown["rows"] = [each for each in page.conversations if _has_words(each, query.title)]
        shown["next"] = bodies.cursor(page.next) if page.next else ""
    return await rendering.page(request, "conversations.html", **shown)


def _has_words(conversation: ConversationRecord, words: str) -> bool:
    return words.strip().casefold() in (conversation.title or "").casefold()


async def named_conversation(request: Request, chat: Chat, conversation_id: str) -> ConversationRecord:
    """Return a conversation, and name it and its user for the audit trail, which names the missing, too."""
    dependencies.audit(request, "", conversation_id)
    found = await chat.get_conversation(conversation_id)
    dependencies.audit(request, found.user_id, conversation_id)
    return found


@router.get("/console/conversation")
async def conversation(
    request: Request, chat: Chat, query: Annotated[ConversationQuery, dependencies.query(ConversationQuery)]
) -> Response:
    """Show a conversation: the newest messages, or those around a `seq`."""
    dependencies.audit(request, "", query.id)
    # At once, because a person waits for both.
    found, (page, earlier, later) = await asyncio.gather(
        chat.get_conversation(query.id), _messages(chat, query)
    )
    dependencies.audit(request, found.user_id, query.id)
    messages: list[Json] = list(map(orjson.loads, page.messages))
    return await rendering.page(
        request,
        "conversation.html",
        conversation=found,
        metadata=showing.indented(found.metadata) if found.metadata else "",
        messages=messages,
        earlier=messages[0]["seq"] if earlier and messages else None,
        later=messages[-1]["seq"] if later and messages else None,
        last_seq=max([found.last_seq, *(each["seq"] for each in messages)]),
        linked=query.seq,
    )


async def _messages(chat: ChatService, query: ConversationQuery) -> tuple[MessagePage[bytes], bool, bool]:
    """Return a page of messages, oldest first, and whether there may be earlier and later ones."""
    if query.before is not None:
        page = await chat.get_encoded_history(query.id, limit=_MESSAGES, order="desc", before=query.before)
        page.messages.reverse()
        return page, page.has_more, True
    after = max(0, query.seq - _BEFORE_LINKED - 1) if query.seq is not None else query.after
    if after is not None:
        page = await chat.get_encoded_history(query.id, limit=_MESSAGES, after=after)
        return page, after > 0, page.has_more
    page = await chat.get_encoded_history(query.id, last=_MESSAGES)
    return page, page.has_more, False


@router.get("/console/events")
async def events(
    request: Request, chat: Chat, query: Annotated[EventsQuery, dependencies.query(EventsQuery)]
) -> Response:
    """Send what happens to a conversation while its page is open, as the API does, with messages as HTML."""
    dependencies.audit(request, "", query.id)
    parts = chat.follow_chat_history(query.id, after=query.after)
    return await live.stream(request, _as_html(parts, query.id), lambda event: event)


async def _as_html(
    parts: AsyncIterator[list[LiveEvent]], conversation_id: str
) -> AsyncIterator[list[LiveEvent]]:
    """Render the messages of each part together, so that calls are paired with their results."""
    async for part in parts:
        told = [each for each in part if each.kind in {"message", "updated"}]
        others = [each for each in part if each.kind not in {"message", "updated"}]
        if told:
            messages = [each.data for each in told]
            html = await rendering.rendered(
                "messages.html", messages=messages, conversation_id=conversation_id
            )
            others.append(LiveEvent(told[-1].kind, {"html": html}, told[-1].position))
        yield others


@router.get("/console/message")
async def message(
    request: Request, chat: Chat, query: Annotated[MessageQuery, dependencies.query(MessageQuery)]
) -> Response:
    """Return one message as it is stored, as indented JSON in plain text."""
    dependencies.audit(request, "", query.id)
    found = await chat.get_message(query.id, query.message)
    text = showing.indented({**found, "created_at": timestamp(found["created_at"])})
    return PlainTextResponse(text.encode("utf-8", "backslashreplace"), headers=rendering.HEADERS)


@router.get("/console/context")
async def context(
    request: Request, chat: Chat, query: Annotated[ContextQuery, dependencies.query(ContextQuery)]
) -> Response:
    """Show the context that an agent would get for a budget, and the checkpoints."""
    found = await named_conversation(request, chat, query.id)
    composed = await chat.get_context(query.id, ContextRequest("tokens", query.tokens))
    return await rendering.page(
        request,
        "context.html",
        conversation=found,
        context=composed,
        # The summary of a checkpoint stands among the messages, but is not stored as one.
        messages=[each for each in composed["messages"] if "seq" in each],
        checkpoints=await chat.list_checkpoints(query.id),
        tokens=query.tokens,
    )


# -- downloads -------------------------------------------------------------------------------------


@router.get("/console/download")
async def download(
    request: Request, chat: Chat, query: Annotated[DownloadQuery, dependencies.query(DownloadQuery)]
) -> Response:
    """Return a conversation as a file, which is read while it is sent."""
    found = await named_conversation(request, chat, query.id)
    parts = chat.stream_chat_history(query.id)
    first = await anext(parts)
    write, media_type, ending = _FORMS[query.form]
    headers = {**rendering.HEADERS, "Content-Disposition": f'attachment; filename="conversation.{ending}"'}
    return StreamingResponse(write(found, _all(first, parts)), media_type=media_type, headers=headers)


async def _all(first: list[Json], parts: AsyncIterator[list[Json]]) -> AsyncIterator[list[Json]]:
    yield first
    async for part in parts:
        yield part


async def _as_lines(_: ConversationRecord, parts: AsyncIterator[list[Json]]) -> AsyncIterator[bytes]:
    async for part in parts:
        yield bodies.lines(part)


async def _as_json(found: ConversationRecord, parts: AsyncIterator[list[Json]]) -> AsyncIterator[bytes]:
    yield b'{"conversation":' + found.json + b',"messages":['
    comma = b""
    async for part in parts:
        for each in part:
            yield comma + dumps(each)
            comma = b","
    yield b"]}\n"


async def _as_markdown(found: ConversationRecord, parts: AsyncIterator[list[Json]]) -> AsyncIterator[bytes]:
    head = f"# {found.title or found.id}\n\n"
    yield head.encode("utf-8", "backslashreplace")
    async for part in parts:
        yield "".join(map(showing.as_markdown, part)).encode("utf-8", "backslashreplace")


_FORMS: dict[str, Any] = {
    "ndjson": (_as_lines, bodies.NDJSON, "ndjson"),
    "json": (_as_json, "application/json", "json"),
    "markdown": (_as_markdown, "text/markdown; charset=utf-8", "md"),
}


# -- the service -----------------------------------------------------------------------------------


@router.get("/console/state")
async def state(request: Request) -> Response:
    """Show the state of the service; sizes only to those who may see all data."""
    await dependencies.no_query(request)
    principal: Principal = request.state.principal
    principal.require("read")
    everything = "admin" in principal.permissions and not principal.scope.tenant
    process = dependencies.resources(request)
    return await rendering.page(
        request,
        "state.html",
        state=await process.state(whole=everything),
        embedded=process.settings.mongodb_url is None,
        retention_days=process.settings.retention_days,
        audit_days=process.settings.audit_days,
    )
