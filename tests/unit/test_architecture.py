"""What imports what: the one-way street that docs/architecture.md promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

SERVICE = Path(__file__).parents[2] / "service"
LAYERS = {
    "errors": set(),
    "settings": set(),
    "payloads": {"errors", "settings"},
    "documents": {"roles"},
    "roles": set(),
    "openai_items": {"roles"},
    "metrics": set(),
    "times": set(),
    "database": {"documents", "errors", "metrics", "payloads", "settings"},
    "scopes": {"errors"},
    "chat_service": {
        "database",
        "documents",
        "errors",
        "metrics",
        "payloads",
        "roles",
        "scopes",
        "settings",
        "times",
    },
    "keys": {"database", "documents", "errors", "payloads", "settings", "times"},
    "auth": {"errors", "issuer", "keys", "scopes", "settings"},
    "lifecycle": {
        "chat_service",
        "database",
        "documents",
        "errors",
        "payloads",
        "scopes",
        "settings",
        "times",
    },
    "audit": {"database", "documents", "errors"},
}


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


def test_only_the_module_that_opens_the_database_names_motor() -> None:
    modules = sorted(SERVICE.rglob("*.py"))
    assert len(modules) > 10
    naming = [each.name for each in modules if any(name.split(".")[0] == "motor" for name in imports(each))]
    assert naming == ["database.py"]
    speaking = [each.name for each in modules if "get_motor_collection" in each.read_text()]
    assert speaking == ["database.py"]


def test_the_service_module_and_what_is_below_it_know_no_http() -> None:
    for module in LAYERS:
        roots = {each.split(".")[0] for each in imports(SERVICE / f"{module}.py")}
        assert not roots & {"fastapi", "starlette", "uvicorn", "httpx"}, module


def test_imports_go_one_way() -> None:
    for module, allowed in LAYERS.items():
        own = {
            each.split(".")[1] for each in imports(SERVICE / f"{module}.py") if each.startswith("service.")
        }
        assert own <= allowed, module


def test_the_engine_is_used_as_a_separate_program_and_never_imported() -> None:
    for path in SERVICE.rglob("*.py"):
        assert "secantus" not in {each.split(".")[0] for each in imports(path)}, path


def test_the_guard_needs_the_standard_library_only() -> None:
    known = {"__future__", "ctypes", "os", "signal", "subprocess", "sys", "threading"}
    assert imports(SERVICE / "embedded_guard.py") == known


def test_the_service_needs_none_of_the_clients_and_they_need_little_of_the_service() -> None:
    for path in SERVICE.rglob("*.py"):
        own = {each for each in imports(path) if each.startswith("service")}
        if path.parent.name == "clients":
            assert own <= {"service.openai_items", "service.clients.http"}, path
        else:
            assert not any(each.startswith("service.clients") for each in own), path
    heavy = "{'beanie', 'motor', 'pymongo', 'fastapi', 'uvicorn'}"
    code = f"import sys, service.clients, service.openai_items; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
