"""Runs the embedded engine, SecantusDB, as a supervised child process (docs/decisions/0003).

The engine is a separate program that speaks MongoDB's protocol on 127.0.0.1, and the service talks to it as
to any MongoDB. The invariants of this module (tests/integration/test_embedded.py):

- One process at a time uses a data directory. The engine itself keeps the directory's lock open, so the lock
  is held for as long as the engine lives. Only the operating system user of the service can read the
  directory.
- The engine asks for the password that is recorded in the data directory. SCRAM proves the password to both
  sides, so a process that cannot read the directory cannot use the engine, and no other server is taken for
  the engine.
- The engine syncs at every commit, so `kill -9` loses nothing that was acknowledged.
- The engine is started again when it dies, and it never outlives the service, however the service ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO

import structlog

from service.embedded import data_directory, engine_program, guard
from service.embedded.data_directory import (
    HOST,
    DataDirectoryInUse,
    EmbeddedEngineError,
    make_contents_private,
    make_private,
    open_plain_file,
    write_file,
)
from service.settings import ENGINE_RECORD, Settings
from service.telemetry import metrics

START_TIMEOUT_S = 60.0
# How long to wait for the engine of a service that was killed, which ends by itself.
_LOCK_TIMEOUT_S = 15.0
# Longer than for an engine that runs already, because the start and SCRAM take CPU time on a busy machine.
_FIRST_ANSWER_TIMEOUT_MS = 20_000
# The environment variables that the engine gets. It gets no settings, because they have secrets in them.
# Some builds of Python find their own library by LD_LIBRARY_PATH.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")
_POLL_S = 0.02
# The pauses before the engine is started again, after the first failure, the second, and so on.
_RESTART_S = (0.2, 0.5, 1.0, 2.0, 5.0)
log = structlog.get_logger(__name__)


class EmbeddedEngine:
    """A context manager in which the engine runs.

    `meanwhile` is called while the engine starts. The engine of a command (`for_service=False`) takes any
    free port, and ends with the command. Entering raises EmbeddedEngineError if the package is missing, if
    the data directory is in use, not writable or another user's, if the port is taken, or if the engine ends
    at once.
    """

    def __init__(
        self, settings: Settings, meanwhile: Callable[[], None] = lambda: None, *, for_service: bool = True
    ) -> None:
        self._settings = settings
        self._meanwhile = meanwhile
        self._for_service = for_service
        self._port = settings.embedded_port if for_service else _free_port()
        self._data = settings.data_dir.absolute()
        self._password = ""
        self._service_lock: IO[str] | None = None
        self._engine_lock: IO[str] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._supervisor: threading.Thread | None = None

    def __enter__(self) -> EmbeddedEngine:
        program = engine_program.find()
        try:
            self._take_data_directory()
            self._require_free_port()
            self._open_with_password(program)
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

    # -- the data directory -----------------------------------------------------------------------------

    def _take_data_directory(self) -> None:
        """Lock the data directory for this service, then wait for an engine that is about to end.

        There are two locks, because the engine of a service that was killed lives on for a moment. The killed
        service's own lock is free at once, so a data directory whose service still runs is told from one that
        only waits for its engine to end.
        """
        try:
            make_private(self._data)
            self._data = self._data.resolve()  # so that a link that changes later has no effect
            self._lock_for_service()
            self._engine_lock = open_plain_file(self._data / "engine.lock")
            deadline = time.monotonic() + _LOCK_TIMEOUT_S
            while not _locked(self._engine_lock):
                if time.monotonic() > deadline:
                    raise EmbeddedEngineError(
                        f"An engine that does not end is still using the data directory {self._data}. "
                        "End it, or name another directory with CHAT_DATA_DIR."
                    )
                time.sleep(_POLL_S)
            make_contents_private(self._data)
        except OSError as error:
            raise EmbeddedEngineError(
                f"The data directory {self._data} cannot be written ({error.strerror or error}). "
                "Name another with CHAT_DATA_DIR."
            ) from error

    def _lock_for_service(self) -> None:
        lock = open_plain_file(self._data / "service.lock")
        if not _locked(lock):
            with lock:
                lock.seek(0)
                raise self._in_use(by=lock.read())
        self._service_lock = lock
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        with contextlib.suppress(OSError):
            self._password = str(self._settings.engine_record().get("password", ""))
        self._record(None)

    def _in_use(self, by: str) -> DataDirectoryInUse:
        return DataDirectoryInUse(
            f"The data directory {self._data} is in use by process {by}. Stop it, or name another "
            "directory with CHAT_DATA_DIR, or let this service share that one's engine with "
            'CHAT_MONGODB_URL="$(chat-history mongo-url)".',
            by,
        )

    def _record(self, port: int | None) -> None:
        """Record the engine's port for the commands, or None before the engine listens and after it ended."""
        record = data_directory.record(port, self._password, for_service=self._for_service)
        write_file(self._data / ENGINE_RECORD, record)

    def _require_free_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, self._port))
            except OSError as error:
                raise EmbeddedEngineError(
                    f"The embedded engine's port {self._port} is taken ({error.strerror}). "
                    "Name another with CHAT_EMBEDDED_PORT."
                ) from error

    # -- running -----------------------------------------------------------------------------------

    def _open_with_password(self, program: str) -> None:
        """Run the engine so that it asks for the password; store a password first if the engine has none."""
        from pymongo.errors import PyMongoError  # noqa: PLC0415  (slow to import)

        try:
            # The engine does not know the recorded password if its files came from another data directory.
            if not self._password or not self._run_with_password(program):
                self._set_password(program)
                if not self._run_with_password(program):
                    raise EmbeddedEngineError(
                        f"Something else answers on the embedded engine's port {self._port}. Name another "
                        "with CHAT_EMBEDDED_PORT."
                    )
                data_directory.drop_other_users(self._settings.embedded_url, _FIRST_ANSWER_TIMEOUT_MS)
        except PyMongoError as error:
            raise EmbeddedEngineError(
                f"What listens on the embedded engine's port {self._port} does not answer as an engine does "
                f"({type(error).__name__}). Name another port with CHAT_EMBEDDED_PORT."
            ) from error

    def _run_with_password(self, program: str) -> bool:
        """Run the engine, record its address, and tell whether it is this engine that answers there."""
        self._run(program, "--auth")
        self._record(self._port)
        return data_directory.is_answered(self._settings, _FIRST_ANSWER_TIMEOUT_MS)

    def _set_password(self, program: str) -> None:
        """Store a password in the engine, which accepts one only while it runs without authentication.

        So for a moment every process on this machine can use the engine, on a port that is not recorded.
        Users that another process makes in that moment are dropped before the engine is used.
        """
        self._password = self._password or data_directory.new_password()
        self._record(None)
        port, self._port = self._port, _free_port()
        self._run(program)
        data_directory.store_password(self._port, self._password, _FIRST_ANSWER_TIMEOUT_MS)
        assert self._guard is not None
        self._guard.send_signal(guard.KILL)  # because an orderly end takes two seconds
        self._guard.wait()
        self._port = port

    def _run(self, program: str, *options: str) -> None:
        """Start the engine, in the place of the one that runs, and wait until it listens."""
        self._stop()
        self._guard = self._start(program, *options)
        self._meanwhile()
        self._meanwhile = lambda: None
        self._wait_until_it_listens(self._guard)

    def _start(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        assert self._engine_lock is not None
        # The engine gets a configuration file, because without one it reads any that it finds.
        write_file(self._data / "engine.toml", "# The command line has every option.\n")
        command = [program, "--config", str(self._data / "engine.toml")]
        command += ["--host", HOST, "--port", str(self._port)]
        command += ["--storage-path", str(self._data / "engine"), "--sync-on-commit"]
        command += ["--cache-size", self._settings.embedded_cache, "--log-level", "WARNING", *options]
        command = [sys.executable, "-I", guard.__file__, str(self._engine_lock.fileno()), *command]
        with open_plain_file(self._data / "engine.log") as output:
            output.truncate(0)
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(self._engine_lock.fileno(),),
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                umask=0o077,
                # In a session of its own the engine does not get the Ctrl-C of the terminal. The service
                # gets it, and stops the engine when the last request is answered.
                start_new_session=True,
            )

    def _wait_until_it_listens(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((HOST, self._port), 1):
                return
            time.sleep(_POLL_S)
        raise EmbeddedEngineError(
            f"The embedded engine did not start (exit code {process.poll()}):\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        lines = (self._data / "engine.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-12:])

    def _supervise(self, program: str) -> None:
        """Start the engine again whenever it ends by itself, after pauses that grow."""
        failures = 0
        while self._guard is not None:
            began = time.monotonic()
            code = self._guard.wait()
            if self._stopping.is_set():
                return
            failures = 1 if time.monotonic() - began > START_TIMEOUT_S else failures + 1
            pause = _RESTART_S[min(failures, len(_RESTART_S)) - 1]
            metrics.count("engine_restarts")
            log.warning("engine_ended", exit_code=code, restart_in_s=pause)
            if self._stopping.wait(pause):
                return
            _close_input(self._guard)
            try:
                self._guard = self._start(program, "--auth")
            except (OSError, EmbeddedEngineError) as error:  # for example, the disk is full
                log.error("engine_not_started", error=type(error).__name__, reason=str(error))
                continue
            if self._stopping.is_set():  # `__exit__` ran between the pause and the start
                self._end()

    def _end(self) -> None:
        """Stop the engine, and release the data directory."""
        if self._service_lock is not None:
            with contextlib.suppress(OSError):  # the commands also ask the engine itself
                self._record(None)
        self._stop()
        for lock in (self._engine_lock, self._service_lock):
            if lock is not None:
                lock.close()

    def _stop(self) -> None:
        """Close the guard's input, which ends the engine."""
        if self._guard is not None:
            _close_input(self._guard)
            try:
                self._guard.wait(guard.STOP_TIMEOUT_S + 2)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _locked(lock: IO[str]) -> bool:
    import fcntl  # noqa: PLC0415  (Windows has no such module, and `engine_program.find` has said so)

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close_input(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
