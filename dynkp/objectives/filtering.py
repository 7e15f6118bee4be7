"""AimKP's filter (AAAI 2026, Eq. 3 and 4): which masked variants of a post teach, and what they add up to.

Given   one post's gradients over all trainable parameters, g0 of the full input and g_m of each masked variant, as dot
        products; and the losses (or the gradients) of full input and variants.
Gives   c_m = cos(g0, g_m), the variants kept (c_m > τ_m), and full input and kept variants combined.
Holds   a tie is dropped, and so is a variant whose gradient, or whose post's, is zero or not finite; a variant that is
        dropped or was never computed has no influence, whatever number stands in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynkp.objectives.token_loss import TargetLoss

REDUCTIONS = ("mean", "sum")


def gradient_cosine(dot: torch.Tensor, full_square: torch.Tensor, variant_square: torch.Tensor) -> torch.Tensor:
    """c_m = g0·g_m / (|g0| |g_m|), Eq. 3, from sums over all parameters; 0 if either gradient is zero.

    Args:
        dot (`torch.Tensor` of shape `(B,)`): g0·g_m; accumulate it in float32 or better.
        full_square, variant_square (`torch.Tensor` of shape `(B,)`): g0·g0 and g_m·g_m.

    Returns:
        `torch.Tensor` of shape `(B,)`: between -1 and 1; NaN where a gradient is not finite.

    Example: g0 = (3, 4), g_m = (4, 3): `gradient_cosine` of 24, 25 and 25 is 0.96.
    """
    # Two roots: the product of two squares may overflow, or vanish, where the cosine does neither.
    norms = full_square.sqrt() * variant_square.sqrt()
    return torch.where(norms == 0, torch.zeros_like(dot), dot / norms).clamp(-1.0, 1.0)


def keep_variants(cosines: torch.Tensor, thresholds: Sequence[float]) -> torch.Tensor:
    """The switches of Eq. 4: keep variant m iff c_m > τ_m, strictly.

    Args:
        cosines (`torch.Tensor` of shape `(B, M)`): one column per variant; NaN where there is none.
        thresholds (`Sequence[float]`): τ_m, M of them; the paper's are 0.1 (text masked) and 0.4 (image masked). Below -1
            keeps all variants there are: the ablation "w/o gradient-based filtering".

    Returns:
        `torch.Tensor` of shape `(B, M)`, bool.

    Example:

    ```python
    >>> keep_variants(torch.tensor([[0.2, 0.2], [0.1, 0.5]]), [0.1, 0.4])
    tensor([[ True, False],
            [False,  True]])
    ```
    """
    return cosines.isfinite() & (cosines > cosines.new_tensor(list(thresholds)))


def variant_weights(kept: torch.Tensor, reduction: str = "mean", dtype: torch.dtype | None = None) -> torch.Tensor:
    """What full input and variants are multiplied with: the coefficients of the update, per post.

    Args:
        kept (`torch.Tensor` of shape `(B, M)`): bool.
        dtype (`torch.dtype`, *optional*): of the weights; the default one, if `None`.
        reduction (`str`): `"mean"` divides by 1 + number kept (the authors' code), `"sum"` does not (the paper's Eq. 4).

    Returns:
        `torch.Tensor` of shape `(B, 1 + M)`: the full input first, then the variants; 0 for those dropped.

    Example: one of two variants kept gives `[0.5, 0.5, 0.0]` by `"mean"` and `[1.0, 1.0, 0.0]` by `"sum"`.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"`variant_reduction` is {reduction!r}: use 'mean' (the authors' code) or 'sum' (the paper's Eq. 4)")
    counted = torch.cat([torch.ones_like(kept[:, :1]), kept], dim=1).to(dtype or torch.get_default_dtype())
    return counted / counted.sum(dim=1, keepdim=True) if reduction == "mean" else counted


def combine(full: torch.Tensor, variants: torch.Tensor, kept: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """(g0 + Σ kept g_m) / (1 + number kept), or without the division; of losses, of gradients, of anything linear.

    Args:
        full (`torch.Tensor` of shape `(B, ...)`): of the full input.
        variants (`torch.Tensor` of shape `(B, M, ...)`): of the masked variants.
        kept (`torch.Tensor` of shape `(B, M)`): bool.
        reduction (`str`): as in [`variant_weights`].

    Returns:
        `torch.Tensor` of shape `(B, ...)`.

    Example: losses 1.0 (full), 3.0 (kept) and 9.0 (dropped) give 2.0 by `"mean"` and 4.0 by `"sum"`.
    """
    shape = (*kept.shape, *[1] * (variants.dim() - 2))
    # Not a product with 0: a dropped variant's overflow must not reach the sum, nor the backward pass.
    counted = torch.where(kept.view(shape), variants, torch.zeros_like(variants))
    weights = variant_weights(kept, reduction, full.dtype)[:, 0]
    return (full + counted.sum(dim=1)) * weights.view(-1, *[1] * (full.dim() - 1))


def filtered_loss(
    full: TargetLoss, variants: Sequence[TargetLoss], kept: torch.Tensor, reduction: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each post adds to numerator and denominator of the optimizer step's loss (Eq. 4).

    A post counts by its number of target tokens, as in the authors' code: numerators are sums over tokens, and the step's
    loss is the sum of all numerators over the sum of all denominators.

    Args:
        full ([`TargetLoss`]): loss of the target given the full input, parts `(B,)`.
        variants (`Sequence[TargetLoss]`): losses of the same target given each masked input, parts `(B,)`.
        kept (`torch.Tensor` of shape `(B, M)`): bool; False where a post has no such variant.
        reduction (`str`): as in [`variant_weights`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: numerator and denominator, each `(B,)`.
    """
    totals = torch.stack([variant.total for variant in variants], dim=1)
    return combine(full.total, totals, kept, reduction), full.tokens
