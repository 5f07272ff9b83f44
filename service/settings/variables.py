"""Every `CHAT_*` variable of the service, in one frozen class; docs/settings.md is generated from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SecretStr,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from service.settings import checks, values
from service.settings.checks import database_in_url, host_name, require_consistent, without_password
from service.settings.engine_record import engine_url, read_engine_record
from service.tenancy import Id

_File = Annotated[Path, AfterValidator(values.require_file)]
_Rate = Annotated[str, AfterValidator(values.require_rate)]
# `NoDecode`, because pydantic-settings itself takes a list from a variable as JSON only.
_Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(values.words)]
_Days = Annotated[int, Field(ge=1, le=36_500)]
_Ms = Annotated[int, Field(ge=100, le=86_400_000)]
_Bytes = Annotated[int, Field(ge=1024, le=2**31 - 1)]

# The key under which the sources pass the names and the file that they read to the validator of the names.
_READ = "names that were read"


class Settings(BaseSettings):
    """The settings, read from the environment and from `.env`; nothing else configures the service.

    A misspelt variable, an empty value, settings that contradict each other and a `.env` that another user
    can write are errors, because a setting that is silently ignored may leave the service open.
    """

    model_config = SettingsConfigDict(env_prefix="CHAT_", env_file=".env", extra="ignore", frozen=True)

    host: str = Field("127.0.0.1", description="The address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="The port to listen on. 0 takes a free port.")
    workers: int = Field(1, ge=1, le=64, description="The number of service processes. They share the port.")

    hosts: Annotated[str | None, AfterValidator(values.require_host_names)] = Field(
        None,
        description="The names, separated by commas, that the header `Host` may have beside "
        "`localhost`. A request with another name is answered with 421.",
    )
    insecure: bool = Field(
        False,
        description="Listen on other addresses than this machine's own although there is no authentication.",
    )
    tls_cert: _File | None = Field(
        None, description="The file of a certificate (PEM). The service then speaks HTTPS."
    )
    tls_key: _File | None = Field(None, description="The file of the certificate's private key (PEM).")
    tls_key_password: SecretStr | None = Field(None, description="The password of the private key.")
    trusted_proxies: Annotated[str | None, AfterValidator(values.require_proxies)] = Field(
        None,
        description="The addresses or networks, separated by commas, of the proxies whose `X-Forwarded-For` "
        "and `X-Forwarded-Proto` are believed.",
    )
    cors_origins: Annotated[_Words, AfterValidator(values.require_origins)] = Field(
        (),
        description="The origins, separated by commas (or a JSON list), whose web pages may call the "
        "service, for example `http://localhost:3000`.",
    )

    auth: Literal["none", "key", "jwt", "key+jwt"] = Field(
        "none",
        description="Who may call: anybody, the holder of an API key, the holder of a JWT, or the "
        "holder of either.",
    )
    api_key: SecretStr | None = Field(
        None,
        description="One API key with every scope, for simple deployments: 16 or more random characters.",
    )
    key_cache_ms: int = Field(
        5_000,
        ge=0,
        le=86_400_000,
        description="How long a process uses an API key without looking it up again. A revoked key "
        "works for so long.",
    )
    jwt_issuer: str | None = Field(None, description="The `iss` that a token must have.")
    jwt_audience: str | None = Field(None, description="The `aud` that a token must have.")
    jwt_jwks_url: Annotated[str | None, AfterValidator(values.require_http_url)] = Field(
        None, description="The URL of the issuer's public keys (JWKS)."
    )
    jwt_public_key: str | None = Field(
        None,
        description="The issuer's one public key, as PEM or as the name of a file, in place of "
        "`CHAT_JWT_JWKS_URL`.",
    )
    jwt_secret: SecretStr | None = Field(
        None,
        description="A secret shared with the issuer, in place of a public key. Tokens are then read "
        "with HS256 alone.",
    )
    jwt_algorithms: Annotated[_Words, AfterValidator(values.require_asymmetric)] = Field(
        ("RS256", "PS256", "ES256", "EdDSA"),
        description="The algorithms, separated by commas (or a JSON list), that a token may be signed with. "
        "Only asymmetric algorithms are allowed.",
    )
    jwt_tenant_claim: str | None = Field(None, description="The claim of a token that names its tenant.")
    jwt_leeway_s: int = Field(
        30, ge=0, le=300, description="By how much the clocks of the issuer and of the service may differ."
    )
    jwt_jwks_cache_s: int = Field(
        300,
        ge=1,
        le=86_400,
        description="How old the issuer's keys may be before the service asks for them again.",
    )
    jwt_jwks_retry_s: int = Field(
        10,
        ge=0,
        le=86_400,
        description="How long after asking the issuer an unknown key makes the service ask again.",
    )

    rate_per_key: _Rate | None = Field(
        None,
        description="The most requests of one API key or one user, for example `600/minute`. More "
        "are answered with 429.",
    )
    rate_per_address: _Rate | None = Field(
        None,
        description="The most requests of one address (an IPv6 /64 network). More are answered with 429.",
    )
    failures_per_address: _Rate = Field(
        "30/minute",
        description="The most failed authentications of one address (an IPv6 /64 network). More "
        "are answered with 429.",
    )

    mongodb_url: Annotated[SecretStr | None, AfterValidator(values.require_mongodb_url)] = Field(
        None,
        description="The URL of a replica set or a sharded cluster. While it is unset, the service "
        "starts the embedded engine.",
    )
    mongodb_tls_ca: _File | None = Field(
        None, description="The file (PEM) of the authority that signed MongoDB's certificate."
    )
    mongodb_tls_cert: _File | None = Field(
        None, description="The file (PEM) of the service's own certificate and key, if MongoDB asks for one."
    )
    database: Annotated[str, AfterValidator(values.require_database_name)] = Field(
        "chat_history",
        description="The name of the database, if `CHAT_MONGODB_URL` does not name one.",
    )
    # Absolute, so that a program may change its working directory.
    data_dir: Annotated[Path, AfterValidator(Path.absolute)] = Field(
        Path("./data"),
        description="The directory of the embedded engine's data. Only the service's own user can read it.",
    )
    embedded_port: int = Field(
        27018, ge=1, le=65535, description="The port of the embedded engine on 127.0.0.1."
    )
    embedded_cache: Annotated[str, AfterValidator(values.require_cache_size)] = Field(
        "1G",
        description="The most memory of the embedded engine's cache, such as `512M` or `1G`. One "
        "append may fill 7% of it.",
    )

    disk_reserve_bytes: int = Field(
        256 * 1024 * 1024,
        ge=0,
        le=2**50,
        description="With the embedded engine: if less disk is free than this, nothing is added (507).",
    )

    database_timeout_ms: _Ms = Field(
        5_000,
        description="The most time of all database work of one call together. After it the answer is 503.",
    )
    server_selection_timeout_ms: _Ms = Field(
        2_000, description="How long one call waits for a database that is away."
    )
    retry_after_s: int = Field(1, ge=1, le=86_400, description="The `Retry-After` of an answer with 503.")
    body_timeout_ms: _Ms = Field(
        30_000, description="How long a client may take to send the body of a request."
    )
    header_bytes_max: _Bytes = Field(
        64 * 1024,
        description="The most bytes of a request line and its headers together. More are answered with 431.",
    )
    header_timeout_ms: _Ms = Field(
        10_000, description="How long a client may take to send the headers of a request."
    )
    send_timeout_ms: _Ms = Field(60_000, description="How long a client may stop reading an answer.")
    connections_max: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="The most connections of a process at once. More are answered with 503.",
    )
    shutdown_timeout_ms: _Ms = Field(
        10_000, description="How long running requests may take after the service was told to stop."
    )

    default_user_id: Id = Field(
        "default",
        description="The owner of a conversation that is created through `/v1` without naming an owner.",
    )

    retention_days: _Days | None = Field(
        None, description="Conversations without activity for so many days are removed as a whole."
    )
    retention_days_by_tenant: Annotated[
        dict[str, _Days], NoDecode, BeforeValidator(values.numbers_by_name)
    ] = Field(
        {},
        description="The days for single tenants, in place of `CHAT_RETENTION_DAYS`: `acme=30,globex=365` "
        "(or a JSON object).",
    )

    body_bytes_max: _Bytes = Field(32 * 1024 * 1024, description="The most bytes of a request body.")
    page_items_default: int = Field(
        50, ge=1, le=1_000, description="The number of items of a page if a request does not say it."
    )
    page_items_max: int = Field(1_000, ge=1, le=1_000, description="The most items of a page.")
    page_bytes_max: _Bytes = Field(
        32 * 1024 * 1024,
        description="The most bytes of a page. A page that would be larger ends early, with `has_more`.",
    )
    cache_bytes: int = Field(2**25, ge=0, le=2**40, description="The most bytes of data kept in memory.")
    batch_items_max: int = Field(1_000, ge=1, le=1_000, description="The most messages of one append.")

    metrics: bool = Field(False, description="Serve `/metrics` for Prometheus.")
    metrics_token: SecretStr | None = Field(
        None,
        description="The bearer token of `/metrics`. `CHAT_AUTH` requires it. Without both, "
        "`/metrics` is for this machine only.",
    )
    audit_days: int | None = Field(
        None, ge=1, le=24_855, description="Keep an audit trail (the collection `audit`) for so many days."
    )
    tracing: bool = Field(
        False,
        description="Send traces with OpenTelemetry (needs the extra `otel`). The `OTEL_*` variables "
        "configure it.",
    )

    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="The form of the log. `auto` is `console` in a terminal and `json` elsewhere."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The lowest level that is logged."
    )

    _unknown: tuple[str, ...] = PrivateAttr(())
    _env_file_read: Path | None = PrivateAttr(None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  (pydantic names it)
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (there are none)
    ) -> tuple[Any, ...]:
        """Add the names of the variables and the `.env` file to the sources, for `_names_are_known`."""
        variables: Mapping[str, str | None] = getattr(env_settings, "env_vars", {})
        in_file: Mapping[str, str | None] = getattr(dotenv_settings, "env_vars", {})
        file = getattr(dotenv_settings, "env_file", None)
        found = Path(file).resolve() if isinstance(file, str | Path) and Path(file).exists() else None
        read = {_READ: ({**in_file, **variables}, file, found)}
        return init_settings, env_settings, dotenv_settings, lambda: read

    @model_validator(mode="wrap")
    @classmethod
    def _names_are_known(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Refuse a misspelt name, an empty value, and a `.env` that another user can write."""
        variables, file, found = (
            values.pop(_READ, ({}, None, None)) if isinstance(values, dict) else ({}, None, None)
        )
        given = {name.upper(): value for name, value in variables.items() if name.upper().startswith("CHAT_")}
        known = [f"CHAT_{name.upper()}" for name in cls.model_fields]
        unsafe = checks.fault_of_file(Path(file)) if found else None
        faults = [*filter(None, [unsafe]), *checks.faults_of_names(given, known)]
        if faults:
            raise ValueError("\n".join(faults))
        settings = handler(values)
        cls._remember_what_was_read(settings, checks.unknown_names(given, known), found)
        return settings

    def _remember_what_was_read(self, unknown: Sequence[str], file: Path | None) -> None:
        self._unknown, self._env_file_read = tuple(unknown), file

    @property
    def unknown_variables(self) -> tuple[str, ...]:
        """Return the `CHAT_*` variables that are no settings; they may belong to another program."""
        return self._unknown

    @property
    def env_file_read(self) -> Path | None:
        """Return the path of the `.env` that was read, if there was one."""
        return self._env_file_read

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        require_consistent(self)
        return self

    @property
    def host_names(self) -> frozenset[str]:
        """Return the names in `hosts`, in the form in which `host_name` returns names."""
        named = map(host_name, self.hosts.split(",")) if self.hosts is not None else ()
        return frozenset(filter(None, named))

    @property
    def shortest_retention_days(self) -> int | None:
        """Return the shortest retention of any tenant, in days, or None if no retention is set."""
        days = [*self.retention_days_by_tenant.values(), *filter(None, [self.retention_days])]
        return min(days, default=None)

    def engine_record(self) -> dict[str, Any]:
        """Return what the data directory records of its engine. Raises OSError if it records no engine."""
        return read_engine_record(self.data_dir)

    @property
    def embedded_url(self) -> str:
        """Return the URL of the engine that runs on the data directory. Raises OSError if none runs."""
        return engine_url(self.data_dir, self.database)

    @property
    def url(self) -> str:
        """Return the URL of the database that the service uses, embedded or not, with its password."""
        return self.mongodb_url.get_secret_value() if self.mongodb_url is not None else self.embedded_url

    @property
    def database_name(self) -> str:
        """Describe the database in words, without any secret."""
        if self.mongodb_url is not None:
            name = database_in_url(self.url) or self.database
            return f"{name!r} on {without_password(self.url)}"
        record = self.engine_record()
        return (
            f"{self.database!r} on the embedded engine of {self.data_dir.resolve()} "
            f"({record['host']}:{record['port']})"
        )
