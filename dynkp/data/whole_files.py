"""Files that are whole or absent: what was begun is never taken for what is finished."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
