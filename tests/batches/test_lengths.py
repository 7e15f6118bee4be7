"""Invariants of measured lengths:

- they equal those of the collator's batches, for every family;
- prompts that leave no token for a target are found before the first step, and cut targets are counted.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynkp import DynamicCoTConfig, DynamicCoTTrainer
from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.lengths import post_lengths
from tests.support.posts import rows
from tests.support.tiny_models import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_equal_the_collators(family: str) -> None:
    _, processor = build(family)
    collator = PairedTargetCollator(processor)
    posts = rows(family)
    batch = collator(posts)
    measured = list(post_lengths(collator, posts))
    assert [length.id for length in measured] == batch["id"]
    assert [length.prompt for length in measured] == batch["prompt"]["attention_mask"].sum(dim=1).tolist()
    pairs = zip(batch["direct"]["lengths"], batch["reasoning"]["lengths"], strict=True)
    assert [length.target for length in measured] == [max(pair) for pair in pairs]


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
