"""`dynkp train`: train a model, predict the evaluation posts, score them."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see `dynkp.training.run`."""
    from dynkp.training.run import main as run

    run(None if argv is None else list(argv))
