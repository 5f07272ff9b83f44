"""Runs the embedded engine, SecantusDB, as a supervised child process (docs/decisions/0003).

It is a separate program that speaks MongoDB's protocol on 127.0.0.1, and the service talks to it as to
any MongoDB. What this module promises (tests/integration/test_embedded.py):

- its data directory has one user at a time, held by a lock that the engine itself keeps open;
- it syncs at every commit, so that `kill -9` loses nothing that was acknowledged;
- it is started again when it dies, and never outlives the service, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO

import structlog

from service import embedded_guard, metrics
from service.settings import Settings

_HOST = "127.0.0.1"
_PROGRAM = "secantusd-py"
_START_TIMEOUT_S = 60.0
_LOCK_TIMEOUT_S = 15.0
_POLL_S = 0.02
_RESTART_S = (0.2, 0.5, 1.0, 2.0, 5.0)
log = structlog.get_logger(__name__)


class EmbeddedEngineError(Exception):
    """The embedded engine cannot be started; the text says why and what mends it."""


class DataDirectoryInUse(EmbeddedEngineError):
    """Another service runs on this data directory."""


class EmbeddedEngine:
    """The engine, as a context: running inside, gone outside.

    `meanwhile` is done while it starts. Raises EmbeddedEngineError on entering when the package is
    missing, the data directory is in use or not writable, the port is taken, or the engine ends at once.
    """

    def __init__(self, settings: Settings, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._settings = settings
        self._meanwhile = meanwhile
        self._port = settings.embedded_port
        self._data = settings.data_dir
        self._service_lock: IO[str] | None = None
        self._engine_lock: IO[str] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._supervisor: threading.Thread | None = None

    def __enter__(self) -> EmbeddedEngine:
        program = _program()
        try:
            self._take_data_directory()
            self._require_free_port()
            self._guard = self._start(program)
            self._meanwhile()
            self._wait_until_it_listens(self._guard)
        except BaseException:
            self._end()
            raise
        self._supervisor = threading.Thread(target=self._supervise, args=(program,), daemon=True)
        self._supervisor.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._end()
        if self._supervisor is not None:
            self._supervisor.join()

    # -- what it needs -----------------------------------------------------------------------------

    def _take_data_directory(self) -> None:
        """Lock the data directory for this service, then wait for an engine that is about to end.

        Two locks, because the engine of a service that was killed lives on for a moment: the service's
        own is free at once, and tells a living user of the directory from one that is gone.
        """
        try:
            self._data.mkdir(parents=True, exist_ok=True)
            self._service_lock = (self._data / "service.lock").open("a+")
            self._engine_lock = (self._data / "engine.lock").open("a+")
        except OSError as error:
            raise EmbeddedEngineError(
                f"The data directory {self._data} cannot be written ({error.strerror}). "
                "Name another with CHAT_DATA_DIR."
            ) from error
        if not _locked(self._service_lock):
            self._service_lock.seek(0)
            raise self._in_use(by=self._service_lock.read())
        self._service_lock.truncate(0)
        self._service_lock.write(str(os.getpid()))
        self._service_lock.flush()
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while not _locked(self._engine_lock):
            if time.monotonic() > deadline:
                raise self._in_use(by="of an engine that does not end")
            time.sleep(_POLL_S)

    def _in_use(self, by: str) -> DataDirectoryInUse:
        return DataDirectoryInUse(
            f"The data directory {self._data} is in use by process {by}. Stop it, or name another "
            "directory with CHAT_DATA_DIR, or let this service share that one's engine with "
            f"CHAT_MONGODB_URL={self._settings.embedded_url!r}."
        )

    def _require_free_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, self._port))
            except OSError as error:
                raise EmbeddedEngineError(
                    f"The embedded engine's port {self._port} is taken ({error.strerror}). "
                    "Name another with CHAT_EMBEDDED_PORT."
                ) from error

    # -- its life ----------------------------------------------------------------------------------

    def _start(self, program: str) -> subprocess.Popen[bytes]:
        assert self._engine_lock is not None
        # A configuration file of ours, for without one the engine takes any it finds lying about.
        config = self._data / "engine.toml"
        config.write_text("# Everything is said on the command line.\n")
        command = [program, "--config", str(config), "--host", _HOST, "--port", str(self._port)]
        command += ["--storage-path", str(self._data / "engine"), "--sync-on-commit"]
        command += ["--cache-size", self._settings.embedded_cache, "--log-level", "WARNING"]
        guard = [sys.executable, "-I", embedded_guard.__file__, str(self._engine_lock.fileno()), *command]
        with (self._data / "engine.log").open("wb") as output:
            return subprocess.Popen(
                guard,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(self._engine_lock.fileno(),),
                # A session of its own: Ctrl-C in the terminal is for the service, which stops the
                # engine when the last request is answered.
                start_new_session=True,
            )

    def _wait_until_it_listens(self, guard: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if guard.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((_HOST, self._port), 1):
                return
            time.sleep(_POLL_S)
        raise EmbeddedEngineError(
            f"The embedded engine did not start (exit code {guard.poll()}):\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        lines = (self._data / "engine.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-12:])

    def _supervise(self, program: str) -> None:
        """Start it again whenever it ends by itself; soon the first time, then after longer pauses."""
        failures = 0
        while self._guard is not None:
            began = time.monotonic()
            code = self._guard.wait()
            if self._stopping.is_set():
                return
            failures = 1 if time.monotonic() - began > _START_TIMEOUT_S else failures + 1
            pause = _RESTART_S[min(failures, len(_RESTART_S)) - 1]
            metrics.count("engine_restarts")
            log.warning("engine_ended", exit_code=code, restart_in_s=pause)
            if self._stopping.wait(pause):
                return
            _close_input(self._guard)
            try:
                self._guard = self._start(program)
            except OSError as error:  # no room for its files, or no process to be had: for now
                log.error("engine_not_started", error=type(error).__name__, reason=error.strerror)
                continue
            if self._stopping.is_set():  # we were told to stop between the pause and the start
                self._end()

    def _end(self) -> None:
        """Close the guard's input, which ends the engine, and let go of the data directory."""
        if self._guard is not None:
            _close_input(self._guard)
            try:
                self._guard.wait(embedded_guard.STOP_TIMEOUT_S + 2)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
        for lock in (self._engine_lock, self._service_lock):
            if lock is not None:
                lock.close()


def _program() -> str:
    """Find the engine's program, in this environment first."""
    beside = Path(sys.executable).parent / _PROGRAM
    found = str(beside) if beside.exists() else shutil.which(_PROGRAM)
    if found is None or (found == str(beside) and find_spec("secantus") is None):
        raise EmbeddedEngineError(
            "CHAT_MONGODB_URL is not set, and the embedded engine is not installed. Either name a "
            "MongoDB, or: pip install 'chat-history-database[embedded]'. There are wheels for CPython "
            f"3.11 to 3.13 on Linux (x86-64, arm64) and macOS (arm64); this is {sys.version.split()[0]} "
            f"on {sys.platform}."
        )
    return found


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close_input(guard: subprocess.Popen[bytes]) -> None:
    if guard.stdin is not None:
        with contextlib.suppress(OSError):
            guard.stdin.close()
