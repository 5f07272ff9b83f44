"""What a person's browser meets: the page of the API, and pages of other origins that call the service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.settings import Settings
from tests.harness import Service, create, free_port, new_id, running

ORIGIN = "https://app.example"
# The preflight of OpenAI's client for JavaScript 7.59 with a user's header, as Chromium 156 sent it.
ASKED = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-arch,x-stainless-lang,"
    "x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
    "x-stainless-runtime-version,x-user-id",
    "Sec-Fetch-Mode": "cors",
    "Sec-Fetch-Site": "cross-site",
}
# Scripts may read these without leave (the Fetch standard), or have no use for them.
READABLE = {"cache-control", "content-language", "content-length", "content-type", "expires", "last-modified"}
FOR_THE_BROWSER = {
    "connection",
    "content-security-policy",
    "date",
    "referrer-policy",
    "transfer-encoding",
    "vary",
    "x-content-type-options",
    "x-frame-options",
}
LET_IN = {"auth": "key", "api_key": "k" * 20, "cors_origins": f'["{ORIGIN}"]'}
KEY = {"Authorization": f"Bearer {'k' * 20}"}


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with keys, a rate, and one origin whose pages may call it."""
    settings = {**LET_IN, "rate_per_key": "1000/minute", "body_bytes_max": 4_096}
    with running(tmp_path_factory.mktemp("browsed"), **settings) as started:
        yield started


@pytest.fixture
def page(browsed: Service) -> Iterator[httpx.Client]:
    """A page of the configured origin, as the service sees it."""
    with browsed.client(headers={"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"}) as opened:
        yield opened


