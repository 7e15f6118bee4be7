"""The strings a row of a reasoning task becomes: one of its two prompts and that prompt's target, in the model's chat format.

Holds what `PromptRenderer` holds: training and generation ask alike, control tokens in a post or a rationale stay text, a
target ends with the end of turn. Prompts depend on text, aspect and number of pictures alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from dynkp.batches.renderers import PromptRenderer, text_only
from dynkp.data.reasoning_tasks import ReasoningTask, resolve_reasoning_task

PromptKind = Literal["label", "chain"]


class ReasoningRenderer(PromptRenderer):
    """Renders one kind of prompt of a reasoning task.

    Args:
        processor: processor of a vision-language model, or tokenizer of a text model (pictures are then left out).
        task: one of `REASONING_TASKS` by its name, or a task.
        kind: "label" asks for the prediction alone, "chain" for the reasons too.

    Raises:
        ValueError: if task or kind is not known, or there is no chat template.
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        task: ReasoningTask | str,
        kind: PromptKind = "label",
    ):
        if kind not in ("label", "chain"):
            raise ValueError(f"kind={kind!r} is not a prompt: use 'label' or 'chain'")
        super().__init__(processor)
        self.reasoning_task = resolve_reasoning_task(task)
        self.kind = kind

    def prompt_messages(self, row: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
        asked = {
            "id": row.get("id", "?"),
            "text": self._as_text(row.get("text") or ""),
            "aspect": self._as_text(row.get("aspect") or ""),
            "images": [None] * num_images,
        }
        ask = self.reasoning_task.label_prompt if self.kind == "label" else self.reasoning_task.chain_prompt
        messages = ask(asked)
        return messages if self.takes_images else [text_only(message) for message in messages]

    def target(self, row: Mapping[str, Any], num_images: int) -> str | None:
        """What the model should answer, end of turn included; None for the chain of a row without rationale."""
        write = self.reasoning_task.label_target if self.kind == "label" else self.reasoning_task.chain_target
        content = write(row)
        return None if content is None else self._target(row, num_images, self._as_text(content))
