"""Locks: one process at a time writes to an output."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import filelock

logger = logging.getLogger(__name__)


class OutputLock:
    """An exclusive lock on an output, held until `close` or the end of the process, however it ends.

    The lock excludes other `OutputLock`s on the same output, in this process too. Reading the output needs no lock. On a
    file system without locks, a warning is logged and nothing is excluded.

    Args:
        path: The lock file; its folder must exist. It is created, and removed by `close`; a lock file that a killed process
            left does not lock anything.
        output: The output's name in messages; `path` if None.

    Raises:
        BlockingIOError: If another run holds the lock.
        OSError: If the lock file cannot be created.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with OutputLock(folder / "lock", folder / "predictions.jsonl"):
        ...     OutputLock(folder / "lock", "predictions.jsonl")
        Traceback (most recent call last):
        ...
        BlockingIOError: another run is writing to predictions.jsonl: wait for it, or choose another output
    """

    def __init__(self, path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None):
        self.path = Path(path)
        self._lock = filelock.FileLock(self.path, timeout=0, thread_local=False, fallback_to_soft=False)
        self.path.touch()  # an error here is not about locks
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise BlockingIOError(
                f"another run is writing to {output or path}: wait for it, or choose another output"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): let no other run write to it.", output or path, error)

    def close(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._lock.is_locked:
            # Removed while it is locked. Who has opened it meanwhile finds it removed, and creates a new one.
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def output_lock(output: str | os.PathLike[str]) -> OutputLock:
    """Lock an output file by a hidden lock file beside it, `.NAME.lock`.

    Args:
        output: The output file, which need not exist. Missing folders are created.

    Returns:
        The lock.

    Raises:
        BlockingIOError: If another run holds the lock.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    return OutputLock(output.with_name(f".{output.name}.lock"), output)
