"""The floor's first half: a bare FastAPI route with an equal body and an equal answer, and no database."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Body, FastAPI, Response

app = FastAPI()
_answers: dict[str, Any] = {}


@app.put("/answers/{name}")
async def learn(name: str, answer: Any = Body()) -> None:
    """Keep what the service answers, as Python objects."""
    _answers[name] = answer


@app.get("/lines/{name}")
async def lines(name: str) -> Response:
    """Answer a stream of messages, a line each."""
    body = b"".join(orjson.dumps(each) + b"\n" for each in _answers[name]["data"])
    return Response(body, media_type="application/x-ndjson")


@app.get("/{name}")
async def read(name: str) -> Response:
    """Answer a read."""
    return Response(orjson.dumps(_answers[name]), media_type="application/json")


@app.post("/{name}")
async def write(name: str, body: dict[str, Any]) -> Response:
    """Take a body, and answer a write."""
    assert body
    return Response(orjson.dumps(_answers[name]), 201, media_type="application/json")
