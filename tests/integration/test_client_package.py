"""The client as a distribution: its dependencies, its generated half, its environment, its newer calls."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.messages import AIMessage
from packaging.requirements import Requirement

from chat_history_client import ApiError, AsyncChatHistoryClient, ChatHistoryClient, NotFound
from chat_history_client.langchain import restored as restored_by_langchain
from chat_history_client.pydantic_ai import restored as restored_by_pydantic_ai
from tests.harness import Service, new_id

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "clients" / "python"


def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


# -- the package -----------------------------------------------------------------------------------------


def test_the_synchronous_client_is_what_the_asynchronous_one_generates() -> None:
    done = run(CLIENT / "generate_sync.py", "--check")
    assert done.returncode == 0, done.stderr


def names(kind: Any) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_both_clients_have_the_same_calls() -> None:
    assert names(AsyncChatHistoryClient) - {"aclose"} == names(ChatHistoryClient) - {"close"}


@pytest.mark.parametrize("module", ["service.py", "service/__init__.py"])
def test_the_client_is_imported_in_a_project_with_a_service_of_its_own(tmp_path: Path, module: str) -> None:
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).write_text("MINE = True\n")
    adapters = "openai_agents, langchain, pydantic_ai"
    code = f"import chat_history_client; from chat_history_client import {adapters}"
    done = run("-W", "ignore", "-c", f"{code}; import service; assert service.MINE", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_client_imports_neither_the_service_nor_what_that_needs() -> None:
    heavy = "{'service', 'beanie', 'motor', 'pymongo', 'bson', 'fastapi', 'pydantic', 'uvicorn'}"
    done = run("-c", f"import sys, chat_history_client; assert not {heavy} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_client_brings_at_most_twelve_packages() -> None:
    found: set[str] = set()
    wanted = ["chat-history-client"]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            parsed = map(Requirement, requires(name) or [])
            wanted += [
                each.name for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})
            ]
    assert {"httpx", "tenacity"} <= found
    assert len(found) <= 12, sorted(found)


EXAMPLE = re.findall(r"```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.DOTALL)[0]


def test_the_example_of_the_clients_readme_prints_what_it_says(service: Service) -> None:
    conversation = new_id()
    code = EXAMPLE.replace("http://127.0.0.1:8000", service.url).replace("ada-client", conversation)
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"^# (.*)$", EXAMPLE, re.MULTILINE)


EVENTS = """
from chat_history_client import ChatHistoryClient

with ChatHistoryClient() as history:
    for event in history.tail("tides", after=0):
        if event["event"] == "deleted":
            last: int = event["data"]["upto"]
        elif event["event"] == "head":
            last = event["data"]["last_seq"]
    left: int | None = history.get_context("tides", max_turns=2)["left_out"]["tokens"]
