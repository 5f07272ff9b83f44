"""A lease is held by one process at a time, and by another when its time is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.database.driver import Connection
from service.database.shared import Leases
from service.settings import Settings
from tests.harness import Service, new_id, on_database


@pytest.fixture
async def two(service: Service) -> AsyncIterator[tuple[Leases, Leases]]:
    """The leases as two processes have them."""
    settings = Settings(_env_file=None, mongodb_url=on_database(service.database_url, new_id("leases")))
    connections = [Connection(settings), Connection(settings)]
    for connection in connections:
        connection.connect(retry_writes=False)
    yield Leases(connections[0]), Leases(connections[1])
    for connection in connections:
        await connection.close()


async def test_of_two_processes_one_has_a_lease_until_it_gives_it_back(two: tuple[Leases, Leases]) -> None:
    first, second = two
    assert await first.take("a", 60)
    assert not await second.take("a", 60)
    assert await second.take("b", 60)
    assert await first.take("a", 60), "its holder may take it again"
    await second.release("a")
    assert not await second.take("a", 60), "only its holder gives it back"
    await first.release("a")
    assert await second.take("a", 60)


async def test_a_lease_that_is_not_renewed_expires(two: tuple[Leases, Leases]) -> None:
    first, second = two
    assert await first.take("a", 0.1)
    await asyncio.sleep(0.2)
    assert await second.take("a", 60)
    assert not await first.renew("a", 60)
    assert await second.renew("a", 60)


async def test_a_lease_is_kept_for_as_long_as_the_work_takes(two: tuple[Leases, Leases]) -> None:
    first, second = two
    async with first.held("a", 0.9) as is_mine:
        assert is_mine
        for _ in range(6):
            await asyncio.sleep(0.3)
            async with second.held("a", 0.9) as is_theirs:
                assert not is_theirs
    assert await second.take("a", 60)


async def test_of_many_who_ask_at_once_one_gets_the_lease(two: tuple[Leases, Leases]) -> None:
    taken = await asyncio.gather(*(each.take("a", 60) for each in two * 1))
    assert sorted(taken) == [False, True]
