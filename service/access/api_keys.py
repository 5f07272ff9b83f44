"""Creates, lists, revokes and finds API keys. A key is shown once; only a hash of its secret is stored.

A key is `chk_<id>_<secret>`. The id finds the document. The secret is 256 random bits, so one round of
SHA-256 is enough: nobody can guess such a secret from its hash.
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

from service import clock
from service.database import Database, Transaction
from service.documents import ApiKey
from service.errors import ChatHistoryError
from service.formats import bson_codec
from service.settings import Settings

Permission = Literal["read", "write", "admin"]
_FORM = re.compile(r"chk_([0-9a-f]{16})_([A-Za-z0-9_-]{43})\Z")
_USED_EVERY = timedelta(minutes=1)
_KNOWN_MOST = 10_000
log = structlog.get_logger(__name__)


class _Unknown:
    """A key that was not looked up; None stands for a key that does not exist."""


_UNKNOWN = _Unknown()


class ApiKeys:
    """The API keys in the database, with a cache of look-ups."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        # The result of each look-up, also where no key was found, so that a key that is sent again costs no
        # look-up.
        self._known: TTLCache[str, ApiKey | None] = TTLCache(_KNOWN_MOST, settings.key_cache_ms / 1000)
        self._notes: set[asyncio.Task[None]] = set()

    async def create(
        self,
        name: str,
        scopes: Sequence[Permission],
        *,
        tenant: str = "",
        expires_at: datetime | None = None,
    ) -> tuple[ApiKey, str]:
        """Create a key, and return it with its text, which cannot be read again later."""
        secret = secrets.token_urlsafe(32)
        async with self._database.deadline():
            # Inside, because a document can be made only after the database has been opened.
            key = ApiKey(
                id=secrets.token_hex(8),
                secret_sha256=_hash(secret),
                name=name,
                scopes=list(scopes),
                tenant=tenant,
                created_at=clock.now(),
                expires_at=expires_at,
            )

            async def insert(transaction: Transaction) -> None:
                session = transaction.session
                stored = transaction.may_have_committed and await ApiKey.find_one(
                    {"_id": key.id}, session=session
                )
                if not stored:  # else the first run of this transaction stored it, and its answer was lost
                    await key.insert(session=session)

            await self._database.transaction(insert)
        return key, f"chk_{key.id}_{secret}"

    async def list_all(self) -> list[ApiKey]:
        """Return every key, also revoked keys, oldest first. Malformed documents are logged and left out."""
        async with self._database.deadline():
            documents = await self._database.read(ApiKey, {}, sort=[("created_at", ASCENDING)])
        return [key for key in map(_loaded, documents) if key is not None]

    async def revoke(self, key_id: str) -> bool:
        """Revoke a key, and return whether a key with this id was there and not revoked before."""
        now = clock.now()

        async def update(transaction: Transaction) -> bool:
            session = transaction.session
            named = {"_id": key_id, "revoked_at": None}
            if await self._database.update(ApiKey, named, {"$set": {"revoked_at": now}}, session) is not None:
                return True
            # A first run of this transaction, whose answer was lost, has stored this very time.
            ours = {"_id": key_id, "revoked_at": now}
            return transaction.may_have_committed and bool(
                await self._database.read(ApiKey, ours, limit=1, session=session)
            )

        async with self._database.deadline():
            return await self._database.transaction(update)

    async def find(
        self, text: str, before_look_up: Callable[[], Awaitable[None]] | None = None
    ) -> ApiKey | None:
        """Return the key with this text, or None if there is no such key, or it is revoked or expired.

        Raises DatabaseUnavailable if the database does not answer, and whatever `before_look_up` raises,
        which is called before a look-up in the database.
        """
        form = _FORM.match(text)
        if form is None:
            return None
        key = await self._look_up(form[1], before_look_up)
        # Compared also if there is no such key, so that the time does not tell which ids exist.
        expected = key.secret_sha256 if key is not None else _hash("")
        if not hmac.compare_digest(_hash(form[2]), expected) or key is None:
            return None
        return self._in_use(key)

    async def by_id(self, key_id: str) -> ApiKey | None:
        """Return the key with this id, for a caller who proved before to have the key; None as in `find`."""
        key = await self._look_up(key_id)
        return None if key is None else self._in_use(key)

    def _in_use(self, key: ApiKey) -> ApiKey | None:
        """Return the key, and note its use, or None if it is revoked or expired."""
        now = clock.now()
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
        # Read once, because an entry may expire between two reads of the cache.
        known = self._known.get(key_id, _UNKNOWN)
        if not isinstance(known, _Unknown):
            return known
        if before_look_up is not None:
            await before_look_up()
        async with self._database.deadline():
            documents = await self._database.read(ApiKey, {"_id": key_id}, limit=1)
        key = _loaded(documents[0]) if documents else None
        self._known[key_id] = key
        return key

    async def _note_use(self, key_id: str, when: datetime) -> None:
        """Record the last use. A record that is lost while the database is away does no harm."""

        async def update(transaction: Transaction) -> None:
            named = ApiKey.find_one({"_id": key_id})
            await named.update_one({"$max": {"last_used_at": when}}, session=transaction.session)

        try:
            async with self._database.deadline():
                await self._database.transaction(update)
        except ChatHistoryError:
            return


def _loaded(raw: bytes) -> ApiKey | None:
    """Return a stored key, or None for a malformed document, which then authenticates nobody."""
    try:
        key: ApiKey = ApiKey.model_validate(bson_codec.decode(raw))
    except (InvalidBSON, ValidationError) as error:
        key_id = str(bson_codec.decode_anything(raw)["_id"])[:200]
        log.error("document_malformed", collection="api_keys", id=key_id, error=type(error).__name__)
        return None
    return key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
