"""What imports what, beside the contracts of import-linter in pyproject.toml (`make lint`)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

SERVICE = Path(__file__).parents[2] / "service"
CLIENT = Path(__file__).parents[2] / "clients" / "python" / "src" / "chat_history_client"


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "service":
            found |= {f"service.{each.name}" for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_one_module_asks_beanie_for_motors_collections() -> None:
    naming = {path for path in SERVICE.rglob("*.py") if "get_motor_collection" in path.read_text()}
    assert naming == {SERVICE / "database" / "driver.py"}


def test_the_engine_is_used_as_a_separate_program_and_never_imported() -> None:
    for path in SERVICE.rglob("*.py"):
        assert "secantus" not in {each.split(".")[0] for each in imports(path)}, path


def test_the_guard_needs_the_standard_library_only() -> None:
    known = {"__future__", "ctypes", "os", "signal", "subprocess", "sys", "threading"}
    assert imports(SERVICE / "embedded" / "guard.py") == known


def test_the_service_and_its_client_know_nothing_of_each_other() -> None:
    for path in SERVICE.rglob("*.py"):
        assert not any(each.startswith("chat_history_client") for each in imports(path)), path
    modules = sorted(CLIENT.rglob("*.py"))
    assert len(modules) > 10
    for path in modules:
        assert "service" not in {each.split(".")[0] for each in imports(path)}, path


def test_the_client_needs_httpx_and_tenacity_only_and_each_adapter_its_framework() -> None:
    needed = {
        "openai_agents": {"agents"},
        "langchain": {"langchain_core"},
        "langchain_agents": {"langchain", "langchain_core", "langgraph"},
        "pydantic_ai": {"pydantic_ai"},
        "agent_framework": {"agent_framework"},
        "llama_index": {"llama_index"},
    }
    for path in CLIENT.rglob("*.py"):
        roots = {each.split(".")[0] for each in imports(path)} - sys.stdlib_module_names
        allowed = needed.get(path.stem, {"anyio", "httpx", "tenacity"})
        assert roots - {"chat_history_client"} <= allowed, path
