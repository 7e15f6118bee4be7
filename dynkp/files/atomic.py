"""Atomic writes: a file, or several files together, appear under their final names only when they are complete.

Data is first written to partial files, hidden files `.NAME.<host>-<process>-<number>.partial` beside the final ones, and then
renamed. The name of a partial file is unique, so that two processes that write the same file do not mix their data. Partial
files are removed when writing fails. Those of a killed process are removed by the next atomic write of the same file on the
same host.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_PARTIAL_NAME = re.compile(rf"\.(?P<name>.+)\.{_HOST}-(?P<process>\d+)-\d+\.partial", re.DOTALL)
# Bytes of the final name that a partial name repeats: file systems allow 255 in all.
_NAME_BYTES = 200
_numbers = itertools.count()
# The partial files that this process is writing. Others with its process number are left from a killed process.
_being_written: set[str] = set()


@contextmanager
def atomic_files(*paths: str | os.PathLike[str]) -> Iterator[tuple[Path, ...]]:
    """Write one or several files atomically.

    The files replace older ones of the same names when the `with` block ends without an error, and only then. Of several
    files, all older ones are removed before the first new one appears: if the process is killed at that moment, some files
    may be missing, but a new file never lies beside an old one.

    Args:
        *paths: The final names. Missing folders are created; symbolic links are followed. Name the file whose presence
            tells that the output is complete last.

    Yields:
        The partial files to write to, one for each of `paths`. Of several files, one that is not created does not exist under
        its final name either: an older file of that name is removed.

    Raises:
        ValueError: If one of `paths` exists and is not a regular file, such as a folder or a named pipe.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_files(folder / "a.txt", folder / "b.txt") as (a, b):
        ...     written = a.write_text("1"), b.write_text("2")
        ...     (folder / "a.txt").exists()
        False
        >>> (folder / "a.txt").read_text(), (folder / "b.txt").read_text()
        ('1', '2')
    """
    targets = [Path(os.path.realpath(path)) for path in paths]
    for target in targets:
        if target.exists() and not target.is_file():
            raise ValueError(f"{target} is not a file: name another one, it would be replaced")
        target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(targets)
    with _partial_paths(targets) as partials:
        yield partials
        for partial in partials:
            if partial.exists():
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
        if len(targets) > 1:
            for target in reversed(targets):
                target.unlink(missing_ok=True)
        for partial, target in zip(partials, targets, strict=True):
            if partial.exists():
                os.replace(partial, target)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Create a folder of files that appears only when all of them are complete.

    Args:
        path: The final name. Missing parent folders are created.

    Yields:
        The partial folder to write to; it exists and is empty.

    Raises:
        ValueError: If `path` exists.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "shards"
        >>> with atomic_folder(folder) as partial:
        ...     written = (partial / "00000.txt").write_text("1")
        >>> [file.name for file in folder.iterdir()]
        ['00000.txt']
    """
    target = Path(path)
    if target.exists():
        raise ValueError(f"{target} exists: a folder is written as a whole; name another one, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers([target])
    with _partial_paths([target]) as (partial,):
        partial.mkdir()
        yield partial
        partial.rename(target)


def write_text(path: str | os.PathLike[str], text: str, *, errors: str = "strict") -> None:
    r"""Write a UTF-8 text file atomically.

    Args:
        path: The file. A pipe or a device such as `/dev/stdout` is written to, not replaced.
        text: The whole content.
        errors: How to encode surrogates, as for `open`: `"strict"` raises `UnicodeEncodeError`, `"replace"` writes `?`.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "new" / "a.txt"
        >>> write_text(file, "one line\n")
        >>> file.read_text()
        'one line\n'
    """
    with atomic_file_or_stream(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically without waiting for the disk; meant for many small files in one folder.

    Unlike `atomic_files`, it does not search the folder for partial files of killed processes.

    Args:
        path: The file; its folder must exist.
        data: The whole content.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.bin"
        >>> write_bytes(file, b"abc")
        >>> file.read_bytes()
        b'abc'
    """
    with _partial_paths([Path(path)]) as (partial,):
        partial.write_bytes(data)
        os.replace(partial, path)


@contextmanager
def atomic_file_or_stream(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write one file atomically, or directly where it is a pipe or a device such as `/dev/stdout`.

    Args:
        path: The file or stream.

    Yields:
        What to write to: the partial file, or `path` itself.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    with atomic_files(path) as (partial,):
        yield partial


@contextmanager
def _partial_paths(targets: Sequence[Path]) -> Iterator[tuple[Path, ...]]:
    """Reserve a partial name for each target; whatever has these names at the end is removed."""
    partials = tuple(_partial_path(target) for target in targets)
    names = {str(partial) for partial in partials}
    _being_written.update(names)
    try:
        for partial in partials:
            _remove(partial)
        yield partials
    finally:
        for partial in partials:
            _remove(partial)
        _being_written.difference_update(names)


def _partial_path(target: Path) -> Path:
    return target.with_name(f".{_short(target.name)}.{_HOST}-{os.getpid()}-{next(_numbers)}.partial")


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAME_BYTES])


def _remove_leftovers(targets: Sequence[Path]) -> None:
    """Remove the partial files that killed processes of this host left of the targets."""
    for folder in {target.parent for target in targets}:
        names = {_short(target.name) for target in targets if target.parent == folder}
        try:
            entries = os.listdir(folder)
        except PermissionError:  # a folder may be writable and not readable
            continue
        for entry in entries:
            match = _PARTIAL_NAME.fullmatch(entry)
            if match and match["name"] in names and not _is_being_written(folder / entry, int(match["process"])):
                with suppress(OSError):  # another user's, or another process removes it at this moment
                    _remove(folder / entry)


def _is_being_written(partial: Path, process: int) -> bool:
    if process == os.getpid():
        return str(partial) in _being_written
    import psutil  # here, as it is seldom needed

    return psutil.pid_exists(process)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
