"""The service where there is no embedded engine: on Windows (simulated), and from another directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.chat_service import ChatService, ConversationStore
from service.database import Database
from service.errors import DatabaseUnavailable, UnsuitableDatabase
from service.settings import Settings
from service.tenancy import TenantScope
from tests.harness import Service, free_port, new_id, running

# What CPython for Windows lacks of what the service, its libraries and its tests could use. What the standard
# library itself needs on this system stays.
AS_ON_WINDOWS = """
import os, signal, socket, subprocess, tempfile, multiprocessing.util, asyncio, shutil, getpass, sys
for name in ("fcntl", "resource", "pwd", "grp", "uvloop"):
    sys.modules[name] = None
for name in ("geteuid", "getuid", "fwalk", "O_NOFOLLOW", "O_NONBLOCK", "killpg", "mkfifo"):
    delattr(os, name)
for name in ("SIGQUIT", "SIGHUP", "SIGKILL"):
    delattr(signal, name)
import importlib.util
_find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("fcntl", "resource") else _find(name, *rest)
sys.argv[0] = "chat-history"
from service.cli import main
main()
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose engine stands for a MongoDB on another machine."""
    with running(tmp_path_factory.mktemp("elsewhere")) as service:
        yield service


def environment(**changed: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHAT_")}
    return inherited | {"PYTHONPATH": str(Path.cwd()), "USERNAME": "ada"} | changed


def on_windows(directory: Path, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, *arguments],
        env=environment(**changed),
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["--version"],
        ["serve", "--help"],
        ["mongo-url"],
        ["keys", "list"],
        ["verify"],
        ["indexes"],
    ],
    ids=" ".join,
)
def test_without_the_modules_of_unix_a_command_works_on_a_mongodb(
    elsewhere: Service, tmp_path: Path, command: list[str]
) -> None:
    done = on_windows(tmp_path, *command, CHAT_MONGODB_URL=elsewhere.database_url)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", [["serve"], ["keys", "list"], ["verify"]], ids=" ".join)
def test_without_the_modules_of_unix_the_embedded_engine_is_refused_with_a_sentence(
    tmp_path: Path, command: list[str]
) -> None:
    done = on_windows(tmp_path, *command, CHAT_PORT="0")
    assert done.returncode in {1, 2}
    assert "the embedded engine does not run on this system" in done.stderr
    assert "CHAT_MONGODB_URL" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_modules_of_unix_the_service_serves_on_a_mongodb(
    elsewhere: Service, tmp_path: Path
) -> None:
    port = str(free_port())
    log = tmp_path / "service.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", AS_ON_WINDOWS, "serve", "--port", port],
            env=environment(CHAT_MONGODB_URL=elsewhere.database_url),
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/health/ready")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert process.poll() is None, log.read_text()
        assert answer.status_code == 200
        body = {"user_id": "ada", "id": new_id()}
        assert httpx.post(f"http://127.0.0.1:{port}/conversations", json=body).status_code == 201
    finally:
        process.terminate()
        process.wait(30)


async def test_a_program_may_change_its_directory(
    elsewhere: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(elsewhere.directory)
    settings = Settings(_env_file=None)
    assert settings.data_dir == elsewhere.data
    monkeypatch.chdir(tmp_path)
    database = Database(settings)
    await database.open()
    try:
        chat = ChatService(ConversationStore(database, settings), TenantScope())
        made, _ = await chat.get_or_create_conversation("ada", new_id())
        await chat.add_message(made.id, {"role": "user"})
        assert (await chat.get_chat_history(made.id)).messages[0]["role"] == "user"
    finally:
        await database.close()


async def test_a_program_in_a_directory_without_a_service_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(_env_file=None)
    database = Database(settings)
    with pytest.raises(UnsuitableDatabase, match="no embedded engine runs on") as refused:
        await database.open()
    assert str(tmp_path) in refused.value.detail
    chat = ChatService(ConversationStore(database, settings), TenantScope())
    with pytest.raises(DatabaseUnavailable, match="CHAT_DATA_DIR cannot be used"):
        await chat.get_or_create_conversation("ada", "tides")
