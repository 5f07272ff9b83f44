"""The attacks of docs/security.md on a running service: browsers, tokens, failures, rates, the trail."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pymongo import MongoClient

from service.access.authentication import Authenticator
from service.errors import TooManyRequests
from service.settings import Settings
from tests.harness import Service, append, command, create, keys, new_id, new_key, running
from tests.integration.test_auth import GATED, OWN_KEY
from tests.tokens import AUDIENCE, ISSUER, Issuer, forged, part

LISTING = "/conversations?user_id=ada"
LIMIT = 10


# -- a browser that is made to call ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Without authentication, known by two more names, and open to the pages of one origin."""
    settings = {
        "hosts": "chat-history, Chat.Example:8000",
        "cors_origins": '["https://app.example"]',
        "metrics": "true",
    }
    with running(tmp_path_factory.mktemp("named"), **settings) as started:
        yield started


def raw(service: Service, head: str) -> bytes:
    """Send a request as it stands, and return all of the answer."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"Connection: close\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost..",
    "localhost@evil.example",
    "evil.example/localhost",
    "localhost,evil.example",
    "127.0.0.2",
    "192.168.0.7:8000",
    "0.0.0.0",
    "[::2]:8000",
    "[::1",
    "localhost:8000x",
    "\u00a0localhost".encode().decode("latin-1"),
    "null",
]


@pytest.mark.parametrize("host", FOREIGN)
def test_a_host_that_is_not_ours_is_not_served(client: httpx.Client, host: str) -> None:
    for method, path in [*GATED, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nothing")]:
        headers = {b"Host": host.encode("latin-1")}
        answer = client.request(method, re.sub(r"\{\w+\}", "c", path), headers=headers)
        if answer.status_code == 400:  # no host can be called so, which the connection refuses itself
            assert answer.json()["type"].endswith("malformed-request")
            continue
        assert answer.status_code == 421, (method, path)
        said = answer.json()
        detail = said["error"]["message"] if path.startswith("/v1") else said["detail"]
        assert "CHAT_HOSTS" in detail


def test_our_own_hosts_are_served_in_any_case_with_any_port(client: httpx.Client) -> None:
    for host in (
        "localhost",
        "LocalHost:8000",
        "localhost.",
        "localhost.:1",
        "127.0.0.1",
        "127.0.0.1:65535",
        "[::1]",
        "[::1]:8000",
        "[0:0:0:0:0:0:0:1]:8000",
    ):
        assert client.get(LISTING, headers={"Host": host}).status_code == 200, host


def test_the_host_of_a_whole_url_counts_and_none_or_two_are_not_served(service: Service) -> None:
    path = LISTING
    assert status(raw(service, f"GET {path} HTTP/1.1\nHost: localhost\n")) == 200
    assert status(raw(service, f"GET http://localhost:8000{path} HTTP/1.1\nHost: localhost\n")) == 200
    assert status(raw(service, f"GET http://[::1]:8000{path} HTTP/1.1\nHost: localhost\n")) == 200
    for head in (
        f"GET http://evil.example{path} HTTP/1.1\nHost: localhost\n",
        f"GET http://localhost@evil.example{path} HTTP/1.1\nHost: localhost\n",
        f"GET {path} HTTP/1.1\nHost: localhost\nHost: evil.example\n",
        f"GET {path} HTTP/1.1\nHost: evil.example\nHost: localhost\n",
        f"GET {path} HTTP/1.1\nHost:\n",
        f"GET {path} HTTP/1.1\n",
        f"GET {path} HTTP/1.0\n",
    ):
        assert status(raw(service, head)) in {400, 421}, head


def test_health_is_answered_under_any_name(client: httpx.Client) -> None:
    for path in ("/health/live", "/health/ready"):
        assert client.get(path, headers={"Host": "10.1.2.3:8000"}).status_code == 200


def test_the_names_in_the_settings_are_served(named: Service) -> None:
    with named.client() as http:
        for host in ("chat-history:8000", "CHAT.example", "chat.example.:1", "localhost"):
            assert http.get(LISTING, headers={"Host": host}).status_code == 200, host
        assert http.get(LISTING, headers={"Host": "example"}).status_code == 421


@pytest.mark.parametrize("hosts", ["*", "http://chat.example", "a b", "chat.example,", "", "[::1", "a/b"])
def test_a_name_that_no_host_can_have_is_refused_at_start(hosts: str) -> None:
    with pytest.raises(ValueError, match="no name or address"):
        Settings(_env_file=None, hosts=hosts)


def test_metrics_that_are_for_this_machine_are_not_for_its_browser(named: Service) -> None:
    with named.client() as http:
        assert http.get("/metrics").status_code == 200
        assert http.get("/metrics", headers={"Host": "evil.example"}).status_code == 421
        assert http.get("/metrics", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


FOREIGN_PAGES: list[dict[str, str]] = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},  # another port of this machine is of the same site
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    {"Sec-Fetch-Site": "CROSS-SITE"},
    {"Origin": "https://evil.example"},
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "null"},
    {"Origin": "null", "Sec-Fetch-Site": "same-origin"},
    {"Origin": "http://localhost:1"},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "file://"},
    {"Origin": "chrome-extension://abcdefghijklmnop"},
    {"Origin": "https://app.example.evil.example"},
    {"Origin": "http://[::1"},
    {"Origin": ""},
]


@pytest.mark.parametrize("said", FOREIGN_PAGES, ids=lambda said: " ".join(said.values()) or "empty")
def test_a_page_of_another_origin_reads_and_changes_nothing(
    client: httpx.Client, said: dict[str, str]
) -> None:
    conversation = create(client, new_id())
    (stored,) = append(client, conversation, {"role": "user", "content": "SECRET"})
    for method, path in GATED:
        filled = path.replace("{conversation_id}", conversation).replace("{message_id}", stored["id"])
        filled = filled.replace("{item_id}", stored["id"]).replace("{user_id}", "ada")
        answer = client.request(method, filled, headers=said)
        assert answer.status_code == 403, (method, path)
        assert "SECRET" not in answer.text
    assert client.get(f"/conversations/{conversation}/messages").json()["data"] == [stored]


def test_a_simple_post_of_a_page_pops_nothing(client: httpx.Client) -> None:
    conversation = create(client, new_id())
    append(client, conversation, {"role": "user", "content": "kept"})
    page = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.post(f"/conversations/{conversation}/pop", headers=page).status_code == 403
    assert client.post(f"/conversations/{conversation}/pop").json()["content"] == "kept"


def test_what_is_no_foreign_page_passes(service: Service, client: httpx.Client) -> None:
    for said in (
        {},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Origin": service.url, "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://localhost", "Host": "localhost"},
        {"Origin": "http://localhost:80", "Host": "LOCALHOST"},
        {"Origin": "http://[::1]:8000", "Host": "[::1]:8000"},
    ):
        assert client.get(LISTING, headers=said).status_code == 200, said
    # A link of another page may lead to the documentation.
    assert client.get("/docs", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_the_pages_of_a_configured_origin_call_as_before(named: Service) -> None:
    page = {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
    with named.client() as http:
        asked = page | {"Access-Control-Request-Method": "POST"}
        allowed = http.options("/conversations", headers=asked)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (
            200,
            "https://app.example",
        )
        answer = http.get(LISTING, headers=page)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (
            200,
            "https://app.example",
        )
        for other in ("https://app.example:8443", "http://app.example", "https://x.app.example"):
            assert http.get(LISTING, headers=page | {"Origin": other}).status_code == 403


# -- the issuer's keys -------------------------------------------------------------------------------------


ANSWERS = {
    "html": b"<html>Sign in</html>",
    "nested": b"[" * 100_000,
    "list": b"[]",
    "empty": b'{"keys": []}',
    "odd": b'{"keys": [7, {"kty": ["RSA"]}, {"kty": "RSA", "kid": {}}]}',
    "huge": b'{"keys": [' + b" " * 30_000_000,
}


class Moody(Issuer):
    """An issuer that may answer with anything else than its keys, or not at all."""

    def __init__(self) -> None:
        self.mood = "good"
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/jwks"
        self.keys = {}
        self.fetched = self.at_once = self.most_at_once = 0
        self.ended = threading.Event()
        self.rotate("one")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(OSError):
                connection, _ = self.listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        self.fetched += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30)
            connection.recv(65536)
            self._say(connection)
        self.at_once -= 1

    def _say(self, connection: socket.socket) -> None:
        if self.mood == "hang":
            connection.recv(1)  # until the other side has had enough
        elif self.mood == "drip":
            for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000:
                connection.sendall(bytes([byte]))
                if self.ended.wait(0.3):
                    return
        elif self.mood == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        else:
            keys = json.dumps({"keys": [self.jwk(kid) for kid in self.keys]}).encode()
            body = ANSWERS.get(self.mood, keys)
            said = {"redirect": "302 Found\r\nLocation: file:///etc/passwd", "error": "500 X"}
            status = said.get(self.mood, "200 OK").encode()
            connection.sendall(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    def close(self) -> None:
        self.ended.set()
        self.listener.close()


@pytest.fixture(scope="module")
def moody() -> Iterator[Moody]:
    started = Moody()
    yield started
    started.close()


def tokens_of(issuer: Issuer, **more: Any) -> dict[str, Any]:
    return {
        "auth": "jwt",
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_jwks_url": issuer.url,
        "jwt_jwks_retry_s": 1,
        "jwt_leeway_s": 0,
        "failures_per_address": "1000000/minute",
        **more,
    }


@pytest.fixture(scope="module")
def believer(moody: Moody, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that asks the moody issuer for its keys again every second."""
    with running(tmp_path_factory.mktemp("believer"), **tokens_of(moody, jwt_jwks_cache_s=1)) as started:
        yield started


