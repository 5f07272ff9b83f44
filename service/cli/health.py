"""The command `chat-history health`: asks the service on this machine whether it is ready."""

from __future__ import annotations

import http.client
import ssl

from service.cli.context import fail, read_settings
from service.settings import Settings

_TIMEOUT_S = 4


def health() -> None:
    """Ask the service that has these settings whether it is ready. Exit code 0: it is. 1: it is not."""
    settings = read_settings()
    if settings.port == 0:
        fail("With CHAT_PORT=0 the port of the service is not known. Name a port.")
    connection = _connection(settings)
    try:
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        text = str(answer.read(), "utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        fail(f"The service does not answer on port {settings.port} ({error}).")
    finally:
        connection.close()
    print(text)
    if answer.status != 200:
        fail(f"The service is not ready (status {answer.status}).")


def _connection(settings: Settings) -> http.client.HTTPConnection:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    if settings.tls_cert is None:
        return http.client.HTTPConnection(host, settings.port, timeout=_TIMEOUT_S)
    # The certificate is for the name under which others call, and this only asks for the state.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(host, settings.port, timeout=_TIMEOUT_S, context=context)
