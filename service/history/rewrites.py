"""The parts of a history in which messages were deleted or replaced, kept with their conversation.

A reader that follows a history must learn of them, also where it was away for a while. So the transaction
that deletes or replaces messages also notes in which part it did. A reader looks at such a part again, and
tells what is gone from it and what stands there now.

- There are at most `_MOST` parts, because two are joined to a wider one before there would be more. To look
  at a part that is wider than what changed costs a reader more, and is never wrong.
- So no part is ever forgotten, however long a reader was away (tests/unit/test_rewrites.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.formats.strict_json import Json

# The field of a conversation, and the fields of it that `noting` needs.
FIELD = "rewritten"
FIELDS = ("last_seq", "rewrites", FIELD)
# The conversation is written as a whole at each append, so the list must stay short.
_MOST = 8


@dataclass(frozen=True)
class Rewrite:
    """In `low` < seq <= `high` something was deleted or replaced.

    `number` is the conversation's `rewrites` with the latest such change, and `last_seq` its own then: a
    reader that has a later message was told of the change before it got that message.
    """

    number: int
    last_seq: int
    low: int
    high: int

    def joined(self, later: Rewrite) -> Rewrite:
        """Return one part that has both."""
        return Rewrite(later.number, later.last_seq, min(self.low, later.low), max(self.high, later.high))

    def touches(self, other: Rewrite) -> bool:
        """Tell whether nothing lies between the two."""
        return self.low <= other.high and other.low <= self.high


def noting(locked: Mapping[str, Any], low: int, high: int, counts: Mapping[str, int]) -> Json:
    """Return the update of a locked conversation in which messages in `low` < seq <= `high` are changed.

    `locked` has its FIELDS. The update adds `counts` to the conversation's counters, and 1 to `rewrites` and
    to `version`, unless `counts` has that. Every change of a history that is no append is made with it.
    """
    before, number = read(locked), _int(locked.get("rewrites")) + 1
    parts = with_new(before, Rewrite(number, _int(locked.get("last_seq")), low, high))
    stored = [[each.number, each.last_seq, each.low, each.high] for each in parts]
    return {"$inc": {"version": 1, **counts}, "$set": {"rewrites": number, FIELD: stored}}


def read(conversation: Mapping[str, Any]) -> list[Rewrite]:
    """Return the parts that were changed, in the order of their latest change.

    The last one is numbered as the conversation's `rewrites`. If it is not, somebody changed the conversation
    in another way, and the whole history is one part.
    """
    number, last_seq = _int(conversation.get("rewrites")), _int(conversation.get("last_seq"))
    stored = conversation.get(FIELD)
    try:
        parts = [Rewrite(*map(int, each)) for each in stored or ()]
    except (TypeError, ValueError):
        parts = [Rewrite(number, last_seq, 0, last_seq)]
    if parts and parts[-1].number != number:
        parts = [Rewrite(number, last_seq, 0, last_seq)]
    return parts


def with_new(before: Sequence[Rewrite], new: Rewrite) -> list[Rewrite]:
    """Add a part behind the others, and join neighbours of the list where there would be too many."""
    parts = [*before, new]
    if len(parts) > 1 and parts[-2].touches(new):
        parts[-2:] = [parts[-2].joined(new)]
    while len(parts) > _MOST:
        pairs = list(itertools.pairwise(parts))
        at = min(range(len(pairs)), key=lambda place: _growth(*pairs[place]))
        parts[at : at + 2] = [pairs[at][0].joined(pairs[at][1])]
    return parts


def _growth(one: Rewrite, other: Rewrite) -> int:
    """Return by how many seqs the two parts together are smaller than the one that has both."""
    both = one.joined(other)
    return (both.high - both.low) - (one.high - one.low) - (other.high - other.low)


def _int(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0
