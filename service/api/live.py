"""Server-sent events: a conversation's history, or a list of conversations, while it changes."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from service.access.authentication import Principal
from service.api import dependencies
from service.api.bodies import NDJSON
from service.api.dependencies import Chat
from service.api.problems import error_responses
from service.api.schemas import EventsQuery, HistoryQuery
from service.chat_service import ChatService, ConversationRecord, LiveEvent
from service.errors import DatabaseUnavailable, InvalidRequest, Unauthenticated
from service.formats.json_answers import dumps
from service.formats.strict_json import Json

EVENTS = "text/event-stream"
_HEADERS = {"X-Accel-Buffering": "no"}
# A comment keeps proxies from closing a stream in which nothing happens, and shows a client that is gone.
COMMENT_S = 15.0
# One line, without the empty line behind it, because some clients take that for an event.
_COMMENT = b":\n"
_RETRY = b"retry: 1000\n"
# The line ends of Unicode that are none of the standard, and their escapes in JSON.
_OTHER_LINE_ENDS = [(chr(each).encode(), b"\\u%04x" % each) for each in (0x85, 0x2028, 0x2029)]
_SEQ = re.compile(r"[0-9]{1,19}\Z", re.ASCII)
_SEQ_MAX = 2**63 - 1
LAST_EVENT_ID_PARAMETER = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "With `Accept: text/event-stream`: the latest id that the client has. Wins over `after`.",
    "schema": {"type": "string", "pattern": "^[0-9]{0,19}$"},
}


def declared(*kinds: str) -> dict[str, Any]:
    """Declare for OpenAPI the events of a stream: each is an object with its fields."""
    data = {"type": "string", "description": "An object, as JSON."}
    fields = {
        "event": {"enum": list(kinds)},
        "data": data,
        "id": {"type": "string", "pattern": "^[0-9]+$"},
        "retry": {"type": "integer"},
    }
    return {EVENTS: {"schema": {"type": "object", "required": ["event", "data"], "properties": fields}}}


# The parameters of a history that a stream of events has no use for.
_NOT_LIVE = ("limit", "before", "last", "order", "since", "until", "role", "wait")

router = APIRouter(tags=["events"])


# -- what the caller wants -------------------------------------------------------------------------


def accepted(request: Request) -> str:
    """Return the media type that the caller prefers: NDJSON, EVENTS, or else JSON.

    Of equal ones, NDJSON is taken before JSON, and otherwise the one that is named first.
    """
    best, best_quality = "", 0.0
    for each in ",".join(request.headers.getlist("accept")).lower().split(","):
        media_type, *parameters = (part.strip() for part in each.split(";"))
        if media_type not in {NDJSON, EVENTS, "application/json"}:
            continue
        quality = _quality(parameters)
        before_json = media_type == NDJSON and best == "application/json" and quality == best_quality > 0
        if quality > best_quality or before_json:
            best, best_quality = media_type, quality
    return best or "application/json"


def _quality(parameters: list[str]) -> float:
    for each in parameters:
        name, _, value = each.partition("=")
        if name.strip() == "q":
            with contextlib.suppress(ValueError):
                return min(max(float(value), 0.0), 1.0)
    return 1.0


def _last_event_id(request: Request) -> int | None:
    """Return the `seq` in `Last-Event-ID`. Raises InvalidRequest for what this service did not send."""
    given = request.headers.getlist("last-event-id")
    if not given or given == [""]:
        return None
    if len(given) > 1 or not _SEQ.match(given[0]) or int(given[0]) > _SEQ_MAX:
        raise InvalidRequest.at("header.Last-Event-ID", "must be the id of an event, which is a seq")
    return int(given[0])


def _refuse_useless(query: HistoryQuery) -> None:
    for name in _NOT_LIVE:
        if getattr(query, name) is not None:
            raise InvalidRequest.at(f"query.{name}", f"cannot be combined with `Accept: {EVENTS}`")


# -- the streams -----------------------------------------------------------------------------------


async def follow_history(
    request: Request,
    chat: ChatService,
    conversation_id: str,
    query: HistoryQuery,
    show: Callable[[Json], Json],
) -> Response:
    """Answer with the history as events, from `Last-Event-ID`, else `after`, else the end."""
    _refuse_useless(query)
    last = _last_event_id(request)
    after = last if last is not None else query.after
    return await stream(request, chat.follow_chat_history(conversation_id, query.user_id, after=after), show)


@router.get(
    "/events",
    response_class=StreamingResponse,
    openapi_extra=dependencies.query_parameters(EventsQuery),
    responses={
        200: {
            "description": "`head` (read the list, again), `created`, `changed` and `deleted`.",
            "content": declared("head", "created", "changed", "deleted"),
        },
        **error_responses(),
    },
)
async def follow_conversations(
    request: Request, chat: Chat, query: Annotated[EventsQuery, dependencies.query(EventsQuery)]
) -> Response:
    """Follow a user's conversations, or with the scope `admin` all of the tenant, as server-sent events."""
    principal: Principal = request.state.principal
    if query.user_id is None and principal.scope.user_id is None:
        principal.require("admin")
    if query.user_id is not None:
        dependencies.audit(request, query.user_id)
    return await stream(request, chat.follow_list(query.user_id), lambda each: each)


