"""Invariants of prediction files: a file is complete or absent."""

from __future__ import annotations

import json

import pytest

from dynkp.prediction.prediction_files import write_predictions


def test_predictions_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    rows = [{"id": "1", "keyphrases": ["café ☀"]}, {"id": "2", "keyphrases": []}]
    assert write_predictions(path, iter(rows)) == 2
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows

    def breaking():
        yield rows[0]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_predictions(path, breaking())
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]
