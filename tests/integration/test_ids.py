"""Ids of any text, in every call and place where an id can stand: each means itself and no other.

The codec itself is tested with many more ids in tests/unit/test_tenancy.py and tests/unit/test_paths.py.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pymongo
import pytest

from chat_history_client import ChatHistoryClient
from tests.harness import Service, command, new_key, running
from tests.live import tail
from tests.strategies import LIKE_OTHERS, REAL_IDS, many_ids
from tests.tokens import AUDIENCE, ISSUER, Issuer

# 10,000 messages with ids of their own. Each id is in every call of many messages, and every fourth in one of
# those that name a message.
CONVERSATIONS = 70
MESSAGES = 30
TOKEN_USERS = 100
OWN_KEY = "a-key-of-the-operators-own"


@dataclass(frozen=True)
class Case:
    """A conversation, its owner, and the messages in it."""

    user: str
    conversation: str
    messages: list[str]


class Wire:
    """Requests as they are written on the wire. httpx would compute for longer than the service does."""

    def __init__(self, service: Service, credential: str | None = None) -> None:
        self.http = HTTPConnection("127.0.0.1", service.port, timeout=60)
        self.headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        self.answered: dict[str, str] = {}
        self.called: set[tuple[str, str]] = set()

    def __call__(
        self, method: str, *steps: str, body: Any = None, headers: dict[str, str] | None = None, **query: Any
    ) -> tuple[int, Any]:
        """Send a request to the path of these steps, each of them encoded; return the status and the JSON."""
        parameters = "&".join(f"{name.rstrip('_')}={encoded(str(value))}" for name, value in query.items())
        url = f"{path_of(*steps)}?{parameters}" if query else path_of(*steps)
        self.called.add((method, template_of(method, steps)))
        sent = {"Content-Type": "application/json", **self.headers, **(headers or {})}
        self.http.request(method, url, None if body is None else json.dumps(body), sent)
        response = self.http.getresponse()
        self.answered = dict(response.getheaders())
        text = response.read()
        if self.answered.get("content-type") == "application/x-ndjson":
            return response.status, [json.loads(line) for line in text.decode().split("\n") if line]
        return response.status, json.loads(text) if text else None


def encoded(text: str) -> str:
    return quote(text, safe="")


def path_of(*steps: str) -> str:
    return "".join(f"/{encoded(each)}" for each in steps)


def operations() -> set[tuple[str, str]]:
    """The calls of the API in which an id can stand: all but those of health."""
    described = json.loads(OPENAPI.read_text())["paths"]
    return {
        (method.upper(), path)
        for path, methods in described.items()
        for method in methods
        if not path.startswith("/health")
    }


def template_of(method: str, steps: tuple[str, ...]) -> str:
    """The path of the description that these steps fill in."""
    for described, path in OPERATIONS:
        parts = path.strip("/").split("/")
        if (described, len(parts)) == (method, len(steps)) and all(
            part == step or part.startswith("{") for part, step in zip(parts, steps, strict=True)
        ):
            return path
    raise AssertionError(f"no call of the API: {method} {steps}")


OPENAPI = Path(__file__).parents[2] / "docs" / "openapi.json"
OPERATIONS = operations()


def cases(seed: int, messages: int = 12) -> list[Case]:
    """Cases with ids that are all different, those among them that are easily taken for one another."""
    users, conversations = (many_ids(seed + n, CONVERSATIONS) for n in (0, 1))
    random.Random(seed).shuffle(users)
    drawn = many_ids(seed + 2, CONVERSATIONS * messages)
    random.Random(seed).shuffle(drawn)
    return [
        Case(user, conversation, drawn[n * messages : (n + 1) * messages])
        for n, (user, conversation) in enumerate(zip(users, conversations, strict=True))
    ]


@pytest.fixture(scope="module")
def alone(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of this module's own, so that the ids in it are those of these tests."""
    settings = {
        "auth": "key+jwt",
        "api_key": OWN_KEY,
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_jwks_url": issuer.url,
        "jwt_tenant_claim": "org",
        "audit_days": 1,
    }
    with running(tmp_path_factory.mktemp("ids"), **settings) as started:
        yield started


