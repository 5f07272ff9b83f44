"""Our OpenAPI document, held against what the service really answers, with all schemathesis's checks."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case, HookContext

from service.api.bodies import cursor
from service.api.examples import EXAMPLES
from service.app import create_app
from service.chat_service import ListPosition
from service.settings import Settings
from tests.harness import Service

DOCUMENT = create_app(Settings(_env_file=None)).openapi()
# The stream of events has no end; test_live holds its events against the document.
schema = schemathesis.openapi.from_dict(DOCUMENT).exclude(path="/events")
MAXIMA = ("max_tokens", "max_messages", "max_turns")  # of which a context takes exactly one
CURSOR = cursor(ListPosition(datetime(2026, 1, 1, tzinfo=UTC), "c"))


@schema.hook
def map_case(_: HookContext, case: Case[Any]) -> Case[Any]:
    """Keep to the rules that OpenAPI has no words for; other tests break each of them."""
    query: Any = case.query or {}
    headers: Any = case.headers or {}
    body: Any = case.body
    if "X-User-Id" in headers:
        headers["X-User-Id"] = quote(headers["X-User-Id"], safe="")
    if "If-Match" in headers:
        headers["If-Match"] = '"1"'  # the generator of headers does not keep to its pattern
    _keep_to_rules_of_query(query, case.path)
    if case.path.endswith("/context"):
        case.query = {name: query[name] for name in query if name not in MAXIMA} | {"max_turns": 5}
    if isinstance(body, dict) and case.method == "PUT":
        _name_each(body, query)
    elif isinstance(body, dict):
        _without_ids(body, query, headers)
    case.body = _storable(body)
    return case


def _keep_to_rules_of_query(query: Any, path: str) -> None:
    if "wait" in query:
        for name in ("before", "last", "order", "until"):
            query.pop(name, None)
        query |= {"after": query.get("after", 0), "wait": 0}
    if "last" in query:
        query.pop("limit", None)
        query.pop("order", None)
    if "cursor" in query:
        query["cursor"] = CURSOR
    if "after" in query and path == "/v1/conversations":
        query["after"] = CURSOR


def _name_each(body: dict[str, Any], query: Any) -> None:
    query.pop("after", None)  # it is not behind the last message
    for number, message in enumerate(_list(body.get("messages"))):
        if isinstance(message, dict):
            message["id"] = f"m{number}"


def _without_ids(body: dict[str, Any], query: Any, headers: Any) -> None:
    if isinstance(body.get("conversation"), dict):
        query.pop("user_id", None)  # it is the user of the conversation
    for message in [body, *_list(body.get("messages"))]:
        # Ids do not go with a key, and stand once in a batch.
        if isinstance(message, dict) and ("Idempotency-Key" in headers or message is not body):
            message.pop("id", None)
    for item in _list(body.get("items"))[1:]:
        if isinstance(item, dict):
            item.pop("id", None)  # it stands once in a request


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _storable(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key.replace("\0", "0") if isinstance(key, str) else key: _storable(item)
            for key, item in value.items()
        }
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return 0
    return [_storable(item) for item in value] if isinstance(value, list) else value


def shape(value: Any) -> Any:
    """Return what an example promises of an answer: names and types, and what a list begins with."""
    if isinstance(value, dict):
        return {name: shape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return type(value)


def test_every_example_of_the_description_is_a_call_that_is_answered_so(client: httpx.Client) -> None:
    client.delete("/conversations/tides")
    for operation_id, example in EXAMPLES.items():
        path, method = next(
            (path, method)
            for path, calls in DOCUMENT["paths"].items()
            for method, call in calls.items()
            if call["operationId"] == operation_id
        )
        query = dict(example.parameters)
        for name in re.findall(r"\{(\w+)\}", path):
            path = path.replace(f"{{{name}}}", query.pop(name))
        answers = [
            client.request(method, path, params=query, json=body)
            for body in example.bodies.values() or [None]
        ]
        assert [answer.is_success for answer in answers] == [True] * len(answers), answers[-1].text
        assert answers[0].status_code == int(example.status), operation_id
        real, shown = shape(answers[0].json()), shape(example.answer)
        real.pop("next", None), shown.pop("next", None)  # the end, or a position
        assert real == shown, operation_id


@schema.parametrize()
@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_every_answer_is_one_that_openapi_declares(case: Case[Any], service: Service) -> None:
    case.call_and_validate(base_url=service.url, timeout=30)
