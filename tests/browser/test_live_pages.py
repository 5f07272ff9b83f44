"""Open pages show what is changed and deleted, announce it, and leave the focus where it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.chromium import window
from tests.harness import Service, append, create, new_id, running

SOON_MS = 15_000


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("live")) as started:
        yield started


def three_messages(http: httpx.Client) -> tuple[str, list[str]]:
    """Create a conversation of three messages; return its path and their paths."""
    conversation = create(http)
    stored = append(
        http, conversation, *({"role": "user", "content": each} for each in ("one", "two", "three"))
    )
    path = f"/conversations/{conversation}"
    return path, [f"{path}/messages/{each['id']}" for each in stored]


def titled(http: httpx.Client, user: str, title: str) -> str:
    conversation = create(http, user=user)
    http.patch(f"/conversations/{conversation}", json={"title": title}).raise_for_status()
    return conversation


def open_page(page: Page, service: Service, path: str) -> None:
    page.goto(f"{service.url}/console/conversation?id={path.removeprefix('/conversations/')}")
    expect(page.get_by_role("status")).to_have_text("Live")


def said(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def expect_told(page: Page, text: str) -> None:
    status = page.get_by_role("status")
    expect(status).to_have_text(text, timeout=SOON_MS)
    # A status is a polite live region; nothing around it may change that.
    assert status.evaluate("each => each.closest('[aria-live], [aria-hidden]') === null")


def test_a_deleted_and_a_replaced_message_change_on_the_page_and_the_focus_stays(
    browser: Browser, fresh: Service
) -> None:
    with fresh.client() as http, window(browser) as page:
        path, (first, second, _) = three_messages(http)
        open_page(page, fresh, path)
        page.get_by_role("link", name="Raw JSON of message 3").focus()
        http.delete(second).raise_for_status()
        expect(page.locator("#m2")).to_have_count(0, timeout=SOON_MS)
        expect_told(page, "Message 2 was deleted")
        expect(page.get_by_role("link", name="Raw JSON of message 3")).to_be_focused()
        http.put(first, json=said("uno")).raise_for_status()
        expect(page.locator("#m1 .text")).to_have_text("uno", timeout=SOON_MS)
        expect_told(page, "Message 1 was changed")
        expect(page.get_by_role("link", name="Raw JSON of message 3")).to_be_focused()
        assert page.locator(".message").evaluate_all("all => all.map(each => each.id)") == ["m1", "m3"]


def test_the_focus_stays_in_a_message_that_is_replaced_and_goes_to_the_next_when_it_is_deleted(
    browser: Browser, fresh: Service
) -> None:
    with fresh.client() as http, window(browser) as page:
        path, (_, second, third) = three_messages(http)
        open_page(page, fresh, path)
        page.get_by_role("link", name="Raw JSON of message 2").focus()
        http.put(second, json=said("dos")).raise_for_status()
        expect(page.locator("#m2 .text")).to_have_text("dos", timeout=SOON_MS)
        expect(page.get_by_role("link", name="Raw JSON of message 2")).to_be_focused()
        http.delete(second).raise_for_status()
        expect(page.locator("#m3")).to_be_focused(timeout=SOON_MS)
        http.delete(third).raise_for_status()
        expect(page.locator("#m1")).to_be_focused(timeout=SOON_MS)


def test_a_page_whose_conversation_is_emptied_and_deleted_says_so(browser: Browser, fresh: Service) -> None:
    with fresh.client() as http, window(browser) as page:
        path, _ = three_messages(http)
        open_page(page, fresh, path)
        http.delete(f"{path}/messages", params={"after": 0}).raise_for_status()
        expect(page.get_by_text("This conversation has no messages.")).to_be_visible(timeout=SOON_MS)
        expect_told(page, "3 messages were deleted")
        append(http, path.removeprefix("/conversations/"), said("again"))
        expect(page.get_by_text("again")).to_be_visible(timeout=SOON_MS)
        http.delete(path).raise_for_status()
        expect_told(page, "The conversation was deleted")
        expect(page.locator(".message")).to_have_count(0)
        expect(page.get_by_role("button", name="Pause")).to_have_count(0)
        expect(page.get_by_role("link", name="Rename")).to_have_count(0)


def test_the_head_of_an_open_page_follows_the_conversation(browser: Browser, fresh: Service) -> None:
    with fresh.client() as http, window(browser) as page:
        path, (first, _, _) = three_messages(http)
        open_page(page, fresh, path)
        http.delete(first).raise_for_status()
        expect(page.locator(".facts")).to_contain_text("2 messages", timeout=SOON_MS)
        # A new title makes no event. It comes with what happens next, or a while later.
        http.patch(path, json={"title": "Low <b>tide</b>"}).raise_for_status()
        append(http, path.removeprefix("/conversations/"), said("four"))
        expect(page.locator(".facts")).to_contain_text("3 messages", timeout=SOON_MS)
        expect(page.get_by_role("heading", level=1)).to_have_text("Low <b>tide</b>")
        expect(page).to_have_title("Low <b>tide</b> · Chat History")
        http.patch(path, json={"title": "High tide"}).raise_for_status()
        expect(page.get_by_role("heading", level=1)).to_have_text("High tide", timeout=40_000)


def test_a_paused_page_keeps_what_is_deleted_and_catches_up(browser: Browser, fresh: Service) -> None:
    with fresh.client() as http, window(browser) as page:
        path, (first, second, _) = three_messages(http)
        open_page(page, fresh, path)
        page.get_by_role("button", name="Pause").click()
        http.delete(second).raise_for_status()
        http.put(first, json=said("uno")).raise_for_status()
        page.wait_for_timeout(3_000)
        expect(page.locator(".text")).to_have_text(["one", "two", "three"])
        expect(page.get_by_role("status")).to_have_text("Paused")
        page.get_by_role("button", name="Go on").click()
        expect(page.locator(".text")).to_have_text(["uno", "three"], timeout=SOON_MS)
        expect_told(page, "Message 2 was deleted, Message 1 was changed")


def test_a_result_that_arrives_is_paired_with_its_call_and_parted_when_it_is_deleted(
    browser: Browser, fresh: Service
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_tide", "arguments": "{}"}}
    with fresh.client() as http, window(browser) as page:
        conversation = create(http)
        append(http, conversation, {"role": "assistant", "content": None, "tool_calls": [call]})
        open_page(page, fresh, f"/conversations/{conversation}")
        expect(page.locator("#m1").get_by_text("no result on this page")).to_be_visible()
        (stored,) = append(http, conversation, {"role": "tool", "tool_call_id": "c1", "content": "high"})
        expect(page.locator("#m1").get_by_text("result in #2")).to_be_visible(timeout=SOON_MS)
        expect(page.locator("#m2").get_by_text("of the call in #1")).to_be_visible()
        http.delete(f"/conversations/{conversation}/messages/{stored['id']}").raise_for_status()
        expect(page.locator("#m1").get_by_text("no result on this page")).to_be_visible(timeout=SOON_MS)


def test_a_list_shows_what_is_renamed_and_deleted_and_the_focus_stays(
    browser: Browser, fresh: Service
) -> None:
    user = new_id("u")
    with fresh.client() as http, window(browser) as page:
        ids = [titled(http, user, title) for title in ("first", "second", "third")]
        page.goto(f"{fresh.url}/console/?user={user}")
        page.get_by_role("link", name="second").focus()
        http.delete(f"/conversations/{ids[0]}").raise_for_status()
        expect(page.locator("tbody tr")).to_have_count(2, timeout=SOON_MS)
        expect_told(page, "1 conversation is gone")
        expect(page.get_by_role("link", name="second")).to_be_focused()
        http.patch(f"/conversations/{ids[1]}", json={"title": "renamed"}).raise_for_status()
        expect_told(page, "1 conversation was renamed")
        expect(page.get_by_role("link", name="renamed")).to_be_focused()
        append(http, ids[1], said("up"))
        expect(page.locator("tbody .titled a")).to_have_text(["renamed", "third"], timeout=SOON_MS)
        expect(page.get_by_role("link", name="renamed")).to_be_focused()
        http.delete(f"/conversations/{ids[1]}").raise_for_status()
        expect(page.get_by_role("link", name="third")).to_be_focused(timeout=SOON_MS)
        page.get_by_role("button", name="Pause").click()
        http.delete(f"/conversations/{ids[2]}").raise_for_status()
        page.wait_for_timeout(3_000)
        expect(page.locator("tbody tr")).to_have_count(1)
        page.get_by_role("button", name="Go on").click()
        expect(page.get_by_text("This user has no conversation.")).to_be_visible(timeout=SOON_MS)
        expect_told(page, "1 conversation is gone")


def test_a_conversation_that_is_only_on_the_next_page_now_is_not_told_as_gone(
    browser: Browser, fresh: Service
) -> None:
    user = new_id("u")
    with fresh.client() as http, window(browser) as page:
        for _ in range(31):
            create(http, user=user)
        page.goto(f"{fresh.url}/console/?user={user}")
        expect(page.locator("tbody tr")).to_have_count(30)
        titled(http, user, "newest")
        expect(page.locator("tbody .titled a").first).to_have_text("newest", timeout=SOON_MS)
        expect_told(page, "1 conversation is new")
        expect(page.locator("tbody tr")).to_have_count(30)


def test_the_link_behind_an_open_list_appears_with_the_conversation_that_is_one_too_many(
    browser: Browser, fresh: Service
) -> None:
    with fresh.client() as http, window(browser) as page:
        user = new_id("u")
        oldest = titled(http, user, "the oldest")
        for number in range(29):
            titled(http, user, f"{number}")
        page.goto(f"{fresh.url}/console/?user={user}")
        older = page.get_by_role("link", name="Older conversations")
        expect(page.locator("tr[data-id]")).to_have_count(30)
        expect(older).to_have_count(0)
        titled(http, user, "one too many")
        expect(older).to_have_count(1, timeout=SOON_MS)
        older.click()
        expect(page.locator("tr[data-id]")).to_have_count(1)
        expect(page.locator("tr[data-id] .id")).to_have_text(oldest)


def test_a_text_is_written_in_its_own_direction(browser: Browser, fresh: Service) -> None:
    with fresh.client() as http, window(browser) as page:
        conversation = create(http)
        append(http, conversation, said("שלום, 2 כוסות 😀"), said("hello"))
        http.patch(f"/conversations/{conversation}", json={"title": "שלום"}).raise_for_status()
        open_page(page, fresh, f"/conversations/{conversation}")
        hebrew, english = page.get_by_text("כוסות"), page.get_by_text("hello")
        title = page.get_by_role("heading", level=1)
        of = [each.evaluate("each => getComputedStyle(each).direction") for each in (hebrew, english, title)]
        assert of == ["rtl", "ltr", "rtl"]
        assert "😀" in (hebrew.text_content() or "")
