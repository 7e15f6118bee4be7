"""A stream of posts, read one by one from a JSON Lines file of any size.

Only the line being read is kept in memory. A line that is not a post becomes a post with a problem and does not end the run.
A post's fingerprint changes with its line and with the size and time of its image files; it costs no more than parsing the
line, since neither images nor prompts are needed for it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dynkp.chat.request import KEY_BYTES
from dynkp.data.rows import CONTENT, LOAD_FINDINGS, Normaliser
from dynkp.files.json_files import parse_json

# Columns that this package writes for itself: from a file they would pass as its own findings.
_RESERVED = {LOAD_FINDINGS, "image_urls"}
_DEEPEST = 100  # levels of JSON; deeper values overflow the stack of one library or another
_URL = re.compile(r"https?://", re.IGNORECASE)


class SourcePost:
    """A post as a line of the posts file.

    Args:
        stream: The stream that the line belongs to.
        index: The post's number in the file, from 0; empty lines do not count.
        end: The offset in bytes at which the line ends.
        line: The line, without its line end.

    Attributes:
        row: The parsed line without reserved columns; empty if it is not a JSON object, and only the id if it is nested too
            deep.
        problem: Why the line is not a JSON object, or None.
    """

    def __init__(self, stream: PostStream, index: int, end: int, line: bytes):
        self.stream, self.index, self.end, self.line = stream, index, end, line
        self.row: dict[str, Any] = {}
        self.problem: str | None = None
        where = f"{stream.path}, post {index}"
        try:
            row = parse_json(line, where)
            if isinstance(row, dict) and _depth_exceeds(line, row):
                self.problem = f"{where}: JSON nested more than {_DEEPEST} levels deep: {line[:80]!r}"
                if isinstance(row.get("id"), str | int):  # enough to name the post
                    self.row = {"id": row["id"]}
            elif isinstance(row, dict):
                self.row = {name: value for name, value in row.items() if name not in _RESERVED}
            else:
                self.problem = f"{where}: a row must be a JSON object, got {line[:80]!r}"
        except ValueError as error:
            self.problem = str(error)

    @property
    def id(self) -> str:
        """The post's id; `<file>-<number>` if it has none."""
        given = self.row.get("id")
        return str(given) if given is not None and given != "" else f"{self.stream.stem}-{self.index}"

    def fingerprint(self, settings: bytes) -> bytes:
        """Digest of the post and of the settings of the run, `KEY_BYTES` bytes long.

        Args:
            settings: Digest of everything else that the post's requests depend on.
        """
        digest = hashlib.blake2b(settings, digest_size=KEY_BYTES)
        digest.update(self.line)
        for name in self._image_names():
            if (path := self.stream.path_of(name)) is not None:
                try:
                    status = os.stat(path)
                    digest.update(b"%d %d " % (status.st_size, status.st_mtime_ns))
                except (OSError, ValueError):
                    digest.update(b"missing ")
        return digest.digest()

    @cached_property
    def post(self) -> dict[str, Any]:
        """The post in the format of `dynkp.data.rows`, with its other columns, and `image_urls` with addresses of images."""
        row, urls = self.row, []
        if self.stream.allow_image_urls:
            names = self._image_names()
            urls = [name for name in names if isinstance(name, str) and _URL.match(name)]
            if urls:
                row = {key: value for key, value in row.items() if key != "image"}
                row["images"] = [name for name in names if name not in urls]
        try:
            post = self.stream.normaliser(row, f"{self.stream.stem}-{self.index}")
            _check_images(post["images"])
        except Exception as error:  # whatever a post contains, it is a finding of this post and ends no run
            message = f"post {self.id!r} cannot be read ({type(error).__name__}: {str(error)[:200]})"
            post = self.stream.normaliser({}, self.id) | {LOAD_FINDINGS: [{"code": "wrong_type", "message": message}]}
        return {**self.row, **post, "image_urls": urls}

    def findings(self) -> list[str]:
        """Messages about what is wrong with the post's columns; empty for a valid post."""
        if self.problem is not None:
            return [self.problem]
        return [finding["message"] for finding in self.post[LOAD_FINDINGS]]

    def _image_names(self) -> list[Any]:
        names = []
        for column in ("images", "image"):
            value = self.row.get(column)
            for item in value if isinstance(value, list) else [value]:
                name = item.get("path") if isinstance(item, Mapping) else item
                if name:
                    names.append(name)
        return names


