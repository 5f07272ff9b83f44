"""Reads and checks the values of single settings: lists, names, addresses, rates, sizes, files.

Each function takes a value, and returns the value as the settings keep it. Each raises ValueError with a
whole sentence, before which the name of the variable is printed.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from service.settings.checks import ASYMMETRIC, host_name


def words(value: Any) -> Any:
    """Split a text at its commas, or read it as JSON if it begins as a JSON list."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value, "list")
    return [each.strip() for each in value.split(",")]


def numbers_by_name(value: Any) -> Any:
    """Split a text such as `a=1,b=2`, or read it as JSON if it begins as a JSON object."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _json(value, "object")
    pairs = [each.rpartition("=") for each in value.split(",")]
    if not all(name.strip() and number.strip() for name, _, number in pairs):
        raise ValueError("Write each name with its number, as in `acme=30,globex=365`, or a JSON object.")
    return {name.strip(): number.strip() for name, _, number in pairs}


def _json(text: str, kind: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"This begins as a JSON {kind}, and is not valid JSON ({error}).") from error


def require_file(path: Path) -> Path:
    """Require a file that can be read. A pipe is none, because the file is read more than once."""
    if not path.is_file():
        raise ValueError(
            f"{path} is a directory, or no file." if path.exists() else f"{path} does not exist."
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    return path


def require_host_names(value: str | None) -> str | None:
    """Require host names separated by commas."""
    for each in value.split(",") if value is not None else ():
        if host_name(each) is None:
            raise ValueError(f"{each.strip()!r} is no name or address of a host, as `Host` has it.")
    return value


def require_proxies(value: str | None) -> str | None:
    """Require addresses or networks separated by commas, or `*` for every proxy."""
    for each in value.split(",") if value not in {None, "*"} and value is not None else ():
        try:
            ipaddress.ip_network(each.strip())
        except ValueError as error:
            raise ValueError(
                f"{each.strip()!r} is no address or network of a proxy. Write for example "
                "`10.0.0.7,10.1.0.0/16`, or `*` if only proxies reach the service."
            ) from error
    return value


def require_origins(value: Sequence[str]) -> tuple[str, ...]:
    """Require origins as browsers send them: a scheme, a host and perhaps a port, in small letters."""
    value = [each.removesuffix("/") for each in value]
    for each in value:
        if each != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s,]+", each.lower()):
            raise ValueError(
                f"{each!r} is no origin. Write the scheme, the host and the port without a path, as in "
                "`http://localhost:3000`."
            )
    return tuple(each.lower() for each in value)


def require_asymmetric(value: Sequence[str]) -> tuple[str, ...]:
    """Require the names of asymmetric algorithms; see `ASYMMETRIC`."""
    if not value or not set(value) <= ASYMMETRIC:
        raise ValueError(f"Write one or more of {', '.join(sorted(ASYMMETRIC))}.")
    return tuple(value)


def require_http_url(value: str | None) -> str | None:
    """Require a URL with a host."""
    if value is not None:
        try:
            parts = urlsplit(value)
            is_one = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_one = False
        if not is_one:
            raise ValueError("This must be a URL with a host that begins with https:// or http://.")
    return value


def require_mongodb_url(value: SecretStr | None) -> SecretStr | None:
    """Require a text that begins as a URL of MongoDB. The driver checks the rest."""
    if value is not None and not value.get_secret_value().startswith(("mongodb://", "mongodb+srv://")):
        raise ValueError("This must begin with mongodb:// or mongodb+srv://.")
    return value


def require_rate(value: str) -> str:
    """Require one or more rates."""
    from limits import parse_many  # noqa: PLC0415  (slow to import, and seldom needed)

    try:
        parse_many(value)
    except ValueError as error:
        raise ValueError(f"{value!r} is no rate. Write for example `600/minute`.") from error
    return value


def require_database_name(value: str) -> str:
    """Require a name that is short enough for MongoDB with every index of the service."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,38}", value):
        raise ValueError(f"{value!r} is no name for a database: 1 to 38 letters, digits, `_` and `-`.")
    return value


def require_cache_size(value: str) -> str:
    """Require a size that the embedded engine understands."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}[MG]", value):
        raise ValueError(f"{value!r} is no size. Write for example `512M` or `1G`.")
    return value