@pytest.fixture
def good(moody: Moody, believer: Service) -> Iterator[Moody]:
    """The issuer, whose present keys the service has."""
    moody.mood = "good"
    wait_for(lambda: got(believer, moody.token()) == 200)
    yield moody
    moody.mood = "good"


def wait_for(holds: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def got(
    service: Service, credential: str | None, headers: dict[str, str] | None = None, *, timeout_s: float = 20
) -> int:
    """The status of a listing with this credential."""
    said = {"Authorization": f"Bearer {credential}"} if credential is not None else {}
    # To read all authorities anew takes longer than the request.
    with httpx.Client(verify=False, timeout=timeout_s) as http:
        return http.get(service.url + LISTING, headers=said | (headers or {})).status_code


@pytest.mark.parametrize("mood", ["hang", "drip"])
def test_nobody_whose_key_is_known_waits_for_the_issuer(good: Moody, believer: Service, mood: str) -> None:
    good.mood = mood
    good.most_at_once = 0
    with ThreadPoolExecutor(8) as pool:
        unknown = [pool.submit(got, believer, good.token(kid=f"none-{n}")) for n in range(8)]
        while not all(each.done() for each in unknown):
            # Five seconds are what one attempt at the issuer may take.
            assert got(believer, good.token(new_id("user")), timeout_s=3) == 200
            time.sleep(0.1)
        assert {each.result() for each in unknown} == {401}
    assert good.most_at_once <= 2  # the one that was given up may still be closing


@pytest.mark.parametrize(
    "mood", ["reset", "html", "nested", "list", "empty", "odd", "huge", "redirect", "error"]
)
def test_the_keys_stay_while_the_issuer_answers_with_something_else(
    good: Moody, believer: Service, mood: str
) -> None:
    good.mood = mood
    fetched = good.fetched
    wait_for(lambda: good.fetched >= fetched + 2)
    assert got(believer, good.token()) == 200
    assert got(believer, good.token(kid="none")) == 401


def test_a_key_that_the_issuer_took_away_ends(good: Moody, believer: Service) -> None:
    old = good.token()
    assert got(believer, old) == 200
    good.rotate(new_id("kid"))
    wait_for(lambda: got(believer, old) == 401)
    assert got(believer, good.token()) == 200


def test_without_any_key_of_the_issuer_it_is_a_503_until_there_is_one(moody: Moody, tmp_path: Path) -> None:
    moody.mood = "html"
    try:
        with running(tmp_path, **tokens_of(moody)) as service:
            answers = [got(service, moody.token()) for _ in range(3)]
            assert answers == [503] * 3
            moody.mood = "good"
            wait_for(lambda: got(service, moody.token()) == 200)
    finally:
        moody.mood = "good"


# -- failures and rates ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Ten failures an hour for an address, which its caller may name."""
    settings = tokens_of(
        issuer,
        auth="key+jwt",
        api_key=OWN_KEY,
        key_cache_ms=100,
        jwt_tenant_claim="org",
        failures_per_address=f"{LIMIT}/hour",
        trusted_proxies="127.0.0.1",
    )
    with running(tmp_path_factory.mktemp("limited"), **settings) as started:
        yield started


def address() -> str:
    """An address that nobody else has."""
    return ".".join(["10", *(str(byte) for byte in bytes.fromhex(new_id()[-6:]))])


def guess() -> str:
    return f"chk_{new_id()[-16:]}_{'a' * 43}"


def guesses(service: Service, where: Callable[[], str], what: Callable[[], str] = guess) -> list[int]:
    return [got(service, what(), {"X-Forwarded-For": where()}) for _ in range(LIMIT + 5)]


TOO_MANY = [401] * LIMIT + [429] * 5


def test_requests_without_a_credential_lock_nobody_out(limited: Service, issuer: Issuer) -> None:
    here = address()
    empty: list[dict[str, str]] = [{}, {"Authorization": "Basic YTpi"}, {"X-API-Key": ""}, {"Cookie": "a=b"}]
    differing = {"X-API-Key": "one", "Authorization": "Bearer two"}
    for said in [*empty * LIMIT, differing]:
        assert got(limited, None, {"X-Forwarded-For": here, **said}) == 401
    fresh = new_key(limited, "read", tenant="acme")
    for credential in (issuer.token(), issuer.token("bob"), OWN_KEY, fresh):
        assert got(limited, credential, {"X-Forwarded-For": here}) == 200


def test_who_guesses_is_limited_and_locks_out_nobody_who_signs(limited: Service, issuer: Issuer) -> None:
    here = address()
    seen, fresh = (new_key(limited, "read", tenant="acme") for _ in range(2))
    assert got(limited, seen, {"X-Forwarded-For": here}) == 200
    assert guesses(limited, lambda: here) == TOO_MANY
    for credential in (issuer.token(), issuer.token("bob"), OWN_KEY, seen):
        assert got(limited, credential, {"X-Forwarded-For": here}) == 200
    # A key that was never seen would have to be looked up, as a guess would.
    assert got(limited, fresh, {"X-Forwarded-For": here}) == 429
    assert got(limited, fresh, {"X-Forwarded-For": address()}) == 200


async def test_an_own_key_that_is_short_enough_to_guess_is_limited() -> None:
    async def used_up() -> None:
        raise TooManyRequests("", {})

    def refusing(own: str) -> Authenticator:
        return Authenticator(Settings(_env_file=None, auth="key", api_key=own), None)  # type: ignore[arg-type]

    with pytest.raises(TooManyRequests):
        await refusing("s" * 15).authenticate("s" * 15, used_up)
    assert (await refusing("s" * 16).authenticate("s" * 16, used_up)).name == "key:CHAT_API_KEY"


@pytest.mark.parametrize("header", [{"alg": []}, {"alg": {}, "kid": "one"}, {"alg": "RS256", "kid": "none"}])
def test_a_token_that_cannot_be_read_is_counted_as_a_failure(
    limited: Service, issuer: Issuer, header: dict[str, Any]
) -> None:
    here = address()
    token = forged(issuer.token(), header, b"x")
    assert guesses(limited, lambda: here, lambda: token) == TOO_MANY


def test_a_key_that_was_revoked_is_limited_as_any_other(limited: Service) -> None:
    here = address()
    key = new_key(limited, "read", tenant="acme")
    assert got(limited, key, {"X-Forwarded-For": here}) == 200
    keys(limited, "revoke", key.split("_")[1])
    wait_for(lambda: got(limited, key, {"X-Forwarded-For": address()}) == 401)
    assert guesses(limited, lambda: here, lambda: key) == TOO_MANY


def test_a_token_that_ended_is_limited_as_any_other(limited: Service, issuer: Issuer) -> None:
    here = address()
    token = issuer.token(exp=int(time.time()) + 2)
    assert got(limited, token, {"X-Forwarded-For": here}) == 200
    wait_for(lambda: got(limited, token, {"X-Forwarded-For": address()}) == 401)
    assert guesses(limited, lambda: here, lambda: token) == TOO_MANY


def test_who_has_an_ipv6_network_has_one_count_of_failures(limited: Service) -> None:
    net = f"2001:db8:{new_id()[-4:]}:1"
    hosts = iter(range(1, 1000))
    assert guesses(limited, lambda: f"{net}:{next(hosts):x}::1") == TOO_MANY
    assert got(limited, guess(), {"X-Forwarded-For": f"{net[:-1]}2::1"}) == 401
    # Written as IPv6, an IPv4 address is itself.
    plain = address()
    assert guesses(limited, lambda: f"::ffff:{plain}") == TOO_MANY
    assert got(limited, guess(), {"X-Forwarded-For": plain}) == 429
    assert got(limited, guess(), {"X-Forwarded-For": f"::ffff:{address()}"}) == 401


def test_rates_are_of_one_user_of_one_tenant(tmp_path: Path) -> None:
    secret = "s" * 64
    settings = {
        "auth": "jwt",
        "jwt_secret": secret,
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_tenant_claim": "org",
        "rate_per_key": "5/hour",
    }

    def token(tenant: str, subject: str = "42") -> str:
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "exp": int(time.time()) + 600,
            "org": tenant,
        }
        return jwt.encode(claims, secret, "HS256")

    with running(tmp_path, **settings) as service, service.client() as http:
        evil = [
            http.get(LISTING, headers={"Authorization": f"Bearer {token('evil')}"}).status_code
            for _ in range(6)
        ]
        assert evil == [200] * 5 + [429]
        for tenant, subject in (("acme", "42"), ("evil", "43"), ("evil:42", "42"), ("evi", "l42")):
            answer = http.get(LISTING, headers={"Authorization": f"Bearer {token(tenant, subject)}"})
            assert answer.status_code == 200
            assert answer.headers["ratelimit"].startswith('"key";r=4;')


