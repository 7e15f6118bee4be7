"""Two ranks are one process with the same global batches: weights, logs, statistics, choices, evaluation.

Holds also where the ranks differ in what they compute: no easy post on one, pictures on one only, no pictures at all.
Both runs of a case share `train_ranks.py`; all cases go through one pair of ranks, which a timeout ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parent
CASES = (
    "avg",
    "quantile",
    "token",
    "accumulated",
    "accumulated_token",
    "checkpointing",
    "one_rank_easy",
    "one_rank_pictures",
    "no_pictures",
    "short",
    "stream",
)
TIMEOUT = 200  # seconds; a rank that waits for ever is a failure, not a hanging build


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Every case, by one process and by two ranks."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks-{ranks}") for ranks in (1, 2)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for ranks, launcher in ((1, []), (2, torchrun)):
        command = [sys.executable, *launcher, FOLDER / "train_ranks.py", folders[ranks], str(ranks), *CASES]
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=TIMEOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-4000:]
    return folders


def seen(folder: Path, case: str, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{case}.{rank}.json").read_text())


def choices(folder: Path, case: str) -> list[dict[str, Any]]:
    lines = (folder / case / "choices.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda row: (row["step"], row["id"]))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(case: str, runs: dict[int, Path]) -> None:
    alone, first, second = seen(runs[1], case, 0), seen(runs[2], case, 0), seen(runs[2], case, 1)
    assert (alone["world_size"], first["world_size"], second["world_size"]) == (1, 2, 2)
    assert first["checksum"] == second["checksum"], "the ranks' weights drifted apart"
    expected, actual = (load_file(runs[ranks] / f"{case}.safetensors") for ranks in (1, 2))
    assert max((expected[name] - actual[name]).abs().max().item() for name in expected) < 1e-6

    assert len(alone["log"]) == len(first["log"]) >= 4
    for one, two in zip(alone["log"], first["log"], strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    shares = [entry["reasoning_share"] for entry in alone["log"]]
    assert any(share > 0 for share in shares) and any(share < 1 for share in shares)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_equal_on_both_ranks(case: str, runs: dict[int, Path]) -> None:
    alone, first, second = seen(runs[1], case, 0), seen(runs[2], case, 0), seen(runs[2], case, 1)
    assert first["gamma"] == second["gamma"]
    for name, value in alone["gamma"].items():
        assert first["gamma"][name] == pytest.approx(value, rel=1e-6)
    if case == "avg":
        assert first["gamma"]["count"] == 16


@pytest.mark.parametrize("case", CASES)
def test_choices_are_complete_and_without_repeats(case: str, runs: dict[int, Path]) -> None:
    alone, together = choices(runs[1], case), choices(runs[2], case)
    visits = [(row["step"], row["id"], row["choice"]) for row in together]
    assert visits == [(row["step"], row["id"], row["choice"]) for row in alone]
    assert len(visits) == len(set(visits)) == (18 if case == "short" else 16)
    for one, two in zip(alone, together, strict=True):
        assert two["direct_loss"] == pytest.approx(one["direct_loss"], rel=1e-5)
