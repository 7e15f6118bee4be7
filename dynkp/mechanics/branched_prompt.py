"""Two sets of prompts that begin alike, each with its own end and its own answers: the common beginning is computed once.

Given a batch of prompts in two branches ([`~dynkp.batches.branches.Branches`]), [`SharedBranches`] and [`PlainBranches`]
compute the logits at the tokens of either branch's answers, in one graph. MulCoT-RD's two tasks are such branches: its label
prompts and its response-chain prompts differ in their last words only, and all images are in their common beginning.

Guarantee: [`SharedBranches`] equals [`PlainBranches`], the reference that runs each prompt and its answer in one ordinary
forward pass, in values and gradients: to rounding, for unequal lengths, with and without gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dynkp.batches.branches import Branches
from dynkp.batches.targets import CONTINUED_INPUTS, SEQUENCE_INPUTS, Targets, select, targets_of
from dynkp.mechanics.shared_prompt import PlainPrompt, SharedPrefix, prompt_positions, target_logits


class BranchedPrompt:
    """A batch of prompts in two branches, ready for the computation of answers: the interface of both implementations.

    Args:
        branches ([`~dynkp.batches.branches.Branches`]): the prompts.
        everywhere (`bool`, *optional*, defaults to `False`): compute logits at the prompts' tokens too, not only at those that
            predict an answer's tokens.
    """

    def __init__(self, branches: Branches, everywhere: bool = False):
        self.branches, self.everywhere = branches, everywhere

    def logits(self, branch: str, answers: Targets) -> torch.Tensor:
        """Compute the logits at the answers' tokens; with `everywhere`, at the prompts' tokens too.

        Args:
            branch (`str`): name of the branch.
            answers ([`~dynkp.batches.targets.Targets`]): B answers of that branch.

        Returns:
            `torch.Tensor` of shape `(N, V)`: at the True entries of [`positions`], in reading order.
        """
        raise NotImplementedError

    def positions(self, branch: str, answers: Targets) -> torch.Tensor:
        """Return the positions of the tokens that [`logits`] predict.

        Args:
            branch (`str`): name of the branch.
            answers ([`~dynkp.batches.targets.Targets`]): B answers of that branch.

        Returns:
            `torch.Tensor` of shape `(B, T)`: bool, the answers' mask; with `everywhere` (B, P + T - 1), see
            [`everywhere_mask`].
        """
        return everywhere_mask(self.branches, branch, answers) if self.everywhere else answers["mask"]

    def at_answers(self, logits: torch.Tensor, branch: str, answers: Targets) -> torch.Tensor:
        """Select the logits at the answers' tokens from those that [`logits`] returned.

        Args:
            logits (`torch.Tensor` of shape `(N, V)`): what [`logits`] returned.
            branch (`str`): name of the branch.
            answers ([`~dynkp.batches.targets.Targets`]): B answers of that branch.

        Returns:
            `torch.Tensor` of shape `(number of answer tokens, V)`.
        """
        if not self.everywhere:
            return logits
        positions = self.positions(branch, answers)
        of_answers = torch.zeros_like(positions)
        of_answers[:, positions.shape[1] - answers["mask"].shape[1] :] = answers["mask"]
        return logits[of_answers[positions]]


class SharedBranches(BranchedPrompt):
    """The beginning of a batch of prompts, computed once, to be continued by each branch.

    Args:
        model (`torch.nn.Module`): causal language model (or a PEFT model around one) for which
            [`~dynkp.mechanics.shared_prompt.why_prompts_cannot_be_shared`] returns `None`.
        branches ([`~dynkp.batches.branches.Branches`]): the prompts, with nothing in `separate`.
    """

    def __init__(self, model: nn.Module, branches: Branches):
        super().__init__(branches)
        prompt, shared = branches["prompt"], branches["shared"]
        positions = prompt_positions(model, prompt)
        beginning = {key: value[:, :shared] if key in SEQUENCE_INPUTS else value for key, value in prompt.items()}
        self.prefix = SharedPrefix(model, beginning, positions[..., :shared], _logits)
        self.ends = {name: _end(prompt, shared, end) for name, end in branches["ends"].items()}
        self.end_positions = {name: _end_positions(positions, shared, end) for name, end in branches["ends"].items()}

    def logits(self, branch: str, answers: Targets) -> torch.Tensor:
        """Compute the logits at the answers' tokens; see [`BranchedPrompt.logits`]. Posts without answer cost nothing."""
        indices = None  # to select all would copy the beginning
        if not all(answers["lengths"]):
            indices = [index for index, length in enumerate(answers["lengths"]) if length]
        end = {key: select(value, indices) for key, value in self.ends[branch].items()}
        positions = select(self.end_positions[branch], indices, dim=-2)
        return self.prefix.log_probs(end, positions, targets_of(answers, indices), indices)


