"""Sources of posts: files of several formats, saved and published datasets, and rows in memory.

`load_posts` reads a path, a Hub id or data in memory into the row format of `dynkp.data.rows`.

Guarantees:

- A row that cannot be parsed is an error with file and line. A row that can be parsed becomes a post, and `validate_posts`
  reports what is wrong with it.
- With `streaming=True` only the row being read is in memory (except for JSON arrays and MASC files, which must be read
  whole).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, load_dataset, load_from_disk
from PIL import Image

from dynkp.data.images import IMAGE_FORMATS, ImageError, locate_image
from dynkp.data.rows import (
    IDENTITY,
    LOAD_FINDINGS,
    Normaliser,
    Posts,
    enumerate_ids,
    fold_keyphrase,
    normalise_posts,
    normalise_rows,
    row_types,
    undecoded,
)
from dynkp.files.atomic import write_bytes
from dynkp.files.json_files import parse_json
from dynkp.files.json_lines import json_line, write_json_lines

logger = logging.getLogger(__name__)

FORMATS = ("auto", "json", "cmkp", "masc", "parquet", "saved", "hub")
_SUFFIXES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".txt": "cmkp", ".parquet": "parquet"}
# The formats that `datasets` reads.
_DATASETS = ("parquet", "saved", "hub")
_NOT_BLANK = re.compile(r"\S")
# A row with one of these is a post; one without may be an object around the posts.
_POST_COLUMNS = {"id", "text", "keyphrases", "images", "image", "rationale", "conversations", "prompt", "aspect"}
# Number of rows from which the columns of a streamed file are inferred.
_PROBE = 1000


def load_posts(
    source: Any,
    *,
    image_dir: str | Path | None = None,
    split: str = "train",
    streaming: bool = False,
    format: str = "auto",
    name: str | None = None,
    data_dir: str | None = None,
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
) -> Posts:
    """Load posts from a file, a folder, the Hub or memory.

    Args:
        source: one of

            - a JSON or JSON Lines file of posts or of AimKP/LLaVA-style conversations; CMKP's `*_src.txt`; a MASC
              (Twitter-2015) JSON Lines file; a Parquet file; or a list of files of one of these formats;
            - a folder that was saved by `save_to_disk`, or has `{split}.jsonl`, `{split}.json` or `{split}_src.txt`, or that
              `datasets.load_dataset` reads;
            - a Hub id;
            - a `Dataset`, an `IterableDataset`, or a list of dicts.
        image_dir: the folder that image names are relative to. Without it, a relative image name is a finding of its post,
            which `validate_posts` reports unless images are not used; columns of the type `datasets.Image` are opened as
            `datasets` does, relative to the working folder.
        split: the split of a folder or Hub dataset. A file has one split, whatever its name.
        streaming: whether to return an `IterableDataset` that reads the source during iteration.
        format: one of `FORMATS`, if it cannot be recognised from the source.
        name: the configuration of a Hub dataset.
        data_dir: as in `datasets.load_dataset`, for folders and Hub datasets.
        data_files: as in `datasets.load_dataset`, for folders and Hub datasets.

    Returns:
        Posts with `id`, `text`, `keyphrases`, `images`, `rationale` and the source's other columns (rows in TRL's
        prompt-completion format: `id`, `images` and their own columns). Images are not decoded. The id of a post without id
        is `<stem of the file>-<row from 0>`.

    Raises:
        FileNotFoundError: if a file or `image_dir` does not exist.
        ValueError: naming file and line, if a row cannot be parsed; naming the argument, if one is invalid.

    Example:
        >>> load_posts([{"text": "my dog", "keyphrases": ["beagles"]}])[0]["id"]
        'post-0'
    """
    options: dict[str, Any] = {"image_dir": image_dir}
    if not _names_files(source):
        _known_format(format)
        posts = normalise_posts(source, **options)
        return posts.to_iterable_dataset() if streaming and isinstance(posts, Dataset) else posts

    files, format = _files(source, format, split)
    options["stem"] = file_stem(files[0])
    if format in _DATASETS:
        if format == "hub":
            options["local"] = os.path.isdir(files[0])  # a downloaded dataset may not name files of this machine
        more = {"name": name, "data_dir": data_dir, "data_files": data_files}
        return normalise_posts(_load_dataset(files, format, split, streaming, **more), **options)
    if "[" in split:
        raise ValueError(f"split={split!r}: slices work for Parquet, folders and Hub datasets, not for {files[0]!r}")
    if streaming:
        return _stream(files, format, {**options, "stream": True})
    return normalise_rows(_read(files, format), options)


def read_rows(source: Any, *, split: str = "train", format: str = "auto") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a source's rows as they are, one at a time: without cleaning, with all columns, with image names as written.

    This is for processing without loss, such as conversion. AimKP's and MASC's rows are read as by `load_posts`: one per
    conversation, and one per image and text.

    Args:
        source: as in `load_posts`.
        split: as in `load_posts`.
        format: as in `load_posts`.

    Returns:
        An iterator over pairs of the id that a row gets if it has none, and the row.

    Raises:
        FileNotFoundError: as in `load_posts`.
        ValueError: as in `load_posts`; before the first row, where possible.

    Example:
        >>> list(read_rows([{"text": "my dog"}]))
        [('post-0', {'text': 'my dog'})]
    """
    if not _names_files(source):
        _known_format(format)
        if isinstance(source, Dataset | IterableDataset):
            source = _as_stored(source.with_format(None) if isinstance(source, Dataset) else source)
        return iter(enumerate_ids(source, "post"))
    files, format = _files(source, format, split)
    if format not in _DATASETS:
        return _read(files, format)
    return iter(enumerate_ids(_as_stored(_load_dataset(files, format, split, streaming=True)), file_stem(files[0])))