@pytest.fixture
def wire(alone: Service) -> Iterator[Wire]:
    """A connection to the service, whose database is empty."""
    with contextlib.closing(pymongo.MongoClient[Any](alone.database_url)) as mongo:
        for name in ("messages", "conversations"):
            mongo.get_default_database()[name].delete_many({})
    opened = Wire(alone, OWN_KEY)
    with contextlib.closing(opened.http):
        yield opened


def names(found: Any) -> list[str]:
    return [each["id"] for each in found["data"]]


# -- the native API --------------------------------------------------------------------------------------


def create_all(wire: Wire, made: list[Case]) -> None:
    for case in made:
        body = {"user_id": case.user, "id": case.conversation, "metadata": {"id": case.conversation}}
        status, answer = wire("POST", "conversations", body=body)
        assert (status, answer["id"], answer["user_id"]) == (201, case.conversation, case.user)
        assert wire.answered["location"] == path_of("conversations", case.conversation)
        batch = [{"role": "user", "id": each, "content": each} for each in case.messages]
        status, answer = wire(
            "POST",
            "conversations",
            case.conversation,
            "messages",
            body={"messages": batch},
            user_id=case.user,
        )
        assert (status, names(answer)) == (201, case.messages)


def test_every_native_call_means_the_ids_that_it_names(alone: Service, wire: Wire) -> None:
    made = cases(1, MESSAGES)
    create_all(wire, made)
    assert len({each for case in made for each in case.messages}) == CONVERSATIONS * MESSAGES
    for case, other in zip(made, [*made[1:], made[0]], strict=True):
        read_natively(wire, case, other)
    done = command(alone, "verify")
    assert (done.returncode, f" {len(made) * MESSAGES} messages, 0 violations" in done.stdout) == (0, True)
    wire.http.close()  # the service has closed it meanwhile, or will; it is opened again
    for case in made:
        name_each_message(wire, case)
    for case in made:
        change_natively(wire, case)
        follow(alone, wire, case)
        remove_natively(wire, case)
    assert wire("GET", "conversations", user_id=made[0].user)[1]["data"] == []
    native = {(method, path) for method, path in OPERATIONS if not path.startswith("/v1/")}
    assert native <= wire.called


def read_natively(wire: Wire, case: Case, other: Case) -> None:
    at = ("conversations", case.conversation)
    owner: Any = {"user_id": case.user}
    assert wire("GET", *at, **owner)[1]["metadata"] == {"id": case.conversation}
    assert wire("GET", *at, user_id=other.user)[0] == 404
    assert wire("POST", "conversations", body={**owner, "id": case.conversation})[0] == 200
    assert wire("POST", "conversations", body={"user_id": other.user, "id": case.conversation})[0] == 409
    assert names(wire("GET", "conversations", **owner)[1]) == [case.conversation]
    history = wire("GET", *at, "messages", limit=MESSAGES, **owner)[1]
    assert names(history) == case.messages
    assert {(each["conversation_id"], each["user_id"]) for each in history["data"]} == {
        (case.conversation, case.user)
    }
    lines = wire("GET", *at, "messages", headers={"Accept": "application/x-ndjson"})[1]
    assert [each["id"] for each in lines] == case.messages
    cut = wire("GET", *at, "context", max_messages=MESSAGES, **owner)[1]
    assert [each["content"] for each in cut["messages"]] == case.messages
    assert wire("GET", *at, "context", max_messages=1, user_id=other.user)[0] == 404
    assert wire("GET", *at, "messages", "absent", **owner)[0] == 404
    repeated = [{"role": "user", "id": each, "content": each} for each in case.messages]
    assert wire("POST", *at, "messages", body={"messages": repeated}, **owner)[0] == 200
    export = wire("GET", "users", case.user, "export")[1]
    assert export[1]["id"] == case.conversation
    assert [line["message"]["id"] for line in export[2:-1]] == case.messages


