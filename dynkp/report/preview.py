"""A page of posts, pictures and rationales, to look at before a million are paid for.

Given   posts with what became of them.
Gives   one HTML file.
Holds   the file stands alone: pictures are in it, shrunk; nothing is fetched, no script runs; whatever a post or the teacher
        says is shown as text.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from dynkp.data.images import ImageError, open_image
from dynkp.files.atomic import write_text

_THUMBNAIL = 320

_STYLE = """\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
article { display: grid; grid-template-columns: minmax(0, 20rem) minmax(0, 1fr); gap: 1.5rem; padding: 1.5rem 0;
  border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
img { max-width: 100%; border-radius: 4px; display: block; margin-bottom: .5rem; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
li { display: inline-block; border: 1px solid; border-radius: 1rem; padding: 0 .7rem; margin: 0 .3rem .3rem 0; }
ul { padding: 0; margin: .5rem 0; }
.note { font-size: .875rem; opacity: .8; }
.rejected { border-left: 4px solid #c62828; padding-left: .75rem; }
@media (max-width: 40rem) { article { grid-template-columns: 1fr; } }
"""


class PreviewPost(NamedTuple):
    """A post on the page.

    Attributes:
        id, text, keyphrases: the post's.
        images: paths or bytes, as in `dynkp.data.images.open_image`.
        rationale: what the teacher wrote, None where it did not.
        note: what else there is to say: the stage, or why the rationale was rejected.
        rejected: whether the rationale was rejected, or failed.
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
        path: the HTML file; replaced if it exists.
        title: of the page.
        summary: a sentence below it.
        posts: in their order on the page.

    Example:
        >>> write_preview("page.html", "Rationales", "One post.", [PreviewPost("1", "my dog", ["dogs"], [], "A dog.")])
    """
    articles = "\n".join(map(_article, posts))
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(summary)}</p>\n{articles}\n</main>\n</body>\n</html>\n"
    )
    write_text(path, page, errors="replace")


def _article(post: PreviewPost) -> str:
    pictures = "\n".join(picture_element(image, post.id) for image in post.images) or '<p class="note">no picture</p>'
    tags = "".join(f"<li>{html.escape(phrase)}</li>" for phrase in post.keyphrases)
    rationale = '<p class="note">no rationale</p>' if post.rationale is None else f"<p>{html.escape(post.rationale)}</p>"
    note = f'<p class="note">{html.escape(post.note)}</p>' if post.note else ""
    kind = ' class="rejected"' if post.rejected else ""
    return (
        f"<article>\n<div>{pictures}</div>\n<div>\n<h2>{html.escape(post.id)}</h2>\n<p>{html.escape(post.text)}</p>\n"
        f"<ul>{tags}</ul>\n<div{kind}>{rationale}{note}</div>\n</div>\n</article>"
    )


def picture_element(image: Any, post_id: str, max_side: int = _THUMBNAIL) -> str:
    """A picture as an HTML element that holds it; a note where it cannot be read.

    Args:
        image: as in `dynkp.data.images.open_image`.
        post_id: for readers who do not see it.
        max_side: longest side in pixels; a larger one is shrunk.
    """
    try:
        picture = open_image(image)
    except ImageError as error:
        return f'<p class="note">{html.escape(str(error))}</p>'
    picture.thumbnail((max_side, max_side))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    alt = html.escape(f"picture of post {post_id}", quote=True)
    return f'<img alt="{alt}" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