async def stream(
    request: Request, parts: AsyncIterator[list[LiveEvent]], show: Callable[[Json], Json]
) -> Response:
    """Answer with events as they happen. An error before the first one is still answered as an error."""
    first: list[list[LiveEvent]] = [await anext(parts, [])]

    async def encoded() -> AsyncIterator[bytes]:
        # Taken out, because the stream may go on for hours, and would keep it.
        yield _RETRY + b"".join(_encoded(each, show) for each in first.pop())
        # The next part is read when this one has been sent, so a reader that does not read costs one part.
        async for part in _with_pauses(parts, lambda: _pause_s(request)):
            if not await _is_admitted(request, part):
                return
            yield b"".join(_encoded(each, show) for each in part) or _COMMENT

    return StreamingResponse(encoded(), media_type=EVENTS, headers=_HEADERS)


def _encoded(event: LiveEvent, show: Callable[[Json], Json]) -> bytes:
    data = event.data
    if isinstance(data, ConversationRecord):
        text = data.json
    else:
        text = dumps(show(data) if event.kind in {"message", "updated"} else data)
    position = f"id: {event.position}\n" if event.position is not None else ""
    # JSON has no line end of the standard outside of its strings, and none unescaped in them. Readers that
    # know more line ends than the standard (httpx's `iter_lines` does) would cut a text in two at these.
    for line_end, escaped in _OTHER_LINE_ENDS:
        text = text.replace(line_end, escaped)
    return b"%bevent: %b\ndata: %b\n\n" % (position.encode(), event.kind.encode(), text)


async def _with_pauses(
    parts: AsyncIterator[list[LiveEvent]], seconds: Callable[[], float]
) -> AsyncIterator[list[LiveEvent]]:
    """Yield the parts, and an empty one whenever none has come for so long."""

    async def following() -> list[LiveEvent] | None:
        return await anext(parts, None)

    pending = asyncio.create_task(following())
    try:
        while True:
            done, _ = await asyncio.wait([pending], timeout=seconds())
            if not done:
                yield []
                continue
            part = pending.result()
            if part is None:
                return
            yield part
            pending = asyncio.create_task(following())
    finally:
        pending.cancel()
        await asyncio.wait([pending])


# -- the credential --------------------------------------------------------------------------------


def _pause_s(request: Request) -> float:
    """Return how long a stream may be silent: until the next comment, or the end of its credential."""
    principal: Principal = request.state.principal
    if principal.expires_at is None:
        return COMMENT_S
    return min(COMMENT_S, max(0.0, (principal.expires_at - datetime.now(UTC)).total_seconds()) + 0.01)


async def _is_admitted(request: Request, part: list[LiveEvent]) -> bool:
    """Tell whether the credential that opened the stream would still open it."""
    try:
        await dependencies.require_still_admitted(request)
    except Unauthenticated:
        return False
    except DatabaseUnavailable:
        return not part  # nobody can tell, so nothing is shown
    return True
