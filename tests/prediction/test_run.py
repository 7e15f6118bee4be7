"""Invariants of a prediction run (interrupted, parallel and continued runs are in tests/cli/test_predict.py):

- two runs never write to the same output, not even while a line is being written, or after a run that has finished;
- a row that was written twice is kept once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dynkp.prediction.run import PredictionRun


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    output = tmp_path / "p.jsonl"
    posts = [{"id": str(index), "text": "a"} for index in range(3)]
    first, second, third = (PredictionRun(posts, output, {"mode": mode}, batch_size=1) for mode in ("a", "a", "b"))

    def engine(rows: Any, seed: Any = None) -> Any:
        with output.open("ab") as half:
            half.write(b'{"id": "1", ')
        with pytest.raises(BlockingIOError, match="another run is writing"):
            second.start()
        assert output.read_bytes().endswith(b'{"id": "1", '), "not torn, but just being written"
        os.truncate(output, output.stat().st_size - 12)
        return [{"id": row["id"], "keyphrases": []} for row in rows]

    first.start()
    first.predict(engine, first.pending(), progress=False)
    assert len(first.finish()) == 3
    second.start()
    assert second.pending() == []
    second.close()
    with pytest.raises(ValueError, match="mode was 'a' and is 'b'"):
        third.start()
    third.close()


def test_rows_written_twice_are_kept_once(tmp_path: Path) -> None:
    run = PredictionRun([{"id": "1", "text": "a"}, {"id": "2", "text": "b"}], tmp_path / "p.jsonl", {}, batch_size=1)
    run.start()
    (tmp_path / "p.jsonl").write_text('{"id": "1", "raw": ""}\n{"id": "2", "raw": ""}\n{"id": "2", "raw": ""}\n')
    assert [row["id"] for row in run.finish()] == ["1", "2"]
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2
