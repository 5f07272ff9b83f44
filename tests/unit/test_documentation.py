"""The documents: links lead somewhere, names are right, and the front page is short."""

from __future__ import annotations

import inspect
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from chat_history_client import ChatHistoryClient, HistoryFilters

ROOT = Path(__file__).parents[2]
# What a reader opens first, and what it leads to; then all Markdown that is kept here.
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
ALL = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FILE = re.compile(r"`((?:tests|docs|service|benchmarks)/[\w./-]+)`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> Iterator[str]:
    """The anchors of a page's headings, as GitHub makes them (no page here has a heading twice)."""
    for heading in re.findall(r"^#+ (.*)$", _FENCED.sub("", page.read_text()), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        yield kept.replace(" ", "-")


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_every_relative_link_of_a_document_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in set(anchors(target)), link


def test_every_document_can_be_reached_from_the_front_page() -> None:
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.is_file():
            continue
        reached.add(page)
        for link in _LINK.findall(_FENCED.sub("", page.read_text())):
            target = (page.parent / link.partition("#")[0]).resolve()
            waiting += target.glob("*.md") if target.is_dir() else [target]
    assert {*ALL} <= reached


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_every_file_that_a_document_names_exists(page: Path) -> None:
    for path in _FILE.findall(page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_test_that_the_code_names_exists() -> None:
    tests = list((ROOT / "tests").rglob("test_*.py"))
    known = {path.stem for path in tests}.union(
        *(re.findall(r"def (test_\w+)", path.read_text()) for path in tests)
    )
    named = {
        (path.name, name)
        for folder in ("service", "clients")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\b(test_[a-z]\w+)", path.read_text())
    }
    assert len(named) > 10
    assert not {each for each in named if each[1] not in known}


def test_every_name_that_the_architecture_places_in_a_file_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"\| `(service/[\w./]+)` \| (`.*`) \|$", page, re.MULTILINE)
    assert len(rows) > 30
    for path, names in rows:
        code = (ROOT / path).read_text()
        for name in re.findall(r"`(\w+)`", names):
            defined = rf"^ *(async def|def|class) {name}\b|^{name} = "
            assert re.search(defined, code, re.MULTILINE), (path, name)


def test_the_architecture_has_the_floors_of_the_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [{*layer.split(" | ")} for layer in contracts[0]["layers"]]
    floors: dict[int, set[str]] = {}
    page = (ROOT / "docs" / "architecture.md").read_text()
    for floor, names in re.findall(r"^\| (\d+)(?: \(\w+\))? \| ([^|]*) \|", page, re.MULTILINE):
        floors.setdefault(int(floor), set()).update(re.findall(r"`(\w+)`", names))
    assert floors == dict(enumerate(layers, 1))


def test_every_test_that_the_documents_name_exists() -> None:
    named = {name for page in ALL for name in re.findall(r"`(test_\w+)`", page.read_text())}
    defined: set[str] = set()
    for module in (ROOT / "tests").rglob("test_*.py"):
        defined |= {module.stem, *re.findall(r"def (test_\w+)", module.read_text())}
    assert named
    assert named <= defined, named - defined


def test_every_make_target_that_the_documents_name_exists() -> None:
    named = {name for page in ALL for name in re.findall(r"\bmake ([a-z]+)", _code(page.read_text()))}
    assert named
    for target in named:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, timeout=30)


def _code(text: str) -> str:
    return "\n".join([*_FENCED.findall(text), *re.findall(r"`([^`\n]+)`", _FENCED.sub("", text))])


def test_no_document_installs_a_name_that_is_on_no_index() -> None:
    for page in ALL:
        for command in re.findall(r"pip\w* install[^\n`]*", page.read_text()):
            assert "chat-history" not in command or " @ git+" in command, command


def test_the_page_of_the_client_names_every_call_with_its_arguments() -> None:
    page = (ROOT / "docs" / "clients" / "python.md").read_text()
    calls = dict(re.findall(r"^\| `(\w+)\(([^)]*)\)` \|", page, re.MULTILINE))
    found = inspect.getmembers(ChatHistoryClient, inspect.isfunction)
    others = {"close", "leave_connections_to_parent"}  # no calls of the API
    methods = {name: each for name, each in found if not name.startswith("_") and name not in others}
    assert {*calls} == {*methods}
    for name, arguments in calls.items():
        known = {*inspect.signature(methods[name]).parameters} - {"self"}
        if "filters" in known:
            known = known - {"filters"} | {*HistoryFilters.__annotations__}
        named = {each.strip(" =") for each in arguments.split(",")}
        assert named | {"user_id"} == known | {"user_id"}, name


def test_the_front_page_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150