class PlainBranches(BranchedPrompt):
    """The reference of [`SharedBranches`]: one ordinary forward pass per call, whole prompts and images included.

    The tests compare with it, and it serves models that cannot share a prompt, and prompts that do not begin alike.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
        branches ([`~dynkp.batches.branches.Branches`]): the prompts.
        everywhere (`bool`, *optional*, defaults to `False`): compute logits at the prompts' tokens too.
    """

    def __init__(self, model: nn.Module, branches: Branches, everywhere: bool = False):
        super().__init__(branches, everywhere)
        self.model = model

    def logits(self, branch: str, answers: Targets) -> torch.Tensor:
        """Compute the logits at the answers' tokens, or at all; see [`BranchedPrompt.logits`]."""
        prompt, positions = self._whole(branch)
        score = _all_logits if self.everywhere else _logits
        return PlainPrompt(self.model, prompt, score, positions).log_probs(answers)

    def _whole(self, branch: str) -> tuple[dict[str, Any], torch.Tensor | None]:
        if branch in self.branches["separate"]:
            return self.branches["separate"][branch], None
        prompt, shared, end = self.branches["prompt"], self.branches["shared"], self.branches["ends"][branch]
        positions = prompt_positions(self.model, prompt)
        whole = dict(prompt)
        own = _end(prompt, shared, end)
        for key in SEQUENCE_INPUTS:
            if key in prompt:
                zeros = torch.zeros_like(end["input_ids"])  # token types: text
                whole[key] = torch.cat([prompt[key][:, :shared], own.get(key, zeros)], dim=1)
        return whole, torch.cat([positions[..., :shared], _end_positions(positions, shared, end)], dim=-1)


def everywhere_mask(branches: Branches, branch: str, answers: Targets) -> torch.Tensor:
    """Return the positions that `PlainBranches(..., everywhere=True)` computes logits at.

    These are all tokens of a post that has an answer but its last one: prompt, image placeholders included, and answer.

    Args:
        branches ([`~dynkp.batches.branches.Branches`]): the prompts.
        branch (`str`): name of the branch.
        answers ([`~dynkp.batches.targets.Targets`]): B answers of that branch.

    Returns:
        `torch.Tensor` of shape `(B, P + T - 1)`: bool; the last T columns are those that predict the answer.
    """
    if branch in branches["separate"]:
        prompt = branches["separate"][branch]["attention_mask"].bool()
    else:
        end = branches["ends"][branch]["attention_mask"]
        prompt = torch.cat([branches["prompt"]["attention_mask"][:, : branches["shared"]], end], dim=1).bool()
    return _predicting(prompt, answers["mask"])


def _end(prompt: Mapping[str, Any], shared: int, end: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    columns = {key: end[key] for key in CONTINUED_INPUTS if key in end}
    if "cross_attention_mask" in prompt:  # Mllama: the end attends to the images that the beginning's last token attends to
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
    """Return the tokens that another token follows, (B, P + T - 1), of the posts that have a target."""
    return torch.cat([prompt_mask, target_mask[:, 1:]], dim=1) & target_mask[:, :1]
