"""The embedded engine's data directory: closed to other users, without links, with the engine's password.

SCRAM proves the password to both sides. So the engine serves only processes that can read the data directory,
and a client knows whether the server on the engine's port is the engine of this directory.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from service.errors import DatabaseUnavailable, StorageFull
from service.settings import Settings

if TYPE_CHECKING:
    from pymongo import MongoClient


class EmbeddedEngineError(Exception):
    """The embedded engine cannot be started. The text says why, and what to do."""


class DataDirectoryInUse(EmbeddedEngineError):
    """Another service or command runs on this data directory; `process` is its id."""

    def __init__(self, message: str, process: str) -> None:
        super().__init__(message)
        self.process = process


def make_private(directory: Path) -> None:
    """Make the data directory, and close it to other users. Raises EmbeddedEngineError."""
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


def make_contents_private(directory: Path) -> None:
    """Remove the rights of other users from the files, which older versions gave. Links are refused."""
    for folder, folders, files, descriptor in os.fwalk(directory):
        for name in (*folders, *files):
            about = os.lstat(name, dir_fd=descriptor)
            if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
                raise _no_plain_file(Path(folder, name))
            if stat.S_IMODE(about.st_mode) & 0o077:
                os.chmod(name, stat.S_IMODE(about.st_mode) & 0o700, dir_fd=descriptor)


def open_plain_file(path: Path) -> IO[str]:
    """Open a file of the data directory to read and append; make the file if it is missing.

    A link is refused, because another user may have put the link there before the directory was closed to
    others, and writing to it would change a file somewhere else.
    """
    if path.is_symlink():
        raise _no_plain_file(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
        os.close(descriptor)
        raise _no_plain_file(path)
    return os.fdopen(descriptor, "a+", encoding="utf-8")


def write_file(path: Path, text: str) -> None:
    """Replace a file of the data directory; a reader finds the old text or the new one, both whole."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def _no_plain_file(path: Path) -> EmbeddedEngineError:
    """Return the error for a link, or for anything else that is no plain file."""
    return EmbeddedEngineError(
        f"{path} is a link or no plain file, so it is not opened. Remove it, or name another directory with "
        "CHAT_DATA_DIR."
    )


HOST = "127.0.0.1"
_USER = "chat-history"
_ANSWER_TIMEOUT_MS = 2_000


def new_password() -> str:
    """Return a random password that needs no escaping in a URL."""
    return secrets.token_urlsafe(32)


def record(port: int | None, password: str, *, for_service: bool) -> str:
    """Return the text of `engine.json`. Without a port, no engine answers: it is about to start, or ended."""
    fields = {"host": HOST, "port": port, "user": _USER, "password": password, "for_service": for_service}
    return json.dumps(fields) + "\n"


def store_password(port: int, password: str, time_ms: int) -> None:
    """Make the service's user, with this password, in an engine that asks for none; drop every other user."""
    with _client(f"mongodb://{HOST}:{port}/?directConnection=true&retryWrites=false", time_ms) as client:
        _drop_users(client)
        roles = [{"role": "root", "db": "admin"}]
        client.admin.command("createUser", _USER, pwd=password, roles=roles)


def drop_other_users(url: str, time_ms: int) -> None:
    """Drop every user of the engine but the service's."""
    with _client(url, time_ms) as client:
        _drop_users(client, but=_USER)


def is_answered(settings: Settings, time_ms: int = _ANSWER_TIMEOUT_MS) -> bool:
    """Tell whether the engine of the data directory answers where its record says.

    False means that something else answers, which does not know the password. Raises OSError if no engine is
    recorded, and PyMongoError if nothing answers.
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


def require_free_disk(settings: Settings) -> None:
    """Raise StorageFull while the disk of the data directory is all but full; a MongoDB has its own disk.

    The reserve keeps the engine from meeting the full disk itself: an engine that could not write its log any
    more has lost the last commit that it had acknowledged (docs/decisions/0003-embedded-engine.md).
    """
    if settings.mongodb_url is None:
        try:
            free = shutil.disk_usage(settings.data_dir).free
        except OSError as error:
            raise DatabaseUnavailable(
                f"The directory CHAT_DATA_DIR cannot be used ({error.strerror}). Nothing was stored. Name "
                "the directory of a service that runs."
            ) from error
        if free < settings.disk_reserve_bytes:
            raise StorageFull(
                f"The disk of CHAT_DATA_DIR has {free} bytes free, and at least "
                f"{settings.disk_reserve_bytes} must stay free (CHAT_DISK_RESERVE_BYTES). "
                "Nothing was stored. Free some space."
            )
