"""Honest when down: the database is away, comes back, or was never there."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from tests.harness import Service, append, command, create, free_port, whole_history


def assert_honest(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["type"].endswith("database-unavailable")


def test_a_service_without_a_database_starts_and_becomes_ready_when_it_comes(tmp_path: Path) -> None:
    engine = Service(tmp_path)
    engine.start()  # so that its engine has a password
    engine.stop()
    url = engine.database_url
    service = Service(tmp_path / "service", mongodb_url=url, server_selection_timeout_ms=500)
    service.directory.mkdir()
    try:
        service.start(wait=False)
        service.wait_until("/health/live")
        with service.client() as client:
            for call in ("/health/ready", "/conversations?user_id=ada", "/conversations/c/messages"):
                began = time.monotonic()
                assert_honest(client.get(call))
                assert time.monotonic() - began < 10
            assert_honest(client.post("/conversations", json={"user_id": "ada"}))
        engine.start()
        service.wait_until("/health/ready", timeout_s=20)
        with service.client() as client:
            conversation = create(client)
            stored = append(client, conversation, {"role": "user", "content": "x"})
            assert whole_history(client, conversation) == stored
            engine.stop()
            assert_honest(client.get(f"/conversations/{conversation}"))
            assert_honest(client.get("/health/ready"))
            assert client.get("/health/live").status_code == 200
            engine.start()
            service.wait_until("/health/ready", timeout_s=20)
            assert whole_history(client, conversation) == stored
        assert service.stop() == 0
    finally:
        service.kill()
        engine.stop()


@pytest.mark.parametrize("arguments", [("create", "test", "--scope", "read"), ("list",), ("revoke", "abc")])
def test_a_command_on_keys_says_in_a_sentence_that_the_database_is_away(
    service: Service, arguments: tuple[str, ...]
) -> None:
    away = f"mongodb://127.0.0.1:{free_port()}/chat_history?replicaSet=rs0"
    limits = {"CHAT_DATABASE_TIMEOUT_MS": "1000", "CHAT_SERVER_SELECTION_TIMEOUT_MS": "300"}
    done = command(service, "keys", *arguments, CHAT_MONGODB_URL=away, **limits)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("chat-history: The service has not reached the database yet. Try again.\n")
    assert "Traceback" not in done.stderr
