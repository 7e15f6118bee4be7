"""Invariants of the preview page, and with it of the base page, in a browser: text and images are shown; it follows light and
dark; markup that would get past the escaping still could not run a script, apply a style or send a request."""

from __future__ import annotations

import pytest

from dynkp.report.preview import PreviewPost, write_preview
from tests.support.posts import picture

EVIL = "<script>document.title = 'evil'</script><b>bold</b>"


@pytest.fixture
def file(tmp_path):
    picture(1, (1600, 900)).save(tmp_path / "one.png")
    posts = [
        PreviewPost("p0", EVIL, ["dogs", EVIL], [str(tmp_path / "one.png")], "A dog.", "m, stage explain"),
        PreviewPost("p1", "second", ["cats"], [], None, "refusal: no answer", True),
    ]
    write_preview(tmp_path / "page.html", "Rationales & <more>", "2 posts", posts)
    return tmp_path / "page.html"


def test_what_the_page_shows(open_page, file):
    page = open_page(file)
    assert page.title() == page.inner_text("h1") == "Rationales & <more>"
    first, second = page.locator("article").all()
    assert EVIL in first.inner_text() and first.locator("b, script").count() == 0
    assert first.locator("li").all_inner_texts() == ["dogs", EVIL]
    assert first.locator("img").evaluate("image => [image.complete, image.naturalWidth]") == [True, 320]
    assert "no image" in second.inner_text() and second.locator(".rejected").inner_text().startswith("no rationale")
    # Side by side only if the page's style sheet is applied.
    assert first.evaluate("one => getComputedStyle(one).display") == "grid"


def test_light_and_dark(open_page, file):
    colours = [
        open_page(file, color_scheme=scheme).evaluate("getComputedStyle(document.body).color") for scheme in ("light", "dark")
    ]
    assert colours == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]


@pytest.mark.parametrize(
    "markup",
    [
        "<script>document.title = 'evil'</script>",
        "<img src='data:,' onerror='document.title = `evil`'>",
        "<style>h1 { display: none }</style>",
        "<img src='https://outside.invalid/pixel.png'>",
        "<iframe src='https://outside.invalid/'></iframe>",
    ],
)
def test_the_policy_stops_what_escaping_would_let_through(open_page, problems, file, markup):
    file.write_text(file.read_text().replace("<main>", f"<main>{markup}"))
    page = open_page(file)
    page.wait_for_load_state("networkidle")
    assert page.title() == "Rationales & <more>" and page.locator("h1").is_visible()
    assert problems and all("Content Security Policy" in problem for problem in problems)
    problems.clear()
