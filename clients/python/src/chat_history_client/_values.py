"""Says what a request can carry, and refuses the rest before anything is sent.

A value that the service refuses is an ApiError with status 422 and the JSON path of the place: NaN, a lone
surrogate, an integer beyond 64 bits, too many levels (so also a value that contains itself), an id that no
URL can carry. A value that is not JSON at all (a set, bytes, a time, a Decimal, a key that is not a string)
is a TypeError that names the place in the same way. A tuple is sent as a list.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from chat_history_client.errors import ApiError

# More levels than the service takes, and within Python's own limit of recursion.
_LEVELS = 200
# Longer than any id, cursor or time, and short enough for a URL.
_URL_TEXT_CHARS = 8_000


def refusal(path: str, why: str) -> ApiError:
    """Return what the service would answer, for what no request can carry to it."""
    problem = {
        "type": "urn:chat-history:problem:invalid-request",
        "title": "The request is not valid",
        "detail": f"{path}: {why}.",
        "errors": [{"path": path, "message": why}],
    }
    return ApiError(422, problem)


def url_text(value: Any, place: str) -> Any:
    """Return a value that may stand in a URL, or raise the ApiError that names its place."""
    if not isinstance(value, str):
        return value
    if len(value) > _URL_TEXT_CHARS:
        raise refusal(place, f"a text of {len(value)} characters is too long for a URL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refusal(place, "a lone surrogate is not Unicode text") from None
    return value


def quoted_id(value: str, name: str) -> str:
    """Quote an id whole, so that it cannot become a path of its own.

    A URL drops `.` and `..` as steps even when they are quoted, and with them would name the whole history or
    the whole conversation; so would an empty id.
    """
    if value in {"", ".", ".."}:
        raise refusal(f"path.{name}", f"{value!r} is not an id")
    return quote(url_text(value, f"path.{name}"), safe="")


def encoded(value: Any, path: str) -> bytes:
    """Encode a value as JSON in UTF-8, or raise the error that names the place below `path`.

    NaN and the infinities go as Python writes them, and a lone surrogate as JSON's own escape, so that the
    service refuses them as it would refuse them from anybody.
    """
    fault = _fault(value, _LEVELS)
    if fault is not None:
        raise fault.error(path)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Fault:
    """The first place that cannot be sent: the steps to it, innermost first, and the reason."""

    steps: list[str | int]
    why: str
    json: bool

    def error(self, path: str) -> Exception:
        """Return the error to raise: the service's own for JSON, else a TypeError."""
        place = path + "".join(map(_path_step, reversed(self.steps)))
        return refusal(place, self.why) if self.json else TypeError(f"{place}: {self.why}.")


def _path_step(step: str | int) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", step) else f"[{json.dumps(step)}]"


def _fault(value: Any, levels: int) -> _Fault | None:  # noqa: PLR0911  (a case for each type)
    """Return the first fault; the path is put together on the way back only, so that no fault costs none."""
    if value is None or isinstance(value, (str, float)):
        return None
    if isinstance(value, int):  # of more digits than Python itself would write, or than fit into 64 bits
        return _Fault([], "an integer beyond 64 bits", True) if value.bit_length() > 64 else None
    if not isinstance(value, dict | list | tuple):
        return _Fault([], f"a {type(value).__name__} is not JSON", False)
    if not levels:
        return _Fault([], "nested too deep", True)
    if isinstance(value, dict):
        return _fault_in_object(value, levels)
    for index, item in enumerate(value):
        if (found := _fault(item, levels - 1)) is not None:
            found.steps.append(index)
            return found
    return None


def _fault_in_object(value: dict[Any, Any], levels: int) -> _Fault | None:
    for key, item in value.items():
        if not isinstance(key, str):
            return _Fault(
                [], f"the key {key!r} is a {type(key).__name__}, and JSON's keys are strings", False
            )
        if (found := _fault(item, levels - 1)) is not None:
            found.steps.append(key)
            return found
    return None
