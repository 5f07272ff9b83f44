"""Runs the service as its users do: a process of its own, on free ports, with the embedded engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from pymongo import MongoClient

from service.database import Database

START_TIMEOUT_S = 60.0
# Without the system's certificates, because the service speaks plain HTTP, and a client that reads them
# computes for 40 ms.
_OPTIONS: dict[str, Any] = {"timeout": 60, "verify": False}
# So long a client keeps a connection that it does not use. The service ends one after five seconds, and httpx
# keeps one as long by default, so a request could be sent on a connection that is being closed.
_KEPT_ALIVE_S = 2.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_database(url: str, name: str) -> str:
    """The same URL with a database of a test's own: one that breaks things never works on that of others.

    It is dropped at the end of the run if it is on the MongoDB of TEST_MONGODB_URL. The embedded engine ends
    with the run, and takes 10 ms for each document that it drops.
    """
    own = urlsplit(url)._replace(path=f"/{name}").geturl()
    if "TEST_MONGODB_URL" in os.environ:
        fresh_urls.append(own)
    return own


def new_id(kind: str = "c") -> str:
    return f"{kind}-{uuid4().hex[:16]}"


async def until_ready(database: Database) -> None:
    """Wait until an opened database is reached, because on a busy machine a first attempt may fail."""
    for _ in range(200):
        if await database.is_ready():
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the database was not reached")


def fresh_database_url() -> str | None:
    """Return a URL of a new database on the MongoDB that the tests are to use, if they are."""
    url = os.environ.get("TEST_MONGODB_URL")
    return None if url is None else on_database(url, new_id("test"))


fresh_urls: list[str] = []


class Service:
    """One service process and, unless it is given a `mongodb_url`, the engine that it starts.

    With TEST_MONGODB_URL it gets a database of its own there, in place of an engine; `conftest` drops it.

    `settings` are the names of settings in lower case (`body_bytes_max=2048`). Ports and the data
    directory stay the same when it is started again.
    """

    def __init__(self, directory: Path, *, mongodb_url: str | None = None, **settings: Any) -> None:
        self.directory = directory
        self.port = free_port()
        self.embedded_port = free_port()
        self.mongodb_url = mongodb_url or fresh_database_url()
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / f"service-{self.port}.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def database_url(self) -> str:
        """The URL that `mongo-url` prints: of the engine that the data directory records, with its password.

        The port is this one's, for it may be asked for while the engine does not run.
        """
        if self.mongodb_url is not None:
            return self.mongodb_url
        record = json.loads((self.data / "engine.json").read_text())
        return (
            f"mongodb://{record['user']}:{record['password']}@127.0.0.1:{self.embedded_port}/chat_history"
            "?authSource=admin&authMechanism=SCRAM-SHA-256&directConnection=true&retryWrites=false"
        )

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CHAT_")}
        mine = {
            "port": self.port,
            "embedded_port": self.embedded_port,
            "data_dir": self.data,
            **self.settings,
        }
        if self.mongodb_url is not None:
            mine["mongodb_url"] = self.mongodb_url
        return inherited | {f"CHAT_{name.upper()}": str(value) for name, value in mine.items()}

    def start(self, *, wait: bool = True) -> Service:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service", "serve"],
                env=self.environment(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait_until("/health/ready")
        return self

    def wait_until(self, path: str, status: int = 200, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        with self.client(timeout=10) as client:
            while time.monotonic() < deadline:
                assert self.process is not None
                if self.process.poll() is not None:
                    code = self.process.returncode
                    raise AssertionError(f"the service ended, code {code}:\n{self.output()}")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(path).status_code == status:
                        return
                time.sleep(0.05)
        raise AssertionError(f"{path} did not answer {status} within {timeout_s} s:\n{self.output()}")

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_to_say(self, text: str, timeout_s: float = 20) -> None:
        """Wait until the output has a text, because the banner is printed beside the first answers."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def client(self, **options: Any) -> httpx.Client:
        limits = httpx.Limits(keepalive_expiry=_KEPT_ALIVE_S)
        return httpx.Client(base_url=self.url, limits=limits, **{**_OPTIONS, **options})

    def async_client(self, **options: Any) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEPT_ALIVE_S)
        return httpx.AsyncClient(base_url=self.url, limits=limits, **{**_OPTIONS, **options})

    def stop(self, timeout_s: float = 30) -> int:
        """End it as an operator does, and return its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """`kill -9` of the whole process group, at once."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def engine_pid(self) -> int:
        """The process id of the engine, found as the child of the guard that is our child."""
        assert self.process is not None
        (guard,) = children(self.process.pid, "embedded/guard.py")
        (engine,) = children(guard, "secantusd")
        return engine

    def engine_is_gone(self, timeout_s: float = 20) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.embedded_port)):
                    return True
            time.sleep(0.05)
        return False


