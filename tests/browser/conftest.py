from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.browser.chromium import chromium, is_required, launched


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium for the tests of a module, which must all be synchronous.

    It ends with the module, because while Playwright runs, no other event loop can run in this thread.
    """
    if chromium() is None and not is_required():
        pytest.skip("there is no Chromium")
    with launched() as started:
        yield started
