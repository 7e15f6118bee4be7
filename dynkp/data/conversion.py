"""Conversion of posts between file formats: JSON Lines, Parquet with images inside, AimKP/LLaVA JSON, CMKP's raw files.

`convert_posts` reads posts in any format that `dynkp.data.sources` reads, writes them in another format, and reports what was
written and what the format cannot represent.

Guarantees:

- One post is in memory at a time (for Parquet, one row group).
- Values that are not written are counted, by column.
- A post that the format cannot represent is an error with its id, or is skipped and listed.
- The output is complete or absent.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Json, List, Value
from tqdm import tqdm

from dynkp.data.images import ImageError, check_image, locate_image
from dynkp.data.posts import Finding, InvalidPostsError, PostReport
from dynkp.data.rows import CONTENT, IDENTITY, LOAD_FINDINGS, READ_COLUMNS, Normaliser, extra_type
from dynkp.data.sources import read_rows, store_image
from dynkp.data.tasks import TASKS
from dynkp.files.atomic import atomic_files, atomic_folder

logger = logging.getLogger(__name__)

OUTPUT_FORMATS = ("jsonl", "parquet", "llava", "cmkp")
JOIN_FORMAT = "{text}\n{column}: {value}"
# A row group of Parquet ends at this number of posts, of posts if some have embedded images, or of bytes. The Hub's viewer
# reads one group at a time, and the index of a file, which is held in memory, has an entry for each.
_GROUP_POSTS, _GROUP_POSTS_WITH_IMAGES, _GROUP_BYTES = 1000, 100, 32 << 20
# Number of posts whose further columns are typed at once.
_POSTS_TYPED_AT_ONCE = 1000


@dataclass
class ConversionReport:
    """The result of `convert_posts`.

    Attributes:
        posts: number of posts written.
        images: number of images written or named.
        not_written: per column, number of posts with a value in it that was not written.
        skipped: findings of the posts that were skipped, in order.
    """

    posts: int = 0
    images: int = 0
    not_written: Counter[str] = field(default_factory=Counter)
    skipped: list[Finding] = field(default_factory=list)

    def summary(self) -> str:
        """Return all counts in one sentence.

        Example:
            >>> ConversionReport(posts=2, images=1, not_written=Counter(rationale=1)).summary()
            '2 posts with 1 images. Not written, by number of posts: rationale 1'
        """
        text = f"{self.posts:,} posts with {self.images:,} images"
        if self.skipped:
            shown = ", ".join(repr(finding.id) for finding in self.skipped[:5])
            text += f"; {len({finding.index for finding in self.skipped}):,} posts skipped, first {shown}"
        if self.not_written:
            counts = sorted(self.not_written.items(), key=lambda item: (-item[1], item[0]))
            text += f". Not written, by number of posts: {', '.join(f'{name} {posts:,}' for name, posts in counts)}"
        return text


class _Unwritable(ValueError):
    """A value that the output format cannot represent; the message follows the post's id."""


def read_whole_posts(
    source: Any, *, split: str = "train", format: str = "auto"
) -> Iterator[tuple[dict[str, Any], list[dict[str, str]]]]:
    """Read posts one at a time, with all their columns, and with image names as they are written.

    Args:
        source: as in `load_posts`.
        split: as in `load_posts`.
        format: as in `load_posts`.

    Yields:
        Pairs of a post (see `dynkp.data.rows`; `images` are `{"bytes", "path"}`) and its findings (each a `dict` of `code`
        and `message`).

    Raises:
        FileNotFoundError: as in `load_posts`.
        ValueError: as in `load_posts`.
    """
    normalisers: dict[frozenset[str], Normaliser] = {}
    for fallback_id, row in read_rows(source, split=split, format=format):
        columns = frozenset(row)
        if columns not in normalisers:
            normalisers[columns] = Normaliser(columns, image_dir=None, keep_names=True)
        extra = [name for name in row if name not in READ_COLUMNS]
        if row.get("keyphrases") is not None and row.get("conversations") is not None:
            extra.append("conversations")  # kept, since the keyphrases are not read from it
        post = normalisers[columns](row, fallback_id, extra)
        yield post, post.pop(LOAD_FINDINGS)