# -- every route, every caller -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = tokens_of(issuer, auth="key+jwt", api_key=OWN_KEY, jwt_tenant_claim="org", audit_days=7)
    with running(tmp_path_factory.mktemp("closed"), **settings) as started:
        with MongoClient[dict[str, Any]](started.database_url) as operator:
            # The receipt of an erasure that has ended, of each user `ada`.
            operator.get_default_database().erasure_receipts.insert_many(
                {
                    "_id": hashlib.sha256(f"{ENDED}/{owner}".encode()).hexdigest(),
                    "ended_at": datetime.now(UTC),
                    "conversations": 1,
                    "messages": 1,
                }
                for owner in ("ada", "acme/ada", "other/ada")
            )
        yield started


@pytest.fixture(scope="module")
def writer(closed: Service) -> str:
    return new_key(closed, "write", tenant="acme")


@pytest.fixture(scope="module")
def both(closed: Service) -> str:
    return new_key(closed, "read", "write", tenant="acme")


def bearer(service: Service, credential: str | None) -> httpx.Client:
    return service.client(headers={"Authorization": f"Bearer {credential}"} if credential is not None else {})


MARK, ENDED = "PLANTED", "ended"


def planted(http: httpx.Client) -> tuple[str, str]:
    """A conversation of ada's with a message, a mark in everything that can have one."""
    conversation = new_id()
    made = http.post(
        "/conversations",
        json={"user_id": "ada", "id": conversation, "title": MARK, "metadata": {"k": MARK}},
    )
    assert made.status_code == 201, made.text
    message = {"role": "user", "content": MARK, "name": MARK, "more": {"k": MARK}, "id": "m"}
    append(http, conversation, message)
    append(http, conversation, {"role": "assistant", "content": MARK})
    checkpoint = {"upto_seq": 2, "summary": MARK}
    assert http.post(f"/conversations/{conversation}/checkpoints", json=checkpoint).is_success
    return conversation, "m"


