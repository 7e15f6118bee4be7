"""Invariants of soft labels on disk:

- with all tokens stored, training with the assistant and training from soft labels give the same weights (1e-6);
- a killed writer continues after its last file and ends with the same labels;
- labels of another target, temperature, task, assistant or tokenizer are refused, naming what differs;
- the probability outside the stored tokens is reported correctly.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.distillation import soft_labels
from dynkp.distillation.assistant import Assistant
from dynkp.distillation.soft_labels import (
    SoftLabelCache,
    SoftLabelWriter,
    assistant_fingerprint,
    truncated_probability,
    truncation_effect,
)
from dynkp.objectives.distillation import SoftLabels
from tests.support.reasoning_trainers import BRIEF, reasoning_rows, reasoning_trainer
from tests.support.soft_labels import ALL, assistant_model, posts_of, write_labels
from tests.support.tiny_models import build
from tests.support.trainers import largest_difference, losses, weights


def content(folder: Path) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """All labels in a folder."""
    cache, everything = SoftLabelCache(folder), {}
    for (post_id, task), location in cache.locations.items():
        with soft_labels.safe_open(folder / location.file, framework="pt") as file:
            rows = slice(location.start, location.start + location.length)
            names = ("tokens", "ids", "log_probs", "rest")
            everything[post_id, task] = {name: file.get_tensor(name)[rows] for name in names}
    return everything


# Training from them


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_online_and_cached_give_the_same_student(family: str, tmp_path: Path) -> None:
    write_labels(tmp_path / "labels", family=family)
    options: dict[str, Any] = {"num_train_epochs": 2, "max_steps": -1, "dataloader_num_workers": 0}
    online = reasoning_trainer(family, tmp_path / "online", assistant_model=assistant_model(family), **options)
    cached = reasoning_trainer(family, tmp_path / "cached", soft_labels=str(tmp_path / "labels"), **options)
    start = weights(online)
    for trainer in (online, cached):
        trainer.train()
    assert cached.assistant is None
    assert largest_difference(weights(online), weights(cached)) <= 1e-6 < 1e-3 < largest_difference(start, weights(online))
    for name in ("loss", "label_divergence", "chain_divergence"):
        assert losses(cached, name) == pytest.approx(losses(online, name), rel=1e-5), name


def test_fewer_tokens_give_a_smaller_divergence_and_another_student(tmp_path: Path) -> None:
    runs = []
    for top_k in (ALL, 16):
        write_labels(tmp_path / str(top_k), top_k=top_k)
        runs.append(reasoning_trainer("llava", tmp_path / "out", soft_labels=str(tmp_path / str(top_k))))
        runs[-1].train()
    whole, cut = (losses(trainer, "chain_divergence")[0] for trainer in runs)
    assert 0 < cut < whole
    assert 1e-6 < largest_difference(*map(weights, runs))


def test_workers_read_them(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels")
    results = []
    for workers in (0, 2):
        trainer = reasoning_trainer(
            "llava", tmp_path / "out", soft_labels=str(tmp_path / "labels"), dataloader_num_workers=workers, max_steps=2
        )
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == results[1]


def test_evaluation_posts_need_none(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels")
    others = [post | {"id": f"eval-{post['id']}"} for post in reasoning_rows("llava", 3)]
    trainer = reasoning_trainer(
        "llava", tmp_path, soft_labels=str(tmp_path / "labels"), eval_dataset=others, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    assert losses(trainer, "eval_loss") and losses(trainer, "chain_divergence")


def test_max_length_takes_the_beginning_of_the_labels(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels")
    options: dict[str, Any] = {"max_length": 235, "max_steps": 2}
    runs = [
        reasoning_trainer("llava", tmp_path, assistant_model=assistant_model(), **options),
        reasoning_trainer("llava", tmp_path, soft_labels=str(tmp_path / "labels"), **options),
        reasoning_trainer("llava", tmp_path, soft_labels=str(tmp_path / "labels"), max_steps=2),
    ]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6)
    assert losses(runs[1]) != losses(runs[2]), "something was cut"


# What they are


def test_they_are_the_assistant_s_probabilities(tmp_path: Path) -> None:
    """The first post's label, token by token, against NumPy."""
    _, processor = build("llava")
    write_labels(tmp_path, top_k=5)
    collator = TwoTaskCollator(processor, BRIEF)
    batch = collator([posts_of()[0]])
    logits = Assistant(assistant_model()).logits(batch["prompts"], {"label": batch["label"]})["label"].double().numpy() / 2.0
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    kept = content(tmp_path)["post-0", "label"]
    order = np.argsort(-p, axis=1)[:, :5]
    np.testing.assert_array_equal(kept["ids"].numpy(), order)
    np.testing.assert_allclose(kept["log_probs"].exp().numpy(), np.take_along_axis(p, order, axis=1), rtol=1e-5)
    np.testing.assert_allclose(kept["rest"].exp().numpy(), 1 - np.take_along_axis(p, order, axis=1).sum(axis=1), rtol=1e-4)
    assert kept["tokens"].tolist() == batch["label"]["input_ids"][0].tolist()


