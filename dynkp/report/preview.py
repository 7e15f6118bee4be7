"""A page of posts, images and rationales, to be looked at before a run over millions of posts is paid for.

Given   posts, each with its rationale or the reason why it has none.
Gives   one HTML file.
Holds   what `dynkp.report.pages` holds of every page; the page has no script.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from dynkp.files.atomic import atomic_files
from dynkp.report.pages import write_page

_THUMBNAIL_SIDE = 320


class PreviewPost(NamedTuple):
    """A post on the page.

    Attributes:
        id: The post's id.
        text: The post's text.
        keyphrases: Its keyphrases, shown as labels.
        images: Paths or bytes, as `dynkp.data.images.open_image` takes them.
        rationale: The teacher's rationale; None if there is none.
        note: A line below it: the stage, or why the rationale was rejected.
        rejected: Whether the rationale was rejected, or the request failed.
    """

    id: str
    text: str
    keyphrases: list[str]
    images: list[Any]
    rationale: str | None
    note: str = ""
    rejected: bool = False


def write_preview(path: str | os.PathLike[str], title: str, summary: str, posts: Iterable[PreviewPost]) -> None:
    """Write the page.

    Args:
        path: The HTML file; replaced when the new one is complete.
        title: The page's title and heading.
        summary: A sentence below the heading.
        posts: The posts, in their order on the page.

    Example:
        >>> import tempfile, pathlib
        >>> page = pathlib.Path(tempfile.mkdtemp(), "page.html")
        >>> write_preview(page, "Rationales", "One post.", [PreviewPost("1", "my dog", ["dogs"], [], "A dog & <more>.")])
        >>> "<p>A dog &amp; &lt;more&gt;.</p>" in page.read_text()
        True
    """
    with atomic_files(path) as (partial,):
        write_page(partial, "preview.html", title=title, summary=summary, posts=posts, max_side=_THUMBNAIL_SIDE)
