"""Every answer is bounded in bytes, and so is what is read for it; lists end, and miss nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.pagination import SyncConversationCursorPage
from openai.types.conversations import Conversation
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from service.chat_service import ChatService
from service.database import Database
from service.errors import ConversationNotFound, InvalidRequest
from service.history.store import ConversationStore
from service.settings import METADATA_BYTES_MAX, Settings
from service.tenancy import TenantScope
from tests.harness import Service, append, create, history, new_id, running

MIB = 1024 * 1024
PAGE_BYTES = 100_000  # of the service `small`


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of this module's own, with an engine that no other test shares: what is stored here is large.

    It has time for that also on a busy machine.
    """
    with running(tmp_path_factory.mktemp("bounds"), database_timeout_ms=30_000) as started:
        yield started


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose pages are small, so that little is needed to be beyond one."""
    with running(tmp_path_factory.mktemp("small"), page_bytes_max=PAGE_BYTES) as service:
        yield service


@pytest.fixture
def narrow(small: Service) -> Iterator[httpx.Client]:
    with small.client() as opened:
        yield opened


def make(service: Service, user: str, sizes: list[int]) -> list[str]:
    """Make conversations with metadata of these sizes, and return their ids, the latest first.

    Metadata that is larger than a caller may give is stored as an earlier version has stored it.
    """
    made = []
    with service.client() as client, MongoClient[dict[str, Any]](service.database_url) as operator:
        for size in sizes:
            fits = size < METADATA_BYTES_MAX - 100
            body = {"user_id": user, "metadata": {"x": "y" * size if fits else ""}}
            made.append(client.post("/conversations", json=body).json()["id"])
            if not fits:
                store_metadata(operator, made[-1], size)
    return made[::-1]


def store_metadata(operator: MongoClient[dict[str, Any]], conversation: str, size: int) -> None:
    conversations = operator.get_default_database().conversations
    conversations.update_one({"_id": conversation}, {"$set": {"metadata": {"x": "y" * size}}})


def native_pages(client: httpx.Client, user: str, **query: Any) -> Iterator[Any]:
    query |= {"user_id": user}
    while True:
        page = client.get("/conversations", params=query).json()
        yield page
        if not page["has_more"]:
            return
        query["cursor"] = page["next"]


def openai_pages(client: httpx.Client, user: str, **query: Any) -> Iterator[Any]:
    query |= {"user": user}
    while True:
        page = client.get("/v1/conversations", params=query).json()
        yield page
        if not page["has_more"]:
            return
        query["after"] = page["last_id"]


Pages = Callable[..., Iterator[Any]]
BOTH = pytest.mark.parametrize("pages", [native_pages, openai_pages])


def ids(pages: list[Any]) -> list[list[str]]:
    return [[each["id"] for each in page["data"]] for page in pages]


# -- bytes -------------------------------------------------------------------------------------------


@BOTH
def test_a_page_of_large_conversations_ends_early_and_goes_on_just_behind(
    small: Service, narrow: httpx.Client, pages: Pages
) -> None:
    user = new_id("user")
    made = make(small, user, [30_000] * 7)
    assert ids(list(pages(narrow, user, limit=100))) == [made[:3], made[3:6], made[6:]]
    assert ids(list(pages(narrow, user, limit=2))) == [made[:2], made[2:4], made[4:6], made[6:]]


@BOTH
def test_a_conversation_beyond_the_bound_is_a_page_of_its_own(
    small: Service, narrow: httpx.Client, pages: Pages
) -> None:
    user = new_id("user")
    made = make(small, user, [10, 2 * PAGE_BYTES, 10, 10, 2 * PAGE_BYTES])
    assert ids(list(pages(narrow, user))) == [made[:1], made[1:3], made[3:4], made[4:]]


def test_a_message_beyond_the_bound_is_a_page_of_its_own(narrow: httpx.Client) -> None:
    conversation = create(narrow, new_id())
    for size in (2 * PAGE_BYTES, 10, 10, 2 * PAGE_BYTES, 2 * PAGE_BYTES):
        append(narrow, conversation, {"role": "user", "content": "x" * size})
    reads: list[tuple[dict[str, Any], list[list[int]]]] = [
        ({}, [[1], [2, 3], [4], [5]]),
        ({"order": "desc"}, [[5], [4], [3, 2], [1]]),
        ({"limit": 2}, [[1], [2, 3], [4], [5]]),
    ]
    for options, expected in reads:
        onward = "before" if options.get("order") == "desc" else "after"
        found: list[list[int]] = []
        edge: dict[str, int] = {}
        while True:
            page = history(narrow, conversation, **options, **edge)
            found.append([each["seq"] for each in page["data"]])
            if not page["has_more"]:
                break
            edge = {onward: page["next"]}
        assert found == expected


def test_a_list_of_40_mib_is_cut_and_is_read_in_bounded_memory(
    service: Service, client: httpx.Client
) -> None:
    user = new_id("user")
    made = make(service, user, [MIB] * 40)
    for pages in (native_pages, openai_pages):
        with grown(service) as megabytes:
            found = list(pages(client, user, limit=100))
        assert [len(page["data"]) for page in found] == [31, 9]
        assert list(itertools.chain(*ids(found))) == made
        assert megabytes() < 250


def test_a_page_of_64_messages_of_4_mb_is_read_in_bounded_memory(
    service: Service, client: httpx.Client, conversation: str
) -> None:
    for _ in range(64):
        append(client, conversation, {"role": "user", "content": "x" * 4_000_000})
    with grown(service) as megabytes:
        page = history(client, conversation, limit=64)
    assert (len(page["data"]), page["has_more"], page["next"]) == (8, True, 8)
    # 32 MiB as they came, decoded and as JSON, and one batch of 16 MiB beyond them; 64 would be 256 MB once.
    assert megabytes() < 250
    # What stands behind a message whose id comes again is read as far as this batch could be that.
    batch = [{"role": "user", "id": page["data"][0]["id"]}, *({"role": "user"} for _ in range(63))]
    with grown(service) as megabytes:
        answer = client.post(f"/conversations/{conversation}/messages", json={"messages": batch})
    assert answer.status_code == 409, answer.text
    assert megabytes() < 150
    client.delete(f"/conversations/{conversation}")


def test_a_stream_that_meets_large_messages_after_small_ones_stays_in_bounded_memory(
    service: Service, client: httpx.Client, conversation: str
) -> None:
    append(client, conversation, *({"role": "user", "content": "x"} for _ in range(100)))
    for _ in range(25):
        append(client, conversation, {"role": "user", "content": "x" * 4_000_000})
    with grown(service) as megabytes:
        assert seqs_of_lines(client, conversation) == list(range(1, 126))
    assert megabytes() < 150
    client.delete(f"/conversations/{conversation}")


def test_an_export_and_an_erasure_of_large_conversations_stay_in_bounded_memory(
    service: Service, client: httpx.Client
) -> None:
    user = new_id("user")
    made = make(service, user, [MIB] * 60)
    with grown(service) as megabytes:
        exported = set()
        with client.stream("GET", f"/users/{user}/export") as response:
            for line in response.iter_lines():
                said = json.loads(line)
                exported |= {said["id"]} if said["type"] == "conversation" else set()
    assert exported == set(made)
    assert megabytes() < 250
    with grown(service) as megabytes:
        assert client.delete(f"/users/{user}").json()["conversations"] == 60
    assert megabytes() < 50


def seqs_of_lines(client: httpx.Client, conversation: str) -> list[int]:
    with client.stream(
        "GET", f"/conversations/{conversation}/messages", headers={"Accept": "application/x-ndjson"}
    ) as response:
        return [json.loads(line)["seq"] for line in response.iter_lines()]


class grown:  # noqa: N801  (used as a function is)
    """Tells by how many megabytes the most memory of a service's process grew inside of the block."""

    def __init__(self, service: Service) -> None:
        if not sys.platform.startswith("linux"):
            pytest.skip("only Linux tells, and forgets, the most memory that a process had")
        assert service.process is not None
        self._proc = Path(f"/proc/{service.process.pid}")

    def __enter__(self) -> Callable[[], float]:
        (self._proc / "clear_refs").write_text("5")  # the most is what it is now
        self._before = self._most()
        return lambda: self._most() - self._before

    def __exit__(self, *_: object) -> None: ...

    def _most(self) -> float:
        status = (self._proc / "status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# -- lists that change while they are read -----------------------------------------------------------


def touch(client: httpx.Client, conversation: str) -> None:
    append(client, conversation, {"role": "user", "content": "x"})


def rename(client: httpx.Client, conversation: str) -> None:
    assert client.patch(f"/conversations/{conversation}", json={"title": "new"}).status_code == 200


def delete(client: httpx.Client, conversation: str) -> None:
    assert client.delete(f"/conversations/{conversation}").status_code == 204


CHANGES = pytest.mark.parametrize("change", [touch, rename, delete])


@CHANGES
@BOTH
def test_a_list_ends_and_misses_nothing_while_its_last_conversation_changes(
    service: Service, client: httpx.Client, pages: Pages, change: Callable[[httpx.Client, str], None]
) -> None:
    user = new_id("user")
    made = make(service, user, [1] * 9)
    found = []
    for page in pages(client, user, limit=2):
        found += [each["id"] for each in page["data"]]
        change(client, page["data"][-1]["id"])
        assert len(found) <= len(made)
    assert found == made


@CHANGES
def test_openais_own_paging_ends_and_misses_nothing(
    service: Service, client: httpx.Client, change: Callable[[httpx.Client, str], None]
) -> None:
    user = new_id("user")
    made = make(service, user, [1] * 9)
    found = []
    with OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as ai:
        listed = ai.get_api_list(
            "/conversations",
            model=Conversation,
            page=SyncConversationCursorPage[Conversation],
            options={"params": {"user": user, "limit": 2}},
        )
        for each in listed:
            found.append(each.id)
            change(client, each.id)
            assert len(found) <= len(made)
    assert found == made


def test_a_list_goes_on_behind_a_plain_id_too_where_it_stands_now(
    service: Service, client: httpx.Client
) -> None:
    user = new_id("user")
    made = make(service, user, [1] * 4)
    query = {"user": user, "after": made[1]}
    assert ids([client.get("/v1/conversations", params=query).json()]) == [made[2:]]
    touch(client, made[1])
    assert ids([client.get("/v1/conversations", params=query).json()]) == [[made[0], *made[2:]]]
    for after, status in ((new_id(), 404), ("a\nb", 400), ("..", 400)):
        response = client.get("/v1/conversations", params=query | {"after": after})
        assert response.status_code == status, response.text


def test_a_position_shows_nothing_of_another_user(service: Service, client: httpx.Client) -> None:
    ada, bob = new_id("user"), new_id("user")
    make(service, ada, [1] * 3)
    last = client.get("/v1/conversations", params={"user": ada, "limit": 1}).json()["last_id"]
    assert client.get("/v1/conversations", params={"user": bob, "after": last}).json()["data"] == []


# -- limits of the database, met before it is asked --------------------------------------------------


DOTS = "." * 255


@pytest.mark.parametrize(
    ("call", "body", "at"),
    [
        ("POST /conversations/ID/messages", {"role": "user", DOTS: 1}, "$["),
        (
            "POST /conversations/ID/messages",
            {"role": "user", "content": [{"a": {DOTS: 1}}]},
            "$.content[0].a[",
        ),
        (
            "POST /conversations/ID/messages",
            {"messages": [{"role": "user", "metadata": {DOTS: 1}}]},
            "$.messages[0].metadata[",
        ),
        ("POST /conversations", {"user_id": "ada", "metadata": {"a": {DOTS: 1}}}, "$.metadata.a["),
        ("PATCH /conversations/ID", {"metadata": {DOTS: 1}}, "$.metadata["),
        ("POST /v1/conversations/ID/items", {"items": [{"type": "x", DOTS: 1}]}, "$.items[0]"),
    ],
)
def test_a_name_with_more_than_254_dots_is_refused_with_its_path(
    client: httpx.Client, conversation: str, call: str, body: Any, at: str
) -> None:
    method, where = call.replace("ID", conversation).split()
    refused = client.request(method, where, json=body)
    assert refused.status_code in {400, 422}, refused.text
    assert at in refused.text.replace("\\", ""), refused.text
    assert "dots" in refused.text
    fits = client.request(method, where, json=json.loads(json.dumps(body).replace(DOTS, DOTS[1:])))
    assert fits.status_code in {200, 201}, fits.text


@contextlib.asynccontextmanager
async def without_http(service: Service) -> AsyncIterator[ChatService]:
    """The service module itself, since a body of HTTP with metadata is smaller than what these tests need."""
    settings = Settings(mongodb_url=service.database_url, database_timeout_ms=60_000)
    database = Database(settings)
    await database.open()
    try:
        yield ChatService(ConversationStore(database, settings), TenantScope())
    finally:
        await database.close()


async def test_a_title_for_which_stored_metadata_leaves_no_room_is_refused(service: Service) -> None:
    """An earlier version stored metadata of any size up to MongoDB's own limit."""
    title = "😀" * 1_000
    user, conversation = new_id("user"), new_id()
    async with without_http(service) as chat:

        async def refused(call: Any) -> str:
            with pytest.raises(InvalidRequest) as caught:
                await call
            return caught.value.faults[0].path

        await chat.get_or_create_conversation(user, conversation)
        with MongoClient[dict[str, Any]](service.database_url) as operator:
            store_metadata(operator, conversation, 16 * MIB - 1024 - 100)
        change = chat.update_conversation
        assert await refused(change(conversation, title=title)) == "$.title"
        assert (await chat.get_conversation(conversation)).title is None
        await change(conversation, title=title, metadata={})
        assert (await chat.add_message(conversation, {"role": "user"})).messages[0]["seq"] == 1
        await chat.delete_conversation(conversation)


@pytest.mark.parametrize("how", ["delete", "cut off"])
async def test_large_messages_are_deleted_in_smaller_parts_where_a_transaction_is_too_large(
    service: Service, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """MongoDB refuses a transaction that does not fit its cache (TransactionTooLargeForCache, 388)."""
    conversation = create(client, new_id())
    append(client, conversation, *({"role": "user", "content": f"{n}"} for n in range(300)))
    settings = Settings(mongodb_url=service.database_url, database_timeout_ms=60_000)
    database = Database(settings)
    await database.open()
    deleted: list[int] = []

    def delete(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        count = self.count_documents(query, session=options.get("session"))
        if self.name == "messages" and count > 40:
            raise OperationFailure("too large for the cache", 388)
        deleted.append(count)
        return original(self, query, *arguments, **options)

    original = Collection._delete_retryable  # below all of the driver's ways to delete
    monkeypatch.setattr(Collection, "_delete_retryable", delete)
    chat = ChatService(ConversationStore(database, settings), TenantScope())
    try:
        if how == "delete":
            await chat.delete_conversation(conversation)
            with pytest.raises(ConversationNotFound):
                await chat.get_conversation(conversation)
        else:
            assert await chat.delete_messages(conversation, after=20) == 280
            assert (await chat.get_conversation(conversation)).message_count == 20
    finally:
        await database.close()
    assert max(deleted) <= 40
    assert len(deleted) < 30  # halved, and not counted down one by one
    if how == "cut off":
        assert [each["seq"] for each in history(client, conversation)["data"]] == list(range(1, 21))
