"""The context of a model call: the head, the newest summary, and as much of the end as the budget holds.

It needs no state: where it begins follows from the stored messages (`context_cut`). The grid on which it
begins counts from the totals that each message keeps of all messages before it (`appending.insert`). They
never change, so deletions and replacements leave holes in the grid, and move no cut. A message that has none,
because an earlier version or an import stored it, begins as many tokens before the next message as it has, so
reading backwards finds its place, too. The cost is that of the answer: the end is read backwards until it is
over the budget, and one query more finds the user's message of a turn that is cut through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from service.database import Budget
from service.formats import message_pieces, model_input, strict_json
from service.formats.message_pieces import Arranged, Piece, begins_turn, pieces, tokens_of
from service.formats.strict_json import Json
from service.history import checkpoints, context_cut, records, seq_range
from service.history.context_cut import Entry, Unit, Window
from service.history.records import ConversationState, Totals
from service.history.seq_range import SeqRange
from service.history.store import ConversationStore
from service.tenancy import ConversationRef

Form = Literal["native", "openai", "responses", "anthropic"]
_HEAD_ITEMS = 2
_CHUNK_ITEMS = 64
_HEAD_ROLES = frozenset({"system", "developer"})


@dataclass(frozen=True)
class ShortenedResults:
    """Results of tools that are older than the newest `keep`, and have more tokens than `over`."""

    keep: int
    over: int


@dataclass(frozen=True)
class ContextRequest:
    """The context that a caller asks for: at most so many tokens, messages or turns, in a form.

    When it would be larger, it is cut down to about `keep_ratio` of that, so that it then stays as it is for
    a while.
    """

    unit: Unit
    most: int
    keep_ratio: float = 0.7
    form: Form = "native"
    shortened: ShortenedResults | None = None
    repair: bool = False

    @property
    def step(self) -> int:
        """Return the distance of the lines of the grid."""
        return max(1, round(self.most * (1 - self.keep_ratio)))


@dataclass
class _History:
    """What is read of a conversation: its head, its newest checkpoint, and its end."""

    head: list[Json]
    origin: Totals | None
    checkpoint: Json | None
    window: Window
    budget: int
    size: int


async def context(store: ConversationStore, ref: ConversationRef, wanted: ContextRequest) -> Json:
    """Return the context of a model call; see `ChatService.get_context`."""
    async with store.reading():
        of = await store.state(ref)
        history = await _read(store, of, wanted)
    return await strict_json.beside(history.size, lambda: _composed(of, history, wanted))


# -- reading ---------------------------------------------------------------------------------------


async def _read(store: ConversationStore, of: ConversationState, wanted: ContextRequest) -> _History:
    head, origin, head_bytes = await _head(store, of)
    checkpoint = await checkpoints.newest(store, of)
    low = max(checkpoint["upto_seq"] if checkpoint else 0, head[-1]["seq"] if head else 0)
    budget = wanted.most - _weight_of_front(head, checkpoint, wanted.unit)
    bytes_left = Budget(max(0, store.settings.page_bytes_max - head_bytes))
    window = await _window(
        store,
        of,
        SeqRange(of.key, low, of.last_seq, owner=of.owner),
        unit=wanted.unit,
        budget=budget,
        bytes_left=bytes_left,
    )
    size = sum(4 * each.tokens for each in window.entries)
    return _History(head, origin, checkpoint, window, budget, size)


async def _head(store: ConversationStore, of: ConversationState) -> tuple[list[Json], Totals | None, int]:
    """Return the system messages with which the history begins, and the size of them.

    The second result are the totals of the first message of all.
    """
    part, bytes_left = SeqRange.whole(of), Budget(store.settings.page_bytes_max)
    head, origin, size = list[Json](), None, 0
    while True:
        raw = await seq_range.read(store, part, _HEAD_ITEMS, backwards=False, budget=bytes_left)
        found = records.with_totals(raw)
        if found and not head:
            origin = found[0][1]
        leading = _leading(message for message, _ in found)
        head += leading
        size += sum(map(len, raw[: len(leading)]))
        if len(leading) < _HEAD_ITEMS or bytes_left.spent:
            return head, origin, size
        part = part.rest_after(head[-1]["seq"], backwards=False)


def _leading(messages: Iterable[Json]) -> list[Json]:
    leading = []
    for message in messages:
        if message.get("role") not in _HEAD_ROLES:
            break
        leading.append(message)
    return leading


def _weight_of_front(head: Sequence[Json], checkpoint: Json | None, unit: Unit) -> int:
    """Return what the head and the summary take of the budget."""
    front = [*head, *_summary(checkpoint)]
    if unit == "turns":
        return 0
    return len(front) if unit == "messages" else sum(tokens_of(each)[0] for each in front)


def _summary(checkpoint: Json | None) -> list[Json]:
    if checkpoint is None:
        return []
    return [message_pieces.summary_message(checkpoint["upto_seq"], checkpoint["summary"])]


async def _window(
    store: ConversationStore,
    of: ConversationState,
    part: SeqRange,
    *,
    unit: Unit,
    budget: int,
    bytes_left: Budget,
) -> Window:
    """Read the end of a history backwards, until one message more is there than the budget holds."""
    low, newest_first, left = part.low, list[Entry](), budget
    while part.low < part.high:
        raw = await seq_range.read(store, part, _CHUNK_ITEMS, backwards=True, budget=bytes_left)
        for message, totals in records.with_totals(raw):
            newest_first.append(_entry(of, unit, message, totals, newest_first[-1] if newest_first else None))
            left -= newest_first[-1].weight
        whole = len(raw) < _CHUNK_ITEMS and not bytes_left.spent
        # Where no step begins within the budget, the last one is looked for behind it.
        if whole or bytes_left.spent or (left < 0 and context_cut.places_to_cut(newest_first[::-1], 0)):
            break
        part = part.rest_after(newest_first[-1].seq, backwards=True)
    else:
        whole = True
    entries = newest_first[::-1]
    if unit == "tokens":
        _reserve_missing_results(entries)
    fits = context_cut.first_that_fits(entries, budget)
    if fits == 0 and whole:
        return Window(entries, whole=True)
    if context_cut.places_to_cut(entries, fits):
        entries = entries[max(fits - 1, 0) :]
    if entries[0].begins_turn or (unit == "turns" and _has_place_of_turn(entries)):
        return Window(entries, whole)
    return Window(
        entries, whole, await _opening(store, of, part.clip(low, entries[0].seq - 1), entries[0], unit)
    )


def _has_place_of_turn(entries: Sequence[Entry]) -> bool:
    """Tell whether a cut may fall where a turn begins; a result that comes later forbids it."""
    return any(entries[place].begins_turn for place in context_cut.places_to_cut(entries, 0))


def _entry(
    of: ConversationState, unit: Unit, message: Json, totals: Totals | None, after: Entry | None
) -> Entry:
    """Place a message on the grid, by its own totals, or by the message behind it."""
    tokens, turn = tokens_of(message)[0], begins_turn(message)
    # The minimum keeps the order also where processes of an earlier version append without totals.
    tokens_after = after.tokens_before if after else of.tokens_total
    tokens_before = min(totals.tokens if totals else tokens_after - tokens, tokens_after)
    if unit == "tokens":
        begin, weight = tokens_before, tokens
    elif unit == "messages":
        begin, weight = message["seq"] - 1, 1
    else:
        # The number of its turn. A turn weighs at its end, because nothing before its end fits without it.
        weight = int(after is None or after.begins_turn)
        turn_after = after.begin if after else of.turns_total
        begin = min(totals.turns - (not turn) if totals else turn_after - weight, turn_after)
    return Entry(message, pieces(message), tokens, turn, tokens_before, begin, weight)


def _reserve_missing_results(entries: Sequence[Entry]) -> None:
    """Reserve room for the texts that stand for missing results, and keep it if a result comes late."""
    found = [(entry, piece) for entry in entries for piece in entry.pieces]
    for place in message_pieces.unanswered_in_time([piece for _, piece in found]):
        entry, call = found[place]
        entry.weight += tokens_of(message_pieces.no_result_message(call.call_id))[0]


async def _opening(
    store: ConversationStore, of: ConversationState, before: SeqRange, first: Entry, unit: Unit
) -> Entry | None:
    """Find the user's message with which a turn began, before the first message that was read."""
    part, count = SeqRange(before.key, before.low, before.high, "user", before.owner), 1
    while part.low < part.high:
        raw = await seq_range.read(store, part, count, backwards=True)
        for message, totals in records.with_totals(raw):
            if begins_turn(message):
                # Without totals it is as near as it can be, so that no turn is thought to be too long.
                return _entry(of, unit, message, totals or Totals(first.tokens_before, first.begin), first)
        if len(raw) < count:
            return None
        # In Anthropic's form, results of tools are users' messages, too, and no turn begins there.
        part = part.rest_after(records.message(raw[-1])["seq"], backwards=True)
        count = min(4 * count, _CHUNK_ITEMS)
    return None


