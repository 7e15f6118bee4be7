"""The assistant of MulCoT-RD: a trained model whose soft labels a student learns from.

Given   a model and batches as the student gets them.
Gives   its logits at the tokens of each task's answers.
Holds   it is in evaluation mode, has no gradient and its weights do not move; it keeps its own dtype and device; its
        tokens are the student's, or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynkp.batches.branches import Branches
from dynkp.batches.targets import Targets
from dynkp.mechanics.branched_prompt import PlainBranches, SharedBranches
from dynkp.mechanics.shared_prompt import causal_lm_of, why_prompts_cannot_be_shared
from dynkp.models.checkpoints import find_checkpoint, load_model, load_processor


class Assistant:
    """A frozen model that says how likely it finds each token of an answer.

    Args:
        model: a causal (vision-)language model or a PEFT model around one; put into evaluation mode, gradients off.
        tokenizer: its tokenizer; None if it is the student's.
        shares_prompt: whether the beginning of both tasks' prompts is computed once, where the model can.

    Example:
        >>> assistant = Assistant.load("runs/assistant", device="cuda")
        >>> assistant.logits(batch["prompts"], {"label": batch["label"]})["label"].shape
        torch.Size([12, 152064])
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, shares_prompt: bool = True):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.shares_prompt = shares_prompt and why_prompts_cannot_be_shared(model) is None

    @classmethod
    def load(cls, name: str, *, dtype: str = "auto", device: torch.device | str = "cpu") -> Assistant:
        """Load a saved model, or an adapter with its base model, and its tokenizer."""
        checkpoint = find_checkpoint(name)
        processor = load_processor(checkpoint)
        model = load_model(checkpoint, dtype=dtype, device=device)
        return cls(model, getattr(processor, "tokenizer", processor))

    @property
    def vocabulary(self) -> int:
        """Number of ids its probabilities are spread over."""
        return causal_lm_of(self.model).get_output_embeddings().weight.shape[0]

    @torch.no_grad()
    def logits(self, branches: Branches, targets: Mapping[str, Targets], everywhere: bool = False) -> dict[str, torch.Tensor]:
        """z_A at the tokens of each task's answers.

        Args:
            branches ([`Branches`]): the prompts.
            targets: per task its [`Targets`].
            everywhere: also at the prompts' own tokens, as [`PlainBranches`] orders them.

        Returns:
            Per task (N, V), on the targets' device; a task that no post of the batch has is left out.
        """
        with torch.autocast(self.model.device.type, enabled=False):  # its own type, whatever the student's
            own = self._placed(branches)
            plain = everywhere or branches["apart"] or not self.shares_prompt
            prompts = PlainBranches(self.model, own, everywhere) if plain else SharedBranches(self.model, own)
            return {
                task: prompts.logits(task, self._placed(answers)).to(answers["input_ids"].device)
                for task, answers in targets.items()
                if any(answers["lengths"])
            }

    def _placed(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._placed(item) for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        # Pictures come in the student's type, or in float32.
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)


def check_vocabularies(student: PreTrainedTokenizerBase, assistant: PreTrainedTokenizerBase) -> None:
    """Refuse an assistant whose tokens are not the student's.

    An id that only one of them knows is allowed: sizes differ by ids that stand for nothing, and by added tokens.

    Raises:
        ValueError: with the first ids that mean two different tokens, and how many there are.
    """
    theirs = {index: token for token, index in assistant.get_vocab().items()}
    ours = {index: token for token, index in student.get_vocab().items()}
    shared = sorted(ours.keys() & theirs.keys())
    differing = [index for index in shared if ours[index] != theirs[index]]
    if differing or not shared:
        shown = ", ".join(f"{index} is {ours[index]!r} and {theirs[index]!r}" for index in differing[:3])
        raise ValueError(
            f"`assistant`: student and assistant disagree on {len(differing)} of {len(shared)} shared token ids ({shown}), so "
            "their probabilities cannot be compared. Take an assistant with the student's tokenizer: another size of the "
            "same family."
        )
