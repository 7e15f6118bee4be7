"""The posts of a run.

Holds: a specialist is trained on posts that have its modality, and on nothing of the other; what could not be scored after the
training is found before it; a mixture takes the task's separator; a file that is not there is named; images that are named and
not found, or missing from a whole set, are an error unless text alone is meant.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dynkp.cli import train
from dynkp.data.posts import InvalidPostsError, validate_posts
from dynkp.data.sources import load_posts
from dynkp.training.posts import check_images_present, only
from tests.support.training_runs import QUICK, TINY, head, read_jsonl, write_jsonl


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


def test_mixture_in_yaml(shared: Path, tmp_path: Path) -> None:
    first = head(shared / "data/cmkp/valid.jsonl", 30, tmp_path / "first.jsonl")
    second = head(shared / "data/cmkp/train_tiny.jsonl", 30, tmp_path / "second.jsonl")
    datasets = [{"path": str(first), "weight": 3}, {"path": str(second), "weight": 1}]
    config = {"datasets": datasets, "stopping_strategy": "all_exhausted", "strategy": "direct", "modality": "text"}
    config |= {"output_dir": str(tmp_path / "o"), "max_steps": 2, "bf16": False}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(config))
    train.main(["--config", str(tmp_path / "mix.yaml"), *QUICK, *TINY])
    assert (tmp_path / "o/model.safetensors").exists()


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


ROWS = [
    {"id": "1", "text": "a", "keyphrases": ["k"], "image": "a.jpg", "image_url": "http://x/a.jpg"},
    {"id": "2", "text": "b", "keyphrases": ["k"], "image_url": "http://x/b.jpg"},
    {"id": "3", "text": "", "keyphrases": ["k"], "image": "c.jpg"},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_alone_may_be_meant(streaming: bool) -> None:
    posts = load_posts(ROWS, streaming=streaming)
    with pytest.raises(InvalidPostsError, match="post '1': no_image_dir"):
        list(validate_posts(posts, progress=False)[0])
    kept = list(validate_posts(only(posts, "text"), progress=False)[0])
    assert [post["id"] for post in kept] == ["1", "2"] and not any(post["images"] for post in kept)


def test_posts_whose_image_was_not_found_stay_for_the_error() -> None:
    with pytest.raises(InvalidPostsError, match="3 invalid posts"):
        validate_posts(only(load_posts(ROWS), "image"), progress=False)


def test_a_set_without_any_image_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"none of the 1 training posts has one.*--modality text"):
        check_images_present(load_posts([{"id": "1", "text": "a"}]), "training")
    check_images_present(load_posts([{"id": "1", "text": "a"}, {"id": "2", "image": b"..."}]), "training")
    check_images_present(load_posts([{"prompt": [], "completion": []}]), "training")
    check_images_present(load_posts([{"id": "1", "text": "a"}], streaming=True), "training")
