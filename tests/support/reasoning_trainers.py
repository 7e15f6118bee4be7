"""A MulCoTRDTrainer on a tiny model, set up as in `trainers_for_tests`, and posts for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from dynkp.data.reasoning_tasks import ReasoningTask
from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig
from dynkp.trainer.mulcot_rd_trainer import MulCoTRDTrainer
from tests.support.posts import rows
from tests.support.trainers import trainer_of

# As the real tasks, but of few words: the tiny tokenizers spell them out.
BRIEF = ReasoningTask("brief", "How?", {"Text_analysis": "the text", "Image_analysis": "the image"}, takes_aspect=True)
LABELS = ("positive", "neutral", "negative")


class InstructionFirst(ReasoningTask):
    """A task that asks before it shows the post: the two prompts share only the template's first words."""

    def _messages(self, row: Any, request: str) -> list[dict[str, Any]]:
        [message] = super()._messages(row, request)
        question = {"type": "text", "text": request}
        return [{**message, "content": [question, *message["content"]]}]


def reasoning_rows(family: str, count: int = 4, images: bool = True) -> list[dict[str, Any]]:
    """Posts with a label and an aspect each, and a chain where `rows` has a rationale."""
    posts = rows(family, count, images)
    for index, post in enumerate(posts):
        post["label"] = LABELS[index % 3]
        post["aspect"] = "the dog" if index % 2 else "goal"
        if post["rationale"]:
            post["rationale"] = f'"Text_analysis": "{post["rationale"]}"\n\n"Prediction": {post["label"]}'
        del post["keyphrases"]
    return posts


def reasoning_trainer(
    family: str,
    output_dir: Path | str,
    posts: Any = None,
    assistant_model: Any = None,
    given_task: ReasoningTask = BRIEF,
    **options: Any,
) -> MulCoTRDTrainer:
    """The trainer; six posts of the family's and task BRIEF by default; `options` go where `trainer_of` sends them."""
    posts = reasoning_rows(family, 6) if posts is None else posts
    task = None if "task" in options else given_task
    trainer_class = cast(type, partial(MulCoTRDTrainer, assistant=assistant_model, task=task))
    return trainer_of(family, output_dir, posts, classes=(trainer_class, MulCoTRDConfig), **options)
