"""A training run end to end, as its users start it: posts in; model, predictions, scores and a table out.

Holds on real tweets without images and on real photographs with rationales, for every method; a run killed and continued goes
on as if nothing had happened; a saved model is named by its folder; wrong arguments are named.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynkp.cli import train
from tests.conftest import REPOSITORY
from tests.support.training_runs import QUICK, TINY, head, read_jsonl, write_jsonl


@pytest.fixture
def tweets(shared: Path, tmp_path: Path) -> list[str]:
    train_file = head(shared / "data/cmkp/valid.jsonl", 48, tmp_path / "train.jsonl")
    eval_file = head(shared / "data/cmkp/test.jsonl", 20, tmp_path / "eval.jsonl")
    files = ["--train_file", str(train_file), "--eval_file", str(eval_file), "--output_dir", str(tmp_path / "out")]
    return [*files, "--modality", "text"]  # the tweets name images that are not here


def test_real_tweets_direct(tweets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*tweets, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "4"])
    predictions = read_jsonl(tmp_path / "out/predictions.jsonl")
    assert [row["id"] for row in predictions] == [f"test-{index:05d}" for index in range(20)]
    assert all(row.keys() >= {"id", "keyphrases", "raw", "reasoned", "output_tokens"} for row in predictions)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    names = list(metrics["systems"])
    assert names[0] == "direct, text only" and names[1].startswith("most frequent") and names[2].startswith("nearest")
    assert metrics["systems"]["direct, text only"]["subsets"]["all"]["posts"] == 20
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
    modality = "text" if kind == "stream" else "both"  # rows of prompt and completion have no text of their own
    train.main([*arguments, *QUICK, "--modality", modality, "--streaming", str(kind == "stream")])
    systems = json.loads((tmp_path / "out/metrics.json").read_text())["systems"]
    expected = ["direct, text only", "most frequent keyphrase (mufc)"] if kind == "stream" else ["direct"]
    assert list(systems) == expected
    assert ("seen" in next(iter(systems.values()))["subsets"]) == (kind == "stream")


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
