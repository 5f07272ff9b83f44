"""Who is measured, each a process of its own, and how its CPU time is read."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks import operations
from benchmarks.operations import Operation

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time that a process has used: to the nanosecond on Linux, else to the tick."""
    if sys.platform == "linux":
        return time.clock_gettime(~process.pid << 3 | 2)  # its clock, as clock_getcpuclockid names it
    times = process.cpu_times()
    return float(times.user + times.system)


class HttpContestant:
    """A server that is driven over HTTP from this process; its CPU time is the operating system's word."""

    def __init__(self, command: list[str], port: int, ready: str, environment: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = shlex.join(command)
        self._process = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._cpu = psutil.Process(self._process.pid)
        self._ready = ready
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Wait until it answers."""
        self._session = aiohttp.ClientSession(
            self.url, connector=aiohttp.TCPConnector(limit=0), json_serialize=json.dumps
        )
        for _ in range(600):
            try:
                async with self._session.get(self._ready) as response:
                    if response.status in {200, 404}:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)
        raise RuntimeError(f"{self.url} does not answer")

    async def stop(self) -> None:
        """End the process."""
        if self._session is not None:
            await self._session.close()
        self._process.terminate()
        self._process.wait(30)

    async def ask(self, method: str, path: str, **options: Any) -> bytes:
        """Do one request, and return the body of its answer."""
        assert self._session is not None
        async with self._session.request(method, path, **options) as response:
            body: bytes = await response.read()
            if response.status >= 300:
                raise RuntimeError(f"{method} {path}: {response.status} {body[:200]!r}")
            return body

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used."""
        return cpu_seconds(self._cpu)

    def resident_bytes(self) -> int:
        """Return the memory that the process holds."""
        return int(self._cpu.memory_info().rss)

    async def once(self, operation: Operation, writer: int) -> None:
        """Do one operation."""
        raise NotImplementedError

    async def measure(self, operation: Operation, concurrency: int, seconds: float) -> dict[str, Any]:
        """Do it over and over in so many tasks, for so long; return what it took."""
        return await operations.measure(
            lambda writer: self.once(operation, writer), concurrency, seconds, self.cpu_seconds
        )


class Service(HttpContestant):
    """Our service, on the database that all share."""

    def __init__(self, mongodb_url: str) -> None:
        port = free_port()
        environment = {"CHAT_PORT": str(port), "CHAT_MONGODB_URL": mongodb_url, "CHAT_LOG_FORMAT": "json"}
        super().__init__([sys.executable, "-m", "service", "serve"], port, "/health/ready", environment)
        self._number = 0

    async def once(self, operation: Operation, writer: int) -> None:
        """Do one operation through the API."""
        if operation.kind == "append":
            await self.append(operations.conversation(operation, writer), operation.size)
        elif operation.kind == "last":
            await self.last(operation.where)
        elif operation.kind == "turn":
            await self.last(operation.where)
            await self.append(operations.conversation(operation, writer), operation.size)
        elif operation.kind == "list":
            await self.ask("GET", f"/conversations?user_id={operation.where}&limit=20")
        elif operation.kind == "pages":
            await self.pages(operation.where)
        else:
            path = f"/conversations/{operation.where}/messages"
            await self.ask("GET", path, headers={"Accept": "application/x-ndjson"})

    async def append(self, conversation: str, count: int) -> bytes:
        """Append one message, or a batch."""
        self._number += count
        messages = [operations.message(self._number + each) for each in range(count)]
        body = messages[0] if count == 1 else {"messages": messages}
        return await self.ask("POST", f"/conversations/{conversation}/messages", json=body)

    async def last(self, conversation: str) -> bytes:
        """Read the newest 50."""
        return await self.ask("GET", f"/conversations/{conversation}/messages?last=50")

    async def pages(self, conversation: str) -> None:
        """Page through a history by `next`."""
        after = 0
        while after is not None:
            path = f"/conversations/{conversation}/messages?limit=100&after={after}"
            after = json.loads(await self.ask("GET", path))["next"]


class Floor(HttpContestant):
    """A bare FastAPI application that answers as the service would, without a database."""

    def __init__(self, mongodb_url: str) -> None:
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "benchmarks.floor:app", "--port", str(port)]
        environment = {"BENCH_MONGODB_URL": mongodb_url}
        super().__init__([*command, "--no-access-log"], port, "/docs", environment)

    async def learn(self, service: Service) -> None:
        """Show it what the service answers to each operation."""
        for operation in operations.OPERATIONS:
            if operation.kind in {"append", "turn"}:
                body = await service.append("writer-0", operation.size)
                await self._keep(f"a{operation.size}", body)
            if operation.kind in {"last", "turn"}:
                await self._keep("last", await service.last(operation.where))
            if operation.kind == "list":
                path = f"/conversations?user_id={operation.where}&limit=20"
                await self._keep("list", await service.ask("GET", path))
            if operation.kind == "pages":
                path = f"/conversations/{operation.where}/messages?limit=100"
                await self._keep("page", await service.ask("GET", path))
            if operation.kind == "stream":
                path = f"/conversations/{operation.where}/messages"
                lines = await service.ask("GET", path, headers={"Accept": "application/x-ndjson"})
                body = b'{"data":[' + lines.strip().replace(b"\n", b",") + b"]}"
                await self._keep("stream", body)

    async def _keep(self, name: str, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        await self.ask("PUT", f"/answers/{name}", data=body, headers=headers)

    async def once(self, operation: Operation, writer: int) -> None:
        """Do the same exchange of bytes."""
        del writer
        if operation.kind in {"last", "turn"}:
            await self.ask("GET", "/last")
        if operation.kind in {"append", "turn"}:
            messages = [operations.message(each) for each in range(operation.size)]
            body = messages[0] if operation.size == 1 else {"messages": messages}
            await self.ask("POST", f"/a{operation.size}", json=body)
        if operation.kind == "list":
            await self.ask("GET", "/list")
        if operation.kind == "pages":
            for _ in range(operation.units):
                await self.ask("GET", "/page")
        if operation.kind == "stream":
            await self.ask("GET", "/lines/stream")


class BareService(HttpContestant):
    """The floor's process again, asked for both halves at once: a bare route that appends with bare Motor."""

    def __init__(self, floor: Floor) -> None:
        self.__dict__.update(floor.__dict__)

    async def start(self) -> None:
        """It was started as the floor."""

    async def stop(self) -> None:
        """And ends as the floor."""

    async def once(self, operation: Operation, writer: int) -> None:
        """Append, as the service does for its caller."""
        messages = [operations.message(each) for each in range(operation.size)]
        body = messages[0] if operation.size == 1 else {"messages": messages}
        await self.ask("POST", f"/transactions/{operations.conversation(operation, writer)}", json=body)


class Worker:
    """A process that measures itself, in its own event loop, and is asked by lines of JSON."""

    def __init__(self, command: list[str]) -> None:
        self._command = shlex.join(command)
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    async def start(self) -> None:
        """Wait until it is ready."""
        while (line := await self._line()) != "ready":
            if not line:
                raise RuntimeError(f"{self._command} ended")

    async def _line(self) -> str:
        assert self._process.stdout is not None
        return (await asyncio.to_thread(self._process.stdout.readline)).strip()

    async def stop(self) -> None:
        """Close its input, which ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    async def measure(self, operation: Operation, concurrency: int, seconds: float) -> dict[str, Any]:
        """Have it measure one operation."""
        asked = {"operation": vars(operation), "concurrency": concurrency, "seconds": seconds}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = await self._line()
        if not line:
            raise RuntimeError(f"{self._command} ended")
        result: dict[str, Any] = json.loads(line)
        return result
