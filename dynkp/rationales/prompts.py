"""The requests to a teacher about a post.

Given   a post with its gold answer, and a task.
Gives   the conversation that `dynkp.chat.run` conducts.
Holds   a prompt depends on the post only, by a template that a file may replace; the stage of each answer records whether the
        teacher was given the gold answer.

- `dynamic_cot` (Dynamic CoT, section 3.2, Table 1, in our wording): the teacher is given keyphrases, text and images, and
  explains briefly why people would use these keyphrases. One request, stage `explain`.
- a task of MulCoT-RD (`masc`, `msc`, `keyphrases`): the prompt asks for the five fields of a response chain without giving the
  answer, stage `predict`. If the prediction is wrong, a second request gives the answer and asks for an explanation, stage
  `explain`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynkp.chat.request import ChatAnswer, ChatRequest, RequestImage, post_images
from dynkp.data.reasoning_tasks import REASONING_TASKS, ReasoningTask

PREDICT, EXPLAIN = "predict", "explain"
DYNAMIC_COT = "dynamic_cot"
TASKS = (DYNAMIC_COT, *REASONING_TASKS)
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
# `Post text: ...` at the start of a template's line, with or without quotes.
_FIELD = re.compile(r"^[ \t]*[\"'*]*([A-Za-z][A-Za-z_ ]*?)[\"'*]*:", re.MULTILINE)


@dataclass(frozen=True)
class Template:
    """A system prompt and a user prompt with placeholders.

    Args:
        system: The system prompt; may be empty.
        user: The user prompt. `{images}` marks the position of the images (before the text if it is missing); `{keyphrases}`,
            `{text}`, `{answer}` and the names of the post's other columns are replaced by their values.

    Example:
        >>> template = Template("Be brief.", "Tags: {keyphrases}")
        >>> template.messages({"keyphrases": "dogs"}, [])[1]
        {'role': 'user', 'content': [{'type': 'text', 'text': 'Tags: dogs'}]}
    """

    system: str
    user: str

    def messages(self, values: Mapping[str, Any], images: Iterable[RequestImage]) -> list[dict[str, Any]]:
        """Fill in the placeholders.

        Args:
            values: Placeholder -> value; a list is joined by "; ".
            images: The post's images.

        Returns:
            The messages of a request.

        Raises:
            ValueError: If a placeholder has no value; the error names it.
        """
        image_parts = [{"type": "image", "image": image} for image in images]
        user = self.user if "{images}" in self.user else "{images}" + self.user
        before, _, after = user.partition("{images}")
        parts = [_text_part(_filled(before, values)), *image_parts, _text_part(_filled(after, values))]
        message = {"role": "user", "content": [part for part in parts if part]}
        system = [{"role": "system", "content": _filled(self.system, values)}] if self.system else []
        return [*system, message]

    def field_names(self) -> list[str]:
        """Return the names of the user prompt's fields, such as `Post text`, to which a rationale should not refer."""
        return list(dict.fromkeys(name.strip() for name in _FIELD.findall(self.user)))


def _text_part(text: str) -> dict[str, Any] | None:
    return {"type": "text", "text": text} if text.strip() else None


