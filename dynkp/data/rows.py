"""The row format of posts, and the normalisation of other rows into this format.

| column | type | |
|---|---|---|
| `id` | str | unique |
| `images` | list of `{"bytes", "path"}` | may be empty |
| `text` | str | in Unicode's composed form (NFC); may be empty |
| `keyphrases` | list of str | normalised by `normalise_phrase`, as the answer parser does |
| `rationale` | str or None | |

Rows with `prompt` and `completion` (TRL's conversational format, with `reasoning_completion`) keep these columns as they are
and need none of `text`, `keyphrases`, `rationale`. Other columns are kept.

Guarantees:

- A value that does not fit its column is never dropped silently: it becomes an entry of the column `load_findings`, which
  `dynkp.data.posts.validate_posts` reads.
- Images stay paths or encoded bytes; streams stay streams.
- Normalising twice has the same result as normalising once.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, Json, List, Value
from PIL import Image as PILImage
from PIL import ImageOps

from dynkp.data.images import MAX_IMAGE_PIXELS, ImageError, locate_image
from dynkp.data.tasks import TASKS
from dynkp.mmkp_f1.answers import canonical_text, normalise_phrase

logger = logging.getLogger(__name__)

Posts: TypeAlias = Dataset | IterableDataset

# Types are always explicit: `datasets` gives an all-empty list or an all-None string the null type, and two such datasets
# cannot be joined.
IDENTITY = {"id": Value("string"), "images": List(Image(decode=False))}
CONTENT = {"text": Value("string"), "keyphrases": List(Value("string")), "rationale": Value("string")}
CONVERSATION = ("prompt", "completion", "reasoning_completion")
# Findings of normalisation, kept for `validate_posts`, which removes the column.
LOAD_FINDINGS = "load_findings"
_FINDINGS_TYPE = List({"code": Value("string"), "message": Value("string")})
# Columns that normalisation replaces; others are kept.
READ_COLUMNS = {*IDENTITY, *CONTENT, "image", "conversations", LOAD_FINDINGS}
# Number of rows from which the columns of a stream without declared types are inferred.
_PROBE = 100

_QUESTION = TASKS["aimkp"].instruction


def fold_keyphrase(phrase: str) -> str:
    """Return the form of a keyphrase by which keyphrases are compared: case and whitespace do not matter.

    Args:
        phrase: a keyphrase.

    Example:
        >>> fold_keyphrase("#NBA  Finals")
        'nba finals'
    """
    return " ".join(normalise_phrase(phrase).split()).casefold()


class Normaliser:
    """Turns a row into the columns of a post; values that do not fit become entries of `load_findings`.

    Args:
        columns: names of the rows' columns.
        image_dir: the folder that image names are relative to.
        stem: posts without id become `<stem>-<row>`.
        local: whether the data was written on this machine: a downloaded dataset cannot name files of this machine.
        stream: whether the rows are read as a stream: the first ignored image name is then logged at once.
        keep_names: whether image names are kept as they are, whatever they refer to.

    Attributes:
        features: types of the columns that a normalised row has.
        ignored: number of relative image names that were ignored because there is no image folder.

    Raises:
        FileNotFoundError: if `image_dir` is not a folder.
    """

    def __init__(
        self,
        columns: Iterable[str],
        *,
        image_dir: str | Path | None,
        stem: str = "post",
        local: bool = True,
        stream: bool = False,
        keep_names: bool = False,
    ) -> None:
        self.columns = set(columns)
        self.stem = stem
        self.root = None if image_dir is None else os.path.realpath(image_dir)
        if self.root is not None and not os.path.isdir(self.root):
            raise FileNotFoundError(f"image_dir={str(image_dir)!r} is not a folder")
        self.local = local
        self.stream = stream
        self.keep_names = keep_names
        self.ignored = 0
        # A mixture with prompt-completion rows has both kinds of columns.
        conversational = {"prompt", "completion"} <= self.columns
        content = {name: kind for name, kind in CONTENT.items() if not conversational or name in self.columns}
        self.features = Features({**IDENTITY, **content, LOAD_FINDINGS: _FINDINGS_TYPE})

    def __call__(self, row: Mapping[str, Any], fallback_id: str, extra: Iterable[str] = ()) -> dict[str, Any]:
        """Normalise one row.

        Args:
            row: the row.
            fallback_id: the id of a row without id.
            extra: names of further columns to keep.

        Returns:
            The columns of `features`, and those of `extra`.
        """
        problems = list(row.get(LOAD_FINDINGS) or [])

        def report(code: str, message: str) -> None:
            problems.append({"code": code, "message": message})

        if row.get("conversations") is not None and row.get("keyphrases") is None:
            row = _from_conversation(row, report)
        rationale = _string(row.get("rationale"), "rationale", report)
        post = {
            "id": _post_id(row.get("id"), report) or fallback_id,
            "images": self._images(row, report),
            "text": canonical_text(_string(row.get("text"), "text", report) or ""),
            "keyphrases": _keyphrases(row.get("keyphrases"), report),
            "rationale": rationale if rationale and rationale.strip() else None,
            LOAD_FINDINGS: problems,
        }
        carried = {name: _encodable(row.get(name), name, report) for name in extra}
        return {name: post[name] for name in self.features} | carried

    def batch(self, batch: Mapping[str, list[Any]], indices: list[int], columns: list[str]) -> dict[str, list[Any]]:
        """Normalise a batch of rows; the function for `datasets.Dataset.map`.

        Args:
            batch: values of each column.
            indices: positions of the rows, from 0.
            columns: names of the columns to read.

        Returns:
            Values of each column of `features`.
        """
        values = [batch[name] for name in columns]
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*values, strict=True)] or [{} for _ in indices]
        posts = [self(row, f"{self.stem}-{index}") for row, index in zip(rows, indices, strict=True)]
        return {name: [post[name] for post in posts] for name in self.features}

    def _images(self, row: Mapping[str, Any], report: Any) -> list[dict[str, Any]]:
        given = [value for name in ("images", "image") if not _absent(value := row.get(name))]
        if len(given) > 1:
            report("wrong_type", "the post has both 'image' and 'images': give one of them")
        images = []
        for value in given[0] if given and isinstance(given[0], list | tuple) else given[:1]:
            try:
                image = self._image(value)
            except ImageError as error:
                report(error.code, str(error))
            else:
                if image is not None:
                    images.append(image)
        return images

    def _image(self, value: Any) -> dict[str, Any] | None:
        if isinstance(value, bytes | bytearray):
            return {"bytes": bytes(value), "path": None}
        if isinstance(value, PILImage.Image):
            return {"bytes": _encode(value), "path": None}
        if isinstance(value, Mapping) and value.get("bytes") is not None:
            return {"bytes": value["bytes"], "path": value.get("path")}
        name = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(name, str | Path) or not str(name):
            raise ImageError(f"an image must be a file name, bytes or a PIL image, got {name!r:.80}", "wrong_type")
        if self.keep_names:
            return {"bytes": None, "path": str(name)}
        if not self.local and isinstance(value, str) and os.path.isabs(value):
            raise ImageError(f"image {value!r:.120}, from a downloaded dataset, names a local file", "path_outside")
        path = locate_image(str(name), self.root)
        if path is None:
            self.ignored += 1
            if self.stream and self.ignored == 1:
                logger.warning(
                    "the stream's posts have relative image names (%r), but there is no image folder: they are used without "
                    "image. To use the images, pass image_dir=.",
                    str(name),
                )
            return None
        return {"bytes": None, "path": path}

    def announce_ignored(self, posts: int) -> None:
        """Log how many images were ignored because there is no image folder.

        Args:
            posts: number of posts.
        """
        if self.ignored:
            logger.warning(
                "%d relative image names in %d posts, but there is no image folder: they are used without image. To use the "
                "images, pass image_dir=.",
                self.ignored,
                posts,
            )


def _absent(value: Any) -> bool:
    """Return whether a value is no image: null, an empty name, an empty list, or Arrow's struct of nulls."""
    if isinstance(value, Mapping):
        return value.get("bytes") is None and value.get("path") is None
    return value is None or (isinstance(value, str | bytes | list | tuple) and not value)


