"""examples/train.py end to end, as its users start it: posts in; model, predictions, scores and a table out.

Real tweets without pictures, real photographs with rationales, the drawn default, a run killed and continued, a saved
model named by its folder, a mixture of datasets in YAML; what could not be predicted or scored after the training is
found before it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dynkp.cli import train
from dynkp.data.sources import load_posts
from dynkp.training import drawn_posts
from dynkp.training.posts import only
from tests.conftest import REPOSITORY

QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--max_new_tokens", "24", "--logging_steps", "1"]
TINY = ["--tiny_hidden_size", "32", "--tiny_vocab_size", "600", "--tiny_image_size", "32", "--per_device_train_batch_size", "8"]


def head(source: Path, lines: int, target: Path) -> Path:
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(next(file) for _ in range(lines)), encoding="utf-8")
    return target


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def tweets(shared: Path, tmp_path: Path) -> list[str]:
    train_file = head(shared / "data/cmkp/valid.jsonl", 48, tmp_path / "train.jsonl")
    eval_file = head(shared / "data/cmkp/test.jsonl", 20, tmp_path / "eval.jsonl")
    return ["--train_file", str(train_file), "--eval_file", str(eval_file), "--output_dir", str(tmp_path / "out")]


def test_real_tweets_direct(tweets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*tweets, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "4"])
    predictions = read_jsonl(tmp_path / "out/predictions.jsonl")
    assert [row["id"] for row in predictions] == [f"test-{index:05d}" for index in range(20)]
    assert all(row.keys() >= {"id", "keyphrases", "raw", "reasoned", "output_tokens"} for row in predictions)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    names = list(metrics["systems"])
    assert names[0] == "direct" and names[1].startswith("most frequent") and names[2].startswith("nearest")
    assert metrics["systems"]["direct"]["subsets"]["all"]["posts"] == 20
    assert "nearest neighbour in text" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").exists() and (tmp_path / "out/processor_config.json").exists()


def test_a_saved_folder_is_a_model_name(tweets: list[str], tmp_path: Path) -> None:
    train.main([*tweets, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "1"])
    again = [argument.replace(str(tmp_path / "out"), str(tmp_path / "again")) for argument in tweets]
    train.main(
        [*again, *QUICK, "--model_name_or_path", str(tmp_path / "out"), "--max_steps", "1", "--bf16", "false"]
        + ["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj"]
    )
    assert (tmp_path / "again/adapter_model.safetensors").exists()
    assert len(read_jsonl(tmp_path / "again/predictions.jsonl")) == 20


def test_real_photographs_dynamic(shared: Path, tmp_path: Path) -> None:
    """γ inside the range of the first losses, so that both targets are chosen at once."""
    masc = shared / "data/masc_t15"
    arguments = ["--train_file", str(head(masc / "test.jsonl", 40, tmp_path / "masc.jsonl")), "--image_dir"]
    arguments += [str(masc / "images"), "--eval_posts", "6", "--output_dir", str(tmp_path / "out"), "--log_choices", "true"]
    train.main([*arguments, *QUICK, *TINY, "--strategy", "dynamic", "--gamma", "quantile:0.5", "--max_steps", "5"])
    choices = {row["choice"] for row in read_jsonl(tmp_path / "out/choices.jsonl")}
    assert choices == {"direct", "reasoning"}
    assert len(read_jsonl(tmp_path / "out/predictions.jsonl")) == 6


@pytest.mark.parametrize("method", ["aimkp", "dynamic_aimkp"])
def test_real_photographs_masked(method: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks, filter and strides from the command line; scored given both modalities and each alone."""
    masc = shared / "data/masc_t15"
    arguments = ["--method", method, "--train_file", str(head(masc / "test.jsonl", 40, tmp_path / "masc.jsonl"))]
    arguments += ["--image_dir", str(masc / "images"), "--eval_posts", "6", "--output_dir", str(tmp_path / "out")]
    arguments += ["--log_visits", "true", "--warmup_epochs", "0", "--eval_modalities", "both", "text", "image"]
    train.main([*arguments, *QUICK, *TINY, "--max_steps", "2", "--warmup_steps", "0"])
    visits = read_jsonl(tmp_path / "out/visits.jsonl")
    assert {row["modality"] for row in visits} == {"text", "image"} and {row["stride"] for row in visits} == {2}
    systems = json.loads((tmp_path / "out/metrics.json").read_text())["systems"]
    assert {method, f"{method}, text only", f"{method}, image only"} <= systems.keys()
    for name, modality in (("", "both"), (".text", "text"), (".image", "image")):
        assert {row["modality"] for row in read_jsonl(tmp_path / f"out/predictions{name}.jsonl")} == {modality}
    table = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in table if line.startswith(f"{method}, image only") and len(line.split()) == 7]
    assert all(float(cell) >= 0 for cell in row[3:])


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_specialist_sees_one_modality(modality: str, shared: Path, tmp_path: Path) -> None:
    """Posts without the modality are left out of the training; the predictions are made of it alone."""
    masc = shared / "data/masc_t15"
    arguments = ["--strategy", "direct", "--modality", modality, "--image_dir", str(masc / "images"), "--eval_posts", "6"]
    arguments += ["--train_file", str(head(masc / "test.jsonl", 40, tmp_path / "masc.jsonl"))]
    train.main([*arguments, *QUICK, *TINY, "--max_steps", "2", "--output_dir", str(tmp_path / "out")])
    assert {row["modality"] for row in read_jsonl(tmp_path / "out/predictions.jsonl")} == {modality}
    posts = load_posts(tmp_path / "masc.jsonl", image_dir=masc / "images")
    kept = only(posts, modality)
    if modality == "text":
        assert len(kept) == len(posts) and "images" not in kept.column_names
    else:
        assert 0 < len(kept) < len(posts) and set(kept["text"]) == {""} and all(kept["images"])
    with pytest.raises(ValueError, match="smell"):
        only(posts, "smell")


