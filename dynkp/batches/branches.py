"""A batch of prompts in two versions that begin alike."""

from __future__ import annotations

from typing import Any, TypedDict

import torch


class Branches(TypedDict):
    """A batch of prompts in two versions.

    `prompt` are the prompts of one branch, whole. `ends` has, per branch, the columns behind the first `shared` ones:
    `input_ids` (B, W), `attention_mask` (B, W), left-padded. A branch whose prompts do not begin like the others has no
    end but, in `separate`, its own whole prompts.
    """

    prompt: dict[str, Any]
    shared: int
    ends: dict[str, dict[str, torch.Tensor]]
    separate: dict[str, dict[str, Any]]
