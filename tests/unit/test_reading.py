"""Pages, streams and times, over a store in memory: the same from every kind of engine."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ConversationNotFound, InvalidRequest, MessageNotFound
from service.history import reading
from service.history.reading import HistoryFilter, MessagePage
from service.history.store import ConversationStore
from service.tenancy import ConversationKey, ConversationRef, OwnerKey
from tests.unit.fake_store import (
    KEY,
    OWNER,
    START,
    FakeDatabase,
    Json,
    conversation,
    encoded,
    fake_store,
    message,
)

pytestmark = pytest.mark.usefixtures("documents")
REF = ConversationRef(KEY, OWNER)
MS = timedelta(milliseconds=1)
engines = pytest.mark.parametrize("embedded", [False, True], ids=["mongodb", "embedded"])


def history(
    messages: Iterable[Json], *, embedded: bool, last_seq: int | None = None, **settings: Any
) -> tuple[ConversationStore, FakeDatabase]:
    """Return a store with one conversation, in which some seqs may be empty."""
    stored = list(messages)
    state: dict[str, Any] = {
        "last_seq": last_seq if last_seq is not None else max((each["seq"] for each in stored), default=0),
        "updated_at": max((each["created_at"] for each in stored), default=START),
    }
    return fake_store([conversation(**state), *stored], embedded=embedded, **settings)


async def page(
    store: ConversationStore, which: HistoryFilter | None = None, **options: Any
) -> MessagePage[Json]:
    arguments: Any = {"limit": None, "last": None, "order": "asc", **options}
    return await reading.page(store, REF, which or {}, **arguments)


async def stream(
    store: ConversationStore, which: HistoryFilter | None = None, **options: Any
) -> list[list[Json]]:
    arguments: Any = {"limit": None, "order": "asc", **options}
    return [part async for part in reading.stream(store, REF, which or {}, **arguments)]


def seqs(messages: Iterable[Json]) -> list[int]:
    return [each["seq"] for each in messages]


# -- any history, any filter -----------------------------------------------------------------------

ROLES = st.sampled_from(["user", "tool"])


@st.composite
def histories(draw: Any) -> list[Json]:
    """Messages with holes between their seqs, whose times never decrease, several in one millisecond."""
    time, stored = START, []
    for seq in sorted(draw(st.sets(st.integers(1, 200), max_size=40))):
        time += MS * draw(st.sampled_from([0, 0, 1, 2, 1000]))
        stored.append(message(seq, created_at=time, role=draw(ROLES)))
    return stored


times = st.builds(
    lambda ms, us: START + ms * MS + timedelta(microseconds=us),
    st.integers(-3, 4_000),
    st.sampled_from([0, 1, 999]),
)
bounds = st.one_of(st.none(), st.integers(0, 220))
filters = st.fixed_dictionaries(
    {},
    optional={
        "after": bounds,
        "before": bounds,
        "since": st.one_of(st.none(), times),
        "until": st.one_of(st.none(), times),
        "role": st.one_of(st.none(), ROLES),
    },
)


def cut(time: datetime) -> datetime:
    return time.replace(microsecond=time.microsecond // 1000 * 1000)


def expected(stored: list[Json], which: dict[str, Any]) -> list[int]:
    """Return the seqs that a filter means, by looking at every message."""
    after, before = which.get("after"), which.get("before")
    since, until, role = which.get("since"), which.get("until"), which.get("role")
    return [
        each["seq"]
        for each in stored
        if (after is None or each["seq"] > after)
        and (before is None or each["seq"] < before)
        and (since is None or each["created_at"] >= cut(since))
        and (until is None or each["created_at"] <= cut(until))
        and (role is None or each["role"] == role)
    ]


@given(histories(), filters, st.integers(1, 50), st.booleans(), st.booleans())
async def test_a_page_has_the_first_messages_that_the_filter_means(
    stored: list[Json], which: dict[str, Any], limit: int, newest_first: bool, embedded: bool
) -> None:
    store, _ = history(stored, embedded=embedded, last_seq=205)
    wanted = expected(stored, which)
    if newest_first:
        wanted.reverse()
    order = "desc" if newest_first else "asc"
    found = await page(store, cast(HistoryFilter, which), limit=limit, order=order)
    assert seqs(found.messages) == wanted[:limit]
    assert found.has_more is (len(wanted) > limit)
    assert found.next == (wanted[limit - 1] if found.has_more else None)
    newest = await page(store, cast(HistoryFilter, which), last=limit)
    assert seqs(newest.messages) == sorted(wanted)[-limit:]


@given(histories(), filters, st.one_of(st.none(), st.integers(1, 50)), st.booleans(), st.booleans())
async def test_a_stream_has_every_message_that_the_filter_means(
    stored: list[Json], which: dict[str, Any], limit: int | None, newest_first: bool, embedded: bool
) -> None:
    store, _ = history(stored, embedded=embedded, last_seq=205)
    wanted = expected(stored, which)
    if newest_first:
        wanted.reverse()
    parts = await stream(
        store, cast(HistoryFilter, which), limit=limit, order="desc" if newest_first else "asc"
    )
    assert seqs(each for part in parts for each in part) == wanted[:limit]
    assert len(parts[0]) <= 4


# -- times -----------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1_000])
async def test_the_seq_before_a_time_is_found_wherever_it_is(embedded: bool, count: int) -> None:
    stored = [message(seq, created_at=START + seq * MS) for seq in range(1, count + 1)]
    store, database = history(stored, embedded=embedded)
    of = await store.state(REF)
    for seq in {1, count // 2 + 1, count}:
        database.reads.clear()
        assert await reading._last_seq_before(store, of, START + seq * MS) == seq - 1
        # Whatever the length of the history, little of it is matched.
        if embedded:
            assert sum(matched for _, matched in database.reads) <= 64 + 2 * 10
    assert await reading._last_seq_before(store, of, START) == 0
    assert await reading._last_seq_before(store, of, START + (count + 1) * MS) == count


@engines
async def test_a_time_behind_the_newest_message_is_behind_the_last_seq(embedded: bool) -> None:
    # The conversation had activity after its last message, and its newest messages were deleted.
    documents = [
        conversation(last_seq=9, updated_at=START + 9 * MS),
        message(1),
        message(2, created_at=START + 2 * MS),
    ]
    store, database = fake_store(documents, embedded=embedded)
    of = await store.state(REF)
    assert await reading._last_seq_before(store, of, START + 5 * MS) == 9
    database.reads.clear()
    assert await reading._last_seq_before(store, of, START + 10 * MS) == 9
    assert database.reads == []


@engines
async def test_times_of_any_number_of_messages_in_one_millisecond_are_told_apart(embedded: bool) -> None:
    stored = [message(seq, created_at=START + (seq > 150) * MS) for seq in range(1, 301)]
    store, _ = history(stored, embedded=embedded)
    assert seqs((await page(store, {"since": START + MS}, limit=1)).messages) == [151]
    assert seqs((await page(store, {"until": START}, last=1)).messages) == [150]


# -- sizes -----------------------------------------------------------------------------------------


@engines
async def test_a_page_is_cut_by_its_size_and_goes_on_from_there(embedded: bool) -> None:
    stored = [message(seq, content="x" * 100) for seq in range(1, 8)]
    size = len(encoded(stored[0]))
    store, _ = history(stored, embedded=embedded, page_bytes_max=2 * size + 1)
    read: list[int] = []
    after: int | None = 0
    while after is not None:
        found = await page(store, {"after": after}, limit=5)
        assert 1 <= len(found.messages) <= 2
        read += seqs(found.messages)
        after = found.next
    assert read == list(range(1, 8))


@engines
async def test_a_message_that_is_larger_than_a_page_is_one(embedded: bool) -> None:
    store, _ = history([message(seq) for seq in (1, 2)], embedded=embedded, page_bytes_max=1)
    found = await page(store)
    assert (seqs(found.messages), found.has_more, found.next) == ([1], True, 1)


async def test_the_embedded_engine_is_asked_for_a_long_page_in_parts() -> None:
    store, database = history([message(seq) for seq in range(1, 301)], embedded=True)
    assert len((await page(store, limit=300)).messages) == 300
    # The first query learns how large they are, and the next asks for more of that size.
    assert [matched for query, matched in database.reads if "seq" in query] == [64, 236]
    store, database = history([message(seq) for seq in range(1, 301)], embedded=False)
    assert len((await page(store, limit=300)).messages) == 300
    assert len(database.reads) == 2  # the conversation, and its messages


@engines
async def test_a_part_of_a_stream_is_cut_by_its_size(embedded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [message(seq, content="x" * 1_000) for seq in range(1, 51)]
    size = len(encoded(stored[0]))
    monkeypatch.setattr(reading, "_PART_BYTES_MAX", 3 * size)
    store, _ = history(stored, embedded=embedded)
    parts = await stream(store)
    assert seqs(each for part in parts for each in part) == list(range(1, 51))
    assert max(map(len, parts)) == 3


@engines
async def test_parts_of_a_stream_grow_to_their_size(embedded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [message(seq, content="x" * 1_000) for seq in range(1, 301)]
    monkeypatch.setattr(reading, "_PART_BYTES", 100 * len(encoded(stored[255])))
    store, _ = history(stored, embedded=embedded)
    assert [len(part) for part in await stream(store)] == [4, 64, 100, 100, 32]


@pytest.mark.parametrize(
    ("sizes", "items"),
    [
        ([100], 16),  # grows by a factor at most
        ([100] * 100, 1_000),  # and to a number at most
        ([600 * 1024] * 4, 1),  # one at least
        ([128 * 1024] * 4, 4),
    ],
)
def test_the_next_part_has_as_many_messages_as_make_its_size(sizes: list[int], items: int) -> None:
    assert reading._part_items([b"x" * size for size in sizes]) == items


@engines
async def test_a_stream_ends_at_the_message_that_was_the_last_when_it_began(embedded: bool) -> None:
    store, database = history([message(seq) for seq in range(1, 7)], embedded=embedded)
    read: list[int] = []
    async for part in reading.stream(store, REF, {}, limit=None, order="asc"):
        read += seqs(part)
        database.documents[0]["last_seq"] += 1
        database.documents.append(message(database.documents[0]["last_seq"]))
    assert read == [1, 2, 3, 4, 5, 6]


# -- what is not there -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "path", "why"),
    [
        ({"limit": 0}, "$.limit", "1 to 1000"),
        ({"limit": 1_001}, "$.limit", "1 to 1000"),
        ({"last": 0, "limit": 5}, "$.last", "1 to 1000"),
    ],
)
async def test_a_page_has_a_number_of_messages(options: dict[str, Any], path: str, why: str) -> None:
    store, _ = history([], embedded=False)
    with pytest.raises(InvalidRequest) as caught:
        await page(store, **options)
    ((fault),) = caught.value.faults
    assert fault.path == path
    assert why in fault.message


async def test_a_page_without_a_number_has_the_default_one() -> None:
    store, _ = history([message(seq) for seq in range(1, 60)], embedded=False)
    assert len((await page(store)).messages) == 50
    store, _ = history([message(seq) for seq in range(1, 60)], embedded=False, page_items_max=7)
    assert len((await page(store)).messages) == 7


@engines
async def test_an_empty_history_is_an_empty_page_and_one_empty_part(embedded: bool) -> None:
    store, _ = history([], embedded=embedded)
    assert await page(store) == MessagePage([], False, None)
    assert await stream(store) == [[]]


@pytest.mark.parametrize(
    "ref",
    [
        ConversationRef(ConversationKey("d"), OWNER),
        ConversationRef(KEY, OwnerKey("bob")),
        ConversationRef(ConversationKey("deleted")),
    ],
    ids=["missing", "another user's", "being deleted"],
)
async def test_a_conversation_is_missing_for_whoever_does_not_own_it(ref: ConversationRef) -> None:
    store, _ = fake_store([conversation(), conversation("deleted", "")])
    with pytest.raises(ConversationNotFound) as caught:
        await reading.conversation(store, ref)
    assert caught.value.detail == f"There is no conversation {ref.key}."
    with pytest.raises(ConversationNotFound):
        await reading.page(store, ref, {}, limit=None, last=None, order="asc")


async def test_a_message_is_returned_by_its_id() -> None:
    store, _ = history([message(1, content="x")], embedded=False)
    found = await reading.message(store, REF, "m1")
    assert (found["id"], found["content"]) == ("m1", "x")
    with pytest.raises(MessageNotFound, match="There is no message m2 in this conversation"):
        await reading.message(store, REF, "m2")
    assert (await reading.conversation(store, REF)).last_seq == 1
