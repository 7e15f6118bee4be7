"""The default run: posts are drawn, two strategies compared, and what each modality is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynkp.cli import train
from dynkp.training import drawn_posts
from tests.support.training_runs import QUICK, read_jsonl


def test_drawn_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("TRAIN_POSTS", 48), ("TEST_POSTS", 20), ("PRETRAINING_ROWS", 48)):
        monkeypatch.setattr(drawn_posts, name, value)
    monkeypatch.setitem(drawn_posts.PRETRAINING, "max_steps", 2)
    train.main([*QUICK, "--max_steps", "3", "--output_dir", str(tmp_path), "--per_device_train_batch_size", "8"])
    systems = json.loads((tmp_path / "metrics.json").read_text())["systems"]
    for strategy in ("direct", "dynamic"):
        assert {strategy, f"{strategy}, no image", f"{strategy}, no text"} <= systems.keys()
        assert len(read_jsonl(tmp_path / f"predictions.{strategy}.jsonl")) == 20
    assert "unseen" in capsys.readouterr().out