def ask(http: httpx.Client, method: str, path: str, conversation: str, message: str) -> httpx.Response:
    names = {"conversation_id": conversation, "message_id": message, "item_id": message, "user_id": "ada"}
    names |= {"erasure_id": ENDED, "checkpoint_id": "cp_2"}
    body: Any = None
    if method in {"POST", "PATCH", "PUT"}:
        body = {
            "/conversations": {"user_id": "ada", "id": conversation},
            "/v1/conversations": {},
            "/v1/conversations/{conversation_id}": {"metadata": {}},
            "/v1/conversations/{conversation_id}/items": {"items": [{"role": "user", "content": "x"}]},
            "/conversations/{conversation_id}": {"expires_at": None},
            "/conversations/{conversation_id}/checkpoints": {"upto_seq": 2, "summary": MARK},
        }.get(path, {"role": "user"})
        if (method, path) == ("PUT", "/conversations/{conversation_id}/messages"):
            body = {"messages": [{"role": "user", "id": message}]}
    if path.endswith("/pop"):
        body = None
    params = {"user_id": "ada"} if (method, path) in LISTS else {}
    if path.endswith("/context"):
        params = {"max_turns": "5"}
    if method == "DELETE" and path.startswith("/users"):
        params = {"dry_run": "true"}
    filled = re.sub(r"\{(\w+)\}", lambda name: names[name[1]], path)
    with http.stream(method, filled, params=params, json=body) as answer:
        # A stream of events has no end, and only its status is asked for here.
        endless = answer.headers.get("content-type", "").startswith("text/event-stream")
        content = b"" if endless else answer.read()
        return httpx.Response(answer.status_code, headers=answer.headers, content=content)


