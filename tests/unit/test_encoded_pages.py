"""A page from what is kept is the page that is stored: over generated histories, changes and requests."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from service.errors import DatabaseUnavailable
from service.formats.json_answers import dumps
from service.history import kept_pages, reading
from service.history.kept_pages import Kept, KeptPages
from service.history.records import ConversationState, EncodedMessage
from service.history.store import ConversationStore
from service.tenancy import ConversationKey, ConversationRef, OwnerKey
from tests.unit.fake_store import KEY, OWNER, START, FakeDatabase, Json, conversation, fake_store, message

REF = ConversationRef(KEY, OWNER)


class History:
    """A stored history that is appended to, replaced in and deleted from, as the service does it."""

    def __init__(self, chance: random.Random, *, embedded: bool, **settings: Any) -> None:
        self._chance = chance
        store, database = fake_store([conversation(rewrites=7)], embedded=embedded, **settings)
        self.store: ConversationStore = store
        self.database: FakeDatabase = database

    @property
    def head(self) -> Json:
        return self.database.documents[0]

    def append(self, count: int) -> None:
        for _ in range(count):
            self.head["last_seq"] += 1
            size = self._chance.choice([1, 1, 10, 200])
            new = message(self.head["last_seq"], owner=self.head["user_id"], content="x" * size)
            self.database.documents.append(new)
            self.head["message_count"] += 1

    def delete(self) -> None:
        """Delete a run of messages."""
        low = self._chance.randint(0, self.head["last_seq"])
        high = low + self._chance.choice([1, 3, 1_000])
        left = [each for each in self.database.documents[1:] if not low < each["seq"] <= high]
        self.database.documents = [self.head, *left]
        self.head["message_count"] = len(left)
        self.head["rewrites"] += 1

    def replace(self) -> None:
        if len(self.database.documents) > 1:
            place = self._chance.randrange(1, len(self.database.documents))
            changed = {**self.database.documents[place], "content": f"changed {self._chance.random()}"}
            self.database.documents[place] = changed
            self.head["rewrites"] += 1

    def make_again(self) -> None:
        """Delete the conversation, and create it again with another history."""
        self.database.documents = [
            conversation(owner=self._chance.choice([OWNER, "bob"]), rewrites=self._chance.randrange(10**9))
        ]
        self.append(self._chance.randrange(4))

    def change(self) -> None:
        kind = self._chance.choices(["delete", "replace", "make again"], [3, 3, 1])[0]
        if kind == "delete":
            self.delete()
        elif kind == "replace":
            self.replace()
        else:
            self.make_again()

    def request(self) -> tuple[ConversationRef, Json, Json]:
        chance, last_seq = self._chance, self.head["last_seq"]
        seq = chance.choice([None, None, chance.randint(0, last_seq + 2)])
        which: Json = {} if seq is None else {chance.choice(["after", "before"]): max(seq, 1)}
        if not chance.randrange(8):
            which["role"] = chance.choice(["user", "tool"])
        limit = chance.choice([1, 2, 5, 30])
        asked: Json = {"limit": limit, "last": None, "order": chance.choice(["asc", "desc"])}
        if chance.randrange(2):
            asked = {"limit": None, "last": limit, "order": "asc"}
        return ConversationRef(KEY, OwnerKey(self.head["user_id"])), which, asked


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("seed", range(40))
async def test_a_page_from_what_is_kept_is_the_page_that_is_stored(seed: int, embedded: bool) -> None:
    chance = random.Random(seed)
    bytes_max = chance.choice([400, 3_000, 2**25])
    cache_bytes = chance.choice([0, 9_000, 2**25])
    history = History(chance, embedded=embedded, page_bytes_max=bytes_max, cache_bytes=cache_bytes)
    for _ in range(60):
        done = chance.choices(["append", "change", "nothing"], [3, 2, 3])[0]
        if done == "append":
            history.append(chance.choice([1, 1, 2, 90]))
        elif done == "change":
            history.change()
        ref, which, asked = history.request()
        encoded = await reading.encoded_page(history.store, ref, which, **asked)  # type: ignore[arg-type]
        plain = await reading.page(history.store, ref, which, **asked)  # type: ignore[arg-type]
        assert encoded.messages == list(map(dumps, plain.messages))
        assert (encoded.has_more, encoded.boundary_seq) == (plain.has_more, plain.boundary_seq)
        assert history.store.kept_pages._size <= cache_bytes
    await history.store.close()


async def pages_of(history: History, **asked: Any) -> list[bytes]:
    asked = {"limit": None, "last": None, "order": "asc", **asked}
    return (await reading.encoded_page(history.store, REF, {}, **asked)).messages


@pytest.mark.parametrize("embedded", [True, False])
async def test_only_what_was_appended_is_read_again(embedded: bool) -> None:
    history = History(random.Random(1), embedded=embedded)
    history.append(100)
    await pages_of(history, last=20)
    history.database.reads.clear()
    await pages_of(history, last=20)
    assert len(history.database.reads) == 1  # the conversation
    history.append(2)
    assert len(await pages_of(history, last=20)) == 20
    assert history.database.reads[2][0]["seq"] == {"$gt": 100, "$lte": 102}
    assert len(history.database.reads) == 4  # with a second look whether anything was deleted meanwhile
    history.replace()
    await pages_of(history, last=20)
    assert history.database.reads[5][1] >= 20  # all of the page
    await history.store.close()


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_message_that_was_not_to_be_seen_yet_is_read_later(order: str) -> None:
    """A server that is behind may show a conversation's counters before its newest message."""
    history = History(random.Random(1), embedded=False)
    history.append(5)
    newest = history.database.documents.pop()
    assert len(await pages_of(history, order=order)) == 4
    history.database.documents.append(newest)
    assert len(await pages_of(history, order=order)) == 5
    await history.store.close()


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_no_page_is_of_two_histories(order: str) -> None:
    """The end of the history is cut off after the conversation was read, and before the new messages are."""
    history = History(random.Random(1), embedded=False)
    history.append(8)
    await pages_of(history, order=order)
    history.append(4)
    read, cut = history.database.read, False

    async def cut_before(document: Any, query: Any, **options: Any) -> list[bytes]:
        nonlocal cut
        if "seq" in query and not cut:
            cut = True
            history.database.documents = history.database.documents[:4]
            history.head["rewrites"] += 1
        return await read(document, query, **options)

    history.database.read = cut_before  # type: ignore[method-assign]
    assert len(await pages_of(history, order=order)) == 3
    await history.store.close()


