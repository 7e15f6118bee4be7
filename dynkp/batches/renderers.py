"""Renderers: the strings a post becomes in a model's chat format, its prompt and its targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from dynkp.data.images import open_image
from dynkp.data.tasks import TAGS, KeyphraseTask, resolve_task


class PromptRenderer:
    """The strings a post becomes: its prompt and its targets, in the model's own chat format.

    Training and generation both render here, so that a model is asked exactly as it was taught.

    Args:
        processor: processor of a vision-language model, or tokenizer of a text model (pictures are then left out).
        task ([`KeyphraseTask`] or `str`): template, targets and separator; a name is looked up in `TASKS`.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase, task: KeyphraseTask | str = "dynamic_cot"):
        self.processor = processor
        self.task = resolve_task(task)
        self.tokenizer: PreTrainedTokenizerBase = getattr(processor, "tokenizer", processor)
        self.takes_images = isinstance(processor, ProcessorMixin)
        if self.processor.chat_template is None:
            raise ValueError(
                f"`processing_class` ({type(processor).__name__}) has no chat template, so posts cannot be rendered as its "
                "model expects. Set `processing_class.chat_template`, or `chat_template_path` in the config."
            )

    def images(self, row: Mapping[str, Any]) -> list[Any]:
        """The post's pictures as RGB PIL images; none for a text model."""
        if not self.takes_images:
            return []
        images = row.get("images")
        if images is None:
            images = [] if row.get("image") is None else [row["image"]]
        return [open_image(image, post_id=str(row.get("id", "?"))) for image in images]

    def prompt_messages(self, row: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
        """The chat messages in front of the answer."""
        if row.get("prompt") is None:
            messages = self.task.prompt(self._as_text(row.get("text") or ""), num_images)
        elif isinstance(row["prompt"], str):
            raise ValueError(
                f"post {row.get('id', '?')!r}: `prompt` is a string. Give TRL's conversational format (a list of messages), "
                "or the columns `text`, `keyphrases` and `images`."
            )
        else:
            messages = _conversation(row, num_images if self.takes_images else None)
        return messages if self.takes_images else [text_only(message) for message in messages]

    def prompt(self, row: Mapping[str, Any], num_images: int) -> str:
        """The rendered prompt, up to where the model begins to answer."""
        return self._render(self.prompt_messages(row, num_images), add_generation_prompt=True)

    def direct_target(self, row: Mapping[str, Any], num_images: int) -> str:
        """The bare answer y^s, end of turn included."""
        if row.get("completion") is not None:
            content = _content(row["completion"], row, "completion")
        else:
            content = self._as_text(self.task.direct_target(list(row["keyphrases"])))
        return self._target(row, num_images, content)

    def reasoning_target(self, row: Mapping[str, Any], num_images: int) -> str | None:
        """The reasoning and the answer y^c, end of turn included; `None` for a post without rationale."""
        if row.get("prompt") is not None:
            if row.get("reasoning_completion") is None:
                return None
            content = _content(row["reasoning_completion"], row, "reasoning_completion")
        elif (row.get("rationale") or "").strip():
            content = self._as_text(self.task.reasoning_target(list(row["keyphrases"]), row["rationale"]))
        else:
            return None
        return self._target(row, num_images, content)

    def _target(self, row: Mapping[str, Any], num_images: int, content: str) -> str:
        messages = self.prompt_messages(row, num_images)
        prompt = self._render(messages, add_generation_prompt=True)
        reply: Any = [{"type": "text", "text": content}] if self.takes_images else content
        full = self._render([*messages, {"role": "assistant", "content": reply}], add_generation_prompt=False)
        target = full.removeprefix(prompt)
        # Some templates (Qwen3's) take an answer with <think> apart and set it anew, put an empty <think></think> before
        # one without, or do not continue their own generation prompt. What is taught must be what the parser reads: the
        # content as it is, then the end of turn.
        if not full.startswith(prompt) or not target.lstrip().startswith(content.strip()):
            target = content + self.end_of_turn
        elif not self._ends_turn(target):
            target += self.tokenizer.eos_token
        return target

    @cached_property
    def end_of_turn(self) -> str:
        """What the template puts behind an answer; the EOS token where it puts nothing (LLaVA-1.5)."""
        marker = "keyphrase goes here"
        reply: Any = [{"type": "text", "text": marker}] if self.takes_images else marker
        question: Any = [{"type": "text", "text": "?"}] if self.takes_images else "?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        end = self._render(turns, add_generation_prompt=False).rpartition(marker)[2]
        return end if self._ends_turn(end) else end + self.tokenizer.eos_token

    def _ends_turn(self, target: str) -> bool:
        last = re.search(r"(\S+)\s*\Z", target)
        return last is not None and any(last[1].endswith(token) for token in self._control_tokens)

    @cached_property
    def _control_tokens(self) -> list[str]:
        tokens = {str(token) for token in self.tokenizer.all_special_tokens}
        tokens |= {str(token.content) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        for name in ("image_token", "video_token", "boi_token", "eoi_token"):
            if isinstance(token := getattr(self.processor, name, None), str):
                tokens.add(token)
        # A vocabulary may hold <think> and </answer> as special tokens; in a target they are what is taught.
        return sorted(tokens - {"", *TAGS}, key=len, reverse=True)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self._control_tokens) or r"(?!)")

    def _as_text(self, text: str) -> str:
        """Posts and rationales come from strangers: a control token spelled out in one is broken by a blank."""
        return self._control_pattern.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return cast(
            str,
            self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False),
        )


def _conversation(row: Mapping[str, Any], num_images: int | None) -> list[dict[str, Any]]:
    """A copy of TRL's `prompt`, its placeholders matched with the post's pictures (`None`: a text model's, unmatched)."""
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


def text_only(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as a text model's template takes it: a string, pictures left out."""
    content = message["content"]
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    return {**message, "content": content}


def _content(messages: Any, row: Mapping[str, Any], column: str) -> str:
    """The text of a completion: one assistant message."""
    if isinstance(messages, str):
        return messages
    if len(messages) != 1 or messages[0].get("role") != "assistant":
        raise ValueError(
            f"post {row.get('id', '?')!r}: `{column}` has {len(messages)} messages; it must be exactly one assistant message."
        )
    return text_only(messages[0])["content"]