LISTS = {("GET", "/conversations"), ("GET", "/events")}
OK, NOT_MINE = {200, 201, 204}, {404}


def expected(caller: str, method: str, path: str) -> set[int]:
    """What a caller may be answered on a conversation of ada's, of the tenant acme."""
    whole = {"none": {401}, "bad": {401}, "admin": OK, "owner's token": OK}
    if caller in whole:
        return whole[caller]
    if path.startswith("/users"):
        return {"another user's token": NOT_MINE, "the same user's of another tenant": OK}.get(caller, {403})
    if caller in {"read", "write"}:
        return OK if (method == "GET") == (caller == "read") else {403}
    if caller == "another user's token" and (method, path) == ("POST", "/conversations"):
        return {409}
    return OK if "{" not in path or caller == "read+write" else NOT_MINE


def test_every_route_answers_every_caller_as_it_should(
    closed: Service, issuer: Issuer, both: str, writer: str
) -> None:
    callers = {
        "none": None,
        "bad": guess(),
        "read": new_key(closed, "read", tenant="acme"),
        "write": writer,
        "read+write": both,
        "admin": new_key(closed, "read", "write", "admin", tenant="acme"),
        "another tenant's key": new_key(closed, "read", "write", tenant="other"),
        "no tenant's key": new_key(closed, "read", "write"),
        "owner's token": issuer.token("ada"),
        "another user's token": issuer.token("bob"),
        "the same user's of another tenant": issuer.token("ada", org="other"),
    }
    assert len(GATED) >= 24
    with bearer(closed, both) as owner:
        for caller, credential in callers.items():
            with bearer(closed, credential) as http:
                conversation, message = planted(owner)
                for method, path in GATED:
                    answer = ask(http, method, path, conversation, message)
                    where = (caller, method, path, answer.status_code, answer.text)
                    assert answer.status_code in expected(caller, method, path), where
                    if caller not in {"read", "read+write", "admin", "owner's token"}:
                        assert MARK not in answer.text, where
                    if method == "GET":
                        continue
                    if answer.is_success:
                        conversation, message = planted(owner)
                        continue
                    kept = owner.get(f"/conversations/{conversation}/messages").json()["data"]
                    assert (len(kept), kept[0]["id"]) == (2, message), where


