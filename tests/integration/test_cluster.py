"""The promises on a cluster of two shards (`tests/mongo_router.py`): stored once, in order, and one's own.

The commits of the two shards are apart by as much as a test wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.chat_service import ChatService
from service.database import Database
from service.errors import UnsuitableDatabase
from service.history.store import ConversationStore
from service.maintenance.findings import Violation
from service.maintenance.verify import Verifier
from service.settings import Settings
from service.tenancy import TenantScope
from tests.harness import Service, append, command, create, history, new_id, running, whole_history
from tests.mongo_router import BY_CONVERSATION, WITH_ZONES, Keys, MongoRouter, routed, split_at

LATE_S = 0.5


def message(text: object, message_id: str | None = None) -> dict[str, Any]:
    return {"role": "user", "content": str(text)} | ({"id": message_id} if message_id else {})


@contextlib.contextmanager
def cluster(shards: tuple[int, int], keys: Keys = BY_CONVERSATION) -> Iterator[MongoRouter]:
    with routed(shards, new_id("cluster"), keys=keys) as router:
        yield router


@pytest.fixture
def router(shards: tuple[int, int]) -> Iterator[MongoRouter]:
    with cluster(shards) as started:
        yield started


Two = tuple[MongoRouter, httpx.Client, httpx.Client]


@pytest.fixture(scope="module")
def services(shards: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """Two processes of the service on one cluster."""
    with contextlib.ExitStack() as stack:
        router = stack.enter_context(cluster(shards))
        clients = [
            stack.enter_context(
                stack.enter_context(
                    running(tmp_path_factory.mktemp("cluster"), mongodb_url=router.url)
                ).client()
            )
            for _ in range(2)
        ]
        yield router, clients[0], clients[1]


@pytest.fixture
def two(services: Two) -> Iterator[Two]:
    router, *_ = services
    router.forget()
    yield services
    router.late_commits, router.answers_early = (lambda: 0.0), False


@contextlib.asynccontextmanager
async def process(router: MongoRouter, *, check: bool = True) -> AsyncIterator[ChatService]:
    """The service module, as one more process has it. There can be one of it in a process."""
    settings = Settings(_env_file=None, mongodb_url=router.url, database_timeout_ms=20_000)
    database = Database(settings)
    await database.open(indexes="require" if check else "ignore")
    try:
        yield ChatService(ConversationStore(database, settings), TenantScope())
    finally:
        await database.close()


def split(router: MongoRouter) -> Iterator[str]:
    """Ids of conversations that are on another shard than their messages."""
    return filter(router.is_split, (new_id() for _ in itertools.count()))


async def contents(chat: ChatService, conversation: str) -> list[Any]:
    return [each["content"] for each in (await chat.get_chat_history(conversation)).messages]


async def seqs(chat: ChatService, conversation: str, **query: Any) -> list[int]:
    return [each["seq"] for each in (await chat.get_chat_history(conversation, **query)).messages]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- stored once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [BY_CONVERSATION, WITH_ZONES], ids=["apart", "zones"])
async def test_an_append_and_its_retry_are_stored_once(shards: tuple[int, int], keys: Keys) -> None:
    with cluster(shards, keys) as router:
        async with process(router) as chat:
            order = [message("pay 100"), message("b")]
            for conversation in [new_id() for _ in range(16)]:
                await chat.get_or_create_conversation("ada", conversation)
                first = await chat.add_messages(conversation, order, idempotency_key="order-1")
                await chat.add_messages(conversation, [message(n) for n in range(5)])
                again = await chat.add_messages(conversation, order, idempotency_key="order-1")
                assert (again.replayed, again.messages) == (True, first.messages)
                assert await seqs(chat, conversation) == [*range(1, 8)]
        counts = [router.shard(each).messages.count_documents({}) for each in (0, 1)]
        assert min(counts) >= 7
        assert sum(counts) == 112


async def test_a_conversation_that_is_split_stores_a_retry_twice_so_the_start_refuses_its_shard_key(
    shards: tuple[int, int],
) -> None:
    with cluster(shards, split_at(4)) as router:
        # Without the check of the start: this is why there is one.
        async with process(router, check=False) as chat:
            await chat.get_or_create_conversation("ada", "c")
            order = [message("pay 100")]
            first = await chat.add_messages("c", order, idempotency_key="order-1")
            assert (await chat.add_messages("c", order, idempotency_key="order-1")).replayed
            await chat.add_messages("c", [message(n) for n in range(3)])
            again = await chat.add_messages("c", order, idempotency_key="order-1")
            assert not again.replayed
            assert await contents(chat, "c") == ["pay 100", "0", "1", "2", "pay 100"]
            violations: list[Violation] = []
            await Verifier(chat._store, repair=False, note=violations.append).run()
        double = first.messages[0]["id"]
        assert [str(each) for each in violations] == [
            f"c: the message id {double} stands 2 times, at seq 1, 5 (left: the right value is not known)"
        ]
        with pytest.raises(UnsuitableDatabase, match=r"sh\.reshardCollection"):
            async with process(router):
                raise AssertionError("it was taken")


async def test_the_command_verify_names_message_ids_that_stand_on_both_shards(
    shards: tuple[int, int], tmp_path: Path
) -> None:
    with cluster(shards, split_at(5)) as router:
        async with process(router, check=False) as chat:
            for conversation in ("broken", "sound"):
                await chat.get_or_create_conversation("ada", conversation)
                await chat.add_messages(conversation, [message(n, f"m{n}") for n in range(1, 8)])
        # By hand: seq 6, which is on the second shard, gets the id of seq 2, which is on the first.
        sixth = {"conversation_id": "broken", "seq": 6}
        document = router.shard(1).messages.find_one_and_delete(sixth)
        router.shard(1).messages.insert_one({**document, "_id": "broken/m2"})
        done = await asyncio.to_thread(command, Service(tmp_path, mongodb_url=router.url), "verify")
        assert done.returncode == 1, done.stderr
        violations, total = done.stdout.splitlines()
        assert violations.startswith("broken: the message id m2 stands 2 times, at seq 2, 6 (left")
        assert total == "2 conversations, 14 messages, 1 violations, 1 left"


# -- in order, without holes -----------------------------------------------------------------------------


async def test_a_reader_sees_no_message_before_an_earlier_one_that_still_appears(two: Two) -> None:
    router, one, another = two
    conversation = next(split(router))
    create(one, conversation)
    append(one, conversation, *[message(n) for n in range(1, 5)])
    async with process(router) as reader:
        router.forget()
        delays = iter([LATE_S])
        router.late_commits = lambda: next(delays, 0.0)
        late = asyncio.create_task(asyncio.to_thread(append, one, conversation, message(5)))
        begun = functools.partial(_has_begun_to_commit, router)
        await asyncio.to_thread(until, begun)
        (sixth,) = await asyncio.to_thread(append, another, conversation, message(6))
        assert sixth["seq"] == 6
        assert not late.done(), "6 is committed on both shards before 5 is on one"
        assert await seqs(reader, conversation) == [1, 2, 3, 4, 5, 6]
        assert await seqs(reader, conversation, last=2) == [5, 6]
        await late


def _has_begun_to_commit(router: MongoRouter) -> bool:
    return any(each.name == "commitTransaction" for each in router.seen)


@pytest.mark.parametrize("early", [False, True], ids=["answered_when_done", "answered_when_decided"])
async def test_a_reader_who_follows_gets_every_message_once_and_in_order(two: Two, early: bool) -> None:
    """Writers of two processes, whose two shards commit apart from each other, in either order."""
    router, *clients = two
    chosen, conversation = random.Random(1), next(split(router))
    router.late_commits = lambda: chosen.uniform(-0.04, 0.08)
    router.answers_early = early
    create(clients[0], conversation)
    count = 30

    def write(client: httpx.Client, name: int) -> None:
        for n in range(count):
            (stored,) = append(client, conversation, message(f"{name}/{n}"))
            # One's own message is read after it was acknowledged.
            assert stored in history(client, conversation, last=50)["data"]

    async def follow(chat: ChatService) -> None:
        read: list[int] = []
        while len(read) < 2 * count:
            read += await seqs(chat, conversation, after=read[-1] if read else 0, limit=7)
            assert read == [*range(1, len(read) + 1)]
            await asyncio.sleep(0.01)

    async with process(router) as reader, asyncio.timeout(120):
        writers = [asyncio.to_thread(write, each, name) for name, each in enumerate(clients)]
        await asyncio.gather(follow(reader), *writers)
    assert sorted(each["content"] for each in whole_history(clients[0], conversation)) == sorted(
        f"{name}/{n}" for name in (0, 1) for n in range(count)
    )


async def test_ones_own_write_is_read_after_it_was_acknowledged(router: MongoRouter) -> None:
    """Also on servers that answer a commit as soon as it is decided."""
    router.late_commits, router.answers_early = (lambda: LATE_S), True
    async with process(router) as chat:
        for first, conversation in zip((True, False), split(router), strict=False):
            router.late_commits = (lambda: LATE_S) if first else (lambda: -LATE_S)
            await chat.get_or_create_conversation("ada", conversation)
            await chat.add_messages(conversation, [message(1, "m1")])
            assert (await chat.get_message(conversation, "m1"))["seq"] == 1
            await chat.add_messages(conversation, [message(2)])
            assert await seqs(chat, conversation) == [1, 2]
            await chat.add_messages(conversation, [message(3)])
            assert (await chat.get_conversation(conversation)).message_count == 3
            await chat.add_messages(conversation, [message(4)])
            (listed,) = [
                each
                for each in (await chat.list_conversations("ada")).conversations
                if each.id == conversation
            ]
            assert listed.message_count == 4
            await chat.pop_message(conversation)
            assert await seqs(chat, conversation) == [1, 2, 3]


async def test_with_the_same_zones_an_append_is_a_transaction_of_one_shard(shards: tuple[int, int]) -> None:
    for keys, most in ((WITH_ZONES, 1), (BY_CONVERSATION, 2)):
        with cluster(shards, keys) as router:
            async with process(router) as chat:
                for n in range(12):
                    await chat.get_or_create_conversation("ada", f"c{n}")
                    await chat.add_messages(f"c{n}", [message(n)])
                    await chat.pop_message(f"c{n}")
                    await chat.delete_conversation(f"c{n}")
            assert {shard for each in router.commits for shard in each} == {0, 1}
            assert max(map(len, router.commits)) == most


# -- a model ---------------------------------------------------------------------------------------------


def test_a_model_of_mixed_verbs_over_conversations_on_both_shards(two: Two, tmp_path: Path) -> None:
    """Two processes do what they like; after each step what is read is what a plain list would have."""
    router, *clients = two
    chosen = random.Random(7)
    router.late_commits = lambda: chosen.uniform(-0.02, 0.02)
    model = Model(chosen, user=new_id("u"))
    assert {router.is_split(each) for each in model.ids} == {True, False}
    for step in range(150):
        conversation = chosen.choice(model.ids)
        model.step(chosen.choice(clients), conversation, str(step))
        found = chosen.choice(clients).get(f"/conversations/{conversation}/messages", params={"limit": 500})
        if conversation in model.messages:
            assert [(each["seq"], each["content"]) for each in found.json()["data"]] == model.messages[
                conversation
            ]
        else:
            assert found.status_code == 404
    listed = clients[0].get("/conversations", params={"user_id": model.user}).json()["data"]
    assert {each["id"]: each["message_count"] for each in listed} == {
        name: len(messages) for name, messages in model.messages.items()
    }
    done = command(Service(tmp_path, mongodb_url=router.url), "verify")
    assert " 0 violations" in done.stdout


class Model:
    """What the conversations of a user should have: the seqs and contents of their messages."""

    def __init__(self, chosen: random.Random, user: str) -> None:
        self._chosen = chosen
        self.user = user
        self.ids = [new_id() for _ in range(10)]
        self.messages: dict[str, list[tuple[int, str]]] = {}
        self._last: dict[str, int] = {}

    def step(self, client: httpx.Client, conversation: str, text: str) -> None:
        """Do one thing to a conversation, which is created if it is not there."""
        if conversation not in self.messages:
            create(client, conversation, self.user)
            self.messages[conversation], self._last[conversation] = [], 0
            return
        verbs = {"append": 3, "batch": 2, "retry": 2, "pop": 2, "remove": 2, "cut": 1, "delete": 1}
        (verb,) = self._chosen.choices([*verbs], [*verbs.values()])
        path, messages = f"/conversations/{conversation}", self.messages[conversation]
        if verb in {"append", "batch", "retry"}:
            self._append(client, conversation, text, verb)
        elif verb == "pop":
            popped = client.post(f"{path}/pop")
            assert (popped.json()["content"] if messages else popped.status_code) == (
                messages.pop()[1] if messages else 204
            )
        elif verb == "remove" and messages:
            _, content = messages.pop(self._chosen.randrange(len(messages)))
            assert client.delete(f"{path}/messages/m{content}").status_code == 204
        elif verb == "cut" and messages:
            after = self._chosen.choice(messages)[0]
            assert client.delete(f"{path}/messages", params={"after": after}).status_code == 204
            messages[:] = [each for each in messages if each[0] <= after]
        elif verb == "delete":
            assert client.delete(path).status_code == 204
            del self.messages[conversation], self._last[conversation]

    def _append(self, client: httpx.Client, conversation: str, text: str, verb: str) -> None:
        batch = [message(f"{text}.{n}", f"m{text}.{n}") for n in range(1 if verb == "append" else 4)]
        stored = append(client, conversation, *batch)
        if verb == "retry":
            assert append(client, conversation, *batch) == stored
        begin = self._last[conversation] + 1
        self.messages[conversation] += [(begin + n, each["content"]) for n, each in enumerate(batch)]
        self._last[conversation] += len(batch)