def _check_images(images: list[Mapping[str, Any]]) -> None:
    for image in images:
        if image["bytes"] is not None and not isinstance(image["bytes"], bytes):
            raise ValueError(f"an image's bytes cannot be of JSON's type {type(image['bytes']).__name__}: give its path")


def _depth_exceeds(line: bytes, row: Any) -> bool:
    """Whether a parsed line is nested deeper than allowed; a line with few brackets is not searched."""
    if line.count(b"[") + line.count(b"{") <= _DEEPEST:
        return False
    level = [row]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for value in level:
            children = value.values() if isinstance(value, dict) else value
            inner += [child for child in children if isinstance(child, dict | list)]
        if not inner:
            return False
        level = inner
    return True


class PostStream:
    r"""A stream of the posts in a file; every iteration reads the file again.

    Args:
        path: A JSON Lines file of posts.
        image_dir: The folder that the names of image files are relative to.
        shard: `(i, n)` with i from 1 to n: every n-th post from the i-th on. Posts keep their numbers in the file.
        limit: Number of the file's posts to read, from the first on; None for all.
        allow_image_urls: Whether an image may be an address, from which the server fetches it.

    Raises:
        FileNotFoundError: If the file or the folder does not exist.
        ValueError: If the file is not JSON Lines, such as a JSON array, or `shard` is out of range.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "posts.jsonl"
        >>> written = file.write_text('{"id": "1", "text": "my dog"}\n{"text": "my cat"}\n')
        >>> [source.id for source in PostStream(file)]
        ['1', 'posts-1']
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_dir: str | Path | None = None,
        *,
        shard: tuple[int, int] = (1, 1),
        limit: int | None = None,
        allow_image_urls: bool = False,
    ):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
        with self.path.open("rb") as file:
            first = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if first and not first.startswith(b"{"):
            raise ValueError(f"{path}: posts must be JSON Lines, got {first[:40]!r}; dynkp convert makes them")
        if not 1 <= shard[0] <= shard[1]:
            raise ValueError(f"shard={shard!r}: the first number must be from 1 to the second")
        self.stem = self.path.stem or "post"
        self.shard, self.limit, self.allow_image_urls = shard, limit, allow_image_urls
        self.normaliser = Normaliser({*CONTENT, "images", "id"}, image_dir=image_dir, stem=self.stem, stream=True)

    def path_of(self, name: Any) -> str | None:
        """Path of an image file by its name in a row; None if it cannot be one. The normaliser checks if it is allowed."""
        if not isinstance(name, str) or (self.normaliser.root is None and not os.path.isabs(name)):
            return None
        return os.path.join(self.normaliser.root or "", name)

    def __len__(self) -> int:
        """Number of posts of this shard; reads the file once."""
        with self.path.open("rb", buffering=1 << 20) as file:
            total = sum(not line.isspace() for line in file)
        total = total if self.limit is None else min(total, self.limit)
        number, shards = self.shard
        return max(0, (total - number) // shards + 1)

    def index_in_file(self, index: int) -> int:
        """Convert a post's number in the shard to its number in the file, both from 0."""
        return index * self.shard[1] + self.shard[0] - 1

    def index_in_shard(self, index: int) -> int:
        """Convert a post's number in the file to its number in the shard, both from 0."""
        return index // self.shard[1]

    def __iter__(self) -> Iterator[SourcePost]:
        return self.read()

    def read(self, offset: int = 0, index: int = 0) -> Iterator[SourcePost]:
        """Read posts from an offset in the file on.

        Args:
            offset: The offset in bytes of the first line to read.
            index: The number in the file of that line's post.

        Yields:
            The posts of this shard.
        """
        number, shards = self.shard
        with self.path.open("rb", buffering=1 << 20) as file:
            file.seek(offset)
            end = offset
            for line in file:
                end += len(line)
                if index == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not (line := line.strip()):
                    continue
                if self.limit is not None and index >= self.limit:
                    return
                if index % shards == number - 1:
                    yield SourcePost(self, index, end, line)
                index += 1

    def identity(self) -> dict[str, Any]:
        """Values that change when an offset noted earlier may no longer be the start of the same post."""
        status = self.path.stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "shard": list(self.shard), "limit": self.limit}
