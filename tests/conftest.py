from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest

from tests.harness import Service, create, new_id, running


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service on an embedded engine of this run's own; tests share it and use ids of their own.

    TEST_MONGODB_URL puts it on a MongoDB instead; tests that start a service themselves stay embedded.
    """
    url = os.environ.get("TEST_MONGODB_URL")
    with running(tmp_path_factory.mktemp("service"), mongodb_url=url) as started:
        yield started


@pytest.fixture(scope="session")
def second_service(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Another process of the service, on the same database."""
    directory = tmp_path_factory.mktemp("second")
    with running(directory, mongodb_url=service.database_url) as started:
        yield started


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as opened:
        yield opened


@pytest.fixture
def conversation(client: httpx.Client) -> str:
    return create(client, new_id())
