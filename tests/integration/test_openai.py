"""The OpenAI Conversations API, asked by OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.harness import Service, append, create, new_id, whole_history

CALL = {"id": "call_1", "type": "function", "function": {"name": "search", "arguments": '{"q": "tides"}'}}


@pytest.fixture(scope="module")
def ai(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def user_says(text: str, **more: Any) -> Any:
    return {"type": "message", "role": "user", "content": text, **more}


def everything(ai: OpenAI, conversation: str, **query: Any) -> list[Any]:
    """Page to the end, as the client does, and return the items as plain JSON."""
    listed = ai.conversations.items.list(conversation, **query)
    return [item.model_dump(exclude_unset=True) for item in listed]


def raw(client: httpx.Client, conversation: str, **query: Any) -> Any:
    response = client.get(f"/v1/conversations/{conversation}/items", params=query)
    assert response.status_code == 200, response.text
    return response.json()


# -- conversations -----------------------------------------------------------------------------------


def test_a_conversation_is_created_read_changed_and_deleted(ai: OpenAI) -> None:
    made = ai.conversations.create(metadata={"topic": "tides"}, items=[user_says("When?")])
    assert made.id.startswith("conv_")
    assert made.object == "conversation"
    assert made.metadata == {"topic": "tides"}
    assert ai.conversations.retrieve(made.id) == made
    assert [item["content"][0]["text"] for item in everything(ai, made.id)] == ["When?"]
    # The map is replaced as a whole.
    assert ai.conversations.update(made.id, metadata={"a": "b"}).metadata == {"a": "b"}
    assert ai.conversations.retrieve(made.id).metadata == {"a": "b"}
    gone = ai.conversations.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "conversation.deleted")
    with pytest.raises(openai.NotFoundError):
        ai.conversations.retrieve(made.id)


async def test_the_asynchronous_client_does_the_same(service: Service) -> None:
    async with AsyncOpenAI(base_url=service.url + "/v1", api_key="none") as ai:
        made = await ai.conversations.create()
        await ai.conversations.items.create(made.id, items=[user_says(f"{n}") for n in range(45)])
        texts = [
            item.model_dump()["content"][0]["text"]
            async for item in ai.conversations.items.list(made.id, order="asc")
        ]
        assert texts == [f"{n}" for n in range(45)]


def test_metadata_is_at_most_16_pairs_of_short_strings(ai: OpenAI, client: httpx.Client) -> None:
    good = {"k" * 64: "v" * 512, **{f"{n}": "" for n in range(15)}}
    assert ai.conversations.create(metadata=good).metadata == good
    wrong: list[Any] = [{**good, "one": "more"}, {"k" * 65: "v"}, {"k": "v" * 513}, {"k": 1}, [], "x"]
    for bad in wrong:
        response = client.post("/v1/conversations", json={"metadata": bad})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"].startswith("metadata")


def test_the_owner_is_the_header_or_the_metadatas_user_or_the_default(client: httpx.Client) -> None:
    ada, bob = new_id("ada"), new_id("bob")

    def owner(user: str | None = None, **body: Any) -> str:
        headers = {"X-User-Id": user} if user else {}
        made = client.post("/v1/conversations", json=body, headers=headers).json()["id"]
        return str(client.get(f"/conversations/{made}").json()["user_id"])

    assert owner() == "default"
    assert owner(metadata={"user": bob}) == bob
    assert owner(ada, metadata={"user": bob}) == ada
    response = client.post("/v1/conversations", json={"metadata": {"user": "no\nid"}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "metadata.user")


def test_with_the_header_somebody_elses_conversation_is_none(client: httpx.Client) -> None:
    ada = new_id("ada")
    made = client.post("/v1/conversations", json={}, headers={"X-User-Id": ada}).json()["id"]
    item = client.post(f"/v1/conversations/{made}/items", json={"items": [user_says("x")]}).json()["last_id"]
    path = f"/v1/conversations/{made}"
    calls: list[tuple[str, str, Any]] = [
        ("GET", path, None),
        ("POST", path, {"metadata": {}}),
        ("POST", f"{path}/items", {"items": [user_says("x")]}),
        ("GET", f"{path}/items", None),
        ("GET", f"{path}/items/{item}", None),
        ("DELETE", f"{path}/items/{item}", None),
        ("DELETE", path, None),
        ("GET", f"/v1/conversations?user={ada}", None),
    ]
    for method, where, body in calls:
        response = client.request(method, where, json=body, headers={"X-User-Id": "bob"})
        assert response.status_code == 404, (method, where)
        assert client.request("GET", path, headers={"X-User-Id": ada}).status_code == 200


def test_conversations_are_listed_which_openai_lacks(client: httpx.Client) -> None:
    user = new_id("user")
    made = [
        client.post("/v1/conversations", json={}, headers={"X-User-Id": user}).json()["id"] for _ in range(5)
    ]
    listed: list[str] = []
    query: dict[str, Any] = {"user": user, "limit": 2}
    while True:
        page = client.get("/v1/conversations", params=query).json()
        assert set(page) == {"object", "data", "first_id", "last_id", "has_more"}
        listed += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert sorted(listed) == sorted(made)
    by_header = client.get("/v1/conversations", headers={"X-User-Id": user}).json()
    assert sorted(each["id"] for each in by_header["data"]) == sorted(made)


# -- items -------------------------------------------------------------------------------------------


def test_text_becomes_parts_and_ids_and_status_are_filled_in(ai: OpenAI) -> None:
    conversation = ai.conversations.create().id
    items: Any = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "developer", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "g"},
        {"type": "reasoning", "summary": []},
    ]
    stored = ai.conversations.items.create(conversation, items=items)
    found = everything(ai, conversation, order="asc")
    assert [item.id for item in stored.data] == [item["id"] for item in found]
    for item, role in zip(found[:3], ("user", "system", "developer"), strict=True):
        assert item.pop("id").startswith("msg_")
        text = {"user": "a", "system": "b", "developer": "c"}[role]
        said = {"type": "input_text", "text": text}
        assert item == {"type": "message", "role": role, "content": [said], "status": "completed"}
    part = {"type": "output_text", "text": "d", "annotations": [], "logprobs": []}
    assert found[3]["content"] == [part]
    assert found[4] == {**items[4], "id": found[4]["id"], "status": "completed"}
    assert found[5] == {**items[5], "id": found[5]["id"], "status": "completed"}
    assert found[6] == {**items[6], "id": found[6]["id"]}
    assert [item["id"].partition("_")[0] for item in found[4:]] == ["fc", "fco", "rs"]


ITEMS: list[dict[str, Any]] = [
    {"id": "msg_1", "type": "message", "role": "user", "status": "completed", "content": []},
    {
        "content": [{"type": "input_image", "image_url": "x", "detail": "low"}, {"type": "new_part", "$": 1}],
        "status": "incomplete",
        "role": "assistant",
        "type": "message",
        "phase": "commentary",
        "id": "msg_2",
    },
    {"type": "message", "role": "critic", "content": [], "status": "completed", "id": "msg_3"},
    {
        "type": "function_call",
        "arguments": '{"a": 1}',
        "namespace": "tools",
        "name": "f",
        "call_id": "c",
        "status": "in_progress",
        "id": "fc_1",
    },
    {"type": "function_call", "call_id": 7, "name": None, "status": "completed", "id": "fc_2"},
    {
        "type": "function_call_output",
        "output": [{"type": "input_text", "text": "x"}],
        "call_id": "c",
        "status": "completed",
        "id": "o1",
    },
    {"type": "function_call_output", "output": None, "call_id": "c", "status": "completed", "id": "o2"},
    {"type": "function_call_output", "output": {"any": ["thing"]}, "status": "completed", "id": "o3"},
    {
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "hm"}],
        "encrypted_content": "…",
        "id": "rs_1",
    },
    {"type": "web_search_call", "action": {"type": "search", "query": "q"}, "status": "failed", "id": "ws_1"},
    {
        "type": "of_next_month",
        "role": "nobody",
        "content": 7,
        "deep": {"a.b": {"$ref": "c", "$id": 1}},
        "id": "x",
    },
    {"type": "mcp_list_tools", "server_label": "s", "tools": [], "error": None, "id": "mcpl_1"},
    {"type": "", "id": "empty"},
]


@pytest.mark.parametrize("item", ITEMS, ids=[each["id"] for each in ITEMS])
def test_an_item_of_any_type_comes_back_unchanged(client: httpx.Client, item: dict[str, Any]) -> None:
    conversation = client.post("/v1/conversations", json={}).json()["id"]
    path = f"/v1/conversations/{conversation}/items"
    stored = client.post(path, json={"items": [item]}).json()
    assert stored["data"] == [item]
    assert raw(client, conversation)["data"] == [item]
    found = client.get(f"{path}/{item['id']}").json()
    assert found == item
    # The keys, too, in the order in which they came, but for the id.
    assert [name for name in found if name != "id"] == [name for name in item if name != "id"]


def test_own_ids_are_kept_and_unique_in_their_conversation(ai: OpenAI) -> None:
    first, second = ai.conversations.create().id, ai.conversations.create().id
    item = user_says("x", id="msg_mine")
    for conversation in (first, second):
        assert ai.conversations.items.create(conversation, items=[item]).last_id == "msg_mine"
    # The same again is a repetition; anything else under this id is a conflict, not to be retried.
    assert ai.conversations.items.create(first, items=[item]).last_id == "msg_mine"
    assert len(everything(ai, first)) == 1
    with pytest.raises(openai.ConflictError) as conflict:
        ai.conversations.items.create(first, items=[user_says("y", id="msg_mine")])
    assert conflict.value.response.headers["x-should-retry"] == "false"


def test_a_key_stores_once_and_goes_with_own_ids(client: httpx.Client) -> None:
    key = {"Idempotency-Key": new_id("key")}
    body = {"items": [user_says("a"), user_says("b", id="msg_own")], "metadata": {"a": "b"}}
    made = [client.post("/v1/conversations", json=body, headers=key).json() for _ in range(3)]
    assert made[0] == made[1] == made[2]
    path = f"/v1/conversations/{made[0]['id']}/items"
    assert len(client.get(path).json()["data"]) == 2
    more = {"items": [user_says("c"), {"type": "reasoning", "summary": []}]}
    stored = [client.post(path, json=more, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert stored[0].json() == stored[1].json()
    assert stored[1].headers["idempotent-replayed"] == "true"
    assert len(client.get(path).json()["data"]) == 4
    for other in (more["items"][:1], [*more["items"], user_says("d")], [user_says("e")]):
        response = client.post(path, json={"items": other}, headers={"Idempotency-Key": "k"})
        assert response.status_code == 409
        assert response.headers["x-should-retry"] == "false"
    other_body = {**body, "items": [user_says("other")]}
    assert client.post("/v1/conversations", json=other_body, headers=key).status_code == 409


def test_a_conversation_whose_items_are_refused_is_not_created(client: httpx.Client) -> None:
    user = {"X-User-Id": new_id("user")}
    taken = [user_says("a", id="same"), user_says("b", id="same")]
    assert client.post("/v1/conversations", json={"items": taken}, headers=user).status_code == 400
    assert client.get("/v1/conversations", headers=user).json()["data"] == []


def test_a_thousand_items_go_in_at_once_and_come_out_in_order(ai: OpenAI, client: httpx.Client) -> None:
    conversation = ai.conversations.create().id
    items = [user_says(f"{n}") for n in range(1_000)]
    assert len(ai.conversations.items.create(conversation, items=items).data) == 1_000
    texts = [item["content"][0]["text"] for item in everything(ai, conversation, order="asc", limit=100)]
    assert texts == [f"{n}" for n in range(1_000)]
    too_many = client.post(f"/v1/conversations/{conversation}/items", json={"items": [*items, items[0]]})
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "items")


def test_a_page_says_the_truth_about_what_follows(client: httpx.Client) -> None:
    conversation = client.post("/v1/conversations", json={}).json()["id"]
    empty: dict[str, Any] = {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    assert raw(client, conversation) == empty
    items = [user_says(f"{n}", id=f"m{n}") for n in range(20)]
    client.post(f"/v1/conversations/{conversation}/items", json={"items": items})
    page = raw(client, conversation)
    assert [item["id"] for item in page["data"]] == [f"m{n}" for n in reversed(range(20))]
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("m19", "m0", False)
    page = raw(client, conversation, limit=19)
    assert (page["last_id"], page["has_more"]) == ("m1", True)
    page = raw(client, conversation, limit=19, after="m1")
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (["m0"], False)
    assert raw(client, conversation, order="asc", after="m18", limit=1)["has_more"] is False
    assert raw(client, conversation, order="asc", after="m17", limit=1)["has_more"] is True
    nothing = raw(client, conversation, limit=0)
    assert (nothing["data"], nothing["has_more"]) == ([], True)
    for query in ({"limit": 101}, {"limit": -1}, {"limit": "x"}, {"order": "up"}, {"bogus": "1"}):
        response = client.get(f"/v1/conversations/{conversation}/items", params=query)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == next(iter(query))
    response = client.get(f"/v1/conversations/{conversation}/items", params={"after": "nowhere"})
    assert response.status_code == 404


def test_an_item_is_retrieved_and_deleted_and_the_answer_is_the_conversation(ai: OpenAI) -> None:
    conversation = ai.conversations.create(metadata={"a": "b"}, items=[user_says("x"), user_says("y")])
    first, second = everything(ai, conversation.id, order="asc")
    found = ai.conversations.items.retrieve(first["id"], conversation_id=conversation.id)
    assert found.model_dump(exclude_unset=True) == first
    assert ai.conversations.items.delete(first["id"], conversation_id=conversation.id) == conversation
    assert everything(ai, conversation.id) == [second]
    with pytest.raises(openai.NotFoundError):
        ai.conversations.items.retrieve(first["id"], conversation_id=conversation.id)
    with pytest.raises(openai.NotFoundError):
        ai.conversations.items.delete(first["id"], conversation_id=conversation.id)


WRONG_ITEMS: list[tuple[Any, str]] = [
    ({}, "items[0].type"),
    ({"type": 7}, "items[0].type"),
    ({"type": None, "role": "user"}, "items[0].type"),
    ({"type": "message"}, "items[0].role"),
    ({"role": ["user"]}, "items[0].role"),
    ({"role": "user", "content": 7}, "items[0].content"),
    ({"type": "x", "id": "a\n"}, "items[0].id"),
    ({"type": "x", "id": "a,,1"}, "items[0].id"),
    ({"type": "x", "id": 7}, "items[0].id"),
    ({"type": "x", "n": 2**63}, "items[0].n"),
    ("text", "items[0]"),
]


@pytest.mark.parametrize(("item", "place"), WRONG_ITEMS)
def test_what_is_no_item_is_a_400_that_names_the_place(client: httpx.Client, item: Any, place: str) -> None:
    conversation = client.post("/v1/conversations", json={}).json()["id"]
    response = client.post(f"/v1/conversations/{conversation}/items", json={"items": [item]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", place)
    assert response.headers["x-request-id"]
    assert raw(client, conversation)["data"] == []


def test_other_bad_requests_have_openais_shape_too(client: httpx.Client) -> None:
    conversation = client.post("/v1/conversations", json={}).json()["id"]
    path = f"/v1/conversations/{conversation}"
    form = {"content-type": "application/json"}
    cases = [
        (client.post(path, content=b"{", headers=form), 400),
        (client.post(path, content=b"{}", headers={"content-type": "text/plain"}), 415),
        (client.post(path, json={}), 400),
        (client.post(path, json={"metadata": {}, "other": 1}), 400),
        (client.post(path + "/items", json={"items": []}), 400),
        (client.put(path, json={}), 405),
        (client.get("/v1/nothing"), 404),
        (client.get("/v1/conversations/conv_missing"), 404),
        (client.get("/v1/conversations/a%20b"), 404),
        (client.get("/v1/conversations/" + "x" * 200), 404),
        (client.get(path + "/items/%00"), 404),
        (client.get(path + "/items/" + "x" * 200), 404),
        (client.get(path, params={"x": "y"}), 400),
        (client.get(path, headers={"X-User-Id": "100%"}), 400),
        (
            client.post(
                path + "/items", json={"items": [user_says("x")]}, headers={"Idempotency-Key": "a b"}
            ),
            400,
        ),
    ]
    for response, status in cases:
        assert response.status_code == status, response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


# -- one history, two views ----------------------------------------------------------------------------


def test_native_messages_read_as_items(client: httpx.Client, ai: OpenAI) -> None:
    conversation = create(client)
    second = {**CALL, "id": "call_2"}
    append(
        client,
        conversation,
        {"role": "user", "content": "When is high tide?", "id": "m1", "extra": "kept natively"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, second], "id": "m2"},
        {"role": "tool", "tool_call_id": "call_1", "content": "At 14:05", "id": "m3"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "id": "m4"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "and"}, {"type": "image_url", "image_url": {"url": "u"}}],
            "id": "m5",
        },
        {"role": "assistant", "content": None, "id": "m6"},
    )
    items = everything(ai, conversation, order="asc")
    call = {
        "type": "function_call",
        "call_id": "call_1",
        "name": "search",
        "arguments": '{"q": "tides"}',
        "status": "completed",
    }
    output = {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}
    asked = {"type": "input_text", "text": "When is high tide?"}
    assert items == [
        {"id": "m1", "type": "message", "role": "user", "content": [asked], "status": "completed"},
        {"id": "m2", "type": "message", "role": "assistant", "content": [output], "status": "completed"},
        {"id": "m2,,1", **call},
        {"id": "m2,,2", **call, "call_id": "call_2"},
        {
            "id": "m3",
            "type": "function_call_output",
            "call_id": "call_1",
            "output": "At 14:05",
            "status": "completed",
        },
        {"id": "m4", **call},
        {
            "id": "m5",
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "and"},
                {"type": "input_image", "image_url": "u", "detail": "auto"},
            ],
            "status": "completed",
        },
        {"id": "m6", "type": "message", "role": "assistant", "content": [], "status": "completed"},
    ]
    # Each is found by its id, and pages of any size, either way, give each once: also inside a message.
    for item in items:
        found = ai.conversations.items.retrieve(item["id"], conversation_id=conversation)
        assert found.model_dump(exclude_unset=True) == item
    for limit in range(1, 10):
        assert everything(ai, conversation, order="asc", limit=limit) == items
        assert everything(ai, conversation, limit=limit) == items[::-1]


@pytest.mark.parametrize(
    ("message", "items"),
    [
        ({"tool_calls": "look"}, [("unknown", '"look"')]),
        ({"tool_calls": [{"name": "f", "args": {"a": 1}, "id": "c"}]}, [("f", '{"a": 1}')]),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}, [("f", '{"a": 1}')]),
        ({"tool_calls": [7, None]}, [("unknown", "7"), ("unknown", "null")]),
    ],
)
def test_tool_calls_in_any_form_read_as_function_calls(
    client: httpx.Client, message: Any, items: list[tuple[str, str]]
) -> None:
    conversation = create(client)
    append(client, conversation, {"role": "assistant", **message})
    found = raw(client, conversation, order="asc")["data"]
    assert [(item["name"], item["arguments"]) for item in found] == items


@pytest.mark.parametrize(
    "item", [7, {}, {"type": 7}, {"type": "message", "role": None}, {"type": "function_call", "name": None}]
)
def test_a_native_message_that_plays_an_item_harms_nobody(client: httpx.Client, item: Any) -> None:
    conversation = create(client)
    message = {"role": "user", "content": "x", "tool_calls": "odd", "openai_item": item}
    append(client, conversation, message)
    assert whole_history(client, conversation)[0]["openai_item"] == item
    found = raw(client, conversation)["data"]
    assert found
    assert all(isinstance(each["type"], str) for each in found)


def test_items_read_natively_as_what_they_are(client: httpx.Client, ai: OpenAI) -> None:
    conversation = ai.conversations.create().id
    items: Any = [
        user_says("When?"),
        {"type": "function_call", "call_id": "call_1", "name": "search", "arguments": '{"q": "tides"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "At 14:05"},
        {"type": "reasoning", "summary": []},
    ]
    ai.conversations.items.create(conversation, items=items)
    asked, call, output, reasoning = whole_history(client, conversation)
    assert (asked["role"], asked["content"]) == ("user", [{"type": "input_text", "text": "When?"}])
    assert (call["role"], call["content"], call["tool_calls"]) == ("assistant", None, [CALL])
    assert (output["role"], output["tool_call_id"], output["content"]) == ("tool", "call_1", "At 14:05")
    assert (reasoning["role"], reasoning["content"]) == ("assistant", None)
    assert [each["seq"] for each in (asked, call, output, reasoning)] == [1, 2, 3, 4]


def test_a_part_of_a_native_message_is_not_deleted_alone(client: httpx.Client) -> None:
    conversation = create(client)
    stored = append(
        client, conversation, {"role": "assistant", "content": "x", "tool_calls": [CALL], "id": "m"}
    )
    for item in ("m", "m,,1"):
        response = client.delete(f"/v1/conversations/{conversation}/items/{item}")
        assert response.status_code == 400
        assert "part of a message" in response.json()["error"]["message"]
    assert client.delete(f"/v1/conversations/{conversation}/items/m,,2").status_code == 404
    assert whole_history(client, conversation) == stored
