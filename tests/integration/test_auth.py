"""Only who may: every route without, with a wrong, an expired, a revoked, a read-only credential; tenants."""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from pymongo import MongoClient

from service.app import create_app
from service.settings import Settings
from tests.harness import Service, keys, new_id, new_key, running
from tests.tokens import AUDIENCE, ISSUER, Issuer, forged

OWN_KEY = "a-key-of-the-operator's-own"
OPENAPI = create_app(Settings(_env_file=None)).openapi()
PUBLIC = {"/health/live", "/health/ready"}
CALLS = [(method.upper(), path) for path, calls in OPENAPI["paths"].items() for method in calls]
GATED = [(method, path) for method, path in CALLS if path not in PUBLIC]


@pytest.fixture(scope="module")
def closed(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that wants a key or a token, its log at level debug."""
    settings = {
        "auth": "key+jwt",
        "api_key": OWN_KEY,
        "key_cache_ms": 200,
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_jwks_url": issuer.url,
        "jwt_jwks_retry_s": 1,
        "jwt_leeway_s": 0,
        "jwt_tenant_claim": "org",
        "failures_per_address": "1000000/minute",
        "log_level": "debug",
    }
    with running(tmp_path_factory.mktemp("closed"), **settings) as started:
        yield started


@pytest.fixture(scope="module")
def acme(closed: Service) -> str:
    """A key of the command itself."""
    return keys(closed, "create", "test", "--scope", "read", "--scope", "write", "--tenant", "acme")


@pytest.fixture(scope="module")
def other(closed: Service) -> str:
    return new_key(closed, "read", "write", tenant="other")


@pytest.fixture(scope="module")
def reader(closed: Service) -> str:
    return new_key(closed, "read", tenant="acme")


def client(service: Service, credential: str | None = None, **headers: str) -> httpx.Client:
    said = {"Authorization": f"Bearer {credential}"} if credential is not None else {}
    return service.client(headers=said | headers)


def get(service: Service, path: str, credential: str | None = None, **headers: str) -> httpx.Response:
    with client(service, credential, **headers) as http:
        return http.get(path)


def filled(path: str, conversation: str = "c", message: str = "m") -> str:
    return re.sub(
        r"\{(\w+)\}",
        lambda name: quote(message if name[1] in {"message_id", "item_id"} else conversation, safe=""),
        path,
    )


BODIES: dict[str, Any] = {
    "/conversations": {"user_id": "ada", "id": "c"},
    "/conversations/{conversation_id}": {"title": "t"},
    "/conversations/{conversation_id}/messages": {"role": "user"},
    "PUT /conversations/{conversation_id}/messages": {"messages": [{"id": "m", "role": "user"}]},
    "PUT /conversations/{conversation_id}/messages/{message_id}": {"role": "user"},
    "/conversations/{conversation_id}/checkpoints": {"upto_seq": 1, "summary": "s"},
    "/v1/conversations": {},
    "/v1/conversations/{conversation_id}": {"metadata": {}},
    "/v1/conversations/{conversation_id}/items": {"items": [{"role": "user", "content": "x"}]},
}


QUERIES = {
    "/conversations": {"user_id": "ada"},
    "/conversations/{conversation_id}/context": {"max_turns": "5"},
}


def call(http: httpx.Client, method: str, path: str, **names: str) -> httpx.Response:
    query = QUERIES.get(path, {}) if method == "GET" else {}
    body = BODIES.get(f"{method} {path}", BODIES.get(path)) if method in {"POST", "PATCH", "PUT"} else None
    with http.stream(method, filled(path, **names), params=query, json=body) as response:
        # A stream of events has no end, and only its status is asked for here.
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            response.read()
        return response


# -- who is calling ------------------------------------------------------------------------------------


def test_the_public_routes_are_the_only_ones_that_are_open(closed: Service) -> None:
    with client(closed) as http:
        for method, path in CALLS:
            response = call(http, method, path)
            assert response.status_code == (200 if path in PUBLIC else 401), (method, path)
        for path in ("/nothing", "/v1/nothing", "/conversations/", "/metrics/x"):
            assert http.get(path).status_code == 401


def bad_credentials(closed: Service, issuer: Issuer) -> dict[str, str]:
    now = int(time.time())
    good = issuer.token()
    expired = new_key(closed, "read", "write")
    revoked = new_key(closed, "read", "write")
    keys(closed, "revoke", revoked.split("_")[1])
    with MongoClient[dict[str, Any]](closed.database_url) as operator:
        hour = {"$set": {"expires_at": operator.get_default_database().api_keys.find_one()["created_at"]}}  # type: ignore[index]
        operator.get_default_database().api_keys.update_one({"_id": expired.split("_")[1]}, hour)
    stranger = rsa.generate_private_key(65537, 2048)
    claims = jwt.decode(good, options={"verify_signature": False})
    return {
        "a word": "secret",
        "almost the operator's": OWN_KEY + "x",
        "a key of the right form": "chk_0123456789abcdef_" + "a" * 43,
        "a known id with a wrong secret": revoked[:21] + "a" * 43,
        "revoked": revoked,
        "expired key": expired,
        "alg none": forged(good, {"alg": "none", "kid": "one"}, None),
        "alg none, no kid": forged(good, {"alg": "none"}, None),
        "HS256 signed with the public key": forged(
            good, {"alg": "HS256", "kid": "one"}, issuer.public_pem("one")
        ),
        "another's signature": jwt.encode(claims, stranger, "RS256", {"kid": "one"}),
        "no signature": good.rpartition(".")[0] + ".",
        "wrong audience": issuer.token(aud="other"),
        "wrong issuer": issuer.token(iss="https://other.example"),
        "expired": issuer.token(exp=now - 5),
        "not yet valid": issuer.token(nbf=now + 300),
        "no expiry": issuer.token(exp=None),
        "no subject": issuer.token(sub=None),
        "unknown kid": issuer.token(kid="two"),
        "no tenant": issuer.token(org=None),
        "a tenant with a line feed": issuer.token(org="a\nb"),
        "a tenant that is no text": issuer.token(org=["acme"]),
        "a subject too long": issuer.token("x" * 1_501),
    }


def test_no_route_takes_a_bad_credential(closed: Service, issuer: Issuer) -> None:
    for what, credential in bad_credentials(closed, issuer).items():
        with client(closed, credential) as http:
            for method, path in GATED:
                response = call(http, method, path)
                assert response.status_code == 401, (what, method, path, response.text)
                assert response.headers["www-authenticate"].startswith("Bearer")
                kind = "application/json" if path.startswith("/v1") else "application/problem+json"
                assert response.headers["content-type"] == kind


def test_good_credentials_are_taken_in_either_header_and_not_in_two_that_differ(
    closed: Service, acme: str, issuer: Issuer
) -> None:
    path = "/conversations?user_id=ada"
    for good in (OWN_KEY, acme, issuer.token()):
        assert get(closed, path, good).status_code == 200
    assert get(closed, path, None, **{"X-API-Key": acme}).status_code == 200
    assert get(closed, path, acme, **{"X-API-Key": acme}).status_code == 200
    assert get(closed, path, acme, **{"X-API-Key": OWN_KEY}).status_code == 401
    assert get(closed, path, None, Authorization=f"Basic {acme}").status_code == 401
    assert get(closed, f"{path}&api_key={acme}").status_code == 401


def test_a_read_only_key_reads_and_changes_nothing(closed: Service, acme: str, reader: str) -> None:
    conversation = new_id()
    with client(closed, acme) as http:
        http.post("/conversations", json={"user_id": "ada", "id": conversation}).raise_for_status()
        stored = http.post(f"/conversations/{conversation}/messages", json={"role": "user"}).json()
    with client(closed, reader) as http:
        for method, path in GATED:
            response = call(http, method, path, conversation=conversation, message=stored["id"])
            # All conversations of a tenant are followed by an administrator only.
            reads = method == "GET" and not path.startswith("/users") and path != "/events"
            assert response.status_code == (200 if reads else 403), (method, path, response.text)
            if not reads:
                assert "insufficient_scope" in response.headers["www-authenticate"]
    with client(closed, acme) as http:
        assert http.get(f"/conversations/{conversation}/messages").json()["data"] == [stored]


def test_a_key_is_shown_once_and_only_its_hash_is_stored(closed: Service, acme: str) -> None:
    _, key_id, secret = acme.split("_", 2)
    with MongoClient[dict[str, Any]](closed.database_url) as operator:
        stored = operator.get_default_database().api_keys.find_one({"_id": key_id})
    assert stored is not None
    assert stored["secret_sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    listed = keys(closed, "list")
    assert key_id in listed
    assert secret not in listed
    assert "read+write" in next(line for line in listed.splitlines() if key_id in line)


def test_the_last_use_is_recorded_at_most_once_a_minute(closed: Service) -> None:
    key = new_key(closed, "read")
    with MongoClient[dict[str, Any]](closed.database_url) as operator, client(closed, key) as http:
        stored = operator.get_default_database().api_keys

        def last_used() -> Any:
            return (stored.find_one({"_id": key.split("_")[1]}) or {})["last_used_at"]

        assert last_used() is None
        http.get("/conversations?user_id=ada").raise_for_status()
        deadline = time.monotonic() + 10
        while last_used() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        first = last_used()
        assert first is not None
        time.sleep(0.5)  # longer than the key is known without asking
        http.get("/conversations?user_id=ada").raise_for_status()
        time.sleep(0.3)
        assert last_used() == first


def test_a_revoked_key_is_refused_as_soon_as_it_is_looked_up_again(closed: Service) -> None:
    key = new_key(closed, "read")
    with client(closed, key) as http:
        assert http.get("/conversations?user_id=ada").status_code == 200
        keys(closed, "revoke", key.split("_")[1])
        time.sleep(0.3)
        assert http.get("/conversations?user_id=ada").status_code == 401


def test_a_rotated_key_of_the_issuer_is_found_and_the_old_one_ends(closed: Service, issuer: Issuer) -> None:
    path = "/conversations?user_id=ada"
    assert get(closed, path, issuer.token()).status_code == 200
    old = issuer.token()
    time.sleep(1.1)
    issuer.rotate(new_id("kid"))
    assert get(closed, path, issuer.token()).status_code == 200
    assert get(closed, path, old).status_code == 401
    # Keys that nobody has do not make us ask again and again.
    fetched, began = issuer.fetched, time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: get(closed, path, issuer.token(kid=f"none-{n}")), range(50)))
    assert issuer.fetched - fetched <= 3 + (time.monotonic() - began)  # one a second, on a slow machine too
    # Gone for a moment, the issuer is missed by nobody whose key is known.
    issuer.gone = True
    assert get(closed, path, issuer.token()).status_code == 200
    issuer.gone = False


# -- whose it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}", "acme/{}", "auth0|{}/%2F 张"])
def test_two_tenants_may_use_the_same_ids_and_never_see_each_other(
    closed: Service, acme: str, other: str, form: str
) -> None:
    """Every route of the OpenAPI document, with ids that both have and with ids that one has."""
    shared, alone = form.format(new_id("shared")), form.format(new_id("alone"))
    at = filled("/conversations/{conversation_id}", shared)
    seen: dict[str, Any] = {}
    for tenant, credential in (("acme", acme), ("other", other)):
        with client(closed, credential) as http:
            made = http.post("/conversations", json={"user_id": "ada", "id": shared, "title": tenant})
            assert made.status_code == 201
            stored = http.post(f"{at}/messages", json={"role": "user", "content": tenant, "id": "m"})
            seen[tenant] = [http.get(at).json(), stored.json()]
    with client(closed, acme) as http:
        http.post("/conversations", json={"user_id": "ada", "id": alone}).raise_for_status()
        http.post(
            filled("/conversations/{id}/messages", alone), json={"role": "user", "id": "m"}
        ).raise_for_status()
    for method, path in GATED:
        if "{" not in path:
            continue
        with client(closed, other) as http:
            theirs = call(http, method, path, conversation=alone)
            nothing = call(http, method, path, conversation="nothing")
            if "user_id" in path:
                continue
            assert theirs.status_code == nothing.status_code == 404, (method, path)
            assert theirs.text.replace(alone, "nothing") == nothing.text
    for tenant, credential in (("acme", acme), ("other", other)):
        with client(closed, credential) as http:
            page = http.get(f"{at}/messages").json()["data"]
            assert [http.get(at).json(), page[0]] == seen[tenant]
            assert seen[tenant][1]["conversation_id"] == shared
            assert seen[tenant][1]["user_id"] == "ada"
            listed = {each["id"] for each in http.get("/conversations?user_id=ada").json()["data"]}
            assert (alone in listed) is (tenant == "acme")
            items = http.get(f"/v1{at}/items").json()["data"]
            assert items[0]["content"][0]["text"] == tenant
    # Deleting in one leaves the other's alone.
    with client(closed, acme) as http:
        assert http.delete(at).status_code == 204
    with client(closed, other) as http:
        assert http.get(f"{at}/messages").json()["data"] == [seen["other"][1]]


def test_an_administrator_lists_the_conversations_of_all_users_of_its_tenant(
    closed: Service, issuer: Issuer
) -> None:
    """Latest activity first, page by page, of this tenant only; nobody else may."""
    tenant = new_id("t")
    both = new_key(closed, "read", "write", tenant=tenant)
    admin = new_key(closed, "read", "admin", tenant=tenant)
    neighbour = new_key(closed, "read", "write", tenant=f"{tenant}x")
    made = []
    with client(closed, both) as http, client(closed, neighbour) as other:
        for number in range(5):
            body = {"user_id": f"user{number % 3}", "id": f"c{number}"}
            http.post("/conversations", json=body).raise_for_status()
            other.post("/conversations", json=body | {"id": f"n{number}"}).raise_for_status()
            made.append(body["id"])
        http.post("/conversations/c1/messages", json={"role": "user"}).raise_for_status()
        http.delete("/conversations/c3").raise_for_status()
        assert http.get("/conversations").status_code == 403
    with client(closed, issuer.token("ada", org=tenant)) as http:
        assert http.get("/conversations").status_code == 403
    with client(closed, new_key(closed, "read", "admin")) as http:  # of no tenant
        listed = http.get("/conversations", params={"limit": 1000}).json()["data"]
        assert not {each["id"] for each in listed} & {*made, *(f"n{number}" for number in range(5))}
    expected = ["c1", "c4", "c2", "c0"]
    with client(closed, admin) as http:
        page = http.get("/conversations", params={"limit": 3}).json()
        assert ([each["id"] for each in page["data"]], page["has_more"]) == (expected[:3], True)
        rest = http.get("/conversations", params={"limit": 3, "cursor": page["next"]}).json()
        assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (expected[3:], False)
        assert [each["user_id"] for each in page["data"]] == ["user1", "user1", "user2"]


def test_a_user_is_erased_and_exported_in_one_tenant_by_its_administrator_or_herself(
    closed: Service, issuer: Issuer
) -> None:
    user = new_id("user")
    admins = {
        tenant: new_key(closed, "read", "write", "admin", tenant=tenant) for tenant in ("acme", "other")
    }
    for tenant, key in admins.items():
        with client(closed, key) as http:
            http.post("/conversations", json={"user_id": user, "id": f"{tenant}-{user}"}).raise_for_status()
    exported = get(closed, f"/users/{user}/export", admins["acme"])
    assert [line.count(f"acme-{user}") for line in exported.text.splitlines()] == [0, 1, 0]
    with client(closed, issuer.token("mallory")) as http:
        assert http.delete(f"/users/{user}").status_code == 404
        assert http.get(f"/users/{user}/export").status_code == 404
    with client(closed, issuer.token(user)) as http:
        assert http.get(f"/users/{user}/export").text.count("acme-") == 1
        assert http.delete(f"/users/{user}").json()["conversations"] == 1
        assert http.delete(f"/users/{user}").json()["conversations"] == 0
    assert get(closed, f"/conversations/other-{user}", admins["other"]).status_code == 200
    assert get(closed, f"/conversations/acme-{user}", admins["acme"]).status_code == 404


@pytest.mark.parametrize("where", ["acme/x", "acme%2Fx", "..%2Facme%2Fx", "%2e%2e/acme"])
def test_no_id_reaches_into_a_tenant(closed: Service, acme: str, where: str) -> None:
    with client(closed, acme) as http:
        http.post("/conversations", json={"user_id": "ada", "id": "x"})
        http.post("/conversations/x/messages", json={"role": "user", "id": "m"})
    with client(closed, OWN_KEY) as http:
        for path in (
            f"/conversations/{where}",
            f"/v1/conversations/{where}",
            f"/conversations/{where}/messages/m",
        ):
            assert http.get(path).status_code in {404, 422}, path
        assert http.get("/conversations", params={"user_id": "acme/ada"}).json()["data"] == []
        # They are ids without a tenant, which only look like the keys of the tenant's.
        body = {"user_id": "acme/ada", "id": "acme/x", "title": "not acme's"}
        assert http.post("/conversations", json=body).json()["title"] == "not acme's"
        assert http.get("/conversations/acme%2Fx/messages/m").status_code == 404
        assert http.delete("/users/acme%2Fada").json() == {
            "user_id": "acme/ada",
            "conversations": 1,
            "messages": 0,
            "dry_run": False,
        }
    with client(closed, acme) as http:
        assert http.get("/conversations/x/messages/m").json()["user_id"] == "ada"


def test_a_token_is_its_user_whatever_user_it_sends(closed: Service, issuer: Issuer, acme: str) -> None:
    hers, his = new_id("hers"), new_id("his")
    with client(closed, acme) as http:
        http.post("/conversations", json={"user_id": "bob", "id": his}).raise_for_status()
    with client(closed, issuer.token("ada")) as http:
        made = http.post("/conversations", json={"user_id": "bob", "id": hers})
        assert (made.status_code, made.json()["user_id"]) == (201, "ada")
        listed = http.get("/conversations", params={"user_id": "bob"}).json()["data"]
        assert hers in {each["id"] for each in listed}
        assert {each["user_id"] for each in listed} == {"ada"}
        assert http.get(f"/conversations/{hers}", params={"user_id": "bob"}).status_code == 200
        v1 = http.post(
            "/v1/conversations", json={"metadata": {"user": "bob"}}, headers={"X-User-Id": "bob"}
        ).json()
        assert http.get(f"/conversations/{v1['id']}").json()["user_id"] == "ada"
        assert http.post("/conversations", json={"user_id": "ada", "id": his}).status_code == 409
        for method, path in GATED:
            if "conversation_id" in path:
                assert call(http, method, path, conversation=his).status_code == 404, (method, path)
    with client(closed, issuer.token("bob")) as http:
        assert http.get(f"/conversations/{his}").status_code == 200
        assert http.get(f"/conversations/{hers}").status_code == 404


@pytest.mark.parametrize("subject", ["", ".", "..", "a\0", "a\n", "x" * 1_501])
def test_a_token_of_a_subject_that_is_no_id_is_refused(closed: Service, issuer: Issuer, subject: str) -> None:
    with client(closed, issuer.token(subject)) as http:
        assert http.get("/conversations", params={"user_id": "x"}).status_code == 401


# -- what a network does ---------------------------------------------------------------------------------


def test_ten_thousand_failed_attempts_are_slowed_and_cost_nobody_else(tmp_path: Path) -> None:
    limits = {"auth": "key", "api_key": OWN_KEY, "failures_per_address": "30/minute"}
    with running(tmp_path, **limits) as service, client(service, OWN_KEY) as good:
        assert good.get("/conversations?user_id=ada").status_code == 200

        def guess(number: int) -> Counter[int]:
            answers: Counter[int] = Counter()
            # Not httpx, which computes for longer than the service does.
            with contextlib.closing(HTTPConnection("127.0.0.1", service.port, timeout=60)) as http:
                for n in range(1_000):
                    key = f"chk_{number:016x}_{n:043d}"
                    http.request("GET", "/conversations?user_id=a", headers={"X-API-Key": key})
                    response = http.getresponse()
                    response.read()
                    answers[response.status] += 1
                    if response.status == 429:
                        assert int(response.headers["retry-after"]) >= 1
            return answers

        with ThreadPoolExecutor(10) as pool:
            guesses = [pool.submit(guess, number) for number in range(10)]
            served = 0
            while not all(each.done() for each in guesses):
                assert good.get("/conversations?user_id=ada").status_code == 200
                served += 1
            answers = sum((each.result() for each in guesses), Counter[int]())
        assert served > 10
        assert sum(answers.values()) == 10_000
        # What was looked up at all: the limit, and a few that were on their way.
        assert answers[401] <= 200
        assert set(answers) == {401, 429}


def test_rates_are_limited_and_said(tmp_path: Path) -> None:
    limits = {"auth": "key", "api_key": OWN_KEY, "rate_per_key": "5/minute", "rate_per_address": "8/minute"}
    with running(tmp_path, **limits) as service, client(service, OWN_KEY) as http:
        seen = [http.get("/conversations?user_id=ada") for _ in range(6)]
        assert [each.status_code for each in seen] == [200] * 5 + [429]
        assert seen[0].headers["ratelimit-policy"] == '"key";q=5;w=60'
        assert seen[0].headers["ratelimit"].startswith('"key";r=4;t=')
        assert int(seen[5].headers["retry-after"]) >= 1
        assert seen[5].json()["type"].endswith("too-many-requests")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host": "0.0.0.0"}, "--insecure"),
        ({"auth": "jwt"}, "just one of"),
        ({"auth": "jwt", "jwt_secret": "x", "jwt_public_key": "y"}, "just one of"),
        ({"auth": "jwt", "jwt_secret": "x"}, "CHAT_JWT_ISSUER"),
        ({"jwt_algorithms": '["HS256"]'}, "CHAT_JWT_ALGORITHMS"),
        ({"jwt_algorithms": '["none"]'}, "CHAT_JWT_ALGORITHMS"),
        ({"rate_per_key": "many"}, "CHAT_RATE_PER_KEY"),
        ({"retention_days_by_tenant": '{"acme": 0}'}, "CHAT_RETENTION_DAYS_BY_TENANT"),
        ({"tls_cert": __file__}, "go together"),
    ],
)
def test_what_would_not_be_safe_is_refused_at_start(tmp_path: Path, settings: Any, says: str) -> None:
    service = Service(tmp_path, **settings)
    done = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        env=service.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_said_twice_it_listens_everywhere(tmp_path: Path) -> None:
    with running(tmp_path, host="0.0.0.0", insecure="true") as service, service.client() as http:
        assert http.get("/health/live").status_code == 200


def test_a_shared_secret_is_read_with_hs256_alone(tmp_path: Path, issuer: Issuer) -> None:
    secret = "s" * 64
    settings = {"auth": "jwt", "jwt_secret": secret, "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE}
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": int(time.time()) + 60}
    with running(tmp_path, **settings) as service:
        path = "/conversations?user_id=x"
        assert get(service, path, jwt.encode(claims, secret, "HS256")).status_code == 200
        for algorithm in ("HS384", "HS512"):
            long = jwt.encode(claims, secret, algorithm)
            assert get(service, path, long).status_code == 401
        assert get(service, path, issuer.token()).status_code == 401
        assert get(service, path, secret).status_code == 401


def test_a_public_key_in_a_file_is_enough(tmp_path: Path, issuer: Issuer) -> None:
    kid = next(iter(issuer.keys))
    (tmp_path / "public.pem").write_bytes(issuer.public_pem(kid))
    settings = {"auth": "jwt", "jwt_public_key": "public.pem", "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE}
    with running(tmp_path, **settings) as service:
        path = "/conversations?user_id=x"
        assert get(service, path, issuer.token()).status_code == 200
        hs256 = forged(issuer.token(), {"alg": "HS256"}, issuer.public_pem(kid))
        assert get(service, path, hs256).status_code == 401


def test_every_answer_has_the_headers_that_browsers_heed(closed: Service) -> None:
    for credential, path in (
        (None, "/conversations"),
        (OWN_KEY, "/conversations?user_id=a"),
        (None, "/health/live"),
    ):
        headers = get(closed, path, credential).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-request-id"]
        assert "server" not in headers


def test_a_head_that_has_no_end_is_a_431(closed: Service) -> None:
    with client(closed, OWN_KEY) as http:
        assert http.get("/health/live", headers={"X-Long": "x" * 100_000}).status_code == 431
        assert http.get("/health/live", headers={"X-Long": "x" * 50_000}).status_code == 200
        # What is long is the body: that is no head.
        body = {"user_id": "ada", "metadata": {"long": "x" * 500_000}}
        assert http.post("/conversations", json=body).status_code == 422


def test_proxies_are_believed_only_where_they_are_trusted(tmp_path: Path) -> None:
    forwarded = [{"X-Forwarded-For": f"10.0.0.{n}"} for n in range(6)]
    for trusted, statuses in ((None, [200] * 3 + [429] * 3), ("127.0.0.1", [200] * 6)):
        directory = tmp_path / str(trusted)
        directory.mkdir()
        settings = {"rate_per_address": "3/hour"} | ({"trusted_proxies": trusted} if trusted else {})
        service = Service(directory, **settings)
        try:
            service.start(wait=False)
            deadline = time.monotonic() + 30
            while "database_ready" not in service.output() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)
            with service.client() as http:
                answers = [
                    http.get("/conversations?user_id=a", headers=each).status_code for each in forwarded
                ]
            assert answers == statuses, trusted
        finally:
            service.stop()
            assert service.engine_is_gone()


def test_secrets_are_in_no_output(closed: Service, issuer: Issuer, acme: str) -> None:
    """Planted in every place of a request, and looked for in the log (level debug) and in the answers."""
    secret = "PLANTED" + new_id()
    token = issuer.token(secret)
    places: list[dict[str, Any]] = [
        {"headers": {"Authorization": f"Bearer {secret}"}},
        {"headers": {"X-API-Key": secret}},
        {"headers": {"Authorization": f"Bearer {acme}", "Idempotency-Key": f"{secret} x"}},
        {"headers": {"Authorization": f"Bearer {acme}", "Cookie": secret, "User-Agent": secret}},
        {"params": {"user_id": secret, "api_key": secret}, "headers": {"Authorization": f"Bearer {acme}"}},
        {
            "json": {"role": "user", "content": secret, "n": 2**70},
            "headers": {"Authorization": f"Bearer {acme}"},
        },
        {"json": {"role": secret}, "headers": {"Authorization": f"Bearer {acme}"}},
        {"headers": {"Authorization": f"Bearer {token[:-8]}AAAAAAAA"}},
        {"headers": {"Authorization": f"Bearer {issuer.token(kid=secret)}"}},
    ]
    with closed.client() as http:
        for place in places:
            response = http.post("/conversations/c/messages", **place)
            assert response.status_code >= 400
            assert secret not in response.text.replace(f"No conversation {secret}", "")
    log = closed.output()
    assert "request" in log
    for hidden in (secret, token, token.rpartition(".")[2], acme.split("_", 2)[2], OWN_KEY):
        assert hidden not in log
