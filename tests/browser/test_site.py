"""The documentation site in a browser, without a network.

Holds: the site builds in strict mode; equations of pages and of docstrings are MathML; every public name of `dynkp` is in the
API reference; no page asks for anything from another machine, or is wider than a desktop's or a phone's window; links of the
navigation and into the reference lead somewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Page, TimeoutError

import dynkp
from tests.conftest import REPOSITORY

PAGES = sorted(page.relative_to(REPOSITORY / "docs") for page in (REPOSITORY / "docs").rglob("*.md"))


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site's address on this machine; a file:// page could not run the search."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def address_of(page: Path) -> str:
    folder = page.parent if page.name == "index.md" else page.with_suffix("")
    return "" if folder == Path() else f"{folder.as_posix()}/"


def test_no_page_is_wider_than_the_window(address: str, open_page: Callable[..., Page]) -> None:
    page = open_page(address)
    for name in PAGES:
        response = page.goto(address + address_of(name))
        assert response is not None and response.ok, name
        assert page.locator("h1").count() == 1, name
        for width in (1400, 400):
            page.set_viewport_size({"width": width, "height": 900})
            try:  # panels may still be moving
                page.wait_for_function("document.documentElement.scrollWidth <= innerWidth", timeout=5000)
            except TimeoutError:
                pytest.fail(f"{name} is wider than {width} pixels")


@pytest.mark.parametrize("name", ["methods/dynamic_cot", "methods/aimkp", "methods/mulcot_rd", "api/trainers"])
def test_equations_are_mathml(name: str, address: str, open_page: Callable[..., Page]) -> None:
    page = open_page(f"{address}{name}/")
    equations = page.locator("article math[display=block]")
    assert equations.count() >= 1
    box = equations.first.bounding_box()
    assert box is not None and box["height"] > 15 and box["width"] > 100  # it is laid out
    assert page.locator(".arithmatex").count() == 0
    text = page.locator("article").inner_text()
    assert "\\frac" not in text and "$$" not in text


def test_every_public_name_leads_to_its_documentation(address: str, open_page: Callable[..., Page]) -> None:
    page = open_page(f"{address}api/")
    names = [name for name in dynkp.__all__ if name != "__version__"]
    links = page.locator("article td a").evaluate_all("links => Object.fromEntries(links.map(a => [a.textContent, a.href]))")
    assert set(names) <= set(links), "docs/api/index.md has every public name"
    for name in names:
        page.goto(links[name])
        anchor = links[name].partition("#")[2]
        assert anchor.endswith(f".{name}")
        assert page.locator(f'[id="{anchor}"]').count() == 1, name


def test_the_search_finds_a_class(address: str, open_page: Callable[..., Page]) -> None:
    page = open_page(address)
    page.keyboard.press("/")
    page.keyboard.type("DynamicCoTTrainer")
    page.locator(".md-search-result__link").first.wait_for()
    assert "DynamicCoTTrainer" in page.locator(".md-search-result__list").inner_text()


def test_types_and_options_of_the_reference_are_readable(site: Path) -> None:
    """Options have the text of their `help`, and no backtick of a docstring's types is left over."""
    text = (site / "api/trainers/index.html").read_text(encoding="utf-8")
    assert "Paper: 0.4." in text  # the help of DynamicCoTConfig.gamma
    assert "metadata=" not in text
    for name in ("trainers", "objectives", "data"):
        assert "<code>`" not in (site / f"api/{name}/index.html").read_text(encoding="utf-8"), name
