"""Posts read one by one from a JSON Lines file, however many there are.

Given   the file, and the folder of its pictures.
Gives   each post with its place in the file and a fingerprint; the whole post on demand.
Holds   nothing is kept but the line being read; a line that is no post is a post with a problem, not the end of the run;
        the fingerprint of a post changes with its line and with the size and time of its pictures, and costs no more than
        parsing the line: neither is a picture read for it, nor a prompt written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dynkp.chat.request import KEY_BYTES
from dynkp.data.rows import CONTENT, LOAD_FINDINGS, Normaliser

_URL = re.compile(r"https?://", re.IGNORECASE)


class SourcePost:
    """A line of the posts file.

    Attributes:
        index: its number, from 0; empty lines are not counted.
        end: the byte behind it.
        row: the line as it was parsed; empty where that failed.
        problem: why it could not be parsed, or None.
    """

    def __init__(self, stream: PostStream, index: int, end: int, line: bytes):
        self.stream, self.index, self.end, self.line = stream, index, end, line
        self.row: dict[str, Any] = {}
        self.problem: str | None = None
        try:
            row = json.loads(line)
            if isinstance(row, dict):
                self.row = row
            else:
                self.problem = f"{stream.path}, post {index}: a row must be a JSON object, got {line[:80]!r}"
        except (ValueError, RecursionError) as error:
            self.problem = f"{stream.path}, post {index}: not valid JSON ({error})"

    @property
    def id(self) -> str:
        """The post's id, or `<file>-<number>`."""
        given = self.row.get("id")
        return str(given) if given is not None and given != "" else f"{self.stream.stem}-{self.index}"

    def fingerprint(self, settings: bytes) -> bytes:
        """What tells whether the post is the one that was asked about.

        Args:
            settings: stands for all else that requests depend on.
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
        """The post in the format of `dynkp.data.rows`, its other columns with it; `image_urls` holds addresses."""
        row, urls = self.row, []
        if self.stream.allow_image_urls:
            names = self._image_names()
            urls = [name for name in names if isinstance(name, str) and _URL.match(name)]
            if urls:
                row = {key: value for key, value in row.items() if key != "image"}
                row["images"] = [name for name in names if name not in urls]
        post = self.stream.normaliser(row, f"{self.stream.stem}-{self.index}")
        return {**self.row, **post, "image_urls": urls}

    def findings(self) -> list[str]:
        """What is wrong with the post's form, in words."""
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


class PostStream:
    """A posts file.

    Args:
        path: a JSON Lines file of posts.
        image_dir: the folder that image names are relative to.
        shard: `(i, n)`, i from 1 to n: every n-th post from the i-th on; posts keep their numbers.
        limit: only the file's first posts, this many; None for all.
        allow_image_urls: whether a picture may be an address, which the server fetches.

    Raises:
        FileNotFoundError: if the file or the folder is missing.
        ValueError: if the file is a JSON array or no JSON at all, or the shard is none.

    Example:
        >>> [source.id for source in PostStream("posts.jsonl")]
        ['1', '2', '3']
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
        """Where a picture lies, if there; whether it may lie there is for the normaliser to say."""
        if not isinstance(name, str) or (self.normaliser.root is None and not os.path.isabs(name)):
            return None
        return os.path.join(self.normaliser.root or "", name)

    def __len__(self) -> int:
        """How many posts this shard has; reads the file once."""
        with self.path.open("rb", buffering=1 << 20) as file:
            total = sum(not line.isspace() for line in file)
        total = total if self.limit is None else min(total, self.limit)
        number, shards = self.shard
        return max(0, (total - number) // shards + 1)

    def index_of(self, place: int) -> int:
        """The number in the file of the shard's post at a place, both from 0."""
        return place * self.shard[1] + self.shard[0] - 1

    def place_of(self, index: int) -> int:
        """The place in the shard of the post with this number in the file."""
        return index // self.shard[1]

    def __iter__(self) -> Iterator[SourcePost]:
        return self.read()

    def read(self, offset: int = 0, index: int = 0) -> Iterator[SourcePost]:
        """The posts from a place in the file.

        Args:
            offset: the byte to begin at; the start of a line.
            index: the number of the post there.
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
        """What tells whether a place in the file, noted earlier, is still the start of the same post."""
        status = self.path.stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "shard": list(self.shard), "limit": self.limit}
