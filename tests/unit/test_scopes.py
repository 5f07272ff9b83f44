"""Keys: no two of different tenants are equal, and no id reaches out of its tenant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ConversationNotFound, MessageNotFound
from service.scopes import Scope, message_key, own_id

ids = st.from_regex(r"\A[A-Za-z0-9._:@~-]{1,8}\Z")
scopes = st.builds(Scope, tenant=st.one_of(st.just(""), ids))


@given(scopes, scopes, ids, ids)
def test_keys_of_different_tenants_are_never_equal(one: Scope, other: Scope, a: str, b: str) -> None:
    same = (one.tenant, a) == (other.tenant, b)
    assert (one.key(a) == other.key(b)) is same
    assert (one.owner_of(a) == other.owner_of(b)) is same
    assert own_id(one.key(a)) == a


@given(st.tuples(scopes, ids, ids), st.tuples(scopes, ids, ids))
def test_keys_of_messages_are_their_conversations_and_nobody_elses(
    one: tuple[Scope, str, str], other: tuple[Scope, str, str]
) -> None:
    keys = [message_key(scope.key(conversation), message) for scope, conversation, message in (one, other)]
    assert (keys[0] == keys[1]) is (one == other)


@given(scopes, ids, ids)
def test_what_has_a_slash_names_nothing(scope: Scope, a: str, b: str) -> None:
    with pytest.raises(ConversationNotFound):
        scope.key(f"{a}/{b}")
    with pytest.raises(ConversationNotFound):
        scope.owner(f"{a}/{b}")
    with pytest.raises(MessageNotFound):
        message_key(scope.key(a), f"{a}/{b}")


def test_a_users_scope_is_that_users_whoever_is_asked_for() -> None:
    scope = Scope("acme", "ada")
    assert scope.owner(None) == scope.owner("bob") == scope.owner_of("bob") == "acme/ada"
    assert Scope("acme").owner(None) is None
    assert Scope().key("c") == "c"
