"""Invariants of the browser tests themselves: a page is shown; a script error or an outside request fails the test."""

from __future__ import annotations

import pytest


def test_a_page_is_shown(open_page, tmp_path):
    (tmp_path / "page.html").write_text("<h1>a</h1><script>document.querySelector('h1').textContent = 'b'</script>")
    page = open_page(tmp_path / "page.html", viewport={"width": 400, "height": 300})
    assert page.inner_text("h1") == "b" and page.evaluate("innerWidth") == 400


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ("<script>null.x</script>", "script error: "),
        ("<script>console.error('no good')</script>", "console: no good"),
        ("<img src='https://outside.invalid/pixel.png'>", "request to https://outside.invalid/pixel.png"),
        ("<script>fetch('http://outside.invalid/').catch(() => 0)</script>", "request to http://outside.invalid/"),
    ],
)
def test_a_bad_page_is_found_out(open_page, problems, tmp_path, html, problem):
    (tmp_path / "page.html").write_text(html)
    open_page(tmp_path / "page.html").wait_for_load_state("networkidle")
    assert any(line.startswith(problem) for line in problems)
    problems.clear()
