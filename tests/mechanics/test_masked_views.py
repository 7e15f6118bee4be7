"""Views of a batch computed together equal those of one post after the other: losses, cosines and gradients.

Holds in float64 to 1e-10 for the full input and both masked variants, every pattern, unequal lengths, posts without text or
image, shared and separate prompts; losses are differentiable and deliver the gradients of the views, without another pass
through the model; a variant that a post does not have has no cosine and no gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from dynkp.batches.masking_collator import MaskingCollator, SinglePostsCollator
from dynkp.mechanics.masked_views import FULL, BatchedViews, MaskedViews, Masking, PlainViews
from dynkp.objectives.filtering import filtered_loss, keep_variants
from tests.support.aimkp_trainers import lora
from tests.support.exact import TOLERANCE, double
from tests.support.posts import rows
from tests.support.tiny_models import build, exact_float64

STRIDES = {"text": [2, 3, 4, 2], "image": [2, 4, 2, 8]}


def model_and_batch(family: str) -> tuple[Any, dict[str, Any]]:
    model, processor = build(family)
    torch.manual_seed(0)
    model = get_peft_model(model, lora(family))
    return model, double(SinglePostsCollator(MaskingCollator(processor))(rows(family)))


def open_views(model: Any, batch: dict[str, Any], masking: Masking | None = None, **options: Any) -> list[MaskedViews]:
    masking = masking or Masking()
    longest = max(batch["direct"]["lengths"])
    return [
        BatchedViews(model, batch, STRIDES, masking, longest_target=longest, **options),
        PlainViews(model, batch, STRIDES, masking),
    ]


def some_of(cosines: torch.Tensor) -> torch.Tensor:
    """Keep the variants with the higher cosines, as many as are dropped, by a threshold that rounding does not reach."""
    ordered = cosines[~cosines.isnan()].sort().values
    middle = len(ordered) // 2
    threshold = (ordered[middle - 1] + ordered[middle]).item() / 2
    return keep_variants(cosines, [threshold, threshold])


def update(model: Any, views: MaskedViews, targets: Any, over_tokens: bool) -> tuple[Any, ...]:
    """Losses, cosines, and the gradients that the filtered losses deliver, each post with another factor."""
    for view in views:
        views.backward(view, targets, over_tokens)
    full, variants = views.losses()
    cosines = views.cosines()
    model.zero_grad()
    total = filtered_loss(full, variants, some_of(cosines))
    (total * torch.linspace(0.5, 2.0, len(total), dtype=total.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return full.detach(), variants.detach(), cosines, gradients


@pytest.mark.parametrize("shares_prefix", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("pattern", ["strided", "random", "pooled"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_batched_views_equal_plain_views(family: str, pattern: str, shares_prefix: bool) -> None:
    model, batch = model_and_batch(family)
    with exact_float64(model):
        model.train()
        ways = open_views(model, batch, Masking(pattern, visit=1, seed=3), shares_prefix=shares_prefix)
        batched, plain = (update(model, views, batch["direct"], over_tokens=False) for views in ways)
    for ours, reference in zip(batched[:3], plain[:3], strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE, equal_nan=True)
    assert batched[3].keys() == plain[3].keys() and max(g.abs().max() for g in plain[3].values()) > 1e-3
    for name, gradient in plain[3].items():
        torch.testing.assert_close(batched[3][name], gradient, rtol=0, atol=TOLERANCE, msg=name)
    assert plain[2].isnan().tolist() == [[False, False], [False, True], [False, False], [True, False]]
    assert some_of(plain[2]).sum() == 3


def test_views_are_named_in_order_and_know_their_posts() -> None:
    model, batch = model_and_batch("llava")
    for views in open_views(model, batch):
        assert list(views) == [FULL, "text", "image"]
        assert views.indices == {FULL: [0, 1, 2, 3], "text": [0, 1, 2], "image": [0, 2, 3]}


@pytest.mark.parametrize("over_tokens", [True, False])
def test_losses_are_those_of_the_views(over_tokens: bool) -> None:
    """Sums or means over a target's tokens; zero for a post without the variant."""
    model, batch = model_and_batch("llava")
    with exact_float64(model):
        for views, alone in zip(open_views(model, batch), open_views(model, batch), strict=True):
            with torch.no_grad():
                expected = [alone.loss(view, batch["direct"]).normalized(over_tokens).total for view in (FULL, "text", "image")]
            full, variants, _, _ = update(model, views, batch["direct"], over_tokens)
            torch.testing.assert_close(full, expected[0], rtol=0, atol=TOLERANCE)
            for column, (view, loss) in enumerate(zip(("text", "image"), expected[1:], strict=True)):
                torch.testing.assert_close(variants[views.indices[view], column], loss, rtol=0, atol=TOLERANCE)
            assert variants[3, 0] == 0 and variants[1, 1] == 0


def test_a_single_modality() -> None:
    model, batch = model_and_batch("llava")
    with exact_float64(model):
        views = PlainViews(model, batch, {"image": STRIDES["image"]})
        for view in views:
            views.backward(view, batch["direct"], over_tokens=True)
        assert list(views) == [FULL, "image"] and views.cosines().shape == (4, 1)


def test_a_window_shorter_than_the_input_is_masked_and_says_why() -> None:
    """Gemma 3's sliding window counts columns: with dropped tokens it would reach further."""
    model, batch = model_and_batch("gemma3")
    batched, _ = open_views(model, batch)
    assert "48 tokens back" in str(batched.why_masked) and batched.prefix is None
    model, batch = model_and_batch("llava")
    assert open_views(model, batch)[0].why_masked is None
