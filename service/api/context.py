"""Routes of the context of a model call, and of checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from starlette.responses import Response

from service import errors
from service.api import bodies, dependencies
from service.api.bodies import json_response
from service.api.dependencies import Chat, CheckpointId, ConversationId
from service.api.problems import error_responses
from service.api.schemas import (
    Closed,
    OwnerQuery,
    Reference,
    digits,
)
from service.chat_service import ContextRequest, ShortenedResults
from service.documents import Seq
from service.errors import InvalidRequest
from service.tenancy import Id

_Most = Annotated[int, Field(ge=1, le=10**9)]


Most = Annotated[_Most, digits(_Most)]


class ContextQuery(OwnerQuery):
    """The query of the context of a model call; exactly one of the three maxima is given."""

    max_tokens: Most | None = Field(None, description="The most tokens that the context may have.")
    max_messages: Most | None = Field(None, description="The most messages that the context may have.")
    max_turns: Most | None = Field(None, description="The most turns that the context may have.")
    keep_ratio: float = Field(
        0.7, ge=0, le=1, description="How much is kept, about, when the context has to be cut down."
    )
    format: Literal["native", "openai", "responses", "anthropic"] = "native"
    tool_results: (
        Annotated[str, Field(pattern=r"^(keep:\d{1,9}|over:\d{1,9}|keep:\d{1,9},over:\d{1,9})$")] | None
    ) = Field(
        None,
        description="`keep:3,over:2000`: results that are older than the newest 3, and have more than "
        "2,000 tokens, become a text that names their message. What is left out is 0.",
    )
    repair: Literal["placeholder", "none"] | None = Field(
        None,
        description="What to do about calls without a result that are not in the last step. `placeholder` "
        "gives them one, and is the default but for `native`.",
    )


class LeftOut(BaseModel):
    """How much of the conversation is not in its context."""

    model_config = ConfigDict(extra="forbid")

    messages: Seq
    tokens: Seq | None = Field(description="Null where messages of an earlier version or an import begin it.")


class ContextCall(BaseModel):
    """A call of a tool without a result."""

    model_config = ConfigDict(extra="forbid")

    tool_call_id: str
    name: str
    message_id: Id


_UptoSeq = Annotated[int, Field(ge=1, le=2**63 - 1)]


def _whole(value: Any) -> Any:
    """Read `5.0` as 5, because JSON has one type of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class NewCheckpoint(Closed):
    """A summary of the history up to a seq, at which a turn ends."""

    upto_seq: Annotated[_UptoSeq, BeforeValidator(_whole, json_schema_input_type=_UptoSeq)]
    summary: str = Field(min_length=1, max_length=65_536)
    metadata: dict[str, Any] | None = None


