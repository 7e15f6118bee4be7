"""Invariants of AimKP's collators:

- a batch is the paired-target batch of the same posts, and their layouts;
- of a modality that is not masked, nothing is located;
- the batches of single posts are those that the collator makes of each post by itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.masking_collator import MaskingCollator, SinglePostsCollator
from tests.support.layouts import located
from tests.support.posts import rows
from tests.support.tiny_models import build


def assert_equal(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.equal(second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    else:
        assert first == second


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_a_batch_and_its_layouts(family: str) -> None:
    _, processor = build(family)
    batch = MaskingCollator(processor, task="aimkp")(rows(family))
    layouts = batch.pop("layouts")
    assert layouts == located(processor, rows(family))[0]
    assert_equal(batch, PairedTargetCollator(processor, task="aimkp")(rows(family)))
    text_only = MaskingCollator(processor, task="aimkp", modalities=("text",))(rows(family))["layouts"]
    assert [layout.text for layout in text_only] == [layout.text for layout in layouts]
    assert not any(layout.grids for layout in text_only)


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_single_posts(family: str) -> None:
    _, processor = build(family)
    collator = MaskingCollator(processor, task="aimkp", kinds=("direct",))
    batch = SinglePostsCollator(collator)(rows(family))
    single_posts = batch.pop("single_posts")
    assert_equal(batch, collator(rows(family)))
    for single, post in zip(single_posts, rows(family), strict=True):
        assert_equal(single, collator([post]))
