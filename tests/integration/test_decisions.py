"""What a transaction found is answered from a durable view: nothing is decided by an older one.

A replica set whose majority lags behind its primary is played by `tests.mongo_proxy`. There a commit takes
effect, and its answer is an error; what the client does then is repeat its request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.database import Database
from service.history.deleting import resume_deletions
from service.history.store import ConversationStore
from service.settings import Settings
from tests.harness import Service, append, command, contents, create, new_id, running, whole_history
from tests.integration.test_imports import big_export
from tests.mongo_proxy import MongoProxy, mongo_proxied

TIMEOUT_MS = 1_200
MESSAGE = {"role": "user", "content": "once"}
Send = Callable[[], httpx.Response]


@pytest.fixture(scope="module")
def set_of_three(service: Service) -> Iterator[MongoProxy]:
    with mongo_proxied(service.database_url, f"decisions_{new_id()[2:8]}") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def on_it(set_of_three: MongoProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service on the replica set, which gives it little time."""
    limits = {"database_timeout_ms": TIMEOUT_MS, "server_selection_timeout_ms": 700}
    with running(tmp_path_factory.mktemp("on-it"), mongodb_url=set_of_three.url, **limits) as started:
        yield started


@pytest.fixture
def proxy(set_of_three: MongoProxy) -> Iterator[MongoProxy]:
    yield set_of_three
    set_of_three.forget()
    set_of_three.catch_up()


@pytest.fixture
def ours(on_it: Service) -> Iterator[httpx.Client]:
    with on_it.client() as client:
        yield client


@contextmanager
def catching_up(proxy: MongoProxy, after_s: float = 0.3) -> Iterator[None]:
    """The majority catches up while the service waits for it."""
    timer = threading.Timer(after_s, proxy.catch_up)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def lost_and_repeated(proxy: MongoProxy, send: Send) -> httpx.Response:
    """Send while the majority lags, until it catches up, and return the first answer that is not 503."""
    proxy.lag()
    assert send().status_code == 503
    # Still the lag: the repetition finds on the primary what the first request did, and must not judge by the
    # older view that a majority read would show.
    for _ in range(2):
        again = send()
        assert again.status_code == 503, again.text
        assert again.headers["retry-after"]
    with catching_up(proxy):
        return send()


def keyed(client: httpx.Client, path: str, body: Any, key: str = "k") -> Send:
    return lambda: client.post(path, json=body, headers={"Idempotency-Key": key})


@pytest.mark.parametrize(
    "body", [MESSAGE, {"messages": [MESSAGE, MESSAGE, MESSAGE]}], ids=["message", "batch"]
)
def test_an_append_that_is_repeated_while_the_majority_lags_is_never_a_conflict(
    proxy: MongoProxy, ours: httpx.Client, body: Any
) -> None:
    conversation = create(ours, new_id())
    answer = lost_and_repeated(proxy, keyed(ours, f"/conversations/{conversation}/messages", body))
    assert answer.status_code == 200, answer.text
    assert answer.headers["idempotent-replayed"] == "true"
    found = whole_history(ours, conversation)
    assert found == answer.json().get("data", [answer.json()])


