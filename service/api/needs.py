"""What routes need, as names that read as such in a signature."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Path, Request
from fastapi.exceptions import RequestValidationError

from service.chat_service import ChatService
from service.documents import Id


async def _chat(request: Request) -> ChatService:
    service: ChatService = request.app.state.chat
    return service


async def no_repeats(request: Request) -> None:
    """Refuse a query parameter or an idempotency key that is given twice: which one was meant?"""
    names = [("query", name) for name, _ in request.query_params.multi_items()]
    names += [("header", "Idempotency-Key")] * len(request.headers.getlist("idempotency-key"))
    repeated = {each for each in names if names.count(each) > 1} if len(names) > 1 else ()
    if repeated:
        raise RequestValidationError(
            [{"loc": loc, "msg": "is given more than once"} for loc in sorted(repeated)]
        )


async def no_query(request: Request) -> None:
    """Refuse query parameters on a call that has none."""
    if request.query_params:
        raise RequestValidationError(
            [{"loc": ("query", name), "msg": "is not known here"} for name in request.query_params]
        )


def page_items(request: Request, name: str, items: int | None) -> None:
    """Refuse a page that is larger than the setting allows."""
    most: int = request.app.state.settings.page_items_max
    if items is not None and items > most:
        raise RequestValidationError([{"loc": ("query", name), "msg": f"must be at most {most}"}])


Chat = Annotated[ChatService, Depends(_chat)]
ConversationId = Annotated[Id, Path(description="The conversation's id.")]
MessageId = Annotated[Id, Path(description="The message's id, unique in its conversation.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="A word of the caller's own; the same request with it again is stored once.",
    ),
]
