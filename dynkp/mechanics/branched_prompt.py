"""Two prompts that begin alike, each with its own end and its own answer: the common beginning is computed once.

Given   prompts as the processor gives them, left-padded, the number of columns they share with a second set of prompts,
        and that set's own last columns.
Gives   `logits(branch, targets)`: the logits at each answer token, (N, V), of either set, in one graph.
Holds   values and gradients equal those of [`PlainBranches`], the twin that runs each prompt and its answers in one ordinary
        forward: to rounding, for unequal lengths, with and without gradient checkpointing.

Pictures lie in the beginning, so the vision tower runs once. What it is made for: MulCoT-RD asks for a chain of reasons and
for the label alone, in prompts that differ in their last words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dynkp.batches.branches import Branches
from dynkp.batches.targets import CONTINUED_INPUTS, SEQUENCE_INPUTS, Targets, select, targets_of
from dynkp.mechanics.shared_prompt import PlainPrompt, SharedPrefix, prompt_positions, target_logits


class SharedBranches:
    """The beginning of a batch of prompts, computed once, ready to be continued by each branch.

    Args:
        model: causal language model (or a PEFT model around one) that can share a prompt.
        branches ([`Branches`]): the prompts, with nothing in `apart`.
    """

    def __init__(self, model: nn.Module, branches: Branches):
        prompt, shared = branches["prompt"], branches["shared"]
        positions = prompt_positions(model, prompt)
        beginning = {key: value[:, :shared] if key in SEQUENCE_INPUTS else value for key, value in prompt.items()}
        self.prefix = SharedPrefix(model, beginning, positions[..., :shared], _logits)
        self.ends = {name: _end(prompt, shared, end) for name, end in branches["ends"].items()}
        self.positions = {name: _end_positions(positions, shared, end) for name, end in branches["ends"].items()}

    def logits(self, branch: str, targets: Targets) -> torch.Tensor:
        """Logits at the tokens of `targets`, (N, V), post by post; posts without target cost nothing."""
        rows = None  # to select all would copy the beginning
        if not all(targets["lengths"]):
            rows = [row for row, length in enumerate(targets["lengths"]) if length]
        end = {key: select(value, rows) for key, value in self.ends[branch].items()}
        positions = select(self.positions[branch], rows, dim=-2)
        return self.prefix.log_probs(end, positions, targets_of(targets, rows), rows)


class PlainBranches:
    """The plain twin of [`SharedBranches`]: one ordinary forward per call, whole prompts and pictures included.

    It is the oracle of the tests and serves models that cannot share a prompt, and prompts that do not begin alike.

    Args:
        model, branches: as for [`SharedBranches`].
        everywhere (`bool`): give the logits at the prompts' own tokens too, all but those that pad.
    """

    def __init__(self, model: nn.Module, branches: Branches, everywhere: bool = False):
        self.model, self.branches, self.everywhere = model, branches, everywhere

    def logits(self, branch: str, targets: Targets) -> torch.Tensor:
        """As [`SharedBranches.logits`]; with `everywhere`, at the tokens of the prompts too ([`everywhere_mask`])."""
        prompt, positions = self._whole(branch)
        score = _all_logits if self.everywhere else _logits
        return PlainPrompt(self.model, prompt, score, positions).log_probs(targets)

    def _whole(self, branch: str) -> tuple[dict[str, Any], torch.Tensor | None]:
        if branch in self.branches["apart"]:
            return self.branches["apart"][branch], None
        prompt, shared, end = self.branches["prompt"], self.branches["shared"], self.branches["ends"][branch]
        positions = prompt_positions(self.model, prompt)
        whole = dict(prompt)
        own = _end(prompt, shared, end)
        for key in SEQUENCE_INPUTS:
            if key in prompt:
                zeros = torch.zeros_like(end["input_ids"])  # token types: text
                whole[key] = torch.cat([prompt[key][:, :shared], own.get(key, zeros)], dim=1)
        return whole, torch.cat([positions[..., :shared], _end_positions(positions, shared, end)], dim=-1)


def everywhere_mask(branches: Branches, branch: str, targets: Targets) -> torch.Tensor:
    """Which positions `PlainBranches(..., everywhere=True)` gives logits of, (B, P + T - 1), bool.

    All tokens of a post that has a target but its last: prompt, pictures' placeholders included, and answer. The last T
    columns are those that predict the answer.
    """
    if branch in branches["apart"]:
        prompt = branches["apart"][branch]["attention_mask"].bool()
    else:
        end = branches["ends"][branch]["attention_mask"]
        prompt = torch.cat([branches["prompt"]["attention_mask"][:, : branches["shared"]], end], dim=1).bool()
    return _predicting(prompt, targets["mask"])


def _end(prompt: Mapping[str, Any], shared: int, end: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    columns = {key: end[key] for key in CONTINUED_INPUTS if key in end}
    if "cross_attention_mask" in prompt:  # Mllama: the end sees the pictures that the beginning's last token sees
        last = prompt["cross_attention_mask"][:, shared - 1 : shared]
        columns["cross_attention_mask"] = last.expand(-1, end["input_ids"].shape[1], -1, -1)
    return columns


def _end_positions(positions: torch.Tensor, shared: int, end: Mapping[str, torch.Tensor]) -> torch.Tensor:
    following = (end["attention_mask"].long().cumsum(dim=-1) - 1).clamp(min=0)
    return positions[..., shared : shared + 1] + following


def _logits(model: nn.Module, inputs: dict[str, Any], target_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
    return target_logits(model, inputs, target_mask)


def _all_logits(model: nn.Module, inputs: dict[str, Any], target_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
    prompt = inputs["attention_mask"][:, : inputs["attention_mask"].shape[1] - target_mask.shape[1] + 1].bool()
    return target_logits(model, inputs, _predicting(prompt, target_mask))


def _predicting(prompt_mask: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
    """Tokens that another one follows, (B, P + T - 1), for posts that have a target."""
    return torch.cat([prompt_mask, target_mask[:, 1:]], dim=1) & target_mask[:, :1]
