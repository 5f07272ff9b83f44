"""Reads request bodies: how large, how fast, in which form; then strict JSON, once."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from service import payloads
from service.chat_service import faults_of
from service.errors import (
    BodyTooLarge,
    BodyTooSlow,
    InvalidRequest,
    MalformedBody,
    UnsupportedBody,
)
from service.settings import Settings

M = TypeVar("M", bound=BaseModel)

PROBLEMS = (MalformedBody, BodyTooSlow, BodyTooLarge, UnsupportedBody)


async def read_json(request: Request) -> Any:
    """Read the body as strict JSON. Raises one of PROBLEMS, or InvalidRequest for nesting too deep."""
    settings: Settings = request.app.state.settings
    _require_json(request)
    try:
        async with asyncio.timeout(settings.body_timeout_ms / 1000):
            body = await _read_bounded(request, settings.body_bytes_max)
    except TimeoutError as error:
        raise BodyTooSlow(f"Not complete after {settings.body_timeout_ms} ms.") from error
    except ClientDisconnect as error:
        raise MalformedBody("The body ended early.") from error
    return payloads.parse(body)


def _require_json(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    media_type, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if media_type != "application/json":
        raise UnsupportedBody(f"The content type is {content_type or 'missing'!r}.")
    if any(each.startswith("charset=") and each[8:].strip('"') != "utf-8" for each in parameters):
        raise UnsupportedBody("JSON is UTF-8; another charset is not read.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedBody("A compressed body is not read.")


async def _read_bounded(request: Request, most: int) -> bytes:
    """Collect the body, and stop at the limit, whatever the length that was announced."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise BodyTooLarge(f"{announced} bytes, and at most {most} are read.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise BodyTooLarge(f"More than {most} bytes.")
    return bytes(body)


async def read_body(request: Request, model: type[M]) -> M:
    """Read a small body, all of it checked, as the model. Raises as `read_json`, and InvalidRequest."""
    value = await read_json(request)
    payloads.check(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = faults_of(error, ())
        summary = "; ".join(f"{each.path}: {each.message}" for each in faults[:3])
        raise InvalidRequest(summary, faults) from error


def described(*models: type[BaseModel]) -> dict[str, Any]:
    """Declare the request body for OpenAPI, since the routes read it themselves."""
    schemas = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
