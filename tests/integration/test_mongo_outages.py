"""A MongoDB that is away, refuses, or cannot serve for now: what is answered, and what an outage leaves."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest

from service.chat_service import ChatService
from service.database import Database
from service.errors import ChatHistoryError
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import TenantScope
from tests.harness import Service, create, new_id, running, until_ready
from tests.mongo_proxy import MongoProxy, mongo_proxied

MESSAGE = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def mongo(service: Service) -> Iterator[MongoProxy]:
    with mongo_proxied(service.database_url, new_id("outages")) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def behind(mongo: MongoProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service on what it takes for a MongoDB."""
    limits = {"database_timeout_ms": 2_000, "server_selection_timeout_ms": 700}
    with running(tmp_path_factory.mktemp("behind"), mongodb_url=mongo.url, **limits) as started:
        yield started


@pytest.fixture
def called(behind: Service, mongo: MongoProxy) -> Iterator[httpx.Client]:
    with behind.client() as client:
        yield client
    mongo.forget()


# -- what is answered ------------------------------------------------------------------------------------

# Some of each kind: not the primary, another node away, interrupted, the majority, the transaction, its view
# of the cluster, too much to do.
AWAY = {
    10058: "LegacyNotPrimary",
    133: "FailedToSatisfyReadPreference",
    6: "HostUnreachable",
    202: "NetworkInterfaceExceededTimeLimit",
    9001: "SocketException",
    11601: "Interrupted",
    237: "CursorKilled",
    43: "CursorNotFound",
    175: "QueryPlanKilled",
    262: "ExceededTimeLimit",
    64: "WriteConcernTimeout",
    134: "ReadConcernMajorityNotAvailableYet",
    225: "TransactionTooOld",
    13388: "StaleConfig",
    150: "StaleEpoch",
    249: "StaleDbVersion",
    314: "ObjectIsBusy",
    317: "ConnectionPoolExpired",
    358: "InternalTransactionNotSupported",
    384: "ConnectionError",
    391: "ReauthenticationRequired",
    365: "TemporarilyUnavailable",
    462: "IngressRequestRateLimitExceeded",
    8000: "AtlasError",
}


