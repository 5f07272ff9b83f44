"""Reading: pages in both directions, times, roles, holes, streams."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import httpx
import pytest
from pymongo import MongoClient

from tests.harness import Service, append, create, history, new_id, whole_history


@pytest.fixture(scope="module")
def talk(service: Service) -> Any:
    """A conversation of 40 messages in batches of 4, of which 11 to 17 and 30 were deleted."""
    with service.client() as client:
        conversation = create(client, new_id())
        stored: list[Any] = []
        for turn in range(10):
            roles = ["user", "assistant", "tool", "assistant"]
            stored += append(client, conversation, *({"role": r, "content": f"{turn}"} for r in roles))
        for each in [*stored[10:17], stored[29]]:
            assert client.delete(f"/conversations/{conversation}/messages/{each['id']}").status_code == 204
        return conversation, [each for each in stored if each["seq"] not in {*range(11, 18), 30}]


def test_the_default_page_is_the_oldest_50(client: httpx.Client, conversation: str) -> None:
    stored = append(client, conversation, *({"role": "user", "content": str(n)} for n in range(60)))
    page = history(client, conversation)
    assert page == {"data": stored[:50], "has_more": True, "next": 50}
    assert history(client, conversation, after=50) == {"data": stored[50:], "has_more": False, "next": None}


@pytest.mark.parametrize("limit", [1, 2, 7, 31, 32, 33, 1000])
def test_paging_forward_finds_everything_once_and_has_more_is_true(
    client: httpx.Client, talk: Any, limit: int
) -> None:
    conversation, stored = talk
    found: list[Any] = []
    page: dict[str, Any] = {"next": 0}
    while page["next"] is not None:
        page = history(client, conversation, after=page["next"], limit=limit)
        found += page["data"]
        assert page["has_more"] is (len(found) < len(stored))
    assert found == stored


@pytest.mark.parametrize("limit", [1, 3, 16, 32, 1000])
def test_paging_backwards_finds_everything_once(client: httpx.Client, talk: Any, limit: int) -> None:
    conversation, stored = talk
    found: list[Any] = []
    query: dict[str, Any] = {"order": "desc", "limit": limit}
    while True:
        page = history(client, conversation, **query)
        found += page["data"]
        assert page["has_more"] is (len(found) < len(stored))
        if page["next"] is None:
            break
        query["before"] = page["next"]
    assert found == stored[::-1]


def test_last_is_the_newest_oldest_first(client: httpx.Client, talk: Any) -> None:
    conversation, stored = talk
    page = history(client, conversation, last=5)
    assert page == {"data": stored[-5:], "has_more": True, "next": stored[-5]["seq"]}
    assert history(client, conversation, last=5, before=page["next"])["data"] == stored[-10:-5]
    assert history(client, conversation, last=32) == {"data": stored, "has_more": False, "next": None}


def test_after_and_before_together_bound_a_range(client: httpx.Client, talk: Any) -> None:
    conversation, stored = talk
    page = history(client, conversation, after=5, before=20)
    assert page["data"] == [each for each in stored if 5 < each["seq"] < 20]
    assert page["has_more"] is False
    for empty in (
        {"after": 40},
        {"after": 2**63 - 1},
        {"before": 0},
        {"after": 10, "before": 18},
        {"before": 1},
    ):
        assert history(client, conversation, **empty) == {"data": [], "has_more": False, "next": None}


@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system"])
def test_a_role_filters_before_pages_are_cut(client: httpx.Client, talk: Any, role: str) -> None:
    conversation, stored = talk
    expected = [each for each in stored if each["role"] == role]
    found: list[Any] = []
    page: dict[str, Any] = {"next": 0}
    while page["next"] is not None:
        page = history(client, conversation, after=page["next"], limit=3, role=role)
        found += page["data"]
        assert page["has_more"] is (len(found) < len(expected))
    assert found == expected


def test_times_bound_a_history_both_ends_included(client: httpx.Client, talk: Any) -> None:
    conversation, stored = talk
    times = sorted({each["created_at"] for each in stored})
    for since, until in [
        (times[0], times[-1]),
        (times[2], times[2]),
        (times[1], times[5]),
        (times[5], times[1]),
    ]:
        expected = [each for each in stored if since <= each["created_at"] <= until]
        assert history(client, conversation, since=since, until=until)["data"] == expected
    assert history(client, conversation, since="2999-01-01T00:00:00Z")["data"] == []
    assert history(client, conversation, until="1999-01-01T00:00:00+02:00")["data"] == []
    assert history(client, conversation, since="1999-01-01T00:00:00Z")["data"] == stored
    assert history(client, conversation, since=times[3], last=2)["data"] == stored[-2:]


def test_created_at_never_runs_backwards_even_when_a_clock_did(
    client: httpx.Client, service: Service, conversation: str
) -> None:
    append(client, conversation, {"role": "user", "content": "now"})
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        # A process whose clock is an hour ahead has written here.
        ahead = {"$set": {"updated_at": datetime.fromisoformat("2099-01-01T00:00:00+00:00")}}
        operator.get_default_database().conversations.update_one({"_id": conversation}, ahead)
    append(client, conversation, {"role": "user", "content": "later"})
    client.patch(f"/conversations/{conversation}", json={"title": "x"})
    append(client, conversation, {"role": "user", "content": "last"})
    times = [each["created_at"] for each in whole_history(client, conversation)]
    assert times == sorted(times)
    assert times[1:] == ["2099-01-01T00:00:00.000Z"] * 2


def test_times_are_the_same_value_wherever_they_appear(client: httpx.Client, conversation: str) -> None:
    stored = append(client, conversation, {"role": "user", "content": "x"})[0]
    assert client.get(f"/conversations/{conversation}/messages/{stored['id']}").json() == stored
    assert client.get(f"/conversations/{conversation}").json()["updated_at"] == stored["created_at"]
    assert len(stored["created_at"]) == len("2026-01-01T00:00:00.000Z")


def ndjson(client: httpx.Client, conversation: str, **query: Any) -> list[Any]:
    headers = {"accept": "application/x-ndjson"}
    response = client.get(f"/conversations/{conversation}/messages", params=query, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_whole_history_streams_as_lines(client: httpx.Client, conversation: str) -> None:
    stored: list[Any] = []
    for _ in range(3):
        stored += append(client, conversation, *({"role": "user", "content": str(n)} for n in range(500)))
    assert ndjson(client, conversation) == stored
    assert ndjson(client, conversation, order="desc") == stored[::-1]
    assert ndjson(client, conversation, after=10, before=1400, limit=700) == stored[10:710]
    assert ndjson(client, conversation, last=3) == stored[-3:]


def test_an_empty_history_is_no_error(client: httpx.Client, conversation: str) -> None:
    assert history(client, conversation) == {"data": [], "has_more": False, "next": None}
    assert ndjson(client, conversation) == []


def test_what_can_be_refused_is_refused_before_a_stream_begins(client: httpx.Client) -> None:
    headers = {"accept": "application/x-ndjson"}
    assert client.get("/conversations/none/messages", headers=headers).status_code == 404


def test_cutting_off_the_end_leaves_the_beginning_and_never_reuses_a_seq(
    client: httpx.Client, conversation: str
) -> None:
    stored = append(client, conversation, *({"role": "user", "content": str(n)} for n in range(10)))
    path = f"/conversations/{conversation}/messages"
    assert client.delete(path, params={"after": 6}).status_code == 204
    assert client.delete(path, params={"after": 6}).status_code == 204
    assert whole_history(client, conversation) == stored[:6]
    assert client.get(f"/conversations/{conversation}").json()["message_count"] == 6
    assert append(client, conversation, {"role": "user", "content": "regenerated"})[0]["seq"] == 11
    assert client.delete(path).status_code == 204
    assert whole_history(client, conversation) == []
    about = client.get(f"/conversations/{conversation}").json()
    assert (about["message_count"], about["last_seq"]) == (0, 11)


def test_a_long_end_is_cut_off_in_batches(client: httpx.Client, conversation: str) -> None:
    for _ in range(3):
        append(client, conversation, *({"role": "user", "content": "x"} for _ in range(800)))
    assert client.delete(f"/conversations/{conversation}/messages", params={"after": 3}).status_code == 204
    assert [each["seq"] for each in whole_history(client, conversation)] == [1, 2, 3]
    assert client.get(f"/conversations/{conversation}").json()["message_count"] == 3


def test_one_message_is_read_and_deleted(client: httpx.Client, conversation: str) -> None:
    stored = append(client, conversation, *({"role": "user", "content": str(n)} for n in range(3)))
    path = f"/conversations/{conversation}/messages/{stored[1]['id']}"
    assert client.get(path).json() == stored[1]
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == client.delete(path).status_code == 404
    assert client.get(path).json()["type"].endswith("message-not-found")
    assert whole_history(client, conversation) == [stored[0], stored[2]]
    about = client.get(f"/conversations/{conversation}").json()
    assert (about["message_count"], about["last_seq"]) == (2, 3)


def test_popping_takes_the_newest_and_says_when_there_is_none(
    client: httpx.Client, conversation: str
) -> None:
    stored = append(client, conversation, *({"role": "user", "content": str(n)} for n in range(4)))
    path = f"/conversations/{conversation}"
    assert client.delete(f"{path}/messages/{stored[3]['id']}").status_code == 204
    assert [client.post(f"{path}/pop").json() for _ in range(3)] == [stored[2], stored[1], stored[0]]
    nothing = client.post(f"{path}/pop")
    assert (nothing.status_code, nothing.content) == (204, b"")
    about = client.get(path).json()
    assert (about["message_count"], about["last_seq"]) == (0, 4)
    assert append(client, conversation, {"role": "user", "content": "next"})[0]["seq"] == 5


def test_a_page_of_large_messages_ends_early_and_says_so(client: httpx.Client, conversation: str) -> None:
    for _ in range(5):
        append(client, conversation, {"role": "user", "content": "x" * 12_000_000})
    page = history(client, conversation)
    assert [each["seq"] for each in page["data"]] == [1, 2]
    assert (page["has_more"], page["next"]) == (True, 2)
    assert [each["seq"] for each in history(client, conversation, last=4)["data"]] == [4, 5]
    assert [each["seq"] for each in whole_history(client, conversation)] == [1, 2, 3, 4, 5]
    assert [each["seq"] for each in ndjson(client, conversation)] == [1, 2, 3, 4, 5]
