"""Invariants of the tables and captions of scored systems: each cell is the figure of its row and column, in percent; what was
not measured is "-"; a mark stands behind the score it belongs to."""

from __future__ import annotations

from typing import Any

import pytest

from dynkp.report.evaluation_tables import (
    caption,
    column_head,
    measures_table,
    modality_table,
    significance_mark,
    single_system_table,
    subsets_table,
)


def system(f1: float, **more: Any) -> dict[str, Any]:
    scores = {"posts": 1200, "phrases": 1500, "p@1": f1 / 2, "r@1": f1 / 4, "f1@1": f1, "map@5": None}
    figures = {"subsets": {"all": scores, "unseen": {**scores, "posts": 3}}, "modality": "both", "empty_share": 0.25}
    return {**figures, "missing": 0, "decodes": 1, **more}


SYSTEMS = {
    "base": system(0.5),
    "better": system(0.6, reasoning_share=1.0, output_words=12.345, modality="text"),
    "eyes": system(0.4, modality="image"),
}


def mark(name: str, subset: str, measure: str) -> str:
    return "†" if (name, subset, measure) == ("better", "all", "f1@1") else ""


def test_one_system() -> None:
    intervals = {"subsets": {"all": {"f1@1": [0.45, 0.55]}, "unseen": {"f1@1": None}}}
    assert single_system_table(system(0.5, intervals=intervals), 1, ["f1@1", "map@5"]) == [
        ["subset", "posts", "phrases", "P@1", "R@1", "F1@1", "MAP@5"],
        ["all", "1,200", "1,500", "25.00", "12.50", "50.00 [45.00, 55.00]", "-"],
        ["unseen", "3", "1,500", "25.00", "12.50", "50.00", "-"],
    ]


def test_several_systems() -> None:
    assert measures_table(SYSTEMS, "all", ["f1@1", "map@5"], mark) == [
        ["system", "F1@1 all", "MAP@5 all", "reasoning", "output words", "no keyphrase"],
        ["base", "50.00", "-", "-", "-", "25.00"],
        ["better", "60.00†", "-", "100.00", "12.35", "25.00"],
        ["eyes", "40.00", "-", "-", "-", "25.00"],
    ]
    assert subsets_table(SYSTEMS, ["all", "unseen"], "f1@1", mark) == [
        ["system", "F1@1 all (1,200 posts)", "F1@1 unseen (3 posts)"],
        ["base", "50.00", "50.00"],
        ["better", "60.00†", "60.00"],
        ["eyes", "40.00", "40.00"],
    ]


def test_systems_by_modality() -> None:
    assert modality_table(SYSTEMS, "all", ["f1@1"]) == [
        ["posts", "system", "F1@1"],
        ["image only", "eyes", "40.00"],
        ["text only", "better", "60.00"],
        ["text and image", "base", "50.00"],
    ]


@pytest.mark.parametrize(
    ("p_value", "expected"), [(0.0, "‡"), (0.0099, "‡"), (0.01, "†"), (0.0499, "†"), (0.05, ""), (1.0, "")]
)
def test_marks(p_value: float, expected: str) -> None:
    assert significance_mark(p_value) == expected


def test_heads() -> None:
    assert [column_head(measure) for measure in ("f1@1", "f1@m", "micro_f1@3", "r_precision")] == [
        "F1@1", "F1@M", "MICRO_F1@3", "R_PRECISION",
    ]  # fmt: skip


def test_captions() -> None:
    one = {"a": system(0.5, missing=2, decodes=3, keyphrases_per_post=1.5, repeat_share=0.1)}
    assert caption(one, convention="cmkp", posts=1200, confidence=0.9) == (
        "Percent, convention cmkp, 1,200 posts. 2 missing predictions are scored as empty. Means over 3 decodes. "
        "In brackets 90% bootstrap intervals. 25.00 % without keyphrase; 10.00 % of keyphrases repeated; 1.50 keyphrases."
    )
    several = caption({**one, **SYSTEMS}, convention="aimkp", posts=7, confidence=0.95)
    assert "a: 2 missing predictions" in several and "different from 'a', paired permutation test" in several
    assert "p <" not in caption(SYSTEMS, convention="aimkp", posts=7, confidence=None)