def assert_away(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert answer.headers["retry-after"]
    assert "may have been stored" in answer.json()["detail"]


def test_every_error_that_means_away_is_a_503_for_a_read_a_statement_and_a_commit(
    called: httpx.Client, mongo: MongoProxy
) -> None:
    conversation = create(called, new_id())
    path = f"/conversations/{conversation}/messages"
    for code, name in AWAY.items():
        for command in ("find", "insert", "commitTransaction"):
            mongo.forget()
            # As often as the driver may ask again by itself.
            rule = mongo.fail(command, code, name, times=2)
            answer = called.get(path) if command == "find" else called.post(path, json=MESSAGE)
            assert rule.done, (code, command)
            if answer.status_code not in {200, 201}:  # where it was asked again
                assert_away(answer)


@pytest.mark.parametrize("code", [79, 100, 12_345])
def test_a_commit_that_no_majority_confirms_is_a_503_whatever_the_code(
    called: httpx.Client, mongo: MongoProxy, code: int
) -> None:
    conversation = create(called, new_id())
    path = f"/conversations/{conversation}/messages"
    mongo.rule("commitTransaction", concern={"code": code, "errmsg": "no"}, times=1_000)
    assert_away(called.post(path, json=MESSAGE, headers={"Idempotency-Key": "k"}))


def test_an_error_of_a_single_write_of_a_batch_is_told_by_its_own_code(
    called: httpx.Client, mongo: MongoProxy
) -> None:
    conversation = create(called, new_id())
    path = f"/conversations/{conversation}/messages"
    for code, text, status in (
        (13388, "stale config", 503),
        (8000, "you are over your space quota, using 513 MB of 512 MB", 507),
        (14031, "out of disk space", 507),
    ):
        error = {"index": 0, "code": code, "errmsg": text}
        mongo.rule("insert", answer={"ok": 1.0, "n": 0, "writeErrors": [error]})
        assert called.post(path, json=MESSAGE).status_code == status


@pytest.mark.parametrize(
    "label", ["TransientTransactionError", "UnknownTransactionCommitResult", "RetryableWriteError"]
)
def test_an_error_with_a_label_that_says_again_is_a_503_whatever_its_code(
    called: httpx.Client, mongo: MongoProxy, label: str
) -> None:
    conversation = create(called, new_id())
    path = f"/conversations/{conversation}/messages"
    for command in ("findAndModify", "commitTransaction"):
        mongo.forget()
        # The driver itself repeats a commit with such a label without a pause, until its deadline.
        mongo.fail(command, 12_345, "Odd", labels=[label], times=1_000_000)
        assert_away(called.post(path, json=MESSAGE))


@pytest.mark.parametrize(
    ("code", "text"), [(13, "not authorized"), (8000, "user is not allowed to do action [insert] on [x.y]")]
)
def test_a_missing_privilege_is_a_500_that_says_so(
    called: httpx.Client, mongo: MongoProxy, code: int, text: str
) -> None:
    conversation = create(called, new_id())
    mongo.fail("insert", code, "Unauthorized", message=text)
    answer = called.post(f"/conversations/{conversation}/messages", json=MESSAGE)
    assert answer.status_code == 500
    assert "lacks a privilege" in answer.json()["detail"]


# -- what an outage leaves -------------------------------------------------------------------------------


@pytest.fixture
async def opened(service: Service) -> AsyncIterator[tuple[MongoProxy, Database, ChatService]]:
    with mongo_proxied(service.database_url, new_id("lost")) as proxy:
        settings = Settings(
            _env_file=None,
            mongodb_url=proxy.url,
            database_timeout_ms=1_000,
            server_selection_timeout_ms=200,
        )
        database = Database(settings)
        await database.open()
        await until_ready(database)  # its time limits are short
        chat = ChatService(ConversationStore(database, settings), TenantScope())
        await chat.get_or_create_conversation("ada", "c")
        yield proxy, database, chat
        proxy.forget()
        proxy.up()
        await database.close()


async def appended(chat: ChatService, conversation: str = "c") -> str:
    try:
        await chat.add_message(conversation, MESSAGE)
    except ChatHistoryError as error:
        return error.slug()
    return "stored"


async def test_an_outage_leaves_nothing_that_grows_with_it(opened: Any) -> None:
    proxy, database, chat = opened
    transactions = database._transactions
    proxy.down()
    await appended(chat)
    tracemalloc.start()

    async def outage(calls: int) -> int:
        answers = await asyncio.gather(*(appended(chat, f"c{n}") for n in range(calls)))
        assert set(answers) == {"database-unavailable"}
        # What was cancelled before a thread took it up is known to have sent nothing once its time is over.
        for _ in range(300):
            if len(transactions._background) < 5 and len(transactions._lost_sessions) < 20:
                break
            await asyncio.sleep(0.1)
        assert len(transactions._background) < 5
        assert len(transactions._lost_sessions) < 20
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    first = await outage(200)
    for _ in range(4):
        last = await outage(200)
    tracemalloc.stop()
    assert last - first < 500_000
    proxy.up()
    for _ in range(100):
        if await database.is_ready():
            break
        await asyncio.sleep(0.05)
    assert await appended(chat) == "stored"
    await asyncio.sleep(1.5)
    assert sum(len(each["killSessions"]) for each in proxy.commands("killSessions")) < 100


async def lose(proxy: MongoProxy, chat: ChatService, times: int = 1) -> None:
    """Lose a connection in the middle of a transaction; the repetition is stored."""
    for _ in range(times):
        rule = proxy.rule("insert", drop="after")
        assert await appended(chat) in {"stored", "database-unavailable"}
        assert rule.done


async def none_is_lost(database: Database) -> None:
    for _ in range(200):
        if not database._transactions._lost_sessions:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(database._transactions._lost_sessions)


@pytest.mark.parametrize("code", [13, 59, 115, 8000])
async def test_a_refusal_to_kill_sessions_is_an_answer_and_logged_once(
    opened: Any, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, database, chat = opened
    log = MagicMock()
    monkeypatch.setattr("service.database.transactions.log", log)
    proxy.fail("killSessions", code, "No", times=1_000)
    await lose(proxy, chat, times=3)
    await asyncio.sleep(1.5)
    assert len(proxy.commands("killSessions")) == 1
    assert not database._transactions._lost_sessions
    said = [call.args[0] for call in log.method_calls]
    assert said.count("sessions_not_killed") == 1


async def test_sessions_are_killed_at_a_growing_pace_while_a_node_is_away_and_then_forgotten(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, database, chat = opened
    monkeypatch.setattr("service.database.transactions._SERVER_ENDS_S", 4.0)
    proxy.fail("killSessions", 6, "HostUnreachable", times=1_000)
    await lose(proxy, chat)
    assert database._transactions._lost_sessions
    await none_is_lost(database)
    assert 2 <= len(proxy.commands("killSessions")) <= 7  # at a constant pace of 0.1 s it would be 40


async def test_a_session_that_is_lost_is_killed_a_few_times_and_no_more(opened: Any) -> None:
    proxy, database, chat = opened
    await lose(proxy, chat)
    await none_is_lost(database)
    assert len(proxy.commands("killSessions")) == 5


async def test_the_list_of_lost_sessions_is_bounded_and_loses_the_oldest(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, database, chat = opened
    monkeypatch.setattr("service.database.transactions._LOST_MAX", 2)
    proxy.fail("killSessions", 6, "HostUnreachable", times=1_000)
    await lose(proxy, chat)
    (oldest,) = database._transactions._lost_sessions
    await lose(proxy, chat, times=2)
    assert len(database._transactions._lost_sessions) == 2
    assert oldest not in database._transactions._lost_sessions


# -- opening and closing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "answer", "says"),
    [
        ("createIndexes", (13, "not authorized"), "lacks a privilege"),
        ("hello", (18, "Authentication failed."), "refuses the user name or the password"),
        ("hello", (8000, "bad auth : Authentication failed."), "refuses the user name or the password"),
    ],
)
async def test_what_the_database_refuses_for_good_ends_the_start_with_a_sentence(
    service: Service, tmp_path: Path, command: str, answer: tuple[int, str], says: str
) -> None:
    code, text = answer
    with mongo_proxied(service.database_url, new_id("refused")) as proxy:
        # Not the driver's own greetings, which have more in them.
        proxy.fail(
            command, code, "No", message=text, times=1_000, when=lambda each: "$db" in each and "lsid" in each
        )
        refused = Service(tmp_path, mongodb_url=proxy.url).start(wait=False)
        assert refused.process is not None
        assert await asyncio.to_thread(refused.process.wait, 60) not in {0, None}
    assert says in refused.output()
    assert f'"code":{code}' in refused.output()
    assert text in refused.output()
    assert "Traceback" not in refused.output()


def test_a_url_that_is_none_ends_the_start_and_its_password_is_not_quoted(tmp_path: Path) -> None:
    refused = Service(tmp_path, mongodb_url="mongodb://ada:pass/word@127.0.0.1/x").start(wait=False)
    assert refused.process is not None
    assert refused.process.wait(60) != 0
    assert "CHAT_MONGODB_URL" in refused.output()
    assert "word" not in refused.output()
    assert "Traceback" not in refused.output()


def test_sigterm_while_the_database_is_away_ends_the_service_soon(service: Service, tmp_path: Path) -> None:
    with mongo_proxied(service.database_url, new_id("gone")) as proxy:
        started = Service(tmp_path, mongodb_url=proxy.url).start()
        with started.client() as client:
            # Many at once, so that the driver has sessions left that it would tell the server of at the end.
            with ThreadPoolExecutor(16) as callers:
                list(callers.map(lambda _: create(client), range(64)))
            proxy.down()
            assert client.get("/conversations?user_id=ada").status_code == 503
        try:
            # It took 31 s; a bound with room for a busy machine.
            assert started.stop(timeout_s=15) == 0
        finally:
            started.kill()


async def test_a_database_that_hangs_is_closed_within_seconds(opened: Any) -> None:
    proxy, database, chat = opened
    pending = [asyncio.create_task(appended(chat, f"c{n}")) for n in range(40)]
    proxy.hold()
    await asyncio.gather(*pending)
    async with asyncio.timeout(10):
        await database.close()
    proxy.release()
