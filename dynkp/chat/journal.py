"""The journal: every answer of a server, on disk from the moment it came.

A journal is a folder:

- `answers-00001.jsonl`, ...: one answer a line, its key first. The files only grow, by whole lines; a new one is begun at
  256 MiB. They are the truth.
- `index.sqlite`: where each answer is, and which posts need no more requests (`dynkp.chat.answer_index`), so that a run need
  not read gigabytes to begin. It is built again from the answers where it is missing, damaged or behind.
- `cursor.json`: where in the posts the last run was reading, a hint of where to look for posts without an answer.
- `lock`: held by the run that writes; one run at a time has a journal.

A line is written as soon as its answer is there, so a process that is killed loses no answer. A line torn by a crash of the
machine is cut off, and its request is sent again. Memory does not grow with the number of answers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dynkp.chat.answer_index import AnswerIndex, Entry
from dynkp.files.json_files import parse_json, read_json, write_json
from dynkp.files.json_lines import LineAppender, repair_last_line
from dynkp.files.locks import OutputLock

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20
# The start of a line, which is all that is read of it to know what is answered. `json.dumps` writes it so.
_HEAD = re.compile(
    rb'\{"key": "([0-9a-f]{32})", "failed": (true|false), "prompt_tokens": (\d+), "completion_tokens": (\d+), '
    rb'"model": "((?:[^"\\]|\\.)*)"'
)
_MOST_TOKENS = (1 << 32) - 1  # of one answer: what a server claims must not overflow the sum


class AnswerJournal:
    """The answers of a run and of those before it.

    Methods may be called by several threads.

    Args:
        folder: The journal's folder; created if it does not exist.
        shard_bytes: Size in bytes at which a new file is begun.

    Raises:
        BlockingIOError: If another run writes to the folder.
        ValueError: If a line other than a torn last one is not an answer; the message names file and byte.

    Example:
        >>> import tempfile
        >>> with AnswerJournal(tempfile.mkdtemp()) as journal:
        ...     journal.append(bytes(16), {"model": "m", "text": "A dog."})
        ...     journal.read(bytes(16))["text"]
        'A dog.'
    """

    def __init__(self, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES):
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mutex = threading.Lock()
        self._readers: dict[int, int] = {}
        self._closed = False
        with contextlib.ExitStack() as stack:  # an error here closes the index and releases the lock
            stack.enter_context(OutputLock(self.folder / "lock", self.folder))
            files = sorted(self.folder.glob("answers-*.jsonl"))
            for file in files:
                if repair_last_line(file):
                    logger.info("%s: its last line was torn; its request is sent again.", file)
            try:
                self._index = AnswerIndex(self.folder / "index.sqlite")
                stack.callback(self._index.close)
                self._complete_index(files)
            except sqlite3.Error as error:
                raise OSError(f"{self.folder / 'index.sqlite'} cannot be written: {error}") from error
            self._open_file(_number(files[-1]) if files else 1)
            self._index_and_lock = stack.pop_all()

    # --- answers ---

    def __contains__(self, key: bytes) -> bool:
        with self._mutex:
            return self._index.find(key) is not None

    def __len__(self) -> int:
        with self._mutex:
            return len(self._index)

    def has_failed(self, key: bytes) -> bool:
        """Whether the last answer to a request is a failure.

        Args:
            key: The request's key (`ChatRequest.key`).
        """
        return key in self._index.failed

    def append(self, key: bytes, row: Mapping[str, Any]) -> None:
        """Write an answer. Where the key has one already, the new one counts from now on.

        Args:
            key: The request's key.
            row: JSON values. `model`, `prompt_tokens`, `completion_tokens` and `failed` may be missing.

        Raises:
            OSError: If the answer cannot be written, as on a full disk; no part of it stays in the journal.
        """
        head: dict[str, Any] = {
            "key": key.hex(),
            "failed": bool(row.get("failed")),
            "prompt_tokens": int(row.get("prompt_tokens") or 0),
            "completion_tokens": int(row.get("completion_tokens") or 0),
            "model": str(row.get("model") or ""),
        }
        rest = {name: value for name, value in row.items() if name not in head}
        line = (json.dumps({**head, **rest}) + "\n").encode()  # ASCII: surrogates are escaped
        with self._mutex:
            if self._appender.size >= self.shard_bytes:
                self._appender.sync()
                self._appender.close()
                self._open_file(self._file + 1)
            entry = _entry(line, self._file, self._appender.append(line))
            assert entry is not None
            self._index.add(entry)

    def read(self, key: bytes) -> dict[str, Any]:
        """The last answer to a request.

        Args:
            key: The request's key.

        Returns:
            The row, as it was given to `append`, with its key.

        Raises:
            KeyError: If there is none.
            ValueError: If its line was changed since it was written.
        """
        with self._mutex:
            place = self._index.find(key)
            if place is None:
                raise KeyError(key.hex())
            file, offset = place
            if file not in self._readers:
                self._readers[file] = os.open(self._path(file), os.O_RDONLY)
            reader = self._readers[file]
        size = 4096
        while b"\n" not in (line := os.pread(reader, size, offset)) and len(line) == size:
            size *= 4
        where = f"{self._path(file)}, byte {offset}"
        try:
            row = parse_json(line.partition(b"\n")[0], f"{where}: not an answer")
        except ValueError as error:
            raise ValueError(f"{error}; delete the line, and its request is sent again") from error
        if not isinstance(row, dict) or row.get("key") != key.hex():
            raise ValueError(
                f"{self._path(file)} was changed: at byte {offset} is no answer {key.hex()}; delete index.sqlite beside it"
            )
        return row

    def tokens(self, model: str) -> tuple[int, int]:
        """Numbers of tokens of all answers of a model, those of earlier runs included.

        Args:
            model: The model's name.

        Returns:
            Tokens of prompts, and tokens of answers.
        """
        name = json.dumps(model)[1:-1]
        return self._index.tokens[name, "prompt"], self._index.tokens[name, "completion"]

    # --- posts ---

    def settled(self, fingerprint: bytes) -> bytes | None:
        """Key of a post's last answer, if the post needs no more requests.

        Args:
            fingerprint: The post's fingerprint (`SourcePost.fingerprint`).

        Returns:
            The key, or None if the post may need a request.
        """
        with self._mutex:
            return self._index.settled(fingerprint)

    def settle(self, fingerprint: bytes, key: bytes) -> None:
        """Note that a post needs no more requests.

        A process that is killed loses the notes of the last seconds, which takes time, but no request: the answers are there.

        Args:
            fingerprint: The post's fingerprint.
            key: Key of its last answer.
        """
        with self._mutex:
            self._index.settle(fingerprint, key)

    def cursor(self) -> dict[str, Any]:
        """What `set_cursor` last wrote; empty if there is nothing that can be read."""
        try:
            found = read_json(self.folder / "cursor.json")
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def set_cursor(self, cursor: Mapping[str, Any]) -> None:
        """Note where the run is reading.

        Args:
            cursor: JSON values.
        """
        write_json(self.folder / "cursor.json", dict(cursor))

    # --- files ---

    def sync(self) -> None:
        """Force what was written to the disk, so that it survives the machine too, and commit the index."""
        self._appender.sync()
        with self._mutex:
            self._index.commit()

    def close(self) -> None:
        """Close the files, and release the lock. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self.sync()
            self._appender.close()
            for reader in self._readers.values():
                os.close(reader)
            self._index_and_lock.close()

    def __enter__(self) -> AnswerJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, file: int) -> Path:
        return self.folder / f"answers-{file:05d}.jsonl"

    def _open_file(self, file: int) -> None:
        self._file = file
        self._appender = LineAppender(self._path(file))

    def _complete_index(self, files: Sequence[Path]) -> None:
        """Add to the index the lines that it lacks; build it again where its last lines are not those of the files."""
        starts = {_number(file): 0 for file in files}
        for number, offset, key in self._index.last_answers():
            line = _line_at(self._path(number), offset)
            if (entry := _entry(line, number, offset)) is None or entry.key != key:
                logger.info("%s: the index is built again", self.folder)
                self._index.rebuild(chain.from_iterable(_entries(file, 0) for file in files))
                return
            starts[number] = offset + len(line)
        for file in files:
            if starts[_number(file)] < file.stat().st_size:
                self._index.extend(_entries(file, starts[_number(file)]))


def _number(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def _line_at(file: Path, offset: int) -> bytes:
    if not file.exists():
        return b""
    with file.open("rb") as lines:
        lines.seek(offset)
        return lines.readline()


def _entries(path: Path, offset: int) -> Iterator[Entry]:
    """What the index holds of a file's lines, from a byte on."""
    file = _number(path)
    with path.open("rb", buffering=1 << 20) as lines:
        lines.seek(offset)
        for line in lines:
            if (entry := _entry(line, file, offset)) is None:
                raise ValueError(
                    f"{path}, byte {offset}: not an answer: {line[:80]!r}. Only a torn last line is repaired; delete the line, "
                    "and its request is sent again."
                )
            yield entry
            offset += len(line)


def _entry(line: bytes, file: int, offset: int) -> Entry | None:
    """What the index holds of a line; None if it is not an answer."""
    if (head := _HEAD.match(line)) is None:
        return None
    key, failed, prompt, completion, model = head.groups()
    tokens = (min(int(prompt), _MOST_TOKENS), min(int(completion), _MOST_TOKENS))
    return Entry(bytes.fromhex(key.decode()), file, offset, failed == b"true", model.decode(), *tokens)
