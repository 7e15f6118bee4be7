"""What a run does otherwise for MulCoT-RD; whole runs are in tests/examples/test_mulcot_rd_pipeline.py.

Holds: an assistant of another task is refused before posts are read; the texts of a tokenizer are the prompts and targets.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dynkp import MulCoTRDConfig
from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.models.saved_task import SavedTask
from dynkp.training.mulcot_rd import check_assistant, load, texts
from tests.support.training_runs import write_jsonl

ROWS = [{"id": "1", "text": "Go Cubs", "aspect": "Cubs", "label": "positive", "rationale": "A cheer."}]


def args(folder: Path, **options: Any) -> MulCoTRDConfig:
    return MulCoTRDConfig(output_dir=str(folder), use_cpu=True, bf16=False, disable_tqdm=True, **options)


def test_an_assistant_of_another_task(tmp_path: Path) -> None:
    check_assistant(args(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    check_assistant(args(tmp_path, assistant=str(tmp_path)))  # saved by an earlier version, without its task
    SavedTask(REASONING_TASKS["msc"], method="mulcot_rd").write(tmp_path)
    check_assistant(args(tmp_path, assistant=str(tmp_path), task="msc"))
    with pytest.raises(ValueError, match="was trained with task 'msc', and `task` is 'masc'"):
        check_assistant(args(tmp_path, assistant=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="--assistant='./nowhere'"):
        check_assistant(args(tmp_path, assistant="./nowhere"))


def test_an_assistant_of_another_modality(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    options = args(tmp_path, assistant=str(tmp_path))
    SavedTask(REASONING_TASKS["masc"], "text", method="mulcot_rd").write(tmp_path)
    check_assistant(options, "text")
    for modality in ("both", "image"):
        with pytest.raises(ValueError, match=f"trained on modality 'text', and `modality` is '{modality}': train the student"):
            check_assistant(options, modality)
    SavedTask(REASONING_TASKS["masc"], method="mulcot_rd").write(tmp_path)
    check_assistant(options, "image")


def test_an_assistant_of_another_task_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    own = dataclasses.replace(REASONING_TASKS["masc"], question="What mood?")
    SavedTask(own, method="mulcot_rd").write(tmp_path)
    with pytest.raises(ValueError, match="was trained with task 'masc' with another prompt, .*: take an assistant of"):
        check_assistant(args(tmp_path, assistant=str(tmp_path)))


def test_texts_of_a_tokenizer(tmp_path: Path) -> None:
    posts = load(write_jsonl(tmp_path / "posts.jsonl", ROWS), args(tmp_path), None)
    (text,) = texts(posts, args(tmp_path))
    task = REASONING_TASKS["masc"]
    for part in ("Go Cubs", "Aspect: Cubs", task.question, '"Prediction": positive', "A cheer."):
        assert part in text
