"""Invariants of tables as text: special characters are escaped, columns are aligned, missing scores are shown as "-"."""

from __future__ import annotations

from dynkp.report.tables import latex_table, markdown_table, percent


def test_special_characters_are_escaped() -> None:
    rows = [["system", "F1"], ["a|b_50%", "1.0"]]
    assert markdown_table(rows).splitlines()[2] == r"| a\|b_50% | 1.0 |"
    assert r"a|b\_50\% & 1.0 \\" in latex_table(rows)
    special = latex_table([["x"], ["\\ & % $ # _ { } ~ ^ † ‡"]]).splitlines()[4]
    expected = r"\textbackslash{} \& \% \$ \# \_ \{ \} \textasciitilde{} \textasciicircum{} $^\dagger$ $^\ddagger$ \\"
    assert special == expected


def test_columns_are_aligned() -> None:
    lines = markdown_table([["a", "b"], ["long name", "1"], ["x", "1000"]]).splitlines()
    assert lines == ["| a         |    b |", "| --------- | ---: |", "| long name |    1 |", "| x         | 1000 |"]
    assert latex_table([["a", "b", "c"], ["1", "2", "3"]]).startswith("\\begin{tabular}{lrr}\n\\toprule\na & b & c \\\\\n")


def test_percent() -> None:
    assert [percent(value) for value in (None, 0.0, 1.0, 0.46675)] == ["-", "0.00", "100.00", "46.67"]
