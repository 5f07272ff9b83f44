"""For the tests of `openai`: what they ask for by fixed ids is there before each of them."""

from __future__ import annotations

import os

import httpx
import pytest

ITEMS = ("msg_abc", "after")


@pytest.fixture(autouse=True)
def _fixed_ids() -> None:
    with httpx.Client(base_url=os.environ["COMPAT_URL"]) as client:
        client.post("/conversations", json={"id": "conv_123", "user_id": "default"}).raise_for_status()
        items = [{"id": each, "role": "user", "content": "hello"} for each in ITEMS]
        for item in items:
            answer = client.post("/v1/conversations/conv_123/items", json={"items": [item]})
            answer.raise_for_status()
