"""Reads request bodies: how large, how fast, in which form; then strict JSON, once.

All that is done to a large body until it is BSON is done in one go beside the loop (`payloads.beside`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from service import payloads
from service.chat_service import faults_of
from service.errors import (
    BodyTooLarge,
    BodyTooSlow,
    Fault,
    InvalidRequest,
    MalformedBody,
    UnsupportedBody,
)
from service.settings import PARSED_TIMES_MAX, SMALL_BODY_BYTES_MAX, Settings

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

PROBLEMS = (MalformedBody, BodyTooSlow, BodyTooLarge, UnsupportedBody)


async def read(request: Request, make: Callable[[Any], T], bytes_max: int | None = None) -> T:
    """Read the body as strict JSON, and return what `make` makes of it, which must wait for nothing.

    Raises one of PROBLEMS, InvalidRequest for nesting too deep, and what `make` raises.
    """
    settings: Settings = request.app.state.settings
    most = min(settings.body_bytes_max, bytes_max or settings.body_bytes_max)
    _require_json(request)
    try:
        async with asyncio.timeout(settings.body_timeout_ms / 1000):
            body = await _read_bounded(request, most)
    except TimeoutError as error:
        raise BodyTooSlow(f"Not complete after {settings.body_timeout_ms} ms.") from error
    except ClientDisconnect as error:
        raise MalformedBody("The body ended early.") from error

    def work() -> T:
        payloads.require_parsable(body, PARSED_TIMES_MAX * settings.body_bytes_max)
        return make(payloads.parse(body))

    return await payloads.beside(len(body), work)


def _require_json(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    media_type, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if media_type != "application/json":
        raise UnsupportedBody(f"The content type is {payloads.cut(content_type) or 'missing'!r}.")
    if any(each.startswith("charset=") and each[8:].strip('"') != "utf-8" for each in parameters):
        raise UnsupportedBody("JSON is UTF-8; another charset is not read.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedBody("A compressed body is not read.")


async def _read_bounded(request: Request, most: int) -> bytearray:
    """Collect the body, and stop at the limit, whatever the length that was announced."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise BodyTooLarge(
            f"The body has {payloads.cut(announced)} bytes, and this call reads at most {most}."
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise BodyTooLarge(f"The body has more than the {most} bytes that this call reads.")
    return body


async def read_small(request: Request, model: type[M]) -> M:
    """Read a small body as the model. Raises as `read`, and InvalidRequest."""
    return await read(request, lambda value: checked(value, model), SMALL_BODY_BYTES_MAX)


def checked(value: Any, model: type[M]) -> M:
    """Return JSON as the model, all of it checked. Raises InvalidRequest."""
    refuse_crowded(value, model)
    payloads.check(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = faults_of(error, ())
        summary = "; ".join(f"{each.path}: {each.message}" for each in faults[:3])
        raise InvalidRequest(summary, faults) from error


def refuse_crowded(value: Any, model: type[BaseModel]) -> None:
    """Refuse an object with more keys than the model has, by one fault, before anything looks at each key."""
    known = model.model_fields
    if isinstance(value, dict) and len(value) > len(known):
        place = payloads.json_path((next(key for key in value if key not in known),))
        why = f"is not known here; the object has {len(value):,} keys, and known are: {', '.join(known)}"
        raise InvalidRequest(f"{place} {why}.", [Fault(place, why)])


def described(*models: type[BaseModel]) -> dict[str, Any]:
    """Declare the request body for OpenAPI, since the routes read it themselves."""
    schemas = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
