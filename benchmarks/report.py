"""From the rounds to medians and ratios, as tables in Markdown."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

NAMES = {"langchain": "LangChain", "agents-mongodb": "Agents/Mongo", "agents-sqlite": "Agents/SQLite"}
Key = tuple[str, int, str]


def medians(rounds: list[dict[str, Any]]) -> dict[Key, dict[str, float]]:
    """Return the median over the rounds of every figure, and the spread of operations per second."""
    grouped: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for row in rounds:
        grouped[row["operation"], row["concurrency"], row["contestant"]].append(row)
    found = {}
    for key, rows in grouped.items():
        figures = ("per_second", "cpu_us", "p50_ms", "p95_ms", "p99_ms")
        found[key] = {name: statistics.median(row[name] for row in rows) for name in figures}
        rates = [row["per_second"] for row in rows]
        found[key]["spread"] = (max(rates) - min(rates)) / found[key]["per_second"]
    return found


def ratio(rounds: list[dict[str, Any]], of: Key, to: list[Key], figure: str) -> float | None:
    """Return the median over the rounds of one figure to the sum of others, taken in the same round."""
    values: dict[int, dict[Key, float]] = defaultdict(dict)
    for row in rounds:
        values[row["round"]][row["operation"], row["concurrency"], row["contestant"]] = row[figure]
    ratios = [
        each[of] / sum(each[key] for key in to)
        for each in values.values()
        if of in each and all(key in each for key in to)
    ]
    return statistics.median(ratios) if ratios else None


def table(result: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    rounds, found = result["rounds"], medians(result["rounds"])
    head = "| operation | at once | per second | spread | p50 ms | p95 ms | p99 ms | CPU µs | floor µs | CPU / floor |"
    lines = [head, "| --- " + "| ---: " * 9 + "|"]
    for (operation, concurrency, contestant), row in found.items():
        if contestant != "service":
            continue
        keys = [(operation, concurrency, each) for each in ("floor", "motor")]
        floor = sum(found[key]["cpu_us"] for key in keys)
        times = ratio(rounds, (operation, concurrency, "service"), keys, "cpu_us")
        lines.append(
            f"| {operation} | {concurrency} | {row['per_second']:,.0f} | {row['spread']:.0%} | {row['p50_ms']:.1f} "
            f"| {row['p95_ms']:.1f} | {row['p99_ms']:.1f} | {row['cpu_us']:,.0f} | {floor:,.0f} | {times:.2f} |"
        )
    return "\n".join(lines)


def others(result: dict[str, Any]) -> str:
    """Return the comparison with what people use instead: operations per second, one at a time."""
    found = medians(result["rounds"])
    present = [name for name in NAMES if any(key[2] == name for key in found)]
    if not present:
        return "(not measured)"
    lines = ["| operation | the service, over HTTP | " + " | ".join(NAMES[each] for each in present) + " |"]
    lines.append("| --- " + "| ---: " * (len(present) + 1) + "|")
    for operation, concurrency, contestant in found:
        keys = [(operation, concurrency, each) for each in present]
        if contestant == "service" and concurrency == 1 and keys[0] in found:
            rates = [found[key]["per_second"] for key in [(operation, 1, "service"), *keys]]
            lines.append(f"| {operation} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
    return "\n".join(lines)


def goals(result: dict[str, Any]) -> str:
    """Return the lines of the goals, each with its figure, met or not."""
    rounds = result["rounds"]

    def to(
        one: str, other: str, figure: str, who: str = "service", other_who: str = "service", c: int = 1
    ) -> Any:
        return ratio(rounds, (one, c, who), [(other, c, other_who)], figure)

    lines = []

    def goal(name: str, value: float | None, limit: float, *, least: bool = False) -> None:
        if value is not None:
            met = value >= limit if least else value <= limit
            bound = "at least" if least else "at most"
            lines.append(f"| {name} | {value:.2f} | {bound} {limit:g} | {'met' if met else 'not met'} |")

    for name in ("append 1", "append 4", "turn: last 50, append 4", "last 50 of 10,000", "list 20 of 10,000"):
        keys = [(name, 1, "floor"), (name, 1, "motor")]
        goal(f"CPU to floor, {name}", ratio(rounds, (name, 1, "service"), keys, "cpu_us"), 1.3)
    for figure in ("p50_ms", "cpu_us"):
        value = to("last 50 of 100,000", "last 50 of 100", figure)
        goal(f"last 50 of 100,000 to that of 100, {figure[:3]}", value, 1.1)
        goal(
            f"list 20 of 10,000 to that of 10, {figure[:3]}",
            to("list 20 of 10,000", "list 20 of 10", figure),
            1.1,
        )
    batch = to("append 100", "append 1", "p50_ms")
    goal("a message in a batch of 100 to one alone, p50", batch / 100 if batch else None, 0.1)
    writers = to("append 1", "append 1", "per_second", "service", "motor", 16)
    goal("16 writers to bare Motor without HTTP, append 1", writers, 0.95, least=True)
    for name in ("append 1", "append 4"):
        bare = to(name, name, "per_second", "service", "bare service", 16)
        goal(f"16 writers to a bare route over bare Motor, {name}", bare, 0.95, least=True)
    goal("memory grown by a stream of 100,000 messages, MB", result["stream"]["grown_megabytes"], 16)
    return "\n".join(["| goal | figure | bound | |", "| --- | ---: | --- | --- |", *lines])


def write(result: dict[str, Any], output: Path) -> None:
    """Print the tables, and write them to `results.md`."""
    about, started = result["about"], result["start_up"]
    memory = result["stream"]
    text = (
        f"Measured on {about['date']}: {about['machine']}, {about['database']}; medians of {about['rounds']} "
        f"interleaved rounds of {about['seconds']} s each, in {about['took_s']} s (`make bench`).\n\n{table(result)}\n\n"
        f"{goals(result)}\n\n{others(result)}\n\n"
        f"Streaming {memory['megabytes']:.0f} MB grew the service from {memory['before_megabytes']:.0f} MB by "
        f"{memory['grown_megabytes']:.1f} MB. From the start of `chat-history serve` on an existing data directory to "
        f"its first answer: {started['median_s']:.2f} s.\n"
    )
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.md").write_text(text)
