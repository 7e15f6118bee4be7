r"""JSON Lines files: read, written atomically, appended to, and repaired after a crash.

A row is complete when its line ends in `\n`. A process that is killed while it appends leaves a torn last line, one without
a line end; `repair_last_line` removes it before the next process appends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dynkp.files.atomic import atomic_file_or_stream
from dynkp.files.json_files import parse_json

_BLOCK = 1 << 16


def json_line(row: Any, *, allow_nan: bool = True) -> str:
    r"""One row as a line of a JSON Lines file, with its line end.

    Args:
        row: A value that JSON can hold.
        allow_nan: Whether NaN and infinity are written, which Python reads and other readers of JSON may not; otherwise
            they raise `ValueError`.

    Returns:
        The line; characters beyond ASCII are kept as they are.

    Example:
        >>> json_line({"id": "1", "text": "café"})
        '{"id": "1", "text": "café"}\n'
    """
    return json.dumps(row, ensure_ascii=False, allow_nan=allow_nan) + "\n"


def read_json_lines(path: str | os.PathLike[str], *, skip_torn: bool = False) -> Iterator[tuple[str, Any]]:
    r"""Read a JSON Lines file row by row.

    Args:
        path: The file.
        skip_torn: Whether to leave out a torn last line, as of a file that is still being written. Otherwise such a line is
            read like any other.

    Yields:
        `(where, row)`: the file and line number for errors (`posts.jsonl, line 3`), and the parsed line.

    Raises:
        ValueError: If a line is not valid JSON; the message names file and line. Blank lines are passed over.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> written = file.write_text('{"id": 1}\n{"id": 2}\n{"id"')
        >>> [row for _, row in read_json_lines(file, skip_torn=True)]
        [{'id': 1}, {'id': 2}]
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if skip_torn and not line.endswith(b"\n"):
                return
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = parse_json(line.rstrip(b"\r\n"), where)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise
                raise ValueError(f"{error}; the line is torn: what wrote it was killed, or is still writing") from error
            yield where, row


def write_json_lines(
    path: str | os.PathLike[str], rows: Iterable[Any], *, errors: str = "strict", allow_nan: bool = True
) -> int:
    r"""Write a JSON Lines file atomically.

    Args:
        path: The file; missing folders are created. A pipe or a device such as `/dev/stdout` is written to, not replaced.
        rows: Values that JSON can hold, one for each line.
        errors: How to encode surrogates, as for `open`: `"strict"` raises `UnicodeEncodeError`, `"replace"` writes `?`.
        allow_nan: As in `json_line`.

    Returns:
        The number of rows.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> write_json_lines(file, [{"id": 1}, {"id": 2}])
        2
        >>> file.read_text()
        '{"id": 1}\n{"id": 2}\n'
    """
    count = 0
    with atomic_file_or_stream(path) as partial, partial.open("w", encoding="utf-8", errors=errors, newline="\n") as file:
        for row in rows:
            file.write(json_line(row, allow_nan=allow_nan))
            count += 1
    return count


class LineAppender:
    r"""Appends whole lines to a file, all of them or none.

    Lines are in the hands of the operating system when `append` returns: they survive the death of the process, and with
    `sync` also that of the machine.

    Args:
        path: The file; created if it does not exist. Repair a torn last line (`repair_last_line`) first.

    Attributes:
        path: The file.
        size: Its length in bytes, where the next line begins.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> with LineAppender(file) as appender:
        ...     appender.append(b'{"id": 1}\n'), appender.append(b'{"id": 2}\n'), appender.size
        (0, 10, 20)
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self.size = os.fstat(self._file).st_size

    def append(self, lines: bytes) -> int:
        """Append lines.

        Args:
            lines: One or several lines, each with its line end.

        Returns:
            The offset in bytes at which they begin.

        Raises:
            OSError: If not all of `lines` could be written, as on a full disk; none of it stays in the file.
        """
        start, left = self.size, lines
        try:
            while left:  # a full disk or a signal may let through a part
                left = left[os.write(self._file, left) :]
        except BaseException:
            os.ftruncate(self._file, start)
            raise
        self.size += len(lines)
        return start

    def append_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows as JSON lines, all of them or none.

        Args:
            rows: Mappings that JSON can hold.

        Raises:
            OSError: As for `append`.
        """
        self.append("".join(map(json_line, rows)).encode())

    def sync(self) -> None:
        """Wait until what was appended is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> LineAppender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def repair_last_line(path: str | os.PathLike[str], is_complete: Callable[[bytes], bool] | None = None) -> bool:
    r"""Remove a torn last line.

    Only one process may do so, and none may append at the same time: hold the file's lock (`dynkp.files.locks`).

    Args:
        path: The file.
        is_complete: Tells of a last line without its line end whether only the line end is missing; it is then added.
            Without this function every last line without a line end is removed.

    Returns:
        Whether a line was removed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> written = file.write_text('{"id": 1}\n{"id"')
        >>> repair_last_line(file), file.read_text()
        (True, '{"id": 1}\n')
    """
    with open(path, "rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:  # from the end backwards: the file may be large, and so may the line
            start = max(0, end - _BLOCK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end == size:
            return False
        if is_complete is not None:
            file.seek(end)
            if is_complete(file.read()):
                file.write(b"\n")
                return False
        file.truncate(end)
        return True
