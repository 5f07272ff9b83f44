"""A private PostgreSQL in a temporary directory, where its programs are installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Postgres:
    """A running cluster: the process to which all its processes belong, and the URL of its database."""

    pid: int
    url: str


@contextlib.contextmanager
def started(port: int) -> Iterator[Postgres | None]:
    """Make a cluster with the settings that it has by itself, run it, and remove it; None without `initdb`."""
    initdb = shutil.which("initdb")
    if initdb is None:
        yield None
        return
    programs = Path(initdb).resolve().parent
    directory = Path(tempfile.mkdtemp())
    try:
        password = _make(programs / "initdb", directory)
        command = [str(programs / "postgres"), "-D", str(directory / "data"), "-k", str(directory)]
        command += ["-p", str(port), "-c", "listen_addresses=127.0.0.1"]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, text=False, **_not_root())
        try:
            _wait_until_it_listens(process, port, directory / "log")
            yield Postgres(process.pid, f"postgresql+asyncpg://bench:{password}@127.0.0.1:{port}/postgres")
        finally:
            process.send_signal(signal.SIGINT)  # which does not wait for connections to end
            process.wait(60)
    finally:
        shutil.rmtree(directory)


def _make(initdb: Path, directory: Path) -> str:
    password = secrets.token_hex(16)
    (directory / "password").write_text(password)
    owner = _not_root()
    if owner:
        for path in (directory, directory / "password"):
            os.chown(path, owner["user"], owner["group"])
    command = [str(initdb), "-D", str(directory / "data"), "-U", "bench", "--locale=C", "--encoding=UTF8"]
    command += ["-A", "scram-sha-256", f"--pwfile={directory / 'password'}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=directory, **owner)
    return password


def _not_root() -> dict[str, Any]:
    """Return the options that run a program as nobody, because PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}")
