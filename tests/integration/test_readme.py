"""The README's walk, word for word: every command is run, and says what the README says it does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Service, running

README = Path(__file__).parents[2] / "README.md"
# What differs from run to run, and only that.
VARYING = [
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"), "TIME"),
    (re.compile(r"msg_[0-9a-f]{32}"), "msg_RANDOM"),
]


def steps() -> list[tuple[str, str]]:
    """The commands of the `console` blocks, each with the output below it."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"```console\n(.*?)```", README.read_text(), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.split("\n")
            ends = (n for n, line in enumerate(lines) if _is_whole("\n".join(lines[: n + 1])))
            end = next(ends)
            found.append(("\n".join(lines[: end + 1]), "\n".join(lines[end + 1 :]).strip()))
    return found


def _is_whole(command: str) -> bool:
    return not command.endswith("\\") and command.count("'") % 2 == 0


def masked(text: str) -> str:
    for pattern, name in VARYING:
        text = pattern.sub(name, text)
    return text


def test_the_walk_is_what_happens(tmp_path: Path) -> None:
    walk = [each for each in steps() if not each[0].startswith("mongosh")]
    assert len(walk) >= 6
    with running(tmp_path) as service:
        for command, expected in walk:
            here = command.replace("localhost:8000", f"127.0.0.1:{service.port}")
            done = subprocess.run(
                ["bash", "-c", here], capture_output=True, text=True, timeout=30, check=True
            )
            assert masked(done.stdout.strip()) == masked(expected), command


EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
# No model answers in a test: the Agents SDK's own scripted one stands in for the default.
SCRIPTED = """
from agents.models.openai_provider import OpenAIProvider
from agents.testing import ScriptedModel, assistant_message
OpenAIProvider.get_model = lambda *_: ScriptedModel([[assistant_message("At 14:05.")]])
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("readme")) as service:
        yield service


def test_there_is_an_example_for_each_client() -> None:
    assert len(EXAMPLES) == 6


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_python_examples_print_what_they_say(started: Service, code: str) -> None:
    environment = started.environment() | {
        "CHAT_LOG_LEVEL": "error",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "PYTHONPATH": str(README.parent),
    }
    prelude = SCRIPTED if "import Agent, Runner" in code else ""
    done = subprocess.run(
        [sys.executable, "-c", prelude + code.replace("http://127.0.0.1:8000", started.url)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    says = re.findall(r"^# (.*)$", code, re.MULTILINE)
    assert says
    assert done.stdout.splitlines() == says


@pytest.mark.parametrize("path", re.findall(r"`((?:tests|docs|service)/[\w./-]+)`", README.read_text()))
def test_every_file_that_the_readme_names_exists(path: str) -> None:
    assert (README.parent / path).exists()


def test_every_test_that_the_documentation_names_exists() -> None:
    pages = [README, *(README.parent / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text())}
    defined: set[str] = set()
    for module in (README.parent / "tests").rglob("test_*.py"):
        defined |= {module.stem, *re.findall(r"def (test_\w+)", module.read_text())}
    assert named
    assert named <= defined, named - defined
