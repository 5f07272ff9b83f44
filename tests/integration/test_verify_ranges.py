"""`chat-history verify` of a large database: in ranges, resumed, and page by page."""

from __future__ import annotations

import itertools
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import Binary, Code, MaxKey, MinKey, ObjectId, Regex, Timestamp

from service.database import Database
from service.errors import DatabaseUnavailable
from service.history.store import ConversationStore
from service.maintenance import verify, walk
from service.maintenance.findings import Report
from service.maintenance.verify import Verifier
from service.maintenance.walk import EVERYTHING, KeyRange
from service.settings import Settings
from tests.harness import Service, new_id
from tests.mongo_proxy import MongoProxy, mongo_proxied

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NAN = float("nan")
TIMEOUT_MS = 5_000


@pytest.fixture(params=[False, True], ids=["embedded", "mongodb"])
async def proxy(service: Service, request: pytest.FixtureRequest) -> AsyncIterator[MongoProxy]:
    """An empty database, which says that it is the embedded engine, or MongoDB."""
    with mongo_proxied(service.database_url, new_id("verify"), hide_engine=request.param) as started:
        yield started
        started.forget()


@pytest.fixture
async def store(proxy: MongoProxy) -> AsyncIterator[ConversationStore]:
    settings = Settings(_env_file=None, mongodb_url=proxy.url, database_timeout_ms=TIMEOUT_MS)
    database = Database(settings)
    await database.open(indexes="build")
    proxy.forget()
    yield ConversationStore(database, settings)
    await database.close()


def conversation(key: Any, count: int = 0, **fields: Any) -> dict[str, Any]:
    counts = {"last_seq": count, "message_count": count, "created_at": NOW, "updated_at": NOW}
    return {"_id": key, "user_id": "ada", "title": None, "metadata": {}, **counts, **fields}


def message(key: Any, seq: Any, **fields: Any) -> dict[str, Any]:
    name = f"{key}/m{seq}"
    about = {"_id": name, "conversation_id": key, "user_id": "ada", "seq": seq, "created_at": NOW}
    return {**about, "role": "user", "content": "x", **fields}


def store_sound(database: Any, *keys: str, count: int = 3) -> None:
    database.conversations.insert_many(conversation(key, count) for key in keys)
    database.messages.insert_many(message(key, seq) for key in keys for seq in range(1, count + 1))


async def verified(
    store: ConversationStore, within: KeyRange = EVERYTHING, *, repair: bool = False
) -> tuple[Report, list[str]]:
    found: list[str] = []
    verifier = Verifier(store, repair=repair, within=within, note=lambda each: found.append(str(each)))
    report = await verifier.run()
    assert report.violations == len(found)
    return report, found


# Every type of BSON that a driver writes, but text.
OTHER_TYPES: list[Any] = [
    None,
    7,
    2.5,
    NAN,
    {"a": 1},
    [],
    [7],
    True,
    NOW,
    ObjectId("0123456789ab0123456789ab"),
    Binary(b"x"),
    Regex("x"),
    Timestamp(1, 1),
    Code("x"),
    MinKey(),
    MaxKey(),
]


def damage(database: Any) -> int:
    """Store sound conversations and every kind of fault between them; return how many violations that are."""
    store_sound(database, "b", "d", "acme/x", "f", "h")
    conversations, messages = database.conversations, database.messages
    # Conversations whose key is no text, or that are malformed, with a malformed message.
    keys = [each for each in OTHER_TYPES if not isinstance(each, list | Regex)]
    conversations.insert_many(conversation(key) for key in keys)
    conversations.insert_one(conversation("e", last_seq="text"))
    messages.insert_one(message("e", 1, created_at="text"))
    # Messages whose conversation is no text, by their type, or by missing; and by an array of texts.
    others = [message(key, n, _id=f"odd/{n}") for n, key in enumerate([*OTHER_TYPES, "missing"])]
    del others[-1]["conversation_id"]
    messages.insert_many(others)
    messages.insert_one(message(["c", "d", "zz"], 91, _id="array"))
    messages.insert_one(message(["d", "x"], 92, _id="d/x"))
    # Orphans before, between and behind the conversations; some of them malformed.
    for key in ("a", "c", "c2", "z"):
        messages.insert_many(message(key, seq) for seq in (1, 2))
        messages.insert_one(message(key, "text"))
    # Faults within conversations.
    conversations.update_one({"_id": "b"}, {"$inc": {"message_count": 1}})
    messages.update_one({"_id": "d/m2"}, {"$set": {"user_id": "bob"}})
    messages.insert_many(
        message("f", seq, _id=f"f/odd{n}") for n, seq in enumerate(("text", None, NAN, MinKey()))
    )
    messages.insert_many(message("h", seq, user_id="bob") for seq in range(4, 9))
    return len(keys) + 2 + len(others) + 2 + 2 * 4 + 1 + 1 + 4 + 1


CUTS = [["c", "c0", "c2", "d"], ["0", "a", "acme/x", "b", "e", "f", "g", "h", "i", "~"]]


