"""The parts of a history that were changed: few, and never one too few."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from service.history import rewrites

Json = dict[str, Any]
CHANGES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=60
)


def after(conversation: Json, low: int, high: int) -> Json:
    """The conversation as a database stores it with the update."""
    update = rewrites.noting(conversation, low, high, {"message_count": -1})
    changed = {**conversation, **update["$set"]}
    for name, by in update["$inc"].items():
        changed[name] = changed.get(name, 0) + by
    return changed


@given(CHANGES)
def test_a_reader_who_was_away_is_told_of_every_part_that_was_changed(
    changes: list[tuple[int, int, int]],
) -> None:
    conversation: Json = {"last_seq": 0, "rewrites": 7}
    made: list[tuple[int, int, int, int]] = []
    for appended, low, width in changes:
        conversation["last_seq"] += appended
        high = min(low + width, conversation["last_seq"])
        if low >= high:
            continue
        conversation = after(conversation, low, high)
        made.append((conversation["rewrites"], conversation["last_seq"], low, high))
    parts = rewrites.read(conversation)
    assert len(parts) <= 8
    for number, last_seq, low, high in made:
        # By the number before the change, and by any seq that the reader may have had then.
        assert any(each.number >= number and each.low <= low and high <= each.high for each in parts)
        assert any(each.last_seq >= last_seq and each.low <= low and high <= each.high for each in parts)
    assert [each.number for each in parts] == sorted(each.number for each in parts)


def test_messages_that_are_popped_one_after_the_other_are_one_part() -> None:
    conversation: Json = {"last_seq": 100, "rewrites": 0}
    for seq in range(100, 50, -1):
        conversation = after(conversation, seq - 1, seq)
    assert rewrites.read(conversation) == [rewrites.Rewrite(50, 100, 50, 100)]


def test_the_parts_that_are_joined_are_those_that_lie_near_each_other() -> None:
    conversation: Json = {"last_seq": 10_000, "rewrites": 0}
    for seq in (1, 1_000, 1_003, 2_000, 3_000, 4_000, 5_000, 6_000, 7_000):
        conversation = after(conversation, seq - 1, seq)
    assert [(each.low, each.high) for each in rewrites.read(conversation)][:3] == [
        (0, 1),
        (999, 1_003),
        (1_999, 2_000),
    ]


def test_a_change_that_noted_no_part_makes_the_whole_history_one() -> None:
    conversation: Json = after({"last_seq": 9, "rewrites": 0}, 3, 4)
    conversation["rewrites"] += 1
    assert rewrites.read(conversation) == [rewrites.Rewrite(2, 9, 0, 9)]
    conversation["rewritten"] = "by hand"
    assert rewrites.read(conversation) == [rewrites.Rewrite(2, 9, 0, 9)]
    assert rewrites.read({"last_seq": 9}) == []
