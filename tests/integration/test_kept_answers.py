"""Every answer of a process that keeps pages is, byte for byte, that of one that keeps none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pymongo import monitoring

from service.chat_service import ChatService
from service.database import Database
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import OwnerKey, TenantScope
from service.user_data import erasure
from tests.harness import Service, append, command, create, new_id, running
from tests.integration.test_flat_cost import Commands

COUNT = 30
QUERIES: list[dict[str, Any]] = [
    {"last": 10},
    {"last": 1},
    {"limit": 7},
    {"limit": 7, "order": "desc"},
    {"after": 5, "limit": 9},
    {"before": 20, "limit": 9, "order": "desc"},
    {"before": 12, "last": 4},
    {"role": "user", "last": 5},
    {"as": "items", "last": 10},
    {"limit": 1000},
]


def said(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def bare(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A process on the same database that keeps nothing."""
    directory = tmp_path_factory.mktemp("bare")
    settings = {"mongodb_url": service.database_url, "cache_bytes": 0}
    with running(directory, **settings) as started, started.client() as opened:
        yield opened


@pytest.fixture
def other(second_service: Service) -> Iterator[httpx.Client]:
    """A process on the same database that changes what the first one keeps."""
    with second_service.client() as opened:
        yield opened


def answer(client: httpx.Client, conversation: str, **query: Any) -> tuple[int, bytes, str | None]:
    found = client.get(f"/conversations/{conversation}/messages", params=query)
    return found.status_code, b"" if found.is_error else found.content, found.headers.get("etag")


def answers(client: httpx.Client, conversation: str) -> list[tuple[int, bytes, str | None]]:
    return [answer(client, conversation, **query) for query in QUERIES]


# -- changes of other processes --------------------------------------------------------------------


def remake(client: httpx.Client, conversation: str) -> None:
    """Delete the conversation, and make one with the same id, owner and number of messages."""
    assert client.delete(f"/conversations/{conversation}").status_code == 204
    create(client, conversation, user=f"of-{conversation}")
    append(client, conversation, *[said(f"again {n}") for n in range(COUNT)])


def change(method: str, path: str, body: Any = None) -> Callable[[httpx.Client, str], None]:
    def make(client: httpx.Client, conversation: str) -> None:
        about = path.format(about=f"/conversations/{conversation}", user=f"/users/of-{conversation}")
        assert client.request(method, about, json=body).is_success

    return make


CHANGES: dict[str, Callable[[httpx.Client, str], None]] = {
    "an append": change("POST", "{about}/messages", {"messages": [said("new")]}),
    "an append of many": change("POST", "{about}/messages", {"messages": [said("new")] * 40}),
    "a pop": change("POST", "{about}/pop"),
    "a message deleted": change("DELETE", "{about}/messages/m25"),
    "an old message deleted": change("DELETE", "{about}/messages/m2"),
    "a message replaced": change("PUT", "{about}/messages/m25", said("replaced")),
    "a cut off": change("DELETE", "{about}/messages?after=12"),
    "everything cut off": change("DELETE", "{about}/messages?after=0"),
    "the history replaced": change(
        "PUT", "{about}/messages", {"messages": [{"id": "m1", **said("one")}, {"id": "new", **said("two")}]}
    ),
    "the title changed": change("PATCH", "{about}", {"title": "new"}),
    "the conversation deleted": change("DELETE", "{about}"),
    "the conversation made again": remake,
    "the user erased": change("DELETE", "{user}"),
}


@pytest.mark.parametrize("made", CHANGES)
def test_every_answer_is_what_is_stored_after_a_change_of_another_process(
    client: httpx.Client, other: httpx.Client, bare: httpx.Client, made: str
) -> None:
    conversation = new_id()
    create(client, conversation, user=f"of-{conversation}")
    append(client, conversation, *[{"id": f"m{n}", **said(f"say {n}")} for n in range(1, COUNT + 1)])
    before = answers(bare, conversation)
    assert answers(client, conversation) == before  # first time
    assert answers(client, conversation) == before  # again
    for change_it in (CHANGES[made], CHANGES["an append"]):
        if answer(bare, conversation)[0] == 404:
            break
        change_it(other, conversation)
        after = answers(bare, conversation)
        assert answers(client, conversation) == after
        assert answers(client, conversation) == after