def load_masc_posts(path: str | Path, image_dir: str | Path | None = None, *, rationales: str = "first") -> Dataset:
    """Load a multimodal aspect-sentiment (MASC) dataset, such as Twitter-2015 with response chains, as keyphrase posts.

    Rows are `{"id", "text", "aspect", "label", "cot", "image", "image_id"}`, one per aspect. The rows of one image and text
    become one post: its `keyphrases` are the aspects (without repeats, compared without case), its `rationale` is the
    response chain `cot`, its id is `image_id` (a second text with the same image gets `-2`, and so on), and `labels` has the
    sentiment of each keyphrase. A row whose image is null makes a post without image.

    Args:
        path: the JSON Lines file.
        image_dir: the folder of the images; without it each image's name is a finding (see `load_posts`).
        rationales: `"first"` takes the response chain of the post's first aspect; `"joined"` takes all of them, with an
            empty line between two (up to several thousand tokens).

    Returns:
        The posts, in the order of their first rows.

    Raises:
        ValueError: if a line cannot be parsed, or `rationales` is neither `"first"` nor `"joined"`.
    """
    if rationales not in ("first", "joined"):
        raise ValueError(f"rationales={rationales!r} is not known: use 'first' or 'joined'")
    rows = _masc_posts(_read_json(os.fspath(path)), rationales)
    return normalise_rows(rows, {"image_dir": image_dir, "stem": file_stem(path), "local": True})


def write_posts_jsonl(posts: Posts, path: str | Path, *, image_dir: str | Path | None = None) -> None:
    """Write posts to a JSON Lines file that `load_posts(path, image_dir=image_dir)` reads back.

    Args:
        posts: posts as `load_posts` returns them.
        path: the file; replaced if it exists.
        image_dir: a folder for the images, created if it does not exist. Images in it are written by their names; others
            are copied into it and named by their checksums. Required if a post has an image.

    Raises:
        ValueError: naming the post, if it has an image and there is no `image_dir`, if an image is missing, or if a value
            cannot be written as JSON (NaN cannot). The file is then left as it was.
    """
    root = None if image_dir is None else os.path.realpath(image_dir)
    plain = posts.with_format(None) if isinstance(posts, Dataset) else posts
    write_json_lines(path, (_stored_row(post, root) for post in plain), allow_nan=False)


def _check_writable(row: Mapping[str, Any], post_id: str) -> None:
    """Raise an error that names the post, and the column, if a row cannot be written as JSON."""
    for column, value in row.items():
        try:
            json_line(value, allow_nan=False).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"post {post_id!r} cannot be written: its column {column!r} is not JSON ({error})") from error


def _stored_row(post: Mapping[str, Any], root: str | None) -> dict[str, Any]:
    """Return a post as a row of a JSON Lines file, after copying its images into the image folder."""
    row = {key: value for key, value in post.items() if key not in ("images", LOAD_FINDINGS)}
    _check_writable(row, post["id"])
    return row | {"images": [_stored(image, root, post["id"]) for image in post.get("images") or []]}