def test_an_append_whose_own_first_run_is_not_durable_yet_is_no_conflict(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    """The first call itself runs its work again, and meets its own message."""
    conversation = create(ours, new_id())
    proxy.lag(commits="fail")
    with catching_up(proxy):
        answer = ours.post(f"/conversations/{conversation}/messages", json=MESSAGE)
    assert answer.status_code in {201, 503}, answer.text
    assert len(whole_history(ours, conversation)) == 1


def test_items_that_are_repeated_while_the_majority_lags_are_no_conflict(
    proxy: MongoProxy, on_it: Service
) -> None:
    with on_it.client(headers={"X-User-Id": new_id("user")}) as client:
        conversation = client.post("/v1/conversations", json={}).json()["id"]
        items = {"items": [MESSAGE, MESSAGE]}
        answer = lost_and_repeated(proxy, keyed(client, f"/v1/conversations/{conversation}/items", items))
        assert answer.status_code == 200, answer.text
        assert len(client.get(f"/v1/conversations/{conversation}/items").json()["data"]) == 2


def test_a_conversation_that_is_created_again_while_the_majority_lags_is_the_first_one(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    conversation = new_id()
    body = {"user_id": "ada", "id": conversation, "title": "mine"}
    answer = lost_and_repeated(proxy, lambda: ours.post("/conversations", json=body))
    assert answer.status_code in {200, 201}, answer.text
    assert answer.json()["title"] == "mine"
    # It waited for the majority, and did not insert until the majority was there.
    inserts = [each for each in proxy.commands("insert") if each["documents"][0]["_id"] == conversation]
    assert len(inserts) < 60


def test_somebody_elses_conversation_that_is_not_durable_yet_is_a_conflict_only_when_it_is(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    conversation = new_id()
    proxy.lag()
    body = {"user_id": "ada", "id": conversation}
    assert ours.post("/conversations", json=body).status_code == 503
    assert ours.post("/conversations", json={**body, "user_id": "bob"}).status_code == 503
    proxy.fail_over()  # which takes Ada's with it
    assert ours.post("/conversations", json={**body, "user_id": "bob"}).status_code == 201


def test_a_conversation_that_is_started_again_while_the_majority_lags_is_the_first_one(
    proxy: MongoProxy, on_it: Service
) -> None:
    with on_it.client(headers={"X-User-Id": new_id("user")}) as client:
        body = {"items": [MESSAGE, MESSAGE]}
        answer = lost_and_repeated(proxy, keyed(client, "/v1/conversations", body))
        assert answer.status_code == 200, answer.text
        assert len(proxy.commands("insert")) < 60
        (listed,) = client.get("/v1/conversations").json()["data"]
        assert listed["id"] == answer.json()["id"]
        assert len(client.get(f"/v1/conversations/{listed['id']}/items").json()["data"]) == 2


def test_a_pop_whose_commit_is_in_doubt_takes_no_second_message(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    conversation = create(ours, new_id())
    stored = append(ours, conversation, *({"role": "user", "content": n} for n in "01234"))
    proxy.lag(commits="succeed")
    # The commit of the pop takes effect on the primary; both of its answers say that nobody knows.
    doubt = {"code": 64, "codeName": "WriteConcernTimeout", "errmsg": "", "errInfo": {"wtimeout": True}}
    rule = proxy.rule("commitTransaction", concern=doubt, times=2)
    answer = ours.post(f"/conversations/{conversation}/pop")
    assert rule.done == 2
    proxy.catch_up()
    assert (answer.status_code, answer.json()) == (200, stored[-1])
    assert contents(whole_history(ours, conversation)) == ["0", "1", "2", "3"]
    assert ours.get(f"/conversations/{conversation}").json()["message_count"] == 4


def test_a_pop_of_nothing_is_not_answered_before_that_is_durable(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    conversation = create(ours, new_id())
    stored = append(ours, conversation, MESSAGE)
    path = f"/conversations/{conversation}"
    proxy.lag()
    assert ours.delete(f"{path}/messages/{stored[0]['id']}").status_code == 503
    assert ours.post(f"{path}/pop").status_code == 503
    proxy.fail_over()  # the message is back
    assert ours.post(f"{path}/pop").json() == stored[0]
    assert ours.post(f"{path}/pop").status_code == 204


DELETIONS: dict[str, Callable[[httpx.Client, str, str], httpx.Response]] = {
    "message": lambda client, c, m: client.delete(f"/conversations/{c}/messages/{m}"),
    "conversation": lambda client, c, _: client.delete(f"/conversations/{c}"),
    "item": lambda client, c, m: client.delete(f"/v1/conversations/{c}/items/{m}"),
}


@pytest.mark.parametrize("verb", DELETIONS)
def test_a_deletion_is_not_answered_by_a_404_that_does_not_last(
    proxy: MongoProxy, on_it: Service, verb: str
) -> None:
    with on_it.client(headers={"X-User-Id": "ada"}) as client:
        conversation = create(client, new_id())
        message = append(client, conversation, MESSAGE)[0]["id"]
        proxy.lag()
        for _ in range(3):
            assert DELETIONS[verb](client, conversation, message).status_code == 503
        proxy.fail_over()  # all of it is back
        assert len(whole_history(client, conversation)) == 1
        assert DELETIONS[verb](client, conversation, message).status_code in {200, 204}
        assert DELETIONS[verb](client, conversation, message).status_code == 404


def test_other_verbs_do_not_say_404_of_a_conversation_that_may_come_back(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    conversation = create(ours, new_id())
    append(ours, conversation, MESSAGE)
    path = f"/conversations/{conversation}"
    proxy.lag()
    assert ours.delete(path).status_code == 503
    calls: list[Send] = [
        lambda: ours.patch(path, json={"title": "t"}),
        lambda: ours.post(f"{path}/messages", json=MESSAGE),
        lambda: ours.delete(f"{path}/messages", params={"after": 0}),
    ]
    for send in calls:
        answer = send()
        assert answer.status_code == 503, answer.text
    proxy.fail_over()
    assert ours.patch(path, json={"title": "t"}).json()["title"] == "t"


def test_cutting_off_takes_messages_that_the_majority_does_not_have_yet(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    conversation = create(ours, new_id())
    append(ours, conversation, MESSAGE)
    # As after a fail-over, when the new primary has more than its commit point says.
    proxy.lag(commits="succeed")
    append(ours, conversation, MESSAGE, MESSAGE)
    answer = ours.delete(f"/conversations/{conversation}/messages", params={"after": 0})
    proxy.catch_up()
    assert answer.status_code == 204
    assert whole_history(ours, conversation) == []


def test_a_replay_costs_one_round_trip_more_than_its_reads(proxy: MongoProxy, ours: httpx.Client) -> None:
    conversation = create(ours, new_id())
    send = keyed(ours, f"/conversations/{conversation}/messages", MESSAGE)
    proxy.forget()
    assert send().status_code == 201
    assert _data_commands(proxy) == ["findAndModify", "insert", "commitTransaction"]
    proxy.forget()
    assert send().status_code == 200
    assert _data_commands(proxy) == [
        "findAndModify",
        "insert",
        "abortTransaction",
        *["find"] * 3,
        "commitTransaction",
    ]


def _data_commands(proxy: MongoProxy) -> list[str]:
    names = {"update", "findAndModify", "find", "insert", "delete", "commitTransaction", "abortTransaction"}
    return [each.name for each in list(proxy.seen) if each.name in names and each.in_transaction]


def test_an_append_that_meets_a_message_which_is_then_gone_is_stored(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    """A duplicate that a lost primary takes with it, or that is deleted meanwhile, is no conflict."""
    conversation = create(ours, new_id())
    send = keyed(ours, f"/conversations/{conversation}/messages", MESSAGE)
    stored = send().json()
    gone = {"_id": f"{conversation}/{stored['id']}"}
    proxy.rule("abortTransaction", call=lambda: proxy.latest.messages.delete_one(gone))
    again = send()
    assert again.status_code == 201, again.text
    assert whole_history(ours, conversation) == [again.json()]


def test_a_seq_that_is_taken_is_no_replay_and_says_what_mends_it(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    conversation = create(ours, new_id())
    append(ours, conversation, MESSAGE, MESSAGE)
    proxy.latest.conversations.update_one({"_id": conversation}, {"$set": {"last_seq": 1}})
    for key in (None, "k"):
        headers = {"Idempotency-Key": key} if key else {}
        answer = ours.post(f"/conversations/{conversation}/messages", json=MESSAGE, headers=headers)
        assert answer.status_code == 500, answer.text
        assert answer.json()["type"].endswith("broken-counter")
        assert "chat-history verify --repair" in answer.json()["detail"]


def test_a_receipt_is_not_lost_with_the_answer_of_the_last_commit(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    user = new_id("user")
    append(ours, create(ours, new_id(), user=user), MESSAGE, MESSAGE)
    lost = proxy.unknown_commit(when=proxy.wrote("delete", "erasures"))
    receipt = ours.delete(f"/users/{user}")
    assert lost.done == 2
    assert receipt.status_code == 200, receipt.text
    assert (receipt.json()["conversations"], receipt.json()["messages"]) == (1, 2)


def test_an_erasure_that_another_request_has_just_begun_or_ended_goes_on_and_counts(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    user = new_id("user")
    append(ours, create(ours, new_id(), user=user), MESSAGE, MESSAGE)
    begun = proxy.fail("insert", 11000, "DuplicateKey", when=lambda each: each["insert"] == "erasures")
    receipt = ours.delete(f"/users/{user}")
    assert (begun.done, receipt.status_code) == (1, 200), receipt.text
    # There is no count of the other request any more, so this one begins its own.
    assert (receipt.json()["conversations"], receipt.json()["messages"]) == (1, 2)
    assert not proxy.latest.erasures.count_documents({})


def test_an_import_whose_id_is_taken_this_moment_looks_again(
    proxy: MongoProxy, on_it: Service, tmp_path: Path
) -> None:
    conversation, file = new_id(), tmp_path / "ada.ndjson"
    big_export(file, conversation, count=2)
    taken = proxy.fail("insert", 11000, "DuplicateKey", when=lambda each: each["insert"] == "conversations")
    done = command(on_it, "import", str(file))
    assert (taken.done, done.returncode) == (1, 0), done.stderr
    assert proxy.latest.messages.count_documents({"conversation_id": conversation}) == 2


async def test_what_is_being_deleted_is_looked_up_without_what_it_holds(
    proxy: MongoProxy, ours: httpx.Client
) -> None:
    conversation = create(ours, new_id())
    proxy.latest.conversations.update_one({"_id": conversation}, {"$set": {"user_id": ""}})
    settings = Settings(mongodb_url=proxy.url, database_timeout_ms=60_000)
    database = Database(settings)
    await database.open()
    try:
        assert await resume_deletions(ConversationStore(database, settings)) == 1
    finally:
        await database.close()
    (look,) = [each for each in proxy.commands("find") if each["filter"] == {"user_id": ""}]
    assert look["projection"] == {"_id": 1}


def test_a_key_is_not_lost_with_the_answer_of_a_commit(proxy: MongoProxy, on_it: Service) -> None:
    made = proxy.unknown_commit(when=proxy.wrote("insert", "api_keys"))
    done = command(on_it, "keys", "create", "k", "--scope", "read")
    assert (made.done, done.returncode) == (2, 0), done.stderr
    key_id = done.stdout.partition("chk_")[2][:16]
    assert [each["_id"] for each in proxy.latest.api_keys.find()] == [key_id]
    revoked = proxy.unknown_commit(when=proxy.wrote("findAndModify", "api_keys"))
    done = command(on_it, "keys", "revoke", key_id)
    assert (revoked.done, done.returncode) == (2, 0), done.stderr
    assert command(on_it, "keys", "revoke", key_id).returncode == 1
