"""What the sweep of every minute removes, and that one step does not keep the others from their work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ConversationNotFound, DatabaseUnavailable
from service.history import deleting
from service.history.store import ConversationStore
from service.maintenance import due_times, sweep
from service.telemetry import metrics
from service.tenancy import ConversationRef
from service.user_data.erasure import RemovedCounts
from tests.unit.fake_store import START, Json, conversation, encoded, fake_store

pytestmark = pytest.mark.usefixtures("documents")
DAY, MS = timedelta(days=1), timedelta(milliseconds=1)
NOW = START + 1_000 * DAY


def is_due(fields: Json, **settings: Any) -> bool:
    store, _ = fake_store(**settings)
    return sweep._is_due(store, encoded(conversation(**{"updated_at": NOW, **fields})), NOW)


@pytest.mark.parametrize(
    ("fields", "due"),
    [
        ({}, False),
        ({"expires_at": NOW - MS}, True),
        ({"expires_at": NOW}, False),
        ({"expires_at": NOW + DAY}, False),
        ({"expires_at": NOW - DAY, "user_id": ""}, False),
        ({"updated_at": NOW - 7 * DAY}, False),
        ({"updated_at": NOW - 7 * DAY - MS}, True),
        ({"updated_at": NOW - 8 * DAY, "expires_at": NOW + DAY}, True),
        ({"updated_at": NOW - 8 * DAY, "user_id": ""}, False),
        ({"updated_at": NOW - 8 * DAY, "_id": "acme/c"}, False),
        ({"updated_at": NOW - 31 * DAY, "_id": "acme/c"}, True),
        ({"updated_at": NOW - 8 * DAY, "_id": "other/c"}, True),
    ],
    ids=str,
)
def test_a_conversation_is_due_when_its_time_or_its_tenants_has_come(fields: Json, due: bool) -> None:
    assert is_due(fields, retention_days=7, retention_days_by_tenant={"acme": 30}) is due


def test_without_a_retention_only_an_expiry_makes_a_conversation_due() -> None:
    assert not is_due({"updated_at": START})
    assert is_due({"updated_at": START, "expires_at": START})
    assert is_due({"updated_at": START, "_id": "acme/c"}, retention_days_by_tenant={"acme": 1})
    assert not is_due({"updated_at": START, "_id": "c"}, retention_days_by_tenant={"acme": 1})


def due(key: str = "c", *, expires_at: datetime | None = START, **fields: Any) -> Json:
    """Return a stored conversation whose time has come."""
    return conversation(key, expires_at=expires_at, due_at=START, **fields)


def counted(store: ConversationStore) -> list[tuple[Json, int]]:
    return store.database.reads  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("embedded", [True, False])
async def test_a_sweep_reads_what_is_due_and_nothing_else(embedded: bool) -> None:
    reads = []
    for others in (50, 2_000):
        kept = [
            conversation(f"k{n:04}", expires_at=NOW + DAY, due_at=NOW + DAY, updated_at=START)
            for n in range(others)
        ]
        store, _ = fake_store(
            [*kept, due("a", user_id="")], embedded=embedded, retention_days_by_tenant={"acme": 1}
        )
        await sweep.expire(store, NOW)
        reads.append(counted(store))
    assert reads[0] == reads[1]
    assert all(matched <= 1 for _, matched in reads[0])


ages = st.one_of(st.none(), st.sampled_from([-1, 0, 1, 1, 2]).map(lambda n: NOW - n * DAY))


@given(st.lists(st.tuples(ages, ages), max_size=12), st.booleans(), st.sampled_from([None, 1, 2]))
async def test_each_conversation_that_is_due_is_counted_once(
    times: list[tuple[datetime | None, datetime | None]], embedded: bool, days: int | None
) -> None:
    stored = [
        conversation(
            f"c{n:02}",
            expires_at=expires_at,
            updated_at=updated_at or NOW,
            # As it was before it was written to last.
            due_at=min(
                [each for each in (expires_at, START + days * DAY if days else None) if each], default=None
            ),
            message_count=n,
        )
        for n, (expires_at, updated_at) in enumerate(times)
    ]
    store, _ = fake_store(stored, embedded=embedded, retention_days=days)
    moved: dict[str, datetime | None] = {}
    due = [
        n
        for n, each in enumerate(stored)
        if (each["expires_at"] is not None and each["expires_at"] < NOW)
        or (days is not None and each["updated_at"] < NOW - days * DAY)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_PAGE_ITEMS", 2)
        removed: list[str] = []

        async def delete(_store: ConversationStore, ref: ConversationRef) -> None:
            removed.append(ref.key)
            database_documents = store.database.documents  # type: ignore[attr-defined]
            database_documents[:] = [each for each in database_documents if each["_id"] != ref.key]

        async def move(_store: ConversationStore, fields: Json, due_at: datetime | None) -> None:
            moved[fields["_id"]] = due_at

        patch.setattr(deleting, "delete_conversation", delete)
        patch.setattr(due_times, "set_due_at", move)
        expected = await sweep.count_expired(store, NOW)
        counts = await sweep.expire(store, NOW)
    assert removed == sorted(set(removed), key=removed.index)
    assert sorted(removed) == [f"c{n:02}" for n in due]
    assert counts == expected == RemovedCounts(len(due), sum(due))
    # What somebody has written to since is looked at again when it is due.
    assert all(due_at is None or due_at >= NOW for due_at in moved.values())


async def test_a_dry_run_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def delete(*_: Any) -> None:
        pytest.fail("a dry run removed a conversation")

    monkeypatch.setattr(deleting, "delete_conversation", delete)
    store, _ = fake_store([due(message_count=3), conversation("d")])
    assert await sweep.count_expired(store, NOW) == RemovedCounts(1, 3)


async def test_a_conversation_is_removed_only_if_it_is_due_still(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Json] = []

    async def delete(_store: ConversationStore, ref: ConversationRef) -> None:
        asked.append(ref.filter())
        raise ConversationNotFound("It was written to meanwhile.")

    monkeypatch.setattr(deleting, "delete_conversation", delete)
    store, _ = fake_store([due()])
    await sweep.expire(store, NOW)
    assert asked == [{"_id": "c", "user_id": "ada", "expires_at": {"$lt": NOW}}]


async def test_one_that_fails_does_not_stop_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []

    async def delete(_store: ConversationStore, ref: ConversationRef) -> None:
        if ref.key == "a":
            raise RuntimeError("a fault")
        removed.append(ref.key)

    monkeypatch.setattr(deleting, "delete_conversation", delete)
    store, _ = fake_store([due("a"), due("b", message_count="x"), due("c")])
    assert await sweep.expire(store, NOW) == RemovedCounts(1, 0)
    assert removed == ["c"]


async def test_no_step_ends_the_others_or_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def step(name: str, error: Exception | None) -> Callable[..., Awaitable[None]]:
        async def work(*_: Any) -> None:
            done.append(name)
            if error is not None:
                raise error

        return work

    said: list[bool] = []
    monkeypatch.setattr(due_times, "fill_in", step("due_times", None))
    monkeypatch.setattr(sweep, "_finish_deletions", step("deletions", DatabaseUnavailable("away")))
    monkeypatch.setattr(sweep, "_finish_erasures", step("erasures", RuntimeError("a fault")))
    monkeypatch.setattr(sweep, "_expire", step("expiry", None))
    monkeypatch.setattr(metrics, "swept", lambda *, failed: said.append(failed))
    store, _ = fake_store()
    await sweep._sweep(store, None)
    assert done == ["due_times", "deletions", "erasures", "expiry"]
    monkeypatch.setattr(sweep, "_finish_deletions", step("deletions", None))
    monkeypatch.setattr(sweep, "_finish_erasures", step("erasures", None))
    await sweep._sweep(store, None)
    assert said == [True, False]


# -- who sweeps ------------------------------------------------------------------------------------------


class FakeLease:
    """A lease over several fake processes, which expires when the test says so."""

    holder: str | None = None

    def of(self, process: str) -> Any:
        leases = SimpleNamespace()

        async def take(_name: str, _seconds: float) -> bool:
            self.holder = self.holder or process
            return self.holder == process

        async def release(_name: str) -> None:
            self.holder = None

        leases.take, leases.release = take, release
        return leases


async def test_of_many_processes_one_sweeps_and_another_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[str] = []
    lease = FakeLease()

    async def note(store: ConversationStore, _audit: object) -> None:
        swept.append(store.settings.database_name)

    async def by(process: str) -> None:
        begin = len(swept)
        async with asyncio.timeout(5):
            while swept[begin:].count(process) < 3:  # noqa: ASYNC110  (many writers, one reader)
                await asyncio.sleep(0.01)

    monkeypatch.setattr(sweep, "_sweep", note)
    monkeypatch.setattr(sweep, "_EVERY_S", 0.01)
    monkeypatch.setattr(sweep, "_RENEWED_EVERY_S", 0.01)
    tasks = {}
    for process in ("a", "b", "c"):
        store, database = fake_store()
        database.leases = lease.of(process)  # type: ignore[attr-defined]
        store.settings = SimpleNamespace(database_name=process)  # type: ignore[assignment]
        tasks[process] = asyncio.create_task(sweep.run(store, None))
        await asyncio.sleep(0)
    await by("a")
    assert {*swept} == {"a"}
    # One that ends gives the lease back.
    tasks["a"].cancel()
    await asyncio.wait([tasks["a"]])
    assert lease.holder is None
    await asyncio.sleep(0.05)
    second = lease.holder or ""
    assert second in {"b", "c"}
    await by(second)
    # From one that stands still the lease is taken when it has expired; then the first does not sweep.
    lease.holder = third = "c" if second == "b" else "b"
    await by(third)
    begin = len(swept)
    await by(third)
    assert {*swept[begin:]} == {third}
    for task in tasks.values():
        task.cancel()
    await asyncio.wait(tasks.values())
