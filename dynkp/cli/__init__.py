"""The command `dynkp`: one small module per sub-command, imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import dynkp

# Sub-command -> (module with `main(argv)`, one line of help). `main` returns an exit status, or None for success.
COMMANDS = {
    "predict": ("dynkp.cli.predict", "predict the keyphrases of posts with a trained model"),
    "evaluate": ("dynkp.cli.evaluate", "score predictions; compare systems"),
    "stats": ("dynkp.cli.stats", "describe a dataset, as the papers' tables do"),
    "resample": ("dynkp.cli.resample", "make a split whose test keyphrases are less known from training"),
    "convert": ("dynkp.cli.convert", "write posts in another file form"),
    "distill": ("dynkp.cli.distill", "prepare a student's training with an assistant: soft labels, chains"),
    "rationales": ("dynkp.cli.rationales", "ask a large model why posts have their keyphrases, for training to reason"),
    "judge": ("dynkp.cli.judge", "have systems' predictions ranked, by a large model or by people"),
    "clusters": ("dynkp.cli.clusters", "draw the posts of the most frequent keyphrases as clusters of their embeddings"),
    "plot": ("dynkp.cli.plot", "draw what AimKP's filter did in a run: the paper's Figures 3 and 7"),
    "bench": ("dynkp.bench.run", "time each method against its reference (the ratios of docs/performance.md)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` where None.

    Returns:
        The exit status: 0 for success, 2 for a command line that cannot be understood.

    Example:
        >>> main(["--version"])
        dynkp 0.1.0
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"dynkp {dynkp.__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"dynkp: there is no command {command!r}\n\n{_help()}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[command][0]).main(rest) or 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: dynkp [--version] COMMAND ...\n\ncommands (dynkp COMMAND --help says more):\n{rows}"
