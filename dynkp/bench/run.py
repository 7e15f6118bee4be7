"""The command `dynkp bench`: run the suites, print their tables, write their rows."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynkp.files.json_files import write_json

# Suite -> (module with `run(setting)`, `HEADINGS` and `cells(row)`, one line of help).
SUITES = {
    "dynamic_cot": ("dynkp.bench.dynamic_cot", "one step of Dynamic CoT, against an oracle and against two passes"),
    "aimkp": ("dynkp.bench.aimkp", "one step of AimKP, against plain fine-tuning and against the published way"),
    "mulcot_rd": ("dynkp.bench.mulcot_rd", "one step of MulCoT-RD's student, against plain training on both tasks"),
    "scoring": ("dynkp.bench.scoring", "the metric, cold and warm, from CMKP's test set to a million posts"),
    "collation": ("dynkp.bench.collation", "posts become batches: posts per second, by size of pictures and workers"),
    # Not part of `all`.
    "gpu": ("dynkp.bench.gpu", "Dynamic CoT and AimKP at real shapes (3B to 8B, bf16) on one GPU, under ten minutes"),
}

DESCRIPTION = """\
Time each method against what it replaces and against the least it could cost.

All ways of a row are computed in one process, in turn, on a model with random weights built in code, and are timed only
once they agree in loss and gradients. Read the ratios: seconds belong to one machine. docs/performance.md has a table,
and says how to read it."""

EPILOG = """\
examples:
  dynkp bench                                      every suite but gpu, as docs/performance.md reports it
  dynkp bench --suite dynamic_cot --json rows.json one suite; its rows go to a file as well
  dynkp bench --quick --repeats 1                  does it run here? Seconds, and times that mean nothing
  dynkp bench --device cuda --repeats 20           on a GPU; a round is short there, so take many
  dynkp bench --suite gpu --repeats 5 --json gpu.json   the papers' models, under ten minutes on one H100 or H200
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynkp bench`.

    Args:
        argv: the arguments after `dynkp bench`; those of the process if `None`.

    Returns:
        0. A suite whose ways of computing disagree raises instead.

    Example: `main(["--suite", "dynamic_cot", "--quick", "--json", "rows.json"])`
    """
    arguments = _parser().parse_args(argv)
    import torch

    from dynkp.bench.measure import Setting

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("dynkp bench: `--device` is cuda, but torch finds no CUDA device here; take --device cpu.")
    device = "cuda" if arguments.device == "auto" and torch.cuda.is_available() else arguments.device
    device = torch.device("cpu" if device == "auto" else device)
    if arguments.suite == "gpu" and device.type == "cpu" and not arguments.quick:
        raise SystemExit("dynkp bench: the suite gpu has models of 3 to 8 billion parameters and no GPU here; add --quick.")
    torch.set_num_threads(arguments.threads)
    setting = Setting(device, arguments.threads, arguments.repeats, arguments.quick)

    rows: list[dict[str, Any]] = []
    for name in [name for name in SUITES if name != "gpu"] if arguments.suite == "all" else [arguments.suite]:
        suite = importlib.import_module(SUITES[name][0])
        print(f"{name}: {SUITES[name][1]}\n\n{_line(suite.HEADINGS)}\n{_line(['---'] * len(suite.HEADINGS))}", flush=True)
        began = time.perf_counter()
        for row in suite.run(setting):
            print(_line(suite.cells(row)), flush=True)
            rows.append(row)
            if arguments.json:  # after every row: what is measured is not lost to an interruption
                write_json(arguments.json, rows)
        print(f"\n{_provenance(rows[-1])}; {time.perf_counter() - began:.0f} s in all\n", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dynkp bench", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suites = "; ".join(f"{name}: {text}" for name, (_, text) in SUITES.items())
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all", help=f"{suites} (default: all, but gpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, as one JSON array")
    parser.add_argument(
        "--repeats", type=_positive, default=3, metavar="N", help="timed rounds per row; the median counts (default: 3)"
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        metavar="N",
        help="torch's CPU threads; with 1, the default, times are the process's CPU time, which a busy machine hardly moves",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs; its times mean nothing")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return number


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _provenance(row: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{row['date']}, {row['device']} ({row['machine']}), {threads}, {row['clock']}, {row['repeats']} rounds; {versions}"
