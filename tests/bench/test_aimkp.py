"""`dynkp bench --suite aimkp` measures the trainer's own steps, and each row says what it measured.

Holds at the quick size: ours and the published way agree in loss and gradients at every stride, and the warm-up with plain
fine-tuning; a way that computes something else stops the suite; libraries print nothing between the rows. Times are never
asserted: the machine is shared.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from dynkp.bench import aimkp
from dynkp.bench.measure import AGREEMENT, Setting
from dynkp.bench.steps import train_masked
from dynkp.bench.workload import QUICK

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """The suite in a process of its own, as a user runs it, and its rows."""
    file = tmp_path_factory.mktemp("bench") / "rows.json"
    arguments = ["--suite", "aimkp", "--quick", "--repeats", "1", "--device", "cpu", "--json", str(file)]
    process = subprocess.run(
        [sys.executable, "-m", "dynkp", "bench", *arguments], check=True, capture_output=True, text=True, timeout=600
    )
    return process, json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows(finished: tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return finished[1]


def test_the_screen_shows_the_table_alone(
    finished: tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]],
) -> None:
    process, rows = finished
    assert process.stderr == ""
    title, blank, *table, gap, provenance, end = process.stdout.splitlines()
    assert title.startswith("aimkp: ") and (blank, gap, end) == ("", "", "") and "rounds; python" in provenance
    assert len(table) == 2 + len(rows) and all(line.startswith("| ") and line.endswith(" |") for line in table)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[aimkp.Bench]:
    folder = tmp_path_factory.mktemp("trainers")
    yield aimkp.build(QUICK, CPU, str(folder))
    assert not list(folder.iterdir())


def test_a_row_for_the_warm_up_and_one_per_stride(rows: list[dict[str, Any]]) -> None:
    assert [row["stride"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        assert row["suite"] == "aimkp" and row["quick"] and row["versions"]["torch"] == torch.__version__
        assert row["batch_size"] == QUICK.batch and row["image_tokens"] == 16 and row["target_tokens"] == 4
        assert row["ours_over_sft"] == pytest.approx(row["ours_s"] / row["sft_s"])
        assert row["memory_over_sft"] == pytest.approx(row["ours_mib"] / row["sft_mib"])
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ours_over_sft", "memory_over_sft"))
        assert row["largest_disagreement"] <= AGREEMENT
    warm_up, *masked = rows
    assert warm_up["warmup_over_sft"] == warm_up["ours_over_sft"] and warm_up["kept_lora_gradients_mib"] == 0
    assert warm_up["memory_over_sft"] == pytest.approx(1.0, abs=0.05)
    for row in masked:
        assert row["plain_over_ours"] == pytest.approx(row["plain_s"] / row["ours_s"]) and row["plain_mib"] > 0
        both = row["sft_mib"] + row["kept_lora_gradients_mib"]
        assert row["memory_over_sft_and_kept"] == pytest.approx(row["ours_mib"] / both)
        assert 0 <= row["text_kept_share"] <= 1 and 0 <= row["image_kept_share"] <= 1


def test_kept_gradients_are_counted_by_hand(bench: aimkp.Bench) -> None:
    # Rank 16 on both sides of q, k, v, o (32 x 32) and gate, up, down (32 x 88), two layers; four posts, three variants.
    assert aimkp.kept_gradients_bytes(bench) == 4 * 2 * 16 * (4 * (32 + 32) + 3 * (32 + 88)) * 4 * 3


def test_posts_are_masked_with_the_rows_stride(bench: aimkp.Bench) -> None:
    for layout in bench.batch["layouts"]:
        assert len(layout.text) == QUICK.text_tokens and [(grid.height, grid.width) for grid in layout.grids] == [(4, 4)]
    losses = []
    for stride in aimkp.STRIDES:
        losses.append(float(train_masked(bench.ours, bench.batch, stride)))
        assert set(bench.ours.schedule.shares("text")) <= {2 * stride, max(2, stride // 2)}
        assert sum(bench.ours.schedule.shares("image").values()) == pytest.approx(1.0)
    assert len(set(losses)) == 3
    assert bench.ours.batches_similarity and not bench.plain.batches_similarity


def test_ways_agree(bench: aimkp.Bench) -> None:
    def step(way: Any) -> tuple[float, dict[str, torch.Tensor]]:
        loss = float(way())
        model = bench.ours.model
        return loss, {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}

    def same(one: Any, other: Any) -> None:
        (loss, gradients), (other_loss, other_gradients) = step(one), step(other)
        assert loss == pytest.approx(other_loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)

    same(partial(aimkp.sft, bench), partial(aimkp.warmup, bench))
    for stride in aimkp.STRIDES:
        same(*(partial(train_masked, trainer, bench.batch, stride) for trainer in (bench.plain, bench.ours)))


def test_ways_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aimkp, "warmup", lambda bench: 2 * aimkp.sft(bench))
    with pytest.raises(RuntimeError, match="the warm-up: ours and sft differ"):
        next(aimkp.run(Setting(CPU, threads=1, repeats=1, quick=True)))
