"""Measured lengths equal the collator's, for every family."""

from __future__ import annotations

import pytest

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
