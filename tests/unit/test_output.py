"""Outputs that a command cannot write to: a sentence and the exit code 1, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "service"]
FULL = Path("/dev/full")


def run(arguments: list[str], output: int) -> tuple[int, str]:
    # Python flushes an output that is buffered only when the command has ended.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [*PROGRAM, *arguments]
    done = subprocess.run(
        command, env=environment, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["keys", "--help"]], ids=" ".join)
@pytest.mark.skipif(not FULL.exists(), reason="only Linux has a device that is always full")
def test_an_output_that_is_full_is_a_sentence(arguments: list[str]) -> None:
    with FULL.open("w") as full:
        code, said = run(arguments, full.fileno())
    assert code == 1
    assert said == "chat-history: A file or the output cannot be used: No space left on device.\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["keys", "--help"]], ids=" ".join)
def test_a_pipe_whose_reader_has_gone_ends_a_command_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run(arguments, writing) == (1, "")
    finally:
        os.close(writing)


def test_an_output_that_is_closed_is_no_error() -> None:
    command = ["bash", "-c", '"$@" >&-', "bash", *PROGRAM, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
