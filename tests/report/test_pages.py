"""Invariants of all HTML pages: values are escaped; the policy names exactly the page's own script and style; an image is
embedded, shrunk, or replaced by the reason why it cannot be read; memory does not grow with the posts; a value that a template
lacks is an error; the templates are installed with the package. In a browser: tests/browser.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import io
import json
import re
import tracemalloc
from pathlib import Path

import jinja2
import pytest
from PIL import Image

from dynkp.report.pages import EmbeddedImage, embed_image, write_page
from dynkp.report.preview import PreviewPost
from tests.conftest import REPOSITORY
from tests.support.posts import picture

FORM = {"title": "A form", "form": "0a", "questions": {"correctness": "Is it <right>?"}, "max_side": 64}


def hashes(page: str, element: str) -> set[str]:
    contents = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return {base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents}


@pytest.mark.parametrize(
    ("package", "template", "values", "elements"),
    [
        ("dynkp.report", "preview.html", {"title": "t", "summary": "", "posts": [], "max_side": 1}, ["style"]),
        ("dynkp.judging", "human_form.html", {**FORM, "posts": []}, ["style", "script"]),
        (
            "dynkp.report",
            "clusters.html",
            {"title": "t", "caption": "", "plotly_js": "f()", "figure": {"data": ["</script>"], "layout": {}, "config": {}}},
            ["script"],
        ),
    ],
)
def test_the_policy_names_the_page_s_own_script_and_style(tmp_path, package, template, values, elements):
    write_page(tmp_path / "page.html", template, package=package, **values)
    page = (tmp_path / "page.html").read_text()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy.startswith("default-src 'none'; ")
    assert set(re.findall(r"'sha256-([^']*)'", policy)) == set().union(*(hashes(page, element) for element in elements))
    assert ("script-src" in policy) == ("script" in elements) == ("<script" in page)


def test_values_are_escaped(tmp_path):
    evil = '</main></script><b title="x">&amp; \''
    post = {
        "number": 1,
        "id": evil,
        "text": evil,
        "keyphrases": [evil, evil],
        "images": [],
        "candidates": {"A": [evil], "B": []},
    }
    write_page(tmp_path / "page.html", "human_form.html", package="dynkp.judging", **{**FORM, "title": evil}, posts=[post])
    page = (tmp_path / "page.html").read_text()
    assert evil not in page and page.count("</main>") == page.count("</script>") == 1 and page.count("<b ") == 0
    assert page.count("&lt;/main&gt;&lt;/script&gt;&lt;b title=&#34;x&#34;&gt;&amp;amp; &#39;") == 6
    (post_id,) = re.findall(r"data-post='([^']*)'", page)  # as JSON, which keeps control characters
    assert json.loads(post_id) == evil and not set("<>&") & set(post_id)
    assert "Is it &lt;right&gt;?" in page and '<span class="note">nothing</span>' in page


def test_images_are_embedded_and_shrunk(tmp_path):
    picture(1, (1000, 500)).save(tmp_path / "large.png")
    picture(2, (10, 20)).save(tmp_path / "small.png")
    for name, size in (("large.png", (320, 160)), ("small.png", (10, 20))):
        embedded = embed_image(str(tmp_path / name), 320)
        head, data = str(embedded.data_uri).split(",")
        assert head == "data:image/jpeg;base64" and embedded.error == ""
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == size
    (tmp_path / "broken.png").write_bytes(b"x")
    assert embed_image(str(tmp_path / "broken.png"), 320) == EmbeddedImage(
        None, embed_image(str(tmp_path / "broken.png"), 9).error
    )
    assert "broken.png" in embed_image(str(tmp_path / "broken.png"), 320).error


def test_memory_does_not_grow_with_the_posts(tmp_path):
    def peak(count: int) -> int:
        posts = (PreviewPost(str(number), "a word " * 20_000, [], [], None) for number in range(count))
        tracemalloc.start()
        write_page(tmp_path / "page.html", "preview.html", title="t", summary="", posts=posts, max_side=1)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (tmp_path / "page.html").stat().st_size > count * 140_000
        return size

    peak(1)
    assert peak(50) < 1.2 * peak(5)


def test_a_missing_value_is_an_error(tmp_path):
    with pytest.raises(jinja2.UndefinedError, match="summary"):
        write_page(tmp_path / "page.html", "preview.html", title="t", posts=[], max_side=1)


def test_the_templates_are_installed_with_the_package():
    patterns = (REPOSITORY / "setup.cfg").read_text().split("[options.package_data]")[1].split("[")[0].split()
    templates = [path for path in Path(REPOSITORY, "dynkp").rglob("templates/*") if path.is_file()]
    assert len(templates) >= 7
    for path in templates:
        assert any(fnmatch.fnmatch(path.relative_to(REPOSITORY / "dynkp").as_posix(), pattern) for pattern in patterns), path
