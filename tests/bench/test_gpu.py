"""The suite `gpu`: the same code on a CPU at tiny shapes; times are never asserted.

Holds: every case asked for is there; AimKP as published and ours give the same loss and gradients, and Dynamic CoT's ways the
losses of plain fine-tuning; a way that fails does not stop the others or the next cases, and its row says why; without time,
rows say so.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dynkp import cli
from dynkp.bench import gpu
from dynkp.bench.measure import Setting
from dynkp.bench.real_shapes import SHAPES, TINY, draw_batch
from dynkp.bench.steps import TwoPassTrainer, train, train_masked
from dynkp.cli import bench as command
from dynkp.trainer import post_trainer
from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.aimkp_trainer import AimKPTrainer
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer

CPU = torch.device("cpu")
QUICK = Setting(CPU, threads=1, repeats=1, quick=True)


def test_every_case_is_there() -> None:
    found = gpu.cases("lora", ["sdpa"])
    assert len(found) == len(set(found))
    assert {(case.share, case.checkpointing) for case in found if case.method == "dynamic_cot"} == set(
        product((0.0, 0.25, 0.5, 0.75, 1.0), (False, True))
    )
    assert {(case.batch, case.checkpointing) for case in found if case.method == "aimkp"} == set(
        product((1, 4, 8, 16), (False, True))
    )
    assert {case.method for case in gpu.cases("full", ["sdpa"])} == {"dynamic_cot"}
    flash = [case for case in gpu.cases("lora", ["sdpa", "flash_attention_2"]) if case.attention != "sdpa"]
    assert {case.method for case in flash} == {"dynamic_cot", "aimkp"}
    assert set(gpu.CONFIGURATIONS) == {*((name, "lora") for name in SHAPES), (SHAPES[0], "full")}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two configurations of one family, and of each kind of case one or two."""
    monkeypatch.setattr(gpu, "CONFIGURATIONS", ((SHAPES[1], "lora"), (SHAPES[0], "full")))
    every = gpu.cases

    def chosen(trained: str, attentions: Any) -> list[gpu.Case]:
        wanted = [case for case in every(trained, ["sdpa"]) if case.share in (None, 0.5) and case.batch in (1, 4)]
        return [case for case in wanted if case.share or not case.checkpointing or case.batch == 1]

    monkeypatch.setattr(gpu, "cases", chosen)


def test_rows(few: None, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    threads = torch.get_num_threads()
    arguments = ["--suite", "gpu", "--quick", "--repeats", "1", "--device", "cpu", "--json", str(file)]
    assert cli.main(["bench", *arguments]) == 0
    torch.set_num_threads(threads)
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert len(rows) == 2 * 2 + 3 * 3  # Dynamic CoT with and without checkpointing, twice; AimKP's cases, by stride
    for row in rows:
        assert row["failed"] == {} and row["quick"] and row["clock"].endswith("bf16") and row["versions"]["trl"]
        assert row["sft_s"] > 0 and row["other_s"] > 0 and row["ours_s"] > 0
        assert row["ours_over_sft"] == pytest.approx(row["ours_s"] / row["sft_s"])
        assert row["ours_tokens_per_s"] == pytest.approx(row["tokens"] / row["ours_s"])
        assert row["ours_loss"] == pytest.approx(row["sft_loss"], rel=0.02)
        assert row["ours_utilisation"] is None  # of a CPU no peak is known
        assert len(gpu.cells(row)) == len(gpu.HEADINGS)
    shared = [row for row in rows if row["method"] == "aimkp" and row["batch"] == 4]
    assert [row["stride"] for row in shared] == [2, 4, 8]
    assert shared[0]["ours_flops"] > shared[1]["ours_flops"] > shared[2]["ours_flops"] > shared[0]["sft_flops"] > 0


def exact_bench(name: str, folder: Path) -> gpu.Bench:
    """A model of tiny shapes in float32, to compare ways exactly; its trainers want `bf16=False`."""
    bench = gpu.Bench(QUICK, name, "lora", str(folder))
    bench.model.float()
    return bench


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])


def part_of(value: torch.Tensor, post: int, count: int) -> torch.Tensor:
    """One post's part of a prompt's tensor; Qwen's patches follow one another post by post."""
    size = len(value) // count
    return value[post * size : (post + 1) * size]