"""


def test_the_example_of_the_clients_readme_passes_mypy_strict_and_its_events_are_typed(
    tmp_path: Path,
) -> None:
    files = {
        "example.py": EXAMPLE,
        "wrong.py": EXAMPLE.replace('title="Tides"', "title=1").replace("add_messages", "append"),
        "events.py": EVENTS,
        "wrong_events.py": EVENTS.replace("upto", "last_seq").replace('"head"', '"haed"'),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = run("-m", "mypy", "--strict", "--config-file=", *files, cwd=tmp_path)
    faults = [line.partition(":")[0] for line in done.stdout.splitlines() if ": error:" in line]
    assert sorted(faults) == ["wrong.py"] * 2 + ["wrong_events.py"] * 2, done.stdout + done.stderr


# -- the environment -------------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., httpx.Request]:
    monkeypatch.delenv("CHAT_HISTORY_URL", raising=False)
    monkeypatch.delenv("CHAT_HISTORY_API_KEY", raising=False)

    def send(*arguments: Any, **options: Any) -> httpx.Request:
        seen: list[httpx.Request] = []

        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(request)
            return httpx.Response(200, json={})

        transport = httpx.MockTransport(answer)
        with ChatHistoryClient(*arguments, transport=transport, **options) as history:
            history.get_conversation("c")
        return seen[0]

    return send


def test_url_and_key_come_from_the_environment_unless_they_are_given(
    sent: Callable[..., httpx.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = sent()
    assert (request.url.host, request.url.port) == ("127.0.0.1", 8000)
    assert "Authorization" not in request.headers
    monkeypatch.setenv("CHAT_HISTORY_URL", "https://chat.example.com")
    monkeypatch.setenv("CHAT_HISTORY_API_KEY", "from-environment")
    request = sent()
    assert request.url.host == "chat.example.com"
    assert request.headers["Authorization"] == "Bearer from-environment"
    request = sent("http://given", api_key="given")
    assert (request.url.host, request.headers["Authorization"]) == ("given", "Bearer given")
    assert "Authorization" not in sent(api_key="").headers
    for header in ("authorization", "X-API-Key"):
        headers = sent(headers={header: "mine"}).headers
        assert headers[header] == "mine"
        assert len({"authorization", "x-api-key"} & set(headers)) == 1
        assert len(headers.get_list("authorization")) <= 1
        with pytest.raises(ValueError, match="not both"):
            sent(headers={header: "mine"}, api_key="given")
    monkeypatch.setenv("CHAT_HISTORY_URL", "")
    assert sent().url.host == "127.0.0.1"


@pytest.mark.parametrize("kind", [AsyncChatHistoryClient, ChatHistoryClient])
def test_an_environment_that_cannot_work_is_refused_by_name(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_HISTORY_URL", "localhost:8000")
    with pytest.raises(ValueError, match="CHAT_HISTORY_URL has the scheme"):
        kind()
    monkeypatch.setenv("CHAT_HISTORY_URL", "http://localhost:8000")
    monkeypatch.setenv("CHAT_HISTORY_API_KEY", "key\n")
    with pytest.raises(ValueError, match="header Authorization") as refused:
        kind()
    assert "key\n" not in str(refused.value)


# -- the calls that neither client had -----------------------------------------------------------------


async def test_a_user_is_listed_exported_and_erased(service: Service) -> None:
    user = new_id("user")
    async with AsyncChatHistoryClient(service.url) as history:
        ids = [(await history.get_or_create_conversation(user))["id"] for _ in range(55)]
        message = await history.add_message(ids[0], {"role": "user", "content": "hi"}, user_id=user)
        assert message["seq"] == 1
        listed = [conversation["id"] async for conversation in history.stream_conversations(user)]
        assert listed[0] == ids[0]
        assert sorted(listed) == sorted(ids)
        lines = [line async for line in history.export_user(user)]
        assert [line["message"] for line in lines if line["type"] == "message"] == [message]
        assert lines[-1] == {"type": "end", "conversations": 55, "messages": 1}
        counts = {"user_id": user, "conversations": 55, "messages": 1}
        assert await history.erase_user(user, dry_run=True) == {**counts, "dry_run": True}
        assert await history.erase_user(user) == {**counts, "dry_run": False}
        assert [each async for each in history.stream_conversations(user)] == []


def test_the_synchronous_client_lists_exports_and_erases_a_user(service: Service) -> None:
    user = new_id("user")
    with ChatHistoryClient(service.url) as history:
        conversation = history.get_or_create_conversation(user)
        history.add_message(conversation["id"], {"id": "m", "role": "user", "content": "hi"})
        history.add_message(conversation["id"], {"id": "m", "role": "user", "content": "hi"})
        assert [each["message_count"] for each in history.stream_conversations(user)] == [1]
        assert [line["type"] for line in history.export_user(user)] == [
            "export",
            "conversation",
            "message",
            "end",
        ]
        assert history.erase_user(user)["messages"] == 1


def test_an_export_that_breaks_off_is_an_error_and_not_repeated() -> None:
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, text='{"type":"export"}\n')

    with ChatHistoryClient("http://x", transport=httpx.MockTransport(answer)) as history:
        lines = history.export_user("ada")
        assert next(lines) == {"type": "export"}
        with pytest.raises(httpx.TransportError, match="cut short"):
            next(lines)
    assert len(sent) == 1


def test_expiry_and_times_are_datetimes_or_texts(service: Service) -> None:
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    with ChatHistoryClient(service.url) as history:
        made = history.get_or_create_conversation("ada", expires_at=soon)
        assert datetime.fromisoformat(made["expires_at"]) == soon
        conversation = made["id"]
        changed = history.update_conversation(conversation, expires_at=(soon + timedelta(days=1)).isoformat())
        assert datetime.fromisoformat(changed["expires_at"]) == soon + timedelta(days=1)
        assert "expires_at" not in history.update_conversation(conversation, expires_at=None)
        (message,) = history.add_messages(conversation, [{"role": "user", "content": "hi"}])
        since = message["created_at"]
        assert history.get_chat_history(conversation, since=since).data == [message]
        assert list(history.stream_chat_history(conversation, since=soon)) == []
        assert history.get_chat_history(conversation, until=soon, role="user").data == [message]
        with pytest.raises(ApiError) as refused:
            history.get_or_create_conversation("ada", expires_at=soon.replace(tzinfo=None))
        assert refused.value.errors[0]["path"] == "$.expires_at"


ITEMS: list[Any] = [
    {"role": "user", "content": "hi"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "fc_1"},
    {"type": "function_call_output", "call_id": "c", "output": "done"},
]


async def test_items_are_added_read_and_taken_by_both_clients(service: Service) -> None:
    conversation = new_id()
    async with AsyncChatHistoryClient(service.url) as asynchronous:
        with pytest.raises(NotFound):
            await asynchronous.add_items(conversation, ITEMS)
        await asynchronous.add_all_items(conversation, ITEMS, user_id="ada")
        stored = await asynchronous.add_items(conversation, ITEMS, idempotency_key="k", user_id="ada")
        assert [message["items"] for message in stored] == [[item] for item in ITEMS]
        assert [item async for item in asynchronous.stream_items(conversation)] == ITEMS * 2
        assert await asynchronous.last_items(conversation, 2) == ITEMS[1:]
        assert await asynchronous.last_items(conversation, 0) == []
        assert await asynchronous.pop_item(conversation) == ITEMS[2]
    with ChatHistoryClient(service.url) as history:
        assert history.add_items(conversation, ITEMS, idempotency_key="new")[0]["items"] == [ITEMS[0]]
        assert list(history.stream_items(conversation, user_id="ada")) == [*ITEMS, *ITEMS[:2], *ITEMS]
        assert history.last_items(conversation, 4) == [ITEMS[1], *ITEMS]
        assert history.pop_item(conversation) == ITEMS[2]
        with pytest.raises(ApiError) as refused:
            history.add_all_items(conversation, [*ITEMS, {"role": 5}], user_id="ada")
        assert refused.value.errors[0]["path"] == "$.items[3].role"


# -- messages that no adapter stored ---------------------------------------------------------------------


CALLS: list[tuple[Any, tuple[str, Any]]] = [
    ({"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}, ("f", {"a": 1})),
    ({"id": "c", "function": {"name": "f", "arguments": ""}}, ("f", {})),
    ({"id": "c", "name": "f", "args": {"a": 1}}, ("f", {"a": 1})),
    ({"name": "f", "arguments": '{"a": 1}'}, ("f", {"a": 1})),
    ({"id": "c", "function": {"name": "f", "arguments": "{"}}, ("f", "{")),
    ({"id": "c", "function": {"name": "f", "arguments": "[1]"}}, ("f", "[1]")),
    ({"id": "c", "name": "f", "args": [1]}, ("f", "[1]")),
    ({"id": 5, "other": 1}, ("unknown", {"id": 5, "other": 1})),
    (5, ("unknown", "5")),
]


@pytest.mark.parametrize(("call", "expected"), CALLS)
def test_tool_calls_of_any_form_are_read_by_the_adapters(call: Any, expected: Any) -> None:
    for calls in ([call, call], call):
        message = {"id": "m", "role": "assistant", "content": None, "tool_calls": calls}
        (read,) = restored_by_langchain([message])
        assert isinstance(read, AIMessage)
        assert (read.content, read.id) == ("", "m")
        name, args = expected
        found = [*read.tool_calls, *read.invalid_tool_calls]
        assert [(each["name"], each["args"]) for each in found] == [(name, args)] * (
            2 if calls != call else 1
        )
        assert bool(read.tool_calls) == isinstance(args, dict)
        (response,) = restored_by_pydantic_ai([message])
        assert [part.part_kind for part in response.parts] == ["tool-call"] * len(found)


@pytest.mark.parametrize("content", [None, "", "text", [], ["a", {"type": "text", "text": "b"}], [1, None]])
@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system", "developer", "model"])
def test_contents_of_any_form_are_read_by_the_adapters(role: str, content: Any) -> None:
    kinds = {"user": "human", "assistant": "ai", "tool": "tool", "model": "ai"}
    message = {"id": "m", "role": role, "content": content}
    assert restored_by_langchain([message])[0].type == kinds.get(role, "system")
    (read,) = restored_by_pydantic_ai([message])
    assert read.kind == ("response" if role in {"assistant", "model"} else "request")