def _stored(image: Mapping[str, Any], root: str | None, post_id: str) -> str:
    """Return the name of an image in the image folder, after copying it there unless it is there."""
    if root is None:
        raise ValueError(f"post {post_id!r} has an image: pass image_dir= for the images")
    path, data = image["path"], image["bytes"]
    if data is None:
        if os.path.commonpath([root, os.path.realpath(path)]) == root:
            return os.path.relpath(os.path.realpath(path), root)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"post {post_id!r} cannot be written: its image {path!r} cannot be read ({error})") from error
    return store_image(data, root)


def store_image(data: bytes, folder: str, name: str | None = None) -> str:
    """Write an encoded image into a folder, atomically.

    Args:
        data: the image's bytes; they are not checked.
        folder: the folder, with symbolic links resolved (`os.path.realpath`); created if it does not exist.
        name: the wanted name, relative to the folder.

    Returns:
        The image's name in the folder: `name`, or its checksum if `name` is None, refers to a file outside the folder, or is
        the name of another image there.
    """
    target = None
    if name is not None and not os.path.isabs(name):
        with suppress(ImageError):
            target = locate_image(name, folder)
    if target is None or (os.path.exists(target) and not _holds(target, data)):
        try:
            suffix = f".{Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).format}".lower()
        except Exception:  # not an image: `validate_posts` reports it
            suffix = ".bin"
        name = hashlib.sha256(data).hexdigest()[:24] + suffix
        target = os.path.join(folder, name)
    if not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write_bytes(target, data)
    return str(name)


def _holds(path: str, data: bytes) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == len(data) and Path(path).read_bytes() == data


# --- Formats ---


def _names_files(source: Any) -> bool:
    if isinstance(source, list | tuple) and source:
        return isinstance(source[0], str | Path)
    return isinstance(source, str | Path)


def _known_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known: use one of {', '.join(FORMATS)}")


def _files(source: Any, format: str, split: str) -> tuple[list[str], str]:
    """Return the files that a source names, and their format."""
    _known_format(format)
    files = [os.fspath(path) for path in (source if isinstance(source, list | tuple) else [source])]
    if format == "auto":
        format, files = _recognise(files, split)
    for path in files if format not in ("saved", "hub") else ():
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path!r}")
    return files, format


def _load_dataset(files: list[str], format: str, split: str, streaming: bool, **more: Any) -> Posts:
    """Load rows with `datasets`."""
    if format != "saved":
        path = "parquet" if format == "parquet" else files[0]
        if format == "parquet":
            more = {"data_files": {split.partition("[")[0]: files}}
        posts = load_dataset(path, split=split, streaming=streaming, **more)
        if LOAD_FINDINGS in (posts.column_names or ()):  # a column of this package, not of a file
            posts = posts.remove_columns(LOAD_FINDINGS)
        # pyarrow reads ahead of the consumer without limit: if a training step is slower than the disk, a whole file is in
        # memory, at several times its size. By row groups, one group is. Not over a network, where each group would be a
        # request, nor for posts without ids, which are numbered file by file.
        local = format == "parquet" or os.path.isdir(path)
        return posts.reshard() if streaming and local and "id" in (posts.column_names or ()) else posts
    saved = load_from_disk(files[0])
    if isinstance(saved, Mapping):
        if split not in saved:
            raise ValueError(f"split={split!r} is not in {files[0]}: it has {', '.join(saved)}")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def _as_stored(posts: Posts) -> Iterator[Mapping[str, Any]]:
    """Yield rows with images as paths or bytes, and with exact JSON: `datasets` reads JSON with ujson, to 16 digits."""
    features = posts.features or Features()
    posts = undecoded(posts, features)
    exact = [name for name, kind in features.items() if isinstance(kind, Json)]
    for name in exact:
        posts = posts.cast_column(name, Json(decode=False))
    for row in posts:
        yield {**row, **{name: None if row[name] is None else json.loads(row[name]) for name in exact}} if exact else row


def file_stem(path: str | Path) -> str:
    """Return the stem of the ids that a file's posts without id get.

    Args:
        path: the file.

    Example:
        >>> file_stem("data/train_src.txt")
        'train'
    """
    return Path(path).stem.removesuffix("_src") or "post"


