"""Posts that a tiny model learns by heart, and evaluation posts for it, for tests of evaluation by generating."""

from __future__ import annotations

from typing import Any

from tests.support.posts import rows

LEARNS: dict[str, Any] = {
    "strategy": "direct",
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 6,
    "max_steps": 60,
    "logging_steps": 20,
    "eval_generation_posts": None,
    "eval_max_new_tokens": 24,
}


def evaluation_posts() -> list[dict[str, Any]]:
    """The six posts, two of them with another gold answer: a perfect memory scores below 1."""
    posts = rows("llava", 6)
    posts[0]["keyphrases"] = ["arsenal"]
    posts[1]["keyphrases"] = ["summer holidays", "sea", "work"]
    return posts
