"""The public keys (JWKS) of the tokens' issuer: fetched over HTTP, kept, and replaced while nobody waits.

A key that is known is found at once. One task at a time asks the issuer, with one deadline for all of it:
when the keys are as old as CHAT_JWT_JWKS_CACHE_S, and for a key that is not known, but then not sooner than
CHAT_JWT_JWKS_RETRY_S after the last attempt, however that ended. While the issuer does not answer, or
answers with something else, the keys that it gave before stay.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import TYPE_CHECKING

import orjson
import structlog

from service.errors import DatabaseUnavailable

if TYPE_CHECKING:
    import jwt

_DEADLINE_S = 5
_BYTES_MAX = 256 * 1024
log = structlog.get_logger(__name__)


class IssuerKeys:
    """The issuer's keys by their `kid`."""

    def __init__(self, url: str, *, cache_s: float, retry_s: float) -> None:
        self._url = url
        self._cache_s = cache_s
        self._retry_s = retry_s
        self._tls = ssl.create_default_context()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._attempted_at: float | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def get(self, kid: str) -> jwt.PyJWK | None:
        """Return the key, or None for one that the issuer does not have.

        Raises DatabaseUnavailable where the issuer has never answered, so that nobody knows.
        """
        if kid not in self._keys and (fetching := self._asked()) is not None:
            # A caller who goes away does not end it: others wait for it, too.
            await asyncio.shield(fetching)
        if not self._keys:
            raise DatabaseUnavailable("The issuer of tokens does not answer with its keys. Try again later.")
        return self._keys.get(kid)

    def close(self) -> None:
        """Stop asking."""
        for each in (self._fetching, self._timer):
            if each is not None:
                each.cancel()

    def _asked(self) -> asyncio.Task[None] | None:
        """Return the task that is asking, a new one if it is time for it, or None."""
        if self._fetching is None or self._fetching.done():
            now = time.monotonic()
            if self._attempted_at is not None and now - self._attempted_at < self._retry_s:
                return None
            self._ask()
        return self._fetching

    def _ask(self) -> None:
        if self._fetching is None or self._fetching.done():
            self._attempted_at = time.monotonic()
            self._fetching = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        again_s = self._cache_s
        try:
            async with asyncio.timeout(_DEADLINE_S):
                self._keys = _signing_keys(await self._fetched())
        except Exception as error:  # noqa: BLE001  (whatever an issuer answers, the keys before it stay)
            log.warning("issuer_keys_not_fetched", error=type(error).__name__)
            again_s = max(1, self._retry_s)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(again_s, self._ask)

    async def _fetched(self) -> bytes:
        """Get the document: no redirect is followed, and no more is read than a set of keys may have."""
        import httpx  # noqa: PLC0415  (slow to import, and needed here only)

        body = bytearray()
        plain = {"Accept": "application/json", "Accept-Encoding": "identity"}
        async with (
            httpx.AsyncClient(verify=self._tls, timeout=_DEADLINE_S) as client,
            client.stream("GET", self._url, headers=plain) as response,
        ):
            response.raise_for_status()
            async for part in response.aiter_raw():
                body += part
                if len(body) > _BYTES_MAX:
                    raise ValueError("more than a set of keys may have")
        return bytes(body)


def _signing_keys(document: bytes) -> dict[str, jwt.PyJWK]:
    """Read a set of keys (RFC 7517). Raises, in many ways, for what is none, or has none to verify with."""
    import jwt  # noqa: PLC0415  (slow to import, and needed here only)

    found: dict[str, jwt.PyJWK] = {}
    for key in jwt.PyJWKSet.from_dict(orjson.loads(document)).keys:
        if isinstance(key.key_id, str) and key.public_key_use in {"sig", None}:
            found.setdefault(key.key_id, key)
    if not found:
        raise ValueError("no key to verify with")
    return found