def test_posts_without_chain_have_labels_of_the_label_alone(tmp_path: Path) -> None:
    cache = write_labels(tmp_path)
    assert ("post-2", "label") in cache.locations and ("post-2", "chain") not in cache.locations
    assert len(cache.locations) == 11


def test_the_truncated_probability_is_reported(tmp_path: Path) -> None:
    write_labels(tmp_path / "some", top_k=16)
    write_labels(tmp_path / "all")
    shares = truncated_probability(tmp_path / "some")
    assert list(shares) == [1, 4, 16] and shares[1] > shares[4] > shares[16] > 0.01
    everything = content(tmp_path / "all").values()
    p = torch.cat([labels["log_probs"].double().exp() for labels in everything])
    assert shares[4] == pytest.approx(float(1 - p[:, :4].sum(dim=1).mean()), rel=1e-5)
    assert list(truncated_probability(tmp_path / "all").values())[-1] == pytest.approx(0.0, abs=1e-12)


def test_the_effect_on_the_divergence_is_reported() -> None:
    _, processor = build("llava")
    student, assistant = Assistant(build("llava")[0]), Assistant(assistant_model())
    collator = TwoTaskCollator(processor, BRIEF)
    effect = truncation_effect(student, assistant, collator, posts_of(count=2), top_k=ALL, temperature=2.0)
    shares = list(effect.values())
    assert list(effect)[:3] == [1, 4, 16] and shares == sorted(shares) and 0 < shares[0] < 0.9
    assert shares[-1] == pytest.approx(1.0, rel=1e-5)


# Interruption


def test_a_second_run_writes_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_labels, "_TARGETS_PER_FILE", 3)
    posts = posts_of()
    write_labels(tmp_path / "whole", posts)
    write_labels(tmp_path / "parts", posts.select(range(4)))
    first = {file.name: file.read_bytes() for file in (tmp_path / "parts").glob("labels-*")}
    write_labels(tmp_path / "parts", posts)
    assert all((tmp_path / "parts" / name).read_bytes() == data for name, data in first.items())
    assert_same(content(tmp_path / "whole"), content(tmp_path / "parts"))
    before = sorted(file.name for file in (tmp_path / "parts").iterdir())
    write_labels(tmp_path / "parts", posts)
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == before, "nothing was left to do"


