"""FastAPI dependencies that the routes share: the caller's service, ids, query and header parameters.

Pydantic reads the query as a whole, because FastAPI takes five times as long for each parameter. FastAPI does
not know these parameters, so `query_parameters` declares them for OpenAPI.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError

from service.access.audit import Audit
from service.access.authentication import Authenticator, Principal
from service.access.sessions import Sessions
from service.chat_service import ChatService, ConversationStore, ServiceState, service_state
from service.errors import IdempotencyConflict, Unauthenticated, UserNotFound
from service.settings import Settings
from service.tenancy import Id, TenantScope
from service.user_data import UserData


@dataclass(frozen=True)
class Resources:
    """The resources of one process, which routes and middleware share.

    `chat` and `user_data` are the only way to conversations, and both take the scope of a caller, so no route
    can reach another tenant's data.
    """

    settings: Settings
    authenticator: Authenticator
    audit: Audit | None
    _store: ConversationStore

    def chat(self, scope: TenantScope) -> ChatService:
        """Return the verbs, limited to this scope."""
        return ChatService(self._store, scope)

    def user_data(self, scope: TenantScope) -> UserData:
        """Return the verbs on a user's data as a whole, limited to this scope."""
        return UserData(self._store, scope)

    async def sessions(self) -> Sessions:
        """Return the cookies of the console. Raises DatabaseUnavailable if the secret was never read."""
        async with self._store.database.deadline():
            return sessions_of(await self._store.database.secret())

    @property
    def commit_token(self) -> str | None:
        """The token by which a read of another process sees what this process has stored; see `Database`."""
        return self._store.database.commit_token

    def read_after(self, token: str) -> None:
        """Let the reads of this call see what the process that gave the token had stored."""
        self._store.database.read_after(token)

    async def is_ready(self) -> bool:
        """Tell whether the database answers."""
        return await self._store.database.is_ready()

    @property
    def why_not_ready(self) -> str:
        """The reason why the database does not answer, as a sentence."""
        return self._store.database.why_not_ready

    async def state(self, *, whole: bool) -> ServiceState:
        """Return the state of the service, and the sizes of all data only for `whole`."""
        return await service_state(self._store, whole=whole)

    @property
    def missing_indexes(self) -> list[str]:
        """Return the names of the indexes that are being built."""
        return self._store.database.indexes.missing


@functools.lru_cache(maxsize=1)
def sessions_of(secret: bytes) -> Sessions:
    """Return the sessions of a deployment with this secret."""
    return Sessions(secret)


M = TypeVar("M", bound=BaseModel)

# The header of a write's answer that a later read may carry to another process.
COMMIT_HEADER = "Consistency-Token"
READING = frozenset({"GET", "HEAD"})
_IDEMPOTENCY_KEY_DESCRIPTION = "A word of your choice. A repeated request with the same word is stored once."
_IDEMPOTENCY_KEY: TypeAdapter[str] = TypeAdapter(
    Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,255}$")]
)
IDEMPOTENCY_KEY_PARAMETER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": _IDEMPOTENCY_KEY_DESCRIPTION,
    "schema": _IDEMPOTENCY_KEY.json_schema(),
}


def resources(request: Request) -> Resources:
    """Return the resources of the process."""
    process_resources: Resources = request.app.state.resources
    return process_resources


async def _chat(request: Request) -> ChatService:
    """Return the service limited to the caller's tenant and user, if the caller may read, or write.

    A route has no other way to the service, so no route can forget the check of the permission.
    """
    principal: Principal = request.state.principal
    principal.require("read" if request.method in READING else "write")
    return _after_token(request).chat(principal.scope)


def may_read(request: Request) -> bool:
    """Tell whether an answer may have stored content. A caller that may only write is answered with ids."""
    principal: Principal = request.state.principal
    return "read" in principal.permissions


def require_admin(request: Request) -> None:
    """Refuse a caller who is no administrator. Raises InsufficientScope."""
    principal: Principal = request.state.principal
    principal.require("admin")