def test_drawn_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("TRAIN_POSTS", 48), ("TEST_POSTS", 20), ("PRETRAINING_ROWS", 48)):
        monkeypatch.setattr(drawn_posts, name, value)
    monkeypatch.setitem(drawn_posts.PRETRAINING, "max_steps", 2)
    train.main([*QUICK, "--max_steps", "3", "--output_dir", str(tmp_path), "--per_device_train_batch_size", "8"])
    systems = json.loads((tmp_path / "metrics.json").read_text())["systems"]
    for strategy in ("direct", "dynamic"):
        assert {strategy, f"{strategy}, no image", f"{strategy}, no text"} <= systems.keys()
        assert len(read_jsonl(tmp_path / f"predictions.{strategy}.jsonl")) == 20
    assert "unseen" in capsys.readouterr().out


def test_mixture_in_yaml(shared: Path, tmp_path: Path) -> None:
    first = head(shared / "data/cmkp/valid.jsonl", 30, tmp_path / "first.jsonl")
    second = head(shared / "data/cmkp/train_tiny.jsonl", 30, tmp_path / "second.jsonl")
    datasets = [{"path": str(first), "weight": 3}, {"path": str(second), "weight": 1}]
    config = {"datasets": datasets, "stopping_strategy": "all_exhausted", "strategy": "direct"}
    config |= {"output_dir": str(tmp_path / "o"), "max_steps": 2, "bf16": False}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(config))
    train.main(["--config", str(tmp_path / "mix.yaml"), *QUICK, *TINY])
    assert (tmp_path / "o/model.safetensors").exists()


