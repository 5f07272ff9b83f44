"""A TCP proxy of the tests' own, which cuts and holds connections where it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Cut:
    """Cut every so manieth connection whose request contains `matching`: before it, or before its answer."""

    matching: bytes
    before: bool
    times: int = 1
    every: int = 1
    seen: int = 0
    done: int = 0

    def applies(self, data: bytes) -> bool:
        if self.done >= self.times or self.matching not in data:
            return False
        self.seen += 1
        if self.seen % self.every:
            return False
        self.done += 1
        return True


class Proxy:
    """Forwards a port of its own to `target`; runs in a thread, so that any test may use it."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.cuts: list[Cut] = []
        self.accepted = 0
        self._down = False
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> Proxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def stop(self) -> None:
        self._run(self._close_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, matching: bytes, *, before: bool, **options: Any) -> Cut:
        self.cuts.append(Cut(matching, before, **options))
        return self.cuts[-1]

    def hold(self) -> None:
        """Take what is sent and pass nothing on, as a database that hangs."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self._open.set)

    def down(self) -> None:
        """Drop every connection, and refuse new ones, as a database that is gone."""
        self._down = True
        self._run(self._drop())

    def up(self) -> None:
        self._down = False

    # -- in the thread -------------------------------------------------------------------------------

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._open.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _drop(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _close_all(self) -> None:
        self._server.close()
        self._open.set()
        await self._drop()
        tasks = [each for each in asyncio.all_tasks() if each is not asyncio.current_task()]
        await asyncio.wait(tasks, timeout=5) if tasks else None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._down:
            writer.transport.abort()
            return
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, there_writer}
        try:
            await self._exchange(reader, writer, there_reader, there_writer)
        finally:
            for each in (writer, there_writer):
                self._writers.discard(each)
                each.transport.abort()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there_reader: asyncio.StreamReader,
        there_writer: asyncio.StreamWriter,
    ) -> None:
        """Pass bytes on in both directions until either side ends."""
        doomed = asyncio.Event()
        pumps = [
            asyncio.create_task(self._requests(reader, there_writer, doomed)),
            asyncio.create_task(self._answers(there_reader, writer, doomed)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()

    async def _requests(
        self, reader: asyncio.StreamReader, there: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                await self._open.wait()
                cut = next((each for each in self.cuts if each.applies(data)), None)
                if cut is not None and cut.before:
                    return
                if cut is not None:
                    doomed.set()
                there.write(data)
                await there.drain()

    async def _answers(
        self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await there.read(1 << 20):
                await self._open.wait()
                if doomed.is_set():
                    return
                writer.write(data)
                await writer.drain()


@contextlib.contextmanager
def proxied(target: int) -> Iterator[Proxy]:
    proxy = Proxy(target).start()
    try:
        yield proxy
    finally:
        proxy.stop()