def name_each_message(wire: Wire, case: Case) -> None:
    """Use ids in the calls that name a message; all but the first twelve are gone after it."""
    at = ("conversations", case.conversation)
    below_v1 = ("v1", *at)
    owner: Any = {"user_id": case.user}
    header = {"X-User-Id": encoded(case.user)}
    kept, named = case.messages[:12], case.messages[12:]
    ways = ["read", "replace", "read item", "list behind", "delete"]
    for n, way in zip(range(0, len(named), 4), ways, strict=True):
        message = named[n]
        if way == "replace":
            new = {"role": "user", "content": ["new", message]}
            answer = wire("PUT", *at, "messages", message, body=new, **owner)[1]
            assert (answer["id"], answer["content"], answer["revision"]) == (message, new["content"], 1)
        elif way == "delete":
            assert wire("DELETE", *at, "messages", message, **owner)[0] == 204
            assert wire("GET", *at, "messages", message, **owner)[0] == 404
        elif way == "read" or is_part(message):
            assert wire("GET", *at, "messages", message, **owner)[1]["content"] == message
        elif way == "read item":
            assert wire("GET", *below_v1, "items", message, headers=header)[1]["id"] == message
        else:
            rest = wire("GET", *below_v1, "items", after=message, order="asc", limit=1, headers=header)
            following = named[n + 1 : n + 2]
            assert names(rest[1]) == [f"{each},,0" if is_part(each) else each for each in following]
    left = [{"role": "user", "id": each, "content": each} for each in kept]
    assert wire("PUT", *at, "messages", body={"messages": left}, **owner)[0] == 200
    assert names(wire("GET", *at, "messages", **owner)[1]) == kept
    assert wire("DELETE", *at, "messages", named[-1], **owner)[0] == 404


def change_natively(wire: Wire, case: Case) -> None:
    at = ("conversations", case.conversation)
    owner: Any = {"user_id": case.user}
    assert wire("PATCH", *at, body={"title": "new"}, **owner)[1]["id"] == case.conversation
    summed = wire("POST", *at, "checkpoints", body={"upto_seq": 2, "summary": case.user}, **owner)[1]
    assert wire("GET", *at, "checkpoints", **owner)[1]["data"] == [summed]
    assert wire("DELETE", *at, "checkpoints", summed["id"], **owner)[0] == 204
    assert wire("POST", *at, "pop", **owner)[1]["id"] == case.messages[11]
    assert wire("DELETE", *at, "messages", case.messages[0], **owner)[0] == 204
    assert wire("DELETE", *at, "messages", case.messages[0], **owner)[0] == 404
    assert wire("DELETE", *at, "messages", after=3, **owner)[0] == 204
    assert names(wire("GET", *at, "messages", **owner)[1]) == case.messages[1:3]
    one = wire("POST", *at, "messages", body={"role": "user", "id": case.messages[0]}, **owner)
    assert (one[0], one[1]["id"]) == (201, case.messages[0])


def follow(alone: Service, wire: Wire, case: Case) -> None:
    """The list of the user, and the conversation, as those who follow them are told."""
    wire.called.add(("GET", "/events"))
    key = {"Authorization": f"Bearer {OWN_KEY}"}
    with httpx.Client(base_url=alone.url, headers=key) as http:
        with tail(http, f"/events?user_id={encoded(case.user)}") as told:
            assert next(told)["event"] == "head"
            wire("PATCH", "conversations", case.conversation, body={"title": "newer"}, user_id=case.user)
            changed = next(each for each in told if each["event"] == "changed")["data"]
            assert (changed["id"], changed["user_id"]) == (case.conversation, case.user)
        path = path_of("conversations", case.conversation, "messages")
        with tail(http, f"{path}?after=0&user_id={encoded(case.user)}") as told:
            first = next(told)["data"]
            assert (first["id"], first["conversation_id"]) == (case.messages[1], case.conversation)


def remove_natively(wire: Wire, case: Case) -> None:
    at = ("conversations", case.conversation)
    counted = wire("DELETE", "users", case.user, dry_run="true")[1]
    assert counted == {"user_id": case.user, "conversations": 1, "messages": 3, "dry_run": True}
    if len(case.user) % 2:
        assert wire("DELETE", "users", case.user)[1]["messages"] == 3
        # Only an erasure that goes on in the background has a receipt to ask for (test_erasures).
        assert wire("GET", "users", case.user, "erasures", case.user)[0] == 404
    else:
        assert wire("DELETE", *at, user_id=case.user)[0] == 204
    assert wire("GET", *at)[0] == 404


