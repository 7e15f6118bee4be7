"""A MulCoTRDTrainer on a tiny model, set up like `trainers_for_tests`: a step is arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posts_for_tests import rows
from tiny_models import build
from trainers_for_tests import NOT_IN_THE_CONFIG, PLAIN_SETTINGS

from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig
from dynkp.trainer.mulcot_rd_trainer import MulCoTRDTrainer

LABELS = ("positive", "neutral", "negative")


def reasoning_rows(family: str, count: int = 4, images: bool = True) -> list[dict[str, Any]]:
    """Posts with a label each, and a chain where `rows` has a rationale."""
    posts = rows(family, count, images)
    for index, post in enumerate(posts):
        post["label"] = LABELS[index % 3]
        post["aspect"] = "the dog" if index % 2 else "goal"
        if post["rationale"]:
            post["rationale"] = f'"Text_analysis": "{post["rationale"]}"\n"Prediction": {post["label"]}'
        del post["keyphrases"]
    return posts


def reasoning_trainer(family: str, output_dir: Path | str, posts: Any = None, model: Any = None, **options: Any) -> Any:
    """The trainer; `posts` defaults to six of the family's, `options` go to the config or, by name, to the trainer."""
    tiny, processor = build(family)
    arguments: dict[str, Any] = {"processing_class": processor}
    names = (*NOT_IN_THE_CONFIG, "assistant_model")
    arguments |= {name: options.pop(name) for name in names if name in options}
    if "assistant_model" in arguments:
        arguments["assistant"] = arguments.pop("assistant_model")
    args = MulCoTRDConfig(output_dir=str(output_dir), **{**PLAIN_SETTINGS, "eval_generation_posts": 0, **options})
    posts = reasoning_rows(family, 6) if posts is None else posts
    return MulCoTRDTrainer(model=tiny if model is None else model, args=args, train_dataset=posts, **arguments)
