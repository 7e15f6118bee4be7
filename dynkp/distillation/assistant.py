"""The assistant of MulCoT-RD: a frozen model whose logits are the soft labels of a student's training.

Guarantees: the assistant is in evaluation mode, has no gradients, and its weights do not change; it keeps its own dtype and
device; an assistant whose token ids differ from the student's is refused.
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
    """A frozen model that computes logits at the tokens of both tasks' targets.

    Args:
        model: a causal (vision-)language model or a PEFT model around one; it is put into evaluation mode, without
            gradients.
        tokenizer: its tokenizer; None if it is the student's.
        shares_prompt: whether the common beginning of both tasks' prompts is computed once, if the model supports it.

    Attributes:
        model: the model.
        tokenizer: the tokenizer, or None.
        shares_prompt: whether the common beginning of both tasks' prompts is computed once.

    Example:
        >>> from dynkp.batches.two_task_collator import TwoTaskCollator
        >>> from dynkp.synthetic.tiny_model import build_tiny_vlm
        >>> model, processor = build_tiny_vlm(["goal", "Prediction positive"])
        >>> batch = TwoTaskCollator(processor, "msc")([{"id": "1", "text": "goal", "images": [], "label": "positive"}])
        >>> assistant = Assistant(model)
        >>> logits = assistant.logits(batch["prompts"], {"label": batch["label"]})["label"]
        >>> logits.shape == (batch["label"]["lengths"][0], assistant.vocabulary)
        True
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, shares_prompt: bool = True):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.shares_prompt = shares_prompt and why_prompts_cannot_be_shared(model) is None

    @classmethod
    def load(cls, name: str, *, dtype: str = "auto", device: torch.device | str = "cpu") -> Assistant:
        """Load a saved model, or an adapter with its base model, and its tokenizer.

        Args:
            name: folder or Hub id, as for `find_checkpoint`.
            dtype: as for `load_model`.
            device: where to put the model.

        Raises:
            FileNotFoundError: as for `find_checkpoint`.
            ValueError: as for `find_checkpoint`.
        """
        checkpoint = find_checkpoint(name)
        processor = load_processor(checkpoint)
        model = load_model(checkpoint, dtype=dtype, device=device)
        return cls(model, getattr(processor, "tokenizer", processor))

    @property
    def vocabulary(self) -> int:
        """Number of token ids in the model's output, V."""
        return causal_lm_of(self.model).get_output_embeddings().weight.shape[0]

    @torch.no_grad()
    def logits(self, branches: Branches, targets: Mapping[str, Targets], everywhere: bool = False) -> dict[str, torch.Tensor]:
        """Compute the logits z_A at the tokens of each task's targets.

        Args:
            branches: the prompts of B posts.
            targets: the targets of each task.
            everywhere: whether to compute them at the prompts' own tokens too, in the order of `PlainBranches`.

        Returns:
            Per task the logits, (N, V) with N the number of tokens of all B posts, on the targets' device. A task without
            tokens in this batch is omitted.
        """
        with torch.autocast(self.model.device.type, enabled=False):  # the assistant's own type, whatever the student's
            own = self._placed(branches)
            plain = everywhere or branches["separate"] or not self.shares_prompt
            prompts = PlainBranches(self.model, own, everywhere) if plain else SharedBranches(self.model, own)
            return {
                task: prompts.logits(task, self._placed(of_task)).to(of_task["input_ids"].device)
                for task, of_task in targets.items()
                if any(of_task["lengths"])
            }

    def _placed(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._placed(item) for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        # Images have the student's type, or float32.
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)


def check_vocabularies(student: PreTrainedTokenizerBase, assistant: PreTrainedTokenizerBase) -> None:
    """Check that the token ids of student and assistant stand for the same tokens.

    An id that only one of them has is allowed: vocabularies differ in size by unused ids and by added tokens.

    Args:
        student: the student's tokenizer.
        assistant: the assistant's tokenizer.

    Raises:
        ValueError: with the first ids that stand for different tokens, and their number.
    """
    theirs = {index: token for token, index in assistant.get_vocab().items()}
    ours = {index: token for token, index in student.get_vocab().items()}
    shared = sorted(ours.keys() & theirs.keys())
    differing = [index for index in shared if ours[index] != theirs[index]]
    if differing or not shared:
        shown = ", ".join(f"{index} is {ours[index]!r} and {theirs[index]!r}" for index in differing[:3])
        raise ValueError(
            f"`assistant`: student and assistant disagree on {len(differing)} of {len(shared)} shared token ids ({shown}), so "
            "their probabilities cannot be compared. Use an assistant with the student's tokenizer: another size of the "
            "same family."
        )
