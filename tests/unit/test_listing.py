"""A user's list of conversations, over a store in memory: every conversation once, in order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import clock
from service.clock import EPOCH
from service.errors import InvalidRequest
from service.formats import bson_codec
from service.history import listing
from service.history.listing import ConversationPage, ListPosition
from service.history.store import ConversationStore
from service.tenancy import OwnerKey, TenantScope
from tests.unit.fake_store import START, Json, conversation, encoded, fake_store, matches

pytestmark = pytest.mark.usefixtures("documents")
MS = timedelta(milliseconds=1)
FAR = datetime(9999, 1, 1, tzinfo=UTC)
engines = pytest.mark.parametrize("embedded", [False, True], ids=["mongodb", "embedded"])
moments = st.datetimes(EPOCH.replace(tzinfo=None), FAR.replace(tzinfo=None) - MS, timezones=st.just(UTC))


async def page(
    store: ConversationStore,
    limit: int | None = None,
    after: ListPosition | None = None,
    scope: TenantScope = TenantScope(),  # noqa: B008
) -> ConversationPage:
    return await listing.page(store, scope, "ada", limit, after)


async def pages(store: ConversationStore, limit: int, scope: TenantScope = TenantScope()) -> list[list[str]]:  # noqa: B008
    """Page through the whole list."""
    found = [await page(store, limit, scope=scope)]
    while found[-1].next is not None:
        found.append(await page(store, limit, found[-1].next, scope))
    return [[each.id for each in one.conversations] for one in found]


# -- windows ---------------------------------------------------------------------------------------


@given(st.one_of(st.none(), moments.map(clock.to_milliseconds)), st.booleans())
def test_windows_cover_the_past_without_gaps_or_overlaps(after: datetime | None, in_windows: bool) -> None:
    position = ListPosition(after, "c") if after else None
    windows = list(listing._windows(position, in_windows=in_windows))
    if after != EPOCH or not in_windows:
        assert windows[0][1] == (after or FAR)
        assert windows[-1][0] == EPOCH
    assert all(later[0] == earlier[1] for later, earlier in pairwise(windows))
    assert all(begin < end for begin, end in windows if after != EPOCH)
    # As many as it takes to reach back to 1970, however far ahead another process's clock was.
    assert len(windows) <= (14 if in_windows else 1)


def test_the_newest_window_has_the_conversations_of_clocks_that_are_ahead() -> None:
    begin, end = next(listing._windows(None, in_windows=True))
    assert begin <= clock.now() - timedelta(seconds=1)
    assert end == FAR


@pytest.mark.parametrize(
    ("ms", "is_in"), [(-1, False), (0, True), (1, True), (9, True), (10, False), (11, False)]
)
def test_a_window_has_its_begin_and_not_its_end(ms: int, is_in: bool) -> None:
    query = listing.window_filter(OwnerKey("ada"), START, START + 10 * MS)
    assert matches(query, conversation(updated_at=START + ms * MS)) is is_in
    assert not matches(query, conversation(owner="bob", updated_at=START))


# -- pages -----------------------------------------------------------------------------------------

ages = st.one_of(
    st.integers(0, 3).map(lambda ms: ms * MS),
    st.integers(0, 20_000).map(lambda days: timedelta(days=days)),
    st.just(timedelta(days=-2)),  # of a clock that is ahead
)


@given(st.lists(ages, max_size=15), st.integers(1, 6), st.booleans(), st.sampled_from(["", "acme"]))
async def test_pages_have_every_conversation_of_the_user_once_and_in_order(
    ages: list[timedelta], limit: int, embedded: bool, tenant: str
) -> None:
    scope = TenantScope(tenant)
    now = clock.now()
    stored = [
        conversation(f"{scope.prefix}c{n:02}", f"{scope.prefix}ada", updated_at=max(EPOCH, now - age))
        for n, age in enumerate(ages)
    ]
    others = [
        conversation(f"{scope.prefix}d", f"{scope.prefix}bob"),
        conversation(f"{scope.prefix}e", ""),
        conversation("other/c00", "other/ada"),
    ]
    store, _ = fake_store([*others, *stored], embedded=embedded)
    found = await pages(store, limit, scope)
    ordered = sorted(stored, key=lambda each: (-each["updated_at"].timestamp(), each["_id"]))
    assert [each for one in found for each in one] == [each["_id"].rpartition("/")[2] for each in ordered]
    assert all(len(one) == limit for one in found[:-1])
    assert await pages(store, limit, scope) == found  # now that the length of the list may be known


async def test_a_list_that_was_short_is_read_with_one_query_until_it_is_long() -> None:
    stored = [conversation(f"c{n}", updated_at=START - n * MS) for n in range(5)]
    store, database = fake_store(stored, embedded=True)

    async def read(limit: int) -> tuple[int, int]:
        database.reads.clear()
        return len((await page(store, limit)).conversations), len(database.reads)

    assert (await read(5))[1] > 1  # it may be long
    assert await read(5) == (5, 1)
    assert await read(50) == (5, 1)
    assert (await read(4))[1] > 1  # this page would be cut
    assert (await read(50))[1] > 1  # and nothing is remembered any more
    database.documents += [conversation(f"d{n}", updated_at=START - n * MS) for n in range(500)]
    assert (await read(5))[1] > 2  # it has grown, and its newest ones are looked for
    assert (await read(5))[1] > 1
    assert (await read(50))[1] > 1


async def test_a_short_list_is_in_the_order_of_a_long_one() -> None:
    """Also where only the keys tell conversations apart, which are escaped, and one has no time."""
    keys = ["a%2Fb", "a.b", "a%25", "a", "ü", "\U0001f600", "\ufb01"]
    stored = [conversation(each) for each in keys] + [conversation("none", active_at=None)]
    store, _ = fake_store(stored, embedded=True)
    (long,) = await pages(store, 50)
    assert store.list_lengths
    assert await pages(store, 50) == [long]
    assert long == ["a", "a%", "a/b", "a.b", "ü", "\ufb01", "\U0001f600", "none"]


@engines
async def test_a_page_is_cut_by_its_size_and_goes_on_from_there(embedded: bool) -> None:
    stored = [conversation(f"c{n}", title="x" * 100, updated_at=START - n * MS) for n in range(5)]
    store, _ = fake_store(stored, embedded=embedded, page_bytes_max=2 * len(encoded(stored[0])))
    assert await pages(store, 4) == [["c0", "c1"], ["c2", "c3"], ["c4"]]


@engines
async def test_a_conversation_that_is_not_well_formed_is_left_out_and_named(embedded: bool) -> None:
    def stored(damage: Json) -> list[Json]:
        return [
            conversation("a", updated_at=START),
            conversation("b", updated_at=START - MS, **damage),
            conversation("c", updated_at=START - 2 * MS),
        ]

    for damage in ({"last_seq": "x"}, {"exact_metadata": b"no bson"}):
        store, _ = fake_store(stored(damage), embedded=embedded)
        whole = await page(store)
        assert ([each.id for each in whole.conversations], list(whole.left_out)) == (["a", "c"], ["b"])
        # It may be the last of a page, and the next page begins behind it.
        first = await page(store, 2)
        assert (len(first.conversations), first.next) == (1, ListPosition(START - MS, "b"))
        assert [each.id for each in (await page(store, 2, first.next)).conversations] == ["c"]


@engines
async def test_an_empty_list_is_an_empty_page(embedded: bool) -> None:
    store, _ = fake_store([conversation(owner="bob")], embedded=embedded)
    assert await page(store) == ConversationPage([], False, None, [])


async def test_the_embedded_engine_is_not_asked_for_the_whole_past() -> None:
    now = clock.now()
    stored: list[Any] = [
        conversation(f"c{n}", updated_at=now - timedelta(hours=n) - 100 * MS) for n in range(100)
    ]
    store, database = fake_store(stored, embedded=True)
    found = await page(store, 1)
    assert [each.id for each in found.conversations] == ["c0"]
    assert sum(matched for _, matched in database.reads) <= 8


@pytest.mark.parametrize("limit", [0, 1_001, -1])
async def test_a_page_has_1_to_1000_conversations(limit: int) -> None:
    store, _ = fake_store()
    with pytest.raises(InvalidRequest) as caught:
        await page(store, limit)
    assert caught.value.faults[0].path == "$.limit"


async def test_a_conversation_is_made_again_only_if_its_document_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = [conversation(f"c{n}", updated_at=START - n * MS) for n in range(5)]
    store, _ = fake_store(stored)
    made: list[str] = []

    def listed(raw: bytes, order: listing.Order) -> Any:
        made.append(bson_codec.decode(raw)["_id"])
        return of_bytes(raw, order)

    of_bytes = listing._listed
    monkeypatch.setattr(listing, "_listed", listed)
    first = await page(store)
    again = await page(store)
    assert again == first
    assert [each.json for each in again.conversations] == [each.json for each in first.conversations]
    assert made == ["c0", "c1", "c2", "c3", "c4"]
    stored[3]["title"] = "by hand"
    assert [each.title for each in (await page(store)).conversations] == [None, None, None, "by hand", None]
    assert made[5:] == ["c3"]
    # Its place is another in the list of an earlier version, so it is made for that.
    monkeypatch.setattr(ConversationStore, "lists_by_update", True)
    assert len((await page(store)).conversations) == 5
    assert len(made) == 11
    await store.close()


async def test_a_list_that_was_read_before_an_erasure_ended_is_not_kept_after_it() -> None:
    store, database = fake_store([conversation()])
    read = database.read

    async def while_somebody_is_erased(*query: Any, **options: Any) -> list[bytes]:
        found = await read(*query, **options)
        store.kept_pages.drop_all()
        return found

    database.read = while_somebody_is_erased  # type: ignore[method-assign]
    assert len((await page(store)).conversations) == 1
    assert not store.kept_pages._kept
    await store.close()