# -- the answer ------------------------------------------------------------------------------------


def _composed(of: ConversationState, history: _History, wanted: ContextRequest) -> Json:
    cut = context_cut.choose(history.window, history.budget, wanted.step, wanted.unit)
    kept = list(history.window.entries[cut.place :])
    opening = [cut.opening] if cut.opening else []
    messages = [
        *history.head,
        *_summary(history.checkpoint),
        *(each.message for each in opening),
        *_shortened(kept, of, wanted),
    ]
    arranged = message_pieces.arrange(
        [piece for message in messages for piece in pieces(message)], repair=wanted.repair
    )
    sent = model_input.native(arranged.pieces)
    tokens = [tokens_of(each) for each in sent]
    return {
        **_in_form(messages, arranged, wanted),
        "from_seq": kept[0].seq if kept else None,
        "to_seq": kept[-1].seq if kept else None,
        "last_seq": of.last_seq,
        "version": of.version,
        "tokens": sum(count for count, _ in tokens),
        "tokens_estimated": any(estimated for _, estimated in tokens),
        "over_budget": cut.over_budget or history.budget < 0,
        "left_out": _left_out(of, history, [*opening, *kept], kept),
        "checkpoint": history.checkpoint,
        "open_tool_calls": list(map(_named, arranged.open_calls)),
        "synthetic": list(map(_named, arranged.synthetic)),
    }


