"""Every `CHAT_*` variable and every limit of the service, in one frozen class."""

from __future__ import annotations

import functools
import ipaddress
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

# MongoDB's own limit of one document, less what the service's fields may take (five of them, three
# of which hold ids of at most 128 characters).
MESSAGE_BYTES_MAX = 16 * 1024 * 1024 - 1024
# The largest body of a call that takes a few fields and metadata, but no messages.
SMALL_BODY_BYTES_MAX = 2 * 1024 * 1024
# How many times CHAT_BODY_BYTES_MAX the values of one body may take in memory once they are parsed.
PARSED_TIMES_MAX = 3
# MongoDB nests 100 levels; the message, its list and the driver's command take a few of them.
JSON_LEVELS_MAX = 90
# MongoDB returns an error for a field name of more words with dots between them.
KEY_DOTS_MAX = 254
# How many messages one transaction deletes. MongoDB advises about 1,000 documents a transaction.
DELETE_BATCH_ITEMS = 1_000
# How many `seq`s one read may span on an engine that reads its whole match before it cuts.
WINDOW_SEQS_MAX = 4_096
# What a token may be signed with unless there is a secret: never anything that its reader could sign, too.
ASYMMETRIC = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
# In the data directory: where its engine is, and the password that proves which engine answers there.
ENGINE_RECORD = "engine.json"
# Variables of the clients (service.clients), which are no settings of the service.
_OF_CLIENTS = frozenset({"CHAT_HISTORY_URL", "CHAT_HISTORY_API_KEY"})
# Where the names that were read travel among the values, on their way to the validator.
_READ = "names that were read"
_SECRET_OPTIONS = re.compile(
    r"([?&][^=&]*(?:password|token|secret|authmechanismproperties)[^=&]*=)[^&]*", re.IGNORECASE
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
    """What the service reads from the environment and from `.env`; nothing else configures it.

    A variable that is nearly one of these names, a value that is empty, settings that contradict each other
    and a `.env` that somebody else can write are errors, so that nothing is silently left out.
    """

    model_config = SettingsConfigDict(env_prefix="CHAT_", env_file=".env", extra="ignore", frozen=True)

    host: str = Field("127.0.0.1", description="The address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="The port to listen on. 0 takes a free port.")
    workers: int = Field(1, ge=1, le=64, description="The number of service processes. They share the port.")

    hosts: str | None = Field(
        None,
        description="The names, separated by commas, that the header `Host` may have beside "
        "`localhost`. A request with another name is answered with 421.",
    )
    insecure: bool = Field(
        False,
        description="Listen on other addresses than this machine's own although there is no authentication.",
    )
    tls_cert: Path | None = Field(
        None, description="The file of a certificate (PEM). The service then speaks HTTPS."
    )
    tls_key: Path | None = Field(None, description="The file of the certificate's private key (PEM).")
    tls_key_password: SecretStr | None = Field(None, description="The password of the private key.")
    trusted_proxies: str | None = Field(
        None,
        description="The addresses, separated by commas, of the proxies whose `X-Forwarded-For` and "
        "`X-Forwarded-Proto` are believed.",
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="The origins, as a JSON list, whose web pages may call the service."
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
        description="How long a process uses an API key without looking it up again. A revoked key "
        "works for so long.",
    )
    jwt_issuer: str | None = Field(None, description="The `iss` that a token must have.")
    jwt_audience: str | None = Field(None, description="The `aud` that a token must have.")
    jwt_jwks_url: str | None = Field(None, description="The URL of the issuer's public keys (JWKS).")
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
    jwt_algorithms: tuple[str, ...] = Field(
        ("RS256", "PS256", "ES256", "EdDSA"),
        description="The algorithms, as a JSON list, that a token may be signed with. Only "
        "asymmetric algorithms are allowed.",
    )
    jwt_tenant_claim: str | None = Field(None, description="The claim of a token that names its tenant.")
    jwt_leeway_s: int = Field(
        30, ge=0, le=300, description="By how much the clocks of the issuer and of the service may differ."
    )
    jwt_jwks_cache_s: int = Field(
        300, ge=1, description="How old the issuer's keys may be before the service asks for them again."
    )
    jwt_jwks_retry_s: int = Field(
        10,
        ge=0,
        description="How long after asking the issuer an unknown key makes the service ask again.",
    )

    rate_per_key: str | None = Field(
        None,
        description="The most requests of one API key or one user, for example `600/minute`. More "
        "are answered with 429.",
    )
    rate_per_address: str | None = Field(
        None,
        description="The most requests of one address (an IPv6 /64 network). More are answered with 429.",
    )
    failures_per_address: str = Field(
        "30/minute",
        description="The most failed authentications of one address (an IPv6 /64 network). More "
        "are answered with 429.",
    )

    mongodb_url: SecretStr | None = Field(
        None,
        description="The URL of a replica set or a sharded cluster. While it is unset, the service "
        "starts the embedded engine.",
    )
    mongodb_tls_ca: Path | None = Field(
        None, description="The file (PEM) of the authority that signed MongoDB's certificate."
    )
    mongodb_tls_cert: Path | None = Field(
        None, description="The file (PEM) of the service's own certificate and key, if MongoDB asks for one."
    )
    database: str = Field(
        "chat_history",
        pattern=r"^[A-Za-z0-9_-]{1,38}$",
        description="The name of the database.",
    )
    data_dir: Path = Field(
        Path("./data"),
        description="The directory of the embedded engine's data. Only the service's own user can read it.",
    )
    embedded_port: int = Field(
        27018, ge=1, le=65535, description="The port of the embedded engine on 127.0.0.1."
    )
    embedded_cache: str = Field(
        "1G",
        pattern=r"^[1-9][0-9]*[MG]$",
        description="The most memory of the embedded engine's cache, such as `512M` or `1G`. One "
        "append may fill 7% of it.",
    )

    disk_reserve_bytes: int = Field(
        256 * 1024 * 1024,
        ge=0,
        description="With the embedded engine: if less disk is free than this, nothing is added (507).",
    )

    database_timeout_ms: int = Field(
        5_000,
        ge=100,
        description="The most time of all database work of one call together. After it the answer is 503.",
    )
    server_selection_timeout_ms: int = Field(
        2_000, ge=100, description="How long one call waits for a database that is away."
    )
    retry_after_s: int = Field(1, ge=1, description="The `Retry-After` of an answer with 503.")
    body_timeout_ms: int = Field(
        30_000, ge=100, description="How long a client may take to send the body of a request."
    )
    header_bytes_max: int = Field(
        64 * 1024,
        ge=1024,
        description="The most bytes of a request line and its headers together. More are answered with 431.",
    )
    header_timeout_ms: int = Field(
        10_000, ge=100, description="How long a client may take to send the headers of a request."
    )
    send_timeout_ms: int = Field(60_000, ge=100, description="How long a client may stop reading an answer.")
    connections_max: int = Field(
        10_000, ge=1, description="The most connections of a process at once. More are answered with 503."
    )
    shutdown_timeout_ms: int = Field(
        10_000, ge=100, description="How long running requests may take after the service was told to stop."
    )

    default_user_id: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9._:@~-]{1,128}$",
        description="The owner of a conversation that is created through `/v1` without naming an owner.",
    )

    retention_days: int | None = Field(
        None, ge=1, description="Conversations without activity for so many days are removed as a whole."
    )
    retention_days_by_tenant: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="The days for single tenants, as a JSON object, in place of `CHAT_RETENTION_DAYS`."
    )

    body_bytes_max: int = Field(32 * 1024 * 1024, ge=1024, description="The most bytes of a request body.")
    page_items_default: int = Field(
        50, ge=1, le=1_000, description="The number of items of a page if a request does not say it."
    )
    page_items_max: int = Field(1_000, ge=1, le=1_000, description="The most items of a page.")
    page_bytes_max: int = Field(
        32 * 1024 * 1024,
        ge=1024,
        description="The most bytes of a page. A page that would be larger ends early, with `has_more`.",
    )
    batch_items_max: int = Field(1_000, ge=1, le=1_000, description="The most messages of one append.")

    metrics: bool = Field(False, description="Serve `/metrics` for Prometheus.")
    metrics_token: SecretStr | None = Field(
        None,
        description="The bearer token of `/metrics`. `CHAT_AUTH` requires it. Without both, "
        "`/metrics` is for this machine only.",
    )
    audit_days: int | None = Field(
        None, ge=1, description="Keep an audit trail (the collection `audit`) for so many days."
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
        """Read what pydantic reads, and which names and which file it was."""
        variables: Mapping[str, str | None] = getattr(env_settings, "env_vars", {})
        in_file: Mapping[str, str | None] = getattr(dotenv_settings, "env_vars", {})
        file = getattr(dotenv_settings, "env_file", None)
        found = Path(file).resolve() if isinstance(file, str | Path) and Path(file).exists() else None
        read = {_READ: ({**in_file, **variables}, file, found)}
        return init_settings, env_settings, dotenv_settings, lambda: read

    @model_validator(mode="wrap")
    @classmethod
    def _names_are_known(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Refuse a name that is nearly a setting's, an empty value, and a `.env` of somebody else's."""
        variables, file, found = (
            values.pop(_READ, ({}, None, None)) if isinstance(values, dict) else ({}, 0, 0)
        )
        given = {name.upper(): value for name, value in variables.items() if name.upper().startswith("CHAT_")}
        known = [f"CHAT_{name.upper()}" for name in cls.model_fields]
        unknown = sorted(given.keys() - {*known, *_OF_CLIENTS})
        faults = [_not_to_be_trusted(Path(file))] if found else []
        faults += [_misspelt(name, known) for name in unknown]
        faults += [
            f"{name} is empty. Give it a value, or unset it." for name in known if _empty(given.get(name))
        ]
        faults += [
            f"{name} is set {count} times, in capitals and not. Unset all but one."
            for name, count in Counter(name.upper() for name in os.environ).items()
            if count > 1 and name in known
        ]
        if any(faults):
            raise ValueError("\n".join(filter(None, faults)))
        settings = handler(values)
        settings._unknown, settings._env_file_read = tuple(unknown), found  # noqa: SLF001  (our own)
        return settings

    @property
    def unknown_variables(self) -> tuple[str, ...]:
        """Name the `CHAT_*` variables that are nobody's here; they may be another program's."""
        return self._unknown

    @property
    def env_file_read(self) -> Path | None:
        """Name the `.env` that was read, if there was one."""
        return self._env_file_read

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

    @field_validator("mongodb_url")
    @classmethod
    def _is_a_mongodb_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("mongodb://", "mongodb+srv://")):
            raise ValueError("it must begin with mongodb:// or mongodb+srv://")
        return value

    @model_validator(mode="after")
    def _nothing_contradicts(self) -> Self:
        """Refuse a setting that would have no effect where whoever set it relies on one."""
        faults = [
            f"{' and '.join(f'CHAT_{name.upper()}' for name in sorted(names & self.model_fields_set))} "
            f"would have no effect: {reason}"
            for names, reason, applies in _NEEDS
            if names & self.model_fields_set and not applies(self)
        ]
        if self.metrics and self.auth != "none" and self.metrics_token is None:
            faults.append(
                "CHAT_METRICS with CHAT_AUTH needs CHAT_METRICS_TOKEN, because a proxy on this machine would "
                "show the metrics to everybody."
            )
        if {
            "page_items_default",
            "page_items_max",
        } <= self.model_fields_set and self.page_items_default > self.page_items_max:
            faults.append(
                "CHAT_PAGE_ITEMS_DEFAULT is more than CHAT_PAGE_ITEMS_MAX. Lower the one, or raise the other."
            )
        if faults:
            raise ValueError("\n".join(faults))
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

    def engine_record(self) -> dict[str, Any]:
        """Return what the data directory records of its engine. Raises OSError where there is none."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # neither a link nor a pipe
        descriptor = os.open(self.data_dir / ENGINE_RECORD, flags)
        with os.fdopen(descriptor) as file:
            try:
                record = json.load(file)
            except ValueError:
                record = None
        if not isinstance(record, dict) or not record.keys() >= {"host", "port", "user", "password"}:
            raise OSError(f"{self.data_dir / ENGINE_RECORD} is no record of an engine.")
        return record

    @property
    def embedded_url(self) -> str:
        """Name the engine that runs on the data directory, as drivers and `mongosh` take it.

        The URL has the password of the data directory, so nothing else that listens there can be taken for
        it. `retryWrites=false` because SecantusDB scans its table of retryable writes at every write. Raises
        OSError where no engine is recorded.
        """
        record = self.engine_record()
        if not record.get("port"):
            raise OSError(f"No engine runs on the data directory {self.data_dir}.")
        return (
            f"mongodb://{record['user']}:{record['password']}@{record['host']}:{record['port']}/{self.database}"
            "?authSource=admin&authMechanism=SCRAM-SHA-256&directConnection=true&retryWrites=false"
        )

    @property
    def url(self) -> str:
        """Name the database that the service uses, embedded or not, with its password."""
        return self.mongodb_url.get_secret_value() if self.mongodb_url is not None else self.embedded_url

    @property
    def database_name(self) -> str:
        """Say in words, without any secret, which database this is."""
        if self.mongodb_url is not None:
            return f"{without_password(self.url)} (database {self.database!r} unless the URL names one)"
        record = self.engine_record()
        return (
            f"{self.database!r} on the embedded engine of {self.data_dir.resolve()} "
            f"({record['host']}:{record['port']})"
        )


def without_password(url: str) -> str:
    """Return a URL of MongoDB without its password, nor any other secret that its options may have."""
    scheme, _, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return _SECRET_OPTIONS.sub(r"\1***", f"{scheme}://{user.partition(':')[0]}{at}{host}")


_NEEDS: tuple[tuple[frozenset[str], str, Callable[[Settings], bool]], ...] = (
    (
        frozenset({"api_key", "key_cache_ms"}),
        "API keys are not asked for. Set CHAT_AUTH=key (or key+jwt), or unset it.",
        lambda s: "key" in s.auth,
    ),
    (
        frozenset(name for name in Settings.model_fields if name.startswith("jwt_")),
        "tokens are not asked for. Set CHAT_AUTH=jwt (or key+jwt), or unset it.",
        lambda s: "jwt" in s.auth,
    ),
    (
        frozenset({"failures_per_address"}),
        "nothing is asked for. Set CHAT_AUTH, or unset it.",
        lambda s: s.auth != "none",
    ),
    (
        frozenset({"jwt_jwks_cache_s", "jwt_jwks_retry_s"}),
        "the issuer is not asked for keys. Set CHAT_JWT_JWKS_URL, or unset it.",
        lambda s: s.jwt_jwks_url is not None,
    ),
    (
        frozenset({"jwt_algorithms"}),
        "with CHAT_JWT_SECRET tokens are read with HS256 alone. Unset one of them.",
        lambda s: s.jwt_secret is None,
    ),
    (
        frozenset({"tls_key_password"}),
        "there is no key. Set CHAT_TLS_CERT and CHAT_TLS_KEY, or unset it.",
        lambda s: s.tls_key is not None,
    ),
    (
        frozenset({"mongodb_tls_ca", "mongodb_tls_cert"}),
        "the embedded engine would be used. Set CHAT_MONGODB_URL, or unset it.",
        lambda s: s.mongodb_url is not None,
    ),
    (
        frozenset({"metrics_token"}),
        "there are no metrics. Set CHAT_METRICS=true, or unset it.",
        lambda s: s.metrics,
    ),
)


def _empty(value: str | None) -> bool:
    return value is not None and not value.strip()


def _not_to_be_trusted(file: Path) -> str | None:
    """Say why a `.env` must not be read: whoever can write it could open this service, or lead it astray."""
    link, target = file.lstat(), file.stat()
    if {link.st_uid, target.st_uid} - {os.geteuid(), 0}:
        return f"{file.absolute()} belongs to another user, so it is not read. Remove it, or make it yours."
    if stat.S_IMODE(target.st_mode) & 0o022:
        return (
            f"Others can write {file.absolute()}, so it is not read. Mend that: chmod go-w {file.absolute()}"
        )
    return None


def _misspelt(name: str, known: list[str]) -> str | None:
    """Say which setting was meant by a name that is none, where one is near."""
    distances = {each: _distance(name, each) for each in known}
    nearest = min(distances, key=lambda each: distances[each])
    if distances[nearest] > max(1, (min(len(name), len(nearest)) - len("CHAT_")) // 4):
        return None
    return f"There is no setting {name}. {nearest} was meant, it seems: rename it, or unset it."


def _distance(one: str, other: str) -> int:
    """Count the slips of the hand between two names; underscores and the order of words do not count."""
    plain = _edits(one.replace("_", ""), other.replace("_", ""))
    return min(plain, _edits("".join(sorted(one.split("_"))), "".join(sorted(other.split("_")))))


def _edits(one: str, other: str) -> int:
    """Count the letters to add, drop, change or swap with their neighbour (difflib is too coarse)."""
    rows = [list(range(len(other) + 1))]
    for i, mine in enumerate(one):
        row = [i + 1]
        for j, theirs in enumerate(other):
            row.append(min(rows[-1][j + 1] + 1, row[j] + 1, rows[-1][j] + (mine != theirs)))
            if i and j and mine == other[j - 1] and one[i - 1] == theirs:
                row[-1] = min(row[-1], rows[-2][j - 1] + 1)
        rows.append(row)
    return rows[-1][-1]
