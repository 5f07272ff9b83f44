"""The embedded engine as a supervised child: found, locked, restarted, never orphaned."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from pymongo import MongoClient

from tests.harness import (
    Service,
    append,
    children,
    create,
    free_port,
    new_id,
    on_database,
    running,
    whole_history,
)


def failing(service: Service) -> str:
    """Start a service that must not start, and return what it says."""
    service.start(wait=False)
    assert service.process is not None
    assert service.process.wait(40) == 1
    return service.output()


def test_the_url_for_mongosh_is_printed_at_start_and_by_mongo_url(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "mongo-url"]
    with running(tmp_path) as service:
        assert f"mongosh '{service.database_url}'" in service.output()
        with MongoClient[dict[str, object]](service.database_url) as operator:
            assert operator.get_default_database().list_collection_names()
        said = subprocess.run(
            command, env=service.environment(), cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert said.stdout.strip() == service.database_url


def test_the_engine_syncs_at_every_commit_and_listens_on_loopback_only(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        command = ["ps", "-ww", "-o", "args=", "-p", str(service.engine_pid())]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "--sync-on-commit" in said
    assert said[said.index("--host") + 1] == "127.0.0.1"


def test_a_data_directory_in_use_is_a_clear_error(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        assert first.process is not None
        said = failing(Service(tmp_path))
        assert f"is in use by process {first.process.pid}" in said
        assert "CHAT_DATA_DIR" in said
        assert "Traceback" not in said
        assert httpx.get(first.url + "/health/ready").status_code == 200


def test_a_port_that_is_taken_is_a_clear_error(tmp_path: Path) -> None:
    service = Service(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", service.embedded_port))
        taken.listen()
        said = failing(service)
    assert f"port {service.embedded_port} is taken" in said
    assert "CHAT_EMBEDDED_PORT" in said
    assert "Traceback" not in said


def test_a_data_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file stands where the directory should be")
    said = failing(Service(tmp_path))
    assert "cannot be written" in said
    assert "Traceback" not in said


def test_a_missing_package_is_a_clear_error(tmp_path: Path) -> None:
    service = Service(tmp_path)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    # As on a machine without the package: nothing to import, no program.
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'secantus' else find(name, *rest)\n"
    )
    environment = service.environment() | {"PYTHONPATH": f"{hidden}:{Path.cwd()}"}
    ended = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert ended.returncode == 1
    assert "pip install 'chat-history-database[embedded]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_engine_is_started_again_when_it_dies_and_nothing_is_lost(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        conversation = create(client)
        before = append(client, conversation, {"role": "user", "content": "before"})
        engine = service.engine_pid()
        os.kill(engine, signal.SIGKILL)
        time.sleep(0.05)
        service.wait_until("/health/ready")
        assert service.engine_pid() != engine
        after = append(client, conversation, {"role": "user", "content": "after"})
        assert whole_history(client, conversation) == before + after
        assert "engine_ended" in service.output()


def test_an_engine_that_cannot_be_started_again_at_once_is_started_later(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        conversation = create(client)
        stored = append(client, conversation, {"role": "user", "content": "before"})
        # What it is started with cannot be written, as on a disk that is full.
        config = service.data / "engine.toml"
        config.unlink()
        config.mkdir()
        os.kill(service.engine_pid(), signal.SIGKILL)
        deadline = time.monotonic() + 30
        while "engine_not_started" not in service.output() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "engine_not_started" in service.output()
        assert client.get(f"/conversations/{conversation}").status_code == 503
        config.rmdir()
        service.wait_until("/health/ready")
        assert whole_history(client, conversation) == stored


def end_by_sigterm(service: Service) -> None:
    assert service.stop() == 0


def end_by_sigint(service: Service) -> None:
    assert service.process is not None
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(30) == 0


def end_by_kill(service: Service) -> None:
    assert service.process is not None
    service.process.kill()
    service.process.wait(10)


def end_by_killing_the_guard_too(service: Service) -> None:
    assert service.process is not None
    (guard,) = children(service.process.pid, "embedded_guard")
    service.process.kill()
    os.kill(guard, signal.SIGKILL)
    service.process.wait(10)


@pytest.mark.parametrize(
    "end",
    [end_by_sigterm, end_by_sigint, end_by_kill, end_by_killing_the_guard_too],
    ids=lambda each: each.__name__,
)
def test_no_orphan_is_left_however_the_service_ends_and_the_directory_is_free(
    tmp_path: Path, end: Any
) -> None:
    with running(tmp_path) as service:
        with service.client() as client:
            conversation = create(client)
            stored = append(client, conversation, {"role": "user", "content": "x"})
        engine = service.engine_pid()
        end(service)
        assert service.engine_is_gone()
        # Free at once, and whole.
        service.start()
        assert service.engine_pid() != engine
        with service.client() as client:
            assert whole_history(client, conversation) == stored


def test_workers_share_one_engine_and_end_with_their_parent(tmp_path: Path) -> None:
    service = Service(tmp_path, workers=2)
    try:
        service.start()
        with service.client() as client:
            conversation = create(client)
            stored = append(client, conversation, {"role": "user", "content": "x"})
            assert whole_history(client, conversation) == stored
        assert service.process is not None
        assert len(children(service.process.pid, "spawn_main")) == 2
        service.process.kill()
        service.process.wait(10)
        assert service.engine_is_gone()
        deadline = time.monotonic() + 20
        while _listens(service.port):
            assert time.monotonic() < deadline, "the workers outlive their parent"
            time.sleep(0.05)
        service.start()
        assert service.stop() == 0
        assert service.engine_is_gone()
    finally:
        service.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_standalone_mongod_is_refused_at_start_with_the_line_that_mends_it(tmp_path: Path) -> None:
    port = free_port()
    program = Path(sys.executable).parent / "secantusd-py"
    command = [
        program,
        "--standalone",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--storage-path",
        ":memory:",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as standalone:
        try:
            while not _listens(port):
                time.sleep(0.05)
            service = Service(tmp_path, mongodb_url=f"mongodb://127.0.0.1:{port}/?directConnection=true")
            service.start(wait=False)
            assert service.process is not None
            assert service.process.wait(40) != 0
        finally:
            standalone.terminate()
    assert "rs.initiate()" in service.output()
    assert "Traceback" not in service.output()


def test_an_index_that_stands_in_another_form_is_said_at_start(service: Service, tmp_path: Path) -> None:
    name = new_id("indexed")
    url = on_database(service.database_url, name)
    with MongoClient[dict[str, object]](service.database_url) as operator:
        key = [("conversation_id", 1), ("seq", 1)]
        operator[name].messages.create_index(key, name="conversation_id_1_seq_1")
        other = Service(tmp_path, mongodb_url=url).start(wait=False)
        assert other.process is not None
        assert other.process.wait(40) != 0
        operator.drop_database(name)
    assert "An index cannot be made" in other.output()
