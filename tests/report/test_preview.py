"""Invariants of the preview page: it is self-contained (images embedded and shrunk, no script, nothing to fetch); text is shown
as text, whatever it contains; a broken image or a missing rationale has its note."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from dynkp.report.preview import PreviewPost, write_preview
from tests.support.posts import picture

HOSTILE = '<script>alert("x")</script> & <img src=http://host/x onerror=alert(1)> \ud83d'


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_shows_text_as_text(tmp_path: Path) -> None:
    picture(1, (1000, 500)).save(tmp_path / "1.png")
    (tmp_path / "broken.png").write_bytes(b"<b>broken</b>")
    posts = [
        PreviewPost("1", "my dog", ["beagles"], [str(tmp_path / "1.png")], "A dog.", "m, stage explain"),
        PreviewPost(HOSTILE, HOSTILE, [HOSTILE], [str(tmp_path / "broken.png")], HOSTILE, HOSTILE, True),
        PreviewPost("3", "", [], [], None),
    ]
    write_preview(tmp_path / "page.html", "<i>Title</i>", "3 posts", posts)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("article") == 3 and names.count("img") == 1
    assert not {"script", "link", "iframe", "i", "b"} & set(names)
    addresses = [found[name] for _, found in page.tags for name in ("src", "href", "srcset") if name in found]
    assert len(addresses) == 1 and str(addresses[0]).startswith("data:image/jpeg;base64,")
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert "url(" not in text and "@import" not in text
    assert page.text.count('<script>alert("x")</script> & <img src=http://host/x') == 5
    (attributes,) = (found for tag, found in page.tags if tag == "img")
    assert attributes["alt"] == "image of post 1"
    data = base64.b64decode(str(attributes["src"]).partition("base64,")[2])
    assert Image.open(io.BytesIO(data)).size == (320, 160)
    assert "<i>Title</i>" in page.text and "m, stage explain" in page.text
    assert "not an image in a supported format" in page.text
    assert "no image" in page.text and "no rationale" in page.text
    assert names.count("div") == 9 and text.count('<div class="rejected">') == 1