def test_a_cursor_goes_on_behind_any_id(alone: Service, wire: Wire) -> None:
    """All conversations are of one millisecond, so that only their ids keep them apart."""
    wanted = many_ids(7, 100)
    for each in wanted:
        assert wire("POST", "conversations", body={"user_id": "cursor/%", "id": each})[0] == 201
    with contextlib.closing(pymongo.MongoClient[Any](alone.database_url)) as mongo:
        stored = mongo.get_default_database()["conversations"]
        of_user = {"user_id": "cursor%2F%25"}
        stored.update_many(of_user, {"$set": {"updated_at": stored.find_one(of_user)["updated_at"]}})  # type: ignore[index]
    for call, cursor in ((("conversations",), "cursor"), (("v1", "conversations"), "after")):
        found: list[str] = []
        query: dict[str, Any] = {"user_id" if cursor == "cursor" else "user": "cursor/%", "limit": 40}
        page: Any = {"has_more": True}
        while page["has_more"]:
            status, page = wire("GET", *call, **query)
            assert status == 200
            found += names(page)
            query[cursor] = page.get("next") or page.get("last_id")
        assert (len(found), set(found)) == (len(wanted), set(wanted))
    assert wire("DELETE", "users", "cursor/%")[1]["conversations"] == len(wanted)


# -- below /v1 -------------------------------------------------------------------------------------------


def test_every_call_below_v1_means_the_ids_that_it_names(wire: Wire) -> None:
    made = cases(1_000)
    for case, other in zip(made, [*made[1:], made[0]], strict=True):
        owner = {"X-User-Id": encoded(case.user)}
        status, answer = wire("POST", "v1", "conversations", body={"metadata": {}}, headers=owner)
        assert status == 200
        listed = names(wire("GET", "v1", "conversations", headers=owner)[1])
        assert listed == [answer["id"]]
        # A conversation with an id of one's own is created natively.
        assert wire("POST", "conversations", body={"user_id": case.user, "id": case.conversation})[0] == 201
        use_openai(wire, case, {"X-User-Id": encoded(other.user)})
    assert {each for each in OPERATIONS if each[1].startswith("/v1/")} <= wire.called


def use_openai(wire: Wire, case: Case, another: dict[str, str]) -> None:
    at, owner = ("v1", "conversations", case.conversation), {"X-User-Id": encoded(case.user)}
    items = [{"type": "message", "role": "user", "content": "x", "id": each} for each in case.messages[:3]]
    status, answer = wire("POST", *at, "items", body={"items": items}, headers=owner)
    if any(is_part(each["id"]) for each in items):
        assert status == 400
        items = [each for each in items if not is_part(each["id"])]
        status, answer = wire("POST", *at, "items", body={"items": items}, headers=owner)
    expected = [each["id"] for each in items]
    assert (status, names(answer)) == (200, expected)
    assert wire("GET", *at, headers=owner)[1]["id"] == case.conversation
    assert wire("GET", *at, headers=another)[0] == 404
    assert wire("GET", *at, "items", headers=another)[0] == 404
    assert names(wire("GET", "v1", "conversations", user=case.user)[1])[0] == case.conversation
    assert names(wire("GET", *at, "items", order="asc", headers=owner)[1]) == expected
    assert names(wire("GET", *at, "items", order="asc", after=expected[0], headers=owner)[1]) == expected[1:]
    assert wire("GET", *at, "items", expected[1], headers=owner)[1]["id"] == expected[1]
    assert wire("POST", *at, body={"metadata": {"a": "b"}}, headers=owner)[1]["id"] == case.conversation
    assert wire("DELETE", *at, "items", expected[0], headers=owner)[1]["id"] == case.conversation
    assert names(wire("GET", *at, "items", order="asc", headers=owner)[1]) == expected[1:]
    deleted = wire("DELETE", *at, headers=owner)[1]
    assert deleted == {"id": case.conversation, "object": "conversation.deleted", "deleted": True}


