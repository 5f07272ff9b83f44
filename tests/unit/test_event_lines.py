"""The client's reader of server-sent events, at every place where the network may cut them."""

from __future__ import annotations

import pytest

from chat_history_client._tail import EventLines

STREAM = (
    "retry: 1000\n"
    'id: 1\nevent: message\ndata: {"content":"a\u2028b\x85c: d"}\n\n'
    ":\n"
    ": a comment\n\n"
    "id: 7\n\n"
    "data:first\ndata: second\nunknown: x\n\n"
    'id: 2\nevent: head\ndata: {"last_seq":2}\n\n'
    "id: 3\nevent: message\ndata: not complete\n"
).encode()
EVENTS = [
    {"retry": "1000", "id": "1", "event": "message", "data": '{"content":"a\u2028b\x85c: d"}'},
    {"data": "first\nsecond", "unknown": "x"},
    {"id": "2", "event": "head", "data": '{"last_seq":2}'},
]


def read(lines: EventLines, *chunks: bytes) -> list[dict[str, str]]:
    return [event for chunk in chunks for event in lines.complete_with(chunk)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, len(STREAM)])
def test_events_are_the_same_however_the_stream_is_cut_into_chunks(size: int) -> None:
    chunks = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert read(EventLines(), *chunks) == EVENTS


def test_events_are_the_same_when_the_stream_is_cut_once_at_any_place() -> None:
    for at in range(len(STREAM)):
        assert read(EventLines(), STREAM[:at], STREAM[at:]) == EVENTS


def test_an_event_that_was_not_complete_is_dropped_when_the_answer_is_asked_for_again() -> None:
    lines = EventLines()
    for at in range(len(STREAM)):
        read(lines, STREAM[:at])
        lines.restart()
        assert read(lines, STREAM) == EVENTS
        lines.restart()
