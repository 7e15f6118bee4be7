"""Figures of AimKP's variant filter: Figures 3 and 7 of the paper, drawn from a run's log of visits.

Given   `visits.jsonl` of a run (`AimKPConfig(log_visits=True)`): per post, visit and modality the cosine, the stride, whether
        the variant was kept, and the losses of the full input and of the variant, in nats per token.
Gives   Figure 3, the cosine of the gradients against the rise in perplexity that masking causes; Figure 7, mean cosine and
        share of kept variants over the optimizer steps; and the numbers behind each, as JSON.
Holds   the file is read once, in chunks: memory does not grow with its length. The points of Figure 3 are a random sample of
        the visits; means, shares and the correlation with the rise in nats are of all visits. The same file and seed give the
        same figures.

Needs the extra `plots` (matplotlib).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dynkp.files.atomic import atomic_files
from dynkp.files.json_files import write_json
from dynkp.files.json_lines import read_json_lines

SUFFIXES = (".png", ".svg", ".pdf")
COLUMNS = ("step", "modality", "stride", "cosine", "kept", "full_loss", "masked_loss")
# Vermilion and blue of Okabe and Ito's palette, which readers with colour blindness can distinguish.
_COLOURS = {"text": "#D55E00", "image": "#0072B2"}
_MISSING_PACKAGE = "the figures need matplotlib: pip install 'dynkp[plots]'"
# Bins of the rise in perplexity: four per decade on both sides of [-0.01, 0.01).
_BINS_PER_DECADE, _SMALLEST_RISE = 4, 0.01
_CHUNK_LINES = 4096
# How the windows of consecutive steps that fall together are aggregated; `kept` counts, `cosine` and `stride` are sums.
_WINDOW_SUMS = {"first_step": "min", "last_step": "max", "visits": "sum", "cosine": "sum", "kept": "sum", "stride": "sum"}
_WINDOW_MEANS = {"mean_cosine": "cosine", "kept_share": "kept", "mean_stride": "stride"}

_Array = np.ndarray[Any, Any]


class ModalityVisits:
    """Statistics of one modality's visits, updated chunk by chunk.

    Args:
        most_windows: The largest number of windows that the steps are divided into.
        most_points: The largest number of visits kept as points.

    Attributes:
        windows: A table of consecutive steps: the first and the last step, the number of visits, and the sums of their
            cosines, kept variants and strides.
        bins: A table by bin of the rise in perplexity: the number of visits, and the sum of their cosines.
        points: A random sample of (rise in perplexity, cosine); all visits, while they are few enough.
        without_number: The number of visits left out because a loss or the cosine was not finite, or because the perplexity
            exceeds the largest float.
    """

    def __init__(self, most_windows: int, most_points: int):
        self.windows = pd.DataFrame(columns=list(_WINDOW_SUMS))
        self.bins = pd.DataFrame(columns=["visits", "cosine"])
        self.points: list[tuple[float, float]] = []
        self.without_number = 0
        self._most_windows, self._most_points = most_windows, most_points
        self._window_width = 1  # steps
        self._seen = 0
        self._rise_and_cosine = _PairStatistics()

    @property
    def visits(self) -> int:
        """The number of visits, those without a number aside."""
        return int(self.windows["visits"].sum())

    @property
    def kept_share(self) -> float:
        """The share of visits whose variant was kept, in [0, 1]."""
        return float(self.windows["kept"].sum() / self.visits)

    def add(self, visits: Any) -> None:
        """Add a chunk of visits.

        Args:
            visits: A table with `COLUMNS` and `rise`; a visit without a number has NaN for cosine and rise.
        """
        with_number = visits[visits["rise"].notna()]
        self.without_number += len(visits) - len(with_number)
        if with_number.empty:
            return
        rise_in_nats = with_number["masked_loss"] - with_number["full_loss"]
        self._rise_and_cosine.add(np.stack([rise_in_nats, with_number["cosine"]], axis=1))
        of_bins = with_number["cosine"].groupby(_bin_numbers(with_number["rise"])).agg(visits="count", cosine="sum")
        self.bins = of_bins if self.bins.empty else self.bins.add(of_bins, fill_value=0)
        step = with_number["step"]
        single = with_number.assign(first_step=step, last_step=step, visits=1)[list(_WINDOW_SUMS)]
        self.windows = self._joined(single if self.windows.empty else pd.concat([self.windows, single]))
        while len(self.windows) > self._most_windows:
            self._window_width *= 2
            self.windows = self._joined(self.windows)

    def _joined(self, windows: Any) -> Any:
        """Join the windows that lie in the same `_window_width` steps."""
        return windows.groupby((windows["first_step"] - 1) // self._window_width).agg(_WINDOW_SUMS)

    def sample(self, point: tuple[float, float], generator: random.Random) -> None:
        """Offer a point to the sample, in which each point offered so far is equally likely (reservoir sampling)."""
        self._seen += 1
        if len(self.points) < self._most_points:
            self.points.append(point)
        elif (place := generator.randrange(self._seen)) < self._most_points:
            self.points[place] = point

    def against_perplexity(self) -> dict[str, Any]:
        """The numbers of Figure 3; see `Visits.against_perplexity`."""
        trend = self.bins.sort_index()
        return {
            "visits": self.visits,
            "without_number": self.without_number,
            "pearson_nats": self._rise_and_cosine.correlation,
            "spearman": _number_or_none(pd.DataFrame(self.points).corr("spearman").iloc[0, 1]),
            "sample": len(self.points),
            "trend": [
                dict(zip(("from", "to"), _bin_ends(number), strict=True), visits=int(count), mean_cosine=float(total / count))
                for number, count, total in zip(trend.index, trend["visits"], trend["cosine"], strict=True)
            ],
            "points": self.points,
        }

    def over_steps(self) -> dict[str, Any]:
        """The numbers of Figure 7; see `Visits.over_steps`."""
        windows = self.windows
        means = {name: windows[column] / windows["visits"] for name, column in _WINDOW_MEANS.items()}
        shown = windows[["first_step", "last_step", "visits"]].astype(int).assign(**means)
        return {"visits": self.visits, "kept_share": self.kept_share, "windows": shown.to_dict("records")}


class _PairStatistics:
    """The correlation of pairs that arrive in chunks: means and sums of products of deviations, merged (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.means = np.zeros(2)
        self.products = np.zeros((2, 2))

    def add(self, pairs: _Array) -> None:
        """Add a chunk of pairs, (N, 2)."""
        centred = pairs - pairs[0]  # a column that does not vary has deviations of exactly 0
        deviations = centred - centred.mean(axis=0)
        total = self.count + len(pairs)
        shift = pairs[0] + centred.mean(axis=0) - self.means
        self.products += deviations.T @ deviations + np.outer(shift, shift) * self.count * len(pairs) / total
        self.means += shift * len(pairs) / total
        self.count = total

    @property
    def correlation(self) -> float | None:
        """Pearson's correlation; None where either side does not vary."""
        variation = float(self.products[0, 0] * self.products[1, 1])
        return float(self.products[0, 1]) / math.sqrt(variation) if variation > 0 else None


@dataclass(frozen=True)
class Visits:
    """Statistics of a log of visits, from which both figures are drawn.

    Attributes:
        path: The log.
        modalities: Modality ("text", "image") to its statistics.
    """

    path: str
    modalities: dict[str, ModalityVisits]

    def against_perplexity(self) -> dict[str, Any]:
        """Compute the numbers of Figure 3.

        Returns:
            Per modality `visits`, `without_number` (visits left out), `pearson_nats` (the cosine's correlation with the rise
            of the loss, that is of the logarithm of the perplexity, over all visits), `spearman` (the rank correlation of
            cosine and rise in perplexity, over the sample), `sample` (its size), `trend` (per bin of the rise its ends, its
            visits and their mean cosine) and `points`. A correlation is None where either side does not vary.
        """
        return {name: visits.against_perplexity() for name, visits in self.modalities.items()}

    def over_steps(self) -> dict[str, Any]:
        """Compute the numbers of Figure 7.

        Returns:
            Per modality `visits`, `kept_share`, and `windows` of consecutive steps with `first_step`, `last_step`, `visits`,
            `mean_cosine`, `kept_share` and `mean_stride`.
        """
        return {name: visits.over_steps() for name, visits in self.modalities.items()}


def read_visits(path: str | Path, *, windows: int = 100, points: int = 5000, seed: int = 0) -> Visits:
    r"""Read a log of visits and compute its statistics.

    Args:
        path: `visits.jsonl`, or the run's folder that contains it. An incomplete last line, which a running or killed run
            leaves, is ignored.
        windows: The largest number of windows that the steps are divided into, at least 1.
        points: The largest number of visits kept as points, per modality, at least 2.
        seed: The seed of the points' draw.

    Returns:
        The statistics; their memory does not grow with the file.

    Raises:
        ValueError: If the file contains no visits, or a line is not one of AimKP's log; the error names file and line.
        OSError: If there is no such file.

    Example:
        >>> import json, pathlib, tempfile
        >>> log = pathlib.Path(tempfile.mkdtemp(), "visits.jsonl")
        >>> losses = {"full_loss": 1.0, "masked_loss": 1.5}
        >>> rows = [{"step": 1, "modality": "image", "stride": 1, "cosine": c, "kept": c > 0.4, **losses} for c in (0.2, 0.6)]
        >>> _ = log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        >>> read_visits(log).over_steps()["image"]["kept_share"]
        0.5
    """
    if windows < 1 or points < 2:
        raise ValueError(f"windows={windows} and points={points}: must be at least 1 and at least 2")
    path = Path(path)
    if path.is_dir():
        path = path / "visits.jsonl"
    found: dict[str, ModalityVisits] = {}
    generator = random.Random(seed)
    lines = _read_lines(path)
    while chunk := list(islice(lines, _CHUNK_LINES)):
        table = _to_table(chunk)
        for modality in table["modality"].unique():
            statistics = found.setdefault(modality, ModalityVisits(windows, points))
            statistics.add(table[table["modality"] == modality])
        # In the file's order, all modalities together: the sample depends on the order of the draws.
        with_number = table[table["rise"].notna()]
        for modality, *point in zip(*(with_number[name].tolist() for name in ("modality", "rise", "cosine")), strict=True):
            found[modality].sample(tuple(point), generator)
        del chunk, table, with_number  # before the next chunk is read
    if not any(statistics.visits for statistics in found.values()):
        raise ValueError(
            f"{path} contains no visits that can be drawn. No input is masked during the warm-up: train longer "
            "(log_visits=True), or give another run's file"
        )
    return Visits(str(path), {name: found[name] for name in sorted(found, reverse=True) if found[name].visits})


def _to_table(visits: list[dict[str, Any]]) -> Any:
    """Convert visits to a table of `COLUMNS` and `rise`, the rise in perplexity; cosine and rise are NaN if one of them is."""
    table = pd.DataFrame(visits, columns=list(COLUMNS))
    numbers = ["cosine", "full_loss", "masked_loss"]
    table[numbers] = table[numbers].astype(float)
    with np.errstate(over="ignore", invalid="ignore"):
        table["rise"] = np.exp(table["masked_loss"]) - np.exp(table["full_loss"])
    finite = np.isfinite(table[["cosine", "rise"]]).all(axis=1)
    return table.assign(cosine=table["cosine"].where(finite), rise=table["rise"].where(finite))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for where, visit in read_json_lines(path, skip_torn=True):  # the run may still be writing it
        missing = [name for name in COLUMNS if name not in visit] if isinstance(visit, dict) else list(COLUMNS)
        if missing:
            raise ValueError(
                f"{where} has no {', '.join(missing)}: this is not the visits.jsonl that AimKPTrainer writes "
                "with log_visits=True"
            )
        yield visit


def _bin_numbers(rises: Any) -> _Array:
    """The bin of each rise in perplexity: 0 around zero, then 1, 2, ... and -1, -2, ... outwards."""
    outwards = 1 + np.floor(_BINS_PER_DECADE * np.log10(np.maximum(np.abs(rises), _SMALLEST_RISE) / _SMALLEST_RISE))
    return np.where(np.abs(rises) < _SMALLEST_RISE, 0, np.copysign(outwards, rises)).astype(int)


def _bin_ends(number: int) -> tuple[float, float]:
    if number == 0:
        return -_SMALLEST_RISE, _SMALLEST_RISE
    near, far = (_SMALLEST_RISE * 10 ** (edge / _BINS_PER_DECADE) for edge in (abs(number) - 1, abs(number)))
    return (near, far) if number > 0 else (-far, -near)


def _number_or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def draw_against_perplexity(visits: Visits, path: str | Path) -> dict[str, Any]:
    """Draw Figure 3 and write its numbers beside it, as JSON.

    Args:
        visits: The statistics that `read_visits` returned.
        path: The figure's file, `.png`, `.svg` or `.pdf`; the numbers go to `path` with the suffix `.json`. Both files are
            replaced together.

    Returns:
        The numbers, as `Visits.against_perplexity` returns them.

    Raises:
        ValueError: If the file name has another suffix.
        ImportError: If matplotlib is not installed.
    """
    numbers = visits.against_perplexity()
    figure = _figure(path, width=4.2 * len(numbers))
    for axes, (name, of_modality) in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers.items(), strict=True):
        axes.scatter(
            *zip(*of_modality["points"], strict=True), s=6, c=_COLOURS.get(name), alpha=0.3, linewidths=0, rasterized=True
        )
        # Bins with only a few visits are not part of the trend line.
        trend = [row for row in of_modality["trend"] if row["visits"] >= max(3, of_modality["visits"] // 200)]
        middles = [math.copysign(math.sqrt(row["from"] * row["to"]), row["to"]) if row["from"] * row["to"] > 0 else 0.0
                   for row in trend]  # fmt: skip
        axes.plot(middles, [row["mean_cosine"] for row in trend], color="black", marker="o", markersize=3, label="mean")
        axes.set_xscale("symlog", linthresh=_SMALLEST_RISE)
        correlations = ", ".join(
            f"{label} {value:.2f}"
            for label, value in (("Spearman", of_modality["spearman"]), ("Pearson (nats)", of_modality["pearson_nats"]))
            if value is not None
        )
        axes.set(xlabel="rise in perplexity", ylabel="cosine of gradients", ylim=(-1.05, 1.05))
        axes.set_title(f"{name} masked, {of_modality['visits']:,} visits\n{correlations}", fontsize=9)
        axes.legend(frameon=False)
    _write(figure, path, numbers, visits)
    return numbers


def draw_over_steps(visits: Visits, path: str | Path) -> dict[str, Any]:
    """Draw Figure 7, with the mean stride below it, and write its numbers beside it, as JSON.

    Args:
        visits: The statistics that `read_visits` returned.
        path: The figure's file, as in `draw_against_perplexity`.

    Returns:
        The numbers, as `Visits.over_steps` returns them.

    Raises:
        ValueError: If the file name has another suffix.
        ImportError: If matplotlib is not installed.
    """
    numbers = visits.over_steps()
    figure = _figure(path, width=6.4, height=6.4)
    panels = figure.subplots(3, 1, sharex=True)
    columns = ("mean_cosine", "kept_share", "mean_stride")
    for axes, column, label in zip(panels, columns, ("mean cosine", "share kept", "mean stride"), strict=True):
        for name, of_modality in numbers.items():
            windows = of_modality["windows"]
            steps = [(window["first_step"] + window["last_step"]) / 2 for window in windows]
            values = [window[column] for window in windows]
            axes.plot(steps, values, color=_COLOURS.get(name), label=f"{name} masked", marker="o", markersize=2)
        axes.set_ylabel(label)
    panels[1].set_ylim(-0.05, 1.05)
    panels[2].set_yscale("log", base=2)
    panels[2].set_xlabel("optimizer step")
    panels[0].legend(frameon=False)
    _write(figure, path, numbers, visits)
    return numbers


def _figure(path: str | Path, width: float, height: float = 4.0) -> Any:
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: the figure's file name must end in one of {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_MISSING_PACKAGE) from error
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, path: str | Path, numbers: dict[str, Any], visits: Visits) -> None:
    path = Path(path)
    with atomic_files(path.with_suffix(".json"), path) as (json_file, figure_file):
        write_json(json_file, {"visits": visits.path, "modalities": numbers})
        figure.savefig(figure_file, format=path.suffix[1:].lower(), dpi=200)
