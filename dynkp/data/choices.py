"""Suggestions for misspelt names: options, methods, strategies, tasks, recipes, commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Suggest the name that a misspelt value most likely stands for.

    Args:
        value: what was given.
        choices: the names there are.

    Returns:
        A sentence to append to an error, with a space in front, or an empty string if no name is similar.

    Example:
        >>> did_you_mean("dynamik", ("dynamic", "direct"))
        " Did you mean 'dynamic'?"
        >>> did_you_mean("Direct", ("dynamic", "direct"))
        " Did you mean 'direct'?"
        >>> did_you_mean("x", ("dynamic", "direct"))
        ''
    """
    by_lower_case = {choice.lower(): choice for choice in reversed(list(choices))}
    close = difflib.get_close_matches(value.lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[close[0]]!r}?" if close else ""
