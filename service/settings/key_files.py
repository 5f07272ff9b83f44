"""Says why the keys and certificates that settings name cannot be used, before anything starts."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.settings.variables import Settings


def fault_of_tls(settings: Settings) -> str | None:
    """Say why the service cannot speak HTTPS with its certificate and key."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    password = settings.tls_key_password.get_secret_value() if settings.tls_key_password else ""
    why = _why_no_chain(settings.tls_cert, settings.tls_key, password)
    return why and (
        f"CHAT_TLS_CERT and CHAT_TLS_KEY cannot be used ({why}). Name the PEM files of a certificate and of "
        "its private key, and set CHAT_TLS_KEY_PASSWORD if the key has a password."
    )


def faults_of_mongodb_tls(settings: Settings) -> Iterator[str]:
    """Say why the driver cannot use the certificates for its connections to MongoDB."""
    if settings.mongodb_tls_ca is not None:
        try:
            ssl.create_default_context(cafile=settings.mongodb_tls_ca)
        except ssl.SSLError as error:
            yield (
                f"CHAT_MONGODB_TLS_CA cannot be used ({_why(error)}). Name the PEM file of the authority "
                "that signed MongoDB's certificate."
            )
    if settings.mongodb_tls_cert is not None and "keyfilepassword" not in settings.url.lower():
        why = _why_no_chain(settings.mongodb_tls_cert, None, "")
        if why is not None:
            yield (
                f"CHAT_MONGODB_TLS_CERT cannot be used ({why}). Name a PEM file with the service's "
                "certificate and its private key."
            )


def _why_no_chain(certificate: Path, key: Path | None, password: str) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A function, because without one OpenSSL asks for a missing password in the terminal.
        context.load_cert_chain(certificate, key, lambda: password)
    except (ssl.SSLError, ValueError) as error:
        return _why(error)
    return None


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None) or "the file is no such PEM, or its password is wrong"
    return str(reason).lower().replace("_", " ")


def fault_of_public_key(settings: Settings) -> str | None:
    """Say why tokens cannot be verified with a public key."""
    if "jwt" not in settings.auth or settings.jwt_secret is not None:
        return None
    if find_spec("cryptography") is None:
        return (
            "CHAT_JWT_JWKS_URL and CHAT_JWT_PUBLIC_KEY need the extra `jwt`. In a clone of the repository: "
            "pip install '.[jwt]'. Or set CHAT_JWT_SECRET, which needs no extra."
        )
    if settings.jwt_public_key is None:
        return None
    try:
        pem = public_key(settings.jwt_public_key)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        return (
            f"CHAT_JWT_PUBLIC_KEY names a file that cannot be read ({why}). Name a PEM file, or set the PEM "
            "itself."
        )
    if not any(_is_key_for(algorithm, pem) for algorithm in settings.jwt_algorithms):
        return (
            "CHAT_JWT_PUBLIC_KEY is no public key (PEM) for any of CHAT_JWT_ALGORITHMS "
            f"({', '.join(settings.jwt_algorithms)})."
        )
    return None


def public_key(text: str) -> str:
    """Return a PEM from the setting itself, or from the file that the setting names."""
    return text if text.lstrip().startswith("-----BEGIN") else Path(text).read_text()


def _is_key_for(algorithm: str, pem: str) -> bool:
    """Tell whether this is a public key for the algorithm; PyJWT also takes the private key."""
    import jwt  # noqa: PLC0415  (slow to import, and seldom needed)

    try:
        key = jwt.get_algorithm_by_name(algorithm).prepare_key(pem)
    except (jwt.PyJWTError, ValueError, TypeError):
        return False
    return not hasattr(key, "private_bytes")
