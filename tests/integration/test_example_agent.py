"""The example agent of the documents, in processes of its own: nothing is lost, and nothing comes twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.harness import Service, new_id, whole_history
from tests.proxy import proxied

AGENT = Path(__file__).parents[2] / "docs" / "examples" / "agent.py"


def started(kind: str, conversation: str, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, AGENT, kind, conversation],
        env=os.environ | {"CHAT_HISTORY_URL": f"http://127.0.0.1:{port}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_agents_in_several_processes_count_together_and_another_one_watches(
    service: Service, client: httpx.Client
) -> None:
    conversation = new_id()
    with proxied(service.port) as proxy:
        processes = [
            started("watch", conversation, proxy.port),
            *(started("count", conversation, proxy.port) for _ in range(3)),
        ]
        try:
            deadline = time.monotonic() + 60
            for count in (10, 40):  # and each time all of them lose their connections
                while len(messages(client, conversation)) < count:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                proxy.down()
                proxy.up()
            outputs = [process.communicate(timeout=60) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0] * 4, outputs
    said = [message for message in whole_history(client, conversation) if message["role"] == "assistant"]
    assert [message["content"] for message in said] == [f"{number}" for number in range(1, 41)]
    assert outputs[0][0].splitlines() == [f"{each['seq']} {each['content']}" for each in said]


def messages(client: httpx.Client, conversation: str) -> list[object]:
    answer = client.get(f"/conversations/{conversation}/messages", params={"limit": 1_000})
    return list(answer.json()["data"]) if answer.status_code == 200 else []


def test_the_example_is_as_short_as_it_is_called() -> None:
    assert len(AGENT.read_text().splitlines()) <= 50
