"""Invariants of opening images:

- `open_image` returns upright RGB images from every type of value that a post may have, real photographs included;
- `check_image` and `open_image` agree on which images are valid, for every format and wherever a file is cut off;
- decompression bombs, URLs, pipes, devices, folders and formats that start other programs are refused, with code and post id;
- no name refers to a file outside the image folder;
- what passes the check opens: broken data behind right checksums is found;
- transparency is composited on white and grey of more than 8 bits is scaled, for files and for images in memory;
- the pixels of a post and the scans of a JPEG are bounded; a name of a megabyte takes no time.
"""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dynkp.data.images import (
    IMAGE_FORMATS,
    MAX_IMAGE_PIXELS,
    ImageError,
    check_image,
    check_images,
    locate_image,
    open_image,
    open_images,
)
from dynkp.data.rows import normalise_posts
from tests.support.images import png_claiming


def encoded(format: str = "JPEG", size: tuple[int, int] = (64, 48), mode: str = "RGB", **options) -> bytes:
    data = io.BytesIO()
    noise = Image.effect_noise(size, 60).convert(mode)
    noise.save(data, format, **options)
    return data.getvalue()


def refused(value, code: str) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(value, post_id="p1")
    assert caught.value.code == code
    assert "post 'p1'" in str(caught.value)
    found = check_image(value)
    assert found is not None and found.code == code
    return str(caught.value)


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_every_format_opens_as_rgb_and_passes_the_check(format):
    data = encoded(format)
    image = open_image(data)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert check_image(data) is None


def test_every_format_gives_the_same_image(tmp_path):
    data = encoded("PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    forms = [
        data,
        bytearray(data),
        path,
        str(path),
        {"bytes": data, "path": None},
        {"bytes": data, "path": "gone.png"},
    ]
    forms += [{"bytes": None, "path": str(path)}, Image.open(path)]
    pixels = {open_image(form).tobytes() for form in forms}
    assert len(pixels) == 1
    assert all(check_image(form) is None for form in forms)


def test_the_check_leaves_an_open_image_as_it_was(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(size=(80, 80)))
    image = Image.open(tmp_path / "a.jpg")
    assert check_image(image) is None
    assert open_image(image).size == (80, 80)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    assert open_image(encoded("PNG", mode=mode)).mode == "RGB"


def test_images_are_turned_as_their_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    assert open_image(encoded(size=(64, 48), exif=exif)).size == (48, 64)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_does_not_cost_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(exif=exif))
    at = data.index(b"Exif\0\0") + 6
    data[at + 4 : at + 8] = b"\xff\xff\xff\x7f"  # the directory lies beyond the end
    assert open_image(bytes(data)).mode == "RGB"


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_check_and_open_agree_wherever_a_file_is_cut_off(format):
    data = encoded(format, size=(96, 96))
    for share in (0.02, 0.2, 0.5, 0.8, 0.95):
        cut = data[: int(len(data) * share)]
        try:
            open_image(cut)
            opens = True
        except ImageError as error:
            assert error.code == "unreadable_image"
            opens = False
        assert (check_image(cut) is None) == opens, share
        assert not opens or share > 0.9, "half a picture was taken for a whole one"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.binary(max_size=200), st.sampled_from(IMAGE_FORMATS))
def test_arbitrary_bytes_are_an_image_error_and_nothing_else(noise, format):
    for data in (noise, encoded(format, size=(8, 8))[:40] + noise):
        try:
            open_image(data)
        except ImageError:
            pass
        check_image(data)


