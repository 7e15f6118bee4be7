"""Options of MulCoT-RD: values out of range are errors that name the option; the plateau follows the metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trl import TrlParser

from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation_weight": 1.5}, "`distillation_weight` is 1.5"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"task": "dynamic_cot"}, "`task` is 'dynamic_cot'"),
        ({"kd_positions": "prompt"}, "`kd_positions` is 'prompt'"),
        ({"kd_positions": "all", "soft_labels": "x"}, "`kd_positions` is 'all', but `soft_labels`"),
        ({"separator": ", "}, "`separator` is ', '"),
        ({"trailing_template_tokens": False}, "`trailing_template_tokens` is False"),
        ({"assistant_dtype": "int8"}, "`assistant_dtype` is 'int8'"),
        ({"task_weights": {"chain": 1.0}}, "`task_weights` is"),
        ({"task_weights": {"chain": 1.0, "label": 0.0}}, "The label's must be above 0"),
        ({"task_weights": {"chain": 1.0, "label": 1.0, "other": 1.0}}, "`task_weights` is"),
        ({"task_weights": "chain"}, "`task_weights` is 'chain'"),
        ({"task_weights": {"chain": float("inf"), "label": 1.0}}, "`task_weights` is"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MulCoTRDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"metric_for_best_model": "accuracy"}, {"mode": "max", "factor": 0.5, "patience": 2}),
        ({}, {"mode": "min", "factor": 0.5, "patience": 2}),  # on the loss, which is to fall
        (
            {"metric_for_best_model": "accuracy", "lr_scheduler_kwargs": '{"patience": 5}'},
            {"mode": "max", "factor": 0.5, "patience": 5},
        ),
    ],
)
def test_the_plateau_is_the_metric_s(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", **given}
    args = MulCoTRDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    assert args.lr_scheduler_kwargs == expected


def test_the_options_reach_the_command_line(tmp_path: Path) -> None:

    parser = TrlParser((MulCoTRDConfig,))
    given = ["--output_dir", str(tmp_path), "--task_weights", json.dumps({"chain": 2, "label": 1}), "--bf16", "false"]
    [args] = parser.parse_args_and_config([*given, "--use_cpu", "true", "--temperature", "3"])
    assert args.parsed_task_weights == {"label": 1.0, "chain": 2.0} and args.temperature == 3.0
