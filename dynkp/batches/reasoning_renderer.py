"""The renderer of MulCoT-RD's tasks: the label prompt or the response-chain prompt of a post, and its target.

Prompts depend on the text, the aspect and the number of images alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from dynkp.batches.renderers import ChatRenderer, Processor
from dynkp.data.reasoning_tasks import ReasoningTask, resolve_reasoning_task

PromptKind: TypeAlias = Literal["label", "chain"]
"""The two prompts of a reasoning task: for the label alone, or for the response chain."""


class ReasoningRenderer(ChatRenderer):
    """Renders posts for one of the two prompts of a [`~dynkp.data.reasoning_tasks.ReasoningTask`].

    A row has the columns `id`, `text` and `images`, `aspect` if the task takes one, and for its target `label` (or
    `keyphrases`) and `rationale`.

    Args:
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]): processor of a
            vision-language model, or tokenizer of a text model. With a tokenizer, images are left out.
        task ([`~dynkp.data.reasoning_tasks.ReasoningTask`] or `str`): prompts, targets and labels; a name is looked up in
            [`~dynkp.data.reasoning_tasks.REASONING_TASKS`].
        kind (`str`, *optional*, defaults to `"label"`): `"label"` asks for the prediction alone, `"chain"` for the response
            chain.
        opening (`str`, *optional*, defaults to `""`): the beginning of a target, whose tokens collators put behind every
            prompt.

    Raises:
        ValueError: if `task` or `kind` is unknown, or the processor has no chat template.
    """

    def __init__(self, processor: Processor, task: ReasoningTask | str, kind: PromptKind = "label", opening: str = ""):
        if kind not in ("label", "chain"):
            raise ValueError(f"kind={kind!r} is not a prompt: use 'label' or 'chain'")
        super().__init__(processor, opening)
        self.task = resolve_reasoning_task(task)
        self.kind = kind
        self.prompt_name = f"{kind} prompt"

    def task_messages(self, row: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
        """Return the chat messages of the prompt of this kind."""
        asked = {
            "id": row.get("id", "?"),
            "text": self.break_control_tokens(row.get("text") or ""),
            "aspect": self.break_control_tokens(row.get("aspect") or ""),
            "images": [None] * num_images,
        }
        return self.task.label_prompt(asked) if self.kind == "label" else self.task.chain_prompt(asked)

    def target(self, row: Mapping[str, Any], num_images: int) -> str | None:
        """Render the target of the prompt of this kind, end of turn included.

        Args:
            row (`Mapping`): the post.
            num_images (`int`): number of images that the model gets, at least 0.

        Returns:
            `str` or `None`: `None` for the response chain of a post without rationale.

        Raises:
            ValueError: naming the post, if its answer is missing or is not one of the task's labels.
        """
        content = self.task.label_target(row) if self.kind == "label" else self.task.chain_target(row)
        return None if content is None else self.render_target(row, num_images, self.break_control_tokens(content))
