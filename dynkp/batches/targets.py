"""A batch of targets, and the selection of some of its posts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import torch

SEQUENCE_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""The processor's outputs that have one column per prompt token; all others (pixels, grids) belong to the images."""

CONTINUED_INPUTS = ("input_ids", "attention_mask", "cross_attention_mask")
"""Those of `SEQUENCE_INPUTS` that a continuation without images needs."""


class Targets(TypedDict):
    """A batch of targets of one kind, padded on the right. A post without such a target has length 0.

    Attributes:
        input_ids: (B, T), token ids.
        mask: (B, T), bool: False at padding.
        weights: (B, T), float: weight of each token; 0 at padding.
        lengths: number of tokens of each of the B targets, as Python integers: slicing by them needs no synchronisation
            with the device.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor
    lengths: list[int]


def select(tensor: torch.Tensor, indices: Sequence[int] | None, dim: int = 0) -> torch.Tensor:
    """Select entries of a tensor along one dimension.

    Args:
        tensor (`torch.Tensor`): any tensor.
        indices (`Sequence[int]` or `None`): positions of the entries, in the wanted order; `None` returns the tensor itself.
        dim (`int`, *optional*, defaults to `0`): the dimension.

    Example:
        >>> select(torch.tensor([5, 6, 7]), [2, 0])
        tensor([7, 5])
    """
    if indices is None:
        return tensor
    return tensor.index_select(dim, torch.as_tensor(indices, dtype=torch.long, device=tensor.device))


def targets_of(targets: Targets, indices: Sequence[int] | None) -> Targets:
    """Select the targets of some posts.

    Args:
        targets ([`Targets`]): targets of B posts.
        indices (`Sequence[int]` or `None`): positions of N posts in the batch, in the wanted order; `None` selects all.

    Returns:
        [`Targets`]: the targets of the N posts, with the same T.
    """
    if indices is None:
        return targets
    input_ids, mask, weights = (select(targets[key], indices) for key in ("input_ids", "mask", "weights"))
    return Targets(input_ids=input_ids, mask=mask, weights=weights, lengths=[targets["lengths"][index] for index in indices])


def mixed_targets(first: Targets, second: Targets, chosen: torch.Tensor) -> Targets:
    """Take one of two targets for each post.

    Args:
        first ([`Targets`]): targets of B posts, taken where `chosen` is False.
        second ([`Targets`]): targets of the same B posts, taken where `chosen` is True.
        chosen (`torch.Tensor` of shape `(B,)`): bool.

    Returns:
        [`Targets`]: (B, T) with T the length of the longest chosen target.
    """
    pairs = zip(first["lengths"], second["lengths"], chosen.tolist(), strict=True)
    lengths = [right if wanted else left for left, right, wanted in pairs]
    width = max(lengths, default=0)

    def mix(key: Literal["input_ids", "mask", "weights"]) -> torch.Tensor:
        sides = (side[key][:, :width] for side in (first, second))
        left, right = (torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in sides)
        return torch.where(chosen[:, None], right, left)

    return Targets(input_ids=mix("input_ids"), mask=mix("mask"), weights=mix("weights"), lengths=lengths)
