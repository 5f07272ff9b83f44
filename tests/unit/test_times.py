"""The times of other programs' files, as an import reads them, and what it says that it changed."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.user_data import import_batches, times
from service.user_data.times import BACKWARDS, BEFORE_1970, MISSING, NO_ZONE, Times

NOON = "2026-01-01T12:00:00Z"
EPOCH = "1970-01-01T00:00:00+00:00"


def read(conversation: dict[str, Any], *created: Any) -> tuple[dict[str, Any], list[Any], dict[str, int]]:
    """Return the conversation, its messages' times, and what was changed; `...` stands for no time at all."""
    changed: Counter[str] = Counter()
    messages = [{} if each is ... else {"created_at": each} for each in created]
    of = Times(changed)
    shown = of.of_conversation(conversation, messages[0] if messages else {}, "2027-01-01T00:00:00Z")
    return shown, [each["created_at"] for each in of.of_messages(iter(messages))], dict(changed)


def told(**more: Any) -> dict[str, Any]:
    return {"created_at": NOON, "updated_at": "2026-01-03T00:00:00Z", **more}


@pytest.mark.parametrize(
    ("given_times", "read_times", "changed"),
    [
        ([NOON, NOON, "2026-01-01T12:00:00.001Z"], [NOON, NOON, "2026-01-01T12:00:00.001Z"], {}),
        (["2026-01-01T13:00:00+01:00", NOON], ["2026-01-01T13:00:00+01:00", NOON], {}),
        (["2026-01-01T12:00:00"], ["2026-01-01T12:00:00+00:00"], {NO_ZONE: 1}),
        (
            ["2026-01-01 12:00", "2026-01-02"],
            ["2026-01-01T12:00:00+00:00", "2026-01-02T00:00:00+00:00"],
            {NO_ZONE: 2},
        ),
        ([..., None, "2026-01-02T00:00:00Z", ...], [NOON, NOON, *["2026-01-02T00:00:00Z"] * 2], {MISSING: 3}),
        (["2026-01-02T00:00:00Z", NOON, NOON], ["2026-01-02T00:00:00Z"] * 3, {BACKWARDS: 2}),
        (["1969-12-31T23:59:59.999Z", "0001-01-01T00:00:00"], [EPOCH, EPOCH], {BEFORE_1970: 2, NO_ZONE: 1}),
        (["0001-01-01T00:00:00+23:00"], [EPOCH], {BEFORE_1970: 1}),
        (["1970-01-01T00:30:00+01:00"], [EPOCH], {BEFORE_1970: 1}),
        (["2026-01-04T00:00:00Z"], ["2026-01-04T00:00:00Z"], {BACKWARDS: 1}),  # after the last change
        (["soon", 7, NOON], ["soon", 7, NOON], {}),  # refused later, with the place
    ],
    ids=str,
)
def test_times_of_messages_are_read_as_they_can_be_stored(
    given_times: list[Any], read_times: list[Any], changed: dict[str, int]
) -> None:
    assert read(told(), *given_times)[1:] == (read_times, changed)


@pytest.mark.parametrize(
    ("conversation", "first", "expected", "changed"),
    [
        (told(), [], told(), {}),
        ({}, [NOON], {"created_at": NOON, "updated_at": NOON}, {MISSING: 2}),
        ({}, [], dict.fromkeys(("created_at", "updated_at"), "2027-01-01T00:00:00Z"), {MISSING: 2}),
        (
            {"created_at": "2026-01-01T12:00:00", "updated_at": None},
            [],
            dict.fromkeys(("created_at", "updated_at"), "2026-01-01T12:00:00+00:00"),
            {NO_ZONE: 1, MISSING: 1},
        ),
        (
            told(expires_at="2030-01-01T00:00:00"),
            [],
            told(expires_at="2030-01-01T00:00:00+00:00"),
            {NO_ZONE: 1},
        ),
        (told(expires_at=None), [], told(expires_at=None), {}),
        (told(created_at="1960-01-01T00:00:00Z"), [], told(created_at=EPOCH), {BEFORE_1970: 1}),
    ],
    ids=str,
)
def test_times_of_a_conversation_are_read_as_they_can_be_stored(
    conversation: dict[str, Any], first: list[Any], expected: dict[str, Any], changed: dict[str, int]
) -> None:
    shown, _, said = read(conversation, *first)
    assert (shown, said) == (expected, changed)


_ZONES = st.one_of(st.none(), st.integers(-1439, 1439).map(lambda m: timezone(timedelta(minutes=m))))
_LOCAL = st.datetimes(max_value=datetime(9998, 1, 1))  # noqa: DTZ001  (the strategy asks for none)
_WRITTEN = st.builds(lambda time, zone: time.replace(tzinfo=zone).isoformat(), _LOCAL, _ZONES)
_ANY = st.one_of(st.just(...), st.none(), _WRITTEN)


@given(st.lists(_ANY, max_size=8))
def test_whatever_times_there_are_the_import_takes_what_is_read(given_times: list[Any]) -> None:
    shown, found, changed = read(told(), *given_times)
    taken = [import_batches.time_of({"created_at": each}) for each in found]
    assert taken == sorted(taken)
    wanted = [each for each in given_times if each not in (..., None)]
    unchanged = [datetime.fromisoformat(each).replace(tzinfo=None) for each in wanted]
    if not changed:
        assert [datetime.fromisoformat(each).replace(tzinfo=None) for each in found] == unchanged
    # What is read once is read the same again.
    assert read(shown, *found)[1] == found


def test_the_first_time_that_is_stored_is_one_of_utc() -> None:
    assert times._time(EPOCH) == datetime(1970, 1, 1, tzinfo=UTC)
