"""Posts that cannot be trained on are found before the first step: those that do not fit `max_length`, or have no answer.

Holds: a prompt without room for a target is an error, or its post is dropped and listed; targets that are cut are counted; a
stream is not read ahead; images of posts for a text model are removed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from dynkp import DynamicCoTConfig, DynamicCoTTrainer, PostConfig
from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.lengths import post_lengths
from dynkp.trainer.preparation import fit_max_length, keep_answerable, prepare_posts
from tests.support.posts import rows
from tests.support.reasoning_trainers import BRIEF, reasoning_rows
from tests.support.tiny_models import build


def config(output_dir: Path, **options: object) -> DynamicCoTConfig:
    return DynamicCoTConfig(output_dir=str(output_dir), use_cpu=True, bf16=False, report_to=[], **options)


def test_cut_placeholders_are_found_before_the_first_step(tmp_path: Path) -> None:
    model, processor = build("llava")
    posts = rows("llava")
    prompts = {length.id: length.prompt for length in post_lengths(PairedTargetCollator(processor), posts)}
    longest = max(prompts, key=prompts.__getitem__)
    options = {"processing_class": processor, "train_dataset": posts}
    with pytest.raises(ValueError, match=rf"{longest} \({prompts[longest]} tokens\).*on_invalid='skip'"):
        DynamicCoTTrainer(model=model, args=config(tmp_path, max_length=prompts[longest]), **options)

    kept = DynamicCoTTrainer(
        model=model, args=config(tmp_path, max_length=prompts[longest], on_invalid="skip"), **options
    ).train_dataset
    assert set(kept["id"]) == {post_id for post_id, length in prompts.items() if length < prompts[longest]}
    listed = [json.loads(line) for line in (tmp_path / "too_long_posts.train.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} | set(kept["id"]) == set(prompts)


def test_targets_that_are_cut_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = build("llava")
    posts = rows("llava")
    lengths = list(post_lengths(PairedTargetCollator(processor), posts))
    limit = max(length.prompt for length in lengths) + 1
    trainer = DynamicCoTTrainer(
        model=model, args=config(tmp_path, max_length=limit), processing_class=processor, train_dataset=posts
    )
    assert len(trainer.train_dataset) == len(posts)
    cut = sum(length.prompt + length.target > limit for length in lengths)
    assert f"{cut} of {len(posts)} train posts have a target that is cut" in caplog.text
    batch = trainer.data_collator(posts)
    totals = batch["prompt"]["attention_mask"].sum(dim=1) + batch["reasoning"]["mask"].sum(dim=1)
    assert totals.max() == limit


def post_config(output_dir: Path, **options: Any) -> PostConfig:
    return PostConfig(output_dir=str(output_dir), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **options)


def test_invalid_posts_are_an_error_or_listed(tmp_path: Path) -> None:
    posts = [*rows("llama", 2), {"id": "wrong", "text": "goal", "keyphrases": ["a; b"]}]
    with pytest.raises(ValueError, match="wrong"):
        prepare_posts(posts, "train", post_config(tmp_path), takes_images=False)
    kept = prepare_posts(posts, "train", post_config(tmp_path, on_invalid="skip"), takes_images=False)
    assert kept["id"] == ["post-0", "post-1"]
    assert "wrong" in (tmp_path / "invalid_posts.train.jsonl").read_text()
    with pytest.raises(ValueError, match="the eval set has no posts"):
        prepare_posts([], "eval", post_config(tmp_path, on_invalid="skip"), takes_images=False)


@pytest.mark.parametrize("takes_images", [True, False])
def test_a_text_model_s_posts_have_no_images(takes_images: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    posts = prepare_posts(rows("llava", 4), "train", post_config(tmp_path), takes_images=takes_images)
    assert ("images" in posts.column_names) == takes_images
    assert ("the images of 3 train posts are left out" in caplog.text) == (not takes_images)


def test_streams_and_other_collators_are_not_read_ahead(tmp_path: Path) -> None:
    args, stream = post_config(tmp_path, max_length=2), Dataset.from_list(rows("llama", 2)).to_iterable_dataset()
    collator = PairedTargetCollator(build("llama")[1])
    assert fit_max_length(stream, "train", args, collator) is stream
    posts = Dataset.from_list(rows("llama", 2))
    assert fit_max_length(posts, "train", args, list) is posts
    assert fit_max_length(posts, "train", post_config(tmp_path), collator) is posts
    assert keep_answerable(stream, "train", BRIEF, "error") is stream


def test_posts_without_answer_are_an_error_or_dropped(caplog: pytest.LogCaptureFixture) -> None:
    posts = reasoning_rows("llama", 3)
    posts[1] |= {"label": "angry"}
    posts[2] |= {"aspect": None}
    with pytest.raises(ValueError, match="2 of 3 train posts do not fit task 'brief'"):
        keep_answerable(Dataset.from_list(posts), "train", BRIEF, "error")
    assert keep_answerable(Dataset.from_list(posts), "train", BRIEF, "skip")["id"] == ["post-0"]
    assert "2 train posts are dropped" in caplog.text
    with pytest.raises(ValueError, match="2 of 2 train posts"):
        keep_answerable(Dataset.from_list(posts[1:]), "train", BRIEF, "skip")
