"""Telling a replay from a conflict, without a database."""

from __future__ import annotations

from typing import Any

import bson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymongo.errors import DuplicateKeyError

from service.database import Transaction
from service.errors import BrokenCounter, ConversationNotFound, IdempotencyConflict
from service.formats import bson_codec, strict_json
from service.history import appending, new_messages, records
from service.history.appending import AppendResult
from service.history.new_messages import NewMessage, PreparedBatch
from service.history.records import ConversationState, Totals
from service.settings import MESSAGE_BYTES_MAX
from service.tenancy import ConversationKey, ConversationRef
from tests import strategies
from tests.unit.fake_store import KEY, OWNER, START, Json, conversation, encoded, fake_store, message

STATE = ConversationState(KEY, OWNER, 9, START)
REF = ConversationRef(KEY, OWNER)
SAID = {"role": "user", "content": "x", "n": {"a": 1, "b": [True, None]}}


def prepare(*fields: Any, key: str | None = "k", exact: bool = False) -> PreparedBatch:
    messages = list(map(NewMessage, fields))
    return new_messages.prepare(messages, key, field="messages", items_max=10, keep_exact_copy=exact)


def stored(batch: PreparedBatch, first: int = 5) -> list[bytes]:
    """Return the batch as an append stores it, from this seq on."""
    return [
        bson_codec.concat_documents(records.service_fields(STATE, each.id, seq, Totals(0, 0)), each.fields)
        for seq, each in enumerate(batch.messages, first)
    ]


# -- the same batch --------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(strategies.messages(), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_any_batch_is_the_same_as_itself(fields: list[Json], before: bool, now: bool) -> None:
    # An exact copy is kept or not as the engine needs it: a database may have moved from one to another.
    documents = stored(prepare(*fields, exact=before))
    appending.require_same(prepare(*fields, exact=now), documents)
    # Another append stands behind it.
    appending.require_same(prepare(*fields, exact=now), [*documents, *stored(prepare(SAID, key=None), 9)])


@pytest.mark.parametrize(
    ("now", "is_same"),
    [
        (SAID, True),
        ({"n": {"b": [True, None], "a": 1}, "content": "x", "role": "user"}, True),  # in any order of keys
        (SAID | {"content": "y"}, False),
        (SAID | {"role": "tool"}, False),
        (SAID | {"more": None}, False),
        ({"role": "user", "content": "x"}, False),
        (SAID | {"n": {"a": 1.0, "b": [True, None]}}, False),
        (SAID | {"n": {"a": True, "b": [True, None]}}, False),
        (SAID | {"n": {"a": 1, "b": [1, None]}}, False),
        (SAID | {"n": {"a": 1, "b": [None, True]}}, False),
        (SAID | {"n": {"a": "1", "b": [True, None]}}, False),
    ],
    ids=str,
)
def test_a_message_is_the_same_if_its_json_is(now: Json, is_same: bool) -> None:
    documents = stored(prepare(SAID, SAID))
    if is_same:
        appending.require_same(prepare(SAID, now), documents)
        return
    with pytest.raises(IdempotencyConflict, match="is stored with other content"):
        appending.require_same(prepare(SAID, now), documents)


def test_a_key_of_a_longer_batch_is_refused_for_a_shorter() -> None:
    documents = stored(prepare(SAID, SAID, SAID))
    with pytest.raises(IdempotencyConflict, match="longer batch"):
        appending.require_same(prepare(SAID, SAID), documents)
    appending.require_same(prepare(SAID, SAID), documents[:2])


def test_a_key_of_a_shorter_batch_is_refused_for_a_longer() -> None:
    documents = stored(prepare(SAID, SAID))
    with pytest.raises(IdempotencyConflict, match="other messages"):
        appending.require_same(prepare(SAID, SAID, SAID), documents)
    with pytest.raises(IdempotencyConflict, match="other messages"):
        appending.require_same(prepare(SAID, SAID, SAID), [*documents, *stored(prepare(SAID, key="l"), 7)])


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_batch_of_which_a_message_was_deleted_is_no_replay(gone: int) -> None:
    documents = stored(prepare(SAID, SAID, SAID))
    del documents[gone]
    with pytest.raises(IdempotencyConflict, match="were deleted"):
        appending.require_same(prepare(SAID, SAID, SAID), documents)


def test_ids_in_another_order_are_another_batch() -> None:
    one, other = SAID | {"id": "a"}, SAID | {"id": "b"}
    documents = stored(prepare(one, other, key=None))
    appending.require_same(prepare(one, other, key=None), documents)
    # Without a key nothing tells that the first batch was longer: its first messages were asked for by id.
    appending.require_same(prepare(one, key=None), documents)
    with pytest.raises(IdempotencyConflict, match="other messages"):
        appending.require_same(prepare(other, one, key=None), documents)


# -- what is found under the ids -------------------------------------------------------------------

