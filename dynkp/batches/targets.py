"""A batch of target texts, and the selection of some of its posts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import torch

# Processor outputs with one column per prompt token; all others (pixels, grids) belong to the pictures.
SEQUENCE_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")


# Those of them that a continuation without pictures needs.
CONTINUED_INPUTS = ("input_ids", "attention_mask", "cross_attention_mask")


class Targets(TypedDict):
    """A batch of target texts of one kind, right-padded. A post without such a target has length 0."""

    input_ids: torch.Tensor  # (B, T), tokens
    mask: torch.Tensor  # (B, T), bool, False at padding
    weights: torch.Tensor  # (B, T), float, 0 at padding
    lengths: list[int]  # B token counts, on the host: slicing by them needs no device synchronisation


def select(tensor: torch.Tensor, rows: Sequence[int] | None, dim: int = 0) -> torch.Tensor:
    """The given rows, in order; the tensor itself for `None`."""
    return tensor if rows is None else tensor.index_select(dim, torch.as_tensor(rows, dtype=torch.long, device=tensor.device))


def targets_of(targets: Targets, rows: Sequence[int] | None) -> Targets:
    """The targets of the given posts, in order; all of them for `None`."""
    if rows is None:
        return targets
    ids, mask, weights = (select(targets[key], rows) for key in ("input_ids", "mask", "weights"))
    return Targets(input_ids=ids, mask=mask, weights=weights, lengths=[targets["lengths"][row] for row in rows])


def mixed_targets(first: Targets, second: Targets, chosen: torch.Tensor) -> Targets:
    """One target per post: the second where `chosen`, (B,) bool, else the first."""
    pairs = zip(first["lengths"], second["lengths"], chosen.tolist(), strict=True)
    lengths = [right if wanted else left for left, right, wanted in pairs]
    width = max(lengths, default=0)

    def mix(key: Literal["input_ids", "mask", "weights"]) -> torch.Tensor:
        sides = (side[key][:, :width] for side in (first, second))
        left, right = (torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in sides)
        return torch.where(chosen[:, None], right, left)

    return Targets(input_ids=mix("input_ids"), mask=mix("mask"), weights=mix("weights"), lengths=lengths)
