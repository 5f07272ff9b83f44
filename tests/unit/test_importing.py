"""What an import takes: checked, in order, and cut into batches; without a database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.database import Transaction
from service.errors import ConversationIdTaken, InvalidRequest
from service.formats import bson_codec
from service.history import records
from service.history.seq_range import SeqRange
from service.tenancy import OWNER_WHILE_DELETED, ConversationKey, OwnerKey, TenantScope
from service.user_data import import_batches, importing
from service.user_data.exporting import ExportedConversation
from tests import strategies
from tests.unit.fake_store import START, Json, conversation, encoded, fake_store, message

KEY, OWNER = ConversationKey("acme/c"), OwnerKey("acme/ada")
usable = pytest.mark.usefixtures("documents")


def exported(**fields: Any) -> Json:
    """Return a conversation as a line of an export has it."""
    return {
        "id": "c",
        "user_id": "ada",
        "title": None,
        "metadata": {},
        "created_at": "2026-01-01T00:00:00.000Z",
        "updated_at": "2026-01-02T00:00:00.000Z",
        "last_seq": 2_000,
        "message_count": 3,
        **fields,
    }


def exported_message(seq: Any, **fields: Any) -> Json:
    return {
        "id": f"m{seq}",
        "conversation_id": "c",
        "user_id": "ada",
        "seq": seq,
        "created_at": "2026-01-01T00:00:00.000Z",
        "role": "user",
        **fields,
    }


def batches(*messages: Json, exact: bool = False, **fields: Any) -> list[import_batches.Batch]:
    conversation = ExportedConversation.model_validate(exported(**fields))
    return list(import_batches.batches(conversation, KEY, OWNER, messages, keep_exact_copy=exact))


def fault(error: pytest.ExceptionInfo[InvalidRequest]) -> tuple[str, str]:
    first = error.value.faults[0]
    return first.path, first.message


# -- the conversation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "path", "why"),
    [
        ({"id": "a\n"}, "$.id", "1 to 1,500 bytes"),
        ({"user_id": ".."}, "$.user_id", "not . or .."),
        ({"title": "x" * 1_001}, "$.title", "1000 characters"),
        ({"metadata": []}, "$.metadata", "dictionary"),
        ({"last_seq": -1}, "$.last_seq", "greater than or equal to 0"),
        ({"last_seq": 2**53 + 1}, "$.last_seq", "less than or equal to"),
        ({"last_seq": "3"}, "$.last_seq", "valid integer"),
        ({"message_count": True}, "$.message_count", "valid integer"),
        ({"importing": "bob"}, "$.importing", "not permitted"),
        ({"created_at": "yesterday"}, "$.created_at", "datetime"),
        ({"created_at": "2026-01-01T00:00:00"}, "$.created_at", "timezone"),
        ({"created_at": "1969-12-31T23:59:59.999Z"}, "$.created_at", "from 1970 to 9998"),
        ({"updated_at": "9999-01-01T00:00:00Z"}, "$.updated_at", "from 1970 to 9998"),
        ({"updated_at": "1970-01-01T00:30:00+01:00"}, "$.updated_at", "from 1970 to 9998"),
        ({"metadata": {"n": 2**63}}, "$.metadata.n", "64 bits"),
    ],
    ids=str,
)
def test_a_conversation_that_cannot_be_stored_is_refused_with_the_place(
    fields: Json, path: str, why: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        importing._checked_conversation(exported(**fields))
    at, message = fault(caught)
    assert at == path
    assert why in message


@pytest.mark.parametrize(
    ("time", "utc"),
    [
        ("1970-01-01T00:00:00Z", datetime(1970, 1, 1, tzinfo=UTC)),
        ("9998-12-31T23:59:59.999Z", datetime(9998, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)),
        ("2026-01-01T01:00:00+01:00", START),
    ],
)
def test_times_of_1970_to_9998_are_taken_in_any_zone(time: str, utc: datetime) -> None:
    checked = importing._checked_conversation(exported(created_at=time, expires_at=time))
    assert (checked.created_at, checked.expires_at) == (utc, utc)
    assert import_batches.time_of({"created_at": time}) == utc


# -- its messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "path", "why"),
    [
        ([exported_message(0)], "$.seq", "must grow, from 1"),
        ([exported_message(2_001)], "$.seq", "last_seq, and is 2001"),
        ([exported_message(2), exported_message(2)], "$.seq", "is 2"),
        ([exported_message(2), exported_message(1)], "$.seq", "is 1"),
        ([exported_message(True)], "$.seq", "is True"),
        ([exported_message(1.0)], "$.seq", "is 1.0"),
        ([exported_message("x" * 500)], "$.seq", "…"),
        ([exported_message(1, created_at=None)], "$.created_at", "must be a time"),
        ([exported_message(1, created_at="now")], "$.created_at", "must be a time"),
        ([exported_message(1, created_at="2026-01-01T00:00:00")], "$.created_at", "must have a time zone"),
        ([exported_message(1, created_at="1969-01-01T00:00:00Z")], "$.created_at", "from 1970"),
        ([exported_message(1, created_at="0001-01-01T00:00:00+23:00")], "$.created_at", "must be a time"),
        (
            [exported_message(1, created_at="2026-01-01T00:00:00.001Z"), exported_message(2)],
            "$.created_at",
            "earlier at seq 2",
        ),
        ([exported_message(1, conversation_id="d")], "$.conversation_id", "at seq 1"),
        ([exported_message(1, user_id="bob")], "$.conversation_id", "another user's"),
        ([exported_message(1, id="a\n")], "$.id", "1 to 1,500 bytes"),
        ([exported_message(1, id=None)], "$.id", "1 to 1,500 bytes"),
        ([exported_message(1, role="robot")], "$.role", "'user'"),
        ([exported_message(1, _id="c/x")], "$._id", "set by the service"),
        ([exported_message(1, x=[2**63])], "$.x[0]", "64 bits"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_message_that_cannot_be_stored_is_refused_with_the_place(
    messages: list[Json], path: str, why: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        batches(*messages)
    at, message = fault(caught)
    assert at == path
    assert why in message


@settings(max_examples=30)
@given(strategies.messages(), st.booleans())
def test_a_message_is_stored_as_an_append_stores_it(fields: Json, exact: bool) -> None:
    (((seq, raw),),) = batches(exported_message(7) | fields, exact=exact)
    of = records.ConversationState(KEY, OWNER, 7, START)
    appended = bson_codec.concat_documents(
        records.service_fields(of, "m7", 7, records.Totals(0, 0)),
        bson_codec.encode(_in_order(fields), keep_exact_copy=exact),
    )
    assert (seq, raw) == (7, appended)


def _in_order(fields: Json) -> Json:
    """Return the fields as they stand in the message: `role` keeps the place that it has there."""
    return {"role": fields["role"], **fields}


def test_batches_are_cut_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_batches, "_BATCH_ITEMS", 3)
    found = batches(*map(exported_message, range(1, 9)))
    assert [[seq for seq, _ in batch] for batch in found] == [[1, 2, 3], [4, 5, 6], [7, 8]]


def test_batches_are_cut_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(batches(exported_message(1, content="x" * 100))[0][0][1])
    monkeypatch.setattr(import_batches, "_BATCH_BYTES", 2 * size)
    found = batches(*(exported_message(seq, content="x" * 100) for seq in range(1, 6)))
    assert [[seq for seq, _ in batch] for batch in found] == [[1, 2], [3, 4], [5]]
    # A message that is larger than a batch is one by itself.
    found = batches(exported_message(1), exported_message(2, content="x" * 2_000), exported_message(3))
    assert [[seq for seq, _ in batch] for batch in found] == [[1], [2], [3]]


def test_a_conversation_without_messages_is_one_empty_batch() -> None:
    assert batches() == [[]]


# -- what is stored already ------------------------------------------------------------------------


def stored(*seqs: int, **fields: Any) -> list[Json]:
    return [message(seq, key=KEY, owner=OWNER, **fields) for seq in seqs]


async def test_only_messages_with_the_same_content_count_as_stored() -> None:
    (batch,) = batches(*map(exported_message, (1, 3, 5)))
    store, _ = fake_store(stored(1, 2, 3))
    assert await importing._count_stored(store, KEY, batch) == 2
    store, _ = fake_store(stored(1, 3, 5, content="other"))
    assert await importing._count_stored(store, KEY, batch) == 0
    store, database = fake_store()
    assert await importing._count_stored(store, KEY, []) == 0
    assert database.reads == []


async def test_the_missing_messages_are_those_that_are_not_stored() -> None:
    (batch,) = batches(*map(exported_message, (1, 3, 5)))
    part = SeqRange(KEY, 0, 5)
    store, _ = fake_store(stored(3))
    missing = await importing._missing(store, KEY, part, batch, Transaction())
    assert [bson.decode(each)["seq"] for each in missing] == [1, 5]
    store, _ = fake_store(stored(3, content="other"))
    with pytest.raises(ConversationIdTaken, match="conversation c was started and not finished"):
        await importing._missing(store, KEY, part, batch, Transaction())


@usable
@pytest.mark.parametrize(
    ("fields", "resumed"),
    [
        ({"user_id": OWNER_WHILE_DELETED, "importing": OWNER}, True),
        ({"user_id": OWNER_WHILE_DELETED, "importing": "acme/bob"}, False),
        ({"user_id": OWNER_WHILE_DELETED}, False),  # it is being deleted
        ({"user_id": OWNER}, False),
    ],
    ids=str,
)
async def test_only_an_import_of_the_same_user_is_resumed(fields: Json, resumed: bool) -> None:
    found = [encoded(conversation(KEY, **fields))]
    assert (importing._unless_own_import(found, OWNER) is None) is resumed
    assert importing._unless_own_import([], OWNER) is None


@usable
async def test_a_dry_run_finds_what_an_import_would_find() -> None:
    store, _ = fake_store([conversation(KEY, OWNER)])
    found = await importing._find_taken(store, KEY, OWNER)
    assert found is not None
    assert found.user_id == OWNER
    # A deletion that is going on will be over, so its id counts as free.
    store, _ = fake_store([conversation(KEY, OWNER_WHILE_DELETED)])
    assert await importing._find_taken(store, KEY, OWNER) is None
    store, _ = fake_store([conversation(KEY, OWNER_WHILE_DELETED, importing="acme/bob")])
    assert await importing._find_taken(store, KEY, OWNER) is not None


@usable
@pytest.mark.parametrize(
    ("messages", "count", "fails"),
    [([1, 3, 5], 3, False), ([1, 3], 3, True), ([1, 2, 3, 4], 3, True), ([], 0, False)],
)
async def test_the_number_of_messages_must_be_the_one_that_is_told(
    messages: list[int], count: int, fails: bool
) -> None:
    store, _ = fake_store()
    scope = TenantScope("acme")
    lines = list(map(exported_message, messages))
    work = importing.import_conversation(store, scope, exported(message_count=count), lines, dry_run=True)
    if fails:
        with pytest.raises(InvalidRequest, match="message_count"):
            await work
    else:
        assert await work == count


def test_times_of_messages_are_in_utc() -> None:
    ((_, raw),) = batches(exported_message(1, created_at="2026-01-01T02:00:00+02:00"))[0]
    assert bson_codec.decode(raw)["created_at"] == START
    assert import_batches.time_of({"created_at": "2026-01-01T00:00:00.001Z"}) - START == timedelta(
        milliseconds=1
    )