def test_a_key_that_only_writes_is_answered_with_nothing_that_was_stored(
    closed: Service, both: str, writer: str
) -> None:
    with bearer(closed, both) as owner, bearer(closed, writer) as http:
        for method, path in GATED:
            conversation, message = planted(owner)
            answer = ask(http, method, path, conversation, message)
            said = answer.text.replace(conversation, "")
            assert not re.search(f"{MARK}|\\bada\\b|created_at|last_seq|message_count", said), (
                method,
                path,
                said,
            )
        conversation, _ = planted(owner)
        one = f"/conversations/{conversation}"
        assert http.post("/conversations", json={"user_id": "ada", "id": conversation}).json() == {
            "id": conversation
        }
        assert http.patch(one, json={}).json() == {"id": conversation}
        # A retry is still told that it is one, by ids alone.
        new = {"role": "user", "content": "new", "id": "n"}
        for code in (201, 200):
            answer = http.post(f"{one}/messages", json=new)
            assert (answer.status_code, answer.json()) == (code, {"id": "n"})
        batch = http.post(
            f"{one}/messages", json={"messages": [{"role": "user"}]}, headers={"Idempotency-Key": "k"}
        )
        assert [list(each) for each in batch.json()["data"]] == [["id"]]
        taken = [
            http.post(f"{one}/messages", json=body).json()["detail"]
            for body in (new | {"content": "other"}, {"messages": [new, {"role": "user", "id": "o"}]})
        ]
        assert taken[0] == taken[1]
        assert http.post(f"{one}/pop").status_code == 204
        made = http.post("/v1/conversations", json={"metadata": {"user": "ada"}}).json()
        assert set(made) == {"id", "object"}
        items = http.post(
            f"/v1/conversations/{conversation}/items", json={"items": [{"role": "user", "content": "x"}]}
        ).json()
        assert [set(each) for each in items["data"]] == [{"id", "type"}]
        item = items["data"][0]["id"]
        deleted = http.delete(f"/v1/conversations/{conversation}/items/{item}")
        assert deleted.json() == {"id": conversation, "object": "conversation"}


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "LOCK", "SEARCH"]
ODD = [
    "//conversations",
    "/conversations/",
    "/conversations//",
    "/./conversations",
    "/health/../conversations",
    "/health/live/../../conversations",
    "/health/live/",
    "/health/live%2f..%2f..%2fconversations",
    "/health/live;x",
    "/health/live%00",
    "/health/live%0a",
    "/HEALTH/live",
    "/docs/../conversations",
    "/docs/",
    "/docs%2f..%2fconversations",
    "/docs/oauth2-redirect/x",
    "/openapi.json/",
    "/openapi.json%2f",
    "/metrics/",
    "/metrics%2f",
    "/%63onversations",
    "/conversations%2fc",
    "/conversations/c%2fmessages",
    "/conversations/..%2f..%2fhealth%2flive",
    "/v1",
    "/v1/",
    "/v1//conversations",
    "/v1%2fconversations",
    "/users/ada",
    "/users/ada/export/",
    "/%",
    "/\\health\\live",
    "*",
]


def test_no_odd_path_with_any_method_gets_past_the_gate(closed: Service) -> None:
    for path in ODD:
        for method in METHODS:
            answer = raw(closed, f"{method} {path}?user_id=ada HTTP/1.1\nHost: x\nContent-Length: 0\n")
            assert status(answer) in {400, 401, 404, 405, 501}, (method, path, answer[:200])
            if status(answer) == 404:
                assert path.startswith("/metrics"), (method, path)


def confused(issuer: Issuer) -> dict[str, str]:
    """Tokens that are one thing and say another, none of them good."""
    good, pem = issuer.token(), issuer.public_pem("one")
    claims = jwt.decode(good, options={"verify_signature": False})
    stranger = rsa.generate_private_key(65537, 2048)
    own_jwk = jwt.algorithms.RSAAlgorithm.to_jwk(stranger.public_key(), as_dict=True)
    found = {
        f"alg {algorithm!r}": forged(good, {"alg": algorithm, "kid": "one"}, pem)
        for algorithm in ("none", "None", "NONE", "", "HS256", "HS384", "HS512", "RS999", "rs256", None)
    }
    odd: list[Any] = [[], {}, 7, 1.5, True, ["RS256"], {"RS256": 1}]
    found |= {f"alg {value!r}": forged(good, {"alg": value, "kid": "one"}, pem) for value in odd}
    found |= {
        f"kid {value!r}": forged(good, {"alg": "RS256", "kid": value}, pem) for value in [*odd, None, ""]
    }
    for kid in ("../../etc/passwd", "one\0", "x" * 10_000, "' OR 1=1", "file:///etc/passwd"):
        found[f"kid {kid[:20]!r}"] = jwt.encode(claims, stranger, "RS256", {"kid": kid})
    for name, value in {
        "jwk": {**own_jwk, "kid": "one"},
        "jku": "http://127.0.0.1:1/jwks",
        "x5u": "http://127.0.0.1:1/x",
        "crit": ["exp"],
        "b64": False,
        "zip": "DEF",
        "typ": "JWE",
    }.items():
        found[name] = jwt.encode(claims, stranger, "RS256", {"kid": "one", name: value})
    found["crit of ours"] = jwt.encode(
        claims, issuer.keys["one"], "RS256", {"kid": "one", "crit": ["x"], "x": 1}
    )
    found["PS for RS"] = jwt.encode(claims, stranger, "PS256", {"kid": "one"})
    values: dict[str, list[Any]] = {
        "exp": [None, "soon", [], {}, -1, 0, float(time.time()) - 60],
        "nbf": ["x", [], 2**40],
        "iat": ["x", [], {}],
        "aud": [None, [], "", "CHAT", ["other"], {}, 7],
        "iss": [None, "", [], ISSUER + "/", 7],
        "sub": [None, "", [], {}, 7, ".", "..", "x" * 1_501],
        "org": [None, "", [], {}, 7, "a\n", "..\0", "x" * 1_501],
    }
    for name, wrong in values.items():
        for each in wrong:
            said = {**claims, name: each}
            if each is None:
                del said[name]
            text = f"{part({'alg': 'RS256', 'kid': 'one'})}.{part(said)}"
            signed = issuer.keys["one"].sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
            found[f"{name} {each!r}"] = f"{text}.{part(signed)}"
    for name, header in {
        "deep": b'{"alg":' + b"[" * 20_000,
        "huge": b'{"alg":"RS256","kid":"one","n":' + b"9" * 20_000 + b"}",
        "NaN": b'{"alg":"RS256","kid":NaN}',
        "no UTF-8": b'{"alg":"RS256","kid":"\xff"}',
        "a list": b"[]",
        "null": b"null",
        "nothing": b"",
        "alg twice": b'{"alg":"none","alg":"RS256","kid":"one"}',
    }.items():
        found[f"header: {name}"] = f"{part(header)}.{good.split('.')[1]}.{good.split('.')[2]}"
    head, body, signature = good.split(".")
    found |= {
        "claims: deep": f"{head}.{part(b'[' * 20_000)}.{signature}",
        "claims: a list": f"{head}.{part([])}.{signature}",
        "another's signature": f"{head}.{body}.{issuer.token('bob').split('.')[2]}",
        "a changed signature": f"{head}.{body}.{signature[:-10]}AAAAAAAAAA",
        "no signature": f"{head}.{body}.",
        "nested": jwt.encode({"a": good}, stranger, "RS256", {"kid": "one", "cty": "JWT"}),
        "JWE": ".".join([part({"alg": "RSA-OAEP", "enc": "A256GCM", "kid": "one"}), "a", "b", "c", "d"]),
    }
    return found


