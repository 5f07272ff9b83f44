"""JSON that breaks others: what the property tests send."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

characters = st.characters(exclude_categories=["Cs"])
texts = st.one_of(
    st.text(characters, max_size=20),
    st.sampled_from(["", "\0", "a\0b", "\uffff", "é", "e\u0301", "שלום", "😀", "\u2028", "$ref", "'\"\\"]),
)
keys = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    st.sampled_from(["", ".", "a.b", ".a", "$", "$set", "$where", "$oid", "$date", "$numberLong", "$ref"]),
    st.sampled_from(["$id", "$db", "__proto__", "constructor", "_id", "id", "role", "e\u0301", "\u00e9"]),
)
numbers = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([2**53 + 1, 2**63 - 1, -(2**63), 2**31, -0.0, 0.0, 1, 1.0, 1e308, 5e-324, 0.1 + 0.2]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
references = st.permutations(["$ref", "$id", "$db", "more"]).flatmap(
    lambda names: st.fixed_dictionaries({}, optional=dict.fromkeys(names, scalars))
)
extended = st.one_of(
    references,
    st.builds(lambda v: {"$ref": "c", "$id": v}, scalars),
    st.builds(lambda v: {"$id": v, "$ref": "c"}, scalars),
    st.sampled_from(
        [
            {"$oid": "507f1f77bcf86cd799439011"},
            {"$date": "2026-01-01T00:00:00Z"},
            {"$numberLong": "1"},
            {"$binary": {"base64": "AA==", "subType": "00"}},
            {"$ref": "a", "$id": 1, "$db": None},
        ]
    ),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(scalars, extended),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=10,
)
objects = st.one_of(st.dictionaries(keys, values, max_size=5), references)
# Fields of a message that the service has never heard of.
KNOWN = {"id", "role", "content", "tool_calls", "tool_call_id", "name", "metadata", "messages"}
OWNED = {"conversation_id", "user_id", "seq", "created_at", "_id", "_exact_bson"}
unknown_fields = st.dictionaries(keys.filter(lambda key: key not in KNOWN | OWNED), values, max_size=4)


@st.composite
def messages(draw: Any) -> dict[str, Any]:
    """Any message that the service must take, its fields in any order."""
    fields = {"role": draw(st.sampled_from(["user", "assistant", "tool", "system", "developer"]))}
    optional = {
        "content": st.one_of(st.none(), texts, st.lists(values, max_size=3)),
        "tool_calls": values,
        "tool_call_id": st.one_of(st.none(), texts),
        "name": st.one_of(st.none(), texts),
        "metadata": st.one_of(st.none(), objects),
    }
    fields |= draw(st.fixed_dictionaries({}, optional=optional))
    fields |= draw(unknown_fields)
    return {name: fields[name] for name in draw(st.permutations(list(fields)))}
