"""Images of posts: which file an image name may refer to, and how an image is opened.

Images come from untrusted sources. Guarantees:

- Nothing is downloaded.
- A name never refers to a file outside the image folder, neither by `..` nor by an absolute path or a symbolic link.
- Only regular files are read.
- An image is decoded only after its header has shown a size within `MAX_IMAGE_PIXELS`, one of `IMAGE_FORMATS`, and, for a
  JPEG, at most `MAX_JPEG_SCANS` scans; the time of a decode is bounded by these.
- An image that passes `check_image` can be opened: the check decodes the whole image.
- All images become RGB in one way, in training, prediction and requests to a teacher: transparent pixels are composited on
  white, grey values of 16 bits and more are scaled to 8.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_PIXELS = 89_478_485
"""The greatest number of pixels of an image (Pillow's own warning level, 256 MiB of RGB)."""

MAX_POST_PIXELS = 2 * MAX_IMAGE_PIXELS
"""The greatest number of pixels of all images of a post together (512 MiB of RGB)."""

MAX_JPEG_SCANS = 100
"""The greatest number of scans of a progressive JPEG (encoders write about ten): each costs a pass over the whole image."""

MAX_NAME_LENGTH = 4096
"""The greatest number of characters of an image name (Linux' limit of a path)."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are opened. Pillow knows more, some of which start other programs (EPS starts Ghostscript)."""

_URL = re.compile(r"data:|[a-z][a-z0-9+.-]{0,30}://", re.IGNORECASE)


class ImageError(ValueError):
    """An image that cannot or must not be opened.

    Args:
        message: the reason in words.
        code: the reason: `missing_file`, `unreadable_image`, `decompression_bomb`, `path_outside`, `external_url`,
            `unprocessable_image`, `no_image_dir` or `wrong_type`.

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
    if len(name) > MAX_NAME_LENGTH:
        raise ImageError(
            f"image {name[:40]!r}... of {len(name):,} characters is not a file name: give an image's content as bytes, not as "
            "base64 or another text"
        )
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
        A loaded PIL image of mode RGB, rotated by its EXIF orientation; see `to_rgb`.

    Raises:
        ImageError: naming the post and the reason, if the image is missing, damaged, larger than
            `MAX_IMAGE_PIXELS`, not in one of `IMAGE_FORMATS`, or a URL.

    Example:
        >>> open_image(Image.new("L", (4, 2))).mode
        'RGB'
    """
    return _read(value, post_id, _decode)


def open_images(values: Sequence[Any], *, post_id: str | None = None) -> list[Image.Image]:
    """Decode all images of a post.

    Args:
        values: the images, each as in `open_image`.
        post_id: the post's id, for the error message.

    Returns:
        RGB images, upright, in the order of the values.

    Raises:
        ImageError: as in `open_image`, or if the images have more than `MAX_POST_PIXELS` pixels together. The budget is
            checked before an image is decoded.

    Example:
        >>> [image.size for image in open_images([Image.new("L", (4, 2)), Image.new("L", (2, 4))])]
        [(4, 2), (2, 4)]
    """
    images: list[Image.Image] = []
    pixels = 0

    def within_budget(image: Image.Image) -> Image.Image:
        nonlocal pixels
        pixels += image.width * image.height
        if pixels > MAX_POST_PIXELS:
            raise _over_budget()
        return _decode(image)

    for value in values:
        images.append(_read(value, post_id, within_budget))
    return images


def check_image(value: Any, *, post_id: str | None = None) -> ImageError | None:
    """Check whether `open_image` can open an image, by decoding all of it (JPEGs at an eighth of their size).

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
        _read(value, post_id, _check)
    except ImageError as error:
        return error
    return None


def check_images(values: Sequence[Any], refuses: Callable[[tuple[int, int]], str | None] | None = None) -> list[ImageError]:
    """Check whether the images of a post can be opened, and used by a model's processor.

    Args:
        values: the images, each as in `open_image`.
        refuses: returns why a processor refuses images of a size (width, height), or None if it takes them.

    Returns:
        The errors: at most one per image, and one if the images have more than `MAX_POST_PIXELS` pixels together.

    Example:
        >>> [error.code for error in check_images([b"no image", Image.new("L", (4, 2))])]
        ['unreadable_image']
    """
    errors: list[ImageError] = []
    pixels = 0
    for value in values:
        try:
            width, height = _read(value, None, _upright_size)
            pixels += width * height
            if pixels > MAX_POST_PIXELS:
                return [*errors, _over_budget()]
            _read(value, None, _check)
            if refuses is not None and (reason := refuses((width, height))):
                raise ImageError(
                    f"an image of {width} x {height} pixels is refused by the model's processor ({reason:.200}): crop or "
                    "replace it",
                    "unprocessable_image",
                )
        except ImageError as error:
            errors.append(error)
    return errors


def _over_budget() -> ImageError:
    return ImageError(
        f"the post's images have more than {MAX_POST_PIXELS:,} pixels together: shrink them or remove some",
        "decompression_bomb",
    )


def is_plain_rgb(image: Image.Image) -> bool:
    """Return whether other programs read an image's values as `to_rgb` does: 8 bits per channel, no transparency.

    Args:
        image: the image; it need not be loaded.

    Example:
        >>> is_plain_rgb(Image.new("RGB", (1, 1))), is_plain_rgb(Image.new("RGBA", (1, 1)))
        (True, False)
    """
    return image.mode in ("RGB", "L", "1", "P") and not image.has_transparency_data


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB.

    Transparent pixels are composited on white. Grey values beyond 8 bits are scaled as viewers do: integers of 16 bits from
    [0, 65535]; floats in [0, 1] from that range; other integers and floats outside [0, 255] from their least to their
    greatest value.

    Args:
        image: the image, of any mode.

    Returns:
        An image of mode RGB.

    Example:
        >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
        >>> to_rgb(Image.new("I;16", (1, 1), 32896)).getpixel((0, 0))
        (128, 128, 128)
    """
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return the values of an image of one channel of more than 8 bits, scaled to 8 bits."""
    values = np.asarray(image).astype(np.float32)
    if not (finite := np.isfinite(values)).all():
        values = np.where(finite, values, 0.0)
    least, greatest = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif image.mode == "F" and least >= 0 and greatest <= 1:
        low, high = 0.0, 1.0
    elif least >= 0 and greatest <= 255:
        low, high = 0.0, 255.0
    elif image.mode == "I" and least >= 0 and greatest <= 65535:
        low, high = 0.0, 65535.0
    else:
        low, high = least, greatest
    scale = 255.0 / (high - low) if high > low else 0.0
    return np.rint((values - low) * scale).astype(np.uint8)


def _read(value: Any, post_id: str | None, use: Callable[[Image.Image], Any]) -> Any:
    """Open an image and return what `use` makes of it; whatever goes wrong is an `ImageError`."""
    post = "" if post_id is None else f"post {post_id!r}: "
    path = None
    try:
        if isinstance(value, Image.Image):
            _refuse_bombs(value)
            return use(value) if use is not _check else _decode(value)  # `_check` would change the caller's image
        file, path = _open_file(value)
        with file, Image.open(file, formats=IMAGE_FORMATS) as image:
            _refuse_bombs(image)
            if image.format == "JPEG":
                _refuse_scans(file, image)
            return use(image)
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


def _refuse_bombs(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError(
            f"an image of {width} x {height} pixels is refused as a decompression bomb (at most {MAX_IMAGE_PIXELS:,} "
            "pixels): shrink it",
            "decompression_bomb",
        )


def _refuse_scans(file: IO[bytes], image: Image.Image) -> None:
    """Refuse a progressive JPEG of very many scans, which decodes for minutes; the file's position is kept."""
    if not image.info.get("progressive"):
        return
    position = file.tell()
    file.seek(0)
    scans = file.read().count(b"\xff\xda")  # in a scan's own data 0xff is followed by 0x00, so each is a scan's start
    file.seek(position)
    if scans > MAX_JPEG_SCANS:
        raise ImageError(
            f"a JPEG of {scans:,} scans is refused as a decompression bomb (at most {MAX_JPEG_SCANS}): save it anew",
            "decompression_bomb",
        )


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height after the rotation of `_decode`; the image is not decoded."""
    try:
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception:  # as in `_decode`
        turned = False
    return (image.height, image.width) if turned else image.size


def _check(image: Image.Image) -> None:
    """Decode an image at the lowest cost that finds all errors of `_decode`."""
    if image.format == "JPEG" and image.mode in ("RGB", "L"):  # a JPEG of a file, whose smaller size is as good
        image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    else:
        _decode(image)


def _decode(image: Image.Image) -> Image.Image:
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data beside an intact image: it is used without rotation
        pass
    return to_rgb(image)
