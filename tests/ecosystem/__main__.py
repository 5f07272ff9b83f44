"""Fetches the source distributions of `openai` and `openai-agents`, and runs their tests against the service.

Then OpenAI's client for JavaScript and a maker of types are tried (javascript.py). The tests of LlamaIndex's
chat store are ours and run here, because LlamaIndex brings 38 packages.

Nothing of the fetched tests is kept in this repository: they are unpacked into `.compat`, at the version that
is installed. What they cannot pass, and why, stands in `EXPECTED`, by name; anything else that fails fails
this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.ecosystem import javascript
from tests.harness import running

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FETCHED = ROOT / ".compat"

# The tests of the Agents SDK that reach into SQLite, or are about its own helpers.
EXPECTED: dict[str, dict[str, str]] = {
    "openai": {},
    "openai-agents": {
        "test_sqlite_session_close_closes_worker_thread_connections": "its threads' connections",
        "test_sqlite_session_reaps_connections_from_exited_worker_threads": "its threads' connections",
        "test_sqlite_session_closes_retired_connections_before_the_next_allocation": "its connections",
        "test_sqlite_session_keeps_connections_of_live_worker_threads": "its threads' connections",
        "test_sqlite_session_closed_rejects_empty_add_items": "its close()",
        "test_sqlite_session_pop_item_skips_corrupt_most_recent": "writes broken JSON into its table",
        "test_sqlite_session_pop_item_returns_none_after_dropping_only_corrupt_rows": "likewise",
        "test_sqlite_session_get_items_limit_skips_corrupt_newest_rows": "likewise",
        "test_sqlite_session_get_items_session_settings_limit_skips_corrupt_rows": "likewise",
        "test_sqlite_session_file_lock_is_shared_across_instances": "its file lock",
        "test_sqlite_session_failed_add_items_releases_write_lock": "its write lock",
        "test_sqlite_session_failed_clear_session_rolls_back": "its connection",
        "test_sqlite_session_failed_pop_item_releases_write_lock": "its write lock",
        "test_sqlite_session_rollback_failure_evicts_connection": "its connection",
        "test_sqlite_session_close_retries_quarantined_connection": "its connection",
        "test_sqlite_session_post_commit_cancellation_propagates_after_known_outcome": "its connection",
    },
}
TESTS = {
    "openai": [
        "tests/api_resources/test_conversations.py",
        "tests/api_resources/conversations/test_items.py",
    ],
    "openai-agents": ["tests/memory/test_session.py", "tests/memory/test_session_limit.py"],
}


def fetch(package: str) -> Path:
    """Return the folder of a package's source distribution, fetched with pip if it is not there."""
    name = f"{package.replace('-', '_')}-{version(package)}"
    if not (FETCHED / name).exists():
        FETCHED.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        wanted = f"{package}=={version(package)}"
        subprocess.run([*command, "--dest", str(FETCHED), wanted], check=True)
        with tarfile.open(FETCHED / f"{name}.tar.gz") as archive:
            archive.extractall(FETCHED, filter="data")
    return FETCHED / name


def run(package: str, url: str) -> bool:
    """Run a package's tests; return whether just those failed that are expected to."""
    source = fetch(package)
    environment = os.environ | {
        "PYTHONPATH": f"{source}{os.pathsep}{HERE}{os.pathsep}{ROOT}",
        "TEST_API_BASE_URL": f"{url}/v1",
        "COMPAT_URL": url,
        "OPENAI_API_KEY": "none",
    }
    plugin = f"{package.replace('-', '_')}_plugin"
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(source), "-p", plugin]
    command += ["-o", "asyncio_mode=auto", "-q", "-rfE", "--tb=short", *TESTS[package]]
    ended = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    failed = set(re.findall(r"^(?:FAILED|ERROR) \S*::(\w+)", ended.stdout, re.MULTILINE))
    unexpected, mended = failed - set(EXPECTED[package]), set(EXPECTED[package]) - failed
    print(f"{package} {version(package)}: {ended.stdout.strip().splitlines()[-1]}")
    for name, why in EXPECTED[package].items():
        print(f"  expected to fail: {name} ({why})")
    if unexpected or mended or ended.returncode not in {0, 1}:
        print(ended.stdout[-20_000:], ended.stderr[-5_000:])
        print(f"{package}: failed unexpectedly: {sorted(unexpected)}; passed unexpectedly: {sorted(mended)}")
        return False
    return True


def run_ours(url: str) -> bool:
    """Run our tests of LlamaIndex's chat store; return whether all passed."""
    command = [sys.executable, "-m", "pytest", "-W", "default", "-q", str(HERE / "llama_index_tests.py")]
    return (
        subprocess.run(command, cwd=ROOT, env=os.environ | {"COMPAT_URL": url}, check=False).returncode == 0
    )


def main() -> None:
    """Start a service, and run everything against it."""
    with tempfile.TemporaryDirectory() as directory, running(Path(directory)) as service:
        passed = [run(package, service.url) for package in TESTS]
        passed += [javascript.run(service.url, FETCHED), run_ours(service.url)]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
