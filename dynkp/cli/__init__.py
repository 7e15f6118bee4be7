"""The command `dynkp`: one small module per sub-command, imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from itertools import pairwise

import dynkp
from dynkp.cli.errors import DONE, USER_ERROR, report, silence_libraries
from dynkp.data.choices import did_you_mean

# Sub-command -> (module with `main(argv)`, one line of help). `main` returns an exit status, or None for success, and
# raises what goes wrong.
COMMANDS = {
    "train": ("dynkp.cli.train", "train a model, predict the evaluation posts, score them"),
    "recipes": ("dynkp.cli.recipes", "list and print the recipes: published settings, and launcher configurations"),
    "predict": ("dynkp.cli.predict", "predict the keyphrases of posts with a trained model"),
    "evaluate": ("dynkp.cli.evaluate", "score predictions; compare systems"),
    "stats": ("dynkp.cli.stats", "describe a dataset, as the papers' tables do"),
    "resample": ("dynkp.cli.resample", "make a split whose test keyphrases are less known from training"),
    "convert": ("dynkp.cli.convert", "write posts in another file format"),
    "distill": ("dynkp.cli.distill", "prepare a student's training with an assistant: soft labels, response chains"),
    "rationales": ("dynkp.cli.rationales", "ask a large model why posts have their keyphrases, for training to reason"),
    "judge": ("dynkp.cli.judge", "have systems' predictions ranked, by a large model or by people"),
    "clusters": ("dynkp.cli.clusters", "draw the posts of the most frequent keyphrases as clusters of their embeddings"),
    "plot": ("dynkp.cli.plot", "draw what AimKP's filter did in a run: the paper's Figures 3 and 7"),
    "bench": ("dynkp.cli.bench", "time each method against its reference (the ratios of docs/performance.md)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` where None.

    Returns:
        The exit status: 0 for success, 1 for a run that failed, 2 for a mistake in the command line or in what it names
        (an option, a file, a post, a model), 130 after Ctrl-C.

    Raises:
        Exception: what a command raises that is not the user's mistake, so that its traceback is seen.

    Example:
        >>> main(["--version"])
        dynkp 0.1.0
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"dynkp {dynkp.__version__}")
        return DONE
    debug, arguments = _without_debug(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return DONE if arguments else USER_ERROR
    command, *rest = arguments
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        print(f"dynkp: error: there is no command {command!r}.{hint} `dynkp --help` lists the commands.", file=sys.stderr)
        return USER_ERROR
    silence_libraries()
    try:
        return importlib.import_module(COMMANDS[command][0]).main(rest) or DONE
    except (Exception, KeyboardInterrupt) as error:
        status = report(command, error, debug)
        if status is None:
            raise
        return status


def _without_debug(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Take out `--debug`; with one of these values it is an option of transformers, for `train`."""
    kept = [
        word
        for word, following in pairwise([*arguments, "-"])
        if word != "--debug" or following in ("underflow_overflow", "tpu_metrics_debug")
    ]
    return len(kept) < len(arguments), kept


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: dynkp [--version] [--debug] COMMAND ...\n\n"
        f"commands (dynkp COMMAND --help explains one; --debug shows the traceback of an error):\n{rows}"
    )
