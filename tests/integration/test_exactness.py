"""What JSON went in comes out equal, keys in the same order, or is refused with its path; over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.harness import Service, create, history, new_id, sent
from tests.strategies import messages, objects

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def opened(service: Service) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def exactly(value: Any) -> str:
    """Text that is equal only for equal JSON: the order of keys, 1 and 1.0, 0.0 and -0.0 all count."""
    return json.dumps(value)


def post(client: httpx.Client, conversation: str, text: str | bytes) -> httpx.Response:
    return client.post(f"/conversations/{conversation}/messages", content=text, headers=JSON)


def test_any_message_comes_out_as_it_went_in(opened: httpx.Client) -> None:
    conversation = create(opened, new_id())

    @many
    @given(messages())
    def comes_out_equal(message: dict[str, Any]) -> None:
        answer = post(opened, conversation, json.dumps(message))
        assert answer.status_code == 201, answer.text
        stored = answer.json()
        assert exactly(sent(stored)) == exactly(message)
        assert exactly(history(opened, conversation, last=1)["data"]) == exactly([stored])
        one = opened.get(f"/conversations/{conversation}/messages/{stored['id']}")
        assert exactly(one.json()) == exactly(stored)

    comes_out_equal()


def test_any_message_is_replayed_as_it_was_stored(opened: httpx.Client) -> None:
    conversation = create(opened, new_id())

    @settings(many, max_examples=50)
    @given(messages())
    def is_replayed(message: dict[str, Any]) -> None:
        headers = JSON | {"Idempotency-Key": new_id("k")}
        path = f"/conversations/{conversation}/messages"
        first = opened.post(path, content=json.dumps(message), headers=headers)
        again = opened.post(path, content=json.dumps(message), headers=headers)
        assert (first.status_code, again.status_code) == (201, 200)
        assert again.text == first.text

    is_replayed()


def test_any_metadata_of_a_conversation_comes_out_as_it_went_in(opened: httpx.Client) -> None:
    @many
    @given(objects, objects)
    def comes_out_equal(metadata: dict[str, Any], changed: dict[str, Any]) -> None:
        body = {"user_id": "ada", "metadata": metadata}
        made = opened.post("/conversations", content=json.dumps(body), headers=JSON)
        assert made.status_code == 201, made.text
        path = made.headers["location"]
        assert exactly(made.json()["metadata"]) == exactly(metadata)
        assert exactly(opened.get(path).json()["metadata"]) == exactly(metadata)
        patched = opened.patch(path, content=json.dumps({"metadata": changed}), headers=JSON)
        assert exactly(patched.json()["metadata"]) == exactly(changed)
        assert exactly(opened.get(path).json()["metadata"]) == exactly(changed)

    comes_out_equal()


def nested(levels: int) -> str:
    return '[{"a":' * (levels // 2) + ("[]" if levels % 2 else "1") + "}]" * (levels // 2)


EXACT: list[str] = [
    "9007199254740993",
    "9223372036854775807",
    "-9223372036854775808",
    "-0.0",
    "1e308",
    "5e-324",
    "[1, 1.0]",
    "0.30000000000000004",
    "123456789.12345678",
    r'"\u0000"',
    r'"\ud83d\ude00"',
    r'"\uffff"',
    '"e\u0301 \u00e9"',
    r'{"": {"": ""}}',
    '{"__proto__": {"x": 1}}',
    nested(90),
    json.dumps(list(range(100_000))),
    json.dumps("x" * 1_000_000),
    json.dumps({str(n): n for n in range(5_000)}),
]


@pytest.mark.parametrize("field", ["tool_calls", "unheard_of", "metadata", "content"])
@pytest.mark.parametrize("value", EXACT, ids=lambda text: text[:20])
def test_what_is_at_the_edge_is_held(opened: httpx.Client, field: str, value: str) -> None:
    wrapped = {"content": f"[{value}]", "metadata": f'{{"k": {value}}}'}.get(field, value)
    if value == nested(90) and wrapped != value:
        wrapped = nested(90) if field == "content" else '{"k":' + nested(88) + "}"
    conversation = create(opened, new_id())
    answer = post(opened, conversation, f'{{"role": "user", "{field}": {wrapped}}}')
    assert answer.status_code == 201, answer.text
    (stored,) = history(opened, conversation)["data"]
    assert exactly(stored[field]) == exactly(json.loads(wrapped))


REFUSED: list[tuple[str, str]] = [
    ("9223372036854775808", ""),
    ("-9223372036854775809", ""),
    ("9" * 5_000, ""),
    ("1e400", ""),
    ("-1e400", ""),
    ("NaN", ""),
    ("Infinity", ""),
    ("-Infinity", ""),
    (r'"\ud800"', ""),
    (r'["ok", "\udfff\ud800"]', "[1]"),
    (r'{"a\u0000": 1}', r'["a\u0000"]'),
    (r'{"\ud800": 1}', r'["\ud800"]'),
    ('{"a": [{"k": 1, "b": 2, "k": 3}]}', ".a[0]"),
    (nested(92), ".deep"),
    (nested(5_000), ".deep"),
    ("[" * 5_000 + "]" * 5_000, ".deep"),
]


@pytest.mark.parametrize("field", ["tool_calls", "unheard_of", "metadata", "content"])
@pytest.mark.parametrize(("value", "below"), REFUSED, ids=lambda text: text[:20])
def test_what_cannot_be_held_is_refused_with_its_path_and_nothing_is_stored(
    opened: httpx.Client, field: str, value: str, below: str
) -> None:
    wrap: dict[str, tuple[str, str]] = {"content": ("[{}]", "[0]"), "metadata": ('{{"k": {}}}', ".k")}
    shape, step = wrap.get(field, ("{}", ""))
    conversation = create(opened, new_id())
    batch = f'{{"messages": [{{"role": "user"}}, {{"role": "user", "{field}": {shape.format(value)}}}]}}'
    answer = post(opened, conversation, batch)
    assert answer.status_code == 422, answer.text
    (fault,) = answer.json()["errors"]
    expected = f"$.messages[1].{field}{step}"
    if below == ".deep":
        assert fault["path"].startswith(f"$.messages[1].{field}"), fault
        assert "90 levels" in fault["message"]
    else:
        assert fault["path"] == expected + below
    assert history(opened, conversation)["data"] == []
    assert opened.get(f"/conversations/{conversation}").json()["last_seq"] == 0


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ('{"user_id": "ada", "user_id": "bob"}', "$"),
        ('{"user_id": "ada", "metadata": {"a": 1, "a": 2}}', "$.metadata"),
        ('{"user_id": "ada", "metadata": {"a": NaN}}', "$.metadata.a"),
        ('{"user_id": "ada", "title": "\\ud800"}', "$.title"),
        ('{"user_id": NaN}', "$.user_id"),
    ],
)
def test_the_same_of_a_conversation(opened: httpx.Client, body: str, path: str) -> None:
    answer = opened.post("/conversations", content=body, headers=JSON)
    assert answer.status_code == 422
    assert [each["path"] for each in answer.json()["errors"]] == [path]


def test_a_message_of_almost_16_mib_is_held_and_a_larger_one_is_refused(opened: httpx.Client) -> None:
    conversation = create(opened, new_id())
    fits = 16 * 1024 * 1024 - 32 * 1024 - 100
    text = "x" * fits
    assert post(opened, conversation, json.dumps({"role": "user", "content": text})).status_code == 201
    (stored,) = history(opened, conversation)["data"]
    assert stored["content"] == text
    answer = post(opened, conversation, json.dumps({"role": "user", "content": text + "x" * 200}))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["path"] == "$"
    assert "bytes as BSON" in answer.json()["errors"][0]["message"]
