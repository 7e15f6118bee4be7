"""A run's options: every method has its trainer, and what a name may be is checked when it is read."""

from __future__ import annotations

import pytest

from dynkp.training.options import METHODS, DataArguments, PredictionArguments, check_method


def test_methods() -> None:
    assert list(METHODS) == ["dynamic_cot", "aimkp", "dynamic_aimkp", "mulcot_rd"]
    for name, (trainer_class, config_class) in METHODS.items():
        check_method(name)
        assert trainer_class.__name__.removesuffix("Trainer") == config_class.__name__.removesuffix("Config")
    with pytest.raises(ValueError, match="`method` is 'mulcot-rd'.* Did you mean 'mulcot_rd'"):
        check_method("mulcot-rd")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DataArguments(method="sft"), "`method` is 'sft'"),
        (lambda: DataArguments(modality="images"), "`modality` is 'images'.* Did you mean 'image'"),
        (lambda: DataArguments(stopping_strategy="never"), "stopping_strategy"),
        (lambda: PredictionArguments(eval_modalities=["both", "smell"]), "`eval_modalities` is 'smell'"),
        (lambda: PredictionArguments(predict_batch_size=0), "`predict_batch_size` is 0"),
    ],
)
def test_values_are_checked(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
