"""The renderer of keyphrase tasks: a post's prompt, its direct target and its reasoning target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from trl.data_utils import prepare_multimodal_messages

from dynkp.batches.renderers import ChatRenderer, Processor, text_only
from dynkp.data.tasks import KeyphraseTask, resolve_task

TargetKind: TypeAlias = Literal["direct", "reasoning"]
"""The two targets of a post: the bare answer, or rationale plus answer."""


class KeyphraseRenderer(ChatRenderer):
    """Renders posts for a [`~dynkp.data.tasks.KeyphraseTask`].

    A row has the columns of a post (`id`, `text`, `keyphrases`, `images`, `rationale`), or those of TRL's conversational
    prompt-completion format (`prompt`, `completion`, `images`, optional `reasoning_completion`).

    Args:
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]): processor of a
            vision-language model, or tokenizer of a text model. With a tokenizer, images are left out.
        task ([`~dynkp.data.tasks.KeyphraseTask`] or `str`, *optional*, defaults to `"dynamic_cot"`): instruction, targets
            and separator; a name is looked up in [`~dynkp.data.tasks.TASKS`].
        opening (`str`, *optional*, defaults to `""`): the beginning of a target, whose tokens collators put behind every
            prompt.
        trailing_template_tokens (`bool`, *optional*, defaults to `True`): as for
            [`~dynkp.batches.renderers.ChatRenderer`].

    Raises:
        ValueError: if `task` is not the name of a task, or the processor has no chat template.
    """

    def __init__(
        self,
        processor: Processor,
        task: KeyphraseTask | str = "dynamic_cot",
        opening: str = "",
        trailing_template_tokens: bool = True,
    ):
        self.task = resolve_task(task)
        super().__init__(processor, opening, trailing_template_tokens)

    def task_messages(self, row: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
        """Return the chat messages of a post's prompt: those of its column `prompt`, or what the task writes."""
        if row.get("prompt") is None:
            return self.task.prompt(self.break_control_tokens(row.get("text") or ""), num_images)
        if isinstance(row["prompt"], str):
            raise ValueError(
                f"post {row.get('id', '?')!r}: `prompt` is a string. Give TRL's conversational format (a list of messages), "
                "or the columns `text`, `keyphrases` and `images`."
            )
        return _conversation(row, num_images if self.takes_images else None)

    def target(self, row: Mapping[str, Any], num_images: int, kind: TargetKind) -> str | None:
        """Render the target of one kind.

        Args:
            row (`Mapping`): the post.
            num_images (`int`): number of images that the model gets, at least 0.
            kind (`str`): `"direct"` or `"reasoning"`.

        Returns:
            `str` or `None`: as [`direct_target`] or [`reasoning_target`].
        """
        return {"direct": self.direct_target, "reasoning": self.reasoning_target}[kind](row, num_images)

    def direct_target(self, row: Mapping[str, Any], num_images: int) -> str:
        """Render the direct target: the bare answer y^s, end of turn included.

        Args:
            row (`Mapping`): the post.
            num_images (`int`): number of images that the model gets, at least 0.

        Raises:
            ValueError: if the post has no keyphrases, one of them cannot be read back, or its `completion` is not one
                assistant message.
        """
        if row.get("completion") is not None:
            content = _content(row["completion"], row, "completion")
        else:
            content = self.break_control_tokens(self.task.direct_target(list(row["keyphrases"])))
        return self.render_target(row, num_images, content)

    def reasoning_target(self, row: Mapping[str, Any], num_images: int) -> str | None:
        """Render the reasoning target: the rationale and the answer y^c, end of turn included.

        Args:
            row (`Mapping`): the post.
            num_images (`int`): number of images that the model gets, at least 0.

        Returns:
            `str` or `None`: `None` for a post without rationale.

        Raises:
            ValueError: as in [`direct_target`].
        """
        if row.get("prompt") is not None:
            if row.get("reasoning_completion") is None:
                return None
            content = _content(row["reasoning_completion"], row, "reasoning_completion")
        elif (row.get("rationale") or "").strip():
            content = self.break_control_tokens(self.task.reasoning_target(list(row["keyphrases"]), row["rationale"]))
        else:
            return None
        return self.render_target(row, num_images, content)


def _conversation(row: Mapping[str, Any], num_images: int | None) -> list[dict[str, Any]]:
    """Copy the messages of TRL's `prompt` and match their placeholders with the post's images (not if `None`)."""
    messages = [dict(message) for message in row["prompt"]]
    problem = None
    if not messages or not all(message.get("role") and "content" in message for message in messages):
        problem = "it must be a list of messages with `role` and `content`"
    elif num_images is not None:
        try:
            return prepare_multimodal_messages(messages, images=[None] * num_images)
        except ValueError as error:
            problem = str(error)
    if problem is not None:
        raise ValueError(f"post {row.get('id', '?')!r}: `prompt` cannot be rendered: {problem}")
    return messages


def _content(messages: Any, row: Mapping[str, Any], column: str) -> str:
    """Return the text of a completion, which must be one assistant message."""
    if isinstance(messages, str):
        return messages
    if len(messages) != 1 or messages[0].get("role") != "assistant":
        raise ValueError(
            f"post {row.get('id', '?')!r}: `{column}` has {len(messages)} messages; it must be exactly one assistant message."
        )
    return text_only(messages[0])["content"]
