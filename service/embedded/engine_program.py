"""Finds the program of the embedded engine, and says how it is installed where it is missing."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from service.embedded.data_directory import EmbeddedEngineError

_PROGRAM = "secantusd-py"
# The machines for which there are wheels of the engine, as `pyproject.toml` has them.
_WHEELS = {("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")}


def find() -> str:
    """Find the engine's program, in this environment first. Raises EmbeddedEngineError if there is none."""
    if find_spec("fcntl") is None:
        raise EmbeddedEngineError(
            "CHAT_MONGODB_URL is not set, and the embedded engine does not run on this system, because the "
            "service guards its data with the locks of Linux and macOS. Name a MongoDB with CHAT_MONGODB_URL."
        )
    beside = Path(sys.executable).parent / _PROGRAM
    found = str(beside) if beside.exists() else shutil.which(_PROGRAM)
    if found is None or (found == str(beside) and find_spec("secantus") is None):
        raise EmbeddedEngineError(
            f"CHAT_MONGODB_URL is not set, and the embedded engine is not installed. {remedy()}"
        )
    return found


def remedy() -> str:
    """Say how the engine is installed, or that there is none for this machine (see `pyproject.toml`)."""
    machine = (sys.platform, platform.machine())
    if sys.version_info < (3, 14) and machine in _WHEELS:
        return "Install it, in a clone of the repository: pip install '.[embedded]'. Or name a MongoDB."
    return (
        "There is none for this machine: it needs CPython 3.11 to 3.13 on Linux (x86-64, arm64) or macOS "
        f"(arm64), and this is {platform.python_version()} on {' '.join(machine)}. Name a MongoDB with "
        "CHAT_MONGODB_URL, or use another Python."
    )