def convert_posts(
    source: Any,
    output: str | Path,
    *,
    output_format: str = "auto",
    image_dir: str | Path | None = None,
    images: str = "auto",
    output_image_dir: str | Path | None = None,
    join: Sequence[str] = (),
    join_format: str = JOIN_FORMAT,
    drop: Sequence[str] = (),
    split: str = "train",
    format: str = "auto",
    on_invalid: str = "error",
    shard_bytes: int = 500_000_000,
    progress: bool = False,
) -> ConversionReport:
    """Write posts in another format.

    | format | file | what it cannot represent |
    |---|---|---|
    | `jsonl` | `X.jsonl` | bytes and dates in other columns |
    | `parquet` | `X.parquet`, or a folder of shards | |
    | `llava` | `X.json`, one array; `X.jsonl`, one row per line | keyphrases with `,`, text with `<image>` |
    | `cmkp` | `X_src.txt`, `X_ocr_final.txt`, `X_attribute_cleaned.txt` | line breaks, `<sep>`, two images, ids, rationales |

    Args:
        source: posts, as in `load_posts`. For Parquet they are read twice, the first time for the types of the columns.
        output: the file; replaced if it exists. A folder of Parquet shards must not exist.
        output_format: one of `OUTPUT_FORMATS`, or `"auto"`: by the name of the file.
        image_dir: the folder that image names are relative to. Required if images are read.
        images: `"embed"`: images are read, checked and written into the Parquet file, with their names (`"auto"` for
            Parquet); `"names"`: images that are files are named, not read (`"auto"` for the other formats); `"drop"`: no
            images.
        output_image_dir: a folder for images, for every format but Parquet: images that are embedded in the source are
            written into it, files are copied into it. Names are kept unless they are taken.
        join: columns to append to the text, in this order, if a post has a value in them; they are also kept as columns.
        join_format: format of the joined text, with `{text}`, `{column}` and `{value}`; lists are joined by spaces.
        drop: columns that are not written.
        split: the split of the source, as in `load_posts`.
        format: the format of the source, as in `load_posts`.
        on_invalid: `"error"`, or `"skip"`: skip and report posts that are invalid or cannot be written.
        shard_bytes: a Parquet shard ends when its images and texts have more bytes than this.
        progress: whether to show a progress bar.

    Returns:
        Numbers of what was written and of what was not, and the skipped posts.

    Raises:
        InvalidPostsError: naming the first post at fault, unless `on_invalid="skip"`.
        ValueError: if arguments contradict each other or the source.
        FileNotFoundError: if a file or folder does not exist.

    Example:
        >>> import tempfile
        >>> post = {"id": "1", "text": "my dog", "keyphrases": ["beagles"], "rationale": "A dog."}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     convert_posts([post], f"{folder}/posts_src.txt").summary()
        '1 posts with 0 images. Not written, by number of posts: id 1, rationale 1'
    """
    output_format = _output_format(str(output), output_format)
    images = ("embed" if output_format == "parquet" else "names") if images == "auto" else images
    _check_options(output_format, images, output_image_dir, join_format, on_invalid)
    if kept := {"id", "text", "keyphrases", "images"} & set(drop):
        raise ValueError(f"drop={', '.join(sorted(kept))}: every post has these columns; images='drop' writes no images")
    if isinstance(source, str | Path) and os.path.realpath(source) == os.path.realpath(output):
        raise ValueError(f"output={str(output)!r} would replace the posts that are read: choose another output")
    image_writer = _ImageWriter(images, image_dir, output_image_dir)
    report = ConversionReport()

    def posts() -> Iterator[tuple[dict[str, Any], list[dict[str, str]]]]:
        return read_whole_posts(source, split=split, format=format)

    writer: _Writer
    with ExitStack() as stack:
        if output_format == "parquet":
            if isinstance(source, Iterator):
                raise ValueError("posts for Parquet are read twice: pass a list or a file, not an iterator")
            features = _column_types((post for post, _ in posts()), drop)
            writer = stack.enter_context(_parquet(Path(output), features, shard_bytes))
        else:
            writer = stack.enter_context({"jsonl": _jsonl, "llava": _llava, "cmkp": _cmkp}[output_format](Path(output)))
        met: set[str] = set()
        without_content = 0
        first_seen: dict[int, int] = {}
        repeated: list[str] = []
        for index, (post, findings) in enumerate(tqdm(posts(), unit="post", disable=not progress)):
            met.update(post)
            if first_seen.setdefault(hash(post["id"]), index) != index:
                repeated.append(post["id"])
            without_content += not any(post.get(name) for name in ("text", "keyphrases", "images", "prompt"))
            try:
                if findings:
                    raise _Unwritable(f"{findings[0]['code']}: {findings[0]['message']}")
                _join(post, join, join_format)
                given = len(post["images"])
                lost = Counter(name for name in drop if post.pop(name, None) is not None)
                post["images"] = image_writer(post["images"])
                if given > len(post["images"]):
                    lost["images"] += 1
                lost.update(writer.write(post))
            except (_Unwritable, ImageError, OSError) as error:
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise  # a full disk is not the post's fault
                report.skipped.append(Finding(post["id"], index, getattr(error, "code", "not_convertible"), str(error)))
                if on_invalid == "error":
                    raise _first_invalid(report.skipped[0], output_format) from error
                continue
            report.posts += 1
            report.images += len(post["images"])
            report.not_written.update(lost)
        if not report.posts:
            raise ValueError(f"no post could be written: {report.summary()}" if report.skipped else "there are no posts")
        if without_content == index + 1 and not join and (unread := ", ".join(sorted(met - {*IDENTITY, *CONTENT}))):
            raise ValueError(
                f"no post has a text, keyphrases or an image. These are read from the columns 'text', 'keyphrases' and "
                f"'images'; not read: {unread}"
            )
        if repeated:
            logger.warning("%d posts have the id of an earlier post, first %r", len(repeated), repeated[0])
        if missing := [name for name in join if name not in met]:
            raise ValueError(f"join={missing[0]!r}: no post has this column; the columns are {', '.join(sorted(met))}")
    return report


