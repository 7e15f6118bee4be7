"""A batch of prompts in two versions that begin with the same tokens."""

from __future__ import annotations

from typing import Any, TypedDict

import torch


class Branches(TypedDict):
    """A batch of prompts in two versions, the branches.

    Attributes:
        prompt: the whole prompts of one branch, as the processor returns them, padded on the left.
        shared: number of leading columns that both branches share.
        ends: per branch the columns behind the shared ones, `input_ids` (B, W) and `attention_mask` (B, W), padded on the
            left; empty if the branches are computed separately.
        separate: per branch its whole prompts, if the branches cannot share their beginning; else empty.
    """

    prompt: dict[str, Any]
    shared: int
    ends: dict[str, dict[str, torch.Tensor]]
    separate: dict[str, dict[str, Any]]