@pytest.mark.parametrize("name", SHAPES)
def test_aimkp_s_ways_agree(name: str, tmp_path: Path) -> None:
    bench, count = exact_bench(name, tmp_path), 3
    batch = draw_batch(name, bench.model, count, TINY)
    batch["single_posts"] = [
        {
            "prompt": {key: part_of(value, post, count) for key, value in batch["prompt"].items()},
            "layouts": batch["layouts"][post : post + 1],
            "id": batch["id"][post : post + 1],
        }
        for post in range(count)
    ]
    losses, found = {}, {}
    for backend in ("plain", "batched"):
        options = {"similarity_backend": backend, "filter_gradients": False, "bf16": False}
        losses[backend] = float(train_masked(bench.trainer(AimKPTrainer, AimKPConfig, **options), batch, 2))
        found[backend] = gradients(bench.model)
    assert losses["batched"] == pytest.approx(losses["plain"], rel=1e-5)
    torch.testing.assert_close(found["batched"], found["plain"], rtol=1e-3, atol=1e-6)
    assert found["plain"].abs().max() > 0


@pytest.mark.parametrize("easy", [0, 2, 4])
def test_dynamic_cot_s_ways_agree(easy: int, tmp_path: Path) -> None:
    bench = exact_bench(SHAPES[0], tmp_path)
    steps = gpu._dynamic_cot(bench, gpu.Case("dynamic_cot", False, "sdpa", share=easy / 4), bf16=False)
    losses, found = {}, {}
    for way in ("naive", "ours"):
        losses[way] = float(steps[way]())
        found[way] = gradients(bench.model)
    assert losses["ours"] == pytest.approx(losses["naive"], rel=1e-5)
    torch.testing.assert_close(found["ours"], found["naive"], rtol=1e-3, atol=1e-6)


def test_a_way_that_fails_leaves_the_others_alone(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CONFIGURATIONS", ((SHAPES[1], "lora"),))

    def too_large(trainer: AimKPTrainer, batch: Any, stride: int) -> torch.Tensor:
        if stride == 4 and trainer.args.similarity_backend == "batched":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return train_masked(trainer, batch, stride)

    monkeypatch.setattr(gpu, "train_masked", too_large)
    rows = [row for row in gpu.run(QUICK) if row["method"] == "aimkp"]
    for row in rows:
        assert row["sft_s"] > 0 and row["other_s"] > 0
        if row["stride"] == 4:
            assert row["failed"] == {"ours_4": "out of memory"} and row["ours_s"] is None
            assert "out of memory" in gpu.cells(row)[1]
        else:
            assert row["failed"] == {} and row["ours_s"] > 0


def test_a_model_that_does_not_fit_leaves_the_next_alone(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    build = gpu.build_model

    def fails(name: str, **options: Any) -> Any:
        if name == SHAPES[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return build(name, **options)

    monkeypatch.setattr(gpu, "build_model", fails)
    rows = list(gpu.run(QUICK))
    assert {tuple(row["failed"].items()) for row in rows if row["model"] == SHAPES[1]} == {(("model", "out of memory"),)}
    assert all(row["ours_s"] > 0 for row in rows if row["model"] == SHAPES[0])


def test_without_time_rows_say_so(few: None) -> None:
    rows = list(gpu.run(QUICK, seconds=0.0))
    assert len(rows) == 13
    for row in rows:
        assert row["failed"] == {"all": "not measured, no time left"} and row["ours_s"] is None
        assert "no time left" in gpu.cells(row)[1]


def test_real_shapes_are_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="--quick"):
        command.main(["--suite", "gpu", "--device", "cpu"])


def test_the_gpu_s_head_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the trainers score through TRL's fused head, which `SFTTrainer` puts on the model; it runs on a CPU as well."""
    bench = exact_bench(SHAPES[1], tmp_path)
    batch = draw_batch(bench.name, bench.model, 4, TINY, easy=2)
    naive, ours = (
        bench.trainer(trainer_class, DynamicCoTConfig, gamma="inf", strategy=strategy, bf16=False)
        for trainer_class, strategy in ((TwoPassTrainer, "direct"), (DynamicCoTTrainer, "dynamic"))
    )
    masked = bench.trainer(AimKPTrainer, AimKPConfig, filter_gradients=False, bf16=False)
    calls = []

    def fused(*inputs: Any) -> torch.Tensor:
        calls.append(inputs)
        return post_trainer.fused_score_targets(*inputs)

    for step in (partial(train, naive, batch), partial(train, ours, batch), partial(train_masked, masked, batch, 2)):
        calls.clear()
        losses = [float(step())]
        found = [gradients(bench.model)]
        assert not calls
        with monkeypatch.context() as patch:
            patch.setattr(post_trainer, "score_targets", fused)  # which the trainers take on a CPU
            losses.append(float(step()))
            found.append(gradients(bench.model))
        assert len(calls) >= 2
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)
