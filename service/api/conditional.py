"""Preconditions in requests (`If-Match`, `expected_last_seq`, `If-None-Match`), and the `ETag` of answers.

The tag of a history is `"<version>"`. That of a conversation is the same until its title, metadata or expiry
was first changed, and then `"<version>-<number of those changes>"`, so that a changed title is never taken
for the one before. `If-Match` compares the version alone, because writes depend on the history.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from service.chat_service import Condition, ConversationRecord
from service.errors import InvalidRequest

# `W/` is what a proxy puts before the tag of an answer that it compresses.
_VERSION = r'(W/)?"[0-9]{1,18}(-[0-9]{1,18})?"'
_IF_MATCH = rf"^(\*|{_VERSION}( ?, ?{_VERSION})*)$"
_EXAMPLE = {"type": "string", "examples": ['"12"']}
IF_MATCH_PARAMETER = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "description": "Write only if the history is still of this version, else answer 409 (`stale`): "
    "an `ETag`, or a `version` in quotes.",
    "schema": {**_EXAMPLE, "pattern": _IF_MATCH},
}
IF_NONE_MATCH_PARAMETER = {
    "name": "If-None-Match",
    "in": "header",
    "required": False,
    "description": "Answer 304, without a body, if the `ETag` is still this one.",
    "schema": _EXAMPLE,
}
ETAG_HEADER = {"ETag": {"schema": _EXAMPLE}}
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "It still has the `ETag` of `If-None-Match`.", "headers": ETAG_HEADER}
}


def condition(request: Request) -> Condition | None:
    """Return the precondition of a write, or None. Raises InvalidRequest for a tag of another service.

    The query is one that the route has validated.
    """
    expected = request.query_params.get("expected_last_seq")
    versions = _versions(request)
    if versions is None and expected is None:
        return None
    return Condition(versions, None if expected is None else int(expected))


def _versions(request: Request) -> frozenset[int] | None:
    """Return the versions in `If-Match`, or None where any will do."""
    given = request.headers.getlist("If-Match")
    if not given:
        return None
    tags = ", ".join(given)
    if re.fullmatch(_IF_MATCH, tags) is None:
        why = 'must be an `ETag` of this service, or the version of a conversation in quotes, such as "12"'
        raise InvalidRequest.at("header.If-Match", why)
    return None if tags == "*" else frozenset(map(int, re.findall(r'"([0-9]+)', tags)))


def history_tag(version: int) -> str:
    """Return the tag of a history."""
    return f'"{version}"'


def conversation_tag(conversation: ConversationRecord) -> str:
    """Return the tag of a conversation."""
    edits = f"-{conversation.edits}" if conversation.edits else ""
    return f'"{conversation.version}{edits}"'


def asks_if_changed(request: Request) -> bool:
    """Tell whether the caller has an answer already, and asks for one that differs."""
    return "if-none-match" in request.headers


def not_modified(request: Request, tag: str) -> Response | None:
    """Return the answer 304 if the caller has what has this tag."""
    given = ",".join(request.headers.getlist("If-None-Match")).split(",")
    known = [each.strip().removeprefix("W/") for each in given]
    return Response(status_code=304, headers={"ETag": tag}) if tag in known or "*" in known else None
