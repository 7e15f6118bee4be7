"""Prices: the cost of answers, from a table of prices and the tokens that the server counted.

No price is built in: prices change, and a wrong one is worse than none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Price(NamedTuple):
    """The price of a model.

    Attributes:
        input: Price of a million tokens of prompts, in the table's currency.
        output: Price of a million tokens of answers.

    Example:
        >>> Price(2.0, 8.0).cost(prompt_tokens=500_000, completion_tokens=250_000)
        3.0
    """

    input: float
    output: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Compute the cost of tokens.

        Args:
            prompt_tokens: Number of tokens of prompts.
            completion_tokens: Number of tokens of answers.

        Returns:
            The cost, in the table's currency.
        """
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


def load_prices(path: str | os.PathLike[str]) -> dict[str, Price]:
    """Read a table of prices.

    Args:
        path: A JSON or YAML file that maps models to `input` and `output`, per million tokens.

    Returns:
        The price of each model.

    Raises:
        ValueError: If the file is not such a table, or a price is missing or not a number from 0; the message names the model.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "prices.json"
        >>> written = file.write_text('{"gpt-x": {"input": 2.0, "output": 8.0}}')
        >>> load_prices(file)
        {'gpt-x': Price(input=2.0, output=8.0)}
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
