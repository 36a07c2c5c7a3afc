"""Headless Chromium for tests of pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from environments import Unavailable
from javascript import browser as path_of_chromium

TIMEOUT_MS = 60_000  # a test machine with other work
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium, playwright's Browser; skips the test by name where there is none.

    It ends with its module: playwright leaves an event loop running in this thread, in which no `asyncio.run` of
    another test works.
    """
    from playwright import sync_api as playwright

    try:
        path = path_of_chromium()
    except Unavailable as error:
        pytest.skip(f"a test in a browser: {error}")
    playwright.expect.set_options(timeout=TIMEOUT_MS)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
