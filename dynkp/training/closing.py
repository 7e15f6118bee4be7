"""The table that a run ends with, for terminals of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dynkp.report.tables import percent

WIDTH = 80
_SUBSETS = {"all": "F1@1", "seen": "seen", "unseen": "unseen"}
_SHORTEST_NAME = 20


def closing_table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay several systems' scores out for a terminal.

    Args:
        systems: name -> what [`score_predictions`] returned, all of the same convention.

    Returns:
        The table, in percent, and below it what its columns are. Long names are cut.
    """
    first = next(iter(systems.values()))
    shown = [subset for subset in _SUBSETS if any(subset in system["subsets"] for system in systems.values())]
    heads = [*(_SUBSETS[subset] for subset in shown), "P@1", "reason", "words", "empty"]
    rows = [["system", *heads]]
    for name, system in systems.items():
        scores = [percent(system["subsets"][subset]["f1@1"]) for subset in shown]
        words = f"{system['output_words']:.1f}" if "output_words" in system else "-"
        precision, reasoning = system["subsets"]["all"]["p@1"], system.get("reasoning_share")
        rows.append([name, *scores, percent(precision), percent(reasoning), words, percent(system["empty_share"])])
    counts = " and ".join(f"{first['subsets'][subset]['posts']:,} with {subset}" for subset in shown if subset != "all")
    legend = (
        f"In percent, convention {first['convention']}. F1@1 and P@1 over {first['posts']:,} posts"
        f"{f', {counts} keyphrases' if counts else ''}; reason: outputs that reason; words: mean length of an output; "
        "empty: outputs without a keyphrase."
    )
    return f"{aligned(rows)}\n\n{wrapped(legend)}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Set rows of cells in columns, the first to the left and the others to the right, in at most 80 characters.

    Args:
        rows: the first are the heads, and the first cell of each is its name.

    Returns:
        The lines. Names are cut to what room there is; if that is too little, rows become columns.

    Example:
        >>> print(aligned([["system", "F1@1"], ["direct", "71.98"]]))
        system   F1@1
        direct  71.98
    """
    room = WIDTH - _width_of_cells(rows)
    if room < _SHORTEST_NAME and max(len(row[0]) for row in rows) > room:
        rows = list(zip(*rows, strict=True))
        room = WIDTH - _width_of_cells(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], room)
    lines = []
    for name, *cells in rows:
        name = name if len(name) <= widths[0] else f"{name[: widths[0] - 1]}…"
        lines.append(
            name.ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        )
    return "\n".join(lines)


def _width_of_cells(rows: Sequence[Sequence[str]]) -> int:
    """The width of all columns but the first, with the two blanks in front of each."""
    return sum(2 + max(map(len, column)) for column in list(zip(*rows, strict=True))[1:])


def wrapped(text: str) -> str:
    """Break a text into lines of at most 80 characters; paths stay whole."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