def test_no_confused_token_is_taken_and_none_is_an_error(closed: Service, issuer: Issuer) -> None:
    tokens = confused(issuer)
    assert len(tokens) > 70
    fetched = issuer.fetched
    with bearer(closed, issuer.token()) as http:
        assert http.get(LISTING).status_code == 200
        for what, token in tokens.items():
            answer = http.get(LISTING, headers={"Authorization": f"Bearer {token}"})
            assert answer.status_code == 401, (what, answer.status_code)
    assert issuer.fetched - fetched < 20
    assert "request_failed" not in closed.output()


def test_of_two_credentials_that_differ_none_is_taken(closed: Service, both: str, issuer: Issuer) -> None:
    token = issuer.token()
    good: list[list[tuple[str, str]]] = [
        [("X-API-Key", both)],
        [("Authorization", f"bearer   {both}")],
        [("X-API-Key", both), ("Authorization", f"Bearer {both}")],
        [("X-API-Key", both), ("X-API-Key", both)],
    ]
    bad: list[list[tuple[str, str]]] = [
        [("X-API-Key", both), ("X-API-Key", OWN_KEY)],
        [("X-API-Key", both), ("X-API-Key", "")],
        [("X-API-Key", both), ("Authorization", f"Bearer {token}")],
        [("Authorization", f"Bearer {both}"), ("Authorization", f"Bearer {token}")],
        [("X-API-Key", both), ("Authorization", "Basic YTpi")],
        [("X-API-Key", f"{both}, {both}")],
        [("X-API-Key", both.upper())],
        [("X-API-Key", both[:-1])],
        [("X-API-Key", both + "a")],
        [("X-API-Key", f"{both[:21]}{'a' * 43}")],
        [("Authorization", both)],
        [("Authorization", f"Basic {both}")],
        [("Authorization", f"Bearer{both}")],
        [("Proxy-Authorization", f"Bearer {both}")],
        [("X_API_Key", both)],
        [("Cookie", f"X-API-Key={both}; Authorization=Bearer {both}")],
    ]
    with closed.client() as http:
        for headers in good:
            assert http.get(LISTING, headers=headers).status_code == 200, headers
        for headers in bad:
            assert http.get(LISTING, headers=headers).status_code == 401, headers
        assert http.get(f"{LISTING}&api_key={both}&access_token={token}").status_code == 401


def test_nothing_of_a_request_becomes_a_header_of_the_answer(closed: Service, both: str) -> None:
    crlf = "a%0d%0aX-Injected:%20yes%0d%0a%0d%0abody"
    for head in (
        f"GET /conversations/{crlf} HTTP/1.1\n",
        f"DELETE /conversations/c/messages/{crlf} HTTP/1.1\n",
        f"GET /v1/conversations/{crlf} HTTP/1.1\nX-User-Id: a\rX-Injected: yes\n",
        f"GET /conversations?user_id={crlf} HTTP/1.1\n",
        "GET /conversations/c HTTP/1.1\nX-Request-ID: a\rX-Injected: yes\n",
        "GET /conversations/c HTTP/1.1\nX-Request-ID: \xff\xfe caf\xe9\n",
        f"GET /conversations/c HTTP/1.1\nX-Request-ID: {'x' * 129}\n",
    ):
        answer = raw(closed, f"{head}Host: x\nX-API-Key: {both}\n")
        assert status(answer) in {400, 404, 422}, (head, answer)
        headers = answer.partition(b"\r\n\r\n")[0].lower()
        assert b"x-injected" not in headers
        assert b"x" * 129 not in headers
        assert b"\xff" not in headers


# -- the audit trail ---------------------------------------------------------------------------------------


def entries(service: Service, **query: Any) -> list[dict[str, Any]]:
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        return list(operator.get_default_database().audit.find(query).sort("at"))


