"""Every `CHAT_*` variable and every limit of the service, in one frozen class."""

from __future__ import annotations

import functools
import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

# MongoDB's own limit of one document, less what the service's fields may take (five of them, three
# of which hold ids of at most 128 characters).
MESSAGE_BYTES_MAX = 16 * 1024 * 1024 - 1024
# MongoDB nests 100 levels; the message, its list and the driver's command take a few of them.
JSON_LEVELS_MAX = 90
# How many messages one transaction deletes. MongoDB advises about 1,000 documents a transaction.
DELETE_BATCH_ITEMS = 1_000
# How many `seq`s one read may span on an engine that reads its whole match before it cuts.
WINDOW_SEQS_MAX = 4_096
# What a token may be signed with unless there is a secret: never anything that its reader could sign, too.
ASYMMETRIC = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{0,5})?", re.ASCII)


@functools.lru_cache(maxsize=256)
def host_name(authority: str) -> str | None:
    """Return the name in `name:port`, as names are compared: lower case, without a last dot; else None.

    An IPv6 address stands in brackets, in its shortest form.
    """
    text = authority.strip().lower()
    if text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    name = found[1]
    if name.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(name[1:-1])}]"
        except ValueError:
            return None
    return name.removesuffix(".") or None


class Settings(BaseSettings):
    """What the service reads from the environment and from `.env`; nothing else configures it."""

    model_config = SettingsConfigDict(env_prefix="CHAT_", env_file=".env", extra="ignore", frozen=True)

    host: str = Field("127.0.0.1", description="The address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one.")
    workers: int = Field(1, ge=1, le=64, description="Service processes that share the port.")

    hosts: str | None = Field(
        None,
        description="Names (commas between) that `Host` may have beside `localhost`; any other is a 421.",
    )
    insecure: bool = Field(
        False, description="Listen beyond this machine without authentication all the same."
    )
    tls_cert: Path | None = Field(None, description="A certificate (PEM): the service then speaks HTTPS.")
    tls_key: Path | None = Field(None, description="Its private key (PEM).")
    tls_key_password: SecretStr | None = Field(None, description="The key's password.")
    trusted_proxies: str | None = Field(
        None, description="Addresses (commas between) whose `X-Forwarded-For` and `-Proto` count."
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins (a JSON list) whose pages may call; none unless given."
    )

    auth: Literal["none", "key", "jwt", "key+jwt"] = Field(
        "none", description="Who may call: anybody, the holder of an API key, of a JWT, of either."
    )
    api_key: SecretStr | None = Field(
        None,
        description="One API key with every scope, for simple deployments; 16 characters or more, at random.",
    )
    key_cache_ms: int = Field(
        5_000, ge=0, description="How long a key is known before it is looked up again, revoked or not."
    )
    jwt_issuer: str | None = Field(None, description="The `iss` that a token must have.")
    jwt_audience: str | None = Field(None, description="The `aud` that a token must have.")
    jwt_jwks_url: str | None = Field(None, description="Where the issuer's public keys (JWKS) are.")
    jwt_public_key: str | None = Field(
        None, description="Or the one public key, as PEM, or the name of a file with it."
    )
    jwt_secret: SecretStr | None = Field(None, description="Or a shared secret; then HS256 is read, alone.")
    jwt_algorithms: tuple[str, ...] = Field(
        ("RS256", "PS256", "ES256", "EdDSA"),
        description="The algorithms (a JSON list) that a token may be signed with; asymmetric ones only.",
    )
    jwt_tenant_claim: str | None = Field(None, description="The claim that names a token's tenant.")
    jwt_leeway_s: int = Field(30, ge=0, le=300, description="By how much clocks may differ.")
    jwt_jwks_cache_s: int = Field(300, ge=1, description="How old the issuer's keys may be.")
    jwt_jwks_retry_s: int = Field(
        10, ge=0, description="How soon after an attempt an unknown key makes us ask the issuer again."
    )

    rate_per_key: str | None = Field(
        None, description="Requests of one key or one user (`600/minute`); beyond them, 429."
    )
    rate_per_address: str | None = Field(
        None, description="Requests of one address (an IPv6 /64); beyond them, 429."
    )
    failures_per_address: str = Field(
        "30/minute",
        description="Failed authentications of one address (an IPv6 /64); beyond them, 429.",
    )

    mongodb_url: str | None = Field(
        None,
        description="A replica set or a sharded cluster. Unset: the embedded engine is started.",
    )
    mongodb_tls_ca: Path | None = Field(None, description="The authority (PEM) that signed MongoDB's.")
    mongodb_tls_cert: Path | None = Field(
        None, description="This service's own certificate and key (PEM), if MongoDB asks for one."
    )
    database: str = Field(
        "chat_history",
        pattern=r"^[A-Za-z0-9_-]{1,38}$",
        description="The database's name.",
    )
    data_dir: Path = Field(Path("./data"), description="Where the embedded engine keeps its data.")
    embedded_port: int = Field(27018, ge=1, le=65535, description="The embedded engine's port on 127.0.0.1.")
    embedded_cache: str = Field(
        "1G",
        pattern=r"^[1-9][0-9]*[MG]$",
        description="The most memory of the embedded engine's cache; one append may fill 7% of it.",
    )

    disk_reserve_bytes: int = Field(
        256 * 1024 * 1024,
        ge=0,
        description="With the embedded engine: less free disk than this, and nothing is added (507).",
    )

    database_timeout_ms: int = Field(
        5_000, ge=100, description="All database work of one call together; then 503."
    )
    server_selection_timeout_ms: int = Field(
        2_000, ge=100, description="How long one call waits for a database that is away."
    )
    retry_after_s: int = Field(1, ge=1, description="The `Retry-After` of a 503.")
    body_timeout_ms: int = Field(
        30_000, ge=100, description="How long a client may take to send its request's body."
    )
    header_bytes_max: int = Field(
        64 * 1024, ge=1024, description="The most a request line and its headers may have; then 431."
    )
    header_timeout_ms: int = Field(
        10_000, ge=100, description="How long a connection may take to send a request's headers."
    )
    send_timeout_ms: int = Field(
        60_000, ge=100, description="How long a client may let an answer stand without reading on."
    )
    connections_max: int = Field(
        10_000, ge=1, description="Connections at once in a process; beyond them, 503."
    )
    shutdown_timeout_ms: int = Field(
        10_000, ge=100, description="How long requests in flight may take once we are told to stop."
    )

    default_user_id: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9._:@~-]{1,128}$",
        description="The owner of what is created through `/v1` without naming one.",
    )

    retention_days: int | None = Field(
        None, ge=1, description="Conversations without activity for so many days are removed, whole."
    )
    retention_days_by_tenant: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="The same for single tenants (a JSON object), in the place of the one above."
    )

    body_bytes_max: int = Field(32 * 1024 * 1024, ge=1024, description="The largest request body.")
    page_items_default: int = Field(50, ge=1, le=1_000, description="Items of a page when none is asked for.")
    page_items_max: int = Field(1_000, ge=1, le=1_000, description="The most items of one page.")
    page_bytes_max: int = Field(
        32 * 1024 * 1024, ge=1024, description="A page ends early beyond this; `has_more` says so."
    )
    batch_items_max: int = Field(1_000, ge=1, le=1_000, description="The most messages of one append.")

    metrics: bool = Field(False, description="Serve `/metrics` for Prometheus.")
    metrics_token: SecretStr | None = Field(
        None, description="The bearer token that `/metrics` wants; without it, it is for this machine only."
    )
    audit_days: int | None = Field(
        None, ge=1, description="Keep an audit trail for so many days (the collection `audit`)."
    )
    tracing: bool = Field(
        False, description="Send traces by OpenTelemetry (the extra `otel`); `OTEL_*` variables configure it."
    )

    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="`auto` is console in a terminal and JSON elsewhere."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="What is logged, at the least."
    )

    @field_validator("hosts")
    @classmethod
    def _hosts_are_names(cls, value: str | None) -> str | None:
        for each in (value or "").split(","):
            if value is not None and host_name(each) is None:
                raise ValueError(f"{each.strip()!r} is no name or address of a host, as `Host` has it")
        return value

    @field_validator("rate_per_key", "rate_per_address", "failures_per_address")
    @classmethod
    def _rate(cls, value: str | None) -> str | None:
        if value is not None:
            from limits import parse_many  # noqa: PLC0415  (slow to import, and seldom needed)

            parse_many(value)
        return value

    @model_validator(mode="after")
    def _jwt_has_one_key(self) -> Settings:
        """Refuse settings under which a token could be verified by nothing, or by the wrong thing."""
        if not set(self.jwt_algorithms) <= ASYMMETRIC:
            raise ValueError(f"jwt_algorithms may be of {', '.join(sorted(ASYMMETRIC))}")
        if "jwt" in self.auth:
            keys = (self.jwt_jwks_url, self.jwt_public_key, self.jwt_secret)
            if sum(each is not None for each in keys) != 1:
                raise ValueError("jwt needs just one of jwt_jwks_url, jwt_public_key and jwt_secret")
            if self.jwt_jwks_url is not None and not self.jwt_jwks_url.startswith(("http://", "https://")):
                raise ValueError("jwt_jwks_url must begin with https:// or http://")
            if self.jwt_issuer is None or self.jwt_audience is None:
                raise ValueError("jwt needs jwt_issuer and jwt_audience")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        return self

    @property
    def host_names(self) -> frozenset[str]:
        """Return the names in `hosts`, as names are compared."""
        named = map(host_name, self.hosts.split(",")) if self.hosts is not None else ()
        return frozenset(filter(None, named))

    @property
    def shortest_retention_days(self) -> int | None:
        """Return after how many days without activity the first conversations go, of any tenant."""
        days = [*self.retention_days_by_tenant.values(), *filter(None, [self.retention_days])]
        return min(days, default=None)

    @property
    def embedded_url(self) -> str:
        """Name the embedded engine as drivers and `mongosh` take it.

        `retryWrites=false` because SecantusDB scans its table of retryable writes at every write.
        """
        return (
            f"mongodb://127.0.0.1:{self.embedded_port}/{self.database}"
            "?directConnection=true&retryWrites=false"
        )

    @property
    def url(self) -> str:
        """Name the database that the service uses, embedded or not."""
        return self.mongodb_url or self.embedded_url
