"""Who is calling: from a key or a token to a principal, whose scope says what there is for it.

Nothing here is cryptography of our own: tokens are PyJWT's matter, the comparison of secrets `hmac`'s. What
fails is not said, and never logged; a token or key is in no text that this module makes.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import DatabaseUnavailable, ScopeMissing, Unauthenticated
from service.issuer import IssuerKeys
from service.keys import Keys, ScopeName
from service.scopes import Scope
from service.settings import ASYMMETRIC, Settings

_ALL: frozenset[ScopeName] = frozenset({"read", "write", "admin"})
# An own key that is as long cannot be guessed online, so it is compared whatever an address has tried before.
_UNGUESSABLE_CHARACTERS = 16
_ID = re.compile(r"[A-Za-z0-9._:@~-]{1,128}\Z")
_TOKEN = re.compile(r"[\w-]+\.[\w-]+\.[\w-]*\Z")


@dataclass(frozen=True)
class Principal:
    """A caller: a name for logs and limits, what it may do, and whose data it can reach."""

    name: str
    scopes: frozenset[ScopeName]
    scope: Scope

    def require(self, scope: ScopeName) -> None:
        """Raise ScopeMissing if it may not."""
        if scope not in self.scopes:
            raise ScopeMissing(f"It takes the scope {scope!r}.")


ANYBODY = Principal("anybody", _ALL, Scope())


class Authenticator:
    """Turns credentials into principals, as the settings say."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys
        self._tokens = Tokens(settings) if "jwt" in settings.auth else None

    async def authenticate(self, credential: str, before_look_up: Callable[[], Awaitable[None]]) -> Principal:
        """Return who this is. Raises Unauthenticated, and DatabaseUnavailable where it cannot be known.

        What can be guessed, or costs a look-up in the database, is asked only after `before_look_up`, which
        may raise. What is signed is verified in any case.
        """
        if self._settings.auth == "none":
            return ANYBODY
        if self._tokens is not None and _TOKEN.match(credential):
            return await self._tokens.principal(credential)
        if "key" in self._settings.auth:
            found = await self._by_key(credential, before_look_up)
            if found is not None:
                return found
        raise _refused()

    def close(self) -> None:
        """Let go of what asks in the background."""
        if self._tokens is not None:
            self._tokens.close()

    async def _by_key(
        self, credential: str, before_look_up: Callable[[], Awaitable[None]]
    ) -> Principal | None:
        own = self._settings.api_key.get_secret_value() if self._settings.api_key is not None else None
        if own is not None:
            if len(own) < _UNGUESSABLE_CHARACTERS:
                await before_look_up()
            if _same(own, credential):
                return Principal("key:CHAT_API_KEY", _ALL, Scope())
        key = await self._keys.find(credential, before_look_up)
        if key is None:
            return None
        return Principal(f"key:{key.id}", frozenset(key.scopes), Scope(key.tenant))


class Tokens:
    """JWTs of one issuer, for one audience; whoever holds one is that user, and reads and writes as such."""

    def __init__(self, settings: Settings) -> None:
        import jwt  # noqa: PLC0415  (slow to import, and needed here only)

        self._settings = settings
        self._jwt = jwt
        self._issuer: IssuerKeys | None = None
        self._key: Any = None
        self._algorithms = list(settings.jwt_algorithms)
        if settings.jwt_secret is not None:
            # Never together with a public key, which anybody could then sign with.
            self._key, self._algorithms = settings.jwt_secret.get_secret_value(), ["HS256"]
        elif settings.jwt_public_key is not None:
            self._key = _public_key(settings.jwt_public_key)
        elif settings.jwt_jwks_url is not None:
            self._issuer = IssuerKeys(
                settings.jwt_jwks_url,
                cache_s=settings.jwt_jwks_cache_s,
                retry_s=settings.jwt_jwks_retry_s,
            )

    def close(self) -> None:
        """Stop asking the issuer for its keys."""
        if self._issuer is not None:
            self._issuer.close()

    async def principal(self, token: str) -> Principal:
        """Return whose token this is. Raises Unauthenticated, and DatabaseUnavailable without the keys."""
        try:
            claims = await self._claims(token)
            user_id, tenant = user_of(claims["sub"]), self._tenant(claims)
        except (DatabaseUnavailable, Unauthenticated):
            raise
        except Exception as error:  # a token may hold anything, and its readers fail in as many ways
            raise _refused() from error
        return Principal(f"jwt:{user_id}", frozenset({"read", "write"}), Scope(tenant, user_id))

    async def _claims(self, token: str) -> dict[str, Any]:
        """Return what a token says. Raises, in many ways, unless it is whole, signed, in time, and for us."""
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
            raise _refused()
        key = await self._issuer.get(kid)
        if key is None:
            raise _refused()
        return key

    def _tenant(self, claims: dict[str, Any]) -> str:
        claim = self._settings.jwt_tenant_claim
        if claim is None:
            return ""
        tenant = claims.get(claim)
        if not isinstance(tenant, str) or not _ID.match(tenant):
            raise _refused()
        return tenant


def user_of(subject: str) -> str:
    """Return the user id of a token's subject: itself, or with `~` and hex for what an id cannot have.

    So `auth0|42` is `auth0~7C42`; no two subjects have one id. Raises Unauthenticated for one too long.
    """
    user_id = "".join(_escaped(subject))
    if not _ID.match(user_id) or user_id in {".", ".."}:
        raise _refused()
    return user_id


def _escaped(subject: str) -> Iterator[str]:
    for character in subject:
        if character.isascii() and (character.isalnum() or character in "._:@-"):
            yield character
        else:
            yield from (f"~{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _public_key(text: str) -> str:
    """Return a PEM that stands in a setting, or in the file that it names."""
    return text if text.lstrip().startswith("-----BEGIN") else Path(text).read_text()


def _same(one: str, other: str) -> bool:
    """Compare two secrets in a time that says nothing of either."""
    digests = [hashlib.sha256(each.encode("utf-8", "surrogateescape")).digest() for each in (one, other)]
    return hmac.compare_digest(*digests)


def _refused() -> Unauthenticated:
    return Unauthenticated("The API key or token of this request is not valid, or not any more.")