@pytest.mark.parametrize("size", [(100_000, 100_000), (12_000, 12_000), (MAX_IMAGE_PIXELS + 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_header(size):
    message = refused(png_claiming(*size), "decompression_bomb")
    assert "bomb" in message


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_where_warnings_are_errors():
    refused(png_claiming(12_000, 12_000), "decompression_bomb")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.jpg",
        "HTTP://x/a.jpg",
        "file:///etc/hostname",
        "hf://datasets/a/b.jpg",
        "data:image/png;,x",
    ],
)
def test_urls_are_never_opened(url):
    assert "never fetched" in refused(url, "external_url")
    with pytest.raises(ImageError):
        locate_image(url, "/pictures")


def test_missing_files_folders_pipes_and_devices(tmp_path):
    refused(str(tmp_path / "none.jpg"), "missing_file")
    stored = {"bytes": None, "path": str(tmp_path / "none.jpg")}
    assert str(check_image(stored)) == f"there is no file {str(tmp_path / 'none.jpg')!r}"
    refused(str(tmp_path), "unreadable_image")
    os.mkfifo(tmp_path / "pipe.jpg")  # to open it for reading would wait for a writer for ever
    assert "not a regular file" in refused(str(tmp_path / "pipe.jpg"), "unreadable_image")
    refused("/dev/zero", "unreadable_image")
    refused("a\0b.jpg", "unreadable_image")
    refused("n" * 5000, "unreadable_image")
    refused(17, "unreadable_image")
    refused({"bytes": None, "path": None}, "unreadable_image")
    refused(b"", "unreadable_image")


def test_formats_that_start_other_programs_are_refused(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    refused(path, "unreadable_image")


def test_names_stay_in_the_image_folder(tmp_path):
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded())
    (root / "link.jpg").symlink_to(secret)
    (root / "out").symlink_to(tmp_path)
    (root / "inner.jpg").symlink_to(root / "sub" / "real.jpg")
    for name in (
        "../secret.jpg",
        "sub/../../secret.jpg",
        str(secret),
        "link.jpg",
        "out/secret.jpg",
        "/etc/hostname",
        "a\0b",
    ):
        with pytest.raises(ImageError) as caught:
            locate_image(name, str(root))
        assert caught.value.code == "path_outside", name
    for name in ("a.jpg", "sub/../a.jpg", "./a.jpg", str(root / "a.jpg")):
        assert locate_image(name, str(root)) == str(root / "a.jpg"), name
    assert locate_image("inner.jpg", str(root)) == str(root / "sub" / "real.jpg")
    # A folder whose name merely begins like the image folder is another folder.
    with pytest.raises(ImageError):
        locate_image("../pictures2/a.jpg", str(root))


@given(st.text(max_size=30))
def test_no_name_at_all_leads_out(name):
    try:
        path = locate_image(name, "/srv/pictures")
    except ImageError as error:
        assert error.code in ("path_outside", "external_url")
    else:
        assert path is not None and Path("/srv/pictures") in [Path(path), *Path(path).parents]


def test_real_photographs(shared):
    paths = sorted((shared / "data/masc_t15/images").iterdir())
    assert len(paths) == 300
    assert [check_image(path) for path in paths] == [None] * 300
    assert {open_image(path).mode for path in paths[:20]} == {"RGB"}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, color_type: int = 2, depth: int = 8) -> bytes:
    """A PNG of 16 x 16 pixels with right checksums, whatever its chunks hold."""
    header = struct.pack(">IIBBBBB", 16, 16, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


ROWS = b"\0" + bytes(48)  # filter type, 16 RGB pixels


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"IDAT", b"no zlib data at all")),
        png(chunk(b"IDAT", zlib.compress(b"".join(b"\0" + os.urandom(48) for _ in range(16)))[:200])),
        png(chunk(b"IDAT", zlib.compress((b"\x09" + bytes(48)) * 16))),
        png(),
        png(chunk(b"IDAT", zlib.compress(ROWS * 16)), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20)))),
    ],
    ids=["no zlib", "cut data", "unknown filter", "no data", "text bomb"],
)
def test_broken_data_behind_right_checksums_is_found(data):
    refused(data, "unreadable_image")


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(format, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    if (format, mode) in (("TIFF", "P"), ("GIF", "P"), ("GIF", "LA")):
        mode = "RGBA"  # Pillow writes no other transparency to them
    data = io.BytesIO()
    image.convert(mode).save(data, format, **({"lossless": True} if format == "WEBP" else {}))
    in_memory = normalise_posts([{"image": Image.open(io.BytesIO(data.getvalue()))}])[0]["images"][0]
    for value in (data.getvalue(), Image.open(io.BytesIO(data.getvalue())), in_memory):
        opened = open_image(value)
        assert opened.getpixel((7, 7)) == (255, 255, 255), opened.getpixel((7, 7))
        assert opened.getpixel((0, 0)) != (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "format"),
    [
        (np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8), "PNG"),
        (np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8), "TIFF"),
        (np.linspace(0, 1, 64).astype(np.float32).reshape(8, 8), "TIFF"),
        (np.linspace(0, 255, 64).astype(np.float32).reshape(8, 8), "TIFF"),
        (np.linspace(-3e6, 3e6, 64).astype(np.int32).reshape(8, 8), "TIFF"),
    ],
)
def test_grey_values_beyond_8_bits_are_scaled(values, format):
    data = io.BytesIO()
    Image.fromarray(values).save(data, format)
    in_memory = normalise_posts([{"image": Image.fromarray(values)}])[0]["images"][0]
    for value in (data.getvalue(), in_memory):
        opened = np.asarray(open_image(value))[:, :, 0].astype(int).ravel()
        np.testing.assert_allclose(opened, np.linspace(0, 255, 64), atol=1.01)


@pytest.mark.parametrize("value", [0.0, 1.0, 300.0, float("nan"), float("inf")])
def test_grey_of_one_value_opens(value):
    data = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.float32)).save(data, "TIFF")
    assert open_image(data.getvalue()).mode == "RGB"


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded():
    data = encoded(size=(2000, 2000), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert check_image(data[:-2] + last * 20 + b"\xff\xd9") is None
    bomb = data[:-2] + last * 500 + b"\xff\xd9"
    start = time.process_time()
    refused(bomb, "decompression_bomb")
    assert time.process_time() - start < 1


def test_the_pixels_of_a_post_are_bounded_before_anything_is_decoded():
    large = png_claiming(9_000, 9_000)  # its header alone; decoding it would be another error
    with pytest.raises(ImageError) as caught:
        open_images([Image.new("1", (9_000, 9_000)), Image.new("1", (9_000, 9_000)), large], post_id="p1")
    assert caught.value.code == "decompression_bomb" and "post 'p1'" in str(caught.value)
    small = [Image.new("1", (9_000, 9_000))] * 2
    assert check_images(small) == []
    assert [error.code for error in check_images([*small, large])] == ["decompression_bomb"]


def test_a_name_of_a_megabyte_takes_no_time():
    start = time.process_time()
    for name in ("a" * 1_000_000, "a/" * 500_000, "../" * 300_000, "iVBORw0KGgo" * 100_000, "a+" * 500_000 + "://"):
        for root in (None, "/srv/pictures"):
            with pytest.raises(ImageError, match="not a file name"):
                locate_image(name, root)
        assert check_image(name) is not None
    assert time.process_time() - start < 1
