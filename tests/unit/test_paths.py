"""Ids in URLs: each comes back from the path as it was, and nothing else is taken for it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import service.api
from service.api import paths
from service.errors import MalformedUrl
from service.tenancy import unescaped
from tests.strategies import ids


def scope(raw: bytes, query: bytes = b"", **more: Any) -> dict[str, Any]:
    """A request as uvicorn gives it to an application."""
    return {"raw_path": raw, "path": unquote(raw.decode("latin-1")), "query_string": query, **more}


def percent_encoded(text: str, spare: frozenset[int]) -> str:
    """Encode a text, and of the characters that need no encoding those in `spare`, in small letters."""
    return "".join(
        f"%{byte:02x}" if byte in spare else quote(bytes([byte]), safe="!$&'()*+,;=:@")
        for byte in text.encode()
    )


@settings(max_examples=2_500)
@given(st.lists(ids, min_size=1, max_size=3), st.frozensets(st.integers(0, 255)))
def test_each_step_of_a_path_is_one_id(steps: list[str], spare: frozenset[int]) -> None:
    raw = "/".join(["", *(percent_encoded(each, spare) for each in steps)])
    request = scope(raw.encode())
    paths.decode(request)
    assert list(map(unescaped, request["path"].split("/"))) == ["", *steps]
    assert "/".join(["", *map(paths.encoded, steps)]).isascii()


@pytest.mark.parametrize("place", ["path", "query"])
@pytest.mark.parametrize(
    "wrong", [b"%", b"100%", b"a%2", b"%zz", b"%%41", b"%FF", b"%C3", b"%ED%A0%80", b"%C0%AF"]
)
def test_what_is_not_percent_encoded_utf_8_is_refused(place: str, wrong: bytes) -> None:
    request = scope(b"/c/" + wrong) if place == "path" else scope(b"/c", b"user_id=" + wrong + b"&limit=1")
    with pytest.raises(MalformedUrl):
        paths.decode(request)


def test_a_character_is_not_put_together_of_two_parameters() -> None:
    with pytest.raises(MalformedUrl):
        paths.decode(scope(b"/c", b"a=%C3&%A9=b"))
    with pytest.raises(MalformedUrl):
        paths.decode(scope(b"/c", "user_id=é".encode()))


def test_a_path_that_the_server_gives_decoded_only_is_taken_as_it_is() -> None:
    request: dict[str, Any] = {"path": "/c/100%/x", "query_string": b""}
    paths.decode(request)
    assert unescaped(request["path"].split("/")[2]) == "100%"
    # An application around this one has taken a prefix off.
    request = {"path": "/c/a%2Fb", "raw_path": b"/api/c/a%252Fb", "query_string": b""}
    paths.decode(request)
    assert unescaped(request["path"].split("/")[2]) == "a%2Fb"


def test_every_id_in_a_path_is_declared_as_one() -> None:
    """Otherwise a route would get the id in the form in which it is routed."""
    names = [
        name
        for module in Path(service.api.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/")
        for name in re.findall(r"\{(.*?)\}", node.value)
    ]
    assert len(names) > 10
    assert [each for each in names if not each.endswith("_id:id")] == []
