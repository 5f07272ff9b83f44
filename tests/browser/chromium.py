"""Finds a Chromium, and drives it as a person does; whatever breaks the pages' policy fails the test."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

ROOT = Path(__file__).parents[2]
# CI keeps this folder. It is not committed.
SCREENSHOTS = ROOT / ".screenshots"
# With this variable, a machine without a Chromium fails the tests, and does not skip them.
REQUIRED = "TEST_BROWSER_REQUIRED"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# For a network that is closed: the browser asks nobody for anything.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, NARROW = 1280, 390
Scheme = Literal["light", "dark"]


@functools.cache
def chromium() -> str | None:
    """Return the program of a Chromium: the one on the PATH, or else Playwright's own, or None."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is not None:
        return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def is_required() -> bool:
    """Tell whether the tests must run."""
    return bool(os.environ.get(REQUIRED))


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    """Start a Chromium with a fresh profile, and end it."""
    program = chromium()
    assert program is not None, (
        "There is no Chromium on the PATH. Install one: apt-get install chromium, or playwright install."
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page in a window of its own, of which violations of its policy, dialogs and errors are collected."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.wrong.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        # A violation that the console of the browser does not report is reported by an event.
        self.context.add_init_script(
            "addEventListener('securitypolicyviolation', "
            "e => console.error(`violation: ${e.violatedDirective} ${e.blockedURI}`), true)"
        )

    def _said(self, message: ConsoleMessage) -> None:
        # A failed request is not an error of the page: tests ask for pages that are not there.
        if message.type in {"error", "warning"} and not message.text.startswith("Failed to load resource"):
            self.wrong.append(f"{message.type}: {message.text}")

    def close(self) -> None:
        """Close the window, and fail if anything was wrong."""
        self.context.close()
        assert not self.wrong, self.wrong


@contextlib.contextmanager
def window(browser: Browser, **options: Any) -> Iterator[Page]:
    """Open a page, and require at the end that nothing broke its policy."""
    watched = Watched(browser, **{"viewport": {"width": WIDE, "height": 900}, **options})
    try:
        yield watched.page
    except BaseException:
        watched.context.close()
        raise
    watched.close()


def shoot(page: Page, name: str) -> None:
    """Keep a picture of a page."""
    SCREENSHOTS.mkdir(exist_ok=True)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
