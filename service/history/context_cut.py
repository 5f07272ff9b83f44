"""Where the context of a model call begins: a pure rule over the end of a history.

A cut falls where a turn begins, or, in a turn that is over the budget by itself, where a step begins; never
between a call and its result. The cut stands on a grid over all that was ever appended, in tokens, messages
or turns. Let `line` be the smallest multiple of `step` behind the beginning of the newest message that does
not fit any more. The cut is the first place at or behind `line`; unless that leaves out more than one `step`
of what fits, and then it is the first place that fits. So it stands still until the next line is crossed, it
never moves back while messages are appended, and it depends on nothing but the stored messages.
tests/unit/test_context_cut.py proves each of these over generated histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from service.formats.message_pieces import Piece, answers, continues_answer
from service.formats.strict_json import Json

Unit = Literal["tokens", "messages", "turns"]


@dataclass
class Entry:
    """A message of a history. `begin` is where it begins on the grid, `tokens_before` the same in tokens."""

    message: Json
    pieces: list[Piece]
    tokens: int
    begins_turn: bool
    tokens_before: int
    begin: int
    # What it takes of the budget, in the unit of the budget.
    weight: int

    @property
    def seq(self) -> int:
        """Return the place of the message in its conversation."""
        return int(self.message["seq"])


@dataclass(frozen=True)
class Window:
    """The newest messages of a history, oldest first; `whole` says that nothing stands before them.

    `opening` is the user's message with which the turn began that stands across the window's beginning.
    """

    entries: Sequence[Entry]
    whole: bool
    opening: Entry | None = None


@dataclass(frozen=True)
class Cut:
    """Where the kept messages begin, as a place in the window, and the user's message of a turn cut through.

    `over_budget` says that not even the last step fits.
    """

    place: int
    opening: Entry | None = None
    over_budget: bool = False


def first_that_fits(entries: Sequence[Entry], budget: int) -> int:
    """Return the first place from which on all messages are within the budget."""
    place, left = len(entries), budget
    while place and entries[place - 1].weight <= left:
        place -= 1
        left -= entries[place].weight
    return place


def choose(window: Window, budget: int, step: int, unit: Unit) -> Cut:
    """Return where the context begins, of a window that reaches behind what fits."""
    entries, end = window.entries, len(window.entries)
    fits = first_that_fits(entries, budget)
    if fits == 0 and window.whole:
        return Cut(0)
    places = places_to_cut(entries, max(fits - 1, 0))
    turns = [place for place in places if place >= fits and entries[place].begins_turn]
    first_turn = turns[0] if turns else end
    steps = [place for place in places if fits <= place < first_turn]
    if steps and _is_divisible(window, first_turn, fits, budget, unit):
        opening = _opening_of(window, steps[0])
        budget -= opening.weight if opening else 0
        fits = first_that_fits(entries, budget)
        if fitting := [place for place in steps if place >= fits]:
            place = _on_grid(entries, fitting, fits, step)
            return Cut(place, _opening_of(window, place))
    if turns:
        return Cut(_on_grid(entries, turns, fits, step))
    return _last_step(window)


def places_to_cut(entries: Sequence[Entry], low: int) -> list[int]:
    """Return where turns and steps begin, from `low` on, but for places between a call and its result."""
    found = [(place, piece) for place in range(low, len(entries)) for piece in entries[place].pieces]
    torn: set[int] = set()
    for call, result in answers([piece for _, piece in found]).items():
        torn.update(range(found[call][0] + 1, found[result][0] + 1))
    return [
        place
        for place in range(low, len(entries))
        if place not in torn and (entries[place].begins_turn or _begins_step(entries, place))
    ]


def _begins_step(entries: Sequence[Entry], place: int) -> bool:
    own = entries[place].pieces
    if place == 0 or not own or not own[0].is_assistants:
        return False
    before = entries[place - 1].pieces
    return not before or not continues_answer(before[-1], own[0])


def _is_divisible(window: Window, first_turn: int, fits: int, budget: int, unit: Unit) -> bool:
    """Tell whether the turn before the first whole one is over the budget by itself, so it may be cut."""
    if first_turn == len(window.entries):
        return True  # it is the last turn, and does not fit
    opening = _opening_of(window, fits)
    if unit == "turns" or opening is None:
        return False
    return window.entries[first_turn].begin - opening.begin > budget


def _opening_of(window: Window, place: int) -> Entry | None:
    """Return the user's message of the turn that goes on at this place; None where the place begins one."""
    entries = window.entries
    if place < len(entries) and entries[place].begins_turn:
        return None
    before = (each for each in reversed(entries[:place]) if each.begins_turn)
    return next(before, window.opening)


def _on_grid(entries: Sequence[Entry], places: Sequence[int], fits: int, step: int) -> int:
    """Return the first place on or behind the line, or the first place, if that saves more than a step."""
    beyond = entries[fits - 1].begin if fits else entries[0].begin - 1
    line = (beyond // step + 1) * step
    first = places[0]
    on_line = next((place for place in places if entries[place].begin >= line), first)
    return on_line if entries[on_line].begin - entries[first].begin <= step else first


def _last_step(window: Window) -> Cut:
    """Return the last step, which is over the budget, with the user's message before it."""
    places = places_to_cut(window.entries, 0)
    place = places[-1] if places else 0
    return Cut(place, _opening_of(window, place), over_budget=True)