def test_the_trail_names_the_user_who_was_really_read(closed: Service, issuer: Issuer) -> None:
    bob, mark = new_id("bob"), new_id("req")
    with bearer(closed, issuer.token(bob)) as http:
        http.headers["X-Request-ID"] = mark
        http.get("/conversations?user_id=victim").raise_for_status()
        http.get("/v1/conversations?user=victim").raise_for_status()
        http.post("/conversations", json={"user_id": "victim"}).raise_for_status()
    wait_for(lambda: len(entries(closed, request_id=mark)) == 3)
    for each in entries(closed, request_id=mark):
        assert (each["principal"], each["user_id"], each["tenant"]) == (f"jwt:{bob}", bob, "acme")
        assert (each["request_id_by"], each["address"]) == ("caller", "127.0.0.1")


def test_the_trail_names_the_conversation_or_the_user_of_every_route(closed: Service) -> None:
    mark = new_id("req")
    with bearer(closed, OWN_KEY) as http:
        for method, path in GATED:
            conversation, message = planted(http)
            http.headers["X-Request-ID"] = mark
            answer = ask(http, method, path, conversation, message)
            assert answer.status_code in OK, (method, path, answer.text)
            del http.headers["X-Request-ID"]
    wait_for(lambda: len(entries(closed, request_id=mark)) == len(GATED))
    for each in entries(closed, request_id=mark):
        assert each["user_id"] or each["conversation_id"], (each["method"], each["route"])
        assert each["user_id"] or "{conversation_id}" in each["route"], (each["method"], each["route"])


def test_the_trail_has_refused_calls_and_cannot_be_filled_with_them(issuer: Issuer, tmp_path: Path) -> None:
    settings = tokens_of(
        issuer,
        auth="key+jwt",
        api_key=OWN_KEY,
        audit_days=7,
        rate_per_key="3/hour",
        failures_per_address="5/hour",
        trusted_proxies="127.0.0.1",
    )
    with running(tmp_path, **settings) as service:
        read = new_key(service, "read")
        for _ in range(60):
            got(service, None)
            got(service, guess())
        for _ in range(10):
            got(service, OWN_KEY)
        for n in range(150):
            got(service, None, {"X-Forwarded-For": f"10.0.{n}.1"})
        with bearer(service, read) as http:
            http.headers["X-Forwarded-For"] = "10.1.0.1"
            assert http.post("/conversations", json={"user_id": "ada"}).status_code == 403
        wait_for(lambda: len(entries(service, status=403)) == 1)
        service.stop()
        service.start()
        found = entries(service, route="(refused)")
        assert len(found) <= 210
        counted: dict[int, int] = {}
        for each in found:
            counted[each["status"]] = counted.get(each["status"], 0) + each.get("calls", 1)
        assert counted == {401: 215, 429: 62}
        (forbidden,) = entries(service, status=403)
        assert forbidden["principal"] == f"key:{read.split('_')[1]}"
        by_name = [each for each in found if each["principal"] == "key:CHAT_API_KEY"]
        assert {each["status"] for each in by_name} == {429}
        assert sum(each.get("calls", 1) for each in by_name) == 7
        assert {each["address"] for each in found if each["principal"] == "(unknown)"} >= {
            "127.0.0.1",
            "10.0.1.1",
        }


def test_the_trail_has_foreign_hosts_and_pages(tmp_path: Path) -> None:
    with running(tmp_path, audit_days=7) as service:
        got(service, None, {"Host": "evil.example"})
        got(service, None, {"Origin": "https://evil.example"})
        wait_for(lambda: {each["status"] for each in entries(service)} == {421, 403})


def test_the_trail_has_who_tried_to_read_the_metrics(tmp_path: Path) -> None:
    with running(tmp_path, audit_days=7, metrics="true", metrics_token="metrics-" + "x" * 32) as service:
        with bearer(service, "another") as http:
            assert [http.get("/metrics").status_code for _ in range(5)] == [401] * 5
        wait_for(lambda: len(entries(service, status=401, route="(refused)")) == 1)


def test_the_trail_has_what_the_command_line_did(closed: Service, both: str, tmp_path: Path) -> None:
    user = new_id("user")
    with bearer(closed, both) as http:
        create(http, new_id(), user)
    with bearer(closed, OWN_KEY) as admin:
        exported = admin.get(f"/users/{user}/export")
    file = tmp_path / "export.ndjson"
    file.write_bytes(exported.content)
    key = keys(closed, "create", "test", "--scope", "read")
    command(closed, "keys", "list")
    command(closed, "keys", "revoke", key.split("_")[1])
    command(closed, "keys", "revoke", key.split("_")[1])
    command(closed, "import", str(file), "--tenant", "third")
    command(closed, "import", str(file), "--dry-run")
    command(closed, "expire")
    command(closed, "verify", "--repair")
    found = [
        (each["route"], each["status"], each.get("user_id"))
        for each in entries(closed, method="COMMAND")
        if "create" not in each["route"]
    ]
    assert found == [
        ("keys list", 0, None),
        ("keys revoke", 0, None),
        ("keys revoke", 1, None),
        ("import", 0, user),
        ("expire", 0, None),
        ("verify --repair", 0, None),
    ]
    created = entries(closed, route="keys create")
    assert any(each["what"].startswith(key.split("_")[1]) for each in created)
    assert all(each["principal"].startswith("command:") for each in created)
    assert key.split("_", 2)[2] not in str(created)
