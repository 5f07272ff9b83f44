"""Pages as JSON, without reading or encoding again what this process has read or appended (`kept_pages`)."""

from __future__ import annotations

from collections.abc import Sequence

from service.database import Budget
from service.formats import strict_json
from service.history import records, seq_range
from service.history.kept_pages import Kept
from service.history.records import ConversationState, EncodedMessage
from service.history.seq_range import SeqRange
from service.history.store import ConversationStore
from service.tenancy import ConversationRef

# The most messages that the first query of a page asks the embedded engine for, because that engine puts its
# whole answer together before it sends any of it, and the page may be cut by its size long before.
_CHUNK_ITEMS = 64
# If those were small, the next query asks for more, which are about this large together if they are alike.
_CHUNK_BYTES = 8 * 1024 * 1024
_CHUNK_GROWTH = 4


def next_chunk(store: ConversationStore, wanted: int, before: Sequence[bytes]) -> int:
    """Return how many messages the next query asks for, after those of the query before it."""
    if not store.database.limit_reads_whole_match:
        return wanted
    if not before:
        return min(wanted, _CHUNK_ITEMS)
    typical = max(1, sum(map(len, before)) // len(before))
    return min(wanted, max(_CHUNK_ITEMS, min(_CHUNK_BYTES // typical, _CHUNK_GROWTH * len(before))))


async def read(
    store: ConversationStore,
    of: ConversationState,
    part: SeqRange,
    count: int,
    backwards: bool,
    *,
    generation: int,
) -> tuple[list[EncodedMessage], bool]:
    """Read up to `count` messages, and tell whether they were cut short because of their size.

    What is kept already is taken from there, what is read now is kept, and the answer is the same.
    `generation` is that of `KeptPages` before the state of the conversation was read.
    """
    # A role picks messages out of a history, of which nothing is kept then.
    if part.role is not None:
        return (await _read(store, of, part, count, backwards, kept=None))[:2]
    before = store.kept_pages.find(of)
    found, cut, kept, asked = await _read(store, of, part, count, backwards, kept=before)
    if before is not None and asked:
        # Some of it was kept, and some was read since. If a message was deleted or replaced in between, the
        # two are of different histories.
        now = await store.state(ConversationRef(of.key, of.owner))
        if now.rewrites != of.rewrites:
            return (await _read(store, of, part, count, backwards, kept=None))[:2]
    store.kept_pages.keep(of, kept, generation)
    return found, cut


async def keep_appended(
    store: ConversationStore, of: ConversationState, documents: list[bytes], generation: int
) -> None:
    """Keep what a transaction has appended and committed, if all that stood before it is kept.

    `of` is the conversation as the transaction left it, and `generation` that of `KeptPages` before it began.
    """

    def before() -> Kept | None:
        kept = store.kept_pages.find(of)
        return kept if kept is not None and kept.high == of.last_seq - len(documents) else None

    if before() is None:
        return
    encoded = await _encoded(documents)
    # A large batch was encoded in a thread, while something else may have been kept.
    if (kept := before()) is not None:
        store.kept_pages.keep(of, kept.extended(kept.high, of.last_seq, encoded), generation)


async def _read(
    store: ConversationStore,
    of: ConversationState,
    part: SeqRange,
    count: int,
    backwards: bool,
    *,
    kept: Kept | None,
) -> tuple[list[EncodedMessage], bool, Kept | None, bool]:
    """Read messages, and return with them what is kept then, and whether the database was asked for any."""
    asked = False
    budget, found, chunk = Budget(store.settings.page_bytes_max), list[EncodedMessage](), list[bytes]()
    while len(found) < count and part.low < part.high and not budget.spent:
        if kept is not None and _begins_in(kept, part, backwards):
            _take(found, kept, part, count, backwards=backwards, budget=budget)
            part = part.clip(part.low, kept.low) if backwards else part.clip(kept.high, part.high)
            continue
        asked = True
        gap = _before_kept(kept, part, backwards)
        wanted = next_chunk(store, count - len(found), chunk)
        chunk = await seq_range.read(store, gap, wanted, backwards=backwards, budget=budget)
        encoded = await _encoded(chunk)
        found += encoded
        ended = len(chunk) < wanted and not budget.spent
        if encoded:
            kept = _with(kept, of.rewrites, gap, encoded, backwards=backwards, ended=ended)
        if ended:
            part = part.clip(part.low, gap.low) if backwards else part.clip(gap.high, part.high)
        elif encoded:
            part = part.rest_after(encoded[-1].seq, backwards)
    return found, budget.spent, kept, asked


def _begins_in(kept: Kept, part: SeqRange, backwards: bool) -> bool:
    """Tell whether the first messages of the part are kept."""
    return kept.low < part.high <= kept.high if backwards else kept.low <= part.low < kept.high


def _take(
    found: list[EncodedMessage], kept: Kept, part: SeqRange, count: int, *, backwards: bool, budget: Budget
) -> None:
    """Add what is kept of the part, up to `count` messages and within the budget."""
    own = kept.within(part.low, part.high)
    left = count - len(found)
    for message in reversed(own[-left:]) if backwards else own[:left]:
        if not budget.admits_size(message.stored_bytes):
            return
        found.append(message)


def _before_kept(kept: Kept | None, part: SeqRange, backwards: bool) -> SeqRange:
    """Return the first part of it that is not kept."""
    if kept is None:
        return part
    if backwards:
        return part.clip(kept.high, part.high) if kept.high < part.high else part
    return part.clip(part.low, kept.low) if part.low < kept.low else part


def _with(
    kept: Kept | None,
    rewrites: int,
    gap: SeqRange,
    encoded: Sequence[EncodedMessage],
    *,
    backwards: bool,
    ended: bool,
) -> Kept:
    """Add what was read of a gap to what is kept.

    Behind the newest of these messages nothing is known, unless what is kept goes on there: that they are all
    may be true for this moment only.
    """
    if backwards:
        messages = encoded[::-1]
        low = gap.low if ended else messages[0].seq - 1
        high = gap.high if kept is not None and kept.low == gap.high else messages[-1].seq
    else:
        messages = encoded
        low = gap.low
        high = gap.high if ended and kept is not None and kept.low == gap.high else messages[-1].seq
    if kept is None:
        return Kept.of(rewrites, low, high, list(messages))
    return kept.extended(low, high, list(messages))


async def _encoded(chunk: list[bytes]) -> list[EncodedMessage]:
    return await strict_json.beside(sum(map(len, chunk)), lambda: records.encoded(chunk))
