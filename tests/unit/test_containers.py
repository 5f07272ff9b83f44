"""The Dockerfile, docker-compose.yml and the workflow, as far as they can be judged without running them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from service.cli import app
from service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LONG_RUNNING = sorted(name for name, each in SERVICES.items() if each["restart"] != "no")
COMMANDS = set(typer.main.get_group(app).commands)


def instructions(kind: str) -> list[str]:
    return re.findall(rf"^{kind} (.*(?:\\\n.*)*)$", DOCKERFILE, re.MULTILINE)


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_has_a_limit_of_memory_and_gains_no_rights(name: str) -> None:
    assert SERVICES[name]["mem_limit"]
    assert "no-new-privileges:true" in SERVICES[name]["security_opt"]
    assert not SERVICES[name].get("image", "").endswith("latest")


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_what_runs_for_long_has_time_to_end(name: str) -> None:
    assert seconds(SERVICES[name]["stop_grace_period"]) > Settings().shutdown_timeout_ms / 1000


def test_a_health_check_changes_nothing_and_is_asked_seldom() -> None:
    check = SERVICES["mongodb"]["healthcheck"]
    assert not re.search(r"initiate|insert|update|create", str(check["test"]))
    assert seconds(check["interval"]) >= 30
    (own,) = instructions("HEALTHCHECK")
    interval = re.search(r"--interval=(\d+)s", own)
    assert interval
    assert int(interval[1]) >= 30


def test_the_replica_set_is_initiated_once_before_the_service_starts() -> None:
    assert SERVICES["service"]["depends_on"] == {"initiate": {"condition": "service_completed_successfully"}}
    assert SERVICES["initiate"]["depends_on"] == {"mongodb": {"condition": "service_healthy"}}
    assert "rs.initiate" in SERVICES["initiate"]["entrypoint"][-1]
    assert "healthcheck" not in SERVICES["initiate"]


def test_nothing_is_published_beyond_this_machine() -> None:
    ports = [port for each in SERVICES.values() for port in each.get("ports", [])]
    assert ports == ["127.0.0.1:8000:8000"]
    assert COMPOSE["networks"]["database"]["internal"] is True


def test_the_containers_set_settings_that_there_are() -> None:
    known = {f"CHAT_{name.upper()}" for name in Settings.model_fields}
    named = {*re.findall(r"CHAT_[A-Z_]+", DOCKERFILE), *SERVICES["service"]["environment"]}
    assert named <= known


def test_the_image_runs_without_root_and_its_commands_exist() -> None:
    assert [each for each in instructions("USER") if each not in {"root", "0"}] == ["10001"]
    assert DOCKERFILE.rindex("\nUSER 10001") < DOCKERFILE.rindex("\nCMD")
    assert instructions("ENTRYPOINT") == ['["chat-history"]']
    started = re.findall(r'CMD \["(?:chat-history", ")?(\w+)"\]', DOCKERFILE)
    assert started == ["health", "serve"]
    assert set(started) <= COMMANDS


def test_the_image_installs_extras_that_there_are_before_it_copies_the_service() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [*instructions("ARG"), f"EXTRAS={SERVICES['service']['build']['args']['EXTRAS']}"]
    for each in asked:
        assert {*each.removeprefix("EXTRAS=").split(",")} <= {*extras}
    assert DOCKERFILE.index('pip install ".[$EXTRAS]"') < DOCKERFILE.index("COPY service")
    copied = {word for line in instructions("COPY") for word in line.split()[:-1] if not word.startswith("-")}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{each}" for each in copied - {"/app"}} <= {*ignored}


WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_every_action_of_a_workflow_is_named_by_its_commit() -> None:
    used = [step["uses"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    for each in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", each), each


def test_no_job_of_a_change_depends_on_what_is_newest() -> None:
    for name, job in WORKFLOW["jobs"].items():
        said = str(job)
        newest = "make compat" in said or "latest" in said or "--upgrade" in said
        assert newest is (name == "compat"), name
    assert "pull_request" not in WORKFLOW["jobs"]["compat"]["if"]
    assert "schedule" in WORKFLOW["jobs"]["compat"]["if"]


def test_ci_installs_the_wheels_and_a_workflow_builds_the_image() -> None:
    assert "make wheels" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "docker build" in str(WORKFLOW["jobs"]["image"])
