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
import re
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

from dynkp.data.images import MAX_IMAGE_PIXELS, ImageError, locate_image, to_rgb
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
# Codes of findings about an image, which do not matter where images are not used.
IMAGE_CODES = frozenset(
    ("no_image_dir", "unread_image", "missing_file", "unreadable_image", "decompression_bomb", "path_outside", "external_url")
    + ("unprocessable_image",)
)
# Names of columns in which other data sets have images; they are not read, and a post with one of them and no image in
# `images` has a finding.
_OTHER_IMAGE_COLUMN = re.compile(
    r"(?:(?:image|img|picture|pic|photo)s?(?:_?(?:path|file|file_?name|name|dir|bytes|base64|b64|url|uri)s?)?|file_?names?)",
    re.IGNORECASE,
)
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
        typed: columns of the type `datasets.Image` or a list of it: without `image_dir`, their names are relative to the
            working folder, as `datasets` reads them.

    Attributes:
        other_image_columns: columns that are not read although they seem to have images.
        features: types of the columns that a normalised row has.
        ignored: number of relative image names that were ignored because there is no image folder. Each is a finding
            `no_image_dir` of its post too.

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
        typed: Iterable[str] = (),
    ) -> None:
        self.columns = set(columns)
        self.typed = frozenset(typed)
        self.other_image_columns = sorted(
            name for name in self.columns - {"image", "images"} if _OTHER_IMAGE_COLUMN.fullmatch(name) or name in self.typed
        )
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

    def columns_to_read(self, columns: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return the columns that `batch` reads, and those of them that the columns of `features` replace.

        Args:
            columns: names of the dataset's columns.
        """
        replaced = [name for name in columns if name in READ_COLUMNS]
        return [*replaced, *self.other_image_columns], replaced

    def _images(self, row: Mapping[str, Any], report: Any) -> list[dict[str, Any]]:
        given = [(name, value) for name in ("images", "image") if not _absent(value := row.get(name))]
        if len(given) > 1:
            report("wrong_type", "the post has both 'image' and 'images': give one of them")
        if not given:
            self._report_other_columns(row, report)
            return []
        column, values = given[0]
        if isinstance(values, np.ndarray) and values.dtype == object:
            values = values.tolist()
        images = []
        for value in values if isinstance(values, list | tuple) else [values]:
            try:
                images.append(self._image(value, column in self.typed))
            except ImageError as error:
                report(error.code, str(error))
        return images

    def _report_other_columns(self, row: Mapping[str, Any], report: Any) -> None:
        """Report a post that has no image in `images`, but a value in another column of images."""
        if self.keep_names or any(item["code"] in IMAGE_CODES for item in row.get(LOAD_FINDINGS) or ()):
            return
        for name in self.other_image_columns:
            if _names_image(value := row.get(name)):
                report(
                    "unread_image",
                    f"the post's image is in the column {name!r} ({value!r:.80}), which is not read: rename the column to "
                    "'images'",
                )
                return

    def _image(self, value: Any, typed: bool = False) -> dict[str, Any]:
        if isinstance(value, bytes | bytearray):
            return {"bytes": bytes(value), "path": None}
        if isinstance(value, PILImage.Image):
            return {"bytes": _encode(value), "path": None}
        if isinstance(value, Mapping) and (data := value.get("bytes")) is not None:
            if not isinstance(data, bytes | bytearray):
                raise ImageError(f"the 'bytes' of an image must be bytes, got {type(data).__name__}", "wrong_type")
            return {"bytes": bytes(data), "path": value.get("path")}
        name = value.get("path") if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and name is None and isinstance(url := value.get("url"), str):
            raise ImageError(
                f"image {url!r:.120} is a URL, and images are never fetched: download it and name the file", "external_url"
            )
        if not isinstance(name, str | Path) or not str(name):
            raise ImageError(f"an image must be a file name, bytes or a PIL image, got {value!r:.80}", "wrong_type")
        if self.keep_names:
            return {"bytes": None, "path": str(name)}
        if isinstance(name, str) and name.lstrip()[:1] in ("[", "{") and name.rstrip()[-1:] in ("]", "}"):
            raise ImageError(f"images must be a list, got a string of JSON {name!r:.80}: parse it", "wrong_type")
        if not self.local and isinstance(value, str) and os.path.isabs(value):
            raise ImageError(f"image {value!r:.120}, from a downloaded dataset, names a local file", "path_outside")
        path = locate_image(str(name), self.root)
        if path is None and typed and self.local:
            path = os.path.abspath(str(name))  # as `datasets` opens it
        if path is None:
            self.ignored += 1
            if self.stream and self.ignored == 1:
                logger.warning(
                    "the stream's posts have relative image names (%r), but there is no image folder. To use the images, pass "
                    "image_dir=.",
                    str(name),
                )
            raise ImageError(
                f"image {str(name)!r:.120} is relative to an image folder, and none is given: pass image_dir= (--image-dir), "
                "or use the text alone (--modality text)",
                "no_image_dir",
            )
        return {"bytes": None, "path": path}

    def announce_ignored(self, posts: int) -> None:
        """Log how many images were ignored because there is no image folder.

        Args:
            posts: number of posts.
        """
        if self.ignored:
            logger.warning(
                "%d relative image names in %d posts, but there is no image folder. To use the images, pass image_dir=.",
                self.ignored,
                posts,
            )


def _absent(value: Any) -> bool:
    """Return whether a value is no image: null, an empty name, an empty list, or Arrow's struct of nulls."""
    if isinstance(value, Mapping):
        return all(item is None for item in value.values())
    return value is None or (isinstance(value, str | bytes | list | tuple) and not value)


def _names_image(value: Any) -> bool:
    """Return whether a value of another column may be an image, or the name of one."""
    if isinstance(value, list | tuple):
        return any(map(_names_image, value))
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, bytes | Mapping | PILImage.Image) and not _absent(value)


