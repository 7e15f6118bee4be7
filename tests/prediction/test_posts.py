"""Posts to predict keep what a prompt may show and nothing of the gold; what cannot be predicted is named or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.data.tasks import TASKS
from dynkp.prediction.posts import load_posts_to_predict

GOLD = {"keyphrases": ["a;b", ""], "rationale": "why", "label": "positive"}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gold_columns_are_gone(tmp_path: Path) -> None:
    file = write(tmp_path / "posts.jsonl", {"id": "1", "text": "a", **GOLD}, {"id": "2", "text": "b"})
    posts = load_posts_to_predict(file, TASKS["dynamic_cot"], use_images=False, progress=False)
    assert posts["id"][:] == ["1", "2"] and set(posts.column_names) <= {"id", "text", "images", "prompt"}


def test_a_model_that_reads_images_is_not_shown_text_alone_in_silence(tmp_path: Path) -> None:
    file = write(tmp_path / "posts.jsonl", {"id": "1", "text": "a"})
    with pytest.raises(ValueError, match="none of the 1 posts has one.* give --modality text"):
        load_posts_to_predict(file, TASKS["dynamic_cot"], progress=False)


def test_an_aspect_is_part_of_the_question(tmp_path: Path) -> None:
    file = write(tmp_path / "posts.jsonl", {"id": "1", "text": "Go Cubs", "aspect": "Cubs", "label": "positive"})
    posts = load_posts_to_predict(file, REASONING_TASKS["masc"], use_images=False, progress=False)
    assert posts[0]["aspect"] == "Cubs" and "label" not in posts.column_names


@pytest.mark.parametrize("rows", [[], [{"id": "1", "text": "a"}, {"id": "1", "text": "b"}]])
def test_what_cannot_be_predicted(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no posts to predict|repeated_id"):
        load_posts_to_predict(write(tmp_path / "posts.jsonl", *rows), TASKS["dynamic_cot"], progress=False)


def test_or_is_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "posts.jsonl", {"id": "1", "text": "a", "image": "no.png"}, {"id": "2", "text": "b"})
    options: dict[str, Any] = {"image_dir": str(tmp_path), "progress": False}
    posts = load_posts_to_predict(file, TASKS["dynamic_cot"], on_invalid="skip", **options)
    assert posts["id"][:] == ["2"]
    posts = load_posts_to_predict(file, TASKS["dynamic_cot"], use_images=False, **options)
    assert posts["id"][:] == ["1", "2"], "a prompt of text alone shows no image"