class CheckpointOut(BaseModel):
    """A checkpoint."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    conversation_id: Id
    user_id: Id
    upto_seq: Annotated[Seq, Field(ge=1)]
    created_at: AwareDatetime
    summary: str
    metadata: dict[str, Any] | None


class CheckpointList(BaseModel):
    """All checkpoints of a conversation, newest first."""

    model_config = ConfigDict(extra="forbid")

    data: list[CheckpointOut]


class ContextOut(BaseModel):
    """The context of a model call."""

    model_config = ConfigDict(extra="forbid")

    system: list[dict[str, Any]] | None = Field(None, description="Only with `format=anthropic`.")
    messages: list[dict[str, Any]] = Field(description="In the form that `format` names.")
    from_seq: Seq | None = Field(description="The first message behind the head and the summary.")
    to_seq: Seq | None
    last_seq: Seq
    version: Seq
    tokens: Seq
    tokens_estimated: bool = Field(description="Whether any message has no `token_count` of its own.")
    over_budget: bool = Field(description="Whether the head, or the head and the last step, is too large.")
    left_out: LeftOut
    checkpoint: CheckpointOut | None
    open_tool_calls: list[ContextCall]
    synthetic: list[ContextCall] = Field(description="The calls that got a result that says there is none.")


router = APIRouter(prefix="/conversations/{conversation_id:id}", tags=["context"])
Owner = Annotated[OwnerQuery, dependencies.query(OwnerQuery)]
OWNER = dependencies.query_parameters(OwnerQuery)


@router.get(
    "/context",
    response_model=ContextOut,
    openapi_extra=dependencies.query_parameters(ContextQuery),
    responses=error_responses(errors.ConversationNotFound),
)
async def get_context(
    chat: Chat,
    conversation_id: ConversationId,
    query: Annotated[ContextQuery, dependencies.query(ContextQuery)],
) -> Response:
    """Read what a model is to be sent: the head, the newest summary, and as much of the end as fits."""
    return json_response(await chat.get_context(conversation_id, _wanted(query), query.user_id))


def _wanted(query: ContextQuery) -> ContextRequest:
    maxima = {"tokens": query.max_tokens, "messages": query.max_messages, "turns": query.max_turns}
    given = [(unit, most) for unit, most in maxima.items() if most is not None]
    if len(given) != 1:
        why = f"exactly one of max_tokens, max_messages and max_turns is needed, and {len(given)} are given"
        raise InvalidRequest.at("query.max_tokens", why)
    ((unit, most),) = given
    return ContextRequest(
        unit,  # type: ignore[arg-type]  # a key of `maxima`
        most,
        keep_ratio=query.keep_ratio,
        form=query.format,
        shortened=_shortened(query.tool_results),
        repair=(query.repair or ("none" if query.format == "native" else "placeholder")) == "placeholder",
    )


def _shortened(rule: str | None) -> ShortenedResults | None:
    if rule is None:
        return None
    values = {name: int(value) for name, value in (each.split(":") for each in rule.split(","))}
    return ShortenedResults(values.get("keep", 0), values.get("over", 0))


@router.post(
    "/checkpoints",
    status_code=201,
    response_model=CheckpointOut | Reference,
    openapi_extra={**OWNER, **bodies.request_body_schema(NewCheckpoint)},
    responses={
        200: {
            "model": CheckpointOut | Reference,
            "description": "An earlier request stored this very checkpoint already.",
        },
        **error_responses(
            errors.ConversationNotFound, errors.CheckpointNotForward, errors.StorageFull, *bodies.PROBLEMS
        ),
    },
)
async def create_checkpoint(
    request: Request, chat: Chat, conversation_id: ConversationId, owner: Owner
) -> Response:
    """Store a summary of the history up to a seq. Without the scope `read` the answer is the id."""
    body = await bodies.read_small(request, NewCheckpoint)
    stored, created = await chat.create_checkpoint(
        conversation_id, body.upto_seq, body.summary, owner.user_id, metadata=body.metadata
    )
    shown = stored if dependencies.may_read(request) else {"id": stored["id"]}
    return json_response(shown, 201 if created else 200)


@router.get(
    "/checkpoints",
    response_model=CheckpointList,
    openapi_extra=OWNER,
    responses=error_responses(errors.ConversationNotFound),
)
async def list_checkpoints(chat: Chat, conversation_id: ConversationId, owner: Owner) -> Response:
    """Read all checkpoints of a conversation, newest first."""
    return json_response({"data": await chat.list_checkpoints(conversation_id, owner.user_id)})


@router.delete(
    "/checkpoints/{checkpoint_id:id}",
    status_code=204,
    openapi_extra=OWNER,
    responses=error_responses(errors.ConversationNotFound, errors.CheckpointNotFound),
)
async def delete_checkpoint(
    chat: Chat, conversation_id: ConversationId, checkpoint_id: CheckpointId, owner: Owner
) -> Response:
    """Delete a checkpoint; if it was the newest, the one before it counts again."""
    await chat.delete_checkpoint(conversation_id, checkpoint_id, owner.user_id)
    return Response(status_code=204)
