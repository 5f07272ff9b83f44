"""Binds the addresses of the service, and prints the banner when one of them answers."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from service.cli.context import fail
from service.settings import Settings

_POLL_S = 0.02
_COUNT_TIMEOUT_MS = 1_000
_WHY = {
    errno.EADDRINUSE: (
        "is taken",
        "Stop the other program, or name another port with CHAT_PORT (or --port).",
    ),
    errno.EACCES: ("is not allowed to this user", "Name a port above 1023 with CHAT_PORT (or --port)."),
    errno.EADDRNOTAVAIL: ("is no address of this machine", "Name another with CHAT_HOST (or --host)."),
}


def bound_sockets(settings: Settings) -> list[socket.socket]:
    """Bind every address of CHAT_HOST to one port, or end the command with the setting to change.

    The sockets are bound before the engine starts, so that a port that is taken is known at once. They listen
    only when the application has started, so nobody waits for an answer before that.
    """
    try:
        found = socket.getaddrinfo(settings.host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        fail(f"The host {settings.host!r} has no address ({error.strerror}). Name another with CHAT_HOST.")
    sockets: list[socket.socket] = []
    for family, address in {each[0]: each[4][0] for each in found}.items():
        port = sockets[0].getsockname()[1] if sockets else settings.port
        try:
            sockets.append(_bound(family, str(address), port))
        except OSError as error:
            # A name such as localhost may have an IPv6 address on a machine without IPv6.
            if error.errno == errno.EADDRNOTAVAIL and (sockets or len(found) > 1):
                continue
            what, remedy = _WHY.get(
                error.errno or 0, (f"cannot be used ({error.strerror})", "See CHAT_HOST.")
            )
            fail(f"The address {_authority(str(address), port)} {what}. {remedy}")
    if not sockets:
        fail(f"The host {settings.host!r} has no address of this machine. Name another with CHAT_HOST.")
    return sockets


def _bound(family: int, address: str, port: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere the option lets two programs listen on one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    bound.set_inheritable(True)
    return bound


def say_when_it_listens(bound: socket.socket, banner: Callable[[], str]) -> None:
    """Print the banner as soon as the socket accepts a connection, from a thread beside the server.

    A connection is the proof also where worker processes serve, of which this process hears nothing.
    """
    threading.Thread(target=_say, args=(bound.family, bound.getsockname(), banner), daemon=True).start()


def _say(family: int, address: tuple[str, int], banner: Callable[[], str]) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])  # noqa: S104  (compared, not bound)
    while True:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if probe.connect_ex((host, address[1])) == 0:
                break
        time.sleep(_POLL_S)
    with contextlib.suppress(OSError):  # nobody may be left who reads it
        print(banner(), flush=True)


def banner(settings: Settings, bound: socket.socket) -> str:
    """Say what runs where: the address, the documentation, the data, and the line for the shell at last."""
    host, port = bound.getsockname()[:2]
    # The name as it was given, because a certificate is for a name.
    name = settings.host if settings.host not in {"0.0.0.0", "::", ""} else host  # noqa: S104
    url = f"{'http' if settings.tls_cert is None else 'https'}://{_authority(name, port)}"
    rows = [("API", url), ("pages", f"{url}/console/")]
    if settings.auth == "none":
        rows.append(("docs", f"{url}/docs"))
    rows.append(("data", _data(settings)))
    if settings.mongodb_url is None:
        rows.append(("shell", f'mongosh "$({_program()} mongo-url)"'))
    head = f"Chat History Database {version('chat-history-database')} (Ctrl-C ends it)"
    return "\n".join([head, *(f"  {title:<6} {text}" for title, text in rows)])


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _data(settings: Settings) -> str:
    """Name the database, and how much is in it if that is the embedded engine's."""
    if settings.mongodb_url is not None:
        return settings.database_name
    size = _size(settings.data_dir)
    return f"{settings.data_dir.resolve()} ({_counted(settings)}{size / 1e6:,.1f} MB on disk)"


def _size(directory: Path) -> int:
    """Return the bytes of the files, but those of files that the engine removes meanwhile."""
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                size += Path(folder, name).stat().st_size
    return size


def _program() -> str:
    """Return this program as a shell finds it: by its name, or by the path with which it was started."""
    started = Path(sys.argv[0])
    if started.stem != "chat-history":
        return f"{sys.executable} -m service"
    found = shutil.which(started.name)
    return started.name if found and Path(found).resolve() == started.resolve() else sys.argv[0]


def _counted(settings: Settings) -> str:
    """Return the numbers of conversations and messages, or nothing if the engine does not say them soon."""
    from pymongo import MongoClient
    from pymongo.errors import PyMongoError

    try:
        with MongoClient[dict[str, object]](
            settings.embedded_url, timeoutMS=_COUNT_TIMEOUT_MS, serverSelectionTimeoutMS=_COUNT_TIMEOUT_MS
        ) as client:
            stored = client[settings.database]
            conversations, messages = (
                stored[each].estimated_document_count() for each in ("conversations", "messages")
            )
    except (OSError, PyMongoError):
        return ""
    return f"{conversations:,} conversations, {messages:,} messages, "