async def test_nothing_is_kept_for_longer_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(random.Random(1), embedded=True)
    history.append(5)
    await pages_of(history)
    # By hand, in the shell, which moves no counter.
    history.database.documents[1] = message(1, content="by hand")
    assert b"by hand" not in (await pages_of(history))[0]
    monkeypatch.setattr(kept_pages, "KEPT_S", -1.0)
    assert b"by hand" in (await pages_of(history))[0]
    await history.store.close()


async def test_what_was_not_read_for_the_longest_time_goes_first() -> None:
    store, _ = fake_store()
    pages = KeptPages(store.database, 8 * 700)
    states = [ConversationState(ConversationKey(str(n)), OWNER, 1, START) for n in range(9)]
    for each in states[:8]:
        pages.keep(each, Kept.of(0, 0, 1, [EncodedMessage(1, b"x" * 500, 500)]), pages.generation)
    assert pages.find(states[0]) is not None
    pages.keep(states[8], Kept.of(0, 0, 1, [EncodedMessage(1, b"x" * 500, 500)]), pages.generation)
    assert [pages.find(each) is not None for each in states[:3]] == [True, False, True]
    assert pages.find(states[8]) is not None
    pages.close()


async def test_what_was_read_before_an_erasure_ended_is_not_kept_after_it() -> None:
    history = History(random.Random(1), embedded=False)
    history.append(3)
    state = await history.store.state(REF)
    generation = history.store.kept_pages.generation
    history.store.kept_pages.drop_all()
    kept = Kept.of(7, 0, 1, [EncodedMessage(1, b"{}", 9)])
    history.store.kept_pages.keep(state, kept, generation)
    assert history.store.kept_pages.find(state) is None
    await history.store.close()


async def test_what_was_read_of_a_conversation_before_an_erasure_ended_is_not_kept_after_it() -> None:
    history = History(random.Random(1), embedded=False)
    history.append(3)
    read = history.database.read

    async def while_somebody_is_erased(document: Any, query: Any, **options: Any) -> list[bytes]:
        found = await read(document, query, **options)
        if "seq" not in query:
            history.store.kept_pages.drop_all()
        return found

    history.database.read = while_somebody_is_erased  # type: ignore[method-assign]
    assert len(await pages_of(history)) == 3
    history.database.read = read  # type: ignore[method-assign]
    assert history.store.kept_pages.find(await history.store.state(REF)) is None
    await history.store.close()


async def test_everything_is_dropped_when_it_cannot_be_asked_who_was_erased(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_pages, "_LOOK_S", 0.01)
    history = History(random.Random(1), embedded=False)
    history.append(3)
    await pages_of(history)
    state = await history.store.state(REF)
    assert history.store.kept_pages.find(state) is not None

    async def away(*_: Any, **__: Any) -> list[bytes]:
        raise DatabaseUnavailable("The database is away.")

    monkeypatch.setattr(history.database, "read", away)
    for _ in range(200):
        if history.store.kept_pages.find(state) is None:
            break
        await asyncio.sleep(0.01)
    assert history.store.kept_pages.find(state) is None
