"""Engines: what generates the outputs of a batch of posts. The interface of all engines, and the seeds of their sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Engine(Protocol):
    """A model that is ready to generate: `TransformersEngine`, `VllmEngine`."""

    def __call__(self, rows: Sequence[Mapping[str, Any]], seed: int | None = None) -> list[Any]:
        """Predict a batch of posts.

        Args:
            rows: at least one post, as `prompt_columns` returns them.
            seed: of sampling; None to use the engine's current random state.

        Returns:
            One prediction per post, in the posts' order.
        """


def derived_seed(seed: int, *ids: str) -> int:
    """Return a seed of 32 bits for some posts, so that the draws for them do not depend on other posts.

    Args:
        seed: seed of the run.
        *ids: the posts' ids.

    Example:
        >>> derived_seed(0, "1") == derived_seed(0, "1") != derived_seed(0, "2")
        True
    """
    return int(hashlib.sha256("\0".join((str(seed), *ids)).encode()).hexdigest()[:8], 16)
