"""Examples of the main calls, as `/openapi.json` and its page show them. A test makes each call for real."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_TIME = "2026-11-24T09:59:23.913Z"
_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "search_web", "arguments": '{"q": "tides"}'},
}
_QUESTION = {"role": "user", "content": "When is high tide?"}
_CALLING = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "At 14:05", "latency": 0.25}
_ITEM = {"type": "message", "role": "user", "content": "When is high tide?"}
_STORED_ITEM = {
    "id": "msg_974cad2dd603827b06e9e6affa3de03d0000",
    "type": "message",
    "role": "user",
    "content": [{"type": "input_text", "text": "When is high tide?"}],
    "status": "completed",
}


def _stored(seq: int, message: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"msg_4dea97727a7c161660c57abba7ef0c58.{seq - 1}",
        "conversation_id": "tides",
        "user_id": "ada",
        "seq": seq,
        "created_at": _TIME,
        **message,
    }


def _conversation(messages: int) -> dict[str, Any]:
    return {
        "id": "tides",
        "user_id": "ada",
        "title": "High tide",
        "metadata": {"channel": "web"},
        "created_at": _TIME,
        "updated_at": _TIME,
        "active_at": _TIME,
        "last_seq": messages,
        "message_count": messages,
        "version": min(messages, 1),
    }


def _page(*values: dict[str, Any]) -> dict[str, Any]:
    return {"data": list(values), "has_more": False, "next": None}


@dataclass(frozen=True)
class Example:
    """An example of a call: its parameters, its bodies by what they are, and the answer to the first body."""

    status: str
    answer: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_to(self, call: dict[str, Any]) -> None:
        """Add the example to a call of an OpenAPI document."""
        for parameter in call.get("parameters", []):
            if parameter["name"] in self.parameters:
                parameter["example"] = self.parameters[parameter["name"]]
        if self.bodies:
            named = {name: {"value": value} for name, value in self.bodies.items()}
            call["requestBody"]["content"]["application/json"]["examples"] = named
        call["responses"][self.status]["content"]["application/json"]["example"] = self.answer


_TIDES = {"conversation_id": "tides"}
# By operation id, in an order in which the calls can be made one after the other.
EXAMPLES = {
    "create_conversation": Example(
        "201",
        _conversation(0),
        bodies={
            "conversation": {
                "user_id": "ada",
                "id": "tides",
                "title": "High tide",
                "metadata": {"channel": "web"},
            }
        },
    ),
    "add_messages": Example(
        "201",
        _page(_stored(1, _QUESTION), _stored(2, _CALLING)),
        _TIDES,
        {"batch": {"messages": [_QUESTION, _CALLING]}, "message": _RESULT, "items": {"items": [_ITEM]}},
    ),
    "get_chat_history": Example(
        "200", _page(_stored(1, _QUESTION), _stored(2, _CALLING)), {**_TIDES, "limit": 2}
    ),
    "list_conversations": Example("200", _page(_conversation(4)), {"user_id": "ada", "limit": 20}),
    "openai_create_conversation": Example(
        "200",
        {
            "id": "conv_01a22dfa7365ad434ccda55438257ce0",
            "object": "conversation",
            "created_at": 1_795_514_363,
            "metadata": {"user": "ada"},
        },
        bodies={"conversation": {"metadata": {"user": "ada"}, "items": [_ITEM]}},
    ),
    "openai_create_items": Example(
        "200",
        {
            "object": "list",
            "data": [_STORED_ITEM],
            "first_id": _STORED_ITEM["id"],
            "last_id": _STORED_ITEM["id"],
            "has_more": False,
        },
        _TIDES,
        {"items": {"items": [_ITEM]}},
    ),
}
