"""Whatever is stored is only text on the pages: nothing in it runs, loads, styles or leads anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.chromium import Watched, window
from tests.harness import Service, append, new_id, running

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Erk"
    "Jggg=="
)
ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'><iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "</title></textarea></pre><script>alert(1)</script>",
    "<style>*{display:none}</style><link rel=stylesheet href=//evil.example/x.css>",
    "{{ 7 * 7 }}{% raw %}{{ self }}",
    "javascript:alert(1)",
    '<a href="javascript:alert(1)">click</a> [md](javascript:alert(1)) ![p](https://evil.example/p.png)',
    '<base href="//evil.example/"><meta http-equiv=refresh content="0;url=//evil.example">',
    '<form action="//evil.example"><button>Sign in</button></form>',
    "&lt;script&gt;alert(1)&lt;/script&gt; &#x3c;b&#x3e;",
    "\u202egpj.exe <b>bold</b> \u2028\u2029",
]
# What a page of the console never has, so it would come from a text.
MADE_OF_A_TEXT = "iframe, base, style, main script, object, embed, main svg, main img"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("hostile")) as started:
        yield started


def messages_with(attack: str) -> list[dict[str, Any]]:
    """The attack in every place of a message that is shown."""
    call = {"id": attack, "type": "function", "function": {"name": attack, "arguments": attack}}
    return [
        {"role": "user", "content": attack, "name": attack, attack.replace(".", "_") or "k": attack},
        {"role": "assistant", "content": None, "reasoning_content": attack, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": attack, "content": attack, "name": attack},
        {
            "role": "assistant",
            "content": [{"type": attack, "text": attack}, {"type": "text", "text": attack}],
        },
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": attack}}]},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": f"https://evil.example/{attack}"}}],
        },
        {
            "role": "user",
            "content": [{"type": "input_image", "image_url": f"data:image/svg+xml;base64,{attack}"}],
        },
        {"role": "user", "content": [{"type": "input_file", "filename": attack, "file_url": attack}]},
        {"role": "assistant", "parts": [{"functionCall": {"name": attack, "args": {attack: attack}}}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": attack, "name": attack, "input": attack}],
        },
    ]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_is_stored_runs_or_loads_anything(browser: Browser, fresh: Service, attack: str) -> None:
    user, conversation = f"u{attack}{new_id()}", f"c{attack}{new_id()}"
    with fresh.client() as http:
        body = {"user_id": user, "id": conversation, "title": attack, "metadata": {"k": attack}}
        made = http.post("/conversations", json=body)
        assert made.status_code == 201, made.text
        append(http, quote(conversation, safe=""), *messages_with(attack))
        summed = {"upto_seq": 4, "summary": attack, "metadata": {"k": attack}}
        made = http.post(f"/conversations/{quote(conversation, safe='')}/checkpoints", json=summed)
        assert made.status_code == 201, made.text
    watched = Watched(browser)
    page = watched.page
    one = f"id={quote(conversation, safe='')}"
    who = f"user={quote(user, safe='')}"
    for path in (
        f"?{who}",
        f"?{who}&title={quote(attack)}",
        f"conversation?{one}",
        f"context?{one}",
        f"rename?{one}",
        f"delete?{one}",
        f"erase?{who}",
        f"conversation?id={quote(attack, safe='')}",
        f"?{who}&cursor={quote(attack)}",
        f"?{quote(attack)}=1",
        f"sign-in?next={quote(attack)}",
    ):
        page.goto(f"{fresh.url}/console/{path}")
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert page.url.startswith(f"{fresh.url}/console/")
        assert page.locator(MADE_OF_A_TEXT).count() == 0
        hrefs = page.locator("a").evaluate_all("all => all.map(each => each.href)")
        assert all(each.startswith(("http://127.0.0.1", "https://evil.example/")) for each in hrefs), hrefs
    # The same content as it arrives while the page is open, and what a click shows.
    page.goto(f"{fresh.url}/console/conversation?{one}")
    expect(page.locator(".text").first).to_have_text(attack, use_inner_text=False)
    with fresh.client() as http:
        append(http, quote(conversation, safe=""), *messages_with(attack))
    expect(page.locator("#m20")).to_be_visible(timeout=15_000)
    assert page.locator(MADE_OF_A_TEXT).count() == 0
    page.goto(f"{fresh.url}/console/message?{one}&message={quote(message_id(fresh, conversation), safe='')}")
    assert page.locator("body *").count() == 1  # the text, in the <pre> of the browser
    # A list while it is open, and the receipt of an erasure.
    page.goto(f"{fresh.url}/console/?{who}")
    with fresh.client() as http:
        other = {"user_id": user, "id": f"d{attack}{new_id()}", "title": attack}
        assert http.post("/conversations", json=other).status_code == 201
    expect(page.locator("tr[data-id]")).to_have_count(2, timeout=15_000)
    assert page.locator(MADE_OF_A_TEXT).count() == 0
    page.goto(f"{fresh.url}/console/erase?{who}")
    page.locator("input[name=again]").fill(user)
    page.get_by_role("button", name="Erase").click()
    expect(page.get_by_role("heading", name="The user was erased")).to_be_visible(timeout=15_000)
    assert page.locator(MADE_OF_A_TEXT).count() == 0
    assert all(each.startswith(fresh.url) or each == "data:," for each in watched.asked), watched.asked
    watched.close()


def message_id(service: Service, conversation: str) -> str:
    with service.client() as http:
        read = http.get(f"/conversations/{quote(conversation, safe='')}/messages?limit=1")
    return str(read.json()["data"][0]["id"])


def test_a_picture_is_loaded_after_a_click_only(browser: Browser, fresh: Service) -> None:
    conversation = new_id()
    elsewhere = "https://pictures.example/p.png"
    content = [
        {"type": "image_url", "image_url": {"url": PIXEL}},
        {"type": "image_url", "image_url": {"url": elsewhere}},
        {"type": "image_url", "image_url": {"url": "http://pictures.example/p.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,PHN2Zy8+"}},
    ]
    with fresh.client() as http:
        http.post("/conversations", json={"user_id": "ada", "id": conversation})
        append(http, conversation, {"role": "user", "content": content})
    asked: list[str] = []
    with window(browser) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.route("https://pictures.example/**", lambda route: route.abort())
        page.goto(f"{fresh.url}/console/conversation?id={conversation}")
        buttons = page.get_by_role("button", name="Show the picture")
        expect(buttons).to_have_count(2)
        assert page.locator("main img").count() == 0
        buttons.first.click()
        picture = page.locator("main img").first
        expect(picture).to_be_visible()
        page.wait_for_function("document.querySelector('main img').naturalWidth === 1")
        assert not [each for each in asked if not each.startswith((fresh.url, "data:"))]
        buttons.first.click()
        expect(page.locator("main img")).to_have_count(2)
        page.wait_for_timeout(300)
        assert [each for each in asked if not each.startswith((fresh.url, "data:"))] == [elsewhere]


def test_the_test_itself_sees_a_violation_of_the_policy(browser: Browser, fresh: Service) -> None:
    watched = Watched(browser)
    watched.page.goto(f"{fresh.url}/console/state")
    watched.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
    watched.page.wait_for_timeout(500)
    with pytest.raises(AssertionError, match=r"violat|Content Security Policy"):
        watched.close()


def test_no_page_can_be_framed(browser: Browser, fresh: Service) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        frames = "".join(
            f'<iframe src="{fresh.url}/{path}"></iframe>' for path in ("console/", "console/state", "docs")
        )
        page.route("http://evil.example/", lambda route: route.fulfill(body=frames, content_type="text/html"))
        page.goto("http://evil.example/")
        page.wait_for_timeout(1_500)
        assert len(page.frames) == 4
        for frame in page.frames[1:]:
            assert frame.url.startswith("chrome-error:")
            assert frame.locator(".brand, #swagger-ui").count() == 0
    finally:
        context.close()
