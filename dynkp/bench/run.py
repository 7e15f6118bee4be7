"""The suites of `dynkp bench`: run them, print their tables, write their rows."""

from __future__ import annotations

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


def run_suites(names: Sequence[str], setting: Setting, file: Path | None = None) -> list[dict[str, Any]]:
    """Run suites, print their tables and return their rows.

    Args:
        names: Names of `SUITES`.
        setting: Where and how often to measure.
        file: Where to write the rows, as one JSON array; None for nowhere.

    Raises:
        RuntimeError: If ways of a suite that must compute the same disagree.
    """
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        # Raised by PEFT and TRL, which read deprecated attributes of transformers; users of the bench cannot act on them.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
        for name in names:
            _measure(name, setting, rows, file)
    return rows


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


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _provenance(row: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{row['date']}, {row['device']} ({row['machine']}), {threads}, {row['clock']}, {row['repeats']} rounds; {versions}"
