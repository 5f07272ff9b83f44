"""The pages that change something: each shows what it will do, and does it when its form is sent."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from service.access.authentication import Principal
from service.api import bodies, dependencies
from service.api.dependencies import Chat
from service.console import rendering
from service.console.pages import named_conversation
from service.errors import ChatHistoryError, TooManyRequests, Unauthenticated

router = APIRouter(include_in_schema=False)
Form = Annotated[dict[str, str], Depends(rendering.form)]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OneConversation(_Query):
    """A conversation."""

    id: str


class OneUser(_Query):
    """A user."""

    user: str


class OneErasure(_Query):
    """An erasure of a user."""

    user: str
    id: str


class Next(_Query):
    """The page to go to after signing in."""

    next: str = ""


ConversationQuery = Annotated[OneConversation, dependencies.query(OneConversation)]
UserQuery = Annotated[OneUser, dependencies.query(OneUser)]
ErasureQuery = Annotated[OneErasure, dependencies.query(OneErasure)]
NextQuery = Annotated[Next, dependencies.query(Next)]


# -- signing in ------------------------------------------------------------------------------------


@router.get("/console/sign-in")
async def ask_to_sign_in(request: Request, query: NextQuery) -> Response:
    """Ask for an API key or a token, unless everybody may look."""
    if dependencies.resources(request).settings.auth == "none":
        return rendering.see_other("./")
    return await rendering.page(request, "sign_in.html", next=rendering.next_page(query.next), fault="")


@router.post("/console/sign-in")
async def sign_in(request: Request, form: Form) -> Response:
    """Authenticate, and name the caller in the cookie."""
    wanted = rendering.next_page(form.get("next", ""))
    try:
        await request.state.sign_in(form.get("credential", "").strip())
    except (Unauthenticated, TooManyRequests) as error:
        return await _sign_in_again(request, wanted, error)
    authenticator = dependencies.resources(request).authenticator
    sessions = await dependencies.resources(request).sessions()
    caller = authenticator.for_session(request.state.principal, sessions)
    return await rendering.with_session(request, caller, wanted or "./")


async def _sign_in_again(request: Request, wanted: str, error: ChatHistoryError) -> Response:
    request.state.problem = error.slug()
    page = await rendering.page(request, "sign_in.html", status=error.status, next=wanted, fault=error.detail)
    page.headers.update(error.headers)
    return page


@router.post("/console/sign-out")
async def sign_out(request: Request, form: Form) -> Response:  # noqa: ARG001  (the form is checked)
    """Forget the caller."""
    return await rendering.with_session(request, None, "sign-in")


# -- a conversation --------------------------------------------------------------------------------


@router.get("/console/rename")
async def ask_for_title(request: Request, chat: Chat, query: ConversationQuery) -> Response:
    """Ask for the new title."""
    return await _ask_about(request, chat, query.id, "rename.html")


@router.post("/console/rename")
async def rename(request: Request, chat: Chat, query: ConversationQuery, form: Form) -> Response:
    """Set the title, or remove it if the field is empty."""
    dependencies.audit(request, "", query.id)
    changed = await chat.update_conversation(query.id, title=form.get("title", "").strip() or None)
    dependencies.audit(request, changed.user_id, query.id)
    return rendering.see_other(f"conversation?{urlencode({'id': query.id})}")


@router.get("/console/delete")
async def ask_to_delete(request: Request, chat: Chat, query: ConversationQuery) -> Response:
    """Ask whether the conversation is to be deleted."""
    return await _ask_about(request, chat, query.id, "delete.html")


@router.post("/console/delete")
async def delete(request: Request, chat: Chat, query: ConversationQuery, form: Form) -> Response:
    """Delete the conversation, and go back to the list of the user that the form names."""
    dependencies.audit(request, form.get("user", ""), query.id)
    await chat.delete_conversation(query.id)
    return rendering.see_other(f"./?{urlencode({'user': form.get('user', '')})}")


async def _ask_about(request: Request, chat: Chat, conversation_id: str, template: str) -> Response:
    principal: Principal = request.state.principal
    principal.require("write")
    found = await named_conversation(request, chat, conversation_id)
    return await rendering.page(request, template, conversation=found)


# -- a user ----------------------------------------------------------------------------------------


@router.get("/console/erase")
async def ask_to_erase(request: Request, query: UserQuery) -> Response:
    """Say how much an erasure would remove, and ask whether to erase."""
    dependencies.audit(request, query.user)
    counts = await dependencies.user_data_of(request, query.user).count(query.user)
    return await rendering.page(request, "erase.html", user=query.user, counts=counts)


@router.post("/console/erase")
async def erase(request: Request, query: UserQuery, form: Form) -> Response:
    """Erase the user, if the form repeats the id, and show the receipt."""
    dependencies.audit(request, query.user)
    data = dependencies.user_data_of(request, query.user)
    if form.get("again", "").strip() != query.user:
        counts = await data.count(query.user)
        return await rendering.page(
            request, "erase.html", status=422, user=query.user, counts=counts, fault=True
        )
    state = await data.erase(query.user)
    return rendering.see_other(f"erasure?{urlencode({'user': query.user, 'id': state.id})}")


@router.get("/console/erasure")
async def erasure(request: Request, query: ErasureQuery) -> Response:
    """Show how far an erasure is, or its receipt. The page asks again by itself while the erasure goes on."""
    dependencies.audit(request, query.user)
    state = await dependencies.user_data_of(request, query.user).erasure(query.user, query.id)
    page = await rendering.page(request, "erasure.html", user=query.user, state=state)
    if not state.done:
        page.headers["Refresh"] = "2"
    return page


@router.get("/console/export")
async def export(request: Request, query: UserQuery) -> Response:
    """Return everything of a user as a file, in the form that `chat-history import` reads."""
    dependencies.audit(request, query.user)
    lines = await bodies.stream_lines(dependencies.user_data_of(request, query.user).export(query.user))
    lines.headers["Content-Disposition"] = 'attachment; filename="user.ndjson"'
    return lines
