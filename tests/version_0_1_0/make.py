"""Makes `data.tar.xz`: a data directory as version 0.1.0 (commit cf16023) left it, and what it answered.

Run it with the dependencies of the tests, and name a tree of that commit:

    git worktree add ../old cf16023
    .venv/bin/python -m tests.version_0_1_0.make ../old

The service of that commit runs on its embedded engine, SecantusDB 0.7.0b3. Its answers are kept beside the
directory, so that a test can compare them with the answers of today.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.harness import free_port

HERE = Path(__file__).parent
ARCHIVE = HERE / "data.tar.xz"
ANSWERS = HERE / "answers.json"
CALL = {"id": "call_1", "type": "function", "function": {"name": "search_web", "arguments": '{"q": "a"}'}}
# One of each kind of value that JSON and BSON hold differently.
EXACT = {
    "z": 1,
    "a": [2**63 - 1, -(2**63), 1.0, 1, 1e-7, 1.5, True, None, "", "\u00e9\U0001f600"],
    "$ref": "x",
    "$id": 1,
    "dotted.name": {"": 0},
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "Ada"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "metadata": EXACT},
    {"role": "tool", "content": "found", "tool_call_id": "call_1", "x_score": 0.1, "x_exact": EXACT},
    {"role": "developer", "content": "d", "id": "mine"},
]


def fill(client: httpx.Client) -> None:
    """Do once everything that stores something."""
    for user in ("ada", "bob", "eve"):
        for n in range(3):
            about = {"user_id": user, "id": f"{user}-{n}", "title": f"t{n}", "metadata": EXACT}
            client.post("/conversations", json=about).raise_for_status()
            path = f"/conversations/{user}-{n}/messages"
            client.post(path, json={"messages": MESSAGES}).raise_for_status()
            keyed = {"messages": [{"role": "user", "content": f"n{each}"} for each in range(6)]}
            client.post(path, json=keyed, headers={"Idempotency-Key": "once"}).raise_for_status()
    client.delete("/conversations/ada-0/messages/mine").raise_for_status()
    client.post("/conversations/ada-1/pop").raise_for_status()
    client.delete("/conversations/bob-2").raise_for_status()
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
    client.post("/v1/conversations", json={"items": [item], "metadata": {"k": "v"}}).raise_for_status()
    for n, at in enumerate(("2099-01-01T00:00:00Z", None)):
        client.patch(f"/conversations/bob-{n}", json={"expires_at": at}).raise_for_status()


def answers(client: httpx.Client) -> dict[str, Any]:
    """Return what the service answers about all of it, without what depends on the time."""
    found: dict[str, Any] = {}
    for user in ("ada", "bob", "eve"):
        listed = client.get("/conversations", params={"user_id": user}).json()["data"]
        for each in listed:
            path = f"/conversations/{each['id']}"
            found[path] = each
            found[f"{path}/messages"] = client.get(f"{path}/messages").json()["data"]
    return found


def main(tree: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        data = Path(directory) / "data"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CHAT_")} | {
            "PYTHONPATH": str(tree.resolve()),
            "CHAT_PORT": str(port),
            "CHAT_EMBEDDED_PORT": str(free_port()),
            "CHAT_DATA_DIR": str(data),
        }
        program = [sys.executable, "-m", "service"]
        process = subprocess.Popen([*program, "serve"], env=environment, cwd=directory)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            _wait(client)
            fill(client)
            exported = Path(directory) / "eve.ndjson"
            exported.write_bytes(client.get("/users/eve/export").content)
            client.delete("/users/eve").raise_for_status()  # an erasure, and then an import
            again = [*program, "import", str(exported)]
            subprocess.run(again, env=environment, cwd=directory, check=True)
            found = answers(client)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        ANSWERS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            archive.add(data, "data", filter=_nobodys)


def _wait(client: httpx.Client) -> None:
    for _ in range(600):
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError("the service did not start")


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who made it."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main(Path(sys.argv[1]))
