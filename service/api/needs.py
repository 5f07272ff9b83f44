"""What routes need of a request beside its body, as names that read as such in a signature.

Queries are read by Pydantic at once and not by FastAPI, which takes five times as long over each parameter;
`described` says to OpenAPI what FastAPI then does not know of.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError

from service.auth import Principal
from service.chat_service import ChatService
from service.documents import Id
from service.errors import IdempotencyConflict, UserNotFound
from service.lifecycle import Lifecycle

M = TypeVar("M", bound=BaseModel)

_READING = frozenset({"GET", "HEAD"})
_KEY_DESCRIPTION = "A word of the caller's own; the same request with it again is stored once."
_KEY: TypeAdapter[str] = TypeAdapter(Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,255}$")])
KEY_PARAMETER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": _KEY_DESCRIPTION,
    "schema": _KEY.json_schema(),
}


async def _chat(request: Request) -> ChatService:
    """Return the service as the caller's own: it reads or writes, in its tenant, as its user.

    There is no other way for a route to the service, so none can forget whose it is.
    """
    principal: Principal = request.state.principal
    principal.require("read" if request.method in _READING else "write")
    service: ChatService = request.app.state.chat
    return service.of(principal.scope)


def may_read(request: Request) -> bool:
    """Tell whether the caller may be told what is stored; whoever only writes is told ids."""
    principal: Principal = request.state.principal
    return "read" in principal.scopes


@contextlib.contextmanager
def conflicts_for(request: Request) -> Iterator[None]:
    """Say no more of a conflict than that there is one to whoever may not read what is stored."""
    try:
        yield
    except IdempotencyConflict as error:
        if may_read(request):
            raise
        raise IdempotencyConflict("This key or these ids stand for other messages.") from error


async def _users(request: Request) -> Lifecycle:
    """Return what concerns users as a whole: for the user that the caller is, or for administrators."""
    principal: Principal = request.state.principal
    own = principal.scope.user_id
    if own is None:
        principal.require("admin")
    elif own != request.path_params["user_id"]:
        raise UserNotFound("There is none but yourself.")
    lifecycle: Lifecycle = request.app.state.lifecycle
    return lifecycle.of(principal.scope)


def query(model: type[M], ignored: frozenset[str] = frozenset()) -> Any:
    """Depend on the query as this model. A parameter that is unknown, or given twice, is refused.

    Those that are `ignored` may be given, as often as they like.
    """
    return Depends(_reader(model, ignored))


def _reader(model: type[M], ignored: frozenset[str]) -> Callable[[Request], Coroutine[Any, Any, M]]:
    known = tuple(model.model_fields)

    async def read(request: Request) -> M:
        given = [each for each in request.query_params.multi_items() if each[0] not in ignored]
        asked = dict(given)
        if len(given) > len(asked) or len(given) > len(known):
            raise _crowded(Counter(name for name, _ in given), known)
        try:
            return model.model_validate(asked)
        except ValidationError as error:
            raise _refused("query", error) from error

    return read


def described(model: type[BaseModel]) -> dict[str, Any]:
    """Declare the parameters of a query for OpenAPI."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    parameters = []
    for name, said in schema["properties"].items():
        parameter = {"name": name, "in": "query", "required": name in required}
        if "description" in said:
            parameter["description"] = said["description"]
        said.pop("default", None)
        parameters.append(parameter | {"schema": said})
    return {"parameters": parameters}


async def no_query(request: Request) -> None:
    """Refuse query parameters on a call that has none."""
    if request.query_params:
        raise _crowded(Counter(name for name, _ in request.query_params.multi_items()), ())


async def _idempotency_key(request: Request) -> str | None:
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1:
        raise _invalid(("header", "Idempotency-Key"), _REPEATED)
    try:
        return _KEY.validate_python(given[0])
    except ValidationError as error:
        raise _refused("header", error, "Idempotency-Key") from error


_REPEATED = "is given more than once"  # so which of them was meant?


def _crowded(given: Counter[str], known: Sequence[str]) -> RequestValidationError:
    """Refuse a query of which some is not known or repeated: by one fault, however many parameters it has."""
    wrong = next((name for name in given if name not in known), None)
    if wrong is None or len(given) <= len(known):
        return _invalid(("query", given.most_common(1)[0][0]), _REPEATED)
    why = f"is not known here; the query has {given.total():,} parameters, and known are: "
    return _invalid(("query", wrong), why + (", ".join(known) or "none"))


def _invalid(place: tuple[str, str], why: str) -> RequestValidationError:
    return RequestValidationError([{"loc": place, "msg": why}])


def _refused(where: str, error: ValidationError, *steps: str) -> RequestValidationError:
    return RequestValidationError(
        [{"loc": (where, *steps, *each["loc"]), "msg": each["msg"]} for each in error.errors()]
    )


def page_items(request: Request, name: str, items: int | None) -> None:
    """Refuse a page that is larger than the setting allows."""
    most: int = request.app.state.settings.page_items_max
    if items is not None and items > most:
        raise _invalid(("query", name), f"must be at most {most}")


Users = Annotated[Lifecycle, Depends(_users)]
Chat = Annotated[ChatService, Depends(_chat)]
ConversationId = Annotated[Id, Path(description="The conversation's id.")]
MessageId = Annotated[Id, Path(description="The message's id, unique in its conversation.")]
IdempotencyKey = Annotated[str | None, Depends(_idempotency_key)]
