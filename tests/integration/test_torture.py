"""`kill -9` of the service, the engine, or both, at random moments, while writers append with keys.

TEST_TORTURE_S says for how long (25 seconds unless it is set), and it goes on until each was killed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import Service, contents, create, new_id, whole_history
from tests.integration.test_verify import verify

SECONDS = float(os.environ.get("TEST_TORTURE_S", "25"))
WRITERS = 6


@dataclass
class Toll:
    """What it took, and what was acknowledged: key to the stored messages."""

    kills: dict[str, int] = field(default_factory=lambda: {"service": 0, "engine": 0, "both": 0, "second": 0})
    retries: int = 0
    acknowledged: dict[str, list[Any]] = field(default_factory=dict)

    def goes_on(self, end: float) -> bool:
        """Until `end`, and on a machine that is slow, until there was a kill of each kind."""
        return time.monotonic() < end or not all(self.kills.values())


@pytest.mark.embedded_engine("it kills the engine")
async def test_what_was_acknowledged_survives_any_kill_exactly_once_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    limits: dict[str, Any] = {
        "database_timeout_ms": 2_000,
        "server_selection_timeout_ms": 500,
        "log_level": "warning",
    }
    (tmp_path / "second").mkdir()
    first = Service(tmp_path, **limits)
    first.start()
    second = Service(tmp_path / "second", mongodb_url=first.database_url, **limits)
    toll = Toll()
    try:
        second.start()
        conversations = [new_id() for _ in range(3)]
        with first.client() as client:
            for each in conversations:
                create(client, each)
        end = time.monotonic() + SECONDS
        await asyncio.gather(
            _kill_until(end, chance, first, second, toll),
            *(_write_until(end, n, conversations[n % 3], (first, second), toll) for n in range(WRITERS)),
        )
        await asyncio.to_thread(first.wait_until, "/health/ready")
        with first.client() as client:
            for each in conversations:
                _assert_true(client, each, toll)
        code, lines = verify(first)
        assert (code, len(lines)) == (0, 1), lines
    finally:
        second.kill()
        first.stop()
    assert len(toll.acknowledged) > 50
    appends, messages = len(toll.acknowledged), sum(map(len, toll.acknowledged.values()))
    with capsys.disabled():
        print(f"\ntorture: seed {seed}, {SECONDS:.0f} s, kills {toll.kills}, {appends} appends,")
        print(f"  {messages} messages, {toll.retries} retries; verify: {lines[0]}")


async def _kill_until(end: float, chance: random.Random, first: Service, second: Service, toll: Toll) -> None:
    kinds = list(toll.kills)
    while toll.goes_on(end):
        await asyncio.sleep(chance.uniform(0.3, 2.0))
        # Each kind once, and then as it comes.
        kind = next((each for each in kinds if not toll.kills[each]), chance.choice(kinds))
        toll.kills[kind] += 1
        await asyncio.to_thread(_kill, kind, first, second)


def _kill(kind: str, first: Service, second: Service) -> None:
    assert first.process is not None
    if kind == "engine":
        os.kill(first.engine_pid(), signal.SIGKILL)
        first.wait_until("/health/ready")
    elif kind == "second":
        second.kill()
        second.start(wait=False)
    else:
        if kind == "both":
            os.kill(first.engine_pid(), signal.SIGKILL)
        first.kill()
        first.start()


async def _write_until(
    end: float, writer: int, conversation: str, services: tuple[Service, Service], toll: Toll
) -> None:
    chance = random.Random(writer)
    turn = 0
    async with httpx.AsyncClient(timeout=15) as client:
        while toll.goes_on(end):
            key = f"{conversation}|{writer}|{turn}"
            size = chance.choice((1, 1, 1, 2, 4))
            batch = [{"role": "user", "content": f"{writer}/{turn}/{part}/{size}"} for part in range(size)]
            toll.acknowledged[key] = await _append(client, chance, conversation, services, batch, key, toll)
            turn += 1


async def _append(  # noqa: PLR0917  (what one append takes)
    client: httpx.AsyncClient,
    chance: random.Random,
    conversation: str,
    services: tuple[Service, Service],
    batch: list[Any],
    key: str,
    toll: Toll,
) -> list[Any]:
    """Repeat with the same key, on whichever process, until there is an answer."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        url = f"{chance.choice(services).url}/conversations/{conversation}/messages"
        try:
            response = await client.post(url, json={"messages": batch}, headers={"Idempotency-Key": key})
        except httpx.TransportError:
            toll.retries += 1
            await asyncio.sleep(0.05)
            continue
        if response.status_code != 503:
            assert response.status_code in {200, 201}, response.text
            return list(response.json()["data"])
        toll.retries += 1
        await asyncio.sleep(0.1)
    raise AssertionError("no answer within two minutes")


def _assert_true(client: httpx.Client, conversation: str, toll: Toll) -> None:
    """Every acknowledged message is there exactly once, in order, no batch in part, the counts true."""
    stored = whole_history(client, conversation)
    assert [each["seq"] for each in stored] == list(range(1, len(stored) + 1))
    expected = {
        m["seq"]: m for key, ms in toll.acknowledged.items() for m in ms if key.startswith(conversation)
    }
    assert {each["seq"]: each for each in stored} == expected
    times = [each["created_at"] for each in stored]
    assert times == sorted(times)
    said = contents(stored)
    assert len(set(said)) == len(said)
    position = 0
    while position < len(said):
        writer, turn, _, size = said[position].split("/")
        whole = [f"{writer}/{turn}/{part}/{size}" for part in range(int(size))]
        assert said[position : position + int(size)] == whole
        position += int(size)
    about = client.get(f"/conversations/{conversation}").json()
    assert (about["last_seq"], about["message_count"]) == (len(stored), len(stored))
