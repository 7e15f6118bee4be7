"""Processors by name: where torchvision is missing, training and prediction say so in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from posts_for_tests import rows
from tiny_models import build
from transformers import AutoProcessor

from dynkp.checkpoints import Checkpoint, load_processor, load_processor_by_name
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer

# As transformers says it, over three lines.
UPSTREAM = "\nQwen2VLVideoProcessor requires the Torchvision library but it was not found in your environment.\nCheck ...\n"


def test_torchvision_is_asked_for_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without_torchvision(*args: Any, **kwargs: Any) -> None:
        raise ImportError(UPSTREAM)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", without_torchvision)
    model, _ = build("llama")
    model.save_pretrained(tmp_path / "model")
    args = DynamicCoTConfig(output_dir=str(tmp_path / "out"), bf16=False, use_cpu=True)
    for load in (
        lambda: load_processor(Checkpoint(str(tmp_path / "model"))),
        lambda: DynamicCoTTrainer(model=str(tmp_path / "model"), args=args, train_dataset=rows("llama", 2)),
    ):
        with pytest.raises(ImportError) as error:
            load()
        assert str(error.value).endswith("needs torchvision, which is not installed: pip install 'dynkp[vision]'.")


def test_other_missing_packages_are_not_called_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_num2words(*args: Any, **kwargs: Any) -> None:
        raise ImportError("num2words is needed")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", without_num2words)
    with pytest.raises(ImportError, match="^num2words is needed$"):
        load_processor_by_name("somewhere")
