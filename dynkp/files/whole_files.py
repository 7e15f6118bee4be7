"""Files that are whole or absent: what was begun is never taken for what is finished; and files that one run has to itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_files(*paths: str | Path) -> Iterator[tuple[Path, ...]]:
    """Write files that appear, or replace older ones, only when all of them are complete.

    However the writing ends, no half-written file has a final name. A process that is killed leaves hidden
    `.NAME.partial` files, which the next try replaces; killed in the last step, it may leave some of several files
    missing, but never a new one beside an old one.

    Args:
        paths: where they are to be, their folders made if need be; the most telling one last.

    Yields:
        The names under which to write them. One that is not written is none in the end either: an older file of that
        name is removed.

    Raises:
        ValueError: if there is something other than a file.
    """
    targets = [Path(os.path.realpath(path)) for path in paths]
    for target in targets:
        if target.exists() and not target.is_file():
            raise ValueError(f"{target} is not a file: name another one, it would be replaced")
        target.parent.mkdir(parents=True, exist_ok=True)
    partials = tuple(target.with_name(f".{target.name}.partial") for target in targets)
    try:
        for partial in partials:
            partial.unlink(missing_ok=True)
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
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def locked(path: Path, output: Path | None = None) -> BinaryIO:
    """The file, locked: two runs must not write to one output. The lock goes with the process, however that ends.

    Args:
        path: what is opened, and made if need be.
        output: what the error calls it, where that is something else.

    Raises:
        BlockingIOError: if another run has it.
    """
    file = path.open("ab")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(f"another run is writing to {output or path}: wait for it, or choose another output") from None
    except (ImportError, OSError):  # Windows and some network file systems have no such locks
        pass
    return file
