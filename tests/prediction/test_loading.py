"""What a run's outputs depend on is recorded, with the names that earlier runs have.

How engines generate is tested through `dynkp predict` (tests/cli/test_predict.py).
"""

from __future__ import annotations

import json

from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.data.tasks import TASKS
from dynkp.models.checkpoints import Checkpoint
from dynkp.prediction.loading import EngineSettings, Question, run_settings


def test_the_settings_of_a_run() -> None:
    settings = run_settings(Checkpoint("some/model"), Question(TASKS["aimkp"], "think"), EngineSettings(num_beams=5))
    assert settings == {
        "model": "some/model",
        "adapter": None,
        "merge_adapter": False,
        "task": {"name": "aimkp", "instruction": "What phrases should be used to tag the media?", "separator": ", "},
        "mode": "think",
        "max_new_tokens": 512,
        "num_beams": 5,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "dtype": "auto",
        "backend": "transformers",
        "vllm_options": {},
    }


def test_sampling_is_recorded_with_its_defaults() -> None:
    assert EngineSettings(do_sample=True, temperature=0.5).sampling() == {"temperature": 0.5, "top_p": 1.0}
    assert EngineSettings(temperature=0.5).sampling() == {}


def test_the_question_is_recorded_as_the_prompt_asks_it() -> None:
    task = REASONING_TASKS["masc"]
    label, chain = (Question(task, prompt=prompt).settings() for prompt in ("label", "chain"))
    assert label == {"name": "masc", "prompt": "label", "question": task.question}
    assert chain == {**label, "prompt": "chain", "fields": dict(task.analyses)}
    assert json.loads(json.dumps(chain)) == chain