def _first_invalid(finding: Finding, output_format: str) -> InvalidPostsError:
    return InvalidPostsError(
        f"post {finding.id!r} cannot be written as {output_format}: {finding.message}. Correct it, or skip such posts with "
        "on_invalid='skip' (--on-invalid skip)",
        PostReport(total=finding.index + 1, findings=[finding]),
    )


def _output_format(output: str, format: str) -> str:
    if format == "auto":
        ends = {".jsonl": "jsonl", ".parquet": "parquet", ".json": "llava", "_src.txt": "cmkp"}
        format = next((name for end, name in ends.items() if output.endswith(end)), format)
        if format == "auto":
            raise ValueError(f"the format of {output!r} is unknown ({', '.join(ends)} are known): pass output_format= (--to)")
    if format not in OUTPUT_FORMATS:
        raise ValueError(f"output_format={format!r} is not known: use one of {', '.join(OUTPUT_FORMATS)}")
    if format == "cmkp" and not output.endswith("_src.txt"):
        raise ValueError(f"output={output!r}: CMKP's files are found by their names: name it X_src.txt")
    return format


def _check_options(output_format: str, images: str, output_image_dir: Any, join_format: str, on_invalid: str) -> None:
    if images not in ("embed", "names", "drop"):
        raise ValueError(f"images={images!r} is not known: use 'auto', 'embed', 'names' or 'drop'")
    if images == "embed" and output_format != "parquet":
        raise ValueError(
            f"images='embed': only Parquet files contain images; for {output_format}, output_image_dir= writes them as files"
        )
    if output_image_dir is not None and (output_format == "parquet" or images == "drop"):
        raise ValueError(
            f"output_image_dir={str(output_image_dir)!r}: nothing is written there for {output_format} with images={images!r}"
        )
    if on_invalid not in ("error", "skip"):
        raise ValueError(f"on_invalid={on_invalid!r} is not known: use 'error' or 'skip'")
    try:
        fits = "T" in (shown := join_format.format(text="T", column="", value="V")) and "V" in shown
    except (LookupError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"join_format={join_format!r} must have {{text}} and {{value}}, may have {{column}}, and no others")


