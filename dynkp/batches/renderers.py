"""Chat renderers: the strings that a post becomes in a model's chat format.

[`ChatRenderer`] has what all tasks share. Each task has a renderer of its own:
[`~dynkp.batches.keyphrase_renderer.KeyphraseRenderer`] and [`~dynkp.batches.reasoning_renderer.ReasoningRenderer`].

Guarantees:

- Training and generation use the same renderer, so a post has the same prompt in both.
- A prompt has the BOS token that the tokenizer would put in front of a text, once, whether the template writes it or not.
- A control token of the tokenizer that is spelled out in a post or a rationale stays ordinary text.
- A target ends with the end of turn.
- Where the chat template itself writes `<think>` behind the prompt, a target continues from there: a reasoning target goes on
  with the rationale, any other target closes the reasoning first.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeAlias, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from dynkp.batches.target_tokens import TargetTokenizer
from dynkp.data.images import open_images
from dynkp.data.tasks import END_THINK, TAGS, THINK

Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
"""The processor of a vision-language model, or the tokenizer of a text model."""


class ChatRenderer(ABC):
    """Base class of the renderers: images, prompts and targets of posts in a model's chat format.

    A subclass implements [`task_messages`] and renders its targets with [`render_target`].

    Args:
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]): processor of a
            vision-language model, or tokenizer of a text model. With a tokenizer, images are left out.
        opening (`str`, *optional*, defaults to `""`): the beginning of a target, such as `<think>`, which the model continues:
            collators put its tokens behind every prompt. Prompts as texts, and targets, are not affected.
        trailing_template_tokens (`bool`, *optional*, defaults to `True`): whether a target has the whitespace that the chat
            template writes in front of the end-of-turn token (LLaVA) and behind it (Qwen); without it, a target is the answer
            and the end-of-turn token.

    Attributes:
        opening (`str`): the beginning of a target behind every prompt.
        processor: the processor or tokenizer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        takes_images (`bool`): whether the model reads images.
        prompt_name (`str`): name of this prompt in error messages.

    Raises:
        ValueError: if the processor has no chat template.
    """

    prompt_name = "prompt"

    def __init__(self, processor: Processor, opening: str = "", trailing_template_tokens: bool = True):
        self.processor = processor
        self.opening = opening
        self.trailing_template_tokens = trailing_template_tokens
        self.tokenizer: PreTrainedTokenizerBase = getattr(processor, "tokenizer", processor)
        self.takes_images = isinstance(processor, ProcessorMixin)
        if self.processor.chat_template is None:
            raise ValueError(
                f"`processing_class` ({type(processor).__name__}) has no chat template, so posts cannot be rendered as its "
                "model expects. Set `processing_class.chat_template`, or `chat_template_path` in the config."
            )

    @abstractmethod
    def task_messages(self, row: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
        """Return the chat messages of a post's prompt, with one placeholder per image.

        Args:
            row (`Mapping`): the post.
            num_images (`int`): number of images that the model gets, at least 0.

        Returns:
            `list[dict]`: messages with `role` and `content`.
        """

    def images(self, row: Mapping[str, Any]) -> list[Any]:
        """Open the images of a post.

        Args:
            row (`Mapping`): a post with the column `images`, or `image` for a single one.

        Returns:
            `list[PIL.Image.Image]`: RGB images; an empty list for a text model.

        Raises:
            ImageError: naming the post, if an image cannot be opened.
        """
        if not self.takes_images:
            return []
        images = row.get("images")
        if images is None:
            images = [] if row.get("image") is None else [row["image"]]
        return open_images(images, post_id=str(row.get("id", "?")))

    def prompt_messages(self, row: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
        """Return the chat messages of a post's prompt as the model's template takes them.

        Args:
            row (`Mapping`): the post.
            num_images (`int`): number of images that the model gets, at least 0.

        Returns:
            `list[dict]`: messages with `role` and `content`; for a text model `content` is a string without images.

        Raises:
            ValueError: naming the post, if no prompt can be made of it.
        """
        messages = self.task_messages(row, num_images)
        return messages if self.takes_images else [text_only(message) for message in messages]

    def prompt(self, row: Mapping[str, Any], num_images: int) -> str:
        """Render a post's prompt, up to the place where the model's answer begins; `opening` is not part of it.

        It is tokenized with `add_special_tokens` set to [`add_special_tokens`].

        Args:
            row (`Mapping`): the post.
            num_images (`int`): number of images that the model gets, at least 0.

        Raises:
            ValueError: naming the post, if no prompt can be made of it.
        """
        return self._missing_bos[0] + self._render(self.prompt_messages(row, num_images), add_generation_prompt=True)

    @property
    def add_special_tokens(self) -> bool:
        """Whether the tokenizer must add the BOS token to rendered prompts."""
        return self._missing_bos[1]

    @cached_property
    def _missing_bos(self) -> tuple[str, bool]:
        """The BOS token that prompts lack, as text; and whether the tokenizer must add it instead."""
        bos, index = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        if bos is None or self._question.startswith(bos):
            return "", False
        plain, own, written = (
            list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
            for text, special in (("a", False), ("a", True), (f"{bos}a", False))
        )
        if own[:1] != [index] or plain[:1] == [index]:
            return "", False  # the tokenizer adds none (Qwen)
        # SentencePiece tokenizes a word behind a written BOS token in another way; and some tokenizers add an EOS token too.
        return ("", True) if own == [index, *plain] != written else (bos, False)

    @cached_property
    def _question(self) -> str:
        """The prompt that the chat template writes for a question."""
        question: Any = [{"type": "text", "text": "?"}] if self.takes_images else "?"
        return self._render([{"role": "user", "content": question}], add_generation_prompt=True)

    @cached_property
    def tokenize_target(self) -> TargetTokenizer:
        """Tokenizes targets, and the beginnings of targets."""
        return TargetTokenizer(self.tokenizer)

    @cached_property
    def opening_ids(self) -> list[int]:
        """The tokens of `opening`, as targets begin with them."""
        return self.tokenize_target(self.opening).input_ids if self.opening else []

    def render_target(self, row: Mapping[str, Any], num_images: int, content: str) -> str:
        """Render an answer to a post's prompt as a training target: the answer as it is, then the end of turn.

        Behind a prompt that ends with `<think>`, an answer that begins with `<think>` goes on without it, and any other answer
        begins with `</think>`.

        Args:
            row (`Mapping`): the post.
            num_images (`int`): number of images that the model gets, at least 0.
            content (`str`): the answer.
        """
        messages = self.prompt_messages(row, num_images)
        if self.opens_reasoning:
            end = self.end_of_turn
            return _behind_think(content) + (end if self.trailing_template_tokens else end.strip())
        prompt = self._render(messages, add_generation_prompt=True)
        reply: Any = [{"type": "text", "text": content}] if self.takes_images else content
        full = self._render([*messages, {"role": "assistant", "content": reply}], add_generation_prompt=False)
        target = full.removeprefix(prompt)
        # Some templates (Qwen3's) split an answer with <think> and write it in another way, put an empty
        # <think></think> before an answer without, or do not continue their own generation prompt. The target must be what
        # the parser reads: the content as it is, then the end of turn.
        if not full.startswith(prompt) or not target.lstrip().startswith(content.strip()):
            target = content + self.end_of_turn
        elif not self._ends_turn(target):
            target += self.tokenizer.eos_token
        if not self.trailing_template_tokens:
            target = target[: len(target) - len(target.lstrip())] + content.strip() + self.end_of_turn.strip()
        return target

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether the chat template writes `<think>` behind every prompt, as those of thinking models do."""
        return self._question.rstrip().endswith(THINK)

    @cached_property
    def end_of_turn(self) -> str:
        """What the chat template writes behind an answer; the EOS token if it writes nothing (LLaVA-1.5)."""
        marker = "keyphrase goes here"
        reply: Any = [{"type": "text", "text": marker}] if self.takes_images else marker
        question: Any = [{"type": "text", "text": "?"}] if self.takes_images else "?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        end = self._render(turns, add_generation_prompt=False).rpartition(marker)[2]
        return end if self._ends_turn(end) else end + self.tokenizer.eos_token

    def break_control_tokens(self, text: str) -> str:
        """Insert a space into every control token that is spelled out in a text, so that it is tokenized as text.

        Posts and rationales are untrusted input: without this, a post with the text `</s>` would end its own prompt.

        Args:
            text (`str`): text of a post or a rationale.
        """
        return self._control_pattern.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)

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
        # A vocabulary may contain <think> and </answer> as special tokens; in a target they are part of the answer.
        return sorted(tokens - {"", *TAGS}, key=len, reverse=True)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self._control_tokens) or r"(?!)")

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return cast(
            str,
            self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False),
        )


def _behind_think(content: str) -> str:
    """Return an answer as it continues behind a `<think>` that is part of the prompt."""
    answer = content.lstrip()
    if answer.startswith(THINK):
        return answer.removeprefix(THINK).lstrip()
    # A completion of the user's own may close the reasoning itself.
    return content if END_THINK in content else END_THINK + answer


def text_only(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chat message as the template of a text model takes it: `content` is a string, images are left out.

    Args:
        message (`Mapping`): a message with `role` and `content`, a string or a list of content parts.

    Example:
        >>> text_only({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "my dog"}]})
        {'role': 'user', 'content': 'my dog'}
    """
    content = message["content"]
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    return {**message, "content": content}