def _recognise(files: list[str], split: str) -> tuple[str, list[str]]:
    path = files[0]
    if os.path.isdir(path):
        if any(os.path.isfile(os.path.join(path, marker)) for marker in ("dataset_dict.json", "state.json")):
            return "saved", files
        for name, format in ((f"{split}.jsonl", "json"), (f"{split}.json", "json"), (f"{split}_src.txt", "cmkp")):
            if os.path.isfile(file := os.path.join(path, name)):
                return _recognise_json([file]) if format == "json" else (format, [file])
        return "hub", files
    suffix = Path(path).suffix.lower()
    format = _SUFFIXES.get(suffix, "hub")
    if format == "hub" and (os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1):
        if not os.path.exists(path):
            raise FileNotFoundError(f"there is no file or folder {path!r}")
        raise ValueError(f"{path!r}: the format of {f'a {suffix}' if suffix else 'such a'} file is not known; pass format=")
    return _recognise_json(files) if format == "json" and os.path.isfile(path) else (format, files)


def _recognise_json(files: list[str]) -> tuple[str, list[str]]:
    first = next(_read_json(files[0]), ("", {}))[1]
    if {"aspect", "image_id"} <= set(first) and "keyphrases" not in first:
        logger.info("%s: an aspect-sentiment (MASC) file, whose aspects become keyphrases", files[0])
        return "masc", files
    return "json", files


# --- Reading ---


def _read(files: Iterable[str], format: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows, each with the id that it gets if it has none."""
    for path in files:
        if format == "cmkp":
            yield from enumerate_ids(_read_cmkp(path), file_stem(path))
        elif format == "masc":
            yield from _masc_posts(_read_json(path), "first")
        else:
            for fallback_id, row in _read_json(path):
                row.pop(LOAD_FINDINGS, None)  # a column of this package, not of a file
                yield fallback_id, row


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a UTF-8 file, each with the words that name it in an error message.

    Args:
        path: the file.

    Yields:
        Pairs of `"<path>, line <number>"` and the line without its line end.

    Raises:
        ValueError: naming file and line, if a line is not UTF-8.
    """
    with open(path, "rb") as file:  # lines of bytes end at \n only; text may contain other line ends of Unicode
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason}): convert the file") from error


