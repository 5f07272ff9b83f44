"""The route of metrics: for the holder of its token, or, where there is none, for this machine only."""

from __future__ import annotations

import hmac

from fastapi import APIRouter, Request
from starlette.responses import Response

from service import metrics
from service.errors import Unauthenticated
from service.settings import Settings

router = APIRouter(tags=["metrics"], include_in_schema=False)
_LOCAL = frozenset({"127.0.0.1", "::1"})
# A proxy on this machine has an address of this machine, and says so with one of these.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


@router.get("/metrics")
async def expose(request: Request) -> Response:
    """Return every metric in Prometheus's text format."""
    settings: Settings = request.app.state.settings
    if not _allowed(request, settings):
        raise Unauthenticated("Metrics are for the holder of their token, or for this machine.")
    return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _allowed(request: Request, settings: Settings) -> bool:
    if settings.metrics_token is None:
        local = request.client is not None and request.client.host in _LOCAL
        return local and not any(name in request.headers for name in _FORWARDED)
    expected = f"Bearer {settings.metrics_token.get_secret_value()}".encode()
    given = request.headers.get("authorization", "").encode("latin-1")
    return hmac.compare_digest(given, expected)
