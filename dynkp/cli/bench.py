"""The command `dynkp bench`: what the trainers' steps cost, as ratios."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynkp.bench.run import SUITES, run_suites
from dynkp.cli.arguments import CommandParser, positive

DESCRIPTION = """\
Time the trainers' training steps against what they replace and against the least they could cost.

All ways of a row run in one process, in turn, on a model with random weights that is built in code, and are timed only
once they agree in loss and gradients. Compare ratios: seconds depend on the machine. docs/performance.md has the
tables and explains them."""

EPILOG = """\
examples:
  dynkp bench                                      every suite but gpu, as docs/performance.md reports it
  dynkp bench --suite dynamic_cot --json rows.json one suite; its rows go to a file as well
  dynkp bench --quick --repeats 1                  check that it runs; the times of a tiny model mean nothing
  dynkp bench --device cuda --repeats 20           on a GPU; a round is short there, so take many
  dynkp bench --suite gpu --repeats 5 --json gpu.json   the papers' models, under ten minutes on one H100 or H200
"""


def parser() -> CommandParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("bench", DESCRIPTION, EPILOG)
    suites = "; ".join(f"{name}: {text}" for name, (_, text) in SUITES.items())
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all", help=f"{suites} (default: all, but gpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, as one JSON array")
    parser.add_argument(
        "--repeats",
        type=positive,
        default=3,
        metavar="N",
        help="timed rounds per row, of which the median is taken (default: 3)",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        metavar="N",
        help="torch's CPU threads (default: 1); with 1, times are the process's CPU time, which a busy machine hardly changes",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where models run (default: auto, a GPU if there is one)",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to check that it runs; its times mean nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp bench`.

    Args:
        argv: the arguments after `dynkp bench`; those of the process if None.

    Raises:
        ValueError: if there is no such device here, or none for the suite.
        RuntimeError: if ways of a suite that must compute the same disagree.
    """
    arguments = parser().parse_args(argv)
    import torch

    from dynkp.bench.measure import Setting

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here; take --device cpu")
    device = "cuda" if arguments.device == "auto" and torch.cuda.is_available() else arguments.device
    device = torch.device("cpu" if device == "auto" else device)
    if arguments.suite == "gpu" and device.type == "cpu" and not arguments.quick:
        raise ValueError("--suite gpu has models of 3 to 8 billion parameters, and there is no GPU here; add --quick")
    torch.set_num_threads(arguments.threads)
    names = [name for name in SUITES if name != "gpu"] if arguments.suite == "all" else [arguments.suite]
    run_suites(names, Setting(device, arguments.threads, arguments.repeats, arguments.quick), arguments.json)
