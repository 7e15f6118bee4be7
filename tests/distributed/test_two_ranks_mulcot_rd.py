"""MulCoT-RD on two ranks is one process with the same global batches: weights, logs, evaluation.

Under DDP and DeepSpeed's ZeRO-2, as `accelerate launch` starts them. Holds with the assistant in memory and from its soft
labels, also where one rank has no chain, and where the last batch is filled up. All cases of a launch go through one pair of
ranks, which a timeout ends.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.distill_ranks import CASES, posts_of
from tests.support.launching import RANK_SCRIPTS, finish, launch, start
from tests.support.soft_labels import write_labels

LAUNCHERS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED"}

pytestmark = pytest.mark.timeout(600)  # the first one waits for a launch, and perhaps for DeepSpeed to compile


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By launcher (`None`: one process), the folder with what the ranks left; each is started when first asked for."""
    from dynkp.data.rows import normalise_posts

    labels = tmp_path_factory.mktemp("soft_labels")
    write_labels(labels, normalise_posts(posts_of("eight")))

    @functools.cache
    def folder_of(launcher: str | None) -> Path:
        folder = tmp_path_factory.mktemp(f"{launcher}")
        script = RANK_SCRIPTS / "distill_ranks.py"
        if launcher is None:
            finish([start([sys.executable, script, folder, 1, labels])])
        else:
            launch(f"{launcher}.yaml", script, folder, 2, labels)
        return folder

    return folder_of


def seen(folder: Path, case: str, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{case}.{rank}.json").read_text())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_are_one_process(launcher: str, case: str, folders: Any) -> None:
    alone = seen(folders(None), case, 0)
    first, second = (seen(folders(launcher), case, rank) for rank in (0, 1))
    assert first["distributed_type"] == LAUNCHERS[launcher]
    assert (alone["world_size"], first["world_size"], second["world_size"]) == (1, 2, 2)
    assert first["checksum"] == second["checksum"], "the ranks' weights drifted apart"
    expected, actual = (load_file(folder / f"{case}.safetensors") for folder in (folders(None), folders(launcher)))
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
    if case == "plateau":
        assert [entry["learning_rate"] for entry in first["log"]] == [0.1, 0.1, 0.05, 0.025]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_online_and_cached_are_the_same_on_two_ranks(launcher: str, folders: Any) -> None:
    online, cached = (load_file(folders(launcher) / f"{case}.safetensors") for case in ("online", "cached"))
    assert max((online[name] - cached[name]).abs().max().item() for name in online) <= 1e-6
