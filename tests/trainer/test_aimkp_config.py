"""Options of AimKP: values out of range are errors that name the option; thresholds are those of the masked modalities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynkp.trainer.aimkp_config import AimKPConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True, "bf16": False}, "fp16"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"text_threshold": 2.0}, "text_threshold"),
        ({"initial_stride": 1}, "initial_stride"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"stride_schedule": "quadratic"}, "stride_schedule"),
        ({"mask_pattern": "blurred"}, "mask_pattern"),
        ({"variant_reduction": "max"}, "variant_reduction"),
        ({"similarity_backend": "fast"}, "similarity_backend"),
        ({"projector_learning_rate": -1.0}, "projector_learning_rate"),
    ],
)
def test_what_cannot_be_right_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AimKPConfig(output_dir=str(tmp_path), use_cpu=True, **{"bf16": False, **options})


@pytest.mark.parametrize(
    ("options", "modalities", "thresholds"),
    [
        ({}, ("text", "image"), [0.1, 0.4]),
        ({"mask_text": False, "image_threshold": 0.3}, ("image",), [0.3]),
        ({"mask_image": False}, ("text",), [0.1]),
        ({"mask_text": False, "mask_image": False}, (), []),
        ({"filter_gradients": False}, ("text", "image"), None),
    ],
)
def test_thresholds_are_those_of_the_masked_modalities(
    options: dict[str, Any], modalities: tuple[str, ...], thresholds: list[float] | None
) -> None:
    args = AimKPConfig(output_dir="out", use_cpu=True, bf16=False, **options)
    assert (args.modalities, args.thresholds) == (modalities, thresholds)
