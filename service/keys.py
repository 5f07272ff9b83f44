"""API keys: made, listed, revoked and recognised. A key is shown once; only a hash of its secret is stored.

`chk_<id>_<secret>`: the id finds it, the secret is 256 random bits, for which one round of SHA-256 is hash
enough: there is nothing in it to guess from.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Literal

import structlog
from bson.errors import InvalidBSON
from cachetools import TTLCache
from pydantic import ValidationError
from pymongo import ASCENDING

from service import payloads, times
from service.database import Database, Transaction
from service.documents import ApiKey
from service.errors import ChatHistoryError
from service.settings import Settings

ScopeName = Literal["read", "write", "admin"]
_FORM = re.compile(r"chk_([0-9a-f]{16})_([A-Za-z0-9_-]{43})\Z")
_USED_EVERY = timedelta(minutes=1)
_KNOWN_MOST = 10_000
log = structlog.get_logger(__name__)


class _Unknown:
    """Stands for what was not looked up: None says that there is no such key."""


_UNKNOWN = _Unknown()


class Keys:
    """The keys in the database."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        # What a lookup found, or that it found nothing, so that neither good nor bad keys cost one each time.
        self._known: TTLCache[str, ApiKey | None] = TTLCache(_KNOWN_MOST, settings.key_cache_ms / 1000)
        self._notes: set[asyncio.Task[None]] = set()

    async def create(
        self,
        name: str,
        scopes: Sequence[ScopeName],
        *,
        tenant: str = "",
        expires_at: datetime | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key, and return it with the text of it, which nobody can have again."""
        secret = secrets.token_urlsafe(32)
        key = ApiKey(
            id=secrets.token_hex(8),
            secret_sha256=_hash(secret),
            name=name,
            scopes=list(scopes),
            tenant=tenant,
            created_at=times.now(),
            expires_at=expires_at,
        )

        async def insert(transaction: Transaction) -> None:
            session = transaction.session
            if transaction.may_have_committed and await ApiKey.find_one({"_id": key.id}, session=session):
                return  # by our own first run, the answer to which was lost
            await key.insert(session=session)

        async with self._database.call():
            await self._database.transaction(insert)
        return key, f"chk_{key.id}_{secret}"

    async def list_all(self) -> list[ApiKey]:
        """Return every key, the revoked ones too, oldest first; what is no key is logged and left out."""
        async with self._database.call():
            found = await self._database.read(ApiKey, {}, sort=[("created_at", ASCENDING)])
        return [key for key in map(_loaded, found) if key is not None]

    async def revoke(self, key_id: str) -> bool:
        """Revoke a key, and return whether there was one to revoke."""
        now = times.now()

        async def update(transaction: Transaction) -> bool:
            session = transaction.session
            named = {"_id": key_id, "revoked_at": None}
            if await self._database.update(ApiKey, named, {"$set": {"revoked_at": now}}, session) is not None:
                return True
            # An earlier run whose answer was lost has left its own time there.
            ours = {"_id": key_id, "revoked_at": now}
            return transaction.may_have_committed and bool(
                await self._database.read(ApiKey, ours, limit=1, session=session)
            )

        async with self._database.call():
            return await self._database.transaction(update)

    async def find(
        self, text: str, before_look_up: Callable[[], Awaitable[None]] | None = None
    ) -> ApiKey | None:
        """Return the key that this text is, if it is one, and neither revoked nor expired.

        Raises DatabaseUnavailable when that cannot be found out, and what `before_look_up` raises, which is
        asked before the database is.
        """
        form = _FORM.match(text)
        if form is None:
            return None
        key = await self._look_up(form[1], before_look_up)
        # Compared also where there is no such key, so that both take the same time.
        expected = key.secret_sha256 if key is not None else _hash("")
        if not hmac.compare_digest(_hash(form[2]), expected) or key is None:
            return None
        now = times.now()
        if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
            return None
        if key.last_used_at is None or now - key.last_used_at > _USED_EVERY:
            key.last_used_at = now
            note = asyncio.create_task(self._note_use(key.id, now))
            self._notes.add(note)
            note.add_done_callback(self._notes.discard)
        return key

    async def _look_up(
        self, key_id: str, before_look_up: Callable[[], Awaitable[None]] | None = None
    ) -> ApiKey | None:
        # Asked once: between two questions what is known may be too old to be known any more.
        known = self._known.get(key_id, _UNKNOWN)
        if not isinstance(known, _Unknown):
            return known
        if before_look_up is not None:
            await before_look_up()
        async with self._database.call():
            found = await self._database.read(ApiKey, {"_id": key_id}, limit=1)
        key = _loaded(found[0]) if found else None
        self._known[key_id] = key
        return key

    async def _note_use(self, key_id: str, when: datetime) -> None:
        """Record the last use; that a record is lost when the database is away does no harm."""

        async def update(transaction: Transaction) -> None:
            named = ApiKey.find_one({"_id": key_id})
            await named.update_one({"$max": {"last_used_at": when}}, session=transaction.session)

        try:
            async with self._database.call():
                await self._database.transaction(update)
        except ChatHistoryError:
            return


def _loaded(raw: bytes) -> ApiKey | None:
    """Return a stored key, or None for a document that is not well formed, which opens nothing."""
    try:
        key: ApiKey = ApiKey.model_validate(payloads.decode(raw))
    except (InvalidBSON, ValidationError) as error:
        key_id = str(payloads.decode_anything(raw)["_id"])[:200]
        log.error("document_malformed", collection="api_keys", id=key_id, error=type(error).__name__)
        return None
    return key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