def test_killed_and_continued(tweets: list[str], tmp_path: Path) -> None:
    """SIGKILL in the middle, then `--resume_from_checkpoint last`: the log goes on as if nothing had happened."""
    arguments = [*tweets, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "12", "--save_strategy", "steps"]
    arguments += ["--save_steps", "2", "--save_total_limit", "20"]
    whole = [argument.replace(str(tmp_path / "out"), str(tmp_path / "whole")) for argument in arguments]
    train.main(whole)

    command = [sys.executable, str(REPOSITORY / "examples/train.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (tmp_path / "out/checkpoint-4/trainer_state.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline, "the run never reached its second checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/predictions.jsonl").exists(), "the run ended before it was killed"
    train.main([*arguments, "--resume_from_checkpoint", "last"])

    def losses(folder: str) -> dict[int, float]:
        log = json.loads((tmp_path / folder / "metrics.json").read_text())["log"]
        return {row["step"]: row["loss"] for row in log if "loss" in row}

    assert losses("out") == losses("whole") and len(losses("whole")) == 12
    assert read_jsonl(tmp_path / "out/predictions.jsonl") == read_jsonl(tmp_path / "whole/predictions.jsonl")


@pytest.fixture
def small_model(tmp_path: Path) -> str:
    """A folder with a tiny model that was trained for a step."""
    posts = [{"id": str(index), "text": f"goal number {index}", "keyphrases": ["mufc"]} for index in range(4)]
    arguments = ["--train_file", write_jsonl(tmp_path / "first.jsonl", posts), "--output_dir", str(tmp_path / "model")]
    train.main([*arguments, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "1", "--save_strategy", "no"])
    return str(tmp_path / "model")


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["stream", "prompt and completion"])
def test_a_run_ends_with_scores_whatever_the_training_posts_are(kind: str, small_model: str, tmp_path: Path) -> None:
    posts = [{"id": str(index), "text": f"goal {index}", "keyphrases": ["mufc"]} for index in range(8)]
    conversations = [
        {"prompt": [{"role": "user", "content": "goal"}], "completion": [{"role": "assistant", "content": "mufc"}]}
    ] * 8
    rows = posts if kind == "stream" else conversations
    arguments = ["--train_file", write_jsonl(tmp_path / "train.jsonl", rows), "--max_steps", "1", "--strategy", "direct"]
    arguments += ["--eval_file", write_jsonl(tmp_path / "eval.jsonl", posts), "--output_dir", str(tmp_path / "out")]
    arguments += ["--model_name_or_path", small_model, "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    train.main([*arguments, *QUICK, "--streaming", str(kind == "stream")])
    systems = json.loads((tmp_path / "out/metrics.json").read_text())["systems"]
    assert list(systems) == (["direct", "most frequent keyphrase (mufc)"] if kind == "stream" else ["direct"])
    assert ("seen" in systems["direct"]["subsets"]) == (kind == "stream")


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"image": "missing.png"}, "missing_file"), ({"id": "1"}, "repeated_id"), ({"keyphrases": []}, "no_keyphrases")],
)
def test_bad_evaluation_posts_are_found_before_the_training(fault: dict, message: str, tmp_path: Path) -> None:
    posts = [{"id": str(index), "text": "goal", "keyphrases": ["mufc"]} for index in range(4)]
    arguments = ["--train_file", write_jsonl(tmp_path / "train.jsonl", posts), "--image_dir", str(tmp_path)]
    arguments += ["--eval_file", write_jsonl(tmp_path / "eval.jsonl", [*posts[:3], posts[3] | fault])]
    with pytest.raises(ValueError, match=message):
        train.main([*arguments, *QUICK, *TINY, "--output_dir", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_mixture_takes_the_tasks_separator(tmp_path: Path) -> None:
    posts = [{"id": str(index), "text": "goal", "keyphrases": ["goal; scored"]} for index in range(4)]
    recipe = {"datasets": [{"path": write_jsonl(tmp_path / "train.jsonl", posts)}], "task": "aimkp", "strategy": "direct"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    train.main([*arguments, *QUICK, *TINY, "--max_steps", "1", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--strategy", "dynamik"], "dynamik"),
        (["--gamma", "quantile:2"], "quantile:2"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.main([*arguments, *QUICK, "--output_dir", str(tmp_path)])


def test_last_passes_over_what_a_killed_run_left_unfinished(tweets: list[str], tmp_path: Path) -> None:
    arguments = [*tweets, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "4"]
    arguments += ["--save_strategy", "steps", "--save_steps", "2"]
    train.main(arguments)
    (tmp_path / "out/checkpoint-4/trainer_state.json").unlink()
    train.main([*arguments, "--resume_from_checkpoint", "last"])
    log = json.loads((tmp_path / "out/metrics.json").read_text())["log"]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4], "went on from checkpoint-2, whose log it keeps"
    assert (tmp_path / "out/checkpoint-4/trainer_state.json").exists()
