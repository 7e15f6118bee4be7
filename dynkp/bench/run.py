"""The command `dynkp bench`: run the suites, print their tables, write their rows."""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynkp.files.json_files import write_json

if TYPE_CHECKING:  # that module imports torch, which takes seconds and `--help` does not need
    from dynkp.bench.measure import Setting

# Suite -> (module with `run(setting)`, `HEADINGS` and `cells(row)`, one line of help).
SUITES = {
    "dynamic_cot": ("dynkp.bench.dynamic_cot", "one step of Dynamic CoT, against an oracle and against two passes"),
    "aimkp": ("dynkp.bench.aimkp", "one step of AimKP, against plain fine-tuning and against the published way"),
    "mulcot_rd": ("dynkp.bench.mulcot_rd", "one step of MulCoT-RD's student, against plain training on both tasks"),
    "scoring": ("dynkp.bench.scoring", "the metric, cold and warm, from CMKP's test set to a million posts"),
    "collation": ("dynkp.bench.collation", "making batches: posts per second, by image size and number of workers"),
    # `all` leaves this one out.
    "gpu": ("dynkp.bench.gpu", "Dynamic CoT and AimKP at the published shapes (3B to 8B, bf16) on one GPU, under ten minutes"),
}

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynkp bench`.

    Args:
        argv: The arguments after `dynkp bench`; those of the process if `None`.

    Returns:
        0.

    Raises:
        RuntimeError: If ways of a suite that must compute the same disagree.

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
    with warnings.catch_warnings():
        # PEFT and TRL read attributes of transformers that are deprecated, which is no news to who reads ratios.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
        for name in [name for name in SUITES if name != "gpu"] if arguments.suite == "all" else [arguments.suite]:
            _measure(name, setting, rows, arguments.json)
    return 0


def _measure(name: str, setting: Setting, rows: list[dict[str, Any]], file: Path | None) -> None:
    """Run a suite: print its table, append its rows to `rows`, and write all rows to the file."""
    suite = importlib.import_module(SUITES[name][0])
    print(f"{name}: {SUITES[name][1]}\n\n{_line(suite.HEADINGS)}\n{_line(['---'] * len(suite.HEADINGS))}", flush=True)
    began = time.perf_counter()
    for row in suite.run(setting):
        print(_line(suite.cells(row)), flush=True)
        rows.append(row)
        if file:  # after every row: an interruption loses none that is measured
            write_json(file, rows)
    print(f"\n{_provenance(rows[-1])}; {time.perf_counter() - began:.0f} s in all\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dynkp bench", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suites = "; ".join(f"{name}: {text}" for name, (_, text) in SUITES.items())
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all", help=f"{suites} (default: all, but gpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, as one JSON array")
    parser.add_argument(
        "--repeats",
        type=_positive,
        default=3,
        metavar="N",
        help="timed rounds per row, of which the median is taken (default: 3)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
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
