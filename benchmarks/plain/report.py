"""From the rounds to medians, ratios and goals: tables in Markdown, and a file of JSON to compare runs with."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.plain.goals import APPEND, APPEND_MANY, GOALS, Goal

Row = dict[str, Any]
FIGURES = ("service_us", "total_us", "rate")
NAMES = {"service": "the service", "PostgreSQL": "plain, PostgreSQL", "SQLite": "plain, SQLite"}


def figure(row: Row, name: str) -> float:
    """Return a figure of a measurement by its name in `FIGURES`."""
    if name == "total_us":
        return float(row["service_us"] + row["database_us"])
    return float(row["per_second" if name == "rate" else name])


def median(rows: list[Row], operation: str, contestant: str, name: str) -> float:
    """Return the median of a figure over the rounds."""
    of = [row for row in rows if (row["operation"], row["contestant"]) == (operation, contestant)]
    return statistics.median(float(row[name]) for row in of)


def ratio(rows: list[Row], operation: str, name: str) -> float:
    """Return the median over the rounds of the service's figure to the plain design's best of the same round."""
    best = max if name == "rate" else min
    ratios = []
    for number in sorted({row["round"] for row in rows}):
        of = [row for row in rows if row["round"] == number and row["operation"] == operation]
        mine = next(figure(row, name) for row in of if row["contestant"] == "service")
        ratios.append(mine / best(figure(row, name) for row in of if row["contestant"] != "service"))
    return statistics.median(ratios)


def many_to_one(rows: list[Row]) -> float:
    """Return the median over the rounds of the service's appends/s with 16 clients to those with one."""
    of = {
        (row["round"], row["operation"]): row["per_second"] for row in rows if row["contestant"] == "service"
    }
    rounds = {number for number, _ in of}
    return float(statistics.median(of[number, APPEND_MANY] / of[number, APPEND] for number in rounds))


def goal_of(goal: Goal, name: str) -> float | None:
    """Return the bound of a figure, or None."""
    return {"service_us": goal.service, "total_us": goal.total, "rate": goal.rate}[name]


def judged(value: float, bound: float | None, *, least: bool) -> str:
    """Return a ratio with its goal, and whether it is met."""
    if bound is None:
        return f"{value:.2f}"
    met = value >= bound if least else value <= bound
    return f"{value:.2f} ({'≥' if least else '≤'} {bound:g}{'' if met else ', **missed**'})"


def names(rows: list[Row], column: str) -> list[str]:
    """Return the names in a column, each once, in their order."""
    return list(dict.fromkeys(str(row[column]) for row in rows))


def table(result: Row) -> str:
    """Return the table of the goals: the CPU time of service + database in µs · operations/s, and ratios."""
    rows = result["rounds"]
    who = sorted(names(rows, "contestant"), key=list(NAMES).index)
    who = [*(each for each in who if each != "service"), "service"]
    head = ["operation", *(NAMES[each] for each in who), "service CPU", "service + engine", "operations/s"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for operation in names(rows, "operation"):
        cells = [_cell(rows, operation, each) for each in who]
        cells += [
            judged(ratio(rows, operation, name), goal_of(GOALS[operation], name), least=name == "rate")
            if name != "total_us" or result["about"]["database"] != "MongoDB"
            else "–"
            for name in FIGURES
        ]
        lines.append(f"| {operation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[Row], operation: str, contestant: str) -> str:
    service, database, rate = (
        median(rows, operation, contestant, name) for name in ("service_us", "database_us", "per_second")
    )
    return f"{service:,.0f}{f' + {database:,.0f}' if database >= 1 else ''} · {rate:,.0f}/s"


def latencies(result: Row) -> str:
    """Return the table of p50 and p99, and what the client itself costs."""
    rows = result["rounds"]
    who = names(rows, "contestant")
    columns = [("p50_ms", "p50 ms"), ("p99_ms", "p99 ms"), ("client_us", "client µs")]
    head = ["operation", *(f"{NAMES[each]}: {', '.join(title for _, title in columns)}" for each in who)]
    lines = [f"| {' | '.join(head)} |", "| --- " + "| ---: " * len(who) + "|"]
    for operation in names(rows, "operation"):
        cells = [
            ", ".join(
                f"{median(rows, operation, each, name):,.{0 if name == 'client_us' else 1}f}"
                for name, _ in columns
            )
            for each in who
        ]
        lines.append(f"| {operation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory(result: Row) -> str:
    """Return the table of resident memory."""
    lines = ["| memory of a process | MB |", "| --- | ---: |"]
    for name, size in result["memory"].items():
        for extra, value in size.items() if isinstance(size, dict) else [("", size)]:
            title = f"{name.replace('_', ' ')} {extra}".strip()
            lines.append(f"| {title} | {value / 1e6:.0f} |")
    return "\n".join(lines)


def compared(result: Row, before: Row) -> str:
    """Return the service of this run to that of an earlier one, in its ratios to the plain design."""
    lines = ["| operation | service CPU before | now | operations/s before | now |", "| --- " * 5 + "|"]
    known = names(before["rounds"], "operation")
    for operation in names(result["rounds"], "operation"):
        if operation in known:
            cells = [
                f"{ratio(each['rounds'], operation, name):.2f}"
                for name in ("service_us", "rate")
                for each in (before, result)
            ]
            lines.append(f"| {operation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def text(result: Row, before: Row | None) -> str:
    """Return all tables."""
    about, rows = result["about"], result["rounds"]
    parts = [
        f"Measured on {about['date']}: {about['machine']}, {about['database']}, "
        f"{'everything on one core' if about['pinned'] else 'not pinned to a core'}, load {about['load']:.1f}; medians "
        f"of {about['rounds']} interleaved rounds of {about['seconds']} s each, in {about['took_s']} s "
        "(`make bench BENCH=--plain`). A figure is the CPU time of the service process + that of its database in µs "
        "· operations/s. A ratio is the service to the best of the plain design in the same round, with its goal.",
        table(result),
    ]
    if {APPEND, APPEND_MANY} <= set(names(rows, "operation")):
        ratio_of_16 = judged(many_to_one(rows), 1, least=True)
        parts.append(f"Appends/s of the service with 16 clients to those with one: {ratio_of_16}.")
    parts += [latencies(result), memory(result)]
    if before is not None:
        parts.append(f"Compared with the run of {before['about']['date']}:\n\n{compared(result, before)}")
    return "\n\n".join(parts) + "\n"


def write(result: Row, output: Path, before: Row | None = None) -> None:
    """Print the tables, and write them and the rounds."""
    shown = text(result, before)
    print(shown)
    output.mkdir(parents=True, exist_ok=True)
    (output / "plain.md").write_text(shown)
    (output / "plain.json").write_text(json.dumps(result, indent=1) + "\n")
