"""The command line's decisions that need neither a database nor an engine."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import typer

from service.cli import context, serve
from service.settings import Settings

UNLIMITED = resource.RLIM_INFINITY
Limits = tuple[int, int]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A directory without `.env`."""
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@pytest.mark.parametrize(
    ("before", "may_set", "after", "connections"),
    [
        ((UNLIMITED, UNLIMITED), True, (UNLIMITED, UNLIMITED), 100),
        ((200, 400), True, (200, 400), 100),
        ((50, UNLIMITED), True, (200, UNLIMITED), 100),
        ((50, 400), True, (200, 400), 100),
        ((50, 120), True, (120, 120), 60),
        ((50, 50), True, (50, 50), 25),
        ((50, UNLIMITED), False, (50, UNLIMITED), 25),
    ],
)
def test_a_process_has_two_descriptors_for_each_connection(
    before: Limits, may_set: bool, after: Limits, connections: int, alone: pytest.MonkeyPatch
) -> None:
    limits = [before]

    def setrlimit(_: int, wanted: Limits) -> None:
        if not may_set:
            raise ValueError("more than the system's own limit")
        limits.append(wanted)

    alone.setattr(resource, "getrlimit", lambda _: limits[-1])
    alone.setattr(resource, "setrlimit", setrlimit)
    alone.setenv("CHAT_CONNECTIONS_MAX", "100")
    assert serve._with_room_for_connections(Settings()).connections_max == connections
    assert limits[-1] == after


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "127.8.8.8"}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "0.0.0.0", "insecure": True}, False),
        ({"host": "0.0.0.0", "auth": "key"}, False),
    ],
)
def test_a_service_that_is_open_to_other_machines_is_refused(
    settings: dict[str, object], is_refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Settings(_env_file=None, **settings)  # type: ignore[arg-type]
    if is_refused:
        with pytest.raises(typer.Exit):
            serve._refuse_open_service(read)
        assert "Set CHAT_AUTH=key" in capsys.readouterr().err
    else:
        serve._refuse_open_service(read)


def test_settings_that_are_wrong_end_a_command_with_their_variables(
    alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone.setenv("CHAT_PORT", "seven")
    alone.setenv("CHAT_MONGODB_URL", "localhost")
    with pytest.raises(typer.Exit) as ended:
        context.read_settings()
    said = capsys.readouterr()
    assert ended.value.exit_code == 1
    assert said.out == ""
    assert "CHAT_PORT: Input should be a valid integer" in said.err
    assert "CHAT_MONGODB_URL: This must begin with mongodb://" in said.err


def test_an_option_of_the_command_line_reaches_the_worker_processes(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("CHAT_PORT", "1")
    assert context.read_settings(port=1234, host=None).port == 1234
    assert Settings().port == 1234


@pytest.mark.parametrize(
    ("tenant", "is_one"), [("", True), ("acme", True), (".", False), ("a/b", True), ("a\n", False)]
)
def test_a_command_refuses_what_cannot_be_a_tenant(tenant: str, is_one: bool) -> None:
    if is_one:
        context.require_tenant(tenant)
    else:
        with pytest.raises(typer.Exit):
            context.require_tenant(tenant)
