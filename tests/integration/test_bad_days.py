"""The disk is full; clients that say nothing, drip, or never read; a service that is told to stop."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.harness import Service, append, create, new_id, running, whole_history

MEGABYTE = 1_000_000
HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"


def test_when_the_disk_fills_appends_are_507_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    # The disk is "full" 40 MB from now, which is what a small disk would be.
    reserve = shutil.disk_usage(tmp_path).free - 40 * MEGABYTE
    with running(tmp_path, disk_reserve_bytes=reserve) as service:
        with service.client() as client:
            conversation = create(client)
            path = f"/conversations/{conversation}/messages"
            stored = []
            for number in range(200):
                response = client.post(path, json={"role": "user", "content": f"{number}" + "x" * MEGABYTE})
                if response.status_code != 201:
                    break
                stored.append(response.json())
            assert response.status_code == 507
            assert response.json()["type"].endswith("storage-full")
            assert stored
            assert client.post("/conversations", json={"user_id": "ada"}).status_code == 507
            assert client.patch(f"/conversations/{conversation}", json={"title": "x"}).status_code == 507
            assert whole_history(client, conversation) == stored
        service.kill()
        service.start()
        with service.client() as client:
            assert whole_history(client, conversation) == stored
            # What makes room still works.
            assert client.delete(path).status_code == 204
            assert client.delete(f"/conversations/{conversation}").status_code == 204


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = {"header_timeout_ms": 3_000, "body_timeout_ms": 3_000, "send_timeout_ms": 3_000}
    with running(tmp_path_factory.mktemp("impatient"), **limits) as service:
        yield service


def connect(service: Service, request: str = "") -> socket.socket:
    opened = socket.create_connection(("127.0.0.1", service.port), 10)
    opened.sendall(request.encode())
    return opened


def resident_bytes(pid: int) -> int:
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(said.stdout) * 1024


def assert_others_are_served(client: httpx.Client) -> None:
    conversation = create(client, new_id())
    assert append(client, conversation, {"role": "user", "content": "x"})[0]["seq"] == 1
    assert len(whole_history(client, conversation)) == 1


def ends(connection: socket.socket, within_s: float) -> bool:
    connection.settimeout(within_s)
    try:
        while connection.recv(1 << 20):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_500_silent_connections_disturb_nobody_and_are_ended(impatient: Service) -> None:
    assert impatient.process is not None
    with impatient.client() as client:
        assert_others_are_served(client)
        before = resident_bytes(impatient.process.pid)
        silent = [connect(impatient) for _ in range(500)]
        assert_others_are_served(client)
        grown = resident_bytes(impatient.process.pid) - before
        assert all(ends(each, 10) for each in silent)
        for each in silent:
            each.close()
        assert_others_are_served(client)
    assert grown < 30 * MEGABYTE, grown


def test_a_client_that_sends_a_byte_a_second_disturbs_nobody_and_is_ended(impatient: Service) -> None:
    head = f"POST /conversations HTTP/1.1\r\n{HEAD}Content-Length: 100\r\n\r\n"
    in_headers, in_body = connect(impatient, "GET /hea"), connect(impatient, head)
    deadline = time.monotonic() + 12
    open_ones = {in_headers, in_body}
    with impatient.client() as client:
        while open_ones and time.monotonic() < deadline:
            open_ones -= {each for each in open_ones if _drips_in_vain(each)}
            assert_others_are_served(client)
    for each in (in_headers, in_body):
        each.close()
    assert not open_ones


def _drips_in_vain(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"x")
        return ends(connection, 0.3)
    except OSError:
        return True


def test_a_client_that_never_reads_its_stream_disturbs_nobody_and_is_ended(impatient: Service) -> None:
    assert impatient.process is not None
    with impatient.client() as client:
        conversation = create(client, new_id())
        for _ in range(20):
            append(client, conversation, *({"role": "user", "content": "x" * 100_000} for _ in range(20)))
        assert len(whole_history(client, conversation, limit=50)) == 400
        before = resident_bytes(impatient.process.pid)
        path = f"/conversations/{conversation}/messages"
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\n\r\n"
        deaf = [connect(impatient, head) for _ in range(10)]
        time.sleep(1.5)
        assert_others_are_served(client)
        grown = resident_bytes(impatient.process.pid) - before
        time.sleep(4)
        # They were ended in the middle: what is left is what the kernel had taken.
        received = [b"".join(iter(partial(_received, each), b"")) for each in deaf]
        assert all(not each.endswith(b"0\r\n\r\n") for each in received)
        assert max(map(len, received)) < 40 * MEGABYTE
        for each in deaf:
            each.close()
    # Ten times 40 MB wait to be read; what is held for each is a part, and what the transport buffers.
    assert grown < 10 * 8 * MEGABYTE, grown


def _received(connection: socket.socket) -> bytes:
    connection.settimeout(10)
    try:
        return connection.recv(1 << 20)
    except ConnectionResetError:
        return b""


def test_beyond_the_limit_of_connections_the_answer_is_503(tmp_path: Path) -> None:
    with running(tmp_path, connections_max=20) as service:
        crowd = [connect(service) for _ in range(25)]
        response = httpx.get(service.url + "/health/live")
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["type"].endswith("overloaded")
        assert response.headers["retry-after"]
        for each in crowd:
            each.close()
        service.wait_until("/health/live")


def test_when_told_to_stop_what_is_in_flight_is_answered_and_what_is_new_is_refused(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        with service.client() as client:
            conversation = create(client)
        body = {"messages": [{"role": "user", "content": "x" * 20_000}] * 800}
        answers: list[httpx.Response] = []
        path = f"{service.url}/conversations/{conversation}/messages"
        content, begun = json.dumps(body).encode(), threading.Event()

        def pieces() -> Iterator[bytes]:
            for at in range(0, len(content), 65_536):
                if at > 4 * 1024 * 1024:
                    begun.set()  # more than any buffer between us holds, so the service has begun to read
                yield content[at : at + 65_536]

        def post() -> None:
            headers = {"Content-Type": "application/json"}
            answers.append(httpx.post(path, content=pieces(), headers=headers, timeout=30))

        thread = threading.Thread(target=post)
        thread.start()
        assert begun.wait(30)
        assert service.process is not None
        began = time.monotonic()
        service.process.terminate()
        refused = False
        while service.process.poll() is None:
            try:
                httpx.get(service.url + "/health/live", timeout=5, verify=False)
            except httpx.TransportError:
                refused = True
            time.sleep(0.02)
        thread.join()
        assert service.process.wait(20) == 0
        assert time.monotonic() - began < 20
        assert [each.status_code for each in answers] == [201]
        assert refused
        service.start()
        with service.client() as client:
            assert len(whole_history(client, conversation)) == 800
