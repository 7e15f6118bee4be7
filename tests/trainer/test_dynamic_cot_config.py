"""Options of Dynamic CoT: values out of range are errors that name option, value and remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from tests.support.trainers import trainer_of


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": -1}, ["`gamma`", "-1", "'avg'"]),
        ({"gamma": "often"}, ["`gamma`", "often", "'avg'"]),
        ({"gamma_window": 0}, ["`gamma_window`", "0", "at least 1"]),
        ({"gamma": "quantile:0.5", "gamma_window": -3}, ["`gamma_window`", "-3", "at least 1"]),
        ({"strategy": "dynamik"}, ["`strategy`", "dynamik", "'dynamic'"]),
        ({"strategy": "random:1.5"}, ["`strategy`", "1.5", "0 <= p <= 1"]),
        ({"strategy": "random:nan"}, ["`strategy`", "nan", "0 <= p <= 1"]),
        ({"strategy": "random"}, ["`strategy`", "random", "0 <= p <= 1"]),
        ({"strategy": "random:p"}, ["`strategy`", "random:p", "0 <= p <= 1"]),
        ({"answer_weight": -0.5}, ["`answer_weight`", "-0.5", "not negative"]),
        ({"answer_weight": math.inf}, ["`answer_weight`", "inf", "finite"]),
        ({"answer_weight": math.nan}, ["`answer_weight`", "nan", "finite"]),
        ({"multitask_weight": -1.0}, ["`multitask_weight`", "-1.0", "not negative"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_options_out_of_range_name_field_value_and_remedy(options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        trainer_of("llama", tmp_path, **options)
    for word in words:
        assert word in str(error.value)


def test_gamma_may_be_a_number_or_a_string() -> None:
    assert DynamicCoTConfig(gamma=0.25, bf16=False).gamma == "0.25"
    assert DynamicCoTConfig(bf16=False).gamma == "0.4"
