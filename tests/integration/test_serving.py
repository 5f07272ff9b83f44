"""What `chat-history serve` says when it starts, and which addresses it listens on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import Service, append, command, create, running


def said(service: Service, until: str = "  shell", timeout_s: float = 60) -> list[str]:
    """The lines of the banner of a service that has started, which ends with the shell's line."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        lines = service.output().splitlines()
        if any(line.startswith(until) for line in lines):
            start = next(n for n, line in enumerate(lines) if line.startswith("Chat History Database"))
            end = next(n for n, line in enumerate(lines) if line.startswith(until))
            return [line for line in lines[start : end + 1] if not line.startswith("{")]
        assert service.process is not None
        assert service.process.poll() is None, service.output()
        time.sleep(0.05)
    raise AssertionError(service.output())


def url_of(banner: list[str]) -> str:
    return next(line.split()[1] for line in banner if line.startswith("  API"))


@pytest.mark.parametrize("options", [{}, {"workers": 2, "host": "localhost"}])
def test_the_banner_names_the_address_that_answers_and_what_is_stored(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with running(tmp_path) as service, service.client() as client:
        # The banner counts when it is written, which may be after the first request.
        assert "(0 conversations, 0 messages, " in "".join(said(service))
        append(client, create(client), {"role": "user"}, {"role": "user"})
    service = Service(tmp_path, **options)
    service.port = 0
    service.log.unlink(missing_ok=True)
    service.start(wait=False)
    try:
        banner = said(service)
        answered = httpx.get(f"{url_of(banner)}/health/ready", timeout=30)
        assert answered.status_code == 200
        assert banner[0].startswith(f"Chat History Database {version('chat-history-database')}")
        assert banner[1] == f"  API    http://{options.get('host', '127.0.0.1')}:{answered.url.port}"
        assert banner[2] == f"  pages  {url_of(banner)}/console/"
        assert httpx.get(banner[2].split()[1], timeout=30).status_code == 200
        assert banner[3] == f"  docs   {url_of(banner)}/docs"
        found = re.fullmatch(
            r"  data   (.*) \(1 conversations?, 2 messages, [\d,]+\.\d MB on disk\)", banner[4]
        )
        assert found
        assert Path(found[1]) == service.data
        assert re.fullmatch(r'  shell  mongosh "\$\(.* mongo-url\)"', banner[-1])
        # The line for the shell is a command as it stands.
        inner = banner[-1].partition("$(")[2].removesuffix(')"')
        url = subprocess.run(
            ["bash", "-c", inner],
            env=service.environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        assert url.startswith("mongodb://chat-history:")
        assert service.output().count("Chat History Database") == 1
    finally:
        service.stop()
    assert service.engine_is_gone()


def failing(service: Service, *arguments: str) -> str:
    done = command(service, "serve", *arguments)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not (service.data / "engine").exists(), "the engine had been started"
    return done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_that_is_taken_is_named_with_its_setting(tmp_path: Path, workers: int) -> None:
    service = Service(tmp_path, workers=workers)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", service.port))
        taken.listen()
        assert f"127.0.0.1:{service.port} is taken" in (answer := failing(service))
    assert "CHAT_PORT" in answer
    assert answer.endswith(".\n")


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("192.0.2.1", "192.0.2.1:{port} is no address of this machine"),
        ("2001:db8::1", "[2001:db8::1]:{port}"),
        ("no-such-host.invalid", "'no-such-host.invalid' has no address"),
    ],
)
def test_a_host_that_is_not_this_machine_is_named_with_its_setting(
    tmp_path: Path, host: str, says: str
) -> None:
    service = Service(tmp_path, host=host, insecure=True)
    answer = failing(service)
    assert says.format(port=service.port) in answer
    assert "CHAT_HOST" in answer


def test_a_service_on_localhost_answers_on_each_of_its_addresses(tmp_path: Path) -> None:
    with running(tmp_path, host="localhost") as service:
        found = socket.getaddrinfo("localhost", service.port, type=socket.SOCK_STREAM)
        for address in {str(each[4][0]) for each in found if is_of_this_machine(each[0], str(each[4][0]))}:
            host = f"[{address}]" if ":" in address else address
            assert httpx.get(f"http://{host}:{service.port}/health/live").status_code == 200


def is_of_this_machine(family: int, address: str) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:  # a machine without IPv6
            return False
    return True


def test_nothing_is_announced_while_the_application_does_not_start(tmp_path: Path) -> None:
    service = Service(tmp_path, mongodb_url="mongodb://127.0.0.1:1/?noSuchOption=1")
    done = command(service, "serve")
    assert done.returncode == 3
    assert done.stdout == ""
    assert "CHAT_MONGODB_URL" in done.stderr
    assert "Traceback" not in done.stderr


def requests(service: Service) -> Iterator[dict[str, Any]]:
    for line in service.output().splitlines():
        if line.startswith("{") and (event := json.loads(line)).get("event") == "request":
            yield event


def test_a_health_check_is_logged_only_where_it_fails_or_debug_is_asked_for(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        started = len(list(requests(service)))  # on a busy machine it was asked before it was ready
        for path in ("/health/live", "/health/ready", "/health/nothing", "/conversations?user_id=a"):
            client.get(path)
        assert {each["route"] for each in [*requests(service)][started:]} == {"(none)", "/conversations"}
        os.kill(service.engine_pid(), signal.SIGSTOP)
        try:
            service.wait_until("/health/ready", status=503)
        finally:
            os.kill(service.engine_pid(), signal.SIGCONT)
        statuses = [each["status"] for each in requests(service) if each["route"] == "/health/ready"]
        assert set(statuses) == {503}
    service.log.unlink()
    (tmp_path / "debug").mkdir()
    with running(tmp_path / "debug", log_level="debug") as service:
        assert "/health/ready" in {each["route"] for each in requests(service)}


def test_the_version_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "--version"], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == f"chat-history {version('chat-history-database')}\n"


def test_a_list_of_keys_has_a_header_and_tabs(tmp_path: Path) -> None:
    service = Service(tmp_path, auth="key")
    header = ["id", "name", "scopes", "tenant", "events"]
    empty = command(service, "keys", "list")
    assert [line.split("\t") for line in empty.stdout.splitlines()] == [header]
    created = command(service, "keys", "create", "agent", "--scope", "read", "--days", "9").stdout
    rows = [line.split("\t") for line in command(service, "keys", "list").stdout.splitlines()]
    assert rows[0] == header
    assert rows[1][:4] == [created.split("_")[1], "agent", "read", "-"]
    assert rows[1][4].startswith("expires ")


def test_the_command_for_a_health_check_tells_a_service_that_is_ready(tmp_path: Path) -> None:
    with running(tmp_path, host="localhost") as service:
        ready = command(service, "health")
        assert (ready.returncode, json.loads(ready.stdout)["status"]) == (0, "ready"), ready
        os.kill(service.engine_pid(), signal.SIGSTOP)
        try:
            away = command(service, "health")
        finally:
            os.kill(service.engine_pid(), signal.SIGCONT)
        assert (away.returncode, "not ready (status 503)" in away.stderr) == (1, True)
    stopped = command(service, "health")
    assert (stopped.returncode, "does not answer on port" in stopped.stderr) == (1, True)