async def require_still_admitted(request: Request) -> None:
    """Authenticate the credential of a long call again, before it shows anything.

    Raises Unauthenticated where it has expired, was revoked, or is another caller's now.
    """
    again = getattr(request.state, "authenticate_again", None)
    if again is None:
        return
    before: Principal = request.state.principal
    now: Principal = await again()
    if (now.name, now.scope) != (before.name, before.scope) or "read" not in now.permissions:
        raise Unauthenticated("The API key or token no longer has the rights with which this call began.")


def audit(request: Request, user_id: str, conversation_id: str | None = None) -> None:
    """Name for the audit trail whom a call concerns, where its path has neither a user nor a conversation."""
    request.state.audited = {"user_id": user_id, "conversation_id": conversation_id}


@contextlib.contextmanager
def conflicts_for(request: Request) -> Iterator[None]:
    """Hide the details of a conflict from a caller that may not read, because they tell what is stored."""
    try:
        yield
    except IdempotencyConflict as error:
        if may_read(request):
            raise
        raise IdempotencyConflict(
            "The idempotency key or a message id was used for other messages. Use a new key or id."
        ) from error


async def _user_data(request: Request) -> UserData:
    return user_data_of(request, request.path_params["user_id"])


def user_data_of(request: Request, user_id: str) -> UserData:
    """Return the verbs on users, if the caller is this very user, or an administrator."""
    principal: Principal = request.state.principal
    own = principal.scope.user_id
    if own is None:
        principal.require("admin")
    elif own != user_id:
        raise UserNotFound("You can only access your own user.")
    return _after_token(request).user_data(principal.scope)


def _after_token(request: Request) -> Resources:
    """Return the resources, with which reads of this call see the commit that its token names."""
    own = resources(request)
    token = request.headers.get(COMMIT_HEADER)
    if token is not None:
        own.read_after(token)
    return own


def query(model: type[M], ignored: frozenset[str] = frozenset()) -> Any:
    """Depend on the query as this model. An unknown or repeated parameter is refused.

    Parameters in `ignored` are accepted, also repeatedly, and not read.
    """
    return Depends(_reader(model, ignored))


def _reader(model: type[M], ignored: frozenset[str]) -> Callable[[Request], Coroutine[Any, Any, M]]:
    known = tuple(field.alias or name for name, field in model.model_fields.items())

    async def read(request: Request) -> M:
        given = [each for each in request.query_params.multi_items() if each[0] not in ignored]
        parameters = dict(given)
        if len(given) > len(parameters) or len(given) > len(known):
            raise _crowded(Counter(name for name, _ in given), known)
        try:
            return model.model_validate(parameters)
        except ValidationError as error:
            raise _refused("query", error) from error

    return read


def query_parameters(model: type[BaseModel], *headers: dict[str, Any]) -> dict[str, Any]:
    """Declare the parameters of a query, and further ones, for OpenAPI."""
    model_schema = model.model_json_schema()
    required = model_schema.get("required", [])
    parameters = []
    for name, schema in model_schema["properties"].items():
        parameter = {"name": name, "in": "query", "required": name in required}
        if "description" in schema:
            parameter["description"] = schema["description"]
        schema.pop("default", None)
        parameters.append(parameter | {"schema": schema})
    return {"parameters": [*parameters, *headers]}


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
        return _IDEMPOTENCY_KEY.validate_python(given[0])
    except ValidationError as error:
        raise _refused("header", error, "Idempotency-Key") from error


_REPEATED = "is given more than once"  # refused, because it is not clear which value is meant


def _crowded(given: Counter[str], known: Sequence[str]) -> RequestValidationError:
    """Refuse a query with an unknown or repeated parameter, with one fault for any number of parameters."""
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
    most = resources(request).settings.page_items_max
    if items is not None and items > most:
        raise _invalid(("query", name), f"must be at most {most}")


UserDataOf = Annotated[UserData, Depends(_user_data)]
Chat = Annotated[ChatService, Depends(_chat)]
ConversationId = Annotated[Id, Path(description="The conversation's id.")]
MessageId = Annotated[Id, Path(description="The message's id, unique in its conversation.")]
CheckpointId = Annotated[Id, Path(description="The checkpoint's id, unique in its conversation.")]
IdempotencyKey = Annotated[str | None, Depends(_idempotency_key)]
