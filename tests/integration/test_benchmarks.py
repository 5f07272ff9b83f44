"""`make bench` works: the service beside the plain design, with little data and one short round."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plain import goals, measuring, report

ROOT = Path(__file__).parents[2]


def test_the_service_is_measured_beside_the_plain_design(tmp_path: Path) -> None:
    options = ["--plain", "--tiny", "--no-postgres", "--rounds", "2", "--seconds", "0.02"]
    command = [sys.executable, "-m", "benchmarks", *options, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain.md").read_text() in done.stdout
    result = json.loads((tmp_path / "plain.json").read_text())
    measured = {(row["operation"], row["contestant"]) for row in result["rounds"]}
    assert measured == {(name, who) for name in goals.GOALS for who in ("service", "SQLite")}
    for row in result["rounds"]:
        assert row["service_us"] > 0
        assert (row["database_us"] > 0) == (row["contestant"] == "service"), "SQLite runs in the service"
    assert result["memory"]["service_at_rest"] > 10_000_000


def test_answers_that_differ_are_found() -> None:
    one = b'{"data":[{"id":"a","seq":1,"content":"hi"}],"next":1}'
    assert measuring.comparable(one) == measuring.comparable(
        one.replace(b'"a"', b'"b"').replace(b":1}", b":2}")
    )
    assert measuring.comparable(one) != measuring.comparable(one.replace(b"hi", b"ho"))


def rows(*rounds: dict[str, tuple[float, float, float]]) -> list[dict[str, Any]]:
    return [
        {
            "round": number,
            "operation": goals.LIST,
            "contestant": name,
            "service_us": service,
            "database_us": database,
            "per_second": rate,
        }
        for number, of in enumerate(rounds)
        for name, (service, database, rate) in of.items()
    ]


def test_a_ratio_is_taken_to_the_best_of_each_round() -> None:
    first = {"service": (60.0, 60.0, 50.0), "SQLite": (120.0, 0.0, 100.0), "PostgreSQL": (100.0, 40.0, 80.0)}
    noisy = {name: (2 * a, 2 * b, c / 2) for name, (a, b, c) in first.items()}
    found = [report.ratio(rows(first, noisy), goals.LIST, name) for name in report.FIGURES]
    assert found == pytest.approx([0.6, 1.0, 0.5])


@pytest.mark.parametrize(
    ("value", "least", "missed"),
    [(0.5, False, False), (0.7, False, True), (0.5, True, True), (0.7, True, False)],
)
def test_a_missed_goal_is_named(value: float, *, least: bool, missed: bool) -> None:
    assert ("missed" in report.judged(value, 0.6, least=least)) == missed
