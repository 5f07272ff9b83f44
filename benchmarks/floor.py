"""The floor's first half: a bare FastAPI route with an equal body and an equal answer, and no database.

And both halves at once, for what writers side by side can reach over HTTP: a bare route over bare Motor.
"""

from __future__ import annotations

import os
from typing import Any

import orjson
from fastapi import Body, FastAPI, Response
from motor.motor_asyncio import AsyncIOMotorClient

from benchmarks import worker

app = FastAPI()
_client: Any = AsyncIOMotorClient(os.environ["BENCH_MONGODB_URL"], readConcernLevel="majority")
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


@app.post("/transactions/{conversation}")
async def transaction(conversation: str, body: dict[str, Any]) -> Response:
    """Do an append's transaction with bare Motor, and answer as to any write of that size."""
    count = len(body.get("messages", [body]))
    await worker.append(_client, _client.get_default_database(), conversation, count)
    return Response(orjson.dumps(_answers[f"a{count}"]), 201, media_type="application/json")


@app.post("/{name}")
async def write(name: str, body: dict[str, Any]) -> Response:
    """Take a body, and answer a write."""
    assert body
    return Response(orjson.dumps(_answers[name]), 201, media_type="application/json")
