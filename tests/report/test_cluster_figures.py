"""Invariants of the dataset figure: PNG and page are complete; text of posts is never markup, neither in HTML nor in
matplotlib's mathematics; each keyphrase has its own mark. The page in a browser: tests/browser/test_clusters_page.py.
"""

from __future__ import annotations

import re

from PIL import Image

from dynkp.report.cluster_figures import COLOURS, write_html, write_png
from dynkp.report.clusters import MOST_KEYPHRASES, cluster_posts
from tests.support.clusters import Vectors


def test_figures_of_hostile_posts(tmp_path):
    evil = "</script><script>alert(1)</script> <b>$x$ %{x} & \\alpha"
    rows = [
        {"id": f"<{n}>", "text": evil, "keyphrases": [phrase]} for n in range(3) for phrase in (evil, "_hidden $", "größe 日")
    ]
    clusters = cluster_posts(rows, Vectors({evil: [1, 0]}), projection="pca")
    write_png(clusters, tmp_path / "c.png", title="$ 5 & $", dpi=50)
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (320, 240) and len(set(image.convert("RGB").getdata())) > 10
    write_html(clusters, tmp_path / "c.html", title="<a> & b")
    page = (tmp_path / "c.html").read_text()
    assert "<title>&lt;a&gt; &amp; b</title>" in page and evil not in page and "<script>alert" not in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)  # nothing is fetched


def test_every_keyphrase_looks_different(tmp_path):
    rows = [{"id": f"{n}", "text": "a", "keyphrases": [f"k{n // 2:02}"]} for n in range(2 * MOST_KEYPHRASES)]
    clusters = cluster_posts(rows, Vectors({"a": [1, 0]}), top=MOST_KEYPHRASES, projection="pca")
    write_html(clusters, tmp_path / "c.html")
    write_png(clusters, tmp_path / "c.png", dpi=40)
    plotted = (tmp_path / "c.html").read_text().split("Plotly.newPlot(")[-1]
    data = re.findall(r'"color":"(#\w+)"[^}]*"symbol":"([\w-]+)"', plotted)
    assert len(set(data)) == MOST_KEYPHRASES and {colour for colour, _ in data} == set(COLOURS)
