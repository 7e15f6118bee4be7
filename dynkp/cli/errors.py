"""Errors and interruptions of all commands: one line on standard error, and an exit status.

Commands raise, and `dynkp.cli.main` prints. `resumable` adds to an interruption how the run is continued. `silence_libraries`
keeps off the screen what libraries print by themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator

# Exit statuses. Commands that ask a chat server have more (dynkp.cli.chat_options).
DONE, RUN_FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
# What a wrong option, file, post or model raises, and a missing package.
USER_ERRORS = (ValueError, OSError, ImportError)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run that can be continued.

    Args:
        how: how to continue, as the end of a sentence.
    """

    def __init__(self, how: str) -> None:
        super().__init__(how)


class RunFailedError(Exception):
    """A run that began and could not be completed, through no fault of the command line: exit status 1.

    Args:
        message: what happened and how to continue.
    """


@contextlib.contextmanager
def resumable(how: str) -> Iterator[None]:
    """Say after Ctrl-C how the run can be continued.

    Args:
        how: the end of the sentence "interrupted; ...".

    Raises:
        Interrupted: in place of the `KeyboardInterrupt`.
    """
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted(how) from error


def report(command: str, error: BaseException, debug: bool) -> int | None:
    """Print an error as one line on standard error, behind its traceback where `--debug` asks for that.

    Args:
        command: the command's name, such as `"predict"`.
        error: what it raised.
        debug: whether to print the traceback.

    Returns:
        The exit status; None for an error that is not the user's, which should be raised again.
    """
    if isinstance(error, BrokenPipeError):  # the reader of our output is gone, as in `dynkp recipes NAME | head`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        return RUN_FAILED
    if debug and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    who = f"dynkp {command}{_process()}"
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{who}: interrupted{f'; {error}' if isinstance(error, Interrupted) else ''}", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, RunFailedError):
        print(f"{who}: error: {error}", file=sys.stderr)
        return RUN_FAILED
    if isinstance(error, USER_ERRORS):
        hint = "" if debug or _raised_here(error) else f" (dynkp {command} --debug shows where)"
        print(f"{who}: error: {error}{hint}", file=sys.stderr)
        return USER_ERROR
    return None


def _process() -> str:
    """Which process speaks, where a launcher started several and this is not the first."""
    rank = int(os.environ.get("RANK", "0"))
    return f", process {rank + 1}" if rank else ""


def _raised_here(error: BaseException) -> bool:
    """Whether the error was raised by a line of this package, whose messages need no traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).partition(".")[0] in ("dynkp", "argparse")


def log_to_stderr() -> None:
    """Print what the package logs from level INFO on, warnings of libraries, and on processes but the first only errors."""
    logging.basicConfig(format="%(message)s")
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("dynkp").setLevel(logging.INFO if first else logging.ERROR)


class _DeepSpeedToStandardError(logging.Filter):
    """DeepSpeed logs to standard output, where results go."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "Setting accelerator to CPU" not in str(record.msg):  # said whenever it is imported, used or not
            logging.getLogger().handle(record)
        return False


def hide_library_bars() -> None:
    """Switch off the progress bars of datasets and transformers, for commands that are to show none."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()


def silence_libraries() -> None:
    """Keep off the screen what libraries print as they are imported; call it before they are."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler: two lines "USDT: ..." per measurement
    # TRL and PEFT read options under names that transformers is about to drop, which no user can change.
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed in v6", FutureWarning)
    logger = logging.getLogger("DeepSpeed")
    if not logger.filters:
        logger.addFilter(_DeepSpeedToStandardError())
