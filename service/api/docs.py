"""The page of the API for people, where no authentication is on: Swagger UI, in one fixed version.

No maintained package brings its files without bringing a web framework too, so the browser fetches them;
it takes them only if their digests are the ones that stand here.
"""

from __future__ import annotations

import base64
import hashlib

from starlette.responses import HTMLResponse

# `npm pack swagger-ui-dist@5.35.0`, then `openssl dgst -sha384 -binary FILE | base64` of both files.
_FROM = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0"
_JS = "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"
_CSS = "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"
_START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true})'
_START_DIGEST = base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()
_PAGE = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Chat History Database</title>
<link rel="stylesheet" href="{_FROM}/swagger-ui.css" integrity="{_CSS}" crossorigin="anonymous">
<div id="swagger-ui">The page needs the script of Swagger UI; /openapi.json says the same.</div>
<script src="{_FROM}/swagger-ui-bundle.js" integrity="{_JS}" crossorigin="anonymous"></script>
<script>{_START}</script>
</html>
"""
_POLICY = (
    f"default-src 'none'; script-src {_FROM}/swagger-ui-bundle.js 'sha256-{_START_DIGEST}'; "
    f"style-src {_FROM}/swagger-ui.css 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page() -> HTMLResponse:
    """Return the page, which may load and call nothing else than what it needs."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})
