"""The console over HTTP, without a browser: the way in, sessions, forms, errors, and what a page costs.

`tests/browser` looks at the same pages in Chromium.
"""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from markupsafe import escape
from pymongo import MongoClient

from service.access.sessions import SESSION_S, Sessions
from service.api import meta
from service.app import create_app
from service.console import rendering
from service.settings import Settings
from tests.harness import Service, append, create, keys, new_id, new_key, running
from tests.live import events, tail
from tests.strategies import LIKE_OTHERS, REAL_IDS
from tests.tokens import AUDIENCE, ISSUER, Issuer

OWN = "k" * 20
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
BYTES_MAX = 60_000


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory, issuer: Issuer) -> Iterator[Service]:
    """A service with keys, tokens and tenants, in two processes, which shares nothing but the database."""
    settings = {
        "auth": "key+jwt",
        "api_key": OWN,
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_jwks_url": issuer.url,
        "jwt_tenant_claim": "org",
        "jwt_leeway_s": 0,
        "key_cache_ms": 0,
        "audit_days": 1,
        "workers": 2,
        "failures_per_address": "20/minute",
    }
    with running(tmp_path_factory.mktemp("closed"), **settings) as started:
        yield started


@pytest.fixture
def person(closed: Service) -> Iterator[httpx.Client]:
    """A browser of somebody who has not signed in."""
    with closed.client(headers=HTML) as opened:
        yield opened


def token_of(page: httpx.Response) -> str:
    (token, *_) = re.findall(r'name="token" value="([0-9a-f]{64})"', page.text)
    return str(token)


def sign_in(http: httpx.Client, credential: str, wanted: str = "") -> httpx.Response:
    page = http.get("/console/sign-in")
    fields = {"token": token_of(page), "credential": credential, "next": wanted}
    return http.post("/console/sign-in", data=fields)


def look(http: httpx.Client, path: str) -> tuple[int, str]:
    """Open a page, or a stream of events up to its head; return the status and what came."""
    with http.stream("GET", f"/console/{path}") as answer:
        if not answer.headers["content-type"].startswith("text/event-stream"):
            return answer.status_code, answer.read().decode()
        told = list[str]()
        for each in events(answer):
            told.append(json.dumps(each, ensure_ascii=False))
            if each["event"] == "head":
                break
        return answer.status_code, "\n".join(told)


def send(http: httpx.Client, path: str, **fields: str) -> httpx.Response:
    """Open the page of a form, and send the form."""
    page = http.get(path)
    assert page.status_code == 200, page.text
    return http.post(path, data={"token": token_of(page), **fields})


# -- the way in ------------------------------------------------------------------------------------


def test_a_browser_is_led_to_the_console_and_another_client_gets_its_problem(service: Service) -> None:
    with service.client() as http:
        led = http.get("/", headers=HTML)
        assert (led.status_code, led.headers["location"]) == (307, "console/")
        other = http.get("/", headers={"Accept": "application/json"})
        assert (other.status_code, other.json()["type"]) == (404, "urn:chat-history:problem:not-found")
        assert http.get("/console").headers["location"] == "console/"


def test_every_address_in_a_page_is_relative_so_a_proxy_may_put_a_path_before_it(
    service: Service, conversation: str
) -> None:
    with service.client() as http:
        append(http, conversation, {"role": "user", "content": "x"})
        for path in ("./?user=ada", f"conversation?id={conversation}", "state", f"delete?id={conversation}"):
            page = http.get(f"/console/{path}")
            addresses = re.findall(r'(?:href|src|action)="([^"]*)"', page.text)
            assert len(addresses) > 5
            assert not [each for each in addresses if re.match(r"/|https?:", each)], path


def test_an_error_of_a_page_is_a_page_and_an_error_of_the_api_a_document(service: Service) -> None:
    with service.client() as http:
        page = http.get("/console/conversation?id=nothing")
        assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
        assert "There is no such conversation" in page.text
        assert page.headers["x-request-id"]
        assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        for path in ("/console/none", "/console/conversation", "/console/conversation?id=a&seq=-1"):
            assert "<h1>" in http.get(path).text, path
        assert http.get("/conversations/nothing").json()["status"] == 404


