"""What the processes of a deployment share: a secret, tokens that name a commit, and leases.

Of many processes that want a lease one does a piece of work, and another can take over when it has died.

- A lease is a document of the collection `leases`, and it is held until its time is over. A process that dies
  lets it expire; nobody has to release it (`tests/integration/test_leases.py`).
- The time is the server's, because the clocks of two processes may differ.
- A process that stands still for longer than its lease may go on while another process holds it. So a lease
  saves work, and is no lock: the work must be such that two processes may do it at once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import contextvars
import hmac
import secrets
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import bson
import pymongo
import structlog
from bson.timestamp import Timestamp
from pymongo.errors import DuplicateKeyError, PyMongoError

from service.database.driver import Commit, Connection
from service.database.driver_errors import reason
from service.database.transactions import Transaction
from service.documents import Secret
from service.errors import InvalidRequest

log = structlog.get_logger(__name__)

_COLLECTION = "leases"
_TIMEOUT_S = 5.0
_RELEASE_TIMEOUT_S = 1.0


class Leases:
    """Takes, renews and releases leases for one process. Every call may raise PyMongoError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._holder = secrets.token_hex(16)

    async def take(self, name: str, seconds: float) -> bool:
        """Take a lease that nobody holds, or that this process holds; tell whether this process has it."""
        with pymongo.timeout(_TIMEOUT_S):
            now = await self._now()
            free = {"_id": name, "$or": [{"holder": self._holder}, {"expires_at": {"$lte": now}}]}
            held = {"$set": {"holder": self._holder, "expires_at": now + timedelta(seconds=seconds)}}
            try:
                await self._collection.update_one(free, held, upsert=True)
            except DuplicateKeyError:
                # The lease is there and not free, so the update inserted one, whose `_id` is taken.
                return False
            return True

    async def renew(self, name: str, seconds: float) -> bool:
        """Hold a lease for longer; tell whether this process still had it."""
        with pymongo.timeout(_TIMEOUT_S):
            until = await self._now() + timedelta(seconds=seconds)
            mine = {"_id": name, "holder": self._holder}
            result = await self._collection.update_one(mine, {"$set": {"expires_at": until}})
            return bool(result.matched_count)

    async def release(self, name: str) -> None:
        """Give a lease back, so that another process need not wait until it has expired."""
        with pymongo.timeout(_RELEASE_TIMEOUT_S):
            await self._collection.delete_one({"_id": name, "holder": self._holder})

    @contextlib.asynccontextmanager
    async def held(self, name: str, seconds: float) -> AsyncIterator[bool]:
        """Hold a lease while the work inside runs, however long that is; yields whether it was taken."""
        if not await self.take(name, seconds):
            yield False
            return
        # In a context of its own, because a deadline of the caller's would end the renewals, too.
        renewals = asyncio.create_task(self._keep(name, seconds), context=contextvars.Context())
        try:
            yield True
        finally:
            renewals.cancel()
            await asyncio.wait([renewals])
            # A lease that cannot be given back expires.
            with contextlib.suppress(PyMongoError):
                await self.release(name)

    async def _keep(self, name: str, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds / 3)
            try:
                if not await self.renew(name, seconds):
                    log.warning("lease_lost", lease=name)
            except PyMongoError as error:
                log.warning("lease_not_renewed", lease=name, error=type(error).__name__, reason=reason(error))

    @property
    def _collection(self) -> Any:
        return self._connection.database()[_COLLECTION]

    async def _now(self) -> datetime:
        now: datetime = (await self._connection.command("hello"))["localTime"]
        return now


# The id of the secret that ids are made with, and tokens.
_FOR_IDS = "conversation_ids"
_MAC_BYTES = 16


async def find_or_make_secret(transaction: Transaction) -> bytes:
    """Return the stored secret, or make one; neither may be used before the transaction has committed."""
    found = await Secret.find_one({"_id": _FOR_IDS}, session=transaction.session)
    if found is None:
        found = Secret(id=_FOR_IDS, value=secrets.token_bytes(32))
        await found.insert(session=transaction.session)
    return found.value


def token_of(commit: Commit, secret: bytes) -> str:
    """Return the text by which another process can read what this commit stored.

    It begins with the time of the commit, so of two tokens the later one is the greater text. It is signed,
    because a time of the caller's own making could move the clock of the whole database.
    """
    cluster_time = base64.urlsafe_b64encode(bson.encode(commit.cluster_time)).decode().rstrip("=")
    text = f"{commit.time.time:08x}{commit.time.inc:08x}.{cluster_time}"
    return f"{text}.{_mac(text, secret)}"


def commit_of(token: str, secret: bytes) -> Commit:
    """Return the commit that a token names. Raises InvalidRequest for what `token_of` did not make."""
    text, _, mac = token.rpartition(".")
    if not hmac.compare_digest(mac.encode(), _mac(text, secret).encode()):
        raise InvalidRequest.at("header.Consistency-Token", "is no token of this deployment")
    time, _, cluster_time = text.partition(".")
    raw = base64.urlsafe_b64decode(cluster_time + "=" * (-len(cluster_time) % 4))
    return Commit(Timestamp(int(time[:8], 16), int(time[8:], 16)), bson.decode(raw))


def _mac(text: str, secret: bytes) -> str:
    return hmac.new(secret, b"commit " + text.encode(), "sha256").hexdigest()[: 2 * _MAC_BYTES]
