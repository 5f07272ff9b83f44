"""JSON and ids that break others: what the property tests send."""

from __future__ import annotations

import random
import unicodedata
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
# Ids as other systems make them, and ids that are easily taken for one another.
REAL_IDS = [
    "auth0|64f0a1b2c3",
    "google-oauth2|1034",
    "user+tag@example.com",
    "whatsapp:+4915112345",
    "+49 151 12345",
    "张伟",
    "Jane Doe",
    "o'Brien",
    "user#1",
    "a&b=c?d",
    "S-1-5-21-3623811015",
    "CN=Jane Doe,OU=Sales,DC=example,DC=com",
    "arn:aws:iam::123456789012:user/jane",
    "https://idp.example.com/users/7?x=1#y",
    "urn:uuid:6e8bc430-9c3a-11d9-9669-0800200c9a66",
    "{6e8bc430}",
    "19:abc@thread.v2;messageid=1",
    "C024BE91L/p1355517523000008",
    "AQMkADAwATM3ZmYAZS0x+/==",
    "<CAF+x@mail.example.com>",
    "José",
    "😀👩‍👩‍👧",
    "שלום",
    " spaces ",
    "back\\slash",
    '"quoted"',
    "$where",
    "rs_" + "0a/+Zz" * 200 + "==",
]
LIKE_OTHERS = [
    *(
        "a/b",
        "a%2Fb",
        "a%2fb",
        "a%252Fb",
        "a%25252Fb",
        "a b",
        "a+b",
        "a%20b",
        "a",
        "b",
        "a/",
        "/b",
        "/",
        "//",
    ),
    *("%", "%25", "%2F", "100%", "%zz", "...", "../..", "%2E%2E", "..%2f", "./a", "a/../b", "a,1", "a,,1"),
    *(
        "é",
        "e\u0301",
        "\ufffd",
        "A",
        "a\u200b",
        "a ",
        " a",
        "a\xa0",
        "\u3000",
        "\u2028",
        "null",
        "0",
        "messages",
    ),
]
ids = st.one_of(
    st.sampled_from([*REAL_IDS, *LIKE_OTHERS]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40),
    st.text("%/25F.,+~ aé", min_size=1, max_size=12),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=4).map(
        lambda text: text * 90
    ),
).filter(lambda text: text not in {".", ".."})


def many_ids(seed: int, count: int, *, samples: bool = True) -> list[str]:
    """Return different ids, the samples first: much faster than to draw them from `ids`."""
    draw = random.Random(seed)
    found = dict.fromkeys([*LIKE_OTHERS, *REAL_IDS] if samples else [])
    while len(found) < count:
        text = draw.choice([_any_text, _soup, _base64])(draw)
        if text not in {"", ".", ".."}:
            found[text] = None
    return list(found)[:count]


def _any_text(draw: random.Random) -> str:
    top = draw.choice([0x7F, 0x7F, 0x17F, 0x2FFF, 0xFFFF, 0x10FFFF])
    drawn = (chr(draw.randint(0x20, top)) for _ in range(draw.choice([1, 5, 20, 375])))
    return "".join(each for each in drawn if unicodedata.category(each) not in {"Cc", "Cs"})


def _soup(draw: random.Random) -> str:
    return "".join(draw.choices("%/25F.,+~ aé?#&=;\\\"'|:@", k=draw.randint(1, 12)))


def _base64(draw: random.Random) -> str:
    return "".join(draw.choices("AZaz09+/=", k=draw.choice([8, 40, 1_000, 1_500])))


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
