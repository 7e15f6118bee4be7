"""The command `dynkp plot`: the AimKP paper's figures of its filter, from a run's log of visits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dynkp.cli.arguments import CommandParser, at_least, positive

DESCRIPTION = """\
Draw what AimKP's filter did in a run, from the visits.jsonl that log_visits=True writes: the cosine of gradients against the
rise in perplexity (the paper's Figure 3), and mean cosine, share of variants kept and mean stride over the steps (its
Figure 7). FILE ends in .png, .svg or .pdf; the numbers behind it go beside it, as .json. Needs the extra `plots`."""

EPILOG = """\
examples:
  dynkp plot --visits out --figure3 cosine.png --figure7 steps.png
      both; also while the run goes on. cosine.json and steps.json have the numbers
  dynkp plot --visits out/visits.jsonl --figure7 steps.pdf --windows 20
      over at most twenty windows of steps
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("plot", DESCRIPTION, EPILOG)
    parser.add_argument("--visits", required=True, metavar="FILE_OR_DIR", help="visits.jsonl, or the run's output folder")
    parser.add_argument("--figure3", metavar="FILE", help="cosine against rise in perplexity, one panel a modality")
    parser.add_argument("--figure7", metavar="FILE", help="mean cosine, share kept and mean stride over the steps")
    parser.add_argument(
        "--windows", type=positive, default=100, metavar="N", help="most windows of steps in Figure 7 (default: 100)"
    )
    parser.add_argument(
        "--points", type=at_least(2), default=5000, metavar="N", help="most points a panel of Figure 3 (default: 5000)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp plot`.

    Args:
        argv: the arguments after `dynkp plot`; those of the process if None.

    Raises:
        ValueError, OSError, ImportError: if there is nothing to draw, or nothing to draw with.
    """
    command = parser()
    arguments = command.parse_args(argv)
    if not (arguments.figure3 or arguments.figure7):
        command.error("say what to draw: --figure3, --figure7")
    if arguments.figure3 and arguments.figure7 and _stem(arguments.figure3) == _stem(arguments.figure7):
        command.error("--figure3 and --figure7 need names that differ before the suffix: each has a .json beside it")
    _draw(arguments)


def _draw(arguments: argparse.Namespace) -> None:
    from dynkp.report.plots import draw_against_perplexity, draw_over_steps, read_visits

    visits = read_visits(arguments.visits, windows=arguments.windows, points=arguments.points)
    if arguments.figure3:
        for name, of_modality in draw_against_perplexity(visits, arguments.figure3).items():
            spearman, pearson = (_shown(of_modality[key]) for key in ("spearman", "pearson_nats"))
            left_out = f", {of_modality['without_number']:,} left out (not finite)" if of_modality["without_number"] else ""
            print(
                f"{arguments.figure3}: {name}, {of_modality['visits']:,} visits{left_out}; cosine and rise in perplexity: "
                f"Spearman {spearman} (of {of_modality['sample']:,}), Pearson with the rise in nats {pearson}"
            )
    if arguments.figure7:
        for name, of_modality in draw_over_steps(visits, arguments.figure7).items():
            first, last = of_modality["windows"][0], of_modality["windows"][-1]
            changes = (
                f"{label} {first[key]:.2f} to {last[key]:.2f}"
                for key, label in (("mean_cosine", "cosine"), ("kept_share", "share kept"), ("mean_stride", "stride"))
            )
            print(f"{arguments.figure7}: {name}, steps {first['first_step']:,} to {last['last_step']:,}: {', '.join(changes)}")


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _stem(path: str) -> Path:
    return Path(path).resolve().with_suffix("")
