"""Reads request bodies strictly and within limits, and writes answers as JSON or as lines of JSON."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from service.api.dependencies import resources
from service.chat_service import ConversationPage, ListPosition, MessagePage
from service.clock import EPOCH
from service.errors import (
    BodyTooLarge,
    BodyTooSlow,
    InvalidRequest,
    MalformedBody,
    UnsupportedBody,
    cut,
    faults_of,
)
from service.formats import strict_json
from service.formats.json_answers import dumps
from service.settings import PARSED_TIMES_MAX, SMALL_BODY_BYTES_MAX
from service.tenancy import is_valid_id

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

PROBLEMS = (MalformedBody, BodyTooSlow, BodyTooLarge, UnsupportedBody)


async def read(request: Request, make: Callable[[Any], T], bytes_max: int | None = None) -> T:
    """Read the body as strict JSON, and return `make(body)`. `make` must not wait for anything.

    Raises one of PROBLEMS, InvalidRequest for a body that is nested too deep, and whatever `make` raises.
    """
    settings = resources(request).settings
    most = min(settings.body_bytes_max, bytes_max or settings.body_bytes_max)
    _require_json(request)
    body = await _received(request, most)

    def work() -> T:
        strict_json.require_parsable(body, PARSED_TIMES_MAX * settings.body_bytes_max)
        return make(strict_json.parse(body))

    return await strict_json.beside(len(body), work)


async def read_form(request: Request) -> dict[str, str]:
    """Read the fields of a small form of a page. Raises one of PROBLEMS."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise UnsupportedBody(
            "The body is not a form. Send `Content-Type: application/x-www-form-urlencoded`."
        )
    body = await _received(request, SMALL_BODY_BYTES_MAX)
    try:
        fields = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError as error:
        raise MalformedBody("The body is not a form in UTF-8 with at most 20 fields.") from error
    return dict(fields)


async def _received(request: Request, most: int) -> bytearray:
    """Receive the body within its limits of size and time."""
    timeout_ms = resources(request).settings.body_timeout_ms
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            return await _read_bounded(request, most)
    except TimeoutError as error:
        raise BodyTooSlow(f"The request body did not arrive within {timeout_ms:,} ms.") from error
    except ClientDisconnect as error:
        raise MalformedBody("The request body ended before it was complete.") from error


def _require_json(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    media_type, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if media_type != "application/json":
        named = repr(cut(content_type)) if content_type else "missing"
        raise UnsupportedBody(f"The `Content-Type` is {named}. Send `Content-Type: application/json`.")
    if any(each.startswith("charset=") and each[8:].strip('"') != "utf-8" for each in parameters):
        raise UnsupportedBody("The `Content-Type` names another charset than UTF-8. Send JSON in UTF-8.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedBody("The body is compressed. Send the body without `Content-Encoding`.")


async def _read_bounded(request: Request, most: int) -> bytearray:
    """Collect the body up to the limit, whatever length the request announced."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise BodyTooLarge(f"The body has {cut(announced)} bytes, and this call reads at most {most}.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise BodyTooLarge(f"The body has more than the {most} bytes that this call reads.")
    return body


async def read_small(request: Request, model: type[M]) -> M:
    """Read a small body as the model. Raises InvalidRequest and the errors of `read`."""
    return await read(request, lambda value: checked(value, model), SMALL_BODY_BYTES_MAX)


def checked(value: Any, model: type[M]) -> M:
    """Return parsed JSON as the model, with all values checked. Raises InvalidRequest."""
    refuse_crowded(value, model)
    strict_json.check(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest.of(faults_of(error, ())) from error


def refuse_crowded(value: Any, model: type[BaseModel]) -> None:
    """Refuse an object with more keys than the model, with one fault, before work is done for each key."""
    known = model.model_fields
    if isinstance(value, dict) and len(value) > len(known):
        place = (next(key for key in value if key not in known),)
        why = f"is not known here; the object has {len(value):,} keys, and known are: {', '.join(known)}"
        raise InvalidRequest.at(place, why)


def request_body_schema(*models: type[BaseModel]) -> dict[str, Any]:
    """Declare the request body for OpenAPI, because the routes read the body themselves."""
    schemas = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


NDJSON = "application/x-ndjson"


def lines(values: list[dict[str, Any]]) -> bytes:
    """Encode values as lines of JSON."""
    return b"".join(dumps(each) + b"\n" for each in values)


async def stream_lines(parts: AsyncIterator[list[dict[str, Any]]]) -> Response:
    """Answer with lines as they arrive. An error before the first line is still answered as an error."""
    first = await anext(parts)

    async def encoded() -> AsyncIterator[bytes]:
        yield lines(first)
        # An error here ends the connection without the last chunk, so that no client takes an incomplete
        # answer for a complete one.
        async for part in parts:
            yield lines(part)

    return StreamingResponse(encoded(), media_type=NDJSON)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with JSON, without validation by a model, because stored values were checked when written."""
    return encoded_response(dumps(value), status, headers)


def encoded_response(encoded: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with what is JSON already."""
    return Response(encoded, status, dict(headers or {}), "application/json")


def conversation_page(page: ConversationPage) -> bytes:
    """Return the JSON of a page of conversations."""
    following = cursor(page.next) if page.next else None
    return _encoded_page([each.json for each in page.conversations], page.has_more, following)


def message_page(page: MessagePage[Any], shown: list[dict[str, Any]]) -> dict[str, Any]:
    """Shape a page as MessagePage or MessageItemsPage; `shown` has the messages in the form of the answer."""
    return {"data": shown, "has_more": page.has_more, "next": page.next}


def encoded_page(page: MessagePage[bytes]) -> bytes:
    """Return the JSON of a page whose messages are JSON already."""
    return _encoded_page(page.messages, page.has_more, page.next)


def _encoded_page(items: Sequence[bytes], has_more: bool, following: int | str | None) -> bytes:
    end = dumps({"has_more": has_more, "next": following})
    return b'{"data":[' + b",".join(items) + b"]," + end[1:]


def cursor(position: ListPosition) -> str:
    """Encode a position in the list as an opaque cursor for URLs."""
    ms = (position.time - EPOCH) // timedelta(milliseconds=1)
    return base64.urlsafe_b64encode(f"{ms}:{position.conversation_id}".encode()).decode().rstrip("=")


def position(word: str) -> ListPosition:
    """Decode a cursor. Raises InvalidRequest for a cursor that `cursor` did not write."""
    with contextlib.suppress(binascii.Error, ValueError, OverflowError):
        text = base64.b64decode(word + "=" * (-len(word) % 4), b"-_", validate=True).decode()
        ms, _, conversation_id = text.partition(":")
        read_position = ListPosition(EPOCH + timedelta(milliseconds=int(ms)), conversation_id)
        # Encoding the position again must give the same cursor, because base64 and int accept other forms.
        # The id may be any printable text, because a conversation that was changed by hand may have such an
        # id, and the list must go on behind that conversation.
        is_text = is_valid_id(conversation_id) or (conversation_id != "" and conversation_id.isprintable())
        if is_text and cursor(read_position) == word:
            return read_position
    why = "is not a cursor of this service"
    raise InvalidRequest.at("query.cursor", why)