engines = pytest.mark.parametrize("embedded", [False, True], ids=["mongodb", "embedded"])
usable = pytest.mark.usefixtures("documents")
AWARE: bson.CodecOptions[Json] = bson.CodecOptions(tz_aware=True)


async def look(batch: PreparedBatch, documents: list[bytes], *, embedded: bool) -> list[bytes] | None:
    decoded = [bson.decode(each, AWARE) for each in documents]
    store, _ = fake_store([conversation(last_seq=99), *decoded], embedded=embedded)
    return await appending.stored_before(store, REF, batch, Transaction())


@usable
@engines
async def test_a_replay_is_answered_with_what_is_stored(embedded: bool) -> None:
    batch = prepare(SAID, SAID)
    others = stored(prepare({"role": "tool"}, key=None), 4) + stored(prepare({"role": "tool"}, key=None), 7)
    assert await look(batch, [*stored(batch), *others], embedded=embedded) == stored(batch)


@usable
@engines
async def test_where_no_id_is_stored_nothing_was_stored_before(embedded: bool) -> None:
    assert await look(prepare(SAID, SAID), stored(prepare(SAID, key="other")), embedded=embedded) is None


@usable
@engines
async def test_ids_of_which_some_are_stored_are_a_conflict(embedded: bool) -> None:
    batch = prepare(SAID | {"id": "a"}, SAID | {"id": "b"}, key=None)
    with pytest.raises(IdempotencyConflict, match="Some of these messages"):
        await look(batch, stored(batch)[1:], embedded=embedded)


@usable
@engines
async def test_ids_of_another_users_messages_are_a_broken_counter(embedded: bool) -> None:
    batch = prepare(SAID | {"id": "a"}, SAID | {"id": "b"}, key=None)
    foreign = [encoded(message(1, owner="bob") | {"_id": "c/b"})]
    with pytest.raises(BrokenCounter, match="verify --repair"):
        await look(batch, foreign, embedded=embedded)


@usable
async def test_a_conversation_that_is_gone_has_no_replay() -> None:
    store, _ = fake_store([conversation(owner="bob")])
    with pytest.raises(ConversationNotFound):
        await appending.stored_before(store, REF, prepare(SAID), Transaction())


@usable
async def test_no_more_is_read_than_the_batch_could_be(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = prepare(SAID | {"id": "a"}, *[SAID] * 9, key=None)
    large = "x" * (MESSAGE_BYTES_MAX // 2)
    behind = [message(seq, content=large) for seq in range(6, 20)]
    store, _ = fake_store([conversation(last_seq=99), message(5) | {"_id": "c/a"}, *behind])
    sizes: list[int] = []

    async def beside(size: int, work: Any) -> None:
        sizes.append(size)
        work()

    monkeypatch.setattr(strict_json, "beside", beside)
    with pytest.raises(IdempotencyConflict):
        await appending.stored_before(store, REF, batch, Transaction())
    assert sizes[0] < 1.1 * MESSAGE_BYTES_MAX


# -- which index was violated ----------------------------------------------------------------------

ON_SEQ = "E11000 duplicate key error collection: chat.messages index: conversation_id_1_seq_1 dup key: …"
ON_ID = "E11000 duplicate key error collection: chat.messages index: _id_ dup key: { _id: 'c/seq' }"


@pytest.mark.parametrize(
    ("message", "details", "is_broken"),
    [
        (ON_SEQ, None, True),
        (ON_ID, None, False),
        ("", {"code": 11000, "errmsg": ON_SEQ}, True),
        ("", {"code": 11000, "errmsg": ON_ID}, False),
        ("", {"code": 11000, "keyPattern": {"conversation_id": 1, "seq": 1}}, True),
        ("", {"code": 11000, "keyPattern": {"_id": 1}, "errmsg": ON_SEQ}, False),
        ("", {"writeErrors": [{"code": 11000, "errmsg": ON_SEQ}]}, True),
        ("", {"writeErrors": [{"code": 11000, "errmsg": ON_ID}, {"code": 11000, "errmsg": ON_SEQ}]}, False),
        ("", {"writeErrors": [{"code": 8, "errmsg": "…"}, {"code": 11000, "errmsg": ON_SEQ}]}, True),
        (ON_SEQ, {"writeErrors": [{"code": 8}]}, True),
    ],
)
def test_a_seq_that_is_taken_is_told_from_an_id_that_is_taken(
    message: str, details: Any, is_broken: bool
) -> None:
    assert appending.is_broken_counter(DuplicateKeyError(message, 11000, details)) is is_broken


def test_a_result_knows_its_size_and_its_messages() -> None:
    documents = stored(prepare(SAID, SAID))
    result = AppendResult(documents, replayed=False)
    assert result.size == len(b"".join(documents))
    assert [each["seq"] for each in result.messages] == [5, 6]
    assert {key: result.messages[0][key] for key in SAID} == SAID


def test_a_broken_counter_names_the_callers_id_only() -> None:
    assert "conversation c does" in appending.broken_counter(ConversationKey("tenant/c")).detail