def _read_json(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    stem = file_stem(path)
    index = 0
    for where, line in read_lines(path):
        if not line.strip():
            continue
        if index == 0 and line.lstrip().startswith("["):
            yield from enumerate_ids(_read_array(path), stem)
            return
        try:
            row = parse_json(line, where)
        except ValueError:
            if index or (rows := _read_spread_rows(path)) is None:
                raise
            yield from enumerate_ids(rows, stem)
            return
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row must be a JSON object, got {line:.80}")
        if index == 0:
            _refuse_wrapped_rows(row, where)
        yield f"{stem}-{index}", row
        index += 1


def _read_spread_rows(path: str) -> list[dict[str, Any]] | None:
    """Read JSON objects that are each spread over several lines; None if the file has anything else."""
    text = "\n".join(line for _, line in read_lines(path)).rstrip()
    rows: list[dict[str, Any]] = []
    decoder, position = json.JSONDecoder(), 0
    try:
        while position < len(text):
            position = _NOT_BLANK.search(text, position).start()  # type: ignore[union-attr]
            row, position = decoder.raw_decode(text, position)
            if not isinstance(row, dict):
                return None
            rows.append(row)
    except (ValueError, RecursionError):
        return None
    if len(rows) == 1:
        _refuse_wrapped_rows(rows[0], path)
    return rows


def _refuse_wrapped_rows(row: Mapping[str, Any], where: str) -> None:
    """Raise an error for `{"data": [rows]}`: an object that is no post, and has posts inside."""
    if _POST_COLUMNS & row.keys():
        return
    for name, value in row.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            raise ValueError(
                f"{where}: an object with {len(value):,} rows under {name!r}, not a post: write the rows themselves, as an "
                "array or one per line"
            )


def _read_array(path: str) -> list[dict[str, Any]]:
    rows = parse_json("\n".join(line for _, line in read_lines(path)), path)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, element {index}: a row must be a JSON object, got {row!r:.80}")
    return rows


def _read_cmkp(path: str) -> Iterator[dict[str, Any]]:
    """Read CMKP's raw files: `text<sep>k1;k2<sep>address of the image`, one post per line.

    The image's file name is the last part of its address. Files beside `X_src.txt` are read if they exist: `X_trg.txt`
    (`k1;k2` for lines without `<sep>`), `X_ocr_final.txt` (column `ocr`), `X_attribute_cleaned.txt` (`attributes`).
    """
    base = path.removesuffix("_src.txt")
    beside = {"trg": "_trg.txt", "ocr": "_ocr_final.txt", "attributes": "_attribute_cleaned.txt"}
    companions = {key: f"{base}{end}" for key, end in beside.items() if os.path.isfile(f"{base}{end}") and base != path}
    for lines in zip_longest(read_lines(path), *map(read_lines, companions.values())):
        if None in lines:
            raise ValueError(f"{path} and {', '.join(companions.values())} must have the same number of lines")
        where, line = lines[0]
        extra = {key: text for key, (_, text) in zip(companions, lines[1:], strict=True)}
        target = extra.pop("trg", None)
        fields = line.split("<sep>")
        if len(fields) == 1 and target is not None:
            fields = [line, target]
        if len(fields) not in (2, 3):
            raise ValueError(f"{where}: must be 'text<sep>keyphrase;keyphrase<sep>image', got {line[:80]!r}")
        row: dict[str, Any] = {
            "text": fields[0].strip(),
            "keyphrases": fields[1].split(";") if fields[1].strip() else [],
        }
        if len(fields) == 3:
            address = fields[2].strip()
            row["image"] = address.rpartition("/")[2]
            if row["image"] != address:
                row["image_address"] = address
        if "attributes" in extra:
            row["attributes"] = extra.pop("attributes").split()
        yield row | extra


def _masc_posts(rows: Iterable[tuple[str, dict[str, Any]]], rationales: str) -> Iterator[tuple[str, dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for fallback_id, row in rows:
        if not isinstance(row.get("aspect"), str) or row.get("image_id") is None:
            raise ValueError(f"row {fallback_id}: a MASC row needs a string 'aspect' and an 'image_id', got {row!r:.200}")
        groups.setdefault((str(row["image_id"]), row.get("text")), []).append(row)
    further = sum(max(0, sum(bool(row.get("cot")) for row in members) - 1) for members in groups.values())
    if further and rationales == "first":
        logger.warning(
            "%d response chains of further aspects are not used; load_masc_posts(..., rationales='joined') keeps them",
            further,
        )
    texts_of: dict[str, int] = {}
    for (image_id, text), members in groups.items():
        texts_of[image_id] = nth = texts_of.get(image_id, 0) + 1
        unique: dict[str, dict[str, Any]] = {}
        for row in members:
            unique.setdefault(fold_keyphrase(row["aspect"]), row)
        response_chains = [row["cot"] for row in members if row.get("cot")]
        post_id = image_id if nth == 1 else f"{image_id}-{nth}"
        yield (
            post_id,
            {
                "id": post_id,
                "text": text,
                "keyphrases": [row["aspect"] for row in unique.values()],
                "image": next((row["image"] for row in members if row.get("image")), None),
                "rationale": "\n\n".join(response_chains) if rationales == "joined" else next(iter(response_chains), None),
                "labels": [row.get("label") for row in unique.values()],
            },
        )


# --- Streams ---


def _stream(files: list[str], format: str, options: dict[str, Any]) -> IterableDataset:
    probe = [row for _, row in islice(_read(files, format), _PROBE)]
    normaliser, extra = row_types(probe, options)
    return IterableDataset.from_generator(
        _stream_rows,
        features=Features({**normaliser.features, **extra}),
        # The workers of a data loader share the list among these: `files`.
        gen_kwargs={"files": files, "format": format, "normaliser": normaliser, "extra": tuple(extra)},
    )


def _stream_rows(files: list[str], format: str, normaliser: Normaliser, extra: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    known = {*normaliser.columns, *IDENTITY, *extra}
    for fallback_id, row in _read(files, format):
        if not row.keys() <= known:
            new = sorted(row.keys() - known)
            known |= set(new)  # logged once
            logger.warning(
                "the column %s occurs first in post %r, after the %d rows that determine the columns of a stream: it is "
                "ignored. Give it a value (null is enough) in the first row.",
                ", ".join(new),
                row.get("id", fallback_id),
                _PROBE,
            )
        yield normaliser(row, fallback_id, extra)
