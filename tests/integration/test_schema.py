"""Our OpenAPI document, held against what the service really answers, with all schemathesis's checks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case, HookContext

from service.api.schemas import cursor
from service.app import create_app
from service.chat_service import ListPosition
from service.settings import Settings
from tests.harness import Service

schema = schemathesis.openapi.from_dict(create_app(Settings(_env_file=None)).openapi())
CURSOR = cursor(ListPosition(datetime(2026, 1, 1, tzinfo=UTC), "c"))


@schema.hook
def map_case(_: HookContext, case: Case) -> Case:
    """Keep to the rules that OpenAPI has no words for; other tests break each of them."""
    query, headers, body = case.query or {}, case.headers or {}, case.body
    if "last" in query:
        query.pop("limit", None)
        query.pop("order", None)
    if "cursor" in query:
        query["cursor"] = CURSOR
    if "after" in query and case.path == "/v1/conversations":
        query["after"] = CURSOR
    if isinstance(body, dict):
        for message in [body, *_list(body.get("messages"))]:
            # Ids do not go with a key, and stand once in a batch.
            if isinstance(message, dict) and ("Idempotency-Key" in headers or message is not body):
                message.pop("id", None)
        for item in _list(body.get("items"))[1:]:
            if isinstance(item, dict):
                item.pop("id", None)  # it stands once in a request
    case.body = _storable(body)
    return case


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


@schema.parametrize()
@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_every_answer_is_one_that_openapi_declares(case: Case, service: Service) -> None:
    case.call_and_validate(base_url=service.url, timeout=30)
