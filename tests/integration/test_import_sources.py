"""What `chat-history import` reads: files, pipes, the standard input; and what it says of anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Service, append, contents, create, new_id, running, whole_history


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("sources")) as service:
        yield service


def run(service: Service, command: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run a line of the shell in which `chat-history` is the command line."""
    program = f"chat-history() {{ '{sys.executable}' -m service \"$@\"; }}; {command}"
    return subprocess.run(
        ["bash", "-c", program],
        input=given,
        env=service.environment() | {"PYTHONPATH": str(Path.cwd())},
        cwd=service.directory,
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        "chat-history import -",
        "chat-history import --user {user} -",
        "chat-history import /dev/stdin",
        "cat | chat-history import --user {user} /dev/stdin",
        "chat-history import --user {user} <(cat)",
        "cat > {user}.ndjson; chat-history import {user}.ndjson",
    ],
)
def test_an_export_is_imported_from_a_file_a_pipe_and_the_standard_input(
    started: Service, command: str
) -> None:
    user = new_id("user")
    with started.client() as client:
        conversation = create(client, user=user)
        append(client, conversation, *({"role": "user", "content": f"{n}"} for n in range(50)))
        exported = client.get(f"/users/{user}/export").content
        client.delete(f"/users/{user}")
        done = run(started, command.format(user=user), exported)
        assert done.returncode == 0, done.stderr
        assert b"1 conversations, 50 messages imported" in done.stdout
        assert contents(whole_history(client, conversation)) == [f"{n}" for n in range(50)]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("chat-history import -", "standard input, line 1: The file is not an export"),
        ("chat-history import - <&-", "The standard input is closed"),
        ("chat-history import /dev/null", "/dev/null, line 1: The file is not an export"),
        ("chat-history import missing", "does not exist"),
        ("chat-history import .", "is a directory"),
        ("printf '\\377\\000' > binary; chat-history import binary", "binary, line 1: "),
        ("printf '' > empty; chat-history import empty", "empty, line 1: The file is not an export"),
        ("printf '{}\\n' | chat-history import -", "standard input, line 1: The file is not an export"),
    ],
)
def test_what_is_no_export_is_answered_with_a_sentence(started: Service, command: str, says: str) -> None:
    done = run(started, command, b"")
    assert done.returncode in {1, 2}
    assert says in " ".join(str(done.stderr, "utf-8").split())
    assert b"Traceback" not in done.stderr


COMMANDS = ["keys list", "verify", "mongo-url", "indexes", "expire --dry-run"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_whose_reader_has_gone_ends_without_a_traceback(started: Service, command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "service", *command.split()],
            env=started.environment(),
            cwd=started.directory,
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
