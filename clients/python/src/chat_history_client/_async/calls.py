"""How calls are made: repeated, settled, streamed, in batches. The synchronous ones are generated."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import httpx
from tenacity import AsyncRetrying

from chat_history_client import _appending as appending
from chat_history_client import _requests as requests
from chat_history_client._appending import Batch
from chat_history_client._async.connections import Connections
from chat_history_client._requests import Call, Expected, Field
from chat_history_client._retries import answer, gone_already, may_be_done, retrying
from chat_history_client._stream import ExportStream, HistoryStream
from chat_history_client._tail import Tail
from chat_history_client.errors import ApiError, NotFound, Stale, Unavailable
from chat_history_client.types import EraseReceipt, Json


class Calls(Connections):
    """Makes the requests of `_requests`, for the client above it."""

    async def _do(self, call: Call) -> Any:
        if call.method == "GET":
            return await self._attempts(call)
        return await self._settled(lambda: self._attempts(call), repeatable=call.repeatable)

    async def _attempts(self, call: Call) -> Any:
        unanswered: Exception | None = None
        async for attempt in AsyncRetrying(**retrying(call, self._retry_s)):
            with attempt:
                try:
                    http = await self._http()
                    response = await http.request(call.method, call.path, **self._request(call))
                    return answer(self._note(response))
                except NotFound as error:
                    if gone_already(call, attempt.retry_state.attempt_number, error):
                        return None
                    raise
                except Stale as error:
                    if unanswered is None or call.is_known_again:
                        raise
                    # What has changed the history may be the attempt whose answer was lost.
                    raise unanswered from error
                except (Unavailable, httpx.TransportError) as error:
                    unanswered = error if may_be_done(error) else unanswered
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _stream(self, stream: HistoryStream | ExportStream) -> AsyncGenerator[Json, None]:
        stop = stream.stop(self._retry_s)
        async for attempt in AsyncRetrying(**retrying(stream.call(), self._retry_s, stop)):
            with attempt:
                if stream.done:
                    return
                async with aclosing(self._chunks(stream.call())) as chunks:
                    async for chunk in chunks:
                        for value in stream.values(chunk):
                            yield value
                stream.end()
                return

    async def _follow(self, tail: Tail) -> AsyncGenerator[Any, None]:
        stop = tail.stop(self._retry_s)
        async for attempt in AsyncRetrying(**retrying(tail.call(), self._retry_s, stop)):
            with attempt:
                try:
                    async with aclosing(self._chunks(tail.call())) as chunks:
                        async for chunk in chunks:
                            for event in tail.events(chunk):
                                yield event
                                if event["event"] == "gone":
                                    return
                except NotFound:
                    if not tail.began:
                        raise
                    yield {"event": "gone", "data": {}}
                    return
                # The service ends a stream when it stops itself, and another process goes on with it.
                raise httpx.RemoteProtocolError("The stream of events ended.")

    async def _last(self, conversation_id: str, count: int, query: Json) -> list[Json]:
        found: list[Json] = []
        before = None
        while len(found) < count:
            last = min(count - len(found), requests.PAGE_ITEMS)
            call = requests.read_messages(conversation_id, {**query, "last": last, "before": before})
            page = requests.page_of(await self._do(call))
            found[:0] = page.data
            before = page.next
            if not page.has_more:
                break
        return found

    async def _add_all(
        self, conversation_id: str, field: Field, values: Sequence[Mapping[str, Any]], user_id: str
    ) -> None:
        batches = appending.batches(field, values)
        if batches:
            await self._settled(lambda: self._add_batches(conversation_id, batches, user_id))

    async def _add_batches(self, conversation_id: str, batches: Sequence[Batch], user_id: str) -> None:
        for batch in batches:
            try:
                await self._attempts(batch.call(conversation_id, user_id))
            except ApiError as error:
                if not batch.can_be_halved(error):
                    batch.name_places(error)
                    raise
                await self._add_batches(conversation_id, batch.halves(), user_id)

    async def _erase(self, user_id: str, dry_run: bool, wait_s: float) -> EraseReceipt:
        until = time.monotonic() + wait_s
        erasure: Json = await self._do(requests.erase(user_id, dry_run=dry_run))
        pause = 0.1
        while requests.goes_on(erasure):
            if time.monotonic() + pause > until:
                raise TimeoutError(f"The erasure {erasure['id']} goes on after {wait_s} s.")
            await self._pause(pause)
            pause = min(2 * pause, 5)
            erasure = await self._do(requests.read_erasure(user_id, erasure["id"]))
        return requests.receipt_of(erasure)

    async def _pop(
        self, conversation_id: str, user_id: str | None, view: Field, expected: Expected
    ) -> Json | None:
        async def take() -> Json | None:
            call = requests.pop(conversation_id, user_id, view, expected)
            taken: Json | None = await self._attempts(call)
            return taken

        async def put_back(taken: Json | None) -> None:
            if taken is not None:
                message = taken["message"] if view == "items" else taken
                await self._attempts(appending.put_back(conversation_id, message, user_id))

        return await self._settled(take, repeatable=False, undo=put_back)
