"""What answers cost.

Given   a table of prices, and the tokens that a server counted.
Gives   the cost.
Holds   no price is built in: they change, and a wrong one is worse than none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Price(NamedTuple):
    """Of a model, in dollars (or whatever the table is in) per million tokens.

    Example:
        >>> Price(2.0, 8.0).cost(prompt_tokens=500_000, completion_tokens=250_000)
        3.0
    """

    input: float
    output: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What these tokens cost."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


def load_prices(path: str | os.PathLike[str]) -> dict[str, Price]:
    """Read a table of prices.

    Args:
        path: a JSON or YAML file: model -> `input` and `output`, per million tokens.

    Returns:
        Model -> price.

    Raises:
        ValueError: naming the model, if a price is missing or no number from 0.

    Example:
        A file `{"gpt-x": {"input": 2.0, "output": 8.0}}` gives `{"gpt-x": Price(2.0, 8.0)}`.
    """
    import yaml

    text = Path(path).read_text(encoding="utf-8")
    try:
        table: Any = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a table of prices ({error})") from error
    if not isinstance(table, Mapping):
        raise ValueError(f"{path}: a table of prices maps models to 'input' and 'output', got {table!r:.80}")
    prices = {}
    for model, entry in table.items():
        values: list[Any] = [entry.get(name) if isinstance(entry, Mapping) else None for name in Price._fields]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < math.inf):
                raise ValueError(
                    f"{path}: the price of {model!r} must have 'input' and 'output', numbers from 0 per million tokens, "
                    f"got {entry!r:.80}"
                )
        prices[str(model)] = Price(*(float(value) for value in values))
    return prices