def children(pid: int, containing: str) -> list[int]:
    """The ids of a process's living children whose command line contains a text (Linux and macOS)."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    return [int(row[0]) for row in rows if len(row) == 3 and int(row[1]) == pid and containing in row[2]]


@contextlib.contextmanager
def running(directory: Path, **options: Any) -> Iterator[Service]:
    """A started service, stopped at the end whatever happened."""
    service = Service(directory, **options)
    try:
        yield service.start()
    finally:
        if service.process is not None:
            if service.process.poll() is None:
                service.stop()
            assert service.engine_is_gone()


# -- what an operator does ----------------------------------------------------------------------------


def command(service: Service, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `chat-history` with the settings of a service, beside it or in its place."""
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env=service.environment() | changed,
        cwd=service.directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def keys(service: Service, *arguments: str) -> str:
    """Run `chat-history keys …`, and return what it says."""
    done = command(service, "keys", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def new_key(service: Service, *scopes: str, tenant: str = "") -> str:
    """Store a key as `chat-history keys create` does, which takes a second to start, and return its text."""
    name, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    key = {
        "_id": name,
        "secret_sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "name": "test",
        "scopes": sorted(scopes),
        "tenant": tenant,
        "created_at": datetime.now(UTC),
        **dict.fromkeys(("expires_at", "revoked_at", "last_used_at")),
    }
    with MongoClient[dict[str, Any]](service.database_url, w="majority") as operator:
        operator.get_default_database().api_keys.insert_one(key)
    return f"chk_{name}_{secret}"


# -- what a client does ------------------------------------------------------------------------------


def create(client: httpx.Client, conversation_id: str | None = None, user: str = "ada") -> str:
    body = {"user_id": user} | ({"id": conversation_id} if conversation_id else {})
    response = client.post("/conversations", json=body)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def append(client: httpx.Client, conversation: str, *messages: Any, key: str | None = None) -> list[Any]:
    """Append as one batch, and return what the service says that it stored."""
    response = client.post(
        f"/conversations/{conversation}/messages",
        json={"messages": list(messages)},
        headers={"Idempotency-Key": key} if key else {},
    )
    assert response.status_code in {200, 201}, response.text
    return list(response.json()["data"])


def history(client: httpx.Client, conversation: str, **query: Any) -> Any:
    response = client.get(f"/conversations/{conversation}/messages", params=query)
    assert response.status_code == 200, response.text
    return response.json()


def whole_history(client: httpx.Client, conversation: str, limit: int = 1000) -> list[Any]:
    """Page to the end by `next`, as a client does."""
    found: list[Any] = []
    page = {"has_more": True, "next": 0}
    while page["has_more"]:
        page = history(client, conversation, after=page["next"], limit=limit)
        found += page["data"]
    return found


def contents(messages: list[Any]) -> list[Any]:
    return [message["content"] for message in messages]


def sent(message: dict[str, Any]) -> dict[str, Any]:
    """What the caller said in a stored message, without what the service adds."""
    ours = {"id", "conversation_id", "user_id", "seq", "created_at", "revision", "updated_at"}
    return {name: value for name, value in message.items() if name not in ours}
