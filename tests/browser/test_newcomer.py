"""The walk of a newcomer: start the service, and look at the first conversation in a browser."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.chromium import window
from tests.harness import Service, append, create, new_id, running


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("newcomer")) as started:
        yield started


def curl(service: Service, path: str, body: Any) -> Any:
    command = ["curl", "-s", "--json", json.dumps(body), f"{service.url}{path}"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)


def test_a_newcomer_sees_the_first_conversation_appear_and_grow_and_deletes_it(
    browser: Browser, fresh: Service, tmp_path: Path
) -> None:
    with window(browser, accept_downloads=True) as page:
        page.goto(fresh.url)
        expect(page).to_have_url(re.compile("/console/$"))
        expect(page.get_by_text("There is no conversation.")).to_be_visible()
        expect(page.get_by_text(f"curl {fresh.url}/conversations --json")).to_be_visible()

        curl(fresh, "/conversations", {"user_id": "ben", "id": "harbour", "title": "Tides"})
        page.get_by_role("link", name="Tides").click(timeout=20_000)
        expect(page.get_by_role("heading", name="Tides")).to_be_visible()
        expect(page.get_by_text("This conversation has no messages.")).to_be_visible()

        curl(fresh, "/conversations/harbour/messages", {"role": "user", "content": "High tide?"})
        expect(page.get_by_text("High tide?")).to_be_visible(timeout=15_000)
        expect(page.get_by_text("This conversation has no messages.")).to_have_count(0)
        expect(page.get_by_role("status")).to_have_text("Message 1 is new")

        page.get_by_text("Download", exact=True).click()
        with page.expect_download() as downloaded:
            page.get_by_role("link", name="NDJSON").click()
        file = tmp_path / "conversation.ndjson"
        downloaded.value.save_as(file)
        assert [json.loads(line)["content"] for line in file.read_text().splitlines()] == ["High tide?"]

        page.get_by_role("link", name="Delete").click()
        page.get_by_role("button", name="Delete").click()
        expect(page.get_by_text("This user has no conversation.")).to_be_visible()
    with fresh.client() as http:
        assert http.get("/conversations/harbour").status_code == 404


def test_a_paused_page_stays_as_it_is_until_it_goes_on(browser: Browser, fresh: Service) -> None:
    with fresh.client() as http, window(browser) as page:
        conversation = create(http)
        page.goto(f"{fresh.url}/console/conversation?id={conversation}")
        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_role("status")).to_have_text("Paused")
        append(http, conversation, {"role": "user", "content": "meanwhile"})
        page.wait_for_timeout(4_500)  # two looks
        expect(page.get_by_text("meanwhile")).to_have_count(0)
        page.get_by_role("button", name="Go on").click()
        expect(page.get_by_text("meanwhile")).to_be_visible(timeout=15_000)


def test_earlier_messages_come_by_scrolling_and_the_reader_stays_in_place(
    browser: Browser, fresh: Service
) -> None:
    with fresh.client() as http, window(browser) as page:
        conversation = create(http)
        append(
            http, conversation, *({"role": "user", "content": f"number {place}"} for place in range(1, 101))
        )
        page.goto(f"{fresh.url}/console/conversation?id={conversation}")
        expect(page.get_by_text("number 100", exact=True)).to_be_in_viewport()
        assert page.locator(".message").count() == 40
        page.wait_for_timeout(700)
        page.evaluate("scrollTo(0, 0)")
        expect(page.locator(".message")).to_have_count(80, timeout=10_000)
        expect(page.locator("#m61")).to_be_in_viewport()
        page.evaluate("scrollTo(0, 0)")
        expect(page.locator(".message")).to_have_count(100, timeout=10_000)
        seqs = page.locator(".message").evaluate_all("all => all.map(each => Number(each.dataset.seq))")
        assert seqs == list(range(1, 101))
        expect(page.get_by_role("link", name="Earlier messages")).to_have_count(0)


def test_a_person_reads_everything_without_a_script(browser: Browser, fresh: Service) -> None:
    with fresh.client() as http, window(browser, java_script_enabled=False) as page:
        conversation = create(http)
        append(
            http, conversation, *({"role": "user", "content": f"number {place}"} for place in range(1, 61))
        )
        page.goto(f"{fresh.url}/console/?user=ada")
        page.locator(f'tr[data-id="{conversation}"] .titled a').click()
        expect(page.get_by_text("number 60", exact=True)).to_be_visible()
        page.get_by_role("link", name="Earlier messages").click()
        expect(page.get_by_text("number 1", exact=True)).to_be_visible()
        page.get_by_role("link", name="Newest messages").click()
        expect(page.get_by_text("number 60", exact=True)).to_be_visible()
        page.get_by_role("link", name="Raw JSON of message 60").click()
        assert json.loads(page.locator("body").inner_text())["content"] == "number 60"
        page.goto(f"{fresh.url}/console/rename?id={conversation}")
        page.get_by_label("Title").fill("By hand")
        page.get_by_role("button", name="Rename").click()
        expect(page.get_by_role("heading", name="By hand")).to_be_visible()


def test_a_call_is_folded_indented_and_paired_with_its_result(browser: Browser, fresh: Service) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_tide", "arguments": '{"place":"pier"}'}}
    open_call = {**call, "id": "c2"}
    with fresh.client() as http, window(browser) as page:
        conversation = create(http)
        append(
            http,
            conversation,
            {"role": "assistant", "content": None, "reasoning_content": "I think", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "high"},
            {"role": "assistant", "content": None, "tool_calls": [open_call]},
        )
        page.goto(f"{fresh.url}/console/conversation?id={conversation}")
        first = page.locator("#m1")
        expect(first.get_by_text("result in #2")).to_be_visible()
        expect(first.get_by_text('"place": "pier"')).to_be_hidden()
        expect(first.get_by_text("I think")).to_be_hidden()
        first.get_by_text("Tool call").click()
        expect(first.get_by_text('"place": "pier"')).to_be_visible()
        expect(page.locator("#m2").get_by_text("of the call in #1")).to_be_visible()
        expect(page.locator("#m3").get_by_text("no result on this page")).to_be_visible()


def test_the_list_is_filtered_by_title_while_one_types(browser: Browser, fresh: Service) -> None:
    user = new_id("u")
    with fresh.client() as http, window(browser) as page:
        for title in ("Ferry", "Harbour", "Ferry again"):
            http.post("/conversations", json={"user_id": user, "title": title})
        page.goto(f"{fresh.url}/console/?user={user}")
        expect(page.locator("tbody tr:visible")).to_have_count(3)
        page.get_by_label("Title on this page").fill("ferry")
        expect(page.locator("tbody tr:visible")).to_have_count(2)
        page.get_by_role("button", name="Show").click()
        expect(page.locator("tbody tr")).to_have_count(2)


def test_the_description_of_the_api_is_one_of_the_pages(browser: Browser, fresh: Service) -> None:
    asked: list[str] = []
    with window(browser) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{fresh.url}/console/state")
        page.get_by_role("link", name="API", exact=True).click()
        expect(page.get_by_text("/conversations/{conversation_id}/messages").first).to_be_visible(
            timeout=20_000
        )
        page.get_by_role("link", name="Conversations", exact=True).click()
        expect(page.get_by_role("heading", name="Conversations")).to_be_visible()
    assert all(each.startswith((fresh.url, "data:")) for each in asked), asked