def _in_form(messages: Sequence[Json], arranged: Arranged, wanted: ContextRequest) -> Json:
    if wanted.form == "anthropic":
        system, made = model_input.anthropic(arranged.pieces)
        return {"system": system, "messages": made}
    if wanted.form == "native" and not wanted.repair:
        # In the order in which they are stored, without those that hold nothing but results without a call.
        shown = {id(piece.message) for piece in arranged.pieces}
        return {"messages": [each for each in messages if id(each) in shown]}
    return {"messages": model_input.FORMS[wanted.form](arranged.pieces)}


def _shortened(kept: Sequence[Entry], of: ConversationState, wanted: ContextRequest) -> list[Json]:
    """Return the messages, older and larger results replaced. What is older moves with the grid only."""
    if wanted.shortened is None:
        return [each.message for each in kept]
    keep, over = wanted.shortened.keep, wanted.shortened.over
    results = [each for each in kept if any(piece.is_result for piece in each.pieces)]
    if len(results) < keep:
        return [each.message for each in kept]
    ends = {"tokens": of.tokens_total, "messages": of.last_seq, "turns": of.turns_total}
    oldest_whole = results[-keep].begin if keep else ends[wanted.unit]
    line = oldest_whole // wanted.step * wanted.step
    old = {id(each) for each in results if each.begin < line and each.tokens > over}
    return [_without_result(each) if id(each) in old else each.message for each in kept]


def _without_result(entry: Entry) -> Json:
    shortened = message_pieces.without_result(entry.message)
    return shortened if tokens_of(shortened)[0] < entry.tokens else entry.message


def _left_out(of: ConversationState, history: _History, sent: Sequence[Entry], kept: Sequence[Entry]) -> Json:
    """Return how much is not in the context. The tokens are those of the grid, deleted messages included.

    They are None where the beginning of the history has no totals.
    """
    messages = max(0, (of.message_count or 0) - len(history.head) - len(sent))
    if not messages or history.origin is None:
        return {"messages": messages, "tokens": None if messages else 0}
    begin = kept[0].tokens_before if kept else of.tokens_total
    before = sum(tokens_of(each)[0] for each in history.head)
    before += sum(each.tokens for each in sent[: len(sent) - len(kept)])
    return {"messages": messages, "tokens": max(0, begin - history.origin.tokens - before)}


def _named(call: Piece) -> Json:
    return {
        "tool_call_id": call.call_id,
        "name": message_pieces.name_of(call),
        "message_id": call.message["id"],
    }
