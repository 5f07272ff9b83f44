"""The limits that no variable changes, and the checks of the settings: names, values, `.env`, each other."""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from service.settings.key_files import fault_of_public_key, fault_of_tls, faults_of_mongodb_tls

if TYPE_CHECKING:
    from service.settings.variables import Settings


# MongoDB's own limit of one document, less the bytes that the service's fields may take: five fields, three
# of which hold keys. The three keys have seven ids, and an id of 1,500 bytes has up to 4,500 bytes in a key.
MESSAGE_BYTES_MAX = 16 * 1024 * 1024 - 32 * 1024
# The largest metadata, as BSON, that a conversation may be given. A list reads the metadata of each
# conversation that it shows, and MongoDB writes the whole document, with its metadata, at each append.
METADATA_BYTES_MAX = 64 * 1024
# The largest summary and metadata of a checkpoint, and how many checkpoints a conversation keeps. Together
# they bound a list of checkpoints, which is one answer.
SUMMARY_BYTES_MAX = 64 * 1024
CHECKPOINT_METADATA_BYTES_MAX = 8 * 1024
CHECKPOINTS_MAX = 100
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
# How many `seq`s one read may span on an engine that reads every document that matches before it applies a
# limit.
WINDOW_SEQS_MAX = 4_096
# The algorithms that a token may be signed with unless CHAT_JWT_SECRET is set. They are asymmetric, because
# whoever can read tokens that are signed with a shared secret can also sign tokens.
ASYMMETRIC = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)


_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{0,5})?", re.ASCII)
_SECRET_OPTIONS = re.compile(
    r"([?&][^=&]*(?:password|token|secret|authmechanismproperties)[^=&]*=)[^&]*", re.IGNORECASE
)


