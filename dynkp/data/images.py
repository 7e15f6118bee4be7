"""Images of posts: which file an image name may refer to, and how an image is opened.

Images come from untrusted sources. Guarantees:

- Nothing is downloaded.
- A name never refers to a file outside the image folder, neither by `..` nor by an absolute path or a symbolic link.
- Only regular files are read.
- An image is decoded only after its header has shown a size within `MAX_IMAGE_PIXELS` and one of `IMAGE_FORMATS`.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_PIXELS = 89_478_485
"""The greatest number of pixels of an image (Pillow's own warning level, 256 MiB of RGB)."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are opened. Pillow knows more, some of which start other programs (EPS starts Ghostscript)."""

_URL = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class ImageError(ValueError):
    """An image that cannot or must not be opened.

    Args:
        message: the reason in words.
        code: the reason: `missing_file`, `unreadable_image`, `decompression_bomb`, `path_outside`, `external_url` or
            `wrong_type`.

    Attributes:
        code: the reason.
    """

    def __init__(self, message: str, code: str = "unreadable_image") -> None:
        super().__init__(message)
        self.code = code


def locate_image(name: str, root: str | None) -> str | None:
    """Return the path of the file that an image name refers to.

    Args:
        name: the name in the post: relative to the image folder, or an absolute path.
        root: the image folder, with its symbolic links resolved (`os.path.realpath`), or None if there is none.

    Returns:
        An absolute path, of a file that need not exist; None if the name is relative and there is no image folder.

    Raises:
        ImageError: if the name is a URL, or the path is outside the folder.

    Example:
        >>> locate_image("cat.jpg", "/data/images")
        '/data/images/cat.jpg'
        >>> locate_image("cat.jpg", None) is None
        True
    """
    if _URL.match(name):
        raise ImageError(
            f"image {name!r:.120} is a URL, and images are never fetched: download it and name the file",
            "external_url",
        )
    if root is None:
        return name if os.path.isabs(name) else None
    try:
        path = os.path.realpath(os.path.join(root, name))
    except ValueError as error:  # a NUL byte
        raise ImageError(f"image {name!r:.120} is not a file name ({error})", "path_outside") from error
    if os.path.commonpath([root, path]) != root:
        raise ImageError(
            f"image {name!r:.120} is outside the image folder {root}: put the file into the folder", "path_outside"
        )
    return path


def open_image(value: Any, *, post_id: str | None = None) -> Image.Image:
    """Decode an image of a post.

    Args:
        value: a PIL image, encoded bytes, a path, or `{"bytes", "path"}` as `datasets.Image(decode=False)` returns it.
        post_id: the post's id, for the error message.

    Returns:
        A loaded PIL image of mode RGB, rotated by its EXIF orientation.

    Raises:
        ImageError: naming the post and the reason, if the image is missing, damaged, larger than
            `MAX_IMAGE_PIXELS`, not in one of `IMAGE_FORMATS`, or a URL.

    Example:
        >>> open_image(Image.new("L", (4, 2))).mode
        'RGB'
    """
    return _read(value, post_id, decode=True)


def check_image(value: Any, *, post_id: str | None = None) -> ImageError | None:
    """Check whether `open_image` could open an image, at the lowest cost.

    A PNG is checked by its checksums; other formats are decoded, JPEGs at an eighth of their size.

    Args:
        value: as in `open_image`.
        post_id: the post's id, for the error message.

    Returns:
        The error that `open_image` would raise, or None.

    Example:
        >>> check_image(b"no image").code
        'unreadable_image'
    """
    try:
        _read(value, post_id, decode=False)
    except ImageError as error:
        return error
    return None


def _read(value: Any, post_id: str | None, decode: bool) -> Image.Image:
    post = "" if post_id is None else f"post {post_id!r}: "
    path = None
    try:
        if isinstance(value, Image.Image):
            return _decode(value, decode=True)  # the cheap checks would change the caller's image
        file, path = _open_file(value)
        with file, Image.open(file, formats=IMAGE_FORMATS) as image:
            return _decode(image, decode)
    except ImageError as error:
        raise ImageError(f"{post}{error}", error.code) from error
    except FileNotFoundError as error:
        raise ImageError(f"{post}there is no file {error.filename!r:.200}", "missing_file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a warning under -W error
        raise ImageError(f"{post}{_named(path)} is a decompression bomb: {error}", "decompression_bomb") from error
    except UnidentifiedImageError as error:
        known = ", ".join(IMAGE_FORMATS)
        raise ImageError(f"{post}{_named(path)} is not an image in a supported format ({known})") from error
    # Pillow's decoders raise nearly anything on damaged input (OSError, SyntaxError, ValueError, struct.error, ...).
    except Exception as error:
        raise ImageError(
            f"{post}{_named(path)} cannot be read ({type(error).__name__}: {str(error)[:200]}): replace or remove it"
        ) from error


def _named(path: str | None) -> str:
    return f"image {path!r}" if path else "an embedded image"


def _open_file(value: Any) -> tuple[IO[bytes], str | None]:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (None, value)
    if isinstance(value, bytes | bytearray):
        data, path = value, None
    if data is not None:
        return io.BytesIO(data), path
    if not isinstance(path, str | Path):
        raise ImageError(
            f"an image must be a PIL image, bytes, a path or a dict of 'bytes' and 'path', got {type(value).__name__}"
        )
    path = str(path)
    locate_image(path, None)  # refuses URLs
    # A named pipe would block the open itself, and /dev/zero never ends.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ImageError(f"image {path!r} is not a regular file")
    return open(path, "rb"), path


def _decode(image: Image.Image, decode: bool) -> Image.Image:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError(
            f"an image of {width} x {height} pixels is refused as a decompression bomb (at most {MAX_IMAGE_PIXELS:,} "
            "pixels): shrink it",
            "decompression_bomb",
        )
    if not decode:
        if image.format == "PNG":
            image.verify()
        else:
            image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
            image.load()
        return image
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data beside an intact image: it is used without rotation
        pass
    return image.convert("RGB")
