"""Simulates how often the cut of a context moves, and how much of what is sent is an unchanged prefix.

`python -m benchmarks.context_cut` prints docs/context.md's table: 3,000 turns of an agent that asks for its
context at each turn, by the rule of the service (`keep_ratio` 0.7) and by "the newest that fit" (1.0). It
needs no database.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from service.formats.message_pieces import begins_turn, pieces, tokens_of
from service.history.context import ContextRequest
from service.history.context_cut import Entry, Window, choose, first_that_fits

Json = dict[str, Any]
_BUDGETS, _TURNS = (4_000, 8_000, 32_000, 128_000), 3_000


@dataclass(frozen=True)
class Result:
    """In what share of the turns the cut moved, and what share of all tokens was sent just so before."""

    moved: float
    unchanged: float

    def __str__(self) -> str:
        return f"the cut moves in {self.moved:.1%} of turns, {self.unchanged:.1%} is an unchanged prefix"


def turn_of(random_: random.Random, number: int) -> list[Json]:
    """Return a turn of some 500 tokens: a question, up to three calls of tools, an answer."""
    found: list[Json] = [{"role": "user", "content": "q" * random_.randint(40, 300)}]
    for step in range(random_.choice([0, 0, 1, 1, 2, 3])):
        call_id = f"c{number}.{step}"
        call = {"id": call_id, "type": "function", "function": {"name": "search", "arguments": "{}"}}
        found.append({"role": "assistant", "content": None, "tool_calls": [call]})
        result = "r" * random_.randint(100, 1_500)
        found.append({"role": "tool", "tool_call_id": call_id, "content": result})
    return [*found, {"role": "assistant", "content": "a" * random_.randint(100, 1_200)}]


def simulate(turns: int, most: int, keep_ratio: float, seed: int = 17) -> Result:
    """Return what an agent sees that asks for its context at the end of each turn."""
    random_, wanted = random.Random(seed), ContextRequest("tokens", most, keep_ratio=keep_ratio)
    entries: list[Entry] = []
    seq = total = before = before_end = moved = sent = unchanged = 0
    for number in range(turns):
        for fields in turn_of(random_, number):
            seq += 1
            message = {"seq": seq, "id": f"m{seq}", **fields}
            tokens = tokens_of(message)[0]
            entries.append(
                Entry(message, pieces(message), tokens, begins_turn(message), total, total, tokens)
            )
            total += tokens
        fits = first_that_fits(entries, most)
        entries = entries[max(fits - 1, 0) :]
        cut = choose(Window(entries, whole=fits == 0), most, wanted.step, "tokens")
        begin = entries[cut.place].tokens_before
        sent += total - begin
        if begin == before:
            unchanged += before_end - before
        else:
            moved += 1
        before, before_end = begin, total
    return Result(moved / turns, unchanged / sent)


def main() -> None:
    """Print the table."""
    print("| budget in tokens | keep_ratio | the cut moves in | unchanged prefix |")
    print("| --- | --- | --- | --- |")
    for most in _BUDGETS:
        for keep_ratio in (1.0, 0.9, 0.7, 0.5):
            result = simulate(_TURNS, most, keep_ratio)
            print(f"| {most:,} | {keep_ratio} | {result.moved:.1%} of turns | {result.unchanged:.1%} |")


if __name__ == "__main__":
    main()