def in_process(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


# -- the page of the API -----------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["none", "key"])
async def test_the_page_of_the_api_loads_everything_from_the_service(auth: str) -> None:
    app = create_app(Settings(_env_file=None, auth=auth))
    async with in_process(app) as client:
        page = await client.get("/docs")
        assert page.status_code == 200
        addresses = re.findall(r'<(?:link|script|img)[^>]* (?:src|href)="([^"]*)"', page.text)
        assert len(addresses) == 5
        kinds = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
        for address in addresses:
            if address == "data:,":  # the icon, so that the browser asks for none
                continue
            assert not re.match(r"\w+:|/", address), "An address must be relative, for proxies with a path."
            asset = await client.get(urljoin("/docs", address))
            assert asset.status_code == 200, address
            assert asset.headers["content-type"] == kinds[Path(address).suffix]
            assert asset.headers["x-content-type-options"] == "nosniff"
            assert len(asset.content) > 50
        start = (await client.get("/docs/start.js")).text
        (described,) = re.findall(r'url: "([^"]*)"', start)
        assert (await client.get(urljoin("/docs", described))).json()["openapi"].startswith("3.1")


async def test_the_page_of_the_api_runs_nothing_inline_and_reaches_nothing_else() -> None:
    async with in_process(create_app(Settings(_env_file=None))) as client:
        page = await client.get("/docs")
        policy = page.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert not re.search(r"https?:", policy)
        directives = dict(each.strip().split(" ", 1) for each in policy.split(";"))
        assert directives["default-src"] == "'none'"
        assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
        assert re.findall(r"<script[^>]*>([^<]*)</script>", page.text) == ["", ""]
        assert not re.search(r"<style|style=|\son\w+=", page.text)
        sent = await client.get("/redoc")
        assert (sent.status_code, urljoin("/redoc", sent.headers["location"])) == (307, "/docs")


def test_the_page_of_the_api_needs_no_key_and_has_no_data(browsed: Service) -> None:
    with browsed.client() as client:
        for path in ("/docs", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/docs/start.js"):
            answer = client.get(path)
            assert answer.status_code == 200, path
            assert "no-store" not in answer.headers.get("cache-control", "")
        assert client.get("/docs/other.js").status_code == 401


# -- pages of other origins --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/conversations", "/conversations/c/messages", "/users/ada", "/nothing"])
def test_a_page_of_a_configured_origin_may_send_what_its_client_sends(browsed: Service, path: str) -> None:
    with browsed.client() as client:
        answer = client.options(path, headers=ASKED)
    assert answer.status_code == 200, answer.text
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    asked = set(ASKED["Access-Control-Request-Headers"].split(","))
    assert asked <= set(answer.headers["access-control-allow-headers"].split(","))
    assert "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]


def test_a_page_of_a_configured_origin_may_use_every_method_of_the_api(browsed: Service) -> None:
    with browsed.client() as client:
        document = client.get("/openapi.json").json()
        methods = {method.upper() for calls in document["paths"].values() for method in calls}
        assert {"GET", "POST", "PATCH", "DELETE"} <= methods
        for method in {*methods, "PUT"}:
            answer = client.options(
                "/conversations", headers={**ASKED, "Access-Control-Request-Method": method}
            )
            assert answer.status_code == 200, method
            assert method in answer.headers["access-control-allow-methods"].split(", ")


@pytest.mark.parametrize(
    "origin",
    [
        "https://other.example",
        "http://app.example",
        "https://app.example:8443",
        "https://app.example.evil",
        "null",
    ],
)
def test_a_page_of_another_origin_may_send_and_read_nothing(browsed: Service, origin: str) -> None:
    with browsed.client() as client:
        preflight = client.options("/v1/conversations", headers={**ASKED, "Origin": origin})
        assert preflight.status_code == 400
        answer = client.get("/conversations?user_id=ada", headers={**KEY, "Origin": origin})
    for each in (preflight, answer):
        assert "access-control-allow-origin" not in each.headers
        assert "access-control-allow-credentials" not in each.headers


async def test_an_origin_is_the_same_with_a_slash_and_in_any_case() -> None:
    app = create_app(Settings(_env_file=None, cors_origins=("https://App.example/",)))
    async with in_process(app) as client:
        preflight = await client.options("/v1/conversations", headers=ASKED)
    assert preflight.headers["access-control-allow-origin"] == ORIGIN


def assert_readable(answer: httpx.Response, status: int) -> None:
    """Assert that a page of the origin can read an answer with all of its headers."""
    assert answer.status_code == status, answer.text
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in answer.headers
    exposed = {name.lower() for name in answer.headers["access-control-expose-headers"].split(", ")}
    others = {name for name in answer.headers if not name.startswith("access-control-")}
    assert others - READABLE - FOR_THE_BROWSER <= exposed
    assert "x-request-id" in answer.headers


def test_a_page_can_read_every_answer_and_its_headers(page: httpx.Client) -> None:
    page.headers.update(KEY)
    conversation = new_id()
    body = {"user_id": "ada", "id": conversation}
    made = page.post("/conversations", json=body)
    assert_readable(made, 201)
    assert made.headers["location"]
    assert made.headers["ratelimit"]
    messages, keyed = f"/conversations/{conversation}/messages", {"Idempotency-Key": "k"}
    assert_readable(page.post(messages, json={"role": "user"}, headers=keyed), 201)
    replayed = page.post(messages, json={"role": "user"}, headers=keyed)
    assert_readable(replayed, 200)
    assert replayed.headers["idempotent-replayed"] == "true"
    for content, status in (("x", 200), ("y", 409)):
        items = {"items": [{"role": "user", "content": content}]}
        answer = page.post(f"/v1/conversations/{conversation}/items", json=items, headers=keyed)
        assert_readable(answer, status)
    assert answer.headers["x-should-retry"] == "false"  # OpenAI's client in the page must be able to see it
    assert_readable(page.get(f"/conversations/{new_id()}"), 404)
    assert_readable(page.put(f"/conversations/{conversation}"), 405)
    assert_readable(page.get("/nothing"), 404)
    assert_readable(page.post(messages, json={"role": "user", "content": "x" * 5_000}), 413)
    assert_readable(page.post(messages, content=b"x"), 415)
    assert_readable(page.post(messages, json={}), 422)
    assert_readable(page.delete(f"/conversations/{conversation}"), 204)


def test_a_page_can_read_why_it_is_not_let_in(page: httpx.Client) -> None:
    refused = page.get("/conversations?user_id=ada")
    assert_readable(refused, 401)
    assert refused.headers["www-authenticate"]


def test_a_page_can_read_that_the_rate_is_used_up(tmp_path: Path) -> None:
    origins = f'["{ORIGIN}"]'
    with (
        running(tmp_path, cors_origins=origins, rate_per_address="2/minute") as service,
        service.client(headers={"Origin": ORIGIN}) as page,
    ):
        for _ in range(3):
            answer = page.get("/conversations?user_id=ada")
        assert_readable(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        assert page.options("/v1/conversations", headers=ASKED).status_code == 200


def test_a_page_can_read_that_the_database_is_away(tmp_path: Path) -> None:
    away = f"mongodb://127.0.0.1:{free_port()}/chat_history?replicaSet=rs0"
    settings = {"cors_origins": f'["{ORIGIN}"]', "server_selection_timeout_ms": 300}
    service = Service(tmp_path, mongodb_url=away, **settings)
    try:
        service.start(wait=False)
        service.wait_until("/health/live")
        with service.client(headers={"Origin": ORIGIN}) as page:
            answer = page.get("/conversations?user_id=ada")
            assert_readable(answer, 503)
            assert int(answer.headers["retry-after"]) >= 1
    finally:
        service.kill()


def test_a_page_can_read_that_there_are_too_many_connections(tmp_path: Path) -> None:
    with running(tmp_path, cors_origins=f'["{ORIGIN}"]', connections_max=10) as service:
        clients = [service.client(headers={"Origin": ORIGIN}) for _ in range(11)]
        try:
            answers = [client.get("/health/live") for client in clients]
        finally:
            for client in clients:
                client.close()
    assert [answer.status_code for answer in answers] == [200] * 10 + [503]
    assert_readable(answers[-1], 503)


async def test_a_page_can_read_that_an_unexpected_error_happened() -> None:
    app = create_app(Settings(_env_file=None, cors_origins=(ORIGIN,)))

    @app.get("/broken", include_in_schema=False)
    async def broken() -> None:
        raise RuntimeError("unexpected")

    async with in_process(app) as page:
        answer = await page.get("/broken", headers={"Origin": ORIGIN})
    assert_readable(answer, 500)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["type"].startswith("urn:chat-history:problem:")


def test_without_configured_origins_no_answer_is_for_other_pages(service: Service) -> None:
    with service.client() as client:
        conversation = create(client)
        preflight = client.options("/v1/conversations", headers=ASKED)
        assert "access-control-allow-origin" not in preflight.headers
        answer = client.get(f"/conversations/{conversation}", headers={"Origin": ORIGIN})
        assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (403, False)
