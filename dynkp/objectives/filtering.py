"""AimKP's filter and objective (AAAI 2026, Eq. 3 and 4): which masked variants of a post are trained on, and how.

Full input and masked variants of a post each have a gradient over all trainable parameters, g_0 and g_m. A variant is kept if
its gradient agrees with that of the full input, c_m = cos(g_0, g_m) > τ_m.

A tie is dropped, and so is a variant whose gradient, or whose post's, is zero or not finite. A variant that is dropped, or was
never computed, has no influence on loss or gradient, whatever number stands in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

REDUCTIONS = ("mean", "sum")


def gradient_cosine(dot: torch.Tensor, full_square: torch.Tensor, variant_square: torch.Tensor) -> torch.Tensor:
    """Compute c_m = g_0·g_m / (|g_0| |g_m|), Eq. 3, from sums over all parameters.

    Args:
        dot (`torch.Tensor` of shape `(B,)`): g_0·g_m; accumulate it in float32 or better.
        full_square (`torch.Tensor` of shape `(B,)`): g_0·g_0.
        variant_square (`torch.Tensor` of shape `(B,)`): g_m·g_m.

    Returns:
        `torch.Tensor` of shape `(B,)`: between -1 and 1; 0 if either gradient is zero, NaN if one is not finite.

    Example:
        >>> gradient_cosine(torch.tensor([24.0]), torch.tensor([25.0]), torch.tensor([25.0]))  # (3, 4) and (4, 3)
        tensor([0.9600])
    """
    # Two roots: the product of two squares may overflow, or underflow to zero, where the cosine does neither.
    norms = full_square.sqrt() * variant_square.sqrt()
    return torch.where(norms == 0, torch.zeros_like(dot), dot / norms).clamp(-1.0, 1.0)


def keep_variants(cosines: torch.Tensor, thresholds: Sequence[float] | None) -> torch.Tensor:
    """Compute the switches of Eq. 4: variant m is kept if c_m > τ_m, strictly.

    Args:
        cosines (`torch.Tensor` of shape `(B, M)`): one column per variant; NaN where a post does not have the variant.
        thresholds (`Sequence[float]` or `None`): τ_m, M of them; the paper's are 0.1 (text masked) and 0.4 (image masked).
            `None` keeps every variant with a finite cosine: the ablation "w/o gradient-based filtering" of Table 2.

    Returns:
        `torch.Tensor` of shape `(B, M)`: bool.

    Example:
        >>> keep_variants(torch.tensor([[0.2, 0.2], [0.1, 0.5]]), [0.1, 0.4])
        tensor([[ True, False],
                [False,  True]])
    """
    exists = cosines.isfinite()
    return exists if thresholds is None else exists & (cosines > cosines.new_tensor(list(thresholds)))


def filtered_loss(full: torch.Tensor, variants: torch.Tensor, kept: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Combine the losses of the full input and of the kept variants, Eq. 4.

    ℓ = (ℓ_0 + Σ_m kept_m ℓ_m) / (1 + Σ_m kept_m). The paper's equation has no denominator, the authors' code has.

    Args:
        full (`torch.Tensor` of shape `(B,)`): ℓ_0, the losses given the full inputs.
        variants (`torch.Tensor` of shape `(B, M)`): ℓ_m, the losses given the masked variants.
        kept (`torch.Tensor` of shape `(B, M)`): bool; False where a post does not have the variant.
        reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` divides by the number of combined losses (the authors'
            code), `"sum"` does not (the paper's Eq. 4).

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: if `reduction` is neither.

    Example:
        >>> losses = torch.tensor([1.0]), torch.tensor([[3.0, 9.0]])
        >>> kept = torch.tensor([[True, False]])
        >>> filtered_loss(*losses, kept, "mean"), filtered_loss(*losses, kept, "sum")
        (tensor([2.]), tensor([4.]))
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"`variant_reduction` is {reduction!r}: use 'mean' (the authors' code) or 'sum' (the paper's Eq. 4)")
    # Not a product with 0: the overflow of a dropped variant must reach neither the sum nor the backward pass.
    total = full + torch.where(kept, variants, torch.zeros_like(variants)).sum(dim=1)
    return total / (1 + kept.sum(dim=1)) if reduction == "mean" else total
