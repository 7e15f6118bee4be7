"""Training on two ranks, as a script and as `accelerate launch -m dynkp train`: trained by both, predicted by both, scored and
written by one; an installed launcher configuration finds its DeepSpeed file from any folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynkp.models.saved_task import FILE
from dynkp.recipes.catalog import find_recipe
from tests.support.launching import REPOSITORY, launch

POSTS = [
    {"id": f"post-{index}", "text": f"goal number {index} in the final", "keyphrases": ["mufc"], "rationale": "They scored."}
    for index in range(9)
]


@pytest.mark.timeout(600)
def test_two_machines_in_bf16(tmp_path: Path) -> None:
    """Two launchers, as on two machines, meet on this one. Nine posts: the last batch and the ranks' shares are unequal."""
    file = tmp_path / "posts.jsonl"
    file.write_text("".join(json.dumps(post) + "\n" for post in POSTS), encoding="utf-8")
    arguments = ["--train_file", file, "--eval_file", file, "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    arguments += ["--tiny_hidden_size", 32, "--tiny_vocab_size", 300, "--per_device_train_batch_size", 2, "--max_steps", 3]
    arguments += ["--gamma", "avg", "--logging_steps", 1, "--max_new_tokens", 8, "--disable_tqdm", "true"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", 3, "--eval_max_new_tokens", 8, "--save_strategy", "steps"]
    launch("zero2_multinode.yaml", REPOSITORY / "examples/train.py", *arguments, "--bf16", "true", machines=2)

    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [post["id"] for post in POSTS]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["systems"]["dynamic"]["subsets"]["all"]["posts"] == 9
    evaluation = next(row for row in metrics["log"] if "eval_loss" in row)
    assert evaluation["eval_generated_posts"] == 9
    assert (tmp_path / "out/model.safetensors").exists()
    assert list((tmp_path / "out").glob("checkpoint-*/global_step*/*zero_pp_rank_1*optim_states.pt"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_the_command_on_two_ranks(config: str, tmp_path: Path) -> None:
    """From another folder, with what `dynkp recipes` prints."""
    config_file = tmp_path / f"my_{config}.yaml"
    config_file.write_text(find_recipe(config).text())
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in POSTS), encoding="utf-8")
    arguments = ["--train_file", "posts.jsonl", "--eval_file", "posts.jsonl", "--output_dir", "out", "--use_cpu", "true"]
    arguments += ["--tiny_hidden_size", 32, "--tiny_vocab_size", 300, "--per_device_train_batch_size", 2, "--max_steps", 2]
    arguments += ["--strategy", "direct", "--max_new_tokens", 8, "--disable_tqdm", "true", "--save_strategy", "steps"]
    printed = launch(config_file, "-m", "dynkp", "train", *arguments, folder=tmp_path)

    assert "2 optimizer steps of 4 posts" in printed and "; 2 processes" in printed, printed[-3000:]
    assert printed.count("Method:   dynamic_cot (strategy direct)") == 1, "one rank speaks"
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [post["id"] for post in POSTS]
    for folder in (tmp_path / "out", tmp_path / "out/checkpoint-2"):
        assert json.loads((folder / FILE).read_text())["task"]["name"] == "dynamic_cot"
