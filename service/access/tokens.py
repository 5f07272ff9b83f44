"""Verifies a JWT with a key of its issuer or a shared secret, and turns its claims into a Principal."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from service.access.authentication import Principal, refused, token_principal
from service.errors import DatabaseUnavailable, Unauthenticated
from service.settings import ASYMMETRIC, Settings, public_key
from service.tenancy import is_valid_id

if TYPE_CHECKING:
    import jwt


_DEADLINE_S = 5
_BYTES_MAX = 256 * 1024
log = structlog.get_logger(__name__)


class IssuerKeys:
    """The public keys (JWKS) of the issuer of tokens, by their `kid`.

    A known key is returned at once. One task at a time fetches the keys, with one deadline for the whole
    fetch: when the keys are as old as CHAT_JWT_JWKS_CACHE_S, and for an unknown `kid`, but not sooner than
    CHAT_JWT_JWKS_RETRY_S after the last attempt, however that attempt ended. If a fetch fails, or the answer
    is not a set of keys, the earlier keys stay.
    """

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
        """Return the key, or None if the issuer does not have it.

        Raises DatabaseUnavailable if the issuer has never answered, so that no key is known.
        """
        if kid not in self._keys and (fetching := self._asked()) is not None:
            # A caller that disconnects must not cancel the fetch, because other callers wait for it, too.
            await asyncio.shield(fetching)
        if not self._keys:
            raise DatabaseUnavailable("The issuer of tokens does not answer with its keys. Try again later.")
        return self._keys.get(kid)

    def close(self) -> None:
        """Stop fetching the keys."""
        for each in (self._fetching, self._timer):
            if each is not None:
                each.cancel()

    def _asked(self) -> asyncio.Task[None] | None:
        """Return the running fetch, a new fetch if it is time for one, or None."""
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
        except Exception as error:  # noqa: BLE001  (whatever an issuer answers, the earlier keys stay)
            log.warning("issuer_keys_not_fetched", error=type(error).__name__)
            again_s = max(1, self._retry_s)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(again_s, self._ask)

    async def _fetched(self) -> bytes:
        """Fetch the document, without redirects, up to `_BYTES_MAX` bytes."""
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
                    raise ValueError("the set of keys is too large")
        return bytes(body)


def _signing_keys(document: bytes) -> dict[str, jwt.PyJWK]:
    """Read a set of keys (RFC 7517). Raises errors of many types if it is malformed or has no signing key."""
    import jwt  # noqa: PLC0415  (slow to import, and needed here only)

    keys: dict[str, jwt.PyJWK] = {}
    for key in jwt.PyJWKSet.from_dict(orjson.loads(document)).keys:
        if isinstance(key.key_id, str) and key.public_key_use in {"sig", None}:
            keys.setdefault(key.key_id, key)
    if not keys:
        raise ValueError("the set has no key to verify with")
    return keys


# The end of the year 9999, which no time of Python is after.
_END_OF_TIME_S = 253_402_300_799
_TOKEN = re.compile(r"[\w-]+\.[\w-]+\.[\w-]*\Z")


class Tokens:
    """JWTs of one issuer and one audience. The holder of a token reads and writes as the user in `sub`."""

    def __init__(self, settings: Settings) -> None:
        import jwt  # noqa: PLC0415  (slow to import, and needed here only)

        self._settings = settings
        self._jwt = jwt
        self._issuer: IssuerKeys | None = None
        self._key: Any = None
        self._algorithms = list(settings.jwt_algorithms)
        if settings.jwt_secret is not None:
            # A public key must never be combined with HS256, because anybody could sign with it.
            self._key, self._algorithms = settings.jwt_secret.get_secret_value(), ["HS256"]
        elif settings.jwt_public_key is not None:
            self._key = public_key(settings.jwt_public_key)
        elif settings.jwt_jwks_url is not None:
            self._issuer = IssuerKeys(
                settings.jwt_jwks_url,
                cache_s=settings.jwt_jwks_cache_s,
                retry_s=settings.jwt_jwks_retry_s,
            )

    @staticmethod
    def looks_like_one(credential: str) -> bool:
        """Tell whether a credential has the form of a token, which no API key has."""
        return _TOKEN.match(credential) is not None

    def close(self) -> None:
        """Stop fetching the keys of the issuer."""
        if self._issuer is not None:
            self._issuer.close()

    async def principal(self, token: str) -> Principal:
        """Return the principal of a token. Raises Unauthenticated; DatabaseUnavailable without the keys."""
        try:
            claims = await self._claims(token)
            user_id, tenant = claims["sub"], self._tenant(claims)
            end = min(int(claims["exp"]) + self._settings.jwt_leeway_s, _END_OF_TIME_S)
            expires_at = datetime.fromtimestamp(end, UTC)
        except (DatabaseUnavailable, Unauthenticated):
            raise
        except Exception as error:  # a token may contain anything, so its readers raise errors of many types
            raise refused() from error
        if not is_valid_id(user_id):
            raise refused()
        return token_principal(tenant, user_id, expires_at)

    async def _claims(self, token: str) -> dict[str, Any]:
        """Return the claims of a valid token. Raises errors of many types for any other token."""
        claims: dict[str, Any] = self._jwt.decode(
            token,
            await self._key_of(token),
            algorithms=self._algorithms,
            audience=self._settings.jwt_audience,
            issuer=self._settings.jwt_issuer,
            leeway=self._settings.jwt_leeway_s,
            options={"require": ["exp", "sub", "iss", "aud"]},
        )
        return claims

    async def _key_of(self, token: str) -> Any:
        if self._issuer is None:
            return self._key
        header = self._jwt.get_unverified_header(token)
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in ASYMMETRIC or not isinstance(kid, str):
            raise refused()
        key = await self._issuer.get(kid)
        if key is None:
            raise refused()
        return key

    def _tenant(self, claims: dict[str, Any]) -> str:
        claim = self._settings.jwt_tenant_claim
        if claim is None:
            return ""
        tenant = claims.get(claim)
        if not is_valid_id(tenant):
            raise refused()
        return tenant
