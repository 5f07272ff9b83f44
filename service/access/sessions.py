"""Signs the cookie of a person's browser, and makes the tokens of the console's forms.

- A cookie names the caller and has no secret: the id of an API key, or the user, the tenant and the end of a
  token. It is signed with the secret of the deployment, so any process can check it, and nothing about it is
  stored.
- A key is looked up at each request, and a token's end is compared, so a session ends with its key or token
  (tests/integration/test_console.py), and after SESSION_S at the latest.
- Signing out removes the cookie from the browser. A stolen copy works until the session ends.
- A form has a token that only the holder of the cookie was given, so no other page can send the form.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Any

from itsdangerous import BadSignature, URLSafeTimedSerializer

SESSION_S = 12 * 60 * 60


class Sessions:
    """The cookies and the form tokens of one deployment."""

    def __init__(self, secret: bytes) -> None:
        self._secret = hmac.digest(secret, b"console", "sha256")
        self._cookies = URLSafeTimedSerializer(
            self._secret, salt="session", signer_kwargs={"key_derivation": "hmac", "digest_method": "sha256"}
        )
        # Browsers share cookies between the ports of a host, so each deployment has a name of its own.
        self._name = f"chat_history_{self._mac('cookie name')[:8]}"

    def cookie_name(self, *, secure: bool) -> str:
        """Return the name of the cookie; under TLS no other host can set a cookie of this name."""
        return f"__Host-{self._name}" if secure else self._name

    def sign(self, caller: dict[str, Any] | None) -> str:
        """Return the value of a new cookie of this caller, or of nobody."""
        return str(self._cookies.dumps({"caller": caller, "nonce": secrets.token_urlsafe(12)}))

    def is_valid(self, value: str | None) -> bool:
        """Tell whether a cookie is of this deployment, and not too old."""
        return value is not None and self._read(value) is not None

    def caller(self, value: str | None) -> dict[str, Any] | None:
        """Return the caller that a cookie names, or None where nobody has signed in."""
        session = self._read(value) if value is not None else None
        return None if session is None else session["caller"]

    def form_token(self, value: str) -> str:
        """Return the token of the forms that belong to this cookie."""
        return self._mac(f"form {value}")

    def is_form_token(self, token: str, value: str) -> bool:
        """Tell whether a form with this token was made for the holder of this cookie."""
        return hmac.compare_digest(self.form_token(value).encode(), token.encode("utf-8", "replace"))

    def proof(self, api_key: str) -> str:
        """Return what shows that a session is of this `CHAT_API_KEY`, which has no id."""
        return self._mac(f"key {api_key}")[:32]

    def _read(self, value: str) -> dict[str, Any] | None:
        try:
            session: dict[str, Any] = self._cookies.loads(value, max_age=SESSION_S)
        except BadSignature:
            return None
        return session

    def _mac(self, text: str) -> str:
        return hmac.new(self._secret, text.encode("utf-8", "surrogateescape"), "sha256").hexdigest()
