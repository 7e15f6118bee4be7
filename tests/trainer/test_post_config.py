"""Options of all trainers: values out of range, or not supported with posts, are errors that name option and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynkp import KeyphraseConfig, PostConfig
from dynkp.trainer.post_config import one_of
from tests.support.trainers import trainer_of


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_normalization": "batch"}, ["`loss_normalization`", "batch", "'token'"]),
        ({"max_length": 1}, ["`max_length`", "1", "None"]),
        ({"on_invalid": "ignore"}, ["`on_invalid`", "ignore", "'skip'"]),
        ({"prompt_backend": "fast"}, ["`prompt_backend`", "fast", "'plain'"]),
        ({"remove_unused_columns": True}, ["`remove_unused_columns`", "True", "False"]),
        ({"packing": True}, ["`packing`", "False"]),
        ({"padding_free": True}, ["`padding_free`", "False"]),
        ({"loss_type": "dft"}, ["`loss_type`", "default"]),
        ({"label_smoothing_factor": 0.1}, ["`label_smoothing_factor`", "default"]),
        ({"assistant_only_loss": True}, ["`assistant_only_loss`", "default"]),
        ({"completion_only_loss": False}, ["`completion_only_loss`", "default"]),
        ({"task": "haiku"}, ["task", "haiku", "dynamic_cot"]),
        ({"separator": "ab"}, ["separator", "'ab'", "punctuation"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_options_out_of_range_name_field_value_and_remedy(options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        trainer_of("llama", tmp_path, **options)
    for word in words:
        assert word in str(error.value)


def test_a_misspelt_choice_gets_a_suggestion() -> None:
    one_of("shared", "prompt_backend", ("auto", "shared", "plain"))
    with pytest.raises(ValueError, match="`prompt_backend` is 'shard'; choose one of 'auto', .* Did you mean 'shared'"):
        one_of("shard", "prompt_backend", ("auto", "shared", "plain"))


def test_the_earlier_name_is_the_same_class() -> None:
    assert KeyphraseConfig is PostConfig
