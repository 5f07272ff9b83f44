"""Reads the record of the embedded engine in the data directory: its address and its password."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# The name of the file. service/embedded/ writes the file.
ENGINE_RECORD = "engine.json"


def read_engine_record(data_dir: Path) -> dict[str, Any]:
    """Return what the data directory records of its engine. Raises OSError if it records no engine."""
    # Neither a link nor a pipe. Windows has neither flag, and runs no embedded engine.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(data_dir / ENGINE_RECORD, flags)
    with os.fdopen(descriptor) as file:
        try:
            record = json.load(file)
        except ValueError:
            record = None
    if not isinstance(record, dict) or not record.keys() >= {"host", "port", "user", "password"}:
        raise OSError(f"{data_dir / ENGINE_RECORD} is no record of an engine.")
    return record


def engine_url(data_dir: Path, database: str) -> str:
    """Return the URL of the engine that runs on the data directory. Raises OSError if none runs.

    The URL has the password of the data directory, so no other server that listens on the port can be taken
    for this engine. It has `retryWrites=false`, because SecantusDB scans its table of retryable writes at
    every write.
    """
    record = read_engine_record(data_dir)
    if not record.get("port"):
        raise OSError(f"No engine runs on the data directory {data_dir}.")
    return (
        f"mongodb://{record['user']}:{record['password']}@{record['host']}:{record['port']}/{database}"
        "?authSource=admin&authMechanism=SCRAM-SHA-256&directConnection=true&retryWrites=false"
    )
