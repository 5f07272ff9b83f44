"""Builds both wheels, installs each in an environment of its own, and asks the one with the other.

`make wheels` runs it. It takes the versions of constraints.txt, and uv where uv is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ASK = """
import sys
import httpx
from chat_history_client import ChatHistoryClient
with ChatHistoryClient(sys.argv[1]) as history:
    conversation = history.get_or_create_conversation("ben", "pier")
    history.add_messages(conversation["id"], [{"role": "user", "content": "High tide?"}])
    assert [each["content"] for each in history.stream_chat_history("pier")] == ["High tide?"]
page = httpx.get(f"{sys.argv[1]}/console/conversation", params={"id": "pier"})
assert "High tide?" in page.text, page.text
assert httpx.get(f"{sys.argv[1]}/console/console.css").status_code == 200
"""


def run(*command: str | Path) -> None:
    """Run a command, and end with its output if it fails."""
    subprocess.run([str(each) for each in command], check=True, cwd=ROOT)


def install(environment: Path, *wanted: str) -> Path:
    """Make an environment, install wheels in it, and return its programs."""
    uv, python = shutil.which("uv"), environment / "bin" / "python"
    if uv is not None:
        run(uv, "venv", "--quiet", "--python", sys.executable, environment)
        run(uv, "pip", "install", "--quiet", "--python", python, "-c", "constraints.txt", *wanted)
    else:
        run(sys.executable, "-m", "venv", environment)
        quiet = ("--quiet", "--disable-pip-version-check")
        run(python, "-m", "pip", "install", *quiet, "-c", "constraints.txt", *wanted)
    return python.parent


def address(output: Path, process: subprocess.Popen[bytes]) -> str:
    """Return the address that the service says when it listens."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        for line in output.read_text().splitlines():
            if line.startswith("  API"):
                return line.split()[1]
        time.sleep(0.1)
    sys.exit(f"The service from the wheel did not start:\n{output.read_text()}")


def main(directory: Path) -> None:
    """Do it all in a directory."""
    wheels = directory / "wheels"
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*build, "--wheel-dir", wheels, ".", "clients/python")
    (service,) = wheels.glob("chat_history_database-*.whl")
    (client,) = wheels.glob("chat_history_client-*.whl")
    server = install(directory / "server", f"{service}[embedded]")
    caller = install(directory / "caller", str(client))
    settings = {name: value for name, value in os.environ.items() if not name.startswith("CHAT_")}
    settings |= {"CHAT_PORT": "0", "CHAT_EMBEDDED_PORT": "27118"}
    output = directory / "service.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [str(server / "chat-history"), "serve"], cwd=directory, env=settings, stdout=log, stderr=log
        )
    try:
        run(caller / "python", "-I", "-c", ASK, address(output, process))
    finally:
        process.terminate()
        code = process.wait(30)
    if code != 0:
        sys.exit(f"The service from the wheel ended with {code}:\n{output.read_text()}")
    sys.stdout.write(f"{service.name} and {client.name}: installed, started, asked and stopped\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
