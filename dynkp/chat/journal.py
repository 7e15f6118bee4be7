"""Every answer, on disk from the moment it came.

Given   answers with their keys (`ChatRequest.key`).
Gives   whether a key was answered, and with what.
Holds   files only grow, by whole lines, each written as soon as its answer is there: a process that is killed loses no
        answer, and a line torn by a crash of the machine is cut off, and its request asked again. One process writes at a
        time. Memory is that of one small entry per answer, whatever the answers' length.

The folder:

- `answers-00001.jsonl`, ...: one answer a line, its key first. A new file is begun at 256 MiB.
- `answers.index`: where each answer is, in 36 bytes, so that a run need not read a gigabyte to begin. It is made again from
  the answers where it is missing or behind.
- `settled.bin`: 32 bytes per post that needs no more requests: its fingerprint, and the key of its last answer.
- `cursor.json`: where in the posts the last run was reading, a hint of where to look for posts without an answer.
- `lock`: held by the run that writes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynkp.files.json_files import write_json
from dynkp.files.locks import OutputLock

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20
# The start of a line, which is all that is read of it to know what is answered. `json.dumps` writes it so.
_HEAD = re.compile(
    rb'\{"key": "([0-9a-f]{32})", "failed": (true|false), "prompt_tokens": (\d+), "completion_tokens": (\d+), '
    rb'"model": "((?:[^"\\]|\\.)*)"'
)
# A place in the answers: file number, offset, and whether the request failed, in one integer.
_FAILED, _OFFSET_BITS = 1, 40
# An entry of the index: key, place, tokens of prompt and completion, and what stands for the model.
_ENTRY = struct.Struct("<16sQIII")
_ENTRY_TYPE = np.dtype([("key", "V16"), ("place", "<u8"), ("prompt", "<u4"), ("completion", "<u4"), ("model", "<u4")])
_SETTLED = struct.Struct("<16s16s")


class AnswerJournal:
    """The answers of a run and of those before it.

    Args:
        folder: made if need be.
        shard_bytes: size at which a new file is begun.

    Raises:
        BlockingIOError: if another run writes to the folder.
        ValueError: if a line, other than a torn last one, is no answer.

    Example:
        >>> with AnswerJournal("out/rationales.journal") as journal:
        ...     journal.append(bytes(16), {"model": "m", "text": "A dog."})
        ...     journal.read(bytes(16))["text"]
        'A dog.'
    """

    def __init__(self, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES):
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = OutputLock(self.folder / "lock", self.folder)
        self._mutex = threading.Lock()
        self._writer = -1
        self._places: dict[bytes, int] = {}
        self._readers: dict[int, int] = {}
        self._tokens: Counter[tuple[int, str]] = Counter()
        self._index_writer = _opened(self.folder / "answers.index")
        shards = sorted(self.folder.glob("answers-*.jsonl"))
        self._load(shards)
        self._settled_writer = _opened(self.folder / "settled.bin")
        # A post whose answer's line was torn, or deleted, is not settled.
        pairs = _SETTLED.iter_unpack(_whole_entries(self._settled_writer, _SETTLED.size))
        self._settled: dict[bytes, bytes] = {fingerprint: key for fingerprint, key in pairs if key in self._places}
        self._open_shard(_number(shards[-1]) if shards else 1)

    # --- answers ---

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def has_failed(self, key: bytes) -> bool:
        """Whether the last word on a key is a failure."""
        return bool(self._places[key] & _FAILED)

    def append(self, key: bytes, row: Mapping[str, Any]) -> None:
        """Write an answer; where the key has one, this one counts from now on.

        Args:
            key: of the request.
            row: JSON values; of `model`, `prompt_tokens`, `completion_tokens` and `failed` what there is.
        """
        head: dict[str, Any] = {
            "key": key.hex(),
            "failed": bool(row.get("failed")),
            "prompt_tokens": int(row.get("prompt_tokens") or 0),
            "completion_tokens": int(row.get("completion_tokens") or 0),
            "model": str(row.get("model") or ""),
        }
        rest = {name: value for name, value in row.items() if name not in head}
        line = (json.dumps({**head, **rest}) + "\n").encode()  # ASCII: no surrogate can spoil it
        with self._mutex:
            if self._size >= self.shard_bytes:
                os.close(self._writer)
                self._open_shard(self._shard + 1)
            entry = _entry(self._shard, self._size, head)
            _write_all(self._writer, line)
            self._size += len(line)
            self._note(entry)

    def tokens(self, model: str) -> tuple[int, int]:
        """Tokens of prompts and of completions that the model's answers took, all runs together."""
        which = _model_number(model)
        return self._tokens[which, "prompt"], self._tokens[which, "completion"]

    def read(self, key: bytes) -> dict[str, Any]:
        """The answer to a key.

        Raises:
            KeyError: if there is none.
        """
        place = self._places[key] >> 1
        shard, offset = place >> _OFFSET_BITS, place & ((1 << _OFFSET_BITS) - 1)
        with self._mutex:
            if shard not in self._readers:
                self._readers[shard] = os.open(self._path(shard), os.O_RDONLY)
            reader = self._readers[shard]
        size = 4096
        while b"\n" not in (line := os.pread(reader, size, offset)) and len(line) == size:
            size *= 4
        try:
            row = json.loads(line.partition(b"\n")[0])
            if row["key"] == key.hex():
                return row
        except ValueError as error:
            raise ValueError(
                f"{self._path(shard)}, byte {offset}: not an answer ({error}); delete the line and answers.index, and its "
                "request is sent again"
            ) from error
        raise ValueError(
            f"{self._path(shard)} was changed: at byte {offset} is no answer {key.hex()}; delete answers.index beside it"
        )

    # --- posts ---

    def settled(self, fingerprint: bytes) -> bytes | None:
        """The key of a post's last answer, if the post needs no more requests."""
        return self._settled.get(fingerprint)

    def settle(self, fingerprint: bytes, key: bytes) -> None:
        """Note that a post needs no more requests. To lose this costs time, no requests."""
        with self._mutex:
            if self._settled.get(fingerprint) != key:
                _write_all(self._settled_writer, fingerprint + key)
                self._settled[fingerprint] = key

    def cursor(self) -> dict[str, Any]:
        """What `set_cursor` last wrote; empty if nothing."""
        try:
            found = json.loads((self.folder / "cursor.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def set_cursor(self, cursor: Mapping[str, Any]) -> None:
        """Note where the run is reading."""
        write_json(self.folder / "cursor.json", dict(cursor))

    # --- files ---

    def sync(self) -> None:
        """Force what was written to the disk, for the case that the machine, not the process, dies."""
        os.fsync(self._writer)

    def close(self) -> None:
        """Close the files; another run may have them."""
        if self._writer >= 0:
            self.sync()
            for file in (self._writer, self._index_writer, self._settled_writer, *self._readers.values()):
                os.close(file)
            self._writer = -1
            self._lock.close()

    def __enter__(self) -> AnswerJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, shard: int) -> Path:
        return self.folder / f"answers-{shard:05d}.jsonl"

    def _open_shard(self, shard: int) -> None:
        self._shard = shard
        self._writer = _opened(self._path(shard))
        self._size = os.fstat(self._writer).st_size

    def _note(self, entry: bytes) -> None:
        _write_all(self._index_writer, entry)
        key, place, prompt, completion, model = _ENTRY.unpack(entry)
        self._places[key] = place
        self._tokens[model, "prompt"] += prompt
        self._tokens[model, "completion"] += completion

    def _load(self, shards: Sequence[Path]) -> None:
        for path in shards:
            _repair(path)
        index = np.frombuffer(_whole_entries(self._index_writer, _ENTRY.size), _ENTRY_TYPE)
        ends = self._indexed_ends(index, shards)
        if ends is None:
            logger.info("%s: the index is made anew", self.folder)
            os.ftruncate(self._index_writer, 0)
            index, ends = index[:0], {}
        self._places = dict(zip(index["key"].tolist(), index["place"].tolist(), strict=True))
        for model in np.unique(index["model"]):
            for name in ("prompt", "completion"):
                self._tokens[int(model), name] = int(index[name][index["model"] == model].sum(dtype=np.uint64))
        for path in shards:
            self._index(path, ends.get(_number(path), 0))

    def _indexed_ends(self, index: NDArray[Any], shards: Sequence[Path]) -> dict[int, int] | None:
        """Up to which byte each file is in the index; None if the index belongs to other files."""
        numbers = index["place"] >> np.uint64(_OFFSET_BITS + 1)
        ends = {}
        for path in shards:
            entries = index[numbers == _number(path)]
            if not len(entries):
                continue
            last = entries[entries["place"].argmax()]
            with path.open("rb") as file:
                offset = (int(last["place"]) >> 1) & ((1 << _OFFSET_BITS) - 1)
                file.seek(offset)
                line = file.readline()
            head = _HEAD.match(line)
            if head is None or bytes.fromhex(head[1].decode()) != last["key"].tobytes():
                return None
            ends[_number(path)] = offset + len(line)
        return ends if len(index) == 0 or set(np.unique(numbers).tolist()) <= set(ends) else None

    def _index(self, path: Path, start: int) -> None:
        """Put what the index lacks of a file into it."""
        with path.open("rb", buffering=1 << 20) as file:
            file.seek(start)
            for line in file:
                head = _HEAD.match(line)
                if head is None:
                    raise ValueError(
                        f"{path}, byte {start}: not an answer: {line[:80]!r}. Only a torn last line is repaired; delete the "
                        "line and answers.index, and its request is sent again."
                    )
                found = {
                    "key": head[1].decode(),
                    "failed": head[2] == b"true",
                    "prompt_tokens": int(head[3]),
                    "completion_tokens": int(head[4]),
                    "model": json.loads(b'"%s"' % head[5]),
                }
                self._note(_entry(_number(path), start, found))
                start += len(line)


def _entry(shard: int, offset: int, head: Mapping[str, Any]) -> bytes:
    place = (shard << _OFFSET_BITS | offset) << 1 | head["failed"]
    most = (1 << 32) - 1
    tokens = (min(head["prompt_tokens"], most), min(head["completion_tokens"], most))
    return _ENTRY.pack(bytes.fromhex(head["key"]), place, *tokens, _model_number(head["model"]))


def _model_number(model: str) -> int:
    return zlib.crc32(model.encode("utf-8", "surrogatepass"))


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)


def _whole_entries(file: int, width: int) -> bytes:
    """The content of a file of entries; what a killed run left of a last one is cut off."""
    size = os.fstat(file).st_size
    if torn := size % width:
        os.ftruncate(file, size - torn)
    data = b""
    while block := os.pread(file, (size - torn) - len(data), len(data)):
        data += block
    return data


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _write_all(file: int, data: bytes) -> None:
    """Append all of it, or nothing: what a full disk let through must not stand before the next line."""
    left = data
    try:
        while left:  # a full disk or a signal may let through a part
            left = left[os.write(file, left) :]
    except OSError:
        os.ftruncate(file, os.fstat(file).st_size - (len(data) - len(left)))
        raise


def _repair(path: Path) -> None:
    """Cut off a last line without its line break, however long."""
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - (1 << 16))
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            logger.info("%s: its last line was torn; its request is sent again.", path)
            file.truncate(end)
