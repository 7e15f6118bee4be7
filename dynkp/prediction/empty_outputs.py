"""What to look at where no output of a run holds a keyphrase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def advice_on_empty_outputs(rows: Sequence[Mapping[str, Any]], max_new_tokens: int, file: str) -> str | None:
    """Explain an all-empty result by what most of the outputs have in common.

    Args:
        rows: predictions with `keyphrases`, `raw` and `output_tokens`.
        max_new_tokens: the longest output allowed.
        file: where the predictions are.

    Returns:
        One sentence with the remedy, or None if there is a keyphrase, or no row.

    Example:
        >>> row = {"keyphrases": [], "raw": "<think>A dog", "output_tokens": 4}
        >>> print(advice_on_empty_outputs([row], 4, "p.jsonl"))
        No output holds a keyphrase: 1 of 1 were cut off at 4 tokens, so raise --max-new-tokens. The outputs are in p.jsonl, column `raw`.
    """  # noqa: E501 - the example's output is one line
    if not rows or any(row["keyphrases"] for row in rows):
        return None
    cut_off = sum(row["output_tokens"] >= max_new_tokens for row in rows)
    blank = sum(not row["raw"].strip() for row in rows)
    if cut_off * 2 >= len(rows):
        reason = f"{cut_off:,} of {len(rows):,} were cut off at {max_new_tokens} tokens, so raise --max-new-tokens"
    elif blank * 2 >= len(rows):
        reason = (
            f"{blank:,} of {len(rows):,} are blank, so the model ends its answer at once: it may need more training or a lower "
            "learning rate"
        )
    else:
        reason = "none can be read as an answer, so the model may have been trained less than it needs, or for another task"
    return f"No output holds a keyphrase: {reason}. The outputs are in {file}, column `raw`."
