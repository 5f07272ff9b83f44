"""Reads URLs, in which ids stand percent-encoded. Every id in a path is declared as `{name:id}`.

A server decodes the path before the application sees it, and then the slash of an id (`%2F`) looks like the
end of the id. So the path is decoded here, from the bytes that were sent, and routed in a form in which each
id is still one step; the convertor `id` then gives the route the id itself.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote, unquote_to_bytes

from starlette.convertors import Convertor, register_url_convertor
from starlette.types import Scope

from service.errors import MalformedUrl
from service.tenancy import escaped, unescaped

_INVALID_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class _IdConvertor(Convertor[str]):
    """An id as one step of a path that `decode` has read."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        """Return the id."""
        return unescaped(value)

    def to_string(self, value: str) -> str:
        """Return the step of the path."""
        return escaped(value)


register_url_convertor("id", _IdConvertor())


def decode(scope: Scope) -> None:
    """Decode the path of a request, step by step, and check its query.

    Raises MalformedUrl for what is not percent-encoded UTF-8, because the server and the framework would put
    other characters in its place, which may be those of another id.
    """
    raw, path, query = scope.get("raw_path"), scope["path"], scope["query_string"]
    try:
        if raw is None or unquote(raw.decode("latin-1")) != path:
            # The server gives no bytes, or the application that serves this one has changed the path.
            scope["path"] = path.replace("%", "%25")
        elif b"%" in raw:
            scope["path"] = "/".join(escaped(decoded(step)) for step in raw.split(b"/"))
        query.decode("ascii")  # the framework would read other bytes as Latin-1
        if b"%" in query:
            decoded(query)
    except ValueError as error:
        raise MalformedUrl(
            "The path or the query of this URL is not percent-encoded UTF-8. Write a percent sign as `%25`, "
            "and encode every byte of a character that is not ASCII."
        ) from error


def decoded(raw: bytes) -> str:
    """Return percent-encoded text. Raises ValueError for anything else."""
    if _INVALID_PERCENT.search(raw):
        raise ValueError("a percent sign is not followed by two hexadecimal digits")
    return unquote_to_bytes(raw).decode()


def encoded(text: str) -> str:
    """Return an id as one step of a URL's path."""
    return quote(text, safe="")
