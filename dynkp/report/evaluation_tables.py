"""Tables and captions of scored systems, for `dynkp.report.evaluation`.

Given   systems as `Evaluation.systems` holds them: name -> figures, with the scores of each subset under `subsets`.
Gives   tables as rows of cells, the first row the column heads, scores in percent; and captions.
Holds   a table shows figures and computes none; `dynkp.report.tables` makes Markdown and LaTeX of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynkp.report.tables import percent

Systems = Mapping[str, Mapping[str, Any]]
Table = list[list[str]]
# System, subset, measure -> the mark of a significant difference, or "".
Mark = Callable[[str, str, str], str]

# The mark of a p-value below the limit, the smallest limit first.
MARKS = ((0.01, "‡"), (0.05, "†"))
_MODALITIES = {"image": "image only", "text": "text only", "both": "text and image"}


def significance_mark(p_value: float) -> str:
    """Return the mark of a p-value, "" if it is not below the largest limit.

    Example:
        >>> significance_mark(0.03), significance_mark(0.3)
        ('†', '')
    """
    return next((mark for limit, mark in MARKS if p_value < limit), "")


def single_system_table(system: Mapping[str, Any], k: int, measures: Sequence[str]) -> Table:
    """Lay out one system's scores: a row per subset, with the interval of F1 at the cut-off, if there is one.

    Args:
        system: The system's figures.
        k: The cut-off of precision and recall, and of the F1 whose interval is shown.
        measures: The further measures shown.
    """
    measures = [f"p@{k}", f"r@{k}", *measures]
    rows = [["subset", "posts", "phrases", *map(column_head, measures)]]
    for subset, scores in system["subsets"].items():
        cells = [percent(scores[measure]) for measure in measures]
        bounds = system.get("intervals", {}).get("subsets", {}).get(subset, {}).get(f"f1@{k}")
        if bounds:
            cells[measures.index(f"f1@{k}")] += f" [{percent(bounds[0])}, {percent(bounds[1])}]"
        rows.append([subset, f"{scores['posts']:,}", f"{scores['phrases']:,}", *cells])
    return rows


def measures_table(systems: Systems, subset: str, measures: Sequence[str], mark: Mark) -> Table:
    """Lay out several systems' measures on one subset, with the statistics of their outputs.

    Args:
        systems: The systems.
        subset: The subset whose scores are shown.
        measures: The measures, a column each.
        mark: The marks of significant differences.
    """
    heads = [f"{column_head(measure)} {subset}" for measure in measures]
    rows = [["system", *heads, "reasoning", "output words", "no keyphrase"]]
    for name, system in systems.items():
        scores = [percent(system["subsets"][subset][measure]) + mark(name, subset, measure) for measure in measures]
        words = "-" if system.get("output_words") is None else f"{system['output_words']:.2f}"
        rows.append([name, *scores, percent(system.get("reasoning_share")), words, percent(system["empty_share"])])
    return rows


def subsets_table(systems: Systems, subsets: Sequence[str], measure: str, mark: Mark) -> Table:
    """Lay out several systems' scores by one measure, a column per subset.

    Args:
        systems: The systems.
        subsets: The subsets.
        measure: The measure.
        mark: The marks of significant differences.
    """
    counts = next(iter(systems.values()))["subsets"]
    heads = [f"{column_head(measure)} {subset} ({counts[subset]['posts']:,} posts)" for subset in subsets]
    rows = [["system", *heads]]
    for name, system in systems.items():
        scores = system["subsets"]
        rows.append([name, *(percent(scores[subset][measure]) + mark(name, subset, measure) for subset in subsets)])
    return rows


def modality_table(systems: Systems, subset: str, measures: Sequence[str]) -> Table:
    """Lay out systems grouped by the modality of their inputs, as in Table 1 of AimKP (AAAI 2026).

    Args:
        systems: The systems; `modality` is the part of the posts that each was given.
        subset: The subset whose scores are shown.
        measures: The measures, a column each.
    """
    rows = [["posts", "system", *map(column_head, measures)]]
    for modality, head in _MODALITIES.items():
        for name, system in systems.items():
            if system["modality"] == modality:
                rows.append([head, name, *(percent(system["subsets"][subset][measure]) for measure in measures)])
    return rows


def column_head(measure: str) -> str:
    """Return a measure's name as a column head.

    Example:
        >>> column_head("f1@m"), column_head("ndcg@5")
        ('F1@M', 'NDCG@5')
    """
    name, at, cut = measure.partition("@")
    return f"{name.upper()}{at}{cut.upper()}"


def caption(systems: Systems, *, convention: str, posts: int, confidence: float | None) -> str:
    """Describe the tables: convention, number of posts, missing predictions, decodes, intervals and tests.

    Args:
        systems: The systems.
        convention: The scoring convention.
        posts: The number of posts.
        confidence: The confidence of the intervals; None if neither intervals nor tests were computed.
    """
    parts = [f"Percent, convention {convention}, {posts:,} posts."]
    for name, system in systems.items():
        prefix = f"{name}: " if len(systems) > 1 else ""
        if system["missing"]:
            parts.append(f"{prefix}{system['missing']:,} missing predictions are scored as empty.")
        if system["decodes"] > 1:
            parts.append(f"{prefix}Means over {system['decodes']} decodes.")
    if len(systems) == 1:
        if confidence is not None:
            parts.append(f"In brackets {confidence:.0%} bootstrap intervals.")
        (system,) = systems.values()
        parts.append(_output_statistics(system))
    elif confidence is not None:
        parts.append(
            f"† p < 0.05, ‡ p < 0.01: different from {next(iter(systems))!r}, paired permutation test over posts, "
            "each comparison by itself (not corrected for their number)."
        )
    return " ".join(parts)


def _output_statistics(system: Mapping[str, Any]) -> str:
    shares = {
        "reasoning_share": "reasoned",
        "empty_share": "without keyphrase",
        "unparsable_share": "unparsable",
        "repeat_share": "of keyphrases repeated",
    }
    means = {"keyphrases_per_post": "keyphrases", "output_words": "words", "output_tokens": "tokens per output"}
    parts = [f"{percent(system[name])} % {text}" for name, text in shares.items() if system.get(name) is not None]
    parts += [f"{system[name]:.2f} {text}" for name, text in means.items() if system.get(name) is not None]
    return f"{'; '.join(parts)}."