def test_an_error_page_names_who_is_signed_in_and_lets_them_sign_out(closed: Service) -> None:
    with closed.client(headers={"X-API-Key": OWN}) as owner, closed.client(headers=HTML) as http:
        conversation = create(owner)
        sign_in(http, new_key(closed, "read"))
        named = re.compile(r'<span class="caller" title="([^"]+)">')
        (name,) = named.findall(http.get(f"/console/conversation?id={conversation}").text)
        for path, status in (
            ("conversation?id=nothing", 404),
            ("none", 404),
            ("conversation", 422),
            (f"rename?id={conversation}", 403),
        ):
            page = http.get(f"/console/{path}")
            assert page.status_code == status, path
            assert named.findall(page.text) == [name], path
        left = http.post("/console/sign-out", data={"token": token_of(page)})
        assert left.status_code == 303
        assert http.get(f"/console/conversation?id={conversation}").headers["location"].startswith("sign-in")


def test_the_files_of_the_console_are_small() -> None:
    files = [
        *Path(rendering.__file__).parent.glob("static/*"),
        *Path(rendering.__file__).parent.glob("templates/*"),
        Path(meta.__file__).parent / "docs.css",
    ]
    assert len(files) > 10
    assert sum(each.stat().st_size for each in files) <= BYTES_MAX


def test_nothing_inline_is_in_a_page(service: Service, conversation: str) -> None:
    with service.client() as http:
        append(http, conversation, {"role": "user", "content": "x"})
        for path in ("./?user=ada", f"conversation?id={conversation}", "state", "erase?user=ada"):
            page = http.get(f"/console/{path}")
            assert "unsafe" not in page.headers["content-security-policy"]
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script[^>]*>[^<]", page.text), path


# -- sessions --------------------------------------------------------------------------------------


def test_without_a_session_every_page_leads_to_the_sign_in_and_back(person: httpx.Client) -> None:
    for path in ("", "conversation?id=a%2Fb", "state", "events?id=a&after=0", "download?id=a&form=json"):
        led = person.get(f"/console/{path}")
        assert led.status_code == 303, path
        address = httpx.URL(led.headers["location"])
        assert (address.path, address.params["next"]) == ("sign-in", path)
    answered = sign_in(person, OWN, "conversation?id=a%2Fb")
    assert (answered.status_code, answered.headers["location"]) == (303, "conversation?id=a%2Fb")


@pytest.mark.parametrize(
    "wanted",
    ["//evil.example", "https://evil.example", "/docs", "sign-out", "..\\evil", "a?b\r\nSet-Cookie: x"],
)
def test_the_sign_in_leads_to_no_other_site(person: httpx.Client, wanted: str) -> None:
    assert sign_in(person, OWN, wanted).headers["location"] == "./"


def test_a_session_works_on_every_process_and_only_for_the_console(
    closed: Service, person: httpx.Client
) -> None:
    assert sign_in(person, OWN).status_code == 303
    for _ in range(20):  # a new connection reaches either process
        with closed.client(headers=HTML, cookies=person.cookies) as other:
            assert other.get("/console/?user=ada").status_code == 200
            assert other.get("/conversations?user_id=ada").status_code == 401


def test_the_cookie_is_for_this_site_alone_and_has_no_secret(closed: Service, issuer: Issuer) -> None:
    key = new_key(closed, "read")
    for credential in (OWN, key, issuer.token("ada")):
        with closed.client(headers=HTML) as http:
            answered = sign_in(http, credential)
            (cookie,) = answered.headers.get_list("set-cookie")
            assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(cookie.split("; "))
            assert "Secure" not in cookie
            kept = sessions_text(http)
            assert credential not in kept
            assert credential.rpartition("_")[2].rpartition(".")[2] not in kept


def sessions_text(http: httpx.Client) -> str:
    """All that a thief could read in the cookies, decoded too."""
    import base64  # noqa: PLC0415

    values = [str(value) for value in http.cookies.values()]
    decoded = [base64.urlsafe_b64decode(value.split(".")[0] + "==").decode() for value in values]
    return "\n".join([*values, *decoded])


async def test_the_cookie_is_secure_and_host_only_under_tls(closed: Service) -> None:
    settings = Settings(_env_file=None, mongodb_url=closed.database_url, auth="key", api_key=OWN)
    app = create_app(settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="https://localhost", headers=HTML) as http,
    ):
        page = await http.get("/console/sign-in")
        (cookie,) = page.headers.get_list("set-cookie")
        assert cookie.startswith("__Host-chat_history_")
        assert "Secure" in cookie.split("; ")
        assert "domain" not in cookie.lower()


