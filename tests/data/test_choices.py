"""A misspelt name gets the name it stands for, whatever the case; a name unlike all others gets none."""

from __future__ import annotations

import pytest

from dynkp.data.choices import did_you_mean
from dynkp.data.reasoning_tasks import resolve_reasoning_task
from dynkp.data.tasks import resolve_task
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig


@pytest.mark.parametrize(
    ("value", "expected"), [("dynamik", "dynamic"), ("DIRECT", "direct"), ("multi-task", "multitask"), ("smell", None)]
)
def test_suggestions(value: str, expected: str | None) -> None:
    found = did_you_mean(value, ("dynamic", "direct", "cot", "multitask"))
    assert found == (f" Did you mean {expected!r}?" if expected else "")


def test_wherever_a_name_is_looked_up() -> None:
    options = {"output_dir": "out", "use_cpu": True, "bf16": False}
    for call, expected in (
        (lambda: resolve_task("aimpk"), "aimkp"),
        (lambda: resolve_reasoning_task("mascs"), "masc"),
        (lambda: DynamicCoTConfig(**options, strategy="dynamik"), "dynamic"),
        (lambda: DynamicCoTConfig(**options, eval_convention="cmpk"), "cmkp"),
        (lambda: MulCoTRDConfig(**options, task="mascc"), "masc"),
    ):
        with pytest.raises(ValueError, match=f"Did you mean '{expected}'"):
            call()
