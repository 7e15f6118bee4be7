"""Evaluation by generating, in training.

Its figures are those of predicting and scoring the same posts with the same weights, in process and through the
command line, for full and LoRA training, for a stream, and on two ranks as on one; the best checkpoint and early
stopping go by them; gold answers are never seen by the prompt nor by a limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, EarlyStoppingCallback

from dynkp import cli, generate_keyphrases, load_posts, score_keyphrases
from dynkp.data.sources import write_posts_jsonl
from dynkp.trainer.generative_evaluation import generative_metrics, gold_keyphrases
from tests.conftest import REPOSITORY
from tests.support.evaluation_posts import LEARNS, evaluation_posts
from tests.support.posts import rows
from tests.support.trainers import losses, trainer_of


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaVA that has learned some of six posts by heart, so that scores are neither 0 nor 1."""
    posts = rows("llava", 6)
    trainer = trainer_of("llava", tmp_path_factory.mktemp("learned"), posts, eval_dataset=evaluation_posts(), **LEARNS)
    trainer.train()
    return trainer


def test_metrics_are_those_of_predicting_and_scoring(learned: Any) -> None:
    metrics = learned.evaluate()
    posts = load_posts(evaluation_posts())
    predictions = list(generate_keyphrases(learned.model, learned.processing_class, posts, max_new_tokens=24, progress=False))
    scores = score_keyphrases(
        [row["keyphrases"] for row in predictions],
        posts["keyphrases"],
        texts=posts["text"],
        train_keyphrases={phrase for post in rows("llava", 6) for phrase in post["keyphrases"]},
    )
    assert 0 < scores["all"]["f1@1"] < 1
    for name in ("f1@1", "f1@3", "map@5"):
        assert metrics[f"eval_{name}"] == scores["all"][name]
    assert metrics["eval_composite"] == pytest.approx(sum(scores["all"][name] for name in ("f1@1", "f1@3", "map@5")))
    for subset in ("present", "absent", "seen", "unseen"):
        if scores[subset]["posts"]:
            assert metrics[f"eval_{subset}_f1@1"] == scores[subset]["f1@1"]
        else:
            assert f"eval_{subset}_f1@1" not in metrics
    assert metrics["eval_generated_posts"] == 6
    assert metrics["eval_output_words"] == sum(row["output_words"] for row in predictions) / 6
    assert metrics["eval_loss"] > 0
    assert learned.state.log_history[-1]["eval_f1@1"] == metrics["eval_f1@1"], "must be logged"


def test_the_number_of_posts_is_bounded(learned: Any) -> None:
    learned.args.eval_generation_posts = 2
    try:
        assert learned.evaluate()["eval_generated_posts"] == 2
        learned.args.eval_generation_posts = 0
        assert "eval_f1@1" not in learned.evaluate()
    finally:
        learned.args.eval_generation_posts = None


def test_a_stream_is_evaluated_alike(learned: Any) -> None:
    whole = learned.evaluate()
    stream = IterableDataset.from_generator(lambda: iter(load_posts(evaluation_posts())))
    streamed = learned.evaluate(stream)
    assert {name: whole[name] for name in whole if "@" in name} == {name: streamed[name] for name in whole if "@" in name}


def test_posts_are_not_kept() -> None:
    """Of a stream no more posts are alive than one window of batches, whatever their number."""
    alive: list[int] = []

    class Text(str):
        def __del__(self) -> None:
            alive.remove(1)

    def posts(count: int) -> Any:
        for index in range(count):
            alive.append(1)
            peak.append(len(alive))
            yield {"id": str(index), "text": Text("a dog"), "keyphrases": ["dog"]}

    def predict(model: Any, processor: Any, rows: Any, **_: Any) -> Any:
        for row in rows:
            counts = {"reasoned": False, "output_words": 1, "output_tokens": 1}
            yield {"id": row["id"], "keyphrases": ["dogs"], **counts}

    options: dict[str, Any] = {"task": None, "train_keyphrases": None, "limit": None, "batch_size": 1, "max_new_tokens": 1}
    options |= {"convention": "cmkp", "rank": 0, "ranks": 1, "gather": list, "progress": False, "generate": predict}
    for count in (10, 3000):
        peak: list[int] = []
        metrics = generative_metrics(None, None, posts(count), **options)
        assert (metrics["generated_posts"], metrics["f1@1"], metrics["output_words"]) == (count, 1, 1)
        assert max(peak) < 600


