"""HTML pages, rendered from Jinja2 templates that extend one base page, `templates/base.html`.

Given   the name of a template, the package whose folder `templates` holds it, and the template's values.
Gives   one HTML file.
Holds   values are escaped: text of posts, models and annotators is shown as text, whatever it contains. A page is
        self-contained: images are embedded, and its Content-Security-Policy forbids all requests and every script and
        style sheet but the page's own, which it names by their hashes. Posts are rendered one at a time, so memory does
        not grow with their number.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from functools import cache
from typing import Any, NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dynkp.data.images import ImageError, open_image

_BASE_PACKAGE = "dynkp.report"  # the package whose templates every page may extend


class EmbeddedImage(NamedTuple):
    """An image as a page holds it.

    Attributes:
        data_uri: The image as JPEG in a `data:` address; None if it could not be read.
        error: Why it could not be read; empty if it could.
    """

    data_uri: str | None
    error: str = ""


def write_page(path: str | os.PathLike[str], template: str, *, package: str = _BASE_PACKAGE, **values: Any) -> None:
    """Render a template into a file.

    Args:
        path: The HTML file; overwritten if it exists. Half of a surrogate pair, which UTF-8 cannot encode, becomes "?".
        template: The template's file name.
        package: The package whose folder `templates` holds the template.
        **values: The template's values. Iterables may be generators: they are consumed while the page is written.

    Raises:
        jinja2.TemplateNotFound: If the package has no such template.
        jinja2.UndefinedError: If the template uses a value that is not given.
    """
    _environment(package).get_template(template).stream(**values).dump(os.fspath(path), "utf-8", "replace")


@cache
def _environment(package: str) -> Environment:
    packages = dict.fromkeys((package, _BASE_PACKAGE))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"csp_hash": csp_hash, "embed_image": embed_image}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def csp_hash(content: str) -> Markup:
    """Compute the source expression by which a Content-Security-Policy admits one inline script or style sheet.

    Args:
        content: The element's content, from the end of its start tag to the beginning of its end tag.

    Returns:
        The expression with its quotes.

    Example:
        >>> csp_hash("alert(1)")
        Markup("'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='")
    """
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")


def embed_image(image: Any, max_side: int) -> EmbeddedImage:
    """Read an image, shrink it, and encode it as a `data:` address.

    Args:
        image: A path, bytes or an image, as `dynkp.data.images.open_image` takes it.
        max_side: Longest side in pixels; a larger image is shrunk, a smaller one is kept.

    Returns:
        The image, or the reason why it cannot be read.

    Example:
        >>> embed_image("missing.png", 320).data_uri is None
        True
    """
    try:
        opened = open_image(image)
    except ImageError as error:
        return EmbeddedImage(None, str(error))
    opened.thumbnail((max_side, max_side))
    data = io.BytesIO()
    opened.save(data, "JPEG", quality=80)
    return EmbeddedImage(f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}")