def test_a_conversation_that_is_imported_in_place_of_one_is_what_is_read(
    service: Service, client: httpx.Client, bare: httpx.Client, tmp_path: Path
) -> None:
    conversation, user = new_id(), new_id("user")
    create(client, conversation, user=user)
    append(client, conversation, *[said(f"say {n}") for n in range(5)])
    lines = [json.loads(line) for line in client.get(f"/users/{user}/export").text.splitlines()]
    assert len(answer(client, conversation)[1]) > 0
    assert client.delete(f"/conversations/{conversation}").status_code == 204
    for line in lines:
        if "message" in line:
            line["message"]["content"] = f"imported {line['message']['seq']}"
    (file := tmp_path / "export.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert answer(client, conversation)[0] == 404
    done = command(service, "import", str(file))
    assert done.returncode == 0, done.stderr
    assert answers(client, conversation) == answers(bare, conversation)
    assert b"imported 5" in answer(client, conversation)[1]


def test_who_is_asked_for_is_asked_for_though_another_was_answered(client: httpx.Client) -> None:
    conversation = create(client, new_id(), user="ada")
    append(client, conversation, said("mine"))
    assert answer(client, conversation, user_id="ada")[0] == 200
    assert answer(client, conversation, user_id="bob")[0] == 404


def test_no_read_shows_less_than_was_acknowledged_before_it_while_another_process_writes(
    client: httpx.Client, other: httpx.Client, bare: httpx.Client
) -> None:
    """Each answer that the writer got bounds what a later read may say."""
    conversation = create(client, new_id())
    append(client, conversation, *[{"id": f"m{n}", **said("0")} for n in range(1, 41)])
    acknowledged = {"version": 0, "replaced": 0}
    ended, failures = threading.Event(), list[Exception]()

    def write() -> None:
        about = f"/conversations/{conversation}/messages"
        try:
            for n in range(1, 60):
                if ended.is_set():
                    return
                assert other.put(f"{about}/m40", json=said(str(n))).is_success
                acknowledged["replaced"] = n
                if n % 3 == 0:
                    assert other.delete(f"{about}/m{n % 39 + 1}").status_code in {204, 404}
                append(other, conversation, said("appended"), said("popped"))
                assert other.post(f"/conversations/{conversation}/pop").is_success
                tag = other.get(f"/conversations/{conversation}").headers["etag"]
                acknowledged["version"] = int(tag.strip('"').split("-")[0])
        except (AssertionError, httpx.HTTPError) as error:
            failures.append(error)
        finally:
            ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    try:
        while not ended.is_set():
            version, replaced = acknowledged["version"], acknowledged["replaced"]
            found = client.get(f"/conversations/{conversation}/messages", params={"last": 1000})
            assert int(found.headers["etag"].strip('"')) >= version
            data = found.json()["data"]
            (marked,) = [each for each in data if each["id"] == "m40"]
            assert int(marked["content"]) >= replaced
            seqs = [each["seq"] for each in data]
            assert seqs == sorted(set(seqs))
            reads += 1
    finally:
        ended.set()
        writer.join()
    assert not failures, failures
    assert reads > 20
    assert answers(client, conversation) == answers(bare, conversation)


# -- conditional requests --------------------------------------------------------------------------


def test_a_kept_page_is_a_304_only_while_nothing_changed(client: httpx.Client, other: httpx.Client) -> None:
    conversation = create(client, new_id())
    append(client, conversation, said("one"), said("two"))
    path = f"/conversations/{conversation}/messages"
    tag = client.get(path).headers["etag"]
    assert client.get(path, headers={"If-None-Match": tag}).status_code == 304
    assert other.post(f"/conversations/{conversation}/pop").is_success
    changed = client.get(path, headers={"If-None-Match": tag})
    assert (changed.status_code, len(changed.json()["data"])) == (200, 1)


# -- what is asked of the database, and what is forgotten -------------------------------------------


@contextlib.asynccontextmanager
async def processes(
    service: Service, count: int, **settings: Any
) -> AsyncIterator[tuple[list[ConversationStore], Commands]]:
    """What so many processes have, on one connection (see Beanie), with every command counted."""
    chosen = Settings(_env_file=None, mongodb_url=service.database_url, **settings)
    commands = Commands()
    monitoring.register(commands)
    database = Database(chosen)
    await database.open()
    monitoring._LISTENERS.command_listeners.remove(commands)
    stores = [ConversationStore(database, chosen) for _ in range(count)]
    commands.sent.clear()
    try:
        yield stores, commands
    finally:
        for each in stores:
            await each.close()
        await database.close()


def finds(commands: Commands) -> list[Any]:
    """Return the filters of what reads asked for since the last call."""
    found = [each["filter"] for each in commands.sent if each.get("find") in {"conversations", "messages"}]
    commands.sent.clear()
    return found


@pytest.mark.parametrize("cache_bytes", [2**25, 0])
async def test_a_page_that_is_read_again_costs_one_query_and_after_an_append_few(
    service: Service, client: httpx.Client, cache_bytes: int
) -> None:
    conversation = create(client, new_id())
    append(client, conversation, *[said(f"say {n}") for n in range(100)])
    async with processes(service, 1, cache_bytes=cache_bytes) as ((store,), commands):
        chat = ChatService(store, TenantScope())
        first = await chat.get_encoded_history(conversation, last=50)
        assert len(finds(commands)) == 2
        again = await chat.get_encoded_history(conversation, last=50)
        assert again == first
        assert len(finds(commands)) == (1 if cache_bytes else 2)
        append(client, conversation, said("new"))
        after = await chat.get_encoded_history(conversation, last=50)
        assert (len(after.messages), b'"new"' in after.messages[-1]) == (50, True)
        # Where some was kept, the conversation is looked at again behind the new message.
        _, messages, *looks = finds(commands)
        assert len(looks) == (1 if cache_bytes else 0)
        assert (messages["seq"]["$gt"] == 100) is (cache_bytes > 0)
        assert (store.kept_pages.find(await store.state(chat_ref(conversation))) is None) is (
            cache_bytes == 0
        )


def chat_ref(conversation: str) -> Any:
    return TenantScope().conversation(conversation, None)


async def test_the_messages_of_an_erased_user_leave_every_process_within_a_second(
    service: Service, client: httpx.Client
) -> None:
    user = new_id("user")
    conversation = create(client, new_id(), user=user)
    append(client, conversation, said("mine"))
    async with processes(service, 2) as (stores, _):
        for store in stores:
            await ChatService(store, TenantScope()).get_encoded_history(conversation)
            assert store.kept_pages._size
        assert (await erasure.erase(stores[0], OwnerKey(user), 10)).done
        await asyncio.sleep(1.0)
        assert [each.kept_pages._size for each in stores] == [0, 0]