def _filled(text: str, values: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        found = values.get(match[1])
        if found is None:
            raise ValueError(f"the template asks for {{{match[1]}}}, and the post has no such column")
        return "; ".join(map(str, found)) if isinstance(found, list) else str(found)

    return _PLACEHOLDER.sub(value, text)  # in one pass, so that braces in a post's text are not replaced


# Our wording of the prompt of Table 1 of the Dynamic CoT paper.
DYNAMIC_COT_TEMPLATE = Template(
    'You help to understand hashtags. You are given the hashtags ("Keyphrases") that a social media post carries, its text '
    '("Post text") and its picture ("Image"). Explain briefly why social media users would use these hashtags for this '
    "post.",
    '"Keyphrases": {keyphrases}\n"Post text": {text}\n"Image": {images}',
)


def load_templates(path: str | os.PathLike[str], task: str) -> dict[str, Template]:
    """Read templates from a YAML file.

    Args:
        path: The file, with `user` and optionally `system`; for a task of two stages, with both under `predict` and
            `explain`.
        task: One of `TASKS`.

    Returns:
        Stage -> template.

    Raises:
        ValueError: If the file has another format.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "template.yaml")
        >>> _ = file.write_text("user: 'Why would people tag the post {text} with {keyphrases}?'")
        >>> load_templates(file, "dynamic_cot")
        {'explain': Template(system='', user='Why would people tag the post {text} with {keyphrases}?')}
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({error})") from error
    stages = (EXPLAIN,) if task == DYNAMIC_COT else (PREDICT, EXPLAIN)
    entries = {EXPLAIN: content} if task == DYNAMIC_COT else content
    templates = {}
    for stage in stages:
        entry = entries.get(stage) if isinstance(entries, Mapping) else None
        if not isinstance(entry, Mapping) or not isinstance(entry.get("user"), str) or set(entry) - {"system", "user"}:
            where = "" if task == DYNAMIC_COT else f" under {stage!r}"
            raise ValueError(
                f"{path}: a template for task {task!r} has the texts 'user' and 'system'{where}, got {entry!r:.100}"
            )
        templates[stage] = Template(str(entry.get("system") or ""), entry["user"])
    return templates


class RationaleConversation:
    """The requests about a post.

    Args:
        task: One of `TASKS`.
        settings: The fields of every request besides its messages: `model`, `max_tokens`, sampling.
        max_side: Longest side of an image, in pixels; larger ones are shrunk.
        templates: Stage -> template, as `load_templates` returns them; None for the task's own.

    Raises:
        ValueError: If the task is not known.

    Example:
        >>> requests = RationaleConversation("dynamic_cot", {"model": "m"})({"id": "1", "text": "Hi", "keyphrases": ["dogs"]})
        >>> next(requests).stage
        'explain'
    """

    def __init__(
        self,
        task: str,
        settings: Mapping[str, Any],
        *,
        max_side: int = 1024,
        templates: Mapping[str, Template] | None = None,
    ):
        if task not in TASKS:
            raise ValueError(f"task={task!r} is not known: use one of {', '.join(TASKS)}")
        self.settings, self.max_side = dict(settings), max_side
        self.reasoning_task = None if task == DYNAMIC_COT else REASONING_TASKS[task]
        self.templates = dict(templates or ({EXPLAIN: DYNAMIC_COT_TEMPLATE} if self.reasoning_task is None else {}))

    def __call__(self, post: dict[str, Any]) -> Generator[ChatRequest, ChatAnswer, None]:
        """Yield the requests about a post.

        Args:
            post: The post, with `id`, `text`, the gold answer's columns and, optionally, `images` or `image_urls`.

        Yields:
            Requests; the answer to each is sent to the generator.

        Raises:
            ValueError: If the post has neither text nor image, or no gold answer; the error names it.
        """
        if not (post.get("text") or "").strip() and not post.get("images") and not post.get("image_urls"):
            raise ValueError(f"post {post['id']!r} has neither text nor image")
        images = post_images(post, self.max_side)
        if self.reasoning_task is not None:
            yield from self._chain(self.reasoning_task, post, images)
            return
        if not post.get("keyphrases"):
            raise ValueError(f"post {post['id']!r} has no keyphrases to explain")
        yield self._request(EXPLAIN, post, images, self.templates[EXPLAIN])

    def _chain(
        self, task: ReasoningTask, post: dict[str, Any], images: list[RequestImage]
    ) -> Generator[ChatRequest, ChatAnswer, None]:
        task.answer(post)  # raises before the first request if there is no gold answer, which the second one needs
        shown = {**post, "images": images}  # one placeholder for each image that is sent
        answer = yield self._request(PREDICT, post, images, self.templates.get(PREDICT) or task.chain_prompt(shown))
        if not task.is_right(post, answer.text):
            yield self._request(EXPLAIN, post, images, self.templates.get(EXPLAIN) or task.explain_prompt(shown))

    def _request(
        self, stage: str, post: dict[str, Any], images: list[RequestImage], prompt: Template | list[dict[str, Any]]
    ) -> ChatRequest:
        if isinstance(prompt, Template):
            values = {**post, "answer": self.reasoning_task.answer(post)} if self.reasoning_task else post
            messages = prompt.messages(values, images)
        else:
            messages = [_with_images(message, images) for message in prompt]
        return ChatRequest(messages, self.settings, stage)

    def field_names(self) -> list[str]:
        """Return the names of the prompt's fields; none for response chains, which consist of named fields."""
        return [] if self.reasoning_task is not None else self.templates[EXPLAIN].field_names()

    def describe(self) -> dict[str, Any]:
        """Return everything that requests depend on besides the post, as JSON values."""
        prompts: dict[str, Any] = {stage: [template.system, template.user] for stage, template in self.templates.items()}
        if self.reasoning_task is not None:
            row = {"id": "", "text": "{text}", "images": [], "aspect": "{aspect}"}
            row |= {"label": self.reasoning_task.labels[0]} if self.reasoning_task.labels else {"keyphrases": ["{keyphrases}"]}
            built = {PREDICT: self.reasoning_task.chain_prompt(row), EXPLAIN: self.reasoning_task.explain_prompt(row)}
            prompts = {**built, **prompts}
        return {"prompts": prompts, "settings": self.settings, "max_side": self.max_side}


def _with_images(message: Mapping[str, Any], images: list[RequestImage]) -> dict[str, Any]:
    remaining = iter(images)
    content = [{"type": "image", "image": next(remaining)} if part["type"] == "image" else part for part in message["content"]]
    return {**message, "content": content}