def test_rows_in_trls_form_are_scored_by_their_completion(learned: Any) -> None:
    row = {"completion": [{"role": "assistant", "content": "one; two"}]}
    assert gold_keyphrases(row, learned.task) == ["one", "two"]


def test_best_checkpoint_and_early_stopping_go_by_the_scores(tmp_path: Path) -> None:
    options = {**LEARNS, "max_steps": 40, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "f1@1", "greater_is_better": True}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = trainer_of("llava", tmp_path, rows("llava", 6), eval_dataset=rows("llava", 6), callbacks=[stop], **options)
    trainer.train()
    scores = losses(trainer, "eval_f1@1")
    assert trainer.state.best_metric == max(scores) > 0
    assert trainer.evaluate()["eval_f1@1"] == max(scores), "the best weights must be back"
    best = scores.index(max(scores))
    assert len(scores) <= best + 3, "two evaluations without progress must stop the run"


def test_composite_warns_that_it_rewards_short_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of("llava", tmp_path, metric_for_best_model="composite")
    assert "reward short lists" in caplog.text


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_and_the_command_line_give_the_same_figures(lora: bool, tmp_path: Path) -> None:
    """Evaluation in training == `dynkp predict`, then `dynkp evaluate`, on what the run saved."""
    options = {**LEARNS, "learning_rate": 3e-2 if lora else 1e-2}
    base = trainer_of("llava", tmp_path / "base", max_steps=1)
    base.save_model(str(tmp_path / "base"))
    if lora:
        options["peft_config"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"])
    trainer = trainer_of(
        "llava", tmp_path / "run", rows("llava", 6), model=base.model, eval_dataset=evaluation_posts(), **options
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "run"))
    write_posts_jsonl(load_posts(evaluation_posts()), tmp_path / "posts.jsonl", image_dir=tmp_path / "images")
    (tmp_path / "phrases.txt").write_text(
        "\n".join(sorted({phrase for post in rows("llava", 6) for phrase in post["keyphrases"]})) + "\n"
    )
    model = ["--model", str(tmp_path / ("base" if lora else "run"))]
    model += ["--adapter", str(tmp_path / "run")] if lora else []
    posts = ["--posts", str(tmp_path / "posts.jsonl")]
    predictions, report = tmp_path / "predictions.jsonl", tmp_path / "report.json"
    cli.main(
        ["predict", *model, *posts, "--image-dir", str(tmp_path / "images"), "--output", str(predictions)]
        + ["--max-new-tokens", "24", "--device", "cpu"]
    )
    cli.main(
        ["evaluate", "--predictions", str(predictions), *posts, "--train-keyphrases", str(tmp_path / "phrases.txt")]
        + ["--json", str(report)]
    )
    subsets = json.loads(report.read_text())["subsets"]
    for name in ("f1@1", "f1@3", "map@5"):
        assert metrics[f"eval_{name}"] == subsets["all"][name]
    for subset in ("present", "absent", "seen", "unseen"):
        assert metrics.get(f"eval_{subset}_f1@1") == subsets[subset]["f1@1"]


def test_two_ranks_give_the_figures_of_one(learned: Any, tmp_path: Path) -> None:
    """In full and with LoRA, whose adapter is put on the base model as `dynkp predict --adapter` does."""
    learned.save_model(str(tmp_path / "full"))
    adapted = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "full"), str(adapter_on(tmp_path / "full", tmp_path / "lora"))
    )
    lora = trainer_of("llava", tmp_path / "out", rows("llava", 6), model=adapted, eval_dataset=evaluation_posts(), **LEARNS)
    script = REPOSITORY / "tests" / "distributed" / "evaluate_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run([*command, str(tmp_path)], check=True, timeout=200, capture_output=True)
    for name, trainer in (("full", learned), ("lora", lora)):
        alone = trainer.evaluate()
        for rank in range(2):
            metrics = json.loads((tmp_path / f"metrics.{name}.{rank}.json").read_text())
            assert metrics["world_size"] == 2
            for key, value in alone.items():
                if "@" in key or key in ("eval_generated_posts", "eval_composite", "eval_output_words"):
                    assert metrics[key] == pytest.approx(value, abs=1e-12), (name, key)
            assert metrics["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    assert lora.evaluate()["eval_loss"] != pytest.approx(learned.evaluate()["eval_loss"], rel=1e-3), "the adapter must count"


def adapter_on(model: Path, folder: Path) -> Path:
    """An adapter that changes the model a little."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForImageTextToText.from_pretrained(model), config).save_pretrained(folder)
    return folder