def assert_same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for key in one:
        for name, value in one[key].items():
            torch.testing.assert_close(value, other[key][name], rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL between two files; then the same call."""
    script = (
        "import os, sys, time; from tests import conftest; from pathlib import Path\n"
        "from dynkp.distillation import soft_labels; soft_labels._TARGETS_PER_FILE = 2\n"
        "from tests.support.soft_labels import posts_of, write_labels\n"
        "replace = os.replace\n"
        "def slowly(partial, target):\n"
        "    time.sleep(0.3); replace(partial, target); print('written', flush=True)\n"
        "os.replace = slowly\n"
        "write_labels(Path(sys.argv[1]), posts_of(count=12))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("labels-*.safetensors"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(SoftLabelCache(tmp_path / "killed").locations)
    assert 0 < done < 21, "the run ended before it was killed"
    cache = write_labels(tmp_path / "killed", posts_of(count=12))
    assert len(cache.locations) == 21
    write_labels(tmp_path / "whole", posts_of(count=12))
    assert_same(content(tmp_path / "whole"), content(tmp_path / "killed"))


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    _, processor = build("llama")
    writer = SoftLabelWriter(tmp_path, {"assistant": "tiny"}, processor)
    with pytest.raises(BlockingIOError, match="another run"):
        SoftLabelWriter(tmp_path, {"assistant": "tiny"}, processor)
    writer.close()
    SoftLabelWriter(tmp_path, {"assistant": "tiny"}, processor).close()


# What is refused


@pytest.mark.parametrize(
    ("setting", "value"), [("temperature", 1.0), ("assistant", "another"), ("task", "msc 0"), ("top_k", 7)]
)
def test_other_settings_do_not_join(setting: str, value: Any, tmp_path: Path) -> None:
    write_labels(tmp_path, posts_of(count=1))
    with pytest.raises(ValueError, match=f"other settings: {setting} was"):
        write_labels(tmp_path, posts_of(count=2), **{setting: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 3.0}, "temperature was 2.0 and is 3.0"),
        ({"task": "masc"}, "task was 'brief"),
        ({"assistant": "ASSISTANT"}, "assistant was 'tiny' and is 'weights sha256"),
    ],
)
def test_a_training_that_they_are_not_for_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_labels(tmp_path / "labels")
    if "assistant" in options:
        model, processor = build("llava")
        model.save_pretrained(tmp_path / "assistant")
        processor.save_pretrained(tmp_path / "assistant")
        options = {"assistant": str(tmp_path / "assistant")}
    with pytest.raises(ValueError, match=message):
        reasoning_trainer("llava", tmp_path / "out", soft_labels=str(tmp_path / "labels"), **options)


def test_the_assistant_that_wrote_them_is_accepted_and_not_loaded(tmp_path: Path) -> None:
    model, processor = build("llava")
    model.save_pretrained(tmp_path / "assistant")
    processor.save_pretrained(tmp_path / "assistant")
    write_labels(tmp_path / "labels", assistant=assistant_fingerprint(str(tmp_path / "assistant")))
    trainer = reasoning_trainer("llava", tmp_path, soft_labels=str(tmp_path / "labels"), assistant=str(tmp_path / "assistant"))
    assert trainer.assistant is None and trainer.distillation_weight == 0.0
    trainer.model.train()
    assert trainer.distillation_weight == 0.3


def test_a_smaller_student_is_told_to_cut_the_vocabulary(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels")
    model, processor = build("llava")
    model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="dynkp distill cache --student"):
        reasoning_trainer("llava", tmp_path, model=model, soft_labels=str(tmp_path / "labels"))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels", posts_of("llama"), family="llama")
    model, tokenizer = build("qwen2")
    with pytest.raises(ValueError, match="shared token ids"):
        reasoning_trainer("llama", tmp_path, model=model, processing_class=tokenizer, soft_labels=str(tmp_path / "labels"))


def test_posts_without_labels_are_found_before_the_training(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels", posts_of(count=5))
    with pytest.raises(ValueError, match=r"no labels for 2 targets: 'post-5' \(label\), 'post-5' \(chain\)"):
        reasoning_trainer("llava", tmp_path, soft_labels=str(tmp_path / "labels"))


def test_another_answer_than_the_post_s_is_named(tmp_path: Path) -> None:
    cache = write_labels(tmp_path)
    _, processor = build("llava")
    posts = copy.deepcopy(reasoning_rows("llava", 2))
    posts[1]["label"] = "negative"
    batch = TwoTaskCollator(processor, BRIEF)(posts)
    with pytest.raises(ValueError, match="post 'post-1': .* another label target than the post's"):
        cache.of_batch(batch["id"], {"label": batch["label"]})
    with pytest.raises(ValueError, match="no labels for 1 targets: 'stranger'"):
        cache.of_batch(["stranger"], {"label": TwoTaskCollator(processor, BRIEF)(posts[:1])["label"]})


def test_a_folder_without_labels_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dynkp distill cache"):
        SoftLabelCache(tmp_path)
    (tmp_path / "meta.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        SoftLabelCache(tmp_path)


def test_a_cache_travels_to_another_process(tmp_path: Path) -> None:
    cache = write_labels(tmp_path)
    _, processor = build("llava")
    batch = TwoTaskCollator(processor, BRIEF)(reasoning_rows("llava", 2))
    answers = {task: batch[task] for task in ("label", "chain")}
    before = cache.of_batch(batch["id"], answers)
    after = pickle.loads(pickle.dumps(cache)).of_batch(batch["id"], answers)
    for task in before:
        labels = SoftLabels(**before[task])
        assert torch.equal(labels.log_probs, after[task]["log_probs"]) and labels.vocabulary == after[task]["vocabulary"]
    assert json.loads((tmp_path / "meta.json").read_text())["settings"]["top_k"] == ALL
