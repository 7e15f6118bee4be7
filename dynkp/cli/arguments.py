"""What the commands' parsers share: the parser, the options that several commands have, and types of values.

A mistake in a command line is one line on standard error, with a suggestion where a name is misspelt, and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from dynkp.data.choices import did_you_mean
from dynkp.data.paths import check_path

# What `add_argument` can be called on.
Options = Any  # a parser or a group of one


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are one line, and suggest what a misspelt option or value was meant to be."""

    _given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """Print the error without the usage, which may be hundreds of lines long, and exit with status 2."""
        if message.startswith("the following arguments are required"):
            message += self._misspelt()
        end = "" if message.endswith((".", "?")) else "."
        print(f"{self.prog}: error: {message}{end} `{self.prog} --help` lists the options.", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an unknown option is an error with the known one that is most like it."""
        self._given = list(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._misspelt()}")
        return parsed

    def _misspelt(self) -> str:
        """The suggestion for the first word that looks like an option and is none, as the rest of an error."""
        known = self.option_names()
        options = (word.partition("=")[0] for word in self._given if word.startswith("--"))
        abbreviated = str.startswith if self.allow_abbrev else str.__eq__
        unknown = next((option for option in options if not any(abbreviated(name, option) for name in known)), "")
        hint = did_you_mean(unknown, known)
        return f". There is no option {unknown}.{hint}" if hint else ""

    def option_names(self) -> list[str]:
        """The long options, those of sub-commands included."""
        return [name for action in _actions(self) for name in action.option_strings if name.startswith("--")]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message = f"{error.message}.{did_you_mean(str(value), map(str, action.choices or ()))}"
            raise


class CommandParser(OneLineErrors):
    """The parser of a sub-command.

    Args:
        command: its name, such as `"predict"`; argparse gives the parsers of sub-commands a `prog` in its place.
        description: what it does; line breaks are kept.
        epilog: examples, below the options; as `description`.
        **options: what else argparse takes.
    """

    def __init__(self, command: str = "", description: str | None = None, epilog: str | None = None, **options: Any) -> None:
        options = {"prog": f"dynkp {command}", **options}
        super().__init__(
            description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from _actions(part)


# --- options of several commands ---


def add_posts(parser: Options, text: str = "posts in any format that docs/data.md names", **options: Any) -> None:
    """Add `--posts`."""
    parser.add_argument("--posts", **{"required": True, **options}, metavar="FILE", help=text)


def add_image_dir(parser: Options) -> None:
    """Add `--image-dir`."""
    parser.add_argument("--image-dir", metavar="DIR", help="the folder that image names are relative to")


def add_split(parser: Options, default: str) -> None:
    """Add `--split`."""
    parser.add_argument("--split", default=default, help=f"of a folder or Hub dataset (default: {default})")


def add_on_invalid(parser: Options, text: str) -> None:
    """Add `--on-invalid`; `text` says which posts are invalid."""
    help_ = f"{text}: stop with an error (the default), or leave them out"
    parser.add_argument("--on-invalid", choices=["error", "skip"], default="error", help=help_)


def add_batch_size(parser: Options, default: int | None = 8, text: str = "posts per batch and process (default: 8)") -> None:
    """Add `--batch-size`."""
    parser.add_argument("--batch-size", type=positive, default=default, metavar="N", help=text)


def add_dtype_and_device(parser: Options) -> None:
    """Add `--dtype` and `--device`."""
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: as saved)")
    help_ = "auto (the default: a GPU if there is one), cpu, cuda, cuda:1, mps, xpu"
    parser.add_argument("--device", type=device, default="auto", help=help_)


def add_no_progress(parser: Options) -> None:
    """Add `--no-progress`."""
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def add_old_spelling(parser: Options, old: str, new: str, **options: Any) -> None:
    """Add the former name of an option: it works as the new one does, prints one line, and is not in the help."""
    parser.add_argument(old, action=_OldSpelling, new=new, help=argparse.SUPPRESS, **options)


class _OldSpelling(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, new: str, **options: Any) -> None:
        super().__init__(option_strings, new.lstrip("-").replace("-", "_"), default=argparse.SUPPRESS, **options)
        self.new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        print(f"{parser.prog}: {option_string} is now called {self.new}; the old name still works.", file=sys.stderr)
        setattr(namespace, self.dest, values)


def check_inputs(arguments: argparse.Namespace, *names: str, kind: str = "file or folder") -> None:
    """Refuse files and folders that do not exist, before anything is read.

    Args:
        arguments: the parsed command line.
        *names: options whose value is the name of a file, a folder or a Hub dataset, or a list of them; a name that ends in
            `_dir` must be a folder.
        kind: what the others may be; with `"file"` there must be one, and otherwise the name may be a Hub id.

    Raises:
        FileNotFoundError: naming option, value and what lies beside it under a similar name.
    """
    for name in names:
        given = getattr(arguments, name, None) or []
        is_folder = name.endswith("_dir")
        for value in [given] if isinstance(given, str) else given:
            or_hub_id = not is_folder and kind != "file"
            check_path(value, f"--{name.replace('_', '-')}", "folder" if is_folder else kind, or_hub_id=or_hub_id)


# --- types of values ---


def positive(text: str) -> int:
    """Read a whole number from 1."""
    return at_least(1)(text)


def at_least(lowest: int) -> Callable[[str], int]:
    """Make a type that reads a whole number from `lowest`."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{text} is not a number of {lowest} or more")
        return value

    return number


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def from_zero(text: str) -> float:
    """Read a finite number from 0."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return number


def share(text: str) -> float:
    """Read a number above 0 and at most 1."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return number


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


def device(text: str) -> str:
    """Read the name of a device."""
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is none of auto, cpu, cuda, cuda:1, mps, xpu")
    return text