@functools.lru_cache(maxsize=256)
def host_name(authority: str) -> str | None:
    """Return the name in `name:port` in the form in which names are compared, or None if there is no name.

    That form is lower case without a last dot. An IPv6 address stands in brackets, in its shortest form.
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


def without_password(url: str) -> str:
    """Return a URL of MongoDB without its password and without the secrets in its options."""
    scheme, _, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return _SECRET_OPTIONS.sub(r"\1***", f"{scheme}://{user.partition(':')[0]}{at}{host}")


def database_in_url(url: str) -> str | None:
    """Return the name of the database that a URL of MongoDB has in its path, or None."""
    path = url.partition("://")[2].partition("?")[0].rpartition("@")[2].partition("/")[2]
    return unquote(path).partition(".")[0] or None


def require_consistent(settings: Settings) -> None:
    """Raise ValueError if settings contradict each other, or if one has no effect because of another."""
    faults = [*_idle(settings), *_incomplete(settings), *_opposed(settings)]
    # Keys are read only where it is certain that they are meant.
    if faults := faults or [*_unusable_keys(settings)]:
        raise ValueError("\n".join(faults))


def _idle(settings: Settings) -> Iterator[str]:
    """Name each setting that would have no effect, because its user relies on the effect."""
    for pattern, reason, has_effect in _NEEDS:
        given = sorted(each for each in settings.model_fields_set if re.fullmatch(pattern, each))
        if given and not has_effect(settings):
            names = " and ".join(f"CHAT_{each.upper()}" for each in given)
            yield f"{names} would have no effect: {reason}"


def _incomplete(settings: Settings) -> Iterator[str]:
    """Name what is missing beside a setting, without which it would not protect anything."""
    if "jwt" in settings.auth:
        keys = (settings.jwt_jwks_url, settings.jwt_public_key, settings.jwt_secret)
        if sum(each is not None for each in keys) != 1:
            yield (
                f"CHAT_AUTH={settings.auth} needs just one of CHAT_JWT_JWKS_URL, CHAT_JWT_PUBLIC_KEY and "
                "CHAT_JWT_SECRET. Set the one that your issuer of tokens has."
            )
        if settings.jwt_issuer is None or settings.jwt_audience is None:
            yield (
                f"CHAT_AUTH={settings.auth} needs CHAT_JWT_ISSUER and CHAT_JWT_AUDIENCE. Set them to the "
                "`iss` and the `aud` of the tokens."
            )
    if (settings.tls_cert is None) != (settings.tls_key is None):
        yield "CHAT_TLS_CERT and CHAT_TLS_KEY go together. Set both, or unset both."
    if settings.metrics and settings.auth != "none" and settings.metrics_token is None:
        yield (
            "CHAT_METRICS with CHAT_AUTH needs CHAT_METRICS_TOKEN, because a proxy on this machine would "
            "show the metrics to everybody."
        )


def _opposed(settings: Settings) -> Iterator[str]:
    """Name the settings of which only one can hold."""
    given = settings.model_fields_set
    if {"page_items_default", "page_items_max"} <= given and (
        settings.page_items_default > settings.page_items_max
    ):
        yield "CHAT_PAGE_ITEMS_DEFAULT is more than CHAT_PAGE_ITEMS_MAX. Lower the one, or raise the other."
    named = database_in_url(settings.url) if settings.mongodb_url is not None else None
    if "database" in given and named not in {None, settings.database}:
        yield (
            f"CHAT_MONGODB_URL names the database {named!r}, and CHAT_DATABASE names {settings.database!r}. "
            "Remove one of the names."
        )


def _unusable_keys(settings: Settings) -> Iterator[str]:
    """Name the files of keys and certificates that hold something else."""
    faults = fault_of_tls(settings), *faults_of_mongodb_tls(settings), fault_of_public_key(settings)
    yield from filter(None, faults)


# The names of settings (a regular expression), the reason why they would have no effect, and the condition
# under which they have one.
_NEEDS: tuple[tuple[str, str, Callable[[Settings], bool]], ...] = (
    (
        "api_key|key_cache_ms",
        "API keys are not asked for. Set CHAT_AUTH=key (or key+jwt), or unset it.",
        lambda s: "key" in s.auth,
    ),
    (
        "jwt_.*",
        "tokens are not asked for. Set CHAT_AUTH=jwt (or key+jwt), or unset it.",
        lambda s: "jwt" in s.auth,
    ),
    (
        "failures_per_address",
        "nothing is asked for. Set CHAT_AUTH, or unset it.",
        lambda s: s.auth != "none",
    ),
    (
        "jwt_jwks_cache_s|jwt_jwks_retry_s",
        "the issuer is not asked for keys. Set CHAT_JWT_JWKS_URL, or unset it.",
        lambda s: s.jwt_jwks_url is not None,
    ),
    (
        "jwt_algorithms",
        "with CHAT_JWT_SECRET tokens are read with HS256 alone. Unset one of them.",
        lambda s: s.jwt_secret is None,
    ),
    (
        "tls_key_password",
        "there is no key. Set CHAT_TLS_CERT and CHAT_TLS_KEY, or unset it.",
        lambda s: s.tls_key is not None,
    ),
    (
        "mongodb_tls_ca|mongodb_tls_cert",
        "the embedded engine would be used. Set CHAT_MONGODB_URL, or unset it.",
        lambda s: s.mongodb_url is not None,
    ),
    (
        "metrics_token",
        "there are no metrics. Set CHAT_METRICS=true, or unset it.",
        lambda s: s.metrics,
    ),
)


# Variables of the client (clients/python), which are no settings of the service.
_OF_CLIENTS = frozenset({"CHAT_HISTORY_URL", "CHAT_HISTORY_API_KEY"})


def unknown_names(given: Mapping[str, str | None], known: Sequence[str]) -> list[str]:
    """Return the variables that are settings neither of the service nor of its client, sorted."""
    return sorted(given.keys() - {*known, *_OF_CLIENTS})


def faults_of_names(given: Mapping[str, str | None], known: Sequence[str]) -> list[str]:
    """Say what is wrong with the variables: misspelt names, empty values, names that are set twice."""
    faults = [_misspelt(name, known) for name in unknown_names(given, known)]
    faults += [f"{name} is empty. Give it a value, or unset it." for name in known if _empty(given.get(name))]
    faults += [
        f"{name} is set {count} times, in capitals and not. Unset all but one."
        for name, count in Counter(name.upper() for name in os.environ).items()
        if count > 1 and name in known
    ]
    return [fault for fault in faults if fault]


def fault_of_file(file: Path) -> str | None:
    """Say why a `.env` must not be read.

    Whoever can write the file could switch the authentication off, or name another database.
    """
    if sys.platform == "win32":
        return None  # there the rights of a file are not in its mode
    link, target = file.lstat(), file.stat()
    if {link.st_uid, target.st_uid} - {os.geteuid(), 0}:
        return f"{file.absolute()} belongs to another user, so it is not read. Remove it, or make it yours."
    if stat.S_IMODE(target.st_mode) & 0o022:
        return (
            f"Others can write {file.absolute()}, so it is not read. Mend that: chmod go-w {file.absolute()}"
        )
    return None


def _empty(value: str | None) -> bool:
    return value is not None and not value.strip()


def _misspelt(name: str, known: Sequence[str]) -> str | None:
    """Say which setting an unknown name probably means, or return None if no setting has a similar name."""
    distances = {each: spelling_distance(name, each) for each in known}
    nearest = min(distances, key=lambda each: distances[each])
    if distances[nearest] > max(1, (min(len(name), len(nearest)) - len("CHAT_")) // 4):
        return None
    return f"There is no setting {name}. {nearest} was meant, it seems: rename it, or unset it."


def spelling_distance(one: str, other: str) -> int:
    """Count the typing mistakes between two names; underscores and the order of words do not count."""
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