@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: "-".join(cuts).replace("/", "_"))
async def test_ranges_find_together_what_the_whole_finds_and_each_violation_once(
    proxy: MongoProxy, store: ConversationStore, cuts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = damage(proxy.latest)
    whole, found = await verified(store)
    assert len(found) == expected, "\n".join(sorted(found))
    # Small pages, so each walk turns every corner.
    monkeypatch.setattr(walk, "_KEYS", 2)
    monkeypatch.setattr(walk, "_PAGE_ITEMS", 2)
    monkeypatch.setattr(walk, "_WINDOW_SEQS", 1)
    bounds = [None, *cuts, None]
    total, parts = Report(), Counter[str]()
    for low, high in itertools.pairwise(bounds):
        report, some = await verified(store, KeyRange(low, high))
        parts += Counter(some)
        for name, value in vars(report).items():
            setattr(total, name, getattr(total, name) + value)
    assert parts == Counter(found)
    assert total == whole
    assert whole.conversations == 5


async def test_each_message_is_read_once_and_no_page_is_larger_than_a_window(
    proxy: MongoProxy, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_KEYS", 15)
    monkeypatch.setattr(walk, "_PAGE_ITEMS", 12)
    monkeypatch.setattr(walk, "_WINDOW_SEQS", 12)
    sent = []
    for count in (18, 72):
        proxy.latest.conversations.drop()
        proxy.latest.messages.delete_many({})
        store_sound(proxy.latest, *(f"c{n:04}" for n in range(count)))
        store_sound(proxy.latest, "long", count=300)
        proxy.latest.messages.insert_many(message("orphan", seq) for seq in range(150))
        proxy.forget()
        report, found = await verified(store)
        assert (report.conversations, report.messages, len(found)) == (count + 1, 3 * count + 300, 1)
        answers = [
            each.answer["cursor"]
            for each in proxy.seen
            if each.name in {"find", "getMore"} and each.answer and "cursor" in each.answer
        ]
        read = [len(each.get("firstBatch", each.get("nextBatch"))) for each in answers]
        assert max(read) == 15
        sent.append(len(read))
        # Conversations: their ids once, each twice to see that it did not change; and the orphan's message.
        assert sum(read) <= 3 * (count + 1) + 3 * count + 300 + 150 + 2
    # Four times the conversations take no more than four times the commands.
    assert sent[1] <= 4 * sent[0]


async def test_every_command_has_the_ordinary_deadline(proxy: MongoProxy, store: ConversationStore) -> None:
    damage(proxy.latest)
    proxy.forget()
    await verified(store, repair=True)
    finds = [each.document for each in proxy.seen if each.name in {"find", "aggregate", "update", "delete"}]
    assert all(each["maxTimeMS"] <= 60_000 for each in finds if "maxTimeMS" in each)
    if proxy.hide_engine:
        assert finds
        assert all(each.get("maxTimeMS", TIMEOUT_MS + 1) <= TIMEOUT_MS for each in finds)


async def test_a_hole_of_a_million_seqs_is_crossed_in_few_commands(
    proxy: MongoProxy, store: ConversationStore
) -> None:
    proxy.latest.conversations.insert_one(conversation("c", last_seq=1_000_000, message_count=2))
    proxy.latest.messages.insert_many([message("c", 1), message("c", 1_000_000)])
    _, found = await verified(store)
    assert found == []
    assert len(proxy.commands("find")) < 50


@pytest.mark.parametrize("seq", [-5, 0, 2**62, float("-inf"), float("inf"), 2.5, NAN, "text", None, MinKey()])
async def test_no_seq_hides_a_message_of_a_long_conversation(
    proxy: MongoProxy, store: ConversationStore, seq: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_WINDOW_SEQS", 2)
    store_sound(proxy.latest, "c", count=9)
    proxy.latest.messages.insert_one(message("c", seq, _id="c/odd"))
    report, found = await verified(store)
    assert report.messages == 10
    assert any("c/odd" in each or "seq" in each for each in found), found


async def test_a_conversation_that_changes_while_it_is_read_is_read_again(
    proxy: MongoProxy, store: ConversationStore
) -> None:
    store_sound(proxy.latest, "c")

    def append() -> None:
        proxy.latest.messages.insert_one(message("c", 4))
        change = {"$inc": {"last_seq": 1, "message_count": 1}}
        proxy.latest.conversations.update_one({"_id": "c"}, change)

    is_history = lambda each: each["find"] == "messages" and each["filter"].get("conversation_id") == "c"  # noqa: E731
    proxy.rule("find", when=is_history, call=append)
    report, found = await verified(store)
    assert (report.messages, found) == (4, [])


def is_gap(command: dict[str, Any]) -> bool:
    key = command["filter"].get("conversation_id")
    return bool(command["find"] == "messages" and isinstance(key, dict) and "$gte" in key)


async def test_a_conversation_that_is_created_during_the_walk_is_verified_and_has_no_orphans(
    proxy: MongoProxy, store: ConversationStore
) -> None:
    store_sound(proxy.latest, "a", "c")
    create = lambda: store_sound(proxy.latest, "b")  # noqa: E731
    proxy.rule(
        "find",
        when=lambda each: is_gap(each) and each["filter"]["conversation_id"]["$gte"] > "a",
        call=create,
    )
    report, found = await verified(store)
    assert (report.conversations, report.messages, found) == (3, 9, [])


async def test_a_conversation_that_is_deleted_behind_the_read_of_its_messages_has_no_orphans(
    proxy: MongoProxy, store: ConversationStore
) -> None:
    store_sound(proxy.latest, "a", "c")
    proxy.latest.messages.insert_many(message("b", seq) for seq in (1, 2))

    def delete() -> None:
        proxy.latest.messages.delete_many({"conversation_id": "b"})

    named = {"_id": "b"}
    proxy.rule("find", when=lambda each: each["filter"] == named, call=delete)
    _, found = await verified(store)
    assert found == []


async def test_a_read_that_finds_no_database_for_a_moment_is_repeated(
    proxy: MongoProxy, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_PAUSES_S", (0.01, 0.01))
    damage(proxy.latest)
    whole, found = await verified(store)
    late = lambda each: each["filter"] == {"_id": "d"} or is_gap(each)  # noqa: E731
    # The driver itself repeats no read that ended by its time.
    rule = proxy.fail("find", 50, "MaxTimeMSExpired", when=late, times=2)
    assert await verified(store) == (whole, found)
    assert rule.done == 2


async def test_a_walk_that_ends_without_a_database_says_where_another_can_go_on(
    proxy: MongoProxy, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_PAUSES_S", ())
    damage(proxy.latest)
    whole, found = await verified(store)
    proxy.fail(
        "find", 10107, "NotWritablePrimary", when=lambda each: each["filter"] == {"_id": "d"}, times=99
    )
    before: list[str] = []
    verifier = Verifier(store, repair=False, note=lambda each: before.append(str(each)))
    with pytest.raises(DatabaseUnavailable):
        await verifier.run()
    assert verifier.position == "d"
    proxy.forget()
    rest, behind = await verified(store, KeyRange(verifier.position))
    assert before + behind == found
    assert rest.conversations + verifier.report.conversations == whole.conversations


# -- the command -----------------------------------------------------------------------------------


def start(directory: Path, url: str, *options: str) -> subprocess.Popen[str]:
    service = Service(directory, mongodb_url=url)
    return subprocess.Popen(
        [sys.executable, "-m", "service", "verify", *options],
        env=service.environment(),
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(directory: Path, url: str, *options: str) -> tuple[int, list[str], str]:
    process = start(directory, url, *options)
    said, errors = process.communicate(timeout=120)
    return process.returncode, said.splitlines(), errors


on_mongodb = pytest.mark.parametrize("proxy", [True], indirect=True, ids=["mongodb"])


@on_mongodb
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, None])
async def test_the_command_says_how_to_go_on_where_it_was_interrupted(
    proxy: MongoProxy, store: ConversationStore, tmp_path: Path, ended_by: signal.Signals | None
) -> None:
    damage(proxy.latest)
    _, found = await verified(store)
    is_d = lambda each: each["filter"] == {"_id": "d"}  # noqa: E731
    if ended_by is None:
        proxy.fail("find", 10107, "NotWritablePrimary", when=is_d, times=99)
        process = start(tmp_path, proxy.url, "--to", "z z")
    else:
        process = start(tmp_path, proxy.url, "--to", "z z")
        proxy.rule("find", when=is_d, delay_s=8, call=lambda: process.send_signal(ended_by))
    said, errors = process.communicate(timeout=120)
    assert process.returncode == (2 if ended_by is None else 3), errors
    *violations, total = said.splitlines()
    assert total == f"2 conversations, 6 messages, {len(violations)} violations, {len(violations)} left"
    line = errors.splitlines()[-1]
    assert line == "chat-history: to go on: chat-history verify --from d --to 'z z'"
    proxy.forget()
    code, rest, _ = run(tmp_path, proxy.url, *shlex.split(line)[6:])
    assert code == 1
    assert Counter([*violations, *rest[:-1]]) == Counter(found)


@on_mongodb
async def test_the_command_verifies_a_tenant_by_its_own_ids(proxy: MongoProxy, tmp_path: Path) -> None:
    store_sound(proxy.latest, "a", "acme/a", "acme/b", "acme/c", "acme0", "b")
    proxy.latest.messages.insert_one(message("acme/bb", 1))
    for options, conversations, violations in (
        (["--tenant", "acme"], 3, 1),
        (["--tenant", "acme", "--from", "b"], 2, 1),
        (["--tenant", "acme", "--from", "a", "--to", "bb"], 2, 0),
        (["--from", "acme/b", "--to", "acme0"], 2, 1),
        (["--to", "acme/b"], 2, 0),
    ):
        code, lines, errors = run(tmp_path, proxy.url, *options)
        expected = f"{conversations} conversations, {3 * conversations} messages, {violations} violations, "
        assert lines[-1].startswith(expected), (options, errors)
        assert code == violations
    for wrong in (["--from", "b", "--to", "a"], ["--tenant", "acme", "--from", "b", "--to", "a"]):
        code, lines, errors = run(tmp_path, proxy.url, *wrong)
        assert (code, lines) == (2, []), errors
        assert "--to" in errors