def _post_id(value: Any, report: Any) -> str | None:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    return _string(value, "id", report)


def _string(value: Any, name: str, report: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        nan = " (a missing value in pandas; write null)" if isinstance(value, float) and math.isnan(value) else ""
        report("wrong_type", f"{name} must be a string, got {type(value).__name__} {value!r:.80}{nan}")
        return None
    return _unicode(value, name, report)


def _unicode(value: str, name: str, report: Any) -> str:
    # JSON can spell half a surrogate pair ("\ud83d"), which neither Arrow nor a tokenizer accepts.
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        report("bad_unicode", f"{name} has half a surrogate pair: {value!r:.120}")
        return value.encode("utf-8", "replace").decode("utf-8")
    return value


def _encodable(value: Any, name: str, report: Any) -> Any:
    if isinstance(value, str):
        return _unicode(value, name, report)
    if isinstance(value, list):
        return [_encodable(item, name, report) for item in value]
    if isinstance(value, dict):
        return {_encodable(key, name, report): _encodable(item, name, report) for key, item in value.items()}
    return value


def _keyphrases(value: Any, report: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        report("wrong_type", f"keyphrases must be a list of strings, got {type(value).__name__} {value!r:.80}")
        return []
    phrases = []
    for phrase in value:
        if isinstance(phrase, str):
            phrases.append(normalise_phrase(_unicode(phrase, "a keyphrase", report)))
        else:
            report("wrong_type", f"a keyphrase must be a string, got {type(phrase).__name__} {phrase!r:.80}")
    return phrases


def _encode(image: PILImage.Image) -> bytes:
    """Return an image in memory as lossless bytes, rotated by its EXIF orientation (which Pillow's PNG does not keep)."""
    if image.width * image.height > MAX_IMAGE_PIXELS:  # before anything is decoded
        raise ImageError(f"an image of {image.width} x {image.height} pixels is refused", "decompression_bomb")
    data = io.BytesIO()
    try:
        ImageOps.exif_transpose(image).convert("RGB").save(data, "PNG", compress_level=1)
    except Exception as error:  # as for files: decoders raise nearly anything
        raise ImageError(f"an image cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
    return data.getvalue()


def _from_conversation(row: Mapping[str, Any], report: Any) -> dict[str, Any]:
    """Read a row of AimKP's format, LLaVA-style: a question of `<image>`, text and instruction, and the answer `k1, k2`."""
    turns = row["conversations"]
    turns = turns if isinstance(turns, list) else []
    values = [turn["value"] for turn in turns if isinstance(turn, Mapping) and isinstance(turn.get("value"), str)]
    if len(values) != len(turns) or not 1 <= len(values) <= 2:
        report("bad_conversation", "conversations must have one question and its answer, each with a string 'value'")
        return {**row, "keyphrases": []}
    question, answer = (*values, "")[:2]
    text = row.get("text")
    if text is None:
        text = question.replace("<image>", "").strip().removesuffix(_QUESTION).strip()
    return {**row, "text": text, "keyphrases": [phrase for phrase in answer.split(",") if answer.strip()]}


def normalise_posts(posts: Any, *, image_dir: str | Path | None = None, stem: str = "post", local: bool = True) -> Posts:
    """Normalise posts into the row format of this module.

    Args:
        posts: a `Dataset`, an `IterableDataset` (stays a stream), or an iterable of dicts.
        image_dir: the folder that image names are relative to. Without it, posts with a relative image name count as
            posts without image; this is announced once.
        stem: posts without id become `<stem>-<row>`.
        local: whether the data was written on this machine: a downloaded dataset cannot name files of this machine.

    Returns:
        The posts. Values that did not fit are listed in the column `load_findings`, which `validate_posts` reads.

    Raises:
        FileNotFoundError: if `image_dir` is not a folder.
        TypeError: if `posts` is anything else, or a row is not a dict.

    Example:
        >>> normalise_posts([{"id": 7, "text": "my dog", "keyphrases": ["#beagles"]}])[0]
        {'id': '7', 'images': [], 'text': 'my dog', 'keyphrases': ['beagles'], 'rationale': None}
    """
    options: dict[str, Any] = {"image_dir": image_dir, "stem": stem, "local": local}
    if isinstance(posts, IterableDataset):
        return _normalise_stream(posts, options)
    if isinstance(posts, Dataset):
        return _normalise_dataset(posts, options)
    if isinstance(posts, Mapping):  # a DatasetDict too
        raise TypeError(f"posts must be one dataset, got a mapping of {', '.join(map(str, posts))}: pass one of them")
    if isinstance(posts, str | bytes) or not isinstance(posts, Iterable):
        raise TypeError(f"posts must be a dataset or a list of dicts, got {type(posts).__name__}")
    return normalise_rows(enumerate_ids(posts, stem), options)


def enumerate_ids(rows: Iterable[Any], stem: str) -> Iterable[tuple[str, Any]]:
    """Pair each row with the id that it gets if it has none.

    Args:
        rows: the rows.
        stem: ids are `<stem>-<row from 0>`.

    Example:
        >>> list(enumerate_ids(["a", "b"], "post"))
        [('post-0', 'a'), ('post-1', 'b')]
    """
    return ((f"{stem}-{index}", row) for index, row in enumerate(rows))


def normalise_rows(rows: Iterable[tuple[str, Any]], options: Mapping[str, Any]) -> Dataset:
    """Build a `Dataset` in memory from Python rows.

    Args:
        rows: pairs of the id that a row gets if it has none, and the row.
        options: arguments of `Normaliser`.

    Raises:
        TypeError: if a row is not a dict, or the name of a column is not a valid string.
    """
    pairs = list(rows)
    normaliser, extra = row_types([row for _, row in pairs], options)
    posts = [normaliser(row, fallback_id, extra) for fallback_id, row in pairs]
    normaliser.announce_ignored(len(posts))
    features = Features({**normaliser.features, **extra})
    data = {name: [post[name] for post in posts] for name in features}
    return _without_empty_findings(Dataset.from_dict(data, features=features))


def row_types(rows: Sequence[Any], options: Mapping[str, Any]) -> tuple[Normaliser, Features]:
    """Return the normaliser of some rows, and the types of the further columns that are kept.

    Args:
        rows: all rows, or the first ones of a stream.
        options: arguments of `Normaliser`.

    Raises:
        TypeError: if a row is not a dict, or the name of a column is not a valid string.
    """
    for row in rows:
        if not isinstance(row, Mapping):
            raise TypeError(f"a post must be a dict, got {type(row).__name__} {row!r:.80}")
    columns = dict.fromkeys(name for row in rows for name in row)
    for name in columns:
        if not isinstance(name, str) or _encodable(name, "", lambda *_: None) != name:
            raise TypeError(f"a column's name must be a valid string, got {name!r}")
    extra = {name: extra_type(name, [row.get(name) for row in rows]) for name in columns if name not in READ_COLUMNS}
    return Normaliser(columns, **options), Features(extra)


def extra_type(name: str, values: list[Any]) -> Any:
    """Return the type of a column that is kept: the one that Arrow infers, or JSON if its values have several types.

    Args:
        name: name of the column.
        values: its values.
    """
    # Arrow would add keys with None to a message {"role", "content": [{"type": "image"}, {"type": "text", "text"}]}, and
    # chat templates test which keys there are.
    if name in CONVERSATION:
        return Json()
    try:
        kind = pa.array([_encodable(value, "", lambda *_: None) for value in values]).type
        return Value("string") if pa.types.is_null(kind) else Features.from_arrow_schema(pa.schema({name: kind}))[name]
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return Json()  # values of several types


def _without_empty_findings(posts: Dataset) -> Dataset:
    column = posts.data.column(LOAD_FINDINGS)
    if pc.sum(pc.list_value_length(column)).as_py():
        return posts
    return posts.remove_columns(LOAD_FINDINGS)


def undecoded(posts: Any, features: Features) -> Any:
    """Return posts whose images are read as paths or bytes: `datasets` decodes an `Image` column when a row is read.

    Args:
        posts: a `Dataset` or an `IterableDataset`.
        features: the types of its columns.
    """
    for name in {"image", "images"} & set(features):
        if isinstance(features[name], Image):
            posts = posts.cast_column(name, Image(decode=False))
        elif isinstance(getattr(features[name], "feature", None), Image):
            posts = posts.cast_column(name, List(Image(decode=False)))
    return posts


def _carried(features: Features) -> Features:
    kept = {name: kind for name, kind in features.items() if name not in READ_COLUMNS}
    return Features({name: Value("string") if kind == Value("null") else kind for name, kind in kept.items()})


def _normalise_dataset(posts: Dataset, options: Mapping[str, Any]) -> Dataset:
    normaliser = Normaliser(posts.column_names, **options)
    posts = posts.with_format(None)
    if _is_normal(posts, normaliser):
        return posts
    posts = undecoded(posts, posts.features)
    features = Features({**normaliser.features, **_carried(posts.features)})
    read = [name for name in posts.column_names if name in READ_COLUMNS]
    normal = posts.map(
        normaliser.batch,
        batched=True,
        batch_size=256,
        with_indices=True,
        fn_kwargs={"columns": read},
        remove_columns=read,
        features=features,
        # The cache key has the data but not the version of this code, and a cached pass would log no warning.
        load_from_cache_file=False,
        desc="Reading posts",
    )
    normaliser.announce_ignored(len(posts))
    return _without_empty_findings(normal.select_columns(list(features)))


def _is_normal(posts: Dataset, normaliser: Normaliser) -> bool:
    """Return whether normalisation would change nothing; then a large dataset need not be copied."""
    expected = {name: kind for name, kind in normaliser.features.items() if name != LOAD_FINDINGS}
    features = posts.features
    if {"image", "conversations"} & set(features) or Value("null") in features.values():
        return False
    if any(features.get(name) != kind for name, kind in expected.items()):
        return False
    table = posts.data  # more rows than `posts` if it is a selection, which does no harm
    if any(table.column(name).null_count for name in expected if name != "rationale"):
        return False
    if "" in pc.unique(table.column("id")).to_pylist():
        return False
    if "text" in expected and any(text != canonical_text(text) for text in _non_ascii(table.column("text"))):
        return False
    phrases = pc.list_flatten(table.column("keyphrases")).to_pylist() if "keyphrases" in expected else []
    if not all(phrase is not None and phrase == normalise_phrase(phrase) for phrase in phrases):
        return False
    # Bytes stay in Arrow: only the paths of images without bytes are read.
    for chunk in pc.list_flatten(table.column("images")).chunks:
        by_path = pc.is_null(pc.struct_field(chunk, "bytes"))
        for path in pc.struct_field(chunk, "path").filter(by_path).to_pylist():
            try:
                if path is None or locate_image(path, normaliser.root) != path:
                    return False
            except ImageError:
                return False
    return True


def _non_ascii(texts: pa.ChunkedArray) -> list[str]:
    return texts.filter(pc.invert(pc.string_is_ascii(texts))).to_pylist()


def _normalise_stream(posts: IterableDataset, options: Mapping[str, Any]) -> IterableDataset:
    if posts.features is not None and LOAD_FINDINGS in posts.features:
        return posts  # only this module makes such a stream
    options = {**options, "stream": True}
    if posts.features is None:
        rows = list(islice(posts, _PROBE))
        columns = list(dict.fromkeys(name for row in rows for name in row))
        normaliser, extra = row_types(rows, options)
    else:
        columns = list(posts.features)
        normaliser, extra = Normaliser(columns, **options), _carried(posts.features)
        posts = undecoded(posts, posts.features)
    if "id" not in columns and posts.num_shards > 1:
        logger.warning(
            "the stream has no column 'id' and %d shards: workers number their posts from 0 each, so ids will repeat. "
            "Give the posts ids.",
            posts.num_shards,
        )
    read = [name for name in columns if name in READ_COLUMNS]
    return posts.map(
        normaliser.batch,
        batched=True,
        batch_size=16,  # few, so that the first batch of training does not wait for many images
        with_indices=True,
        fn_kwargs={"columns": read},
        remove_columns=read,
        features=Features({**normaliser.features, **extra}),
    )