def _typed_columns(features: Features) -> list[str]:
    """Return the columns whose values `datasets` opens as images."""
    return [
        name for name, kind in features.items() if isinstance(kind, Image) or isinstance(getattr(kind, "feature", None), Image)
    ]


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
        to_rgb(ImageOps.exif_transpose(image)).save(data, "PNG", compress_level=1)
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
        image_dir: the folder that image names are relative to. Without it, a relative image name is a finding of its post,
            except in columns of the type `datasets.Image`, where it is relative to the working folder.
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
    for name in _typed_columns(features):
        if isinstance(features[name], Image):
            posts = posts.cast_column(name, Image(decode=False))
        elif isinstance(getattr(features[name], "feature", None), Image):
            posts = posts.cast_column(name, List(Image(decode=False)))
    return posts


def without_images(posts: Any) -> Any:
    """Return posts as posts of text only: without images, other columns of images, and findings about images.

    Args:
        posts: posts as `load_posts` returns them.

    Returns:
        The posts; a stream stays a stream.

    Example:
        >>> without_images(normalise_posts([{"id": "1", "text": "my dog", "image": b"..."}])).column_names
        ['id', 'text', 'keyphrases', 'rationale']
    """
    columns = posts.column_names or ()
    kinds = posts.features or {}
    typed = _typed_columns(kinds) if kinds else []
    removed = [name for name in columns if name in ("image", "images", *typed) or _OTHER_IMAGE_COLUMN.fullmatch(name)]
    if LOAD_FINDINGS in columns:
        posts = posts.map(_without_image_findings, input_columns=[LOAD_FINDINGS])
    return posts.remove_columns(removed)


def _without_image_findings(findings: list[dict[str, str]]) -> dict[str, Any]:
    return {LOAD_FINDINGS: [item for item in findings if item["code"] not in IMAGE_CODES]}


def _carried(features: Features) -> Features:
    kept = {name: kind for name, kind in features.items() if name not in READ_COLUMNS}
    return Features({name: Value("string") if kind == Value("null") else kind for name, kind in kept.items()})


def _normalise_dataset(posts: Dataset, options: Mapping[str, Any]) -> Dataset:
    normaliser = Normaliser(posts.column_names, typed=_typed_columns(posts.features), **options)
    posts = posts.with_format(None)
    if _is_normal(posts, normaliser):
        return posts
    posts = undecoded(posts, posts.features)
    features = Features({**normaliser.features, **_carried(posts.features)})
    columns, replaced = normaliser.columns_to_read(posts.column_names)
    normal = posts.map(
        normaliser.batch,
        batched=True,
        batch_size=256,
        with_indices=True,
        fn_kwargs={"columns": columns},
        remove_columns=replaced,
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
    if normaliser.other_image_columns and LOAD_FINDINGS not in features:
        if not pc.all(pc.greater(pc.list_value_length(table.column("images")), 0)).as_py():
            return False
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
        normaliser = Normaliser(columns, typed=_typed_columns(posts.features), **options)
        extra = _carried(posts.features)
        posts = undecoded(posts, posts.features)
    if "id" not in columns and posts.num_shards > 1:
        logger.warning(
            "the stream has no column 'id' and %d shards: workers number their posts from 0 each, so ids will repeat. "
            "Give the posts ids.",
            posts.num_shards,
        )
    read, replaced = normaliser.columns_to_read(columns)
    return posts.map(
        normaliser.batch,
        batched=True,
        batch_size=16,  # few, so that the first batch of training does not wait for many images
        with_indices=True,
        fn_kwargs={"columns": read},
        remove_columns=replaced,
        features=Features({**normaliser.features, **extra}),
    )
