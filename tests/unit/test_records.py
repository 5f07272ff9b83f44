"""Stored documents and what callers see of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.documents import Conversation
from service.errors import MalformedDocument
from service.formats import bson_codec
from service.formats.json_answers import timestamp
from service.history import records, written_types
from service.history.ownership import all_owned_by, owned_by
from service.history.records import ConversationRecord, ConversationState, Totals
from service.tenancy import ConversationKey, OwnerKey
from tests import strategies
from tests.unit.fake_store import KEY, OWNER, START, Json, conversation, encoded, message

usable = pytest.mark.usefixtures("documents")


# -- conversations ---------------------------------------------------------------------------------


ODD: list[Any] = [
    *(None, True, 5, -(2**63), 2**40, 5.0, 5.5, float("nan"), "", "5", "x", START, b"x", bson.ObjectId()),
    *({}, {"b": 1, "a": [START]}, {"$ref": "a", "$id": 1}, [], [1], [[1, 2]], [[1, 2.5]], [[1, "x"]], [{}]),
    *(bson.encode({"metadata": {"x": 1}}), bson.Decimal128("5"), bson.Binary(b"x", 128), bson.Regex("x")),
]
MISSING = object()


@usable
@pytest.mark.parametrize("name", [*written_types.TYPES, "id", "revision_id", "another"])
@pytest.mark.parametrize("value", [MISSING, *ODD], ids=lambda each: type(each).__name__)
def test_a_conversation_is_shown_as_the_model_reads_it_whatever_is_stored(name: str, value: Any) -> None:
    stored = {**conversation(), name: value}
    if value is MISSING:
        del stored[name]
    raw = encoded(stored)
    expected = _shown_or_refused(lambda: records.of_document(records.document(raw)))
    shown = _shown_or_refused(lambda: records.conversation(raw))
    # As text, too, because 1 and 1.0 and True are equal, and so are objects in another order. NaN is not
    # equal to itself, but its text is.
    assert str(shown).replace("TzInfo(0)", "utc") == str(expected).replace("TzInfo(0)", "utc")
    if isinstance(shown, ConversationRecord):
        assert type(shown.metadata) is dict
        counts = (shown.last_seq, shown.message_count, shown.version, shown.edits)
        assert [type(each) for each in counts] == [int] * 4


def _shown_or_refused(show: Callable[[], ConversationRecord]) -> Any:
    try:
        return show()
    except MalformedDocument as error:
        return type(error.__cause__), str(error)


@usable
def test_the_model_is_not_asked_about_what_the_service_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Conversation(
        id="c", user_id="ada", created_at=START, updated_at=START, rewrites=2**40, rewritten=[[1, 2, 3, 4]]
    ).model_dump(by_alias=True, exclude={"revision_id"})
    assert set(written) == set(written_types.TYPES)
    monkeypatch.setattr(records, "document", None)
    assert records.conversation(encoded(written)).id == "c"


@usable
@pytest.mark.parametrize("tenant", ["", "acme/"])
def test_a_conversation_is_shown_without_its_tenant(tenant: str) -> None:
    later = START + timedelta(days=1)
    stored = conversation(
        f"{tenant}c", f"{tenant}ada", title="T", last_seq=3, message_count=2, expires_at=later
    )
    shown = records.conversation(encoded(stored))
    assert (shown.id, shown.user_id, shown.title) == ("c", "ada", "T")
    assert (shown.last_seq, shown.message_count, shown.expires_at) == (3, 2, later)
    assert shown.created_at == START
    assert shown.created_at.tzinfo is not None
    state = records.state(encoded(stored))
    assert state == ConversationState(ConversationKey(f"{tenant}c"), OwnerKey(f"{tenant}ada"), 3, START, 2)


@usable
@given(strategies.objects)
def test_metadata_is_shown_as_it_came(metadata: Json) -> None:
    raw = bson_codec.encode({"metadata": metadata}, keep_exact_copy=False)
    # The embedded engine may have reordered the keys of what is stored natively.
    exact = encoded(conversation(metadata={"bent": 1}, exact_metadata=raw))
    native = bson_codec.concat_documents(
        encoded({k: v for k, v in conversation().items() if k != "metadata"}), raw
    )
    for stored in (exact, native):
        shown = records.conversation(stored).metadata
        assert bson_codec.json_equal(shown, metadata)
        assert list(shown) == list(metadata)
        assert type(shown) is dict


@usable
@pytest.mark.parametrize(
    "damage",
    [
        {"last_seq": "many"},
        {"created_at": "yesterday"},
        {"metadata": []},
        {"user_id": 7},
        {"exact_metadata": b"no bson"},
        {"exact_metadata": bson.encode({"other": 1})},
    ],
    ids=str,
)
def test_a_conversation_that_is_not_well_formed_is_an_error_of_ours(damage: Json) -> None:
    with pytest.raises(MalformedDocument, match="chat-history verify"):
        records.conversation(encoded(conversation(**damage)))


def test_the_state_of_a_conversation_needs_only_its_own_fields() -> None:
    """What is wrong in another field keeps nobody from the messages; what is wrong in these is an error."""
    expected = ConversationState(KEY, OWNER, 3, START)
    fields = {"_id": KEY, "user_id": OWNER, "last_seq": 3, "updated_at": START}
    for stored in (fields, fields | {"last_seq": 3.0}, conversation(last_seq=3, metadata=[], title=7)):
        state = records.state(encoded(stored))
        assert replace(state, message_count=None) == expected
        assert isinstance(state.last_seq, int)
    assert records.state(encoded(conversation() | {"last_seq": bson.Int64(2**40)})).last_seq == 2**40
    # A count that is not well formed only makes a read across a gap more expensive.
    for count, known in ((7, 7), ("7", None), (None, None), (7.5, None)):
        assert records.state(encoded(conversation(message_count=count))).message_count == known
    for name, values in {
        "_id": (7, bson.ObjectId()),
        "user_id": (7, None),
        "last_seq": ("3", None, True, 3.5, float("nan")),
        "updated_at": ("yesterday", None, 3),
    }.items():
        for value in values:
            with pytest.raises(MalformedDocument, match="chat-history verify"):
                records.state(encoded(fields | {name: value}))
    for name in ("_id", "user_id", "updated_at"):
        with pytest.raises(MalformedDocument):
            records.state(encoded({each: fields[each] for each in fields if each != name}))


def test_bytes_that_are_no_bson_are_an_error_of_ours() -> None:
    for read in (records.document, records.state, records.conversation, records.message):
        with pytest.raises(MalformedDocument):
            read(b"\x08\0\0\0\x02ab\0")


# -- messages --------------------------------------------------------------------------------------


@given(strategies.messages(), st.sampled_from(["", "acme/"]), st.integers(1, 2**53), st.booleans())
def test_any_message_is_shown_with_the_services_fields_first(
    fields: Json, tenant: str, seq: int, exact: bool
) -> None:
    of = ConversationState(ConversationKey(f"{tenant}c"), OwnerKey(f"{tenant}ada"), seq, START)
    raw = bson_codec.concat_documents(
        records.service_fields(of, "m", seq, Totals(5, 2)), bson_codec.encode(fields, keep_exact_copy=exact)
    )
    shown = records.message(raw)
    service = {"id": "m", "conversation_id": "c", "user_id": "ada", "seq": seq, "created_at": START}
    assert list(shown) == [*service, *fields]
    assert {name: shown[name] for name in service} == service
    assert bson_codec.json_equal(records.caller_fields(shown), fields)
    assert owned_by(of.owner, raw)
    assert all_owned_by(of.owner, of.key, [raw]) == [raw]
    assert not owned_by("bob", raw)
    assert all_owned_by("bob", of.key, [raw]) == []


def test_many_messages_are_decoded_as_each_is_by_itself() -> None:
    """Also those that are more than is decoded at once, with objects that look like references among them."""
    contents: list[Any] = ["x" * size for size in (10, 30_000, 30_000, 30_000, 200_000, 5)]
    contents[3:3] = [{"$ref": "a", "$id": 1}, {"$id": 1, "$ref": "a"}]
    documents = [encoded(message(seq, content=content)) for seq, content in enumerate(contents, 1)]
    together = records.encoded(documents)
    assert together == [records.encoded([each])[0] for each in documents]
    assert records.messages(documents) == [records.message(each) for each in documents]
    assert [orjson.loads(each.json) for each in together] == [
        {**records.message(each), "created_at": timestamp(START)} for each in documents
    ]
    assert records.encoded([]) == []


def test_many_messages_are_shown_as_each_by_itself() -> None:
    documents = [encoded(message(seq, content={"$ref": "x"} if seq == 2 else "x")) for seq in (1, 2, 3)]
    assert records.messages(documents) == [records.message(each) for each in documents]
    assert records.messages([]) == []


@pytest.mark.parametrize("missing", ["_id", "user_id"])
def test_a_message_that_is_not_well_formed_is_an_error_of_ours(missing: str) -> None:
    stored = message(1, key="t/c", owner="t/ada")
    del stored[missing]
    with pytest.raises(MalformedDocument, match="A message of this conversation"):
        records.message(encoded(stored))
    with pytest.raises(MalformedDocument):
        records.message(encoded(message(1) | {missing: 7}))


# -- owners ----------------------------------------------------------------------------------------


def test_only_what_says_itself_that_it_is_the_owners_is_shown() -> None:
    written = [
        bson.encode({"_id": f"c/{'m' * n}", "conversation_id": "c", "user_id": "ada", "content": "x"})
        for n in range(1, 40)
    ]
    assert all_owned_by("ada", ConversationKey("c"), written) == written
    assert all_owned_by("bob", ConversationKey("c"), written) == []
    by_hand = bson.encode({"user_id": "ada", "_id": "c/x", "conversation_id": "c"})
    without_text = bson.encode({"_id": 7, "conversation_id": "c", "user_id": "ada"})
    inside = {"conversation_id": "c", "user_id": "ada"}
    forged = bson.encode({"_id": "c/y", "conversation_id": "c", "user_id": "bob", "metadata": inside})
    other = bson.encode({"_id": "c/z", "conversation_id": "d", "user_id": "bob", "content": "ada"})
    nobodys = bson.encode({"_id": "c/n", "conversation_id": "c", "content": "x"})
    found = all_owned_by("ada", ConversationKey("c"), [by_hand, without_text, forged, other, nobodys])
    assert found == [by_hand, without_text]


names = st.sampled_from(["ada", "ad", "adab", "t/ada", "", "é"])


@given(names, names, st.permutations(["_id", "conversation_id", "user_id", "content", "n"]))
def test_the_owner_is_read_wherever_its_field_stands(owner: str, asked: str, order: list[str]) -> None:
    # A caller's text holds the very bytes of the field.
    content = bson.encode({"user_id": asked})[4:-1].decode("latin-1")
    values: Json = {"_id": "c/m", "conversation_id": "c", "user_id": owner, "content": content, "n": 1}
    raw = bson.encode({name: values[name] for name in order})
    assert owned_by(asked, raw) is (asked == owner)
    assert all_owned_by(asked, KEY, [raw]) == ([raw] if asked == owner else [])


# -- ids in logs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("c", "c"),
        ("x" * 500, "x" * 200),
        (7, "7"),
        (bson.ObjectId("5" * 24), "5" * 24),
        ({"secret": "text"}, "(a dict)"),
        (b"secret", "(a bytes)"),
        (datetime(2026, 1, 1, tzinfo=UTC), "(a datetime)"),
    ],
)
def test_an_id_that_somebody_made_by_hand_is_printed_without_content(value: Any, printed: str) -> None:
    assert records.printable_id(value) == printed


def test_the_fields_of_a_stored_message_are_those_that_the_owner_check_expects() -> None:
    raw = records.service_fields(ConversationState(KEY, OWNER, 1, START), "m", 1, Totals(0, 0))
    assert list(bson.decode(raw))[:5] == ["_id", "conversation_id", "user_id", "seq", "created_at"]
