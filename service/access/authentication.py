"""Authenticates a caller: turns an API key or a JWT into a Principal with permissions and a tenant.

PyJWT verifies tokens and `hmac` compares secrets; this module has no cryptography of its own. The error does
not say why a credential was refused. No log line or error contains a credential.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from service.access.api_keys import ApiKeys, Permission
from service.access.sessions import Sessions
from service.documents import ApiKey
from service.errors import InsufficientScope, Unauthenticated
from service.settings import Settings
from service.tenancy import TenantScope

if TYPE_CHECKING:
    from service.access.tokens import Tokens

_ALL: frozenset[Permission] = frozenset({"read", "write", "admin"})


@dataclass(frozen=True)
class Principal:
    """A caller: a name for logs and rate limits, the permissions, and the data that the caller can reach.

    `expires_at` is the time from which the credential is refused, if it has an end.
    """

    name: str
    permissions: frozenset[Permission]
    scope: TenantScope
    expires_at: datetime | None = None

    def require(self, permission: Permission) -> None:
        """Raise InsufficientScope if the caller does not have the permission."""
        if permission not in self.permissions:
            raise InsufficientScope(f"This call needs an API key with the scope `{permission}`.")


ANYBODY = Principal("anybody", _ALL, TenantScope())
OWN_KEY = "key:CHAT_API_KEY"
_OWN = Principal(OWN_KEY, _ALL, TenantScope())
# A CHAT_API_KEY of this length cannot be guessed over the network, so it is compared even for an address that
# has used up its failures.
_UNGUESSABLE_CHARACTERS = 16


class Authenticator:
    """Turns credentials into principals, by the methods that `CHAT_AUTH` names."""

    def __init__(self, settings: Settings, keys: ApiKeys) -> None:
        self._settings = settings
        self._keys = keys
        self._tokens: Tokens | None = None
        if "jwt" in settings.auth:
            from service.access.tokens import Tokens  # noqa: PLC0415  (slow to import, and seldom needed)

            self._tokens = Tokens(settings)

    async def authenticate(self, credential: str, before_look_up: Callable[[], Awaitable[None]]) -> Principal:
        """Return the principal. Raises Unauthenticated; DatabaseUnavailable if keys cannot be looked up.

        `before_look_up` may raise. It is called before a comparison with a key that is short enough to guess
        and before a look-up in the database, and not before a token is verified.
        """
        if self._settings.auth == "none":
            return ANYBODY
        if self._tokens is not None and self._tokens.looks_like_one(credential):
            return await self._tokens.principal(credential)
        if "key" in self._settings.auth:
            principal = await self._by_key(credential, before_look_up)
            if principal is not None:
                return principal
        raise refused()

    def for_session(self, principal: Principal, sessions: Sessions) -> dict[str, Any]:
        """Return what a cookie says of a caller who has signed in, without any secret."""
        said: dict[str, Any] = {"name": principal.name}
        if principal.name == OWN_KEY:
            said["proof"] = self._proof(sessions)
        elif principal.name.startswith("jwt:") and principal.expires_at is not None:
            scope, end = principal.scope, principal.expires_at.timestamp()
            said |= {"tenant": scope.tenant, "user": scope.user_id, "end": end}
        return said

    async def of_session(self, said: Mapping[str, Any], sessions: Sessions) -> Principal:
        """Return the principal of a cookie. Raises Unauthenticated if its key or token has ended."""
        kind, _, name = str(said["name"]).partition(":")
        if said["name"] == OWN_KEY:
            if "key" in self._settings.auth and said["proof"] == self._proof(sessions):
                return _OWN
        elif kind == "key" and "key" in self._settings.auth:
            if (key := await self._keys.by_id(name)) is not None:
                return _of_key(key)
        elif kind == "jwt" and self._tokens is not None and time.time() < said["end"]:
            end = datetime.fromtimestamp(said["end"], UTC)
            return token_principal(said["tenant"], said["user"], end)
        raise refused()

    def _proof(self, sessions: Sessions) -> str | None:
        own = self._settings.api_key
        return None if own is None else sessions.proof(own.get_secret_value())

    def close(self) -> None:
        """End the tasks in the background."""
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
                return _OWN
        key = await self._keys.find(credential, before_look_up)
        return None if key is None else _of_key(key)


def _of_key(key: ApiKey) -> Principal:
    return Principal(f"key:{key.id}", frozenset(key.scopes), TenantScope(key.tenant), key.expires_at)


def token_principal(tenant: str, user_id: str, expires_at: datetime) -> Principal:
    """Return the principal of a token: this user, who may read and write."""
    return Principal(f"jwt:{user_id}", frozenset({"read", "write"}), TenantScope(tenant, user_id), expires_at)


def refused() -> Unauthenticated:
    """Return the error for every credential that is refused. The error does not say why."""
    return Unauthenticated("The API key or token is invalid, expired or revoked.")


def _same(one: str, other: str) -> bool:
    """Compare two secrets in a time that does not depend on their content."""
    digests = [hashlib.sha256(each.encode("utf-8", "surrogateescape")).digest() for each in (one, other)]
    return hmac.compare_digest(*digests)
