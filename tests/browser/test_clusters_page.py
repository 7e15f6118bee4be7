"""Invariants of the clusters page in a browser: every post is a point, pointing at one shows its post as it was written,
a click on a keyphrase removes its posts, and the figure can be saved as an image; all without a request to anywhere and
within the page's Content-Security-Policy (tests/support/browser_pages.py fails on a violation of either).
"""

from __future__ import annotations

import numpy as np
import pytest

from dynkp.report.cluster_figures import write_html
from dynkp.report.clusters import PostClusters


@pytest.fixture
def page(open_page, tmp_path):
    evil = "<b>bold</b> </script><script>alert(1)</script> & 5 > 4 %{x}"
    clusters = PostClusters(
        keyphrases=["dogs", "<i>rain</i>"],
        frequencies=[1200, 3],
        ids=[f"post-{n}" for n in range(6)],
        texts=["a dog", evil, "", "rain", "rain", "a storm " * 60],
        tags=[["dogs"]] * 3 + [["<i>rain</i>", "storm"]] * 3,
        groups=[0, 0, 0, 1, 1, 1],
        points=np.array([[n, n * n % 5] for n in range(6)], float),
        several=0,
        without_embedding=0,
        modalities=["text"],
        projection="pca",
        silhouette=0.5,
        neighbour_share=1,
        neighbour_chance=0.4,
    )
    write_html(clusters, tmp_path / "clusters.html", title="Dogs & rain")
    page = open_page(tmp_path / "clusters.html")
    page.wait_for_selector(".scatterlayer .point")
    return page


def points(page) -> int:
    return page.locator(".scatterlayer .point").count()


def hover(page, trace: int, number: int) -> str:
    point = page.locator(".scatterlayer .trace").nth(trace).locator(".point").nth(number).bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.wait_for_function(
        "id => document.querySelector('.hoverlayer')?.textContent.includes(id)", arg=f"post-{3 * trace + number}"
    )
    return page.locator(".hoverlayer").text_content()


def test_what_the_page_shows(page):
    assert page.title() == "Dogs & rain" and page.inner_text("h1") == "Dogs & rain"
    assert points(page) == 6
    assert page.locator(".legendtext").all_text_contents() == ["dogs (1,200)", "<i>rain</i> (3)"]
    assert page.inner_text("#caption").startswith("6 posts of the 2 most frequent keyphrases; embeddings of text, two")


def test_a_point_shows_its_post(page):
    assert "dogs" in hover(page, 0, 0)
    assert "<b>bold</b> </script><script>alert(1)</script> & 5 > 4 %{x}" in hover(page, 0, 1).replace("\xa0", " ")
    text = hover(page, 1, 2)
    assert "<i>rain</i>; storm" in text and "…" in text and len(text) < 400


def test_a_click_removes_a_keyphrase(page):
    page.locator(".legendtoggle").first.click()
    page.wait_for_function("() => document.querySelectorAll('.scatterlayer .point').length === 3")
    page.locator(".legendtoggle").first.click()
    page.wait_for_function("() => document.querySelectorAll('.scatterlayer .point').length === 6")


def test_the_figure_is_saved_as_an_image(page):
    page.locator("#clusters").hover()
    with page.expect_download() as download:
        page.locator('.modebar-btn[data-attr="toImage"], .modebar-btn[data-title^="Download plot"]').first.click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
