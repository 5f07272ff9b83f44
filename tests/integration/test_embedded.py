"""The embedded engine as a supervised child: found, locked, restarted, never orphaned."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from service.embedded import data_directory, engine
from service.settings import Settings
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

pytestmark = pytest.mark.embedded_engine("all of it")


def failing(service: Service) -> str:
    """Start a service that must not start, and return what it says."""
    service.start(wait=False)
    assert service.process is not None
    assert service.process.wait(40) == 1
    return service.output()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    """Two services in two directories, one with authentication."""
    directories = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    with (
        running(directories[0], auth="key", api_key="PLANTED-s3cr3t") as first,
        running(directories[1]) as second,
    ):
        yield first, second


def test_the_command_for_mongosh_is_printed_at_start_and_mongo_url_prints_the_url(
    two: tuple[Service, Service],
) -> None:
    _, service = two
    # Named as it was started here.
    service.wait_to_say(f'mongosh "$({sys.executable} -m service mongo-url)"')
    with MongoClient[dict[str, object]](service.database_url) as operator:
        assert operator.get_default_database().list_collection_names()
    assert command(service, "mongo-url", unset=None).stdout.strip() == service.database_url


def test_the_engine_syncs_at_every_commit_and_listens_on_loopback_only(two: tuple[Service, Service]) -> None:
    asked = ["ps", "-ww", "-o", "args=", "-p", str(two[1].engine_pid())]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    assert "--sync-on-commit" in said
    assert said[said.index("--host") + 1] == "127.0.0.1"


def test_a_data_directory_in_use_is_a_clear_error(two: tuple[Service, Service]) -> None:
    _, first = two
    assert first.process is not None
    said = failing(Service(first.directory))
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
    assert "pip install '.[embedded]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_engine_is_started_again_when_it_dies_and_nothing_is_lost(tmp_path: Path) -> None:
    """At once where it can be, and later where it cannot."""
    with running(tmp_path) as service, service.client() as client:
        conversation = create(client)
        stored = append(client, conversation, {"role": "user", "content": "before"})
        engine = service.engine_pid()
        os.kill(engine, signal.SIGKILL)
        time.sleep(0.05)
        service.wait_until("/health/ready")
        assert service.engine_pid() != engine
        stored += append(client, conversation, {"role": "user", "content": "after"})
        assert whole_history(client, conversation) == stored
        assert "engine_ended" in service.output()
        assert "engine_not_started" not in service.output()
        # What it is started with cannot be written, as on a disk that is full.
        config = service.data / "engine.toml"
        config.unlink()
        config.mkdir()
        os.kill(service.engine_pid(), signal.SIGKILL)
        service.wait_to_say("engine_not_started", timeout_s=30)
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
    (guard,) = children(service.process.pid, "embedded/guard.py")
    service.process.kill()
    os.kill(guard, signal.SIGKILL)
    service.process.wait(10)


def test_no_orphan_is_left_however_the_service_ends_and_the_directory_is_free(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        with service.client() as client:
            conversation = create(client)
            stored = append(client, conversation, {"role": "user", "content": "x"})
        for end in (end_by_sigterm, end_by_sigint, end_by_kill, end_by_killing_the_guard_too):
            engine = service.engine_pid()
            end(service)
            assert service.engine_is_gone(), end.__name__
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
        str(program),
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
    assert "The index messages.conversation_id_1_seq_1 cannot be made" in other.output()


# -- each directory has its own engine -------------------------------------------------------------------


def command(
    service: Service, *arguments: str, unset: str | None = "CHAT_EMBEDDED_PORT", **changed: str
) -> subprocess.CompletedProcess[str]:
    """A command in the directory of a service, as its user types it there: told of no port."""
    environment = {k: v for k, v in (service.environment() | changed).items() if k != unset}
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env=environment,
        cwd=service.directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


EXPORT = """{"type":"export","version":1,"user_id":"ada","created_at":"2026-01-01T00:00:00.000Z"}
{"type":"conversation","id":"ID","user_id":"ada","title":null,"metadata":{},\
"created_at":"2026-01-01T00:00:00.000Z","updated_at":"2026-01-01T00:00:00.000Z","last_seq":1,"message_count":1}
{"type":"message","message":{"id":"m","conversation_id":"ID","user_id":"ada","seq":1,\
"created_at":"2026-01-01T00:00:00.000Z","role":"user","content":"x"}}
{"type":"end","conversations":1,"messages":1}
""".replace("\\\n", "")


def test_a_command_works_on_the_engine_of_its_own_directory_whatever_port_it_is_told(
    two: tuple[Service, Service],
) -> None:
    first, second = two
    (second.directory / "ada.ndjson").write_text(EXPORT.replace("ID", "imported"))
    told = {"CHAT_EMBEDDED_PORT": str(first.embedded_port)}
    done = command(second, "import", "ada.ndjson", unset=None, **told)
    assert done.returncode == 0, done.stderr
    assert f"on the embedded engine of {second.data} (127.0.0.1:{second.embedded_port})" in done.stderr
    with second.client() as client:
        assert len(whole_history(client, "imported")) == 1
    with first.client(headers={"X-API-Key": "PLANTED-s3cr3t"}) as client:
        assert client.get("/conversations/imported").status_code == 404
    for arguments, lines in (
        (["verify"], 1),
        (["keys", "create", "k", "--scope", "read"], 1),
        (["expire"], 1),
        (["keys", "list"], 2),
    ):
        done = command(second, *arguments, unset=None, **told)
        assert done.returncode == 0, done.stderr
        assert f"of {second.data} " in done.stderr
        assert len(done.stdout.splitlines()) == lines
    with MongoClient[dict[str, Any]](first.database_url) as operator:
        assert operator.get_default_database().api_keys.count_documents({}) == 0


def test_the_engine_of_a_directory_is_found_by_any_of_its_names(two: tuple[Service, Service]) -> None:
    _, second = two
    (second.directory / "link").symlink_to(second.data)
    for name in ("data", "./link"):
        done = command(second, "mongo-url", CHAT_DATA_DIR=name)
        assert done.stdout.strip() == second.database_url, done.stderr


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("the first's port", "is not the engine of the data directory"),
        ("the first's password", "is not the engine of the data directory"),
        ("nobody's port", "does not answer"),
        ("no record", "does not record where its engine is"),
        ("no JSON", "does not record where its engine is"),
    ],
)
def test_a_command_refuses_what_may_be_another_engine(
    two: tuple[Service, Service], record: str, says: str
) -> None:
    first, second = two
    file = second.data / "engine.json"
    text = file.read_text()
    ours, theirs = json.loads(text), json.loads((first.data / "engine.json").read_text())
    changed = {
        "the first's port": json.dumps({**ours, "port": theirs["port"]}),
        "the first's password": json.dumps({**ours, "password": theirs["password"]}),
        "nobody's port": json.dumps({**ours, "port": free_port()}),
        "no record": None,
        "no JSON": "{",
    }[record]
    file.unlink()
    if changed is not None:
        file.write_text(changed)
    commands = [["mongo-url"]]
    if record in {"the first's port", "no record"}:  # these take as long as a command is patient
        commands.append(["keys", "create", "k", "--scope", "read"])
    try:
        done = [command(second, *arguments) for arguments in commands]
    finally:
        file.write_text(text)
        file.chmod(0o600)
    for each in done:
        assert (each.returncode, each.stdout) == (1, "")
        assert says in each.stderr
        assert "Traceback" not in each.stderr


def test_a_command_after_kill_9_leaves_the_engine_alone_that_took_the_port(tmp_path: Path) -> None:
    killed, other = Service(tmp_path / "killed"), Service(tmp_path / "other")
    other.embedded_port = killed.embedded_port
    for each in (killed, other):
        each.directory.mkdir()
    try:
        killed.start()
        with killed.client() as client:
            create(client, "mine")
        killed.kill()
        assert killed.engine_is_gone()
        other.start()
        assert command(killed, "mongo-url").returncode == 1
        done = command(killed, "verify")
        assert done.stdout.strip() == "1 conversations, 0 messages, 0 violations, 0 left", done.stderr
        with other.client() as client:
            assert client.get("/conversations/mine").status_code == 404
    finally:
        killed.kill()
        other.stop()


def test_commands_at_once_wait_for_each_other_where_no_service_runs(tmp_path: Path) -> None:
    service = Service(tmp_path)
    environment = service.environment()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "service", "keys", "create", str(n), "--scope", "read"],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    said = [each.communicate(timeout=120) for each in started]
    assert [each.returncode for each in started] == [0, 0, 0], said
    assert any("waits until process" in error for _, error in said)
    assert len(command(service, "keys", "list").stdout.splitlines()) == 1 + 3
    assert command(service, "mongo-url").returncode == 1  # no engine runs


def test_the_url_of_a_mongodb_is_named_without_its_password(two: tuple[Service, Service]) -> None:
    _, second = two
    done = command(second, "mongo-url", CHAT_MONGODB_URL=second.database_url)
    password = json.loads((second.data / "engine.json").read_text())["password"]
    assert done.stdout.strip() == second.database_url
    assert f"mongodb://chat-history@127.0.0.1:{second.embedded_port}/chat_history" in done.stderr
    assert password not in done.stderr
    assert password not in second.output()


# -- nobody else reaches it ------------------------------------------------------------------------------


def test_who_has_not_the_password_cannot_use_the_engine(two: tuple[Service, Service]) -> None:
    calls: list[Any] = [
        lambda to: to.chat_history.conversations.find_one(),
        lambda to: to.chat_history.conversations.delete_many({}),
        lambda to: to.admin.command("createUser", "eve", pwd="x", roles=["root"]),
        lambda to: to.admin.command("getLog", "global"),
        lambda to: to.list_database_names(),
    ]
    for service in two:
        url = f"127.0.0.1:{service.embedded_port}/chat_history?directConnection=true"
        with MongoClient[dict[str, Any]](f"mongodb://{url}") as stranger:
            for call in calls:
                with pytest.raises(OperationFailure) as refusal:
                    call(stranger)
                assert refusal.value.code == 13
        with (
            MongoClient[dict[str, Any]](f"mongodb://chat-history:guess@{url}&authSource=admin") as stranger,
            pytest.raises(OperationFailure) as refusal,
        ):
            calls[0](stranger)
        assert refusal.value.code == 18


def rights(directory: Path) -> set[str]:
    """The rights that others than the owner have of anything in a directory, itself included."""
    return {
        f"{each}: {each.lstat().st_mode:o}"
        for each in (directory, *directory.rglob("*"))
        if stat.S_IMODE(each.lstat().st_mode) & 0o077
    }


def test_nobody_else_can_read_the_data_directory(two: tuple[Service, Service]) -> None:
    for service in two:
        assert rights(service.data) == set()


def test_the_engine_has_only_the_environment_that_it_needs(two: tuple[Service, Service]) -> None:
    first, _ = two
    asked = ["ps", "eww", "-o", "args=", "-p", str(first.engine_pid())]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert "PATH=" in said
    assert "CHAT_" not in said
    assert "PLANTED" not in said


def engine_without_password(storage: Path, port: int) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).parent / "secantusd-py"
    started = subprocess.Popen(
        [program, "--host", "127.0.0.1", "--port", str(port), "--storage-path", storage, "--sync-on-commit"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not _listens(port):
        time.sleep(0.05)
    return started


def test_a_data_directory_of_an_older_version_opens_and_is_closed_to_others(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.data.mkdir(mode=0o755)
    (service.data / "service.lock").write_text("1")
    port = free_port()
    older = engine_without_password(service.data / "engine", port)
    try:
        with MongoClient[dict[str, Any]](f"mongodb://127.0.0.1:{port}/?directConnection=true") as client:
            client.other.things.insert_one({"_id": 1})
            client.admin.command("createUser", "eve", pwd="x", roles=[{"role": "root", "db": "admin"}])
    finally:
        older.kill()
        older.wait()
    service.data.chmod(0o755)
    assert rights(service.data)
    try:
        service.start()
        assert rights(service.data) == set()
        with MongoClient[dict[str, Any]](service.database_url) as operator:
            assert operator.other.things.find_one() == {"_id": 1}
            assert [each["user"] for each in operator.admin["system.users"].find()] == ["chat-history"]
        before = service.database_url
        service.stop()
        (service.data / "engine.json").unlink()  # as in a backup of the engine's files alone
        service.start()
        assert service.database_url != before
        with MongoClient[dict[str, Any]](before) as old, pytest.raises(OperationFailure):
            old.other.things.find_one()
        with MongoClient[dict[str, Any]](service.database_url) as operator:
            assert operator.other.things.find_one() == {"_id": 1}
    finally:
        service.stop()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("service.lock", "link"),
        ("service.lock", "hard link"),
        ("service.lock", "fifo"),
        ("engine.lock", "link"),
        ("engine.log", "link"),
        ("engine.log", "fifo"),
        ("engine.toml", "link"),
    ],
)
def test_what_is_no_plain_file_in_the_data_directory_is_left_alone(
    tmp_path: Path, name: str, kind: str
) -> None:
    service, precious = Service(tmp_path), tmp_path / "precious"
    precious.write_text("precious")
    service.data.mkdir(mode=0o700)
    if kind == "link":
        (service.data / name).symlink_to(precious)
    elif kind == "hard link":
        (service.data / name).hardlink_to(precious)
    else:
        os.mkfifo(service.data / name)
    settings = Settings(_env_file=None, data_dir=service.data, embedded_port=service.embedded_port)
    with pytest.raises(data_directory.EmbeddedEngineError) as refusal, engine.EmbeddedEngine(settings):
        pass
    assert f"{service.data / name} is a link or no plain file" in str(refusal.value)
    assert precious.read_text() == "precious"


def test_a_data_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, link = tmp_path / "data", tmp_path / "link"
    data.mkdir()
    link.symlink_to(data)
    another = os.geteuid() + 1000
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: another)
        with pytest.raises(data_directory.EmbeddedEngineError, match="belongs to another user"):
            data_directory.make_private(data)
    data_directory.make_private(link)
    with contextlib.suppress(PermissionError):  # only root may give files away
        os.chown(link, another, -1, follow_symlinks=False)
        with pytest.raises(data_directory.EmbeddedEngineError, match="a link that belongs to another user"):
            data_directory.make_private(link)


def test_a_directory_with_something_else_in_it_is_not_closed_to_others(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.data.mkdir(mode=0o755)
    service.data.chmod(0o755)
    (service.data / "passwd").write_text("root")
    done = command(service, "keys", "list")
    assert done.returncode == 1
    assert "holds something else than the service's data" in done.stderr
    assert stat.S_IMODE(service.data.stat().st_mode) == 0o755