def test_a_session_ends_with_its_key(closed: Service, person: httpx.Client) -> None:
    key = new_key(closed, "read")
    assert sign_in(person, key).status_code == 303
    assert person.get("/console/?user=ada").status_code == 200
    keys(closed, "revoke", key.split("_")[1])
    assert person.get("/console/?user=ada").status_code == 303


def test_a_session_ends_with_its_token(person: httpx.Client, issuer: Issuer) -> None:
    assert sign_in(person, issuer.token("ada", exp=int(time.time()) + 2)).status_code == 303
    assert person.get("/console/").status_code == 200
    time.sleep(2.2)
    assert person.get("/console/").status_code == 303


def test_a_session_ends_with_the_key_of_the_settings() -> None:
    sessions = Sessions(b"s" * 32)
    assert sessions.proof("a") != sessions.proof("b")
    assert sessions.proof("a") != Sessions(b"t" * 32).proof("a")


def test_a_cookie_of_another_deployment_or_an_old_one_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(b"s" * 32)
    value = sessions.sign({"name": "key:CHAT_API_KEY", "proof": "x"})
    assert sessions.caller(value) == {"name": "key:CHAT_API_KEY", "proof": "x"}
    assert Sessions(b"t" * 32).caller(value) is None
    # Not the last character, of which some bits mean nothing.
    assert sessions.caller(value[:-5] + ("A" if value[-5] != "A" else "B") + value[-4:]) is None
    later = time.time() + SESSION_S + 2
    monkeypatch.setattr(time, "time", lambda: later)
    assert sessions.caller(value) is None
    assert not sessions.is_valid(value)


def test_signing_out_ends_the_session_in_the_browser(person: httpx.Client) -> None:
    sign_in(person, OWN)
    page = person.get("/console/?user=ada")
    out = person.post("/console/sign-out", data={"token": token_of(page)})
    assert (out.status_code, out.headers["location"]) == (303, "sign-in")
    assert person.get("/console/?user=ada").status_code == 303


def test_failed_sign_ins_are_limited_and_noted(tmp_path: Path) -> None:
    settings = {"auth": "key", "failures_per_address": "3/minute", "audit_days": 1}
    with running(tmp_path, **settings) as service, service.client(headers=HTML) as http:
        guesses = [f"chk_{number:016x}_{'g' * 43}" for number in range(5)]
        answers = [sign_in(http, guess) for guess in guesses]
        assert [each.status_code for each in answers] == [401, 401, 401, 429, 429]
        assert answers[-1].headers["retry-after"]
        assert "API key or token is invalid" in answers[0].text
        with MongoClient[dict[str, Any]](service.database_url) as operator:
            time.sleep(2)
            refused = list(operator.get_default_database().audit.find({"route": "(refused)"}))
        assert {each["status"] for each in refused} == {401, 429}


# -- forms -----------------------------------------------------------------------------------------

FORMS = ("rename?id={}", "delete?id={}", "erase?user=ada", "sign-out")


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("token", [None, "", "0" * 64, "another session's"])
def test_a_form_without_the_token_of_its_session_does_nothing(
    service: Service, path: str, token: str | None
) -> None:
    with service.client() as http, service.client() as other:
        conversation = create(http)
        http.get(f"/console/delete?id={conversation}")  # which sets the cookie
        if token == "another session's":
            token = token_of(other.get(f"/console/delete?id={conversation}"))
        fields = {"title": "stolen", "again": "ada", "user": "ada"} | (
            {} if token is None else {"token": token}
        )
        refused = http.post(f"/console/{path.format(conversation)}", data=fields)
        assert (refused.status_code, "The form was not accepted" in refused.text) == (403, True)
        assert http.get(f"/conversations/{conversation}").json()["title"] is None


def test_a_form_without_a_cookie_does_nothing(service: Service) -> None:
    with service.client() as http, service.client() as without:
        conversation = create(http)
        token = token_of(http.get(f"/console/delete?id={conversation}"))
        refused = without.post(f"/console/delete?id={conversation}", data={"token": token})
        assert refused.status_code == 403
        assert http.get(f"/conversations/{conversation}").status_code == 200


