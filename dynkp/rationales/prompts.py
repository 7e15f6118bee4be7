"""What a teacher is asked about a post, and in which order.

Given   a post with its gold answer, and a task.
Gives   the dialogue of `dynkp.chat.run`.
Holds   each prompt is made of the post alone, by a template that a file may replace; the stage of each answer says whether
        the teacher was told the gold answer.

- `dynamic_cot` (Dynamic CoT, section 3.2, Table 1, in our words): the teacher is told keyphrases, text and images, and says
  in brief why people would use these tags. One question, stage `explain`.
- a task of MulCoT-RD (`masc`, `msc`, `keyphrases`): the chain prompt asks for five fields without telling the answer, stage
  `predict`. Where the prediction is wrong, the answer is told and an explanation asked for, stage `explain`.
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
    """A system prompt and a user prompt with places to fill in.

    Args:
        system: may be empty.
        user: `{images}` is where the pictures go (before the text if it is missing); `{keyphrases}`, `{text}`, `{answer}`
            and the post's other columns by their names.

    Example:
        >>> template = Template("Be brief.", "Tags: {keyphrases}")
        >>> template.messages({"keyphrases": "dogs"}, [])[1]
        {'role': 'user', 'content': [{'type': 'text', 'text': 'Tags: dogs'}]}
    """

    system: str
    user: str

    def messages(self, values: Mapping[str, Any], images: Iterable[RequestImage]) -> list[dict[str, Any]]:
        """Fill in a post.

        Args:
            values: by placeholder.
            images: the post's.

        Raises:
            ValueError: naming a placeholder that the post has no value for.
        """
        pictures = [{"type": "image", "image": image} for image in images]
        user = self.user if "{images}" in self.user else "{images}" + self.user
        before, _, after = user.partition("{images}")
        parts = [_text_part(_filled(before, values)), *pictures, _text_part(_filled(after, values))]
        message = {"role": "user", "content": [part for part in parts if part]}
        system = [{"role": "system", "content": _filled(self.system, values)}] if self.system else []
        return [*system, message]

    def field_names(self) -> list[str]:
        """What the user prompt calls its parts, such as `Post text`; a rationale should not speak of them."""
        return list(dict.fromkeys(name.strip() for name in _FIELD.findall(self.user)))


def _text_part(text: str) -> dict[str, Any] | None:
    return {"type": "text", "text": text} if text.strip() else None


def _filled(text: str, values: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        found = values.get(match[1])
        if found is None:
            raise ValueError(f"the template asks for {{{match[1]}}}, and the post has no such column")
        return "; ".join(map(str, found)) if isinstance(found, list) else str(found)

    return _PLACEHOLDER.sub(value, text)  # in one pass: braces in a post's text mean nothing


TABLE_1 = Template(
    'You help to understand hashtags. You are given the hashtags ("Keyphrases") that a social media post carries, its text '
    '("Post text") and its picture ("Image"). Explain briefly why social media users would use these hashtags for this '
    "post.",
    '"Keyphrases": {keyphrases}\n"Post text": {text}\n"Image": {images}',
)


def load_templates(path: str | os.PathLike[str], task: str) -> dict[str, Template]:
    """Read templates from a file.

    Args:
        path: YAML with `user` and, if wanted, `system`; for a task of two stages both under `predict` and `explain`.
        task: one of `TASKS`.

    Returns:
        Stage -> template.

    Raises:
        ValueError: if the file has another form.

    Example:
        system: You know social media well.
        user: "Why would people tag the post {text} with {keyphrases}?"
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
            raise ValueError(f"{path}: a template for task {task!r} has texts 'user' and 'system'{where}, got {entry!r:.100}")
        templates[stage] = Template(str(entry.get("system") or ""), entry["user"])
    return templates


class RationaleDialogue:
    """The questions about one post.

    Args:
        task: one of `TASKS`.
        settings: what goes into every request: `model`, `max_tokens`, sampling.
        max_side: longest side of a picture in pixels.
        templates: as `load_templates` gives them; the task's own if None.

    Raises:
        ValueError: if the task is not known.

    Example:
        >>> steps = RationaleDialogue("dynamic_cot", {"model": "m"})({"id": "1", "text": "Hi", "keyphrases": ["dogs"]})
        >>> next(steps).stage
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
        self.templates = dict(templates or ({EXPLAIN: TABLE_1} if self.reasoning_task is None else {}))

    def __call__(self, post: dict[str, Any]) -> Generator[ChatRequest, ChatAnswer, None]:
        """Ask about a post.

        Raises:
            ValueError: naming the post, if it has not what the questions need.
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
        task.answer(post)  # before anything is asked: without gold answer there is no second question
        shown = {**post, "images": images}  # one placeholder for each picture that is sent
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
        """What the prompt calls its parts; for chains none, since they are to have them."""
        return [] if self.reasoning_task is not None else self.templates[EXPLAIN].field_names()

    def describe(self) -> dict[str, Any]:
        """All that requests depend on besides the post, as JSON values."""
        prompts: dict[str, Any] = {stage: [template.system, template.user] for stage, template in self.templates.items()}
        if self.reasoning_task is not None:
            row = {"id": "", "text": "{text}", "images": [], "aspect": "{aspect}"}
            row |= {"label": self.reasoning_task.labels[0]} if self.reasoning_task.labels else {"keyphrases": ["{keyphrases}"]}
            built = {PREDICT: self.reasoning_task.chain_prompt(row), EXPLAIN: self.reasoning_task.explain_prompt(row)}
            prompts = {**built, **prompts}
        return {"prompts": prompts, "settings": self.settings, "max_side": self.max_side}


def _with_images(message: Mapping[str, Any], images: list[RequestImage]) -> dict[str, Any]:
    left = iter(images)
    content = [{"type": "image", "image": next(left)} if part["type"] == "image" else part for part in message["content"]]
    return {**message, "content": content}
