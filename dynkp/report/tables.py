"""Tables as text, in Markdown and LaTeX: rows of cells, the first row the column heads."""

from __future__ import annotations

from collections.abc import Sequence


def percent(value: float | None) -> str:
    """Format a fraction in percent with two decimals; "-" if there is none.

    Example:
        >>> percent(0.12345), percent(None)
        ('12.35', '-')
    """
    return "-" if value is None else f"{100 * value:.2f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    r"""Lay out rows as a Markdown table.

    Args:
        rows: Rows of equally many cells, the column heads first; the first column is left-aligned, the others right-aligned.

    Returns:
        The table, without a line break at its end.

    Example:
        >>> print(markdown_table([["system", "F1@1"], ["a|b", "61.90"]]))
        | system |  F1@1 |
        | ------ | ----: |
        | a\|b   | 61.90 |
    """
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in escaped)) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(escaped):
        cells = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if number == 0:
            rule = ["-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
            lines.append(f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def latex_table(rows: Sequence[Sequence[str]]) -> str:
    r"""Lay out rows as a LaTeX tabular, which needs the packages booktabs and textcomp.

    Args:
        rows: Rows of equally many cells, the column heads first.

    Returns:
        The tabular, without a line break at its end.

    Example:
        >>> print(latex_table([["system", "F1@1"], ["a_b", "61.90"]]))
        \begin{tabular}{lr}
        \toprule
        system & F1@1 \\
        \midrule
        a\_b & 61.90 \\
        \bottomrule
        \end{tabular}
    """
    head, *body = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines)


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(character, character) for character in cell)


_LATEX = {
    "\\": r"\textbackslash{}",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