def is_part(message_id: str) -> bool:
    return message_id.rpartition(",,")[2].isdecimal() and ",," in message_id


def test_a_user_in_metadata_and_in_a_header_is_one_user(wire: Wire) -> None:
    for user in [*REAL_IDS, *LIKE_OTHERS]:
        if len(user) > 512:  # OpenAI's own limit of a value in metadata
            continue
        wire("POST", "v1", "conversations", body={"metadata": {"user": user}})
        # UTF-8 as it is, which http.client writes if it is given Latin-1.
        if "%" not in user and user == user.strip():
            raw = {"X-User-Id": user.encode().decode("latin-1")}
            assert wire("POST", "v1", "conversations", body={}, headers=raw)[0] == 200
        listed = wire("GET", "conversations", user_id=user)[1]["data"]
        assert 1 <= len(listed) <= 2
        assert wire("DELETE", "users", user)[0] == 200
    for wrong in ("100%", "%FF", "\xe9", "%00", ".", "%2E%2E", "x" * 1_501):
        assert wire("POST", "v1", "conversations", body={}, headers={"X-User-Id": wrong})[0] == 400


def test_the_id_of_a_reasoning_item_passes_through_v1_unchanged(wire: Wire) -> None:
    conversation = wire("POST", "v1", "conversations", body={})[1]["id"]
    at = ("v1", "conversations", conversation, "items")
    for size in (750, 1_125):
        item_id = base64.b64encode(random.Random(size).randbytes(size)).decode()
        item = {"type": "reasoning", "id": item_id, "summary": [], "encrypted_content": item_id}
        assert wire("POST", *at, body={"items": [item]})[1]["data"] == [item]
        assert wire("GET", *at, item_id)[1] == item
        assert wire("GET", *at, after=item_id, order="asc")[1]["data"] == []


# -- what is easily taken for one another ----------------------------------------------------------------


def test_ids_that_look_alike_are_kept_apart_as_users_conversations_and_messages(wire: Wire) -> None:
    for user in LIKE_OTHERS:
        body = {"user_id": user, "id": user, "metadata": {"of": user}}
        assert wire("POST", "conversations", body=body)[0] == 201
    messages = [{"role": "user", "id": each, "content": each} for each in LIKE_OTHERS]
    assert wire("POST", "conversations", "a/b", "messages", body={"messages": messages})[0] == 201
    for each in LIKE_OTHERS:
        assert wire("GET", "conversations", each, user_id=each)[1]["metadata"] == {"of": each}
        assert names(wire("GET", "conversations", user_id=each)[1]) == [each]
        assert wire("GET", "conversations", "a/b", "messages", each)[1]["content"] == each
        if each != "a/b":
            assert wire("GET", "conversations", each, "messages", each)[0] == 404
            assert wire("GET", "conversations", "a/b", user_id=each)[0] == 404
    for user in LIKE_OTHERS:
        assert wire("DELETE", "users", user)[1]["conversations"] == 1


def test_the_shell_shows_ids_as_they_are(alone: Service, wire: Wire) -> None:
    shown = {"auth0|64f0": "auth0|64f0", "张伟": "张伟", "Jane Doe": "Jane Doe", "a/b%": "a%2Fb%25"}
    with contextlib.closing(pymongo.MongoClient[Any](alone.database_url)) as mongo:
        for text, key in shown.items():
            body = {"user_id": text, "id": text}
            assert wire("POST", "conversations", body=body)[0] == 201
            wire("POST", "conversations", text, "messages", body={"role": "user", "id": text})
            stored = mongo.get_default_database()["messages"].find_one({"_id": f"{key}/{key}"})
            assert stored is not None
            assert (stored["conversation_id"], stored["user_id"]) == (key, key)
            assert wire("DELETE", "users", text)[1]["messages"] == 1


# -- who is calling --------------------------------------------------------------------------------------


