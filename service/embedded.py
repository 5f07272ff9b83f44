"""Runs the embedded engine, SecantusDB, as a supervised child process (docs/decisions/0003).

It is a separate program that speaks MongoDB's protocol on 127.0.0.1, and the service talks to it as to
any MongoDB. What this module promises (tests/integration/test_embedded.py):

- its data directory has one user at a time, held by a lock that the engine itself keeps open, and nobody
  but the user of the operating system who runs the service can read it;
- the engine asks for a password, which stands in the data directory and which SCRAM proves to both sides:
  who cannot read the directory cannot use the engine, and no other engine is taken for this one;
- it syncs at every commit, so that `kill -9` loses nothing that was acknowledged;
- it is started again when it dies, and never outlives the service, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import structlog

from service import embedded_guard, metrics
from service.settings import ENGINE_RECORD, Settings

if TYPE_CHECKING:
    from pymongo import MongoClient

_HOST = "127.0.0.1"
_USER = "chat-history"
_PROGRAM = "secantusd-py"
_START_TIMEOUT_S = 60.0
_LOCK_TIMEOUT_S = 15.0
_ANSWER_TIMEOUT_MS = 2_000
# An engine that has just begun to listen on a busy machine takes longer: SCRAM costs it some CPU time.
_FIRST_ANSWER_TIMEOUT_MS = 20_000
_PATIENCE_S = 2.0
# All that the engine is given of the environment: settings and their secrets do not concern the engine.
# LD_LIBRARY_PATH is how some builds of Python find their own library.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")
_POLL_S = 0.02
_RETRY_S = 0.1
_RESTART_S = (0.2, 0.5, 1.0, 2.0, 5.0)
log = structlog.get_logger(__name__)


class EmbeddedEngineError(Exception):
    """The embedded engine cannot be started; the text says why and what mends it."""


class DataDirectoryInUse(EmbeddedEngineError):
    """Another service or command runs on this data directory; `process` is its id."""

    def __init__(self, message: str, process: str) -> None:
        super().__init__(message)
        self.process = process


class _EngineStarts(EmbeddedEngineError):
    """A service has the data directory, and records no engine yet."""


class EmbeddedEngine:
    """The engine, as a context: running inside, gone outside.

    `meanwhile` is done while it starts. The engine of a command (`for_service=False`) takes any free port,
    and ends with the command. Raises EmbeddedEngineError on entering when the package is missing, the data
    directory is in use, not writable, or somebody else's, the port is taken, or the engine ends at once.
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
        program = _program()
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

    # -- what it needs -----------------------------------------------------------------------------

    def _take_data_directory(self) -> None:
        """Lock the data directory for this service, then wait for an engine that is about to end.

        Two locks, because the engine of a service that was killed lives on for a moment: the service's
        own is free at once, and tells a living user of the directory from one that is gone.
        """
        try:
            _make_private(self._data)
            self._data = self._data.resolve()  # whatever becomes of links on the way
            self._lock_for_service()
            self._engine_lock = self._open("engine.lock")
            deadline = time.monotonic() + _LOCK_TIMEOUT_S
            while not _locked(self._engine_lock):
                if time.monotonic() > deadline:
                    raise EmbeddedEngineError(
                        f"An engine that does not end is still using the data directory {self._data}. "
                        "End it, or name another directory with CHAT_DATA_DIR."
                    )
                time.sleep(_POLL_S)
            _make_contents_private(self._data)
        except OSError as error:
            raise EmbeddedEngineError(
                f"The data directory {self._data} cannot be written ({error.strerror or error}). "
                "Name another with CHAT_DATA_DIR."
            ) from error

    def _lock_for_service(self) -> None:
        lock = self._open("service.lock")
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

    def _open(self, name: str) -> IO[str]:
        """Open a file of the data directory to read and append; it is made if it is missing.

        Somebody else may have put a link there before the directory was this user's alone.
        """
        path = self._data / name
        if path.is_symlink():
            raise _no_plain_file(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
            os.close(descriptor)
            raise _no_plain_file(path)
        return os.fdopen(descriptor, "a+", encoding="utf-8")

    def _write(self, name: str, text: str) -> None:
        """Write a file of the data directory, whole or not at all, in the place of what stands there."""
        new = self._data / f"{name}.new"
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        new.replace(self._data / name)

    def _record(self, port: int | None) -> None:
        """Record where this directory's engine is and its password, for every command.

        Without a port, none answers: it is about to start, or has ended.
        """
        where = {"host": _HOST, "port": port, "user": _USER, "password": self._password}
        self._write(ENGINE_RECORD, json.dumps({**where, "for_service": self._for_service}) + "\n")

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

    def _open_with_password(self, program: str) -> None:
        """Run the engine so that it asks for the password, which it is given first where it has none."""
        from pymongo.errors import PyMongoError  # noqa: PLC0415  (slow to import)

        try:
            # It does not know a recorded password where its files are of another copy of the data.
            if not self._password or not self._run_with_password(program):
                self._set_password(program)
                if not self._run_with_password(program):
                    raise EmbeddedEngineError(
                        f"Something else answers on the embedded engine's port {self._port}. Name another "
                        "with CHAT_EMBEDDED_PORT."
                    )
                with _client(self._settings.embedded_url, _FIRST_ANSWER_TIMEOUT_MS) as client:
                    _drop_users(client, but=_USER)
        except PyMongoError as error:
            raise EmbeddedEngineError(
                f"What listens on the embedded engine's port {self._port} does not answer as an engine does "
                f"({type(error).__name__}). Name another port with CHAT_EMBEDDED_PORT."
            ) from error

    def _run_with_password(self, program: str) -> bool:
        """Run the engine, record where, and tell whether it is this directory's that listens there."""
        self._run(program, "--auth")
        self._record(self._port)
        return _is_answered(self._settings, _FIRST_ANSWER_TIMEOUT_MS)

    def _set_password(self, program: str) -> None:
        """Store a password in the engine, which takes one only while it asks for none.

        So it runs for a moment, on a port that nobody was told, for everybody on this machine. A user whom
        somebody makes in that moment is dropped before the engine is used.
        """
        self._password = self._password or secrets.token_urlsafe(32)
        self._record(None)
        port, self._port = self._port, _free_port()
        self._run(program)
        url = f"mongodb://{_HOST}:{self._port}/?directConnection=true&retryWrites=false"
        with _client(url, _FIRST_ANSWER_TIMEOUT_MS) as client:
            _drop_users(client)
            roles = [{"role": "root", "db": "admin"}]
            client.admin.command("createUser", _USER, pwd=self._password, roles=roles)
        assert self._guard is not None
        self._guard.send_signal(embedded_guard.KILL)  # in order it takes two seconds to end
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
        # A configuration file of ours, for without one the engine takes any it finds lying about.
        self._write("engine.toml", "# Everything is said on the command line.\n")
        command = [program, "--config", str(self._data / "engine.toml")]
        command += ["--host", _HOST, "--port", str(self._port)]
        command += ["--storage-path", str(self._data / "engine"), "--sync-on-commit"]
        command += ["--cache-size", self._settings.embedded_cache, "--log-level", "WARNING", *options]
        guard = [sys.executable, "-I", embedded_guard.__file__, str(self._engine_lock.fileno()), *command]
        with self._open("engine.log") as output:
            output.truncate(0)
            return subprocess.Popen(
                guard,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(self._engine_lock.fileno(),),
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                umask=0o077,
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
                self._guard = self._start(program, "--auth")
            except (OSError, EmbeddedEngineError) as error:  # no room for its files, no process: for now
                log.error("engine_not_started", error=type(error).__name__, reason=str(error))
                continue
            if self._stopping.is_set():  # we were told to stop between the pause and the start
                self._end()

    def _end(self) -> None:
        """End the engine, and let go of the data directory."""
        if self._service_lock is not None:
            with contextlib.suppress(OSError):  # it is only for the commands, which ask the engine, too
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
                self._guard.wait(embedded_guard.STOP_TIMEOUT_S + 2)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()


# -- for commands ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine_for_command(settings: Settings, say: Callable[[str], None]) -> Iterator[None]:
    """Have the data directory's engine: of the service that runs on it, or else one for as long.

    A command waits for another one, since that one's engine ends with it. Raises EmbeddedEngineError where
    it cannot be sure that it has the engine of this directory.
    """
    with contextlib.ExitStack() as stack:
        began, waits = time.monotonic(), False
        while True:
            try:
                stack.enter_context(EmbeddedEngine(settings, for_service=False))
                break
            except DataDirectoryInUse as error:
                in_use = error
            if _is_for_service(settings):
                try:
                    require_engine(settings)
                    break
                except EmbeddedEngineError as error:
                    patience_s = _START_TIMEOUT_S if isinstance(error, _EngineStarts) else _PATIENCE_S
                    if time.monotonic() - began > patience_s:
                        raise
            elif not waits:
                waits = True
                say(f"waits until process {in_use.process} has done its work on {settings.data_dir}")
            time.sleep(_RETRY_S)
        yield


def require_engine(settings: Settings) -> None:
    """Raise EmbeddedEngineError unless the engine that the data directory records answers, and is its own."""
    from pymongo.errors import PyMongoError  # noqa: PLC0415  (slow to import)

    data = settings.data_dir.absolute()
    try:
        record = settings.engine_record()
    except OSError as error:
        raise EmbeddedEngineError(
            f"The data directory {data} does not record where its engine is. Start its service (again): "
            "chat-history serve."
        ) from error
    if record.get("port") is None:
        raise _EngineStarts(
            f"No engine runs on the data directory {data}, or not yet. Start its service: chat-history serve."
        )
    address = f"{record['host']}:{record['port']}"
    try:
        answered = _is_answered(settings)
    except PyMongoError as error:
        raise EmbeddedEngineError(
            f"The engine of the data directory {data} does not answer on {address}, where it is recorded."
        ) from error
    if not answered:
        raise EmbeddedEngineError(
            f"What answers on {address} is not the engine of the data directory {data}, which is recorded "
            "there. Nothing was read or written. Start this directory's service again: chat-history serve."
        )


def _is_for_service(settings: Settings) -> bool:
    with contextlib.suppress(OSError):
        return bool(settings.engine_record().get("for_service", True))
    return True


def _is_answered(settings: Settings, time_ms: int = _ANSWER_TIMEOUT_MS) -> bool:
    """Tell whether what listens where the engine is recorded has its password; SCRAM proves that to us.

    Raises OSError where none is recorded, and PyMongoError where nothing answers.
    """
    from pymongo.errors import OperationFailure  # noqa: PLC0415  (slow to import)

    with _client(settings.embedded_url, time_ms) as client:
        try:
            client.admin.command("ping")
        except OperationFailure:
            return False
    return True


def _client(url: str, time_ms: int) -> MongoClient[dict[str, Any]]:
    from pymongo import MongoClient  # noqa: PLC0415  (slow to import)

    return MongoClient(
        url, serverSelectionTimeoutMS=time_ms, connectTimeoutMS=time_ms, socketTimeoutMS=time_ms
    )


def _drop_users(client: MongoClient[dict[str, Any]], but: str | None = None) -> None:
    for user in list(client.admin["system.users"].find()):
        if (user["db"], user["user"]) != ("admin", but):
            client[user["db"]].command("dropUser", user["user"])


# -- the data directory ----------------------------------------------------------------------------------


def _make_private(directory: Path) -> None:
    """Make the data directory, and let nobody but this user into it. Raises EmbeddedEngineError."""
    if directory.is_symlink() and directory.lstat().st_uid not in {os.geteuid(), 0}:
        raise EmbeddedEngineError(
            f"The data directory {directory} is a link that belongs to another user, so it is not followed. "
            "Name another directory with CHAT_DATA_DIR."
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = directory.stat()
    if about.st_uid != os.geteuid():
        raise EmbeddedEngineError(
            f"The data directory {directory} belongs to another user. Run this as that user, or name another "
            "directory with CHAT_DATA_DIR."
        )
    if stat.S_IMODE(about.st_mode) & 0o077:
        names = {each.name for each in directory.iterdir()} - {"lost+found"}
        if names and not names & {"engine", "service.lock"}:
            raise EmbeddedEngineError(
                f"{directory} holds something else than the service's data, and others can read it. Name an "
                f"empty or a new directory with CHAT_DATA_DIR, or let nobody else in: chmod 700 {directory}"
            )
        directory.chmod(0o700)


def _make_contents_private(directory: Path) -> None:
    """Take everybody else's rights from what is there, which older versions gave. Links are refused."""
    for folder, folders, files, descriptor in os.fwalk(directory):
        for name in (*folders, *files):
            about = os.lstat(name, dir_fd=descriptor)
            if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
                raise _no_plain_file(Path(folder, name))
            if stat.S_IMODE(about.st_mode) & 0o077:
                os.chmod(name, stat.S_IMODE(about.st_mode) & 0o700, dir_fd=descriptor)


def _no_plain_file(path: Path) -> EmbeddedEngineError:
    return EmbeddedEngineError(
        f"{path} is a link or no plain file, so it is not opened. Remove it, or name another directory with "
        "CHAT_DATA_DIR."
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _program() -> str:
    """Find the engine's program, in this environment first."""
    beside = Path(sys.executable).parent / _PROGRAM
    found = str(beside) if beside.exists() else shutil.which(_PROGRAM)
    if found is None or (found == str(beside) and find_spec("secantus") is None):
        raise EmbeddedEngineError(
            "CHAT_MONGODB_URL is not set, and the embedded engine is not installed. Either name a MongoDB, "
            "or, in a clone of the repository: pip install '.[embedded]'. There are wheels for CPython "
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
