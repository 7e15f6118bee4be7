"""`dynkp bench --suite mulcot_rd` measures ways that compute the same, and each row says what it measured.

Holds at the quick size: online and a whole cache agree, whatever is computed twice or once; one that computes something
else stops the suite. Times are never asserted: the machine is shared.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dynkp import cli
from dynkp.bench import mulcot_rd
from dynkp.bench.measure import AGREEMENT, Setting
from dynkp.bench.workload import QUICK


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    file = tmp_path_factory.mktemp("bench") / "rows.json"
    threads = torch.get_num_threads()
    arguments = ["--suite", "mulcot_rd", "--quick", "--repeats", "1", "--device", "cpu", "--json", str(file)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mulcot_rd, "SCENARIOS", (mulcot_rd.SCENARIOS[0], mulcot_rd.SCENARIOS[-1]))  # to take half as long
        assert cli.main(["bench", *arguments]) == 0
    torch.set_num_threads(threads)
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_row_per_scenario_that_says_how_it_was_made(rows: list[dict]) -> None:
    assert [(row["top_k"], row["checkpointing"]) for row in rows] == [(64, False), (64, True)]
    for row in rows:
        assert row["suite"] == "mulcot_rd" and row["quick"] and row["versions"]["torch"] == torch.__version__
        assert row["cached_over_plain"] == pytest.approx(row["cached_s"] / row["plain_s"])
        assert row["online_over_plain_and_assistant"] == pytest.approx(row["online_s"] / (row["plain_s"] + row["assistant_s"]))
        assert all(row[f"{name}_mib"] > 0 for name in ("plain", "cached", "online"))
        assert row["largest_disagreement"] <= AGREEMENT and row["assistant_parameters"] > row["parameters"]


def test_once_and_twice_compute_the_same(tmp_path: Path) -> None:
    bench = mulcot_rd.Bench(QUICK, torch.device("cpu"), str(tmp_path))
    assert bench.batch["chain"]["lengths"] and bench.batch["prompts"]["shared"] > QUICK.image_tokens + QUICK.text_tokens
    assert float(mulcot_rd.plain(bench)) == pytest.approx(float(mulcot_rd.twice(bench)), rel=1e-5)
    assert float(mulcot_rd.cached(bench, bench.with_cache(8))) != pytest.approx(float(mulcot_rd.plain(bench)), rel=1e-3)


def test_ways_that_disagree_stop_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mulcot_rd, "cached", lambda bench, trainer: mulcot_rd.plain(bench))
    with pytest.raises(RuntimeError, match="do not compute the same"):
        next(mulcot_rd.run(Setting(torch.device("cpu"), threads=1, repeats=1, quick=True)))
