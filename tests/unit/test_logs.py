"""An exception in a log is its type and its place: its text may quote what nobody is to read."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.settings import Settings
from service.telemetry import logging

SECRET = "PLANTED-s3cr3t"


def fail() -> None:
    try:
        _ = dict[str, str]()[SECRET]
    except KeyError as error:
        raise ValueError(f"{SECRET} in a text") from error


@pytest.mark.parametrize("given", ["error", "true", "tuple"])
def test_an_exceptions_text_is_left_out_and_its_place_stays(given: str) -> None:
    try:
        fail()
    except ValueError as error:
        forms: dict[str, Any] = {"error": error, "true": True, "tuple": sys.exc_info()}
        event = logging._exceptions_without_messages(None, "error", {"event": "x", "exc_info": forms[given]})
    assert event["error"] == "ValueError"
    assert any("test_logs.py" in line and line.endswith(" fail") for line in event["where"])
    assert SECRET not in str(event)


def test_a_traceback_as_text_is_its_last_line_and_no_exception_is_no_change() -> None:
    text = "Traceback (most recent call last):\n  File x\nUnsuitableDatabase: no transactions"
    assert logging._exceptions_without_messages(None, "error", {"event": text})["event"].startswith(
        "Unsuitable"
    )
    assert logging._exceptions_without_messages(None, "info", {"event": "fine"}) == {"event": "fine"}


def test_errors_of_ours_say_what_happened_and_have_a_name() -> None:
    assert InvalidRequest("why").slug() == "invalid-request"
    assert str(InvalidRequest()) == InvalidRequest.title


@pytest.mark.parametrize(("no_color", "has_colors"), [("", True), ("1", False)])
def test_colors_are_for_a_terminal_and_for_users_who_want_them(
    no_color: str, has_colors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", no_color)
    line = logging._renderer(Settings(_env_file=None))(None, "info", {"event": "x", "level": "info"})
    assert ("\x1b[" in line) is has_colors
