"""Invariants of loading:

- if torchvision is missing, training and prediction say so in one sentence;
- padding of images to squares is an option of training that is saved with the processor, so that prediction uses it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor

from dynkp.models.checkpoints import Checkpoint, load_model, load_processor, load_processor_by_name, pad_images_to_squares
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer
from tests.support.posts import picture, rows
from tests.support.tiny_models import build

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


def test_images_are_padded_to_squares_and_stay_so(tmp_path: Path) -> None:
    """A wide image keeps its left and right ends, which the published crop loses."""
    _, processor = build("llava")
    wide = picture(1, (120, 40))
    asked = {"text": ["<image>"], "images": [[wide]], "return_tensors": "pt"}
    cropped = processor(**asked)["pixel_values"]
    pad_images_to_squares(processor)
    padded = processor(**asked)["pixel_values"]
    assert padded.shape == cropped.shape and not padded.equal(cropped)
    height = padded.shape[-2]
    assert padded[0, :, : height // 4].std() < 1e-6, "above a wide picture is one colour"
    assert padded[0, :, height // 2].std() > 0.05
    processor.save_pretrained(tmp_path)
    assert load_processor_by_name(str(tmp_path))(**asked)["pixel_values"].equal(padded)
    with pytest.raises(ValueError, match="pad_images_to_squares"):
        pad_images_to_squares(build("qwen2_vl")[1])


def test_options_of_the_processor_reach_it(tmp_path: Path) -> None:
    model, processor = build("qwen2_vl")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    grids = []
    for side in (4, 8):
        pixels = (side * 2 * processor.image_processor.patch_size) ** 2
        sizes = {"min_pixels": pixels, "max_pixels": pixels}
        args = DynamicCoTConfig(output_dir=str(tmp_path / "out"), bf16=False, use_cpu=True, processor_kwargs=sizes)
        trainer = DynamicCoTTrainer(model=str(tmp_path / "model"), args=args, train_dataset=rows("qwen2_vl", 1))
        batch = trainer.data_collator([rows("qwen2_vl", 1)[0]])
        grids.append(batch["prompt"]["image_grid_thw"][0].prod().item() / 4)
    assert grids[0] == pytest.approx(16, rel=0.3) and grids[1] == pytest.approx(64, rel=0.3), "tokens of a picture"


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"\0" * 4])
@pytest.mark.parametrize("damaged", ["model", "adapter"])
def test_damaged_weights_are_named(content: bytes, damaged: str, tmp_path: Path) -> None:
    model, _ = build("llava")
    model.save_pretrained(tmp_path / "model")
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    name = "model.safetensors" if damaged == "model" else "adapter_model.safetensors"
    (tmp_path / damaged / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is no file of weights .*: it is damaged, or a pointer of Git LFS; copy"):
        load_model(Checkpoint(str(tmp_path / "model"), str(tmp_path / "adapter")))
