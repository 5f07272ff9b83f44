"""Signing in, out, and the end of a session, in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.chromium import window
from tests.harness import Service, append, create, keys, new_key, running

OWN = "k" * 20


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {"auth": "key", "api_key": OWN, "key_cache_ms": 0}
    with running(tmp_path_factory.mktemp("signing"), **settings) as started:
        yield started


@pytest.fixture(scope="module")
def talk(closed: Service) -> str:
    with closed.client(headers={"X-API-Key": OWN}) as http:
        conversation = create(http)
        append(http, conversation, {"role": "user", "content": "tidings"})
    return conversation


def sign_in(page: Page, credential: str) -> None:
    page.get_by_label("API key or token").fill(credential)
    page.get_by_role("button", name="Sign in").click()


def test_a_person_signs_in_comes_to_the_page_that_was_asked_for_and_signs_out(
    browser: Browser, closed: Service, talk: str
) -> None:
    with window(browser) as page:
        page.goto(f"{closed.url}/console/conversation?id={talk}")
        expect(page).to_have_url(re.compile("/console/sign-in"))
        sign_in(page, "wrong")
        expect(page.get_by_role("alert")).to_contain_text("invalid, expired or revoked")
        sign_in(page, OWN)
        expect(page.get_by_text("tidings")).to_be_visible()
        assert page.evaluate("document.cookie") == ""  # no script can read it
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        page.goto(f"{closed.url}/console/conversation?id={talk}")
        expect(page).to_have_url(re.compile("/console/sign-in"))


def test_an_open_page_says_that_its_session_is_over_when_the_key_is_revoked(
    browser: Browser, closed: Service, talk: str
) -> None:
    key = new_key(closed, "read")
    with window(browser) as page:
        page.goto(f"{closed.url}/console/conversation?id={talk}")
        sign_in(page, key)
        expect(page.get_by_role("status")).to_have_text("Live")
        expect(page.get_by_role("link", name="Delete")).to_have_count(0)
        keys(closed, "revoke", key.split("_")[1])
        expect(page.get_by_role("status")).to_contain_text("The session is over", timeout=25_000)
        page.reload()
        expect(page).to_have_url(re.compile("/console/sign-in"))


def test_a_page_of_another_site_sends_no_cookie_with_its_form(
    browser: Browser, closed: Service, talk: str
) -> None:
    with window(browser) as page:
        page.goto(f"{closed.url}/console/")
        sign_in(page, OWN)
        expect(page.get_by_role("heading", name="Conversations")).to_be_visible()
        form = f'<form method=post action="{closed.url}/console/delete?id={talk}"><button>Win</button></form>'
        page.route("http://evil.example/", lambda route: route.fulfill(body=form, content_type="text/html"))
        page.goto("http://evil.example/")
        page.get_by_role("button", name="Win").click()
        expect(page).to_have_url(re.compile("/console/(sign-in|delete)"))
    with closed.client(headers={"X-API-Key": OWN}) as http:
        assert http.get(f"/conversations/{talk}").status_code == 200