def test_a_token_is_its_subject_and_reaches_only_its_tenant(alone: Service, issuer: Issuer) -> None:
    subjects = many_ids(50, TOKEN_USERS)
    tenants = [*LIKE_OTHERS, *REAL_IDS]
    callers = [(subject, tenants[n % len(tenants)]) for n, subject in enumerate(subjects)]
    for subject, tenant in callers:
        wire = Wire(alone, issuer.token(subject, org=tenant))
        with contextlib.closing(wire.http):
            status, made = wire("POST", "conversations", body={"user_id": "x", "id": "the same/id"})
            if status == 409:  # another user of the tenant has it
                status, made = wire("POST", "conversations", body={"user_id": "x", "id": subject})
            assert (status, made["user_id"]) == (201, subject)
            assert [each["user_id"] for each in wire("GET", "conversations", user_id="x")[1]["data"]] == [
                subject
            ]
            assert wire("GET", "users", subject, "export")[1][1]["user_id"] == subject
            if subject != "a/b":
                assert wire("GET", "users", "a/b", "export")[0] == 404
    for subject, tenant in callers:
        wire = Wire(alone, issuer.token(subject, org=tenant))
        with contextlib.closing(wire.http):
            assert wire("DELETE", "users", subject)[1]["conversations"] == 1
    with contextlib.closing(pymongo.MongoClient[Any](alone.database_url)) as mongo:
        wait_for_audit(mongo, {"principal": {"$in": [f"jwt:{each}" for each in subjects]}}, len(subjects))


def wait_for_audit(mongo: Any, query: Any, count: int) -> None:
    for _ in range(100):
        found = mongo.get_default_database()["audit"].distinct("user_id", query)
        if len(found) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"the audit trail has {len(found)} of {count} users")


def test_a_key_reaches_only_its_tenant_and_an_import_goes_there(
    alone: Service, wire: Wire, tmp_path: Path
) -> None:
    """Two tenants, and the ids without a tenant that look like the keys in them."""
    made = cases(5_000)[:10]
    create_all(wire, made)
    file = tmp_path / "export.ndjson"
    exported = {case.user: wire("GET", "users", case.user, "export")[1] for case in made}
    files = []
    for n, lines in enumerate(exported.values()):
        files.append(file.with_name(f"{n}.ndjson"))
        files[-1].write_text("".join(json.dumps(line, ensure_ascii=n % 2 == 0) + "\n" for line in lines))
    for tenant in ("a/b", "a%2Fb"):
        done = command(alone, "import", "--tenant", tenant, *map(str, files))
        assert done.returncode == 0, done.stderr
        reader = Wire(alone, new_key(alone, "read", "admin", tenant=tenant))
        with contextlib.closing(reader.http):
            for case in made:
                again = reader("GET", "users", case.user, "export")[1]
                assert again[1:] == exported[case.user][1:]
    assert command(alone, "import", "--tenant", "a/b", "--user", made[0].user, str(files[0])).returncode == 0
    assert command(alone, "import", "--user", made[1].user, str(files[0])).returncode == 1
    wire.http.close()
    for case in made:
        assert wire("DELETE", "users", case.user)[1]["messages"] == len(case.messages)
    reader = Wire(alone, new_key(alone, "read", "admin", tenant="a/b"))
    with contextlib.closing(reader.http):
        assert len(reader("GET", "users", made[0].user, "export")[1]) == len(made[0].messages) + 3
    done = command(alone, "verify")
    assert (done.returncode, " 0 violations" in done.stdout) == (0, True), done.stdout


# -- the clients -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("wire")
def test_the_client_sends_and_returns_any_id(alone: Service) -> None:
    with ChatHistoryClient(alone.url, api_key=OWN_KEY) as client:
        for case in cases(9_000)[:70]:
            user, name = case.user, case.conversation
            assert client.get_or_create_conversation(user, name)["id"] == name
            stored = client.add_messages(name, [{"role": "user", "id": each} for each in case.messages])
            assert [each["id"] for each in stored] == case.messages
            assert client.get_conversation(name, user_id=user)["user_id"] == user
            assert client.get_message(name, case.messages[1], user_id=user)["id"] == case.messages[1]
            client.delete_message(name, case.messages[0], user_id=user)
            read = list(client.stream_chat_history(name, user_id=user))
            assert [each["id"] for each in read] == case.messages[1:]
            assert [each["id"] for each in client.stream_conversations(user)] == [name]
            assert client.erase_user(user)["messages"] == len(case.messages) - 1
