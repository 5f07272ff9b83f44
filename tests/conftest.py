from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import hypothesis
import pytest
from pymongo import MongoClient

from chat_history_client import AsyncChatHistoryClient, ChatHistoryClient
from tests.harness import Service, create, fresh_urls, new_id, running
from tests.mongo_router import engine
from tests.tokens import Issuer

# The files that take longest, in this order.
LONGEST = (
    "test_lifecycle",
    "test_embedded",
    "test_verify_ranges",
    "test_ids",
    "test_threats",
    "test_live",
    "test_checkpoints",
    "test_auth",
    "test_newcomer",
    "test_shard_keys",
    "test_serving",
    "test_console",
    "test_looks",
    "test_hostile_content",
    "test_bad_days",
    "test_torture",
    "test_model",
    "test_flat_cost",
    "test_connections",
    "test_imports",
    "test_verify",
    "test_scenarios",
    "test_concurrency",
    "test_outages",
    "test_decisions",
    "test_mongo_outages",
    "test_exactness",
    "test_malformed",
)

# A busy machine makes values slowly, which says nothing of what is tested.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: a worker runs a whole file, so a long one begun last is waited for.

    On another engine, leave out what is about the embedded one.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if "TEST_MONGODB_URL" in os.environ:
        for item in items:
            for mark in item.iter_markers("embedded_engine"):
                item.add_marker(pytest.mark.skip(reason=f"about the embedded engine: {mark.args[0]}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in the last lines that the tests in a browser did not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    if any("there is no Chromium" in str(each.longrepr) for each in skipped):
        terminalreporter.write_line(
            "The tests of the console in a browser did not run, because no Chromium was found. "
            "`apt-get install chromium` installs one, and `make test-browser` requires one."
        )


@pytest.fixture(scope="session", autouse=True)
def _drop_fresh_databases() -> Iterator[None]:
    """Remove what the tests made on the MongoDB of TEST_MONGODB_URL."""
    yield
    for url in fresh_urls:
        with MongoClient[dict[str, Any]](url) as operator:
            operator.drop_database(operator.get_default_database().name)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service on an embedded engine of this run's own; tests share it and use ids of their own.

    TEST_MONGODB_URL puts it on a MongoDB instead, and each other service that a test starts, too.
    """
    with running(tmp_path_factory.mktemp("service")) as started:
        yield started


@pytest.fixture(scope="session")
def second_service(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Another process of the service, on the same database."""
    directory = tmp_path_factory.mktemp("second")
    with running(directory, mongodb_url=service.database_url) as started:
        yield started


@pytest.fixture(scope="session")
def shards() -> Iterator[tuple[int, int]]:
    """The ports of two engines of this run's own, for a `MongoRouter`."""
    with engine() as one, engine() as other:
        yield one, other


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as opened:
        yield opened


@pytest.fixture
def conversation(client: httpx.Client) -> str:
    return create(client, new_id())


@pytest.fixture
async def history(service: Service) -> AsyncIterator[AsyncChatHistoryClient]:
    async with AsyncChatHistoryClient(service.url) as client:
        yield client


@pytest.fixture
def sync_history(service: Service) -> Iterator[ChatHistoryClient]:
    with ChatHistoryClient(service.url) as client:
        yield client


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """An issuer of tokens whose keys the tests of one module may change."""
    started = Issuer()
    yield started
    started.server.shutdown()
    started.server.server_close()
