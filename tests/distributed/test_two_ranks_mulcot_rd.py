"""MulCoT-RD on two ranks is one process with the same global batches: weights, logs, evaluation.

Holds with the assistant in memory and from its soft labels, also where one rank has no chain, and where the last batch is
filled up. All cases go through one pair of ranks, which a timeout ends.
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
sys.path.insert(0, str(FOLDER))
from distill_ranks import CASES, posts_of  # noqa: E402
from test_soft_labels import write  # noqa: E402

TIMEOUT = 200  # seconds; a rank that waits for ever is a failure, not a hanging build


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Every case, by one process and by two ranks."""
    from dynkp.data.rows import normalise_posts

    labels = tmp_path_factory.mktemp("soft_labels")
    write(labels, normalise_posts(posts_of("eight")))
    folders = {ranks: tmp_path_factory.mktemp(f"ranks-{ranks}") for ranks in (1, 2)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for ranks, launcher in ((1, []), (2, torchrun)):
        command = [sys.executable, *launcher, FOLDER / "distill_ranks.py", folders[ranks], ranks, labels]
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


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(case: str, runs: dict[int, Path]) -> None:
    alone, first, second = seen(runs[1], case, 0), seen(runs[2], case, 0), seen(runs[2], case, 1)
    assert (alone["world_size"], first["world_size"], second["world_size"]) == (1, 2, 2)
    assert first["checksum"] == second["checksum"], "the ranks' weights drifted apart"
    expected, actual = (load_file(runs[ranks] / f"{case}.safetensors") for ranks in (1, 2))
    assert max((expected[name] - actual[name]).abs().max().item() for name in expected) < 2e-6
    assert len(alone["log"]) == len(first["log"]) >= 2
    for one, two in zip(alone["log"], first["log"], strict=True):
        assert one.keys() == two.keys() and "label_divergence" in one
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=2e-5, abs=1e-6), name
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
    if case == "online":
        assert first["metrics"]["eval_generated_posts"] == 5


def test_online_and_cached_are_the_same_on_two_ranks(runs: dict[int, Path]) -> None:
    online, cached = (load_file(runs[2] / f"{case}.safetensors") for case in ("online", "cached"))
    assert max((online[name] - cached[name]).abs().max().item() for name in online) <= 1e-6
