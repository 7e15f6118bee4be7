"""The line that a finished prediction run ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def summarize_predictions(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe a run's outputs in a few figures.

    Args:
        rows: predictions of keyphrases (`keyphrases`, `reasoned`) or answers to a prompt of MulCoT-RD (`prediction`), with
            `output_words`.

    Example:
        >>> row = {"keyphrases": ["dog"], "reasoned": True, "output_words": 3}
        >>> summarize_predictions([row, {**row, "keyphrases": []}])
        '100.0% reasoned, 3.0 words each, 50.0% without keyphrase'
    """
    count = max(1, len(rows))
    words = sum(row["output_words"] for row in rows) / count
    if rows and "prediction" in rows[0]:
        return f"{words:.1f} words each, {sum(row['prediction'] is None for row in rows) / count:.1%} unread"
    empty = sum(not row["keyphrases"] for row in rows) / count
    reasoned = sum(row["reasoned"] for row in rows) / count
    return f"{reasoned:.1%} reasoned, {words:.1f} words each, {empty:.1%} without keyphrase"
