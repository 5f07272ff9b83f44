"""Preconditions of writes, and reads that ask whether anything changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import Service, append, contents, create, history, new_id, new_key, running, whole_history

SAID = {"role": "user", "content": "hello"}
STALE = "urn:chat-history:problem:stale"
Send = Callable[[httpx.Client, str, dict[str, Any]], httpx.Response]


def post(client: httpx.Client, conversation: str, body: Any, **options: Any) -> httpx.Response:
    return client.post(f"/conversations/{conversation}/messages", json=body, **options)


def everything(client: httpx.Client, conversation: str) -> list[Any]:
    return [client.get(f"/conversations/{conversation}").json(), *whole_history(client, conversation)]


# -- 304 -------------------------------------------------------------------------------------------------


def test_what_has_not_changed_is_answered_304_and_what_has_is_answered(
    client: httpx.Client, conversation: str
) -> None:
    append(client, conversation, SAID)
    about = f"/conversations/{conversation}"
    paths = [about, f"{about}/messages", f"{about}/messages?last=1", f"{about}/messages?as=items"]
    tags = {path: client.get(path).headers["etag"] for path in paths}
    assert set(tags.values()) == {'"1"'}
    for path, tag in tags.items():
        for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            unchanged = client.get(path, headers={"If-None-Match": given})
            assert (unchanged.status_code, unchanged.content) == (304, b"")
            assert unchanged.headers["etag"] == tag
        assert client.get(path, headers={"If-None-Match": '"0"'}).status_code == 200
    append(client, conversation, SAID)
    for path, tag in tags.items():
        changed = client.get(path, headers={"If-None-Match": tag})
        assert (changed.status_code, changed.headers["etag"]) == (200, '"2"')


def test_a_renamed_conversation_is_no_304_and_its_messages_are(
    client: httpx.Client, conversation: str
) -> None:
    append(client, conversation, SAID)
    about = f"/conversations/{conversation}"
    seen = set()
    for title in ("one", "two"):
        tag = client.get(about).headers["etag"]
        assert client.patch(about, json={"title": title}).status_code == 200
        renamed = client.get(about, headers={"If-None-Match": tag})
        assert (renamed.status_code, renamed.json()["title"]) == (200, title)
        seen |= {tag, renamed.headers["etag"]}
    assert seen == {'"1"', '"1-1"', '"1-2"'}
    assert client.get(f"{about}/messages", headers={"If-None-Match": '"1"'}).status_code == 304
    # The history is the same, so a write may name any of these tags.
    assert post(client, conversation, SAID, headers={"If-Match": '"1-1"'}).status_code == 201


def test_a_cut_off_that_deletes_nothing_is_no_304(client: httpx.Client, conversation: str) -> None:
    """It moves `updated_at`, which the answer has."""
    append(client, conversation, SAID, SAID)
    about = f"/conversations/{conversation}"
    client.post(f"{about}/pop")
    before = client.get(about)
    assert client.delete(f"{about}/messages", params={"after": 1}).status_code == 204
    after = client.get(about, headers={"If-None-Match": before.headers["etag"]})
    assert (after.status_code, after.json()["version"]) == (200, before.json()["version"])


# -- writes ----------------------------------------------------------------------------------------------

WRITES: dict[str, Send] = {
    "a message": lambda c, of, o: post(c, of, SAID, **o),
    "a batch": lambda c, of, o: post(c, of, {"messages": [SAID, SAID]}, **o),
    "items": lambda c, of, o: post(c, of, {"items": [{"type": "reasoning"}]}, **o),
    "pop": lambda c, of, o: c.post(f"/conversations/{of}/pop", **o),
    "a deletion": lambda c, of, o: c.delete(f"/conversations/{of}/messages/m", **o),
    "a cut-off": lambda c, of, o: c.delete(f"/conversations/{of}/messages", **o),
    "a rename": lambda c, of, o: c.patch(f"/conversations/{of}", json={"title": "new"}, **o),
    "no change": lambda c, of, o: c.patch(f"/conversations/{of}", json={}, **o),
    "the end": lambda c, of, o: c.delete(f"/conversations/{of}", **o),
    "v1 items": lambda c, of, o: c.post(f"/v1/conversations/{of}/items", json={"items": [SAID]}, **o),
    "v1 deletion": lambda c, of, o: c.delete(f"/v1/conversations/{of}/items/m", **o),
    "v1 metadata": lambda c, of, o: c.post(f"/v1/conversations/{of}", json={"metadata": {"a": "b"}}, **o),
    "v1 end": lambda c, of, o: c.delete(f"/v1/conversations/{of}", **o),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("stale", "fresh"),
    [
        ({"headers": {"If-Match": '"1"'}}, {"headers": {"If-Match": '"2"'}}),
        ({"params": {"expected_last_seq": 1}}, {"params": {"expected_last_seq": 2}}),
        ({"params": {"expected_last_seq": 9}}, {"params": {"expected_last_seq": 2}}),
        (
            {"params": {"expected_last_seq": 2}, "headers": {"If-Match": '"1", "7"'}},
            {"params": {"expected_last_seq": 2}, "headers": {"If-Match": '"1", W/"2-5"'}},
        ),
        ({"params": {"expected_last_seq": 0}}, {"headers": {"If-Match": "*"}}),
    ],
    ids=["If-Match", "expected_last_seq", "a seq to come", "both", "any"],
)
def test_every_write_is_refused_where_its_condition_is_stale_and_done_where_it_is_not(
    client: httpx.Client, conversation: str, write: str, stale: dict[str, Any], fresh: dict[str, Any]
) -> None:
    append(client, conversation, SAID)
    append(client, conversation, SAID | {"id": "m"})
    before = everything(client, conversation)
    refused = WRITES[write](client, conversation, stale)
    assert refused.status_code == 409, refused.text
    assert refused.headers["x-should-retry"] == "false"
    body = refused.json()
    told = body["error"] if write.startswith("v1") else body
    assert (told["version"], told["last_seq"]) == (2, 2)
    assert told["code"] == "stale" if write.startswith("v1") else told["type"] == STALE
    assert everything(client, conversation) == before
    done = WRITES[write](client, conversation, fresh)
    assert done.is_success, done.text


def test_a_stale_answer_has_the_messages_that_were_missed(client: httpx.Client, conversation: str) -> None:
    append(client, conversation, SAID)
    append(client, conversation, *[SAID | {"content": str(n)} for n in range(150)])
    missed = post(client, conversation, SAID, params={"expected_last_seq": 1}).json()["missed"]
    assert missed == history(client, conversation, after=1, limit=100)["data"]
    by_version = post(client, conversation, SAID, headers={"If-Match": '"1"'}).json()
    assert "missed" not in by_version  # which these are is not known
    large = {"role": "user", "content": "x" * 700_000}
    append(client, conversation, large, large)
    assert len(post(client, conversation, SAID, params={"expected_last_seq": 151}).json()["missed"]) == 1
    append(client, conversation, {"role": "user", "content": "x" * 2_000_000})
    body = post(client, conversation, SAID, params={"expected_last_seq": 153}).json()
    assert (body["missed"], body["last_seq"]) == ([], 154)


def test_expected_last_seq_0_means_only_if_it_is_empty(client: httpx.Client, conversation: str) -> None:
    empty = {"params": {"expected_last_seq": 0}}
    assert post(client, conversation, SAID, **empty).status_code == 201
    assert post(client, conversation, SAID, **empty).status_code == 409
    assert client.post(f"/conversations/{conversation}/pop").status_code == 200
    # Nothing is there, as at the beginning, although `last_seq` stays.
    assert post(client, conversation, SAID, **empty).status_code == 201


def test_who_knows_the_newest_message_may_append_behind_it(client: httpx.Client, conversation: str) -> None:
    append(client, conversation, *[SAID] * 3)
    client.post(f"/conversations/{conversation}/pop")
    newest = history(client, conversation, last=1)["data"][0]["seq"]
    assert newest == 2
    assert post(client, conversation, SAID, params={"expected_last_seq": newest}).status_code == 201
    assert post(client, conversation, SAID, params={"expected_last_seq": newest}).status_code == 409


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"messages": [SAID]}, {"Idempotency-Key": "once"}),
        ({"messages": [SAID | {"id": "mine"}, SAID]}, {}),
        (SAID | {"id": "mine"}, {}),
    ],
    ids=["a key", "ids", "one id"],
)
def test_a_replay_wins_over_its_stale_condition(
    client: httpx.Client, conversation: str, body: Any, headers: dict[str, str]
) -> None:
    params = {"expected_last_seq": 0}
    first = post(client, conversation, body, params=params, headers={**headers, "If-Match": '"0"'})
    append(client, conversation, SAID)
    again = post(client, conversation, body, params=params, headers={**headers, "If-Match": '"0"'})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    other = [SAID] * 2 if headers else [SAID | {"content": "other", "id": "mine"}]
    conflict = post(client, conversation, {"messages": other}, params=params, headers=headers)
    assert conflict.json()["type"] == "urn:chat-history:problem:idempotency-conflict"


@pytest.mark.parametrize(
    "tag", ["1", '"x"', "", '"1', '"-1"', '"1-"', '"1" "2"', "W/1", '"' + "9" * 40 + '"']
)
def test_a_tag_that_is_none_of_this_service_is_refused(
    client: httpx.Client, conversation: str, tag: str
) -> None:
    refused = post(client, conversation, SAID, headers={"If-Match": tag})
    assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, "header.If-Match")
    assert client.get(f"/conversations/{conversation}", headers={"If-None-Match": tag}).status_code == 200


@pytest.mark.parametrize("seq", ["-1", "x", "", "1.0", str(2**63)])
def test_a_seq_that_is_none_is_refused(client: httpx.Client, conversation: str, seq: str) -> None:
    refused = post(client, conversation, SAID, params={"expected_last_seq": seq})
    assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, "query.expected_last_seq")


# -- many writers ----------------------------------------------------------------------------------------


async def test_32_writers_over_two_processes_append_only_to_the_history_that_they_have_read(
    service: Service, second_service: Service
) -> None:
    """Each names in its message the history on which it decided; each gets through, in bounded tries."""
    conversation, writers, turns = new_id(), 32, 3
    tries: list[int] = []
    async with service.async_client() as one, second_service.async_client() as two:
        await one.post("/conversations", json={"user_id": "ada", "id": conversation})
        path = f"/conversations/{conversation}/messages"

        async def write(writer: int) -> None:
            client = (one, two)[writer % 2]
            for turn in range(turns):
                known = (await client.get(path, params={"limit": 1000})).json()["data"]
                for attempt in range(writers * turns + 1):
                    seqs = [each["seq"] for each in known]
                    answer = await client.post(
                        path,
                        json={"role": "user", "content": f"{writer}/{turn}", "saw": seqs},
                        params={"expected_last_seq": seqs[-1] if seqs else 0},
                    )
                    if answer.status_code == 201:
                        tries.append(attempt + 1)
                        break
                    assert answer.status_code == 409, answer.text
                    known += answer.json()["missed"]
                else:
                    raise AssertionError("this writer never got through")

        await asyncio.gather(*(write(each) for each in range(writers)))
    with service.client() as client:
        stored = whole_history(client, conversation)
    assert [each["seq"] for each in stored] == list(range(1, writers * turns + 1))
    assert len(set(contents(stored))) == writers * turns
    for place, message in enumerate(stored):
        assert message["saw"] == list(range(1, place + 1))
    assert max(tries) <= writers * turns


async def test_conditional_appends_stand_among_others_without_disturbing_them(service: Service) -> None:
    conversation = new_id()
    async with service.async_client() as client:
        await client.post("/conversations", json={"user_id": "ada", "id": conversation})
        path = f"/conversations/{conversation}/messages"

        async def plain(number: int) -> int:
            return (await client.post(path, json={"role": "user", "content": f"p{number}"})).status_code

        async def conditional(number: int) -> int:
            body = {"role": "user", "content": f"c{number}", "id": f"c{number}"}
            answer = await client.post(path, json=body, params={"expected_last_seq": 0})
            return answer.status_code

        given = [(plain, conditional)[n % 2](n) for n in range(40)]
        statuses = await asyncio.gather(*given)
    assert set(statuses[0::2]) == {201}
    assert sorted(set(statuses[1::2])) in ([201, 409], [409])
    with service.client() as http:
        stored = whole_history(http, conversation)
    assert [each["seq"] for each in stored] == list(range(1, len(stored) + 1))
    assert [each["content"][0] for each in stored].count("p") == 20
    assert all(message["content"][0] == "p" for message in stored[1:])


# -- who may see what ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("closed"), auth="key") as started:
        yield started


def test_a_key_that_may_not_read_is_told_no_message(closed: Service, tmp_path: Path) -> None:
    del tmp_path
    both, writer = new_key(closed, "read", "write"), new_key(closed, "write")
    with closed.client(headers={"X-API-Key": both}) as client:
        conversation = create(client)
        append(client, conversation, SAID)
        known = post(client, conversation, SAID, params={"expected_last_seq": 0}).json()
    with closed.client(headers={"X-API-Key": writer}) as client:
        told = post(client, conversation, SAID, params={"expected_last_seq": 0})
    assert (told.status_code, told.json()) == (
        409,
        {name: value for name, value in known.items() if name != "missed"},
    )
    assert len(known["missed"]) == 1


def test_a_condition_tells_nothing_of_anothers_conversation(client: httpx.Client, conversation: str) -> None:
    append(client, conversation, SAID)
    for condition in ({"params": {"expected_last_seq": 7}}, {"headers": {"If-Match": '"7"'}}):
        options: dict[str, Any] = {"params": {}, **condition}
        options["params"] = {**options["params"], "user_id": "bob"}
        theirs = post(client, conversation, SAID, **options)
        nothing = post(client, "nothing", SAID, **options)
        assert theirs.status_code == nothing.status_code == 404
        assert theirs.text.replace(conversation, "nothing") == nothing.text