def _join(post: dict[str, Any], columns: Sequence[str], join_format: str) -> None:
    for column in columns:
        value = post.get(column)
        value = " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
        if value.strip():
            post["text"] = join_format.format(text=post.get("text") or "", column=column, value=value.strip()).strip()


class _ImageWriter:
    """Reads, copies, names or drops the images of posts."""

    def __init__(self, mode: str, image_dir: str | Path | None, folder: str | Path | None) -> None:
        self.mode = mode
        self.root = None if image_dir is None else os.path.realpath(image_dir)
        if self.root is not None and not os.path.isdir(self.root):
            raise FileNotFoundError(f"image_dir={str(image_dir)!r} is not a folder")
        self.folder = None if folder is None else os.path.realpath(folder)

    def __call__(self, images: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the images as they are to be written; `bytes` is None if they are only named."""
        return [] if self.mode == "drop" else [self._image(image) for image in images]

    def _image(self, image: Mapping[str, Any]) -> dict[str, Any]:
        name, data = image["path"], image["bytes"]
        if data is None and (self.mode == "embed" or self.folder is not None):
            path = locate_image(name, self.root)
            if path is None:
                raise _Unwritable(
                    f"image {name!r} is a file name: pass its folder as image_dir= (--image-dir), or images='names'"
                )
            if error := check_image(path):
                raise error
            data = Path(path).read_bytes()
            if self.root is not None and os.path.isabs(name):
                name = os.path.relpath(path, self.root)
        elif data is not None and self.mode == "embed" and (error := check_image(data)):
            raise error
        if self.folder is not None:
            return {"bytes": None, "path": store_image(data, self.folder, name)}
        return {"bytes": data, "path": name}


# --- Writers ---


class _Writer(Protocol):
    """Writes posts in one format."""

    def write(self, post: dict[str, Any]) -> Iterable[str]:
        """Write a post, and return the columns that the format cannot represent."""


def _names(post: Mapping[str, Any]) -> list[str]:
    """Return the names of a post's images, for a format without embedded images."""
    if any(image["bytes"] is not None for image in post["images"]):
        raise _Unwritable(
            "it has an embedded image: pass a folder to write it to as output_image_dir= (--output-image-dir), or images='drop'"
        )
    return [image["path"] for image in post["images"]]


def _dumped(row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        for name, value in row.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise _Unwritable(
                    f"the column {name!r} has {value!r:.80}, which JSON cannot represent: drop= (--drop) it"
                ) from error
        raise


class _JsonLines:
    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, post: dict[str, Any]) -> Iterable[str]:
        self.file.write(_dumped({**post, "images": _names(post)}) + "\n")
        return ()


@contextmanager
def _jsonl(path: Path) -> Iterator[_Writer]:
    with atomic_files(path) as (partial,), open(partial, "w", encoding="utf-8") as file:
        yield _JsonLines(file)


class _Llava:
    """Writes AimKP's rows. `text` is written only if it could not be read back from the question."""

    def __init__(self, file: IO[str], lines: bool) -> None:
        self.file = file
        self.ends = ("", "", "\n") if lines else ("[\n", ",\n", "")
        self.rows = 0

    def write(self, post: dict[str, Any]) -> Iterable[str]:
        if "keyphrases" not in post or "text" not in post:
            raise _Unwritable("it has no text and keyphrases (a prompt-completion row)")
        task = TASKS["aimkp"]
        names, text = _names(post), post["text"]
        if "<image>" in text:
            raise _Unwritable("its text contains '<image>', which stands for an image in this format")
        for phrase in post["keyphrases"]:
            if "," in phrase or not phrase:
                raise _Unwritable(f"the keyphrase {phrase!r} cannot be part of a list separated by ','")
        row: dict[str, Any] = {"id": post["id"]}
        if names:
            row["image"] = names[0] if len(names) == 1 else names
        question = "<image>" * len(names) + (f"{text}\n{task.instruction}" if text else task.instruction)
        answer = task.separator.join(post["keyphrases"])
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        if text != text.strip() or text.endswith(task.instruction):
            row["text"] = text
        if post.get("rationale") is not None:
            row["rationale"] = post["rationale"]
        row |= {name: value for name, value in post.items() if name not in READ_COLUMNS}
        first, between, end = self.ends
        self.file.write((between if self.rows else first) + _dumped(row) + end)
        self.rows += 1
        return ()


@contextmanager
def _llava(path: Path) -> Iterator[_Writer]:
    lines = path.suffix == ".jsonl"
    with atomic_files(path) as (partial,), open(partial, "w", encoding="utf-8") as file:
        yield _Llava(file, lines)
        file.write("" if lines else "\n]\n")


class _Cmkp:
    """Writes CMKP's raw files, one post per line. A companion file is created at the first post with a value for it."""

    def __init__(self, stem: str, text: IO[str], companions: Mapping[str, Path], stack: ExitStack) -> None:
        self.stem = stem
        self.text = text
        self.paths = companions
        self.stack = stack
        self.companions: dict[str, IO[str]] = {}
        self.rows = 0

    def write(self, post: dict[str, Any]) -> Iterable[str]:
        if "keyphrases" not in post or "text" not in post:
            raise _Unwritable("it has no text and keyphrases (a prompt-completion row)")
        lost = {name for name in post if name not in (*IDENTITY, *CONTENT, *self.paths) and post[name] is not None}
        names = _names(post)
        if len(names) > 1:
            raise _Unwritable(f"it has {len(names)} images, and this format has room for one")
        address = post.get("image_address")
        if names and isinstance(address, str) and address.rpartition("/")[2] == names[0]:
            names = [address]
            lost.discard("image_address")
        elif names and names[0] != names[0].strip().rpartition("/")[2]:
            raise _Unwritable(
                f"the image name {names[0]!r} has a folder or whitespace in it, and this format keeps the last part only"
            )
        for phrase in post["keyphrases"]:
            if not phrase or ";" in phrase:
                raise _Unwritable(f"the keyphrase {phrase!r} cannot be part of a list separated by ';'")
        fields = [post["text"].strip(), ";".join(post["keyphrases"]), *names]
        extra = {name: post[name] for name in self.paths if post.get(name) is not None}
        if any(not isinstance(word, str) or word.split() != [word] for word in extra.get("attributes", ())):
            raise _Unwritable(
                f"attributes={extra['attributes']!r:.80} must be words without whitespace: drop= (--drop) the column"
            )
        if "attributes" in extra:
            extra["attributes"] = " ".join(extra["attributes"])
        for value in (*fields, *extra.values()):
            if not isinstance(value, str) or any(mark in value for mark in ("\n", "\r", "<sep>")):
                raise _Unwritable(
                    f"{value!r:.80} cannot be part of a line of this format: no line breaks, no '<sep>', text only"
                )
        self.text.write("<sep>".join(fields) + "\n")
        for name in extra.keys() - self.companions.keys():
            self.companions[name] = self.stack.enter_context(open(self.paths[name], "w", encoding="utf-8"))
            self.companions[name].write("\n" * self.rows)
        for name, file in self.companions.items():
            file.write(extra.get(name, "") + "\n")
        if post["id"] != f"{self.stem}-{self.rows}":
            lost.add("id")
        if fields[0] != post["text"]:
            lost.add("whitespace around the text")
        if post.get("rationale") is not None:
            lost.add("rationale")
        self.rows += 1
        return lost


@contextmanager
def _cmkp(path: Path) -> Iterator[_Writer]:
    base = str(path).removesuffix("_src.txt")
    if os.path.exists(f"{base}_trg.txt"):
        raise ValueError(f"{base}_trg.txt would be read with the new {path}: move or remove it")
    # The text is the last: without it, the other files are not read.
    companions = {"ocr": f"{base}_ocr_final.txt", "attributes": f"{base}_attribute_cleaned.txt"}
    with atomic_files(*companions.values(), path) as (*beside, partial), ExitStack() as stack:
        text = stack.enter_context(open(partial, "w", encoding="utf-8"))
        yield _Cmkp(Path(base).name, text, dict(zip(companions, beside, strict=True)), stack)


# --- Parquet ---


def _column_types(posts: Iterable[Mapping[str, Any]], drop: Sequence[str]) -> Features:
    """Return the columns of a Parquet file for all posts."""
    kinds: dict[str, Any] = {}
    fixed: set[str] = set()
    buffer: dict[str, list[Any]] = {}

    def type_columns() -> None:
        for name, values in buffer.items():
            if values and not isinstance(kinds.get(name), Json):
                kinds[name] = _common_type(kinds.get(name), extra_type(name, values))
        buffer.clear()

    for number, post in enumerate(posts, start=1):
        for name, value in post.items():
            if name in IDENTITY or name in CONTENT:
                fixed.add(name)
            elif value is not None:
                buffer.setdefault(name, []).append(value)
            else:
                buffer.setdefault(name, [])
        for name in buffer:
            kinds.setdefault(name, None)
        if number % _POSTS_TYPED_AT_ONCE == 0:
            type_columns()
    type_columns()
    columns = {"id": Value("string"), "images": List(Image())}
    columns |= {name: kind for name, kind in CONTENT.items() if name in fixed}
    columns |= {name: Value("string") if kind is None else kind for name, kind in kinds.items()}
    return Features({name: kind for name, kind in columns.items() if name not in drop})


def _common_type(first: Any, second: Any) -> Any:
    """Return a type for the values of both types. Dicts become JSON, since Arrow would give each the keys of all."""
    kinds = [Features({"x": kind}).arrow_schema.field("x").type for kind in (first, second) if kind is not None]
    if any(isinstance(kind, Json) for kind in (first, second)) or any("struct<" in str(kind) for kind in kinds):
        return Json()
    try:
        schema = pa.unify_schemas([pa.schema({"x": kind}) for kind in kinds], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return Json()
    return Features.from_arrow_schema(schema)["x"]


class _Parquet:
    def __init__(self, folder_or_file: Path, features: Features, shard_bytes: int | None) -> None:
        self.path = folder_or_file
        self.features = features
        self.shard_bytes = shard_bytes
        self.posts: list[dict[str, Any]] = []
        self.bytes = self.with_images = self.written = self.shards = 0
        self.file: pq.ParquetWriter | None = None

    def write(self, post: dict[str, Any]) -> Iterable[str]:
        row = {name: post.get(name) for name in self.features}
        for name, kind in self.features.items():
            if isinstance(kind, Json) and row[name] is not None:
                # Encoded here, since `datasets` would read a string that is valid JSON as JSON.
                row[name] = _dumped({name: row[name]})[len(json.dumps(name, ensure_ascii=False)) + 3 : -1]
        self.posts.append(row)
        self.bytes += sum(len(image["bytes"] or b"") for image in post["images"]) + len(post.get("text") or "")
        self.with_images += any(image["bytes"] is not None for image in post["images"])
        if (
            len(self.posts) >= _GROUP_POSTS
            or (self.with_images and len(self.posts) >= _GROUP_POSTS_WITH_IMAGES)
            or self.bytes >= _GROUP_BYTES
        ):
            self.flush()
        return ()

    def flush(self) -> None:
        if not self.posts:
            return
        columns = {name: [post[name] for post in self.posts] for name in self.features}
        table = Dataset.from_dict(columns, features=self.features).data.table
        if self.file is None:
            path = self.path if self.shard_bytes is None else self.path / f"{self.shards:05}.parquet"
            self.file = pq.ParquetWriter(path, table.schema, write_page_index=True)
            self.shards += 1
        self.file.write_table(table, row_group_size=len(self.posts))
        self.written += self.bytes
        self.posts, self.bytes, self.with_images = [], 0, 0
        if self.shard_bytes is not None and self.written >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file, self.written = None, 0


@contextmanager
def _parquet(path: Path, features: Features, shard_bytes: int) -> Iterator[_Writer]:
    if path.suffix == ".parquet":
        with atomic_files(path) as (partial,):
            yield from _closing(_Parquet(partial, features, None))
        return
    if path.exists():
        raise ValueError(f"output={str(path)!r} exists: a folder of shards is created; choose another one or remove it")
    with atomic_folder(path) as partial:
        yield from _closing(_Parquet(partial, features, shard_bytes))


def _closing(writer: _Parquet) -> Iterator[_Writer]:
    try:
        yield writer
        writer.flush()
    finally:
        writer.close()
