"""The suite `scoring` of `dynkp bench`: a row per size, measured in processes of their own; times are never asserted."""

from __future__ import annotations

import pytest
import torch

from dynkp.bench import run, scoring
from dynkp.bench.measure import Setting


def test_rows_and_cells():
    rows = list(scoring.run(Setting(torch.device("cpu"), threads=1, repeats=1, quick=True)))
    assert [row["posts"] for row in rows] == [500, 2000]
    for row in rows:
        assert row["suite"] == "scoring" and row["quick"] and row["cold_s"] > row["warm_s"] > 0
        assert len(scoring.cells(row)) == len(scoring.HEADINGS)
        assert run._provenance(row)


def test_drawn_posts_have_cmkp_s_sizes():
    (batch,) = scoring._drawn_batches(2000)
    ranked, gold, texts = batch
    assert {len(row) for row in ranked} == {5}
    assert sum(map(len, gold)) / 2000 == pytest.approx(1.3, abs=0.05)
    assert {len(text.split()) for text in texts} == {27}
