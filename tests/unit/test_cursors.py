"""Cursors of the list of conversations: the position comes back, and only from a cursor of this service."""

from __future__ import annotations

import base64
import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api import bodies
from service.clock import EPOCH, to_milliseconds
from service.errors import InvalidRequest
from service.history.listing import ListPosition
from tests import strategies

moments = st.datetimes(timezones=st.just(UTC)).map(to_milliseconds)
# The second may be longer, because a conversation that was changed by hand may have such an id.
ids = st.one_of(strategies.ids, st.text(strategies.characters, min_size=1).filter(str.isprintable))


@given(moments, ids)
def test_a_position_comes_back_from_its_cursor(time: datetime, conversation_id: str) -> None:
    position = ListPosition(time, conversation_id)
    word = bodies.cursor(position)
    assert bodies.position(word) == position
    assert set(word) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@given(
    st.one_of(
        st.text(max_size=40), st.binary(max_size=40).map(lambda b: base64.urlsafe_b64encode(b).decode())
    )
)
def test_a_word_is_refused_unless_this_service_writes_it(word: str) -> None:
    with contextlib.suppress(InvalidRequest):
        assert bodies.cursor(bodies.position(word)) == word


def forged(text: str | bytes) -> str:
    raw = text if isinstance(text, bytes) else text.encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


@pytest.mark.parametrize(
    "word",
    [
        "",
        "=",
        "é",
        "not a cursor",
        forged("1:c") + "=",  # padded
        forged("1:c") + "\n",
        forged(""),
        forged("1"),
        forged("1:"),
        forged(":c"),
        forged("01:c"),
        forged("+1:c"),
        forged(" 1:c"),
        forged("1_0:c"),
        forged("-0:c"),
        forged("1.5:c"),
        forged("١:c"),  # a digit to Python, and not one that this service writes
        forged("1:a\0b"),
        forged(b"1:\xff"),
        forged(f"{10**15}:c"),  # beyond the year 9999
        forged(f"{10**30}:c"),
        forged(f"{-(10**14)}:c"),
        forged("9" * 5_000 + ":c"),
    ],
    ids=lambda word: word[:20] or "empty",
)
def test_a_forged_cursor_is_refused(word: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bodies.position(word)
    ((fault),) = caught.value.faults
    assert (fault.path, fault.message) == ("query.cursor", "is not a cursor of this service")


def test_a_cursor_is_the_milliseconds_and_the_id() -> None:
    position = ListPosition(EPOCH + timedelta(milliseconds=1), "c")
    assert bodies.cursor(position) == forged("1:c")
    assert bodies.position(forged("-1:c:d")) == ListPosition(EPOCH - timedelta(milliseconds=1), "c:d")
