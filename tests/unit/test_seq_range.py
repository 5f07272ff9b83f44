"""Ranges of seqs, and reading one: the same messages from every engine, at a bounded cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.database import Budget, Transaction
from service.history import seq_range
from service.history.records import ConversationState
from service.history.seq_range import SeqRange
from service.settings import WINDOW_SEQS_MAX
from service.tenancy import ConversationKey, OwnerKey
from tests.unit.fake_store import KEY, OWNER, START, encoded, fake_store, matches, message, seqs

bounds = st.integers(0, 40)
ranges = st.builds(lambda low, length: SeqRange(KEY, low, low + length), bounds, bounds)
STATE = ConversationState(KEY, OWNER, 40, START)


def members(part: SeqRange) -> set[int]:
    return {seq for seq in range(1, 100) if part.low < seq <= part.high}


@given(ranges, st.integers(-5, 90), st.integers(-5, 90))
def test_a_clipped_range_is_the_intersection(part: SeqRange, low: int, high: int) -> None:
    assert members(part.clip(low, high)) == members(part) & members(SeqRange(KEY, low, high))
    assert (part.clip(low, high).key, part.clip(low, high).role) == (part.key, part.role)


@given(ranges, st.integers(1, 90), st.booleans())
def test_the_rest_of_a_range_is_what_was_not_passed(part: SeqRange, seq: int, backwards: bool) -> None:
    rest = {each for each in members(part) if (each < seq if backwards else each > seq)}
    assert members(part.rest_after(seq, backwards)) == rest


@given(ranges, st.sampled_from([None, "user", "tool"]), st.integers(1, 90))
def test_the_filter_matches_the_messages_of_the_range(part: SeqRange, role: Any, seq: int) -> None:
    query = SeqRange(part.key, part.low, part.high, role).filter()
    assert matches(query, message(seq)) is (seq in members(part) and role != "tool")
    assert not matches(query, message(seq, key="d"))
    # A role stands before the seq, as it does in the index of roles.
    assert list(query) == ["conversation_id", *(["role"] if role else []), "seq"]


def test_the_whole_of_a_conversation_is_up_to_its_last_seq() -> None:
    assert SeqRange.whole(STATE) == SeqRange(KEY, 0, 40, None, OWNER)


stored = st.dictionaries(
    st.integers(1, 60),
    st.tuples(st.sampled_from(["user", "tool"]), st.sampled_from([OWNER, OWNER, OWNER, OwnerKey("bob")])),
)


@given(
    stored=stored,
    part=ranges,
    role=st.sampled_from([None, "tool"]),
    count=st.integers(1, 20),
    backwards=st.booleans(),
    embedded=st.booleans(),
    owned=st.booleans(),
)
async def test_a_read_returns_the_first_messages_of_the_range(
    *,
    stored: dict[int, tuple[str, str]],
    part: SeqRange,
    role: Any,
    count: int,
    backwards: bool,
    embedded: bool,
    owned: bool,
) -> None:
    part = SeqRange(KEY, part.low, part.high, role, OWNER if owned else None)
    store, database = fake_store(
        [message(seq, owner=owner, role=of) for seq, (of, owner) in stored.items()], embedded=embedded
    )
    found = await seq_range.read(store, part, count, backwards=backwards)
    expected = [
        seq
        for seq, (of, owner) in sorted(stored.items(), reverse=backwards)
        if seq in members(part) and role in {None, of} and not (owned and owner != OWNER)
    ]
    assert seqs(found) == expected[:count]
    if not embedded:
        assert len(database.reads) == 1


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
async def test_messages_of_another_user_hide_none_of_the_owners(embedded: bool, backwards: bool) -> None:
    owners = ["bob", "ada", "bob", "bob", "ada", "bob", "bob", "ada", "bob"]
    store, _ = fake_store([message(seq, owner=each) for seq, each in enumerate(owners, 1)], embedded=embedded)
    found = await seq_range.read(store, SeqRange(KEY, 0, 9, owner=OWNER), 3, backwards=backwards)
    assert seqs(found) == sorted([2, 5, 8], reverse=backwards)


@pytest.mark.parametrize("backwards", [False, True])
async def test_no_window_is_wider_than_the_bound_and_none_is_read_twice(backwards: bool) -> None:
    top = 3 * WINDOW_SEQS_MAX
    only = top if not backwards else 1
    store, database = fake_store([message(only)], embedded=True)
    found = await seq_range.read(store, SeqRange(KEY, 0, top), 2, backwards=backwards)
    assert seqs(found) == [only]
    windows = [(query["seq"]["$gt"], query["seq"]["$lte"]) for query, _ in database.reads]
    widths = [high - low for low, high in windows]
    assert max(widths) == WINDOW_SEQS_MAX
    # Each window is twice as wide as the one before, so a hole costs few reads.
    assert widths[:4] == [2, 4, 8, 16]
    assert len(widths) < 20
    ordered = sorted(windows)
    assert (ordered[0][0], ordered[-1][1]) == (0, top)
    assert all(one[1] == other[0] for one, other in pairwise(ordered))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("gap", [10**5, 10**8, 2**53])
async def test_a_gap_of_any_length_costs_no_more_than_the_messages_do(gap: int, backwards: bool) -> None:
    count = WINDOW_SEQS_MAX + 900
    first = 1 if backwards else gap
    store, database = fake_store([message(first + n) for n in range(count)], embedded=True)
    part = SeqRange(KEY, 0, gap + count, messages=count)
    database.reads_max = 1_000  # else a walk through the longest gap would not end
    found = await seq_range.read(store, part, 50, backwards=backwards)
    expected = range(first, first + count)
    assert seqs(found) == list(reversed(expected[-50:]) if backwards else expected[:50])
    assert len(database.reads) < 200
    assert sum(matched for _, matched in database.reads) <= count


class LongHistory:
    """A history of any length behind a gap: it only counts what a read of it matches."""

    def __init__(self, gap: int) -> None:
        self.gap, self.reads, self.matched = gap, 0, 0

    async def read(self, _: object, query: Any, *, limit: int, **_options: object) -> list[bytes]:
        first = max(query["seq"]["$gt"], self.gap) + 1
        matched = max(0, query["seq"]["$lte"] - first + 1)
        self.reads, self.matched = self.reads + 1, self.matched + matched
        assert self.reads < 10_000
        return [encoded(message(first + n)) for n in range(min(limit, matched))]


@pytest.mark.parametrize("gap", [0, 100, 10**4, 10**6, 10**8])
async def test_a_gap_in_a_long_history_costs_its_root_and_the_dense_part_behind_it_no_more(
    gap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = fake_store(embedded=True)
    history = LongHistory(gap)
    monkeypatch.setattr(store.database, "read", history.read)
    part = SeqRange(KEY, 0, gap + 10**9, messages=10**9)
    assert seqs(await seq_range.read(store, part, 50, backwards=False)) == list(range(gap + 1, gap + 51))
    # An empty read costs the engine about as much as 20 messages. In windows of one width it would be 490,000
    # for the longest of these gaps, and 100,000,000 if each window were twice as wide as the one before.
    cost = 20 * history.reads + history.matched
    assert cost <= 100 + min(2 * gap, WINDOW_SEQS_MAX) + 20 * gap**0.5


async def test_behind_a_gap_the_windows_are_narrow_again() -> None:
    """So a second dense part does not cost what the first gap was wide."""
    last = 10**6 + 3
    store, database = fake_store([message(n) for n in (10**6, last)], embedded=True)
    part = SeqRange(KEY, 0, last + 10**6, messages=10**9)
    assert seqs(await seq_range.read(store, part, 5, backwards=False)) == [10**6, last]
    widths = [query["seq"]["$lte"] - query["seq"]["$gt"] for query, _ in database.reads]
    hit = next(place for place, (_, matched) in enumerate(database.reads) if matched)
    assert widths[hit] > WINDOW_SEQS_MAX
    assert widths[hit + 1] == WINDOW_SEQS_MAX


async def test_a_read_of_a_dense_history_matches_what_it_returns() -> None:
    store, database = fake_store([message(seq) for seq in range(1, 500)], embedded=True)
    assert len(await seq_range.read(store, SeqRange(KEY, 0, 499, owner=OWNER), 10, backwards=True)) == 10
    assert [count for _, count in database.reads] == [10]
    # The owner is not in the filter, because a further field makes the engine read the whole conversation.
    assert "user_id" not in database.reads[0][0]


@pytest.mark.parametrize("embedded", [False, True])
async def test_a_read_ends_where_its_budget_is_spent(embedded: bool) -> None:
    documents = [message(seq) for seq in (1, 2, 3, 40, 41, 42)]
    store, database = fake_store(documents, embedded=embedded)
    budget = Budget(2 * len(encoded(documents[0])))
    found = await seq_range.read(store, SeqRange(KEY, 0, 50), 6, backwards=False, budget=budget)
    assert (seqs(found), budget.spent, len(database.reads)) == ([1, 2], True, 1)


@pytest.mark.parametrize("embedded", [False, True])
async def test_a_message_is_found_by_its_id_in_its_conversation_only(embedded: bool) -> None:
    store, _ = fake_store(
        [message(1), message(2, owner="bob"), message(3, key="d"), message(4, key="c/x")], embedded=embedded
    )
    found = await seq_range.find_message(store, STATE, "m1")
    assert found is not None
    assert (found["id"], found["conversation_id"]) == ("m1", "c")
    for other in ("m2", "m3", "m4", "none"):
        assert await seq_range.find_message(store, STATE, other) is None
    empty = ConversationState(ConversationKey("e"), OWNER, 40, START)
    assert await seq_range.has_message(store, STATE, "m1", Transaction())
    assert not await seq_range.has_message(store, STATE, "m2", Transaction())
    assert await seq_range.has_message(store, STATE, None, Transaction())
    assert not await seq_range.has_message(store, empty, None, Transaction())
