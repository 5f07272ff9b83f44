"""Asks the service with OpenAI's client for JavaScript, and makes types of the API's description.

Both are programs of npm, which are fetched into `.compat`, at the versions here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import httpx

from tests.proxy import Proxy

HERE = Path(__file__).parent
PACKAGES = ("openai@7.59.0", "openapi-typescript@7.13.0", "typescript@5.9.3")
# Uses the types, so that the compiler reads all of them.
_USE = """import type { paths } from "./types";
type Made = paths["/conversations"]["post"]["responses"][201]["content"]["application/json"];
export const made: Made["id"] = "tides";
"""


def run(url: str, fetched: Path) -> bool:
    """Fetch the programs, and run both; return whether all went well."""
    if shutil.which("npm") is None:
        print("javascript: npm is missing. Install Node.js 20 or later.")
        return False
    folder = fetched / "javascript"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
    _call(folder, "npm", "install", "--silent", "--no-audit", "--no-fund", "--save-exact", *PACKAGES)
    return _makes_types(folder) and _keeps_its_key(folder, url)


def _makes_types(folder: Path) -> bool:
    description = HERE.parents[1] / "docs" / "openapi.json"
    _call(folder, "npx", "openapi-typescript", str(description), "--output", "types.ts")
    (folder / "use.ts").write_text(_USE)
    _call(folder, "npx", "tsc", "--noEmit", "--strict", "use.ts")
    print(f"openapi-typescript: {len((folder / 'types.ts').read_text().splitlines())} lines of types compile")
    return True


def _keeps_its_key(folder: Path, url: str) -> bool:
    """Lose the answer to an append of OpenAI's client, and see that its item is stored once."""
    shutil.copy(HERE / "javascript.mjs", folder)
    proxy = Proxy(httpx.URL(url).port or 80).start()
    lost = proxy.cut(b"/items HTTP/1.1", before=False)
    try:
        conversation = _call(folder, "node", "javascript.mjs", url=f"http://127.0.0.1:{proxy.port}/v1")
    finally:
        proxy.stop()
    stored = httpx.get(f"{url}/conversations/{conversation}").json()
    passed = (lost.done, stored["message_count"], stored["user_id"]) == (1, 1, "ada")
    print(f"openai for JavaScript: {'passed' if passed else f'failed: {stored}, {lost.done} answers lost'}")
    return passed


def _call(folder: Path, *command: str, url: str = "") -> str:
    environment = os.environ | {"TEST_API_BASE_URL": url}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ended.stdout[-5_000:]}{ended.stderr[-5_000:]}")
    return ended.stdout.strip()
