"""The end of a run: predictions of all modalities asked for, scored in the run's convention beside baselines.

The whole of it is tested through runs (test_run.py, tests/cli/test_train.py).
"""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from dynkp.training import results
from dynkp.training.results import baselines

TRAIN = [
    {"id": "0", "text": "goal in the final", "keyphrases": ["mufc"]},
    {"id": "1", "text": "sunset at the sea", "keyphrases": ["sea", "mufc"]},
]
EVAL = [{"id": "a", "text": "a sunset", "keyphrases": ["sea"]}, {"id": "b", "text": None, "keyphrases": ["x"]}]


def test_baselines() -> None:
    found = baselines(Dataset.from_list(TRAIN), Dataset.from_list(EVAL))
    assert found["most frequent keyphrase (mufc)"] == [["mufc"], ["mufc"]]
    assert found["nearest neighbour in text"][0] == ["sea", "mufc"]


def test_a_stream_has_no_neighbours() -> None:
    stream = IterableDataset.from_generator(lambda: iter(TRAIN))
    assert list(baselines(stream, Dataset.from_list(EVAL))) == ["most frequent keyphrase (mufc)"]


def test_without_scikit_learn_there_is_no_neighbour(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def missing(*args: Any) -> None:
        raise ImportError("scikit-learn is not installed: pip install 'dynkp[demo]'")

    monkeypatch.setattr(results, "nearest_neighbour_keyphrases", missing)
    assert list(baselines(Dataset.from_list(TRAIN), Dataset.from_list(EVAL))) == ["most frequent keyphrase (mufc)"]
    assert "pip install 'dynkp[demo]'" in caplog.text
