"""Budgets of answers, which need no database."""

from __future__ import annotations

import pytest

from service.database import Budget


@pytest.mark.parametrize(
    ("bytes_left", "sizes", "admitted", "spent"),
    [
        (10, [4, 6], [True, True], False),
        (10, [4, 7], [True, False], True),
        (10, [11], [True], False),  # the first document fits whatever its size
        (10, [11, 1], [True, False], True),
        (0, [0, 0], [True, True], False),
        (0, [1, 0], [True, False], True),
        (10, [], [], False),
    ],
)
def test_a_budget_admits_documents_until_one_does_not_fit(
    bytes_left: int, sizes: list[int], admitted: list[bool], spent: bool
) -> None:
    budget = Budget(bytes_left)
    assert [budget.admits(b"x" * size) for size in sizes] == admitted
    assert budget.spent is spent
