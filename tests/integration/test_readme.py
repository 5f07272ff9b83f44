"""The documents, word for word: every command and example is run, and gives the output that they show."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.harness import Service, running

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What differs from run to run, and only that.
VARYING = [
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d"), "MINUTE"),
    (re.compile(r"msg_[0-9a-f]{32}"), "msg_RANDOM"),
    (re.compile(r"chk_[0-9a-f]{16}_[\w-]{43}"), "chk_RANDOM"),
    (re.compile(r"\b[0-9a-f]{16}\t"), "KEY\t"),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("readme")) as service:
        yield service


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def steps(page: Path) -> list[tuple[str, str]]:
    """The commands of the `console` blocks, each with the output below it; MongoDB's shell is not here."""
    found: list[tuple[str, str]] = []
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.split("\n")
            ends = (n for n, line in enumerate(lines) if _is_whole("\n".join(lines[: n + 1])))
            end = next(ends)
            found.append(("\n".join(lines[: end + 1]), "\n".join(lines[end + 1 :]).strip()))
    return [each for each in found if not each[0].startswith("mongosh")]


def _is_whole(command: str) -> bool:
    return not command.endswith("\\") and command.count("'") % 2 == 0


def masked(text: str) -> str:
    for pattern, name in VARYING:
        text = pattern.sub(name, text)
    return text


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


WALKS = [page for page in PAGES if steps(page)]


def test_the_front_page_and_the_quickstart_are_walks() -> None:
    assert {"README.md", "docs/quickstart.md"} <= {name_of(page) for page in WALKS}
    assert len(steps(ROOT / "README.md")) == 5


@pytest.mark.parametrize("page", WALKS, ids=name_of)
def test_every_command_does_what_the_page_shows(started: Service, page: Path, tmp_path: Path) -> None:
    with started.client() as http:
        # Each page begins without any data.
        for each in http.get("/conversations?limit=1000").json()["data"]:
            http.delete(f"/users/{quote(each['user_id'], safe='')}")
    (tmp_path / ".venv").symlink_to(sys.prefix)  # where the documents have the command line
    for command, expected in steps(page):
        done = subprocess.run(
            ["bash", "-c", command.replace("localhost:8000", f"127.0.0.1:{started.port}")],
            env=started.environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert masked(done.stdout.strip()) == masked(expected), command


# Commands that need what no test has: a free port 8000, an index of packages, Docker, a MongoDB.
NOT_RUN = re.compile(
    r"(CHAT_\w+=\S+ )*make [a-z]+( BENCH='[^']*')?( +#.*)?|docker compose up"
    r"|docker build --tag chat-history \."
    r"|docker run -v data:/data -p 127\.0\.0\.1:8000:8000 -e CHAT_INSECURE=true chat-history"
    r"|uvx --python '>=3\.11,<3\.14' --constraints constraints\.txt --from '\.\[embedded\]'"
    r" chat-history serve"
    r"|chat-history verify( --(from|to) \S+)*"
    r"|pip install '?\.(/clients/python)?(\[[a-z-]+\])?'?"
)


def test_a_command_that_is_not_run_is_one_that_no_test_can_run() -> None:
    for page in PAGES:
        for command in "".join(blocks(page, "sh")).splitlines():
            assert NOT_RUN.fullmatch(command), (name_of(page), command)
        kinds = re.findall(r"^```(\w*)\n(?:.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        assert {*kinds} <= {"sh", "console", "python", "js"}, name_of(page)


# LlamaIndex brings 38 packages, so `make compat` installs it and runs its example.
BY_COMPAT = ROOT / "docs" / "clients" / "llama-index.md"
EXAMPLES = [
    pytest.param(code, id=name_of(page))
    for page in PAGES
    for code in blocks(page, "python")
    if page != BY_COMPAT
]
# No model answers in a test: the Agents SDK's own scripted one stands in for the default.
SCRIPTED = """
from agents.models.openai_provider import OpenAIProvider
from agents.testing import ScriptedModel, assistant_message
OpenAIProvider.get_model = lambda *_: ScriptedModel([[assistant_message("At 14:05.")]])
"""


def test_there_is_an_example_for_each_client() -> None:
    pages = {example.id for example in EXAMPLES}
    clients = {name_of(page) for page in (ROOT / "docs" / "clients").glob("*.md")}
    clients.remove(name_of(BY_COMPAT))
    assert {"README.md", "docs/develop/service-module.md", *clients} <= pages


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_python_examples_print_what_they_say(started: Service, code: str) -> None:
    environment = started.environment() | {
        "CHAT_LOG_LEVEL": "error",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "PYTHONPATH": str(ROOT),
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
