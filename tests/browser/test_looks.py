"""Every page for everybody: no serious finding of axe-core at any width, in dark and light; pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.chromium import NARROW, WIDE, Scheme, shoot, window
from tests.browser.test_hostile_content import PIXEL
from tests.harness import Service, append, running

OWN = "k" * 20
CALL = {"id": "c1", "type": "function", "function": {"name": "get_tide", "arguments": '{"place":"harbour"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You answer questions about tides. Be short."},
    {"role": "user", "content": "High tide?"},
    {"role": "assistant", "content": None, "reasoning_content": "I need the tide.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"high": ["05:12", "17:40"], "metres": 3.4}'},
    {"role": "assistant", "content": "High tide is at **17:40** today, 3.4 m. 🌊"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "And this?"},
            {"type": "image_url", "image_url": {"url": PIXEL}},
        ],
    },
    {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c2"}]},
    {"role": "user", "content": "شكرا جزيلا! متى يكون المد التالي؟"},
    {"role": "assistant", "content": "The next one is tomorrow at 06:02." + " unbroken" * 3 + "x" * 300},
]
TITLES = ["Packing list for the ferry", "Fixing the <script> bug", "שיחה על הגאות", "An invoice " * 12, None]
PAGES = {
    "start": "./",
    "list": "?user=ben",
    "conversation": "conversation?id=harbour",
    "context": "context?id=harbour",
    "state": "state",
    "rename": "rename?id=harbour",
    "delete": "delete?id=harbour",
    "erase": "erase?user=ben",
    "error": "conversation?id=nothing",
}
# What axe-core calls serious or critical.
GRAVE = {"serious", "critical"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("looks"), auth="key", api_key=OWN) as started:
        with started.client(headers={"X-API-Key": OWN}) as http:
            for place, title in enumerate(TITLES):
                http.post("/conversations", json={"user_id": "ben", "id": f"c-{place}", "title": title})
                append(http, f"c-{place}", *[{"role": "user", "content": "x"}] * (place * 7 + 1))
            body = {"user_id": "ben", "id": "harbour", "title": "High tide at the harbour"}
            http.post("/conversations", json={**body, "metadata": {"channel": "web"}})
            append(http, "harbour", *TALK)
        yield started


def grave_findings(page: Page) -> list[tuple[str, str]]:
    """The serious findings of axe-core: each rule with each element that breaks it."""
    findings = [each for each in Axe().run(page).response["violations"] if each["impact"] in GRAVE]
    return [(each["id"], node["html"]) for each in findings for node in each["nodes"]]


def require_no_grave_finding(page: Page) -> None:
    assert grave_findings(page) == []


# What Swagger UI itself does, and no style can change: the rule, and the element that breaks it.
OF_SWAGGER_UI = [
    # The link to an operation stands inside the button that opens it.
    ("nested-interactive", 'class="opblock-summary-control"'),
    # The field for a body, and the choice of an example, have no label.
    ("label", '<textarea class="body-param__text"'),
    ("select-name", '<select class="examples-select-element"'),
    # An example that is wider than its box cannot be scrolled by the keyboard.
    ("scrollable-region-focusable", '<pre class="example microlight"'),
]


def _is_of_swagger_ui(rule: str, html: str, own_rule: str, element: str) -> bool:
    return rule == own_rule and element in html


def sign_in_with_key(page: Page) -> None:
    expect(page.locator("[name=credential]")).to_be_focused()
    page.keyboard.type(OWN)
    page.keyboard.press("Enter")


def sign_in_by_keyboard(page: Page) -> None:
    sign_in_with_key(page)
    expect(page.get_by_role("heading", name="Conversations")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_page_is_accessible_and_fits(
    browser: Browser, shown: Service, scheme: Scheme, width: int
) -> None:
    size = {"width": width, "height": 900}
    with window(browser, color_scheme=scheme, viewport=size, bypass_csp=True) as page:
        page.goto(f"{shown.url}/console/")
        require_no_grave_finding(page)
        shoot(page, f"sign-in-{scheme}-{width}")
        sign_in_by_keyboard(page)
        for name, path in PAGES.items():
            page.goto(f"{shown.url}/console/{path}")
            expect(page.locator("h1")).to_be_visible()
            page.evaluate(
                "document.querySelectorAll('details:not(.menu)').forEach(each => { each.open = true })"
            )
            require_no_grave_finding(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            shoot(page, f"{name}-{scheme}-{width}")


@pytest.mark.parametrize(("scheme", "width"), [("light", WIDE), ("dark", NARROW)])
def test_the_receipt_of_an_erasure_is_accessible_and_fits(
    browser: Browser, shown: Service, scheme: Scheme, width: int
) -> None:
    user = f"leaving-{scheme}-{width}"
    size = {"width": width, "height": 900}
    with window(browser, color_scheme=scheme, viewport=size, bypass_csp=True) as page:
        page.goto(f"{shown.url}/console/erase?user={user}")
        sign_in_with_key(page)
        expect(page.get_by_role("heading", name=f"Erase the user {user}?")).to_be_visible()
        page.get_by_role("textbox").fill(user)
        page.get_by_role("button", name="Erase").click()
        expect(page.get_by_role("heading", name="The user was erased")).to_be_visible(timeout=20_000)
        require_no_grave_finding(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shoot(page, f"erasure-{scheme}-{width}")


@pytest.mark.parametrize(("scheme", "width"), [("light", WIDE), ("dark", NARROW)])
def test_the_description_of_the_api_is_accessible_fits_and_looks_like_the_console(
    browser: Browser, shown: Service, scheme: Scheme, width: int
) -> None:
    size = {"width": width, "height": 900}
    colours = "['.top', 'body'].map(each => getComputedStyle(document.querySelector(each)).backgroundColor)"
    with window(browser, color_scheme=scheme, viewport=size, bypass_csp=True) as page:
        page.goto(f"{shown.url}/console/sign-in")
        console = page.evaluate(colours)
        page.goto(f"{shown.url}/docs")
        closed = page.locator(".opblock:not(.is-open) .opblock-summary-control")
        for path in ("/conversations", "/conversations/{conversation_id}/messages"):
            closed.filter(has=page.locator(f'[data-path="{path}"]')).first.click()
        page.locator(".opblock.is-open").last.get_by_role("button", name="Try it out").click()
        expect(page.get_by_role("button", name="Execute")).to_be_visible()
        assert page.evaluate(colours) == console
        found = grave_findings(page)
        assert [
            each for each in found if not any(_is_of_swagger_ui(*each, *own) for own in OF_SWAGGER_UI)
        ] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shoot(page, f"docs-{scheme}-{width}")


def test_a_page_can_be_zoomed_to_twice_its_size(browser: Browser, shown: Service) -> None:
    # Twice the size in a window of 1280 pixels is a window of 640 pixels of twice the density.
    with window(browser, viewport={"width": 640, "height": 450}, device_scale_factor=2) as page:
        page.goto(f"{shown.url}/console/")
        sign_in_by_keyboard(page)
        for path in PAGES.values():
            page.goto(f"{shown.url}/console/{path}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 640, path


def test_everything_can_be_reached_by_the_keyboard(browser: Browser, shown: Service) -> None:
    with window(browser) as page:
        page.goto(f"{shown.url}/console/")
        sign_in_by_keyboard(page)
        page.goto(f"{shown.url}/console/conversation?id=harbour")
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
        page.keyboard.press("Enter")
        reached = set[str]()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.textContent.trim().slice(0, 12)"))
        assert {"Pause", "Rename", "Download", "Delete", "Details", "#2", "JSON"} <= reached
        assert any(each.startswith("Tool call") for each in reached)
        page.get_by_text("Download", exact=True).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name="NDJSON")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("link", name="NDJSON")).to_be_hidden()


def test_a_page_has_landmarks_and_one_heading_and_roles_are_told_without_colour(
    browser: Browser, shown: Service
) -> None:
    with window(browser) as page:
        page.goto(f"{shown.url}/console/")
        sign_in_by_keyboard(page)
        page.goto(f"{shown.url}/console/conversation?id=harbour")
        for landmark in ("banner", "navigation", "main", "contentinfo"):
            expect(page.get_by_role(landmark)).to_have_count(1)
        expect(page.get_by_role("heading", level=1)).to_have_count(1)
        roles = page.get_by_role("article").evaluate_all(
            "all => all.map(each => each.querySelector('h2').childNodes[0].textContent)"
        )
        assert roles == [str(each["role"]).capitalize() for each in TALK]
