"""What `chat-history verify` finds wrong with a message, and with a key; without a database."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import bson
import pytest

from service import tenancy
from service.documents import Conversation
from service.errors import MalformedDocument
from service.maintenance import findings as checks
from service.maintenance.walk import KeyRange, after
from tests.unit.fake_store import START, Json, conversation, encoded, message

pytestmark = pytest.mark.usefixtures("documents")


def check(*messages: Json, last_seq: int = 3) -> checks.Findings:
    document = Conversation.model_validate({**conversation(last_seq=last_seq), "id": "c"})
    findings = checks.Findings()
    for each in messages:
        checks.check_message(each, document, findings)
    return findings


def test_a_sound_conversation_has_no_fault() -> None:
    later = START + timedelta(milliseconds=1)
    findings = check(message(1), message(3, created_at=later))
    assert (findings.count, findings.last_seq, findings.newest) == (2, 3, later)
    assert (findings.faults, findings.of_another_user, findings.malformed) == ([], 0, 0)


@pytest.mark.parametrize(
    ("messages", "faults"),
    [
        ([message(0)], ["the message m0 has seq 0"]),
        ([message(2), message(2, _id="c/x")], ["seq 2 stands twice"]),
        ([message(1) | {"_id": "d/m1"}], ["the message 'd/m1' has an id that is not well formed"]),
        ([message(1) | {"_id": "c/a%b"}], ["the message 'c/a%b' has an id that is not well formed"]),
        ([message(1) | {"_id": f"c/{'x' * 1_500}"}, message(2) | {"_id": "c/a%2Fb 张"}], []),
        (
            [message(1), message(2, created_at=START - timedelta(milliseconds=1))],
            ["created_at runs backwards at seq 2"],
        ),
        (
            [message(1) | {"_id": bson.ObjectId("0123456789abcdef01234567")}],
            ["the message 0123456789abcdef01234567 is not well formed: its _id"],
        ),
        ([message(1, created_at="now")], ["the message c/m1 is not well formed: its created_at"]),
        ([message(1) | {"seq": True}], ["the message c/m1 is not well formed: its seq"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_message_that_breaks_an_invariant_is_named(messages: list[Json], faults: list[str]) -> None:
    findings = check(*messages)
    assert [what for what, _ in findings.faults] == faults
    assert findings.count == len(messages)


def test_another_users_message_is_told_from_what_an_import_left() -> None:
    findings = check(message(1), message(2, owner="bob"), message(4, owner="bob"))
    assert findings.of_another_user == 2
    # Behind the last message it is no part of the conversation, so it is not counted.
    assert (findings.count, findings.last_seq) == (2, 2)


def test_of_many_faults_only_the_number_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_HELD", 3)
    findings = check(*(message(1, _id=f"c/m{n}") for n in range(9)))
    assert [what for what, _ in findings.faults] == ["seq 1 stands twice"] * 3
    assert findings.more_faults == 5


@pytest.mark.parametrize(
    ("key", "place"), [("c", "c"), (["d", "c"], "c"), ([7, "c"], "c"), ([7], None), ([], None), (7, None)]
)
def test_a_message_has_one_place_in_a_walk(key: Any, place: str | None) -> None:
    assert checks.place_of({"conversation_id": key}) == place


def test_ranges_that_meet_have_each_key_once() -> None:
    keys = ["a", after("a"), "a\x01", "b", "bb", "\U0001f600", "\uffff"]
    parts = [KeyRange(None, "a"), KeyRange("a", after("a")), KeyRange(after("a"), "b"), KeyRange("b", None)]
    assert all(sum(part.has(key) for part in parts) == 1 for key in keys)


@pytest.mark.parametrize(
    ("key", "is_key"),
    [
        ("c", True),
        ("acme/c", True),
        ("a%2Fb", True),
        ("张伟/a%25", True),
        ("a/b/c", False),
        ("", False),
        ("acme/", False),
        ("./c", False),
        ("100%", False),
        ("a%2fb", False),
        ("a%41", False),
        ("a\n", False),
    ],
)
def test_a_key_is_an_id_or_a_tenant_and_an_id(key: str, is_key: bool) -> None:
    assert tenancy.is_key(key) is is_key


@pytest.mark.parametrize("name", ["last_seq", "message_count", "user_id", "created_at"])
@pytest.mark.parametrize("value", ["1", b"1", None])
def test_a_field_of_another_type_is_not_well_formed(name: str, value: Any) -> None:
    if name == "user_id" and value == "1":
        return
    with pytest.raises(MalformedDocument):
        checks.document(encoded(conversation(**{name: value})))


def test_a_violation_is_a_line() -> None:
    assert (
        str(checks.Violation("c", "it is not well formed", "repaired"))
        == "c: it is not well formed (repaired)"
    )
    assert str(checks.Violation("c", "it is not well formed")) == "c: it is not well formed"
