"""Ids and keys: which texts are ids, and that no two ids have one key, whatever their tenants are."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from service.errors import ConversationNotFound
from service.tenancy import (
    Id,
    TenantScope,
    conversation_key_of,
    escaped,
    is_key,
    is_key_part,
    is_valid_id,
    local_id,
    message_document_id,
    tenant_of,
    unescaped,
)
from tests.strategies import LIKE_OTHERS, REAL_IDS, ids

scopes = st.builds(TenantScope, tenant=st.one_of(st.just(""), ids))
ADAPTER: TypeAdapter[str] = TypeAdapter(Id)
SCHEMA = ADAPTER.json_schema()


@pytest.mark.parametrize("text", [*REAL_IDS, *LIKE_OTHERS, "x" * 1_500, "é" * 750, "😀" * 375])
def test_text_is_an_id(text: str) -> None:
    assert is_valid_id(text)
    assert ADAPTER.validate_python(text, strict=True) == text


@pytest.mark.parametrize(
    "value",
    [
        *("", ".", "..", "x" * 1_501, "é" * 751, "😀" * 376),
        *("a\0", "\n", "a\x1f", "\x7f", "\x80a", "\x9f", "\ud800", "a\udfff", "\ud83d\ude00"),
        *(None, 1, b"a", ["a"]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_anything_else_is_none(value: object) -> None:
    assert not is_valid_id(value)
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(value, strict=True)


@given(st.text(max_size=20))
def test_the_declared_schema_is_the_rule(text: str) -> None:
    declared = len(text) >= SCHEMA["minLength"] and re.search(SCHEMA["pattern"], text) is not None
    # Python's `$` matches before a last line feed, too.
    assert is_valid_id(text) is (declared and not text.endswith("\n"))


@settings(max_examples=2_500)
@given(ids)
def test_an_id_comes_back_from_its_key(text: str) -> None:
    assert is_valid_id(text)
    assert unescaped(escaped(text)) == text
    assert is_key_part(escaped(text))
    assert "/" not in escaped(text)
    assert escaped(text).replace("%2F", "").replace("%25", "") == text.replace("%", "").replace("/", "")
    # An id that versions before this rule took is its own key.
    assert escaped(text) == text or not re.fullmatch(r"[A-Za-z0-9._:@~-]{1,128}", text)


@settings(max_examples=1_500)
@given(scopes, scopes, ids, ids)
@example(TenantScope("a"), TenantScope(), "b", "a/b")
@example(TenantScope("a/b"), TenantScope("a"), "c", "b/c")
@example(TenantScope(), TenantScope(), "a/b", "a%2Fb")
@example(TenantScope(), TenantScope(), "a%2Fb", "a%252Fb")
def test_keys_of_different_tenants_are_never_equal(
    one: TenantScope, other: TenantScope, a: str, b: str
) -> None:
    same = (one.tenant, a) == (other.tenant, b)
    assert (one.conversation_key(a) == other.conversation_key(b)) is same
    assert (one.owner_key(a) == other.owner_key(b)) is same
    assert one.conversation_key(a).startswith(one.prefix)
    assert other.conversation_key(b).startswith(one.prefix) or one.tenant != other.tenant
    assert (tenant_of(one.conversation_key(a)), local_id(one.conversation_key(a))) == (one.tenant, a)
    assert is_key(one.conversation_key(a))


@settings(max_examples=1_500)
@given(st.tuples(scopes, ids, ids), st.tuples(scopes, ids, ids))
@example((TenantScope(), "a", "b/c"), (TenantScope("a"), "b", "c"))
@example((TenantScope(), "a/b", "c"), (TenantScope("a"), "b", "c"))
def test_keys_of_messages_are_their_conversations_and_nobody_elses(
    one: tuple[TenantScope, str, str], other: tuple[TenantScope, str, str]
) -> None:
    keys = [
        message_document_id(scope.conversation_key(conversation), message)
        for scope, conversation, message in (one, other)
    ]
    assert (keys[0] == keys[1]) is (one == other)
    assert conversation_key_of(keys[0]) == one[0].conversation_key(one[1])
    assert local_id(keys[0]) == one[2]


@pytest.mark.parametrize("text", ["", "\ud800"])
def test_what_is_no_text_names_nothing(text: str) -> None:
    with pytest.raises(ConversationNotFound):
        TenantScope("acme").conversation_key(text)
    with pytest.raises(ConversationNotFound):
        TenantScope("acme").conversation("c", text)


def test_a_users_scope_is_that_users_whoever_is_asked_for() -> None:
    scope = TenantScope("acme", "ada")
    owners = {scope.conversation("c", user).owner for user in (None, "bob")}
    assert owners == {scope.owner_key("bob")} == {"acme/ada"}
    assert TenantScope("acme").conversation("c").owner is None
    assert TenantScope().conversation_key("c") == "c"
