"""`dynkp bench --suite dynamic_cot` measures ways that compute the same, and each row says what it measured.

Holds at the quick size: oracle, naive and ours agree in loss and gradients for every share, with checkpointing and with
unequal lengths; a way that computes something else stops the suite. Times are never asserted: the machine is shared.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dynkp import cli
from dynkp.bench import dynamic_cot
from dynkp.bench.measure import AGREEMENT, Setting
from dynkp.bench.steps import train
from dynkp.bench.workload import QUICK, build_model, build_processor

CPU = Setting(torch.device("cpu"), threads=1, repeats=1, quick=True)


@pytest.fixture(scope="module")
def json_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "rows.json"
    threads = torch.get_num_threads()
    arguments = ["--suite", "dynamic_cot", "--quick", "--repeats", "1", "--device", "cpu", "--json", str(file)]
    assert cli.main(["bench", *arguments]) == 0
    torch.set_num_threads(threads)
    return file


def test_the_file_has_a_row_per_scenario_that_says_how_it_was_made(json_file: Path) -> None:
    rows = json.loads(json_file.read_text(encoding="utf-8"))
    assert [(row["easy_share"], row["checkpointing"], row["unequal"]) for row in rows] == [
        *((share, False, False) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        (0.5, True, False),
        (0.5, False, True),
    ]
    for row in rows:
        assert row["suite"] == "dynamic_cot" and row["device"] == "cpu" and row["quick"] and row["threads"] == 1
        assert row["versions"]["torch"] == torch.__version__ and row["date"] and row["machine"]
        for way in ("oracle", "naive", "ours"):
            assert row[f"{way}_s"] > 0 and row[f"{way}_mib"] > 0
        assert row["ours_over_oracle"] == pytest.approx(row["ours_s"] / row["oracle_s"])
        assert row["naive_over_ours"] == pytest.approx(row["naive_s"] / row["ours_s"])
        assert 0 < row["trained_parameters"] < row["parameters"]
        assert row["largest_disagreement"] <= AGREEMENT


@pytest.mark.parametrize("scenario", dynamic_cot.SCENARIOS, ids=lambda scenario: scenario.label)
def test_three_ways_agree(scenario: dynamic_cot.Scenario, tmp_path: Path) -> None:
    processor = build_processor(QUICK)
    model = build_model(QUICK, processor)
    bench = dynamic_cot.build(model, processor, QUICK, scenario, str(tmp_path))
    assert sum(bench.easy) == scenario.easy_share * QUICK.batch
    lengths = bench.batch["reasoning"]["lengths"]
    if scenario.unequal:
        assert len(set(lengths)) > 1 and bench.batch["prompt"]["attention_mask"].min() == 0
    else:
        taught = bench.batch["has_rationale"].tolist()
        assert lengths == [12 if rationale else 0 for rationale in taught] and bench.batch["direct"]["lengths"] == [4] * 4
        assert taught == (bench.easy if any(bench.easy) else [True] * 4)
    assert model.is_activation_checkpointing == scenario.checkpointing
    losses, gradients = {}, {}
    for way in (dynamic_cot.oracle, dynamic_cot.naive, dynamic_cot.ours):
        losses[way.__name__] = float(way(bench))
        gradients[way.__name__] = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    for way in ("naive", "ours"):
        assert losses[way] == pytest.approx(losses["oracle"], rel=1e-5)
        for name, gradient in gradients["oracle"].items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradients[way][name], gradient, rtol=1e-3, atol=1e-6, msg=f"{way}: {name}")
    assert not list(tmp_path.iterdir())


def test_ways_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(bench: dynamic_cot.Bench) -> torch.Tensor:
        return train(bench.ours, {**bench.batch, "direct": bench.batch["reasoning"]})

    monkeypatch.setattr(dynamic_cot, "ours", ours)
    with pytest.raises(RuntimeError, match="ours and oracle differ"):
        next(dynamic_cot.run(CPU))
