"""Text for terminals: what files and servers contain must not control the terminal that shows it."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Replace control characters by their escapes, so that no escape sequence in a text reaches a terminal.

    Args:
        text: One line of text from a post, a column, a file or a server.

    Returns:
        The text with each character that is not printable (control characters, marks of direction, line breaks, unpaired
        surrogates) written as in Python, such as `\x1b`.

    Example:
        >>> print(printable("red: \x1b[31m, déjà vu"))
        red: \x1b[31m, déjà vu
    """
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
