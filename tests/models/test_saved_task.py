"""Invariants of the task that is saved with a model:

- what is read equals what was written, for every task there is and for tasks of a user's own;
- every save of every method writes it: the model, each checkpoint, a LoRA adapter; an adapter's counts before its base's;
- a resumed run has the checkpoint's task, modality, method and strategy, or is refused;
- a request that contradicts it is refused in one sentence; one modality of two may be asked for, not one that was never seen;
- a model without it works as before, and one line says which task is taken.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from peft import LoraConfig

import dynkp
from dynkp import (
    AimKPConfig,
    AimKPTrainer,
    DynamicAimKPConfig,
    DynamicAimKPTrainer,
    DynamicCoTConfig,
    DynamicCoTTrainer,
    KeyphraseTask,
    MulCoTRDConfig,
    MulCoTRDTrainer,
    ReasoningTask,
)
from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.data.tasks import TASKS
from dynkp.models.checkpoints import Checkpoint
from dynkp.models.saved_task import FILE, SavedTask, check_mode, find_saved_task, modality_to_use, task_to_use
from dynkp.training.options import METHODS
from tests.support.posts import rows
from tests.support.reasoning_trainers import reasoning_rows
from tests.support.tiny_models import build

OWN = [
    KeyphraseTask("mine", "Which tags?", separator=" | "),
    ReasoningTask("mood", "Which mood?", {"Text_analysis": "the text"}, labels=("glad", "sad"), takes_aspect=True),
    dataclasses.replace(REASONING_TASKS["keyphrases"], keyphrase_task=KeyphraseTask("k", "", separator=", ")),
]


@pytest.mark.parametrize("task", [*TASKS.values(), *REASONING_TASKS.values(), *OWN], ids=lambda task: task.name)
def test_what_is_read_is_what_was_written(task: Any, tmp_path: Path) -> None:
    saved = SavedTask(task, "image", "dynamic_cot", "dynamic", 512)
    saved.write(tmp_path)
    found = SavedTask.read(tmp_path / FILE)
    assert found == saved and type(found.task) is type(task)
    content = json.loads((tmp_path / FILE).read_text())
    assert content["dynkp_version"] == dynkp.__version__ and content["template_date"] is None
    example = {"id": "1", "text": "x", "images": [], "aspect": "y", "keyphrases": ["a", "b"], "label": task_label(task)}
    if isinstance(task, KeyphraseTask):
        assert found.task.direct_target(["a", "b"]) == task.direct_target(["a", "b"])
    else:
        assert found.task.chain_prompt(example) == task.chain_prompt(example)
        assert found.task.label_target(example) == task.label_target(example)


def task_label(task: Any) -> str | None:
    return next(iter(getattr(task, "labels", ())), None)


def trainer_of(method: str, folder: Path, **options: Any) -> Any:
    trainer_class, config_class = METHODS[method]
    quiet = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    args = config_class(
        output_dir=str(folder), max_steps=2, save_steps=1, save_strategy="steps", logging_steps=1, learning_rate=1e-3,
        per_device_train_batch_size=2, warmup_steps=0, **quiet,
    )  # fmt: skip
    model, processor = build("llava")
    posts = reasoning_rows("llava", 4) if method == "mulcot_rd" else rows("llava", 4)
    return trainer_class(model, args, train_dataset=posts, processing_class=processor, **options)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_save_of_every_method_has_it(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(method, tmp_path)
    trainer.modality = "both"
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2", tmp_path / "model"):
        saved = find_saved_task(Checkpoint(str(folder)))
        assert saved is not None and saved.task == trainer.task and saved.method == method
        assert saved.strategy == ("dynamic" if "dynamic" in method else None)
        assert (saved.modality, saved.max_length, saved.template_date) == ("both", None, None)


def test_output_dir_has_it_as_soon_as_a_checkpoint_has(tmp_path: Path) -> None:
    """Trainer pushes checkpoints to the Hub from there, and copies only the files that it knows."""
    trainer_of("aimkp", tmp_path).train()
    assert SavedTask.read(tmp_path / FILE) == SavedTask.read(tmp_path / "checkpoint-2" / FILE)


def test_a_task_that_cannot_be_saved_is_refused_before_the_training(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Odd(KeyphraseTask):
        words: Any = None

    odd = Odd("odd", "Which tags?", words={1, 2})
    with pytest.raises(ValueError, match="`task` 'odd' of class Odd cannot be saved as JSON .*set.*: give its fields values"):
        trainer_of("aimkp", tmp_path, task=odd)
    assert trainer_of("aimkp", tmp_path, task=dataclasses.replace(odd, words=[1, 2])).task.words == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": TASKS["dynamic_cot"]}, "with task 'aimkp', not 'dynamic_cot', separator ', ', not '; ': resume"),
        ({"task": dataclasses.replace(TASKS["aimkp"], separator="! ")}, "with separator ', ', not '! ': resume with"),
        ({"modality": "text"}, "with modality 'both', not 'text': resume with"),
        ({"method": "dynamic_aimkp"}, "with method 'aimkp', not 'dynamic_aimkp': resume with"),
    ],
)
def test_a_run_does_not_continue_from_a_checkpoint_of_another_task(change: Any, message: str, tmp_path: Path) -> None:
    trainer_of("aimkp", tmp_path).train()
    saved = (tmp_path / "checkpoint-2" / FILE).read_text()
    for resume in (True, str(tmp_path / "checkpoint-1")):
        trainer = trainer_of("aimkp", tmp_path)
        trainer.args.max_steps = 3
        for name, value in change.items():
            setattr(trainer, name, value)
        with pytest.raises(ValueError, match=f"`resume_from_checkpoint` .*checkpoint-[12]' was trained {message}") as error:
            trainer.train(resume_from_checkpoint=resume)
        assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoint-2" / FILE).read_text() == saved and not (tmp_path / "checkpoint-3").exists()


def test_a_run_continues_with_another_length_and_without_a_saved_task(tmp_path: Path) -> None:
    saved = SavedTask(TASKS["aimkp"], method="aimkp", max_length=4)
    saved.check_resumption(tmp_path)
    dataclasses.replace(saved, max_length=8, dynkp_version="0").write(tmp_path)
    saved.check_resumption(tmp_path)
    for content in ("{", "[]", "{}"):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(ValueError, match=FILE):
            saved.check_resumption(tmp_path)


def test_the_methods_names_are_those_of_the_command() -> None:
    assert {name: trainer_class.method for name, (trainer_class, _) in METHODS.items()} == {name: name for name in METHODS}
    assert {AimKPConfig, DynamicAimKPConfig, DynamicCoTConfig, MulCoTRDConfig} == {config for _, config in METHODS.values()}
    assert {AimKPTrainer, DynamicAimKPTrainer, DynamicCoTTrainer, MulCoTRDTrainer} == {cls for cls, _ in METHODS.values()}


def test_an_adapter_has_it_too(tmp_path: Path) -> None:
    trainer = trainer_of("aimkp", tmp_path, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]))
    trainer.train()
    assert (tmp_path / "checkpoint-2/adapter_config.json").exists()
    base = tmp_path / "base"
    base.mkdir()
    SavedTask(TASKS["dynamic_cot"], method="dynamic_cot").write(base)
    found = find_saved_task(Checkpoint(str(base), str(tmp_path / "checkpoint-2")))
    assert found is not None and found.task == TASKS["aimkp"]
    (tmp_path / "checkpoint-2" / FILE).unlink()
    found = find_saved_task(Checkpoint(str(base), str(tmp_path / "checkpoint-2")))
    assert found is not None and found.task == TASKS["dynamic_cot"], "the base model's, where the adapter has none"
    with pytest.raises(ValueError, match=r"base' was trained with task 'dynamic_cot', not 'aimkp'"):  # not the adapter
        task_to_use(found, Checkpoint(str(base), str(tmp_path / "checkpoint-2")), "aimkp")
    assert "found_in" not in (base / FILE).read_text()


def test_a_model_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dynkp")
    checkpoint = Checkpoint(str(tmp_path))
    assert find_saved_task(checkpoint) is None
    assert task_to_use(None, checkpoint) == TASKS["dynamic_cot"]
    (record,) = caplog.records
    assert "has no dynkp_task.json, so task 'dynamic_cot' is taken" in record.message
    caplog.clear()
    assert task_to_use(None, checkpoint, "aimkp", separator="! ").separator == "! " and not caplog.records
    assert modality_to_use(None, checkpoint) == "both" and modality_to_use(None, checkpoint, "image") == "image"
    with pytest.raises(ValueError, match=r"task='aimpk' is not known: .*msc.*Did you mean 'aimkp'"):
        task_to_use(None, checkpoint, "aimpk")


def cached(folder: Path, file: str, content: str | None) -> Checkpoint:
    """A Hub model in the cache of this test, with one file; with content None, the Hub has said that there is no such file."""
    repository = folder / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    for place in ("snapshots", ".no_exist"):
        (repository / place / ("0" * 40)).mkdir(parents=True)
    (repository / (".no_exist" if content is None else "snapshots") / ("0" * 40) / file).write_text(content or "")
    return Checkpoint("someone/model")


def test_a_hub_model_that_cannot_be_asked_for_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: weights that were downloaded without the file, and a model that is not in the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for checkpoint in (Checkpoint("someone/else"), cached(tmp_path, "config.json", "{}"), Checkpoint("base", "someone/model")):
        with pytest.raises(ConnectionError, match="the Hub could not be asked for dynkp_task.json.*--task and add --ignore"):
            find_saved_task(checkpoint)


def test_a_hub_model_whose_task_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "with"))
    SavedTask(TASKS["aimkp"]).write(tmp_path)
    found = find_saved_task(cached(tmp_path / "with", FILE, (tmp_path / FILE).read_text()))
    assert found is not None and found.task == TASKS["aimkp"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "without"))
    assert find_saved_task(cached(tmp_path / "without", FILE, None)) is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"name": "dynamic_cot"}, "'out' was trained with task 'aimkp', not 'dynamic_cot': leave --task out"),
        ({"name": "masc"}, "'out' was trained with task 'aimkp', not 'masc'"),
        ({"name": "aimpk"}, "Did you mean 'aimkp'"),
        ({"separator": "; "}, "'out' was trained with separator ', ', not '; '"),
    ],
)
def test_contradictions(request_: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        task_to_use(SavedTask(TASKS["aimkp"], method="aimkp"), Checkpoint("base", "out"), **request_)
    assert "\n" not in str(error.value)


def test_what_agrees_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dynkp")
    own = KeyphraseTask("aimkp", "Another prompt of that name?", separator="! ")
    saved, checkpoint = SavedTask(own, method="aimkp"), Checkpoint("out")
    assert task_to_use(saved, checkpoint) == own == task_to_use(saved, checkpoint, "aimkp", separator="! ")
    assert "out was trained by aimkp with task 'aimkp'" in caplog.text


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [
        ("both", None, "both"),
        ("both", "image", "image"),
        ("text", None, "text"),
        ("text", "text", "text"),
        ("text", "both", None),
        ("image", "text", None),
    ],
)
def test_modalities(trained: Any, asked: Any, expected: str | None) -> None:
    saved, checkpoint = SavedTask(TASKS["aimkp"], trained), Checkpoint("out")
    if expected:
        assert modality_to_use(saved, checkpoint, asked) == expected
    else:
        with pytest.raises(ValueError, match=f"'out' was trained on the posts' {trained} alone, not on modality '{asked}'"):
            modality_to_use(saved, checkpoint, asked)


@pytest.mark.parametrize(
    ("method", "strategy", "taught"),
    [
        ("aimkp", None, False),
        ("direct", None, False),
        ("dynamic_cot", "direct", False),
        ("dynamic_cot", "dynamic", True),
        ("dynamic_cot", "cot", True),
        ("dynamic_aimkp", "dynamic", True),
        (None, None, True),
    ],
)
def test_a_model_without_reasoning_is_not_made_to_reason(method: Any, strategy: Any, taught: bool) -> None:
    saved, checkpoint = SavedTask(TASKS["aimkp"], "both", method, strategy), Checkpoint("base", "out")
    for allowed in ("auto", "direct", *(["think"] if taught else [])):
        check_mode(saved, checkpoint, allowed)
    check_mode(None, checkpoint, "think")
    if not taught:
        with pytest.raises(ValueError, match=f"'out' was trained by {method}.*, without reasoning, so --mode 'think' fails: "):
            check_mode(saved, checkpoint, "think")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "dynkp_task.json"),
        ("{}", "is damaged"),
        ('{"task": {"kind": "unheard of"}}', "is damaged"),
        ('{"task": {"kind": "keyphrases", "name": "x"}}', "is damaged"),
        ('{"task": {"kind": "other", "name": "x"}}', "a class of your own"),
    ],
)
def test_damaged_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        find_saved_task(Checkpoint(str(tmp_path)))


def test_a_task_of_a_user_s_own_class_is_saved_by_name(tmp_path: Path) -> None:
    class Mine(KeyphraseTask):
        pass

    SavedTask(Mine("mine", "?")).write(tmp_path)
    with pytest.raises(ValueError, match="task 'mine' is of a class of your own"):
        SavedTask.read(tmp_path / FILE)