def test_a_page_of_another_origin_cannot_send_a_form_and_may_only_be_linked_from(service: Service) -> None:
    foreign = {"Sec-Fetch-Site": "cross-site"}
    link = {**foreign, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    with service.client() as http:
        conversation = create(http)
        path = f"/console/delete?id={conversation}"
        assert http.get(path, headers=link).status_code == 200
        for said in (
            foreign,
            {**link, "Sec-Fetch-Dest": "iframe"},
            {**link, "Origin": "https://evil.example"},
        ):
            assert http.get(path, headers=said).status_code == 403, said
        token = token_of(http.get(path))
        sent = http.post(path, data={"token": token}, headers={**link, "Origin": "https://evil.example"})
        assert sent.status_code == 403
        api = http.get(f"/conversations/{conversation}", headers=link)
        assert api.status_code == 403


def test_a_form_of_another_kind_is_refused(service: Service) -> None:
    with service.client() as http:
        conversation = create(http)
        path = f"/console/delete?id={conversation}"
        token = token_of(http.get(path))
        assert http.post(path, json={"token": token}).status_code == 415
        assert http.post(path, files={"token": (None, token)}).status_code == 415
        form = {"content-type": "application/x-www-form-urlencoded"}
        for content in (b"token=%FF", b"token=\xff", b"&".join([b"a=b"] * 30)):
            assert http.post(path, content=content, headers=form).status_code == 400, content
        assert http.post(path, content=b"a" * 3_000_000, headers=form).status_code == 413


# -- actions ---------------------------------------------------------------------------------------


def test_a_conversation_is_renamed_and_deleted(service: Service) -> None:
    with service.client() as http:
        conversation = create(http)
        renamed = send(http, f"/console/rename?id={conversation}", title="  Ärger & <b>  ")
        assert renamed.headers["location"] == f"conversation?id={conversation}"
        assert http.get(f"/conversations/{conversation}").json()["title"] == "Ärger & <b>"
        send(http, f"/console/rename?id={conversation}", title="")
        assert http.get(f"/conversations/{conversation}").json()["title"] is None
        gone = send(http, f"/console/delete?id={conversation}", user="ada")
        assert gone.headers["location"] == "./?user=ada"
        assert http.get(f"/conversations/{conversation}").status_code == 404


def test_a_user_is_erased_with_a_receipt_if_the_id_is_typed(service: Service) -> None:
    user = new_id("u")
    with service.client() as http:
        conversation = create(http, user=user)
        append(http, conversation, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
        asked = http.get(f"/console/erase?user={user}")
        assert "1 conversation with 2 messages" in asked.text
        exported = http.get(f"/console/export?user={user}")
        assert json.loads(exported.text.splitlines()[-1]) == {
            "type": "end",
            "conversations": 1,
            "messages": 2,
        }
        assert send(http, f"/console/erase?user={user}", again="other").status_code == 422
        assert http.get(f"/conversations/{conversation}").status_code == 200
        led = send(http, f"/console/erase?user={user}", again=user)
        receipt = http.get(f"/console/{led.headers['location']}")
        assert "The user was erased" in receipt.text
        assert "1 conversation and 2 messages" in receipt.text
        assert http.get(f"/conversations/{conversation}").status_code == 404


def test_the_three_downloads_have_every_message(service: Service) -> None:
    with service.client() as http:
        conversation = create(http)
        said = [{"role": "user", "content": f"number {place} ```"} for place in range(120)]
        stored = append(http, conversation, *said)
        path = f"/console/download?id={conversation}&form="
        lines = http.get(f"{path}ndjson")
        assert [json.loads(line) for line in lines.text.splitlines()] == stored
        whole = http.get(f"{path}json").json()
        assert (whole["messages"], whole["conversation"]["id"]) == (stored, conversation)
        markdown = http.get(f"{path}markdown")
        assert re.findall(r"number (\d+)", markdown.text) == [str(place) for place in range(120)]
        for each in (lines, markdown):
            assert each.headers["content-disposition"].startswith("attachment")
            assert each.headers["cache-control"] == "no-store"
        assert http.get("/console/download?id=none&form=json").status_code == 404


# -- who may see and do what -----------------------------------------------------------------------


def test_a_key_that_only_reads_is_shown_no_action_and_may_do_none(closed: Service) -> None:
    with closed.client(headers={"X-API-Key": OWN}) as owner, closed.client(headers=HTML) as http:
        conversation = create(owner)
        sign_in(http, new_key(closed, "read"))
        page = http.get(f"/console/conversation?id={conversation}")
        assert page.status_code == 200
        assert "read-only" in page.text
        assert not re.search(r'href="(rename|delete|erase)', page.text)
        assert not re.search(r'href="erase', http.get("/console/?user=ada").text)
        token = token_of(page)
        for path in (f"rename?id={conversation}", f"delete?id={conversation}", "erase?user=ada"):
            assert http.get(f"/console/{path}").status_code == 403, path
            assert http.post(f"/console/{path}", data={"token": token, "again": "ada"}).status_code == 403
        assert owner.get(f"/conversations/{conversation}").status_code == 200


def test_a_key_that_only_writes_sees_nothing(closed: Service) -> None:
    with closed.client(headers={"X-API-Key": OWN}) as owner, closed.client(headers=HTML) as http:
        conversation = create(owner)
        sign_in(http, new_key(closed, "write"))
        for path in (
            "?user=ada",
            f"conversation?id={conversation}",
            "state",
            f"events?id={conversation}&after=0",
        ):
            assert http.get(f"/console/{path}").status_code == 403, path


def test_tenants_and_owners_hold_in_the_console(closed: Service, issuer: Issuer) -> None:
    acme = new_key(closed, "read", "write", tenant="acme")
    callers = {
        "acme's key": (acme, True),
        "the owner's token": (issuer.token("ada"), True),
        "another user's token": (issuer.token("bob"), False),
        "the same user's of another tenant": (issuer.token("ada", org="other"), False),
        "another tenant's key": (new_key(closed, "read", "write", "admin", tenant="other"), False),
        "no tenant's key": (OWN, False),
    }
    with closed.client(headers={"X-API-Key": acme}) as owner:
        conversation = create(owner)
        append(owner, conversation, {"role": "user", "content": "tidings", "id": "m"})
    for caller, (credential, sees) in callers.items():
        with closed.client(headers=HTML) as http:
            assert sign_in(http, credential).status_code == 303, caller
            assert (conversation in http.get("/console/?user=ada").text) is sees, caller
            one = f"id={conversation}"
            for path in (
                f"conversation?{one}",
                f"events?{one}&after=0",
                f"message?{one}&message=m",
                f"download?{one}&form=ndjson",
            ):
                status, text = look(http, path)
                assert (status == 200) is sees, (caller, path)
                assert ("tidings" in text) is sees, (caller, path)


def test_counts_of_all_data_are_only_for_who_may_see_all_data(closed: Service, issuer: Issuer) -> None:
    for credential, sees in (
        (OWN, True),
        (new_key(closed, "read", "admin", tenant="acme"), False),
        (new_key(closed, "read"), False),
        (issuer.token("ada"), False),
    ):
        with closed.client(headers=HTML) as http:
            sign_in(http, credential)
            page = http.get("/console/state")
            assert "Ready: the database answers" in page.text
            assert ("<dt>On disk</dt>" in page.text) is sees


def test_the_state_page_tells_what_runs_and_how_to_look_further(closed: Service) -> None:
    with closed.client(headers=HTML) as http:
        sign_in(http, OWN)
        page = http.get("/console/state").text
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert re.match("(SecantusDB|MongoDB) [0-9]", shown["Database"])
    assert shown["Service"] == version("chat-history-database")
    assert shown["Conversations"].replace(",", "").isdecimal()
    assert shown["Messages"].replace(",", "").isdecimal()
    assert shown["Indexes"] == "complete"
    assert shown["Last sweep"] == "not by this process" or "<time" in shown["Last sweep"]
    assert {"On disk", "Retention", "Audit trail"} <= set(shown)
    assert 'mongosh "$(chat-history mongo-url)"' in html.unescape(page)


def test_every_look_is_an_entry_of_the_audit_trail(closed: Service) -> None:
    with closed.client(headers={"X-API-Key": OWN}) as owner, closed.client(headers=HTML) as http:
        conversation = create(owner, user="eve")
        append(owner, conversation, {"role": "user", "content": "x", "id": "m"})
        key = new_key(closed, "read", "write")
        sign_in(http, key)
        looks = {
            "/console/": "?user=eve",
            "/console/conversation": f"?id={conversation}",
            "/console/events": f"?id={conversation}&after=0",
            "/console/message": f"?id={conversation}&message=m",
            "/console/download": f"?id={conversation}&form=json",
            "/console/delete": f"?id={conversation}",
        }
        for path, query in looks.items():
            assert look(http, path.removeprefix("/console/") + query)[0] == 200
        send(http, f"/console/delete?id={conversation}", user="eve")
    time.sleep(2)
    with MongoClient[dict[str, Any]](closed.database_url) as operator:
        principal = f"key:{key.split('_')[1]}"
        trail = list(operator.get_default_database().audit.find({"principal": principal}))
    noted: dict[tuple[str, str], Any] = {(each["method"], each["route"]): each for each in trail}
    assert {("GET", path) for path in looks} | {
        ("POST", "/console/delete"),
        ("POST", "/console/sign-in"),
    } == {*noted}
    for (_, path), each in noted.items():
        if path not in {"/console/", "/console/sign-in"}:
            assert each["conversation_id"] == conversation, path
    assert noted["GET", "/console/"]["user_id"] == "eve"


# -- what is shown ---------------------------------------------------------------------------------


def test_pages_of_messages_follow_each_other_without_a_gap(service: Service) -> None:
    with service.client() as http:
        conversation = create(http)
        append(http, conversation, *({"role": "user", "content": f"{place}"} for place in range(1, 131)))
        address, found = f"conversation?id={conversation}", list[int]()
        while address:
            page = http.get(f"/console/{address}").text
            seqs = list(map(int, re.findall(r'data-seq="(\d+)"', page)))
            assert seqs == sorted(seqs)
            found = seqs + found
            (*_, address) = ["", *re.findall(r'data-earlier href="([^"]+)"', page)]
            address = address.replace("&amp;", "&")
        assert found == list(range(1, 131))
        linked = http.get(f"/console/conversation?id={conversation}&seq=60").text
        assert "60" in re.findall(r'data-seq="(\d+)"', linked)
        assert re.search(r'href="[^"]*seq=60#m60"', linked)


def test_the_events_of_a_page_are_those_behind_its_seq_with_messages_as_html(
    service: Service, conversation: str
) -> None:
    with service.client() as http, service.client() as other:
        append(http, conversation, {"role": "user", "content": "one"}, {"role": "user", "content": "two <b>"})
        with tail(other, f"/console/events?id={conversation}&after=1") as told:
            new = next(told)
            assert (new["event"], new["id"]) == ("message", "2")
            html = new["data"]["html"]
            assert ("one" in html, "two &lt;b&gt;" in html, "<html" in html) == (False, True, False)
            assert next(told)["event"] == "head"
            (first, second) = message_ids(http, conversation)
            path = f"/conversations/{conversation}/messages"
            http.put(f"{path}/{first}", json={"role": "user", "content": "uno"}).raise_for_status()
            changed = next(told)
            assert (changed["event"], "uno" in changed["data"]["html"]) == ("updated", True)
            http.delete(f"{path}/{second}").raise_for_status()
            assert [each for each in (next(told), next(told)) if each["event"] == "deleted"]
            http.delete(f"/conversations/{conversation}").raise_for_status()
            assert "gone" in [each["event"] for each in told]


def message_ids(http: httpx.Client, conversation: str) -> list[str]:
    return [each["id"] for each in http.get(f"/conversations/{conversation}/messages").json()["data"]]


@pytest.mark.parametrize("ending", ["the key", "the token"])
def test_the_events_of_a_page_end_with_its_session(
    closed: Service, issuer: Issuer, person: httpx.Client, ending: str
) -> None:
    key = new_key(closed, "read", "write", tenant="acme")
    with closed.client(headers={"X-API-Key": key}) as owner:
        conversation = create(owner)
        credential = key if ending == "the key" else issuer.token("ada", exp=int(time.time()) + 3)
        sign_in(person, credential)
        with tail(person, f"/console/events?id={conversation}&after=0") as told:
            assert next(told)["event"] == "head"
            if ending == "the key":
                keys(closed, "revoke", key.split("_")[1])
            assert list(told) == []


def test_the_context_for_a_budget_is_shown_with_its_checkpoints(service: Service, conversation: str) -> None:
    with service.client() as http:
        said = (
            {"role": "user" if place % 2 else "assistant", "content": "w" * 400} for place in range(1, 41)
        )
        append(http, conversation, *said)
        made = http.post(
            f"/conversations/{conversation}/checkpoints", json={"upto_seq": 10, "summary": "So <far>"}
        )
        assert made.status_code == 201, made.text
        page = http.get(f"/console/context?id={conversation}&tokens=1500").text
        wanted = http.get(f"/conversations/{conversation}/context?max_tokens=1500").json()
        seqs = [str(each["seq"]) for each in wanted["messages"] if "seq" in each]
        assert 0 < len(seqs) < 30
        assert re.findall(r'data-seq="(\d+)"', page) == seqs
        assert "So &lt;far&gt;" in page
        assert http.get(f"/console/context?id={conversation}&tokens=0").status_code == 422


def test_a_list_goes_on_by_its_cursor(service: Service) -> None:
    user = new_id("u")
    with service.client() as http:
        made = [create(http, user=user) for _ in range(35)]
        first = http.get(f"/console/?user={user}").text
        (older,) = re.findall(r'rel="next" href="([^"]+)"', first)
        second = http.get("/console/" + older.replace("&amp;", "&")).text
        listed = re.findall(r'data-id="([^"]+)"', first) + re.findall(r'data-id="([^"]+)"', second)
        assert listed == made[::-1]


def test_an_administrator_lists_the_conversations_of_all_users_of_the_own_tenant(closed: Service) -> None:
    admin = new_key(closed, "read", "write", "admin", tenant="listed")
    with closed.client(headers={"X-API-Key": admin}) as owner:
        made = [create(owner, user=user) for user in ("ada", "ben")]
    with closed.client(headers={"X-API-Key": OWN}) as other:
        create(other)
    with closed.client(headers=HTML) as http:
        sign_in(http, admin)
        assert re.findall(r'data-id="([^"]+)"', http.get("/console/").text) == made[::-1]
    with closed.client(headers=HTML) as http:
        sign_in(http, new_key(closed, "read", tenant="listed"))
        page = http.get("/console/")
        assert "Enter the id of a user" in page.text
        assert made[0] not in page.text


def test_a_long_message_is_cut_with_a_link_to_the_whole(service: Service, conversation: str) -> None:
    text = "long " * 200_000
    with service.client() as http:
        (stored,) = append(http, conversation, {"role": "user", "content": text})
        page = http.get(f"/console/conversation?id={conversation}").text
        assert len(page) < 30_000
        (address, *_) = re.findall(r'class="cut"><a href="([^"]+)"', page)
        whole = http.get("/console/" + address.replace("&amp;", "&"))
        assert whole.headers["content-type"] == "text/plain; charset=utf-8"
        assert whole.json() == stored


def test_every_id_that_the_api_takes_has_its_pages(service: Service) -> None:
    """The list leads to the conversation, and every link there to an answer."""
    with service.client() as http:
        for name in [*REAL_IDS, *LIKE_OTHERS]:
            made = http.post(
                "/conversations", json={"user_id": name, "id": name + new_id(), "title": "Tides"}
            )
            assert made.status_code == 201, (name, made.text)
            named = quote(made.json()["id"], safe="")
            appended = http.post(f"/conversations/{named}/messages", json={"role": "user", "id": name})
            assert appended.status_code == 201, (name, appended.text)
            links = links_of(http.get("/console/", params={"user": name}))
            shown = f"conversation?id={quote(made.json()['id'])}"
            (address,) = [each for each in links if each.startswith(shown)]
            page = http.get("/console/" + address)
            assert f"<code>{escape(made.json()['id'])}</code>" in page.text, name
            found = links_of(page)
            assert {each.partition("?")[0] for each in found} == {
                *("./", "state", "../docs", "console.css", "data:,"),
                *("conversation", "message", "rename", "context", "download", "delete"),
            }
            for link in found:
                if link != "data:,":
                    answer = http.get("/console/" + link)
                    assert answer.status_code == 200, (name, link)
                    if link.startswith("message?"):
                        assert answer.json() == appended.json()


def links_of(page: httpx.Response) -> set[str]:
    """Return the addresses that a page leads to or loads, as a browser reads them."""
    assert page.status_code == 200, page.text
    found = map(html.unescape, re.findall(r'href="([^"]+)"', page.text))
    return {each.partition("#")[0] for each in found} - {""}


async def test_the_head_of_a_page_is_sent_before_the_rest_is_rendered() -> None:
    rendered, sent = list[str](), list[Any]()

    def parts() -> Iterator[str]:
        for part in ("<head>" + " " * 1_000, "<main>", "</main>"):
            rendered.append(part)
            yield part

    async def send(message: Any) -> None:
        sent.append((message.get("body"), message.get("more_body", False), len(rendered)))

    await rendering._Page(parts(), 200)({}, None, send)  # type: ignore[arg-type]
    assert sent[1:] == [(b"<head>" + b" " * 1_000, True, 1), (b"<main></main>", False, 3)]
