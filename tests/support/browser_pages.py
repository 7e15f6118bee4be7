"""Headless Chromium for tests of the HTML pages that `dynkp` writes.

`open_page(file)` opens a page as a person's browser would. Held for every page opened so: no script error, nothing
on the console that is an error, and no request that leaves the machine (none is let out).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LOCAL_SCHEMES = ("file", "data", "blob", "about")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


# One browser per file of tests, not per session: while it is open, Playwright keeps an event loop in this thread, and
# other files' tests call `asyncio.run`.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.fail(f"there is no browser ({', '.join(NAMES)}): apt-get install chromium, as make test does")
    with sync_playwright() as playwright:
        # Its sandbox needs privileges that containers do not give; these pages are ours.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def problems() -> list[str]:
    """What was wrong with the pages opened so far; must be empty at the end of the test."""
    return []


@pytest.fixture
def open_page(browser: Browser, problems: list[str]) -> Iterator[Callable[..., Page]]:
    """`open_page(file_or_url, **context_options)` gives a loaded Playwright `Page`; it is closed after the test."""
    contexts = []

    def only_local(route: Any) -> None:
        parts = urlsplit(route.request.url)
        if parts.scheme in LOCAL_SCHEMES or parts.hostname in LOCAL_HOSTS:
            route.continue_()
        else:
            problems.append(f"request to {route.request.url:.200}")
            route.abort()

    def open_(target: str | Path, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        contexts.append(context)
        context.set_default_timeout(20_000)
        context.route("**/*", only_local)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
        page.on("console", lambda said: said.type == "error" and problems.append(f"console: {said.text}"))
        page.goto(target.resolve().as_uri() if isinstance(target, Path) else target)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []
