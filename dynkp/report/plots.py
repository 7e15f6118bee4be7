"""What AimKP's filter did in a run: Figures 3 and 7 of its paper, from the log of visits.

Given   `visits.jsonl` of a run (`AimKPConfig(log_visits=True)`): per post, visit and modality the cosine, the stride, whether
        the variant was kept, and the losses in nats per token.
Gives   Figure 3, the cosine against the rise in perplexity that masking causes; Figure 7, mean cosine and share of variants
        kept over the steps; and the numbers that either is drawn from.
Holds   the file is read once, line by line: millions of visits take no more memory than thousands. A figure shows a sample
        of the visits as points; means, shares and the correlation in nats are of all of them. The same file gives the
        same figure.

Extra `plots` (matplotlib).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dynkp.files.atomic import atomic_files
from dynkp.files.json_files import write_json
from dynkp.files.json_lines import read_json_lines

SUFFIXES = (".png", ".svg", ".pdf")
COLUMNS = ("step", "modality", "stride", "cosine", "kept", "full_loss", "masked_loss")
# Blue and vermilion of Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = {"text": "#D55E00", "image": "#0072B2"}
_NEEDED = "the figures need matplotlib: pip install 'dynkp[plots]'"
# Of a visit, where a bin of the rise in perplexity ends: four to a decade, on both sides of [-0.01, 0.01).
_BINS_PER_DECADE, _SMALLEST_RISE = 4, 0.01


@dataclass
class Window:
    """Sums over the visits of some consecutive steps."""

    first_step: int
    last_step: int
    visits: int = 0
    cosine: float = 0.0
    kept: int = 0
    stride: float = 0.0

    def absorb(self, other: Window) -> None:
        self.first_step = min(self.first_step, other.first_step)
        self.last_step = max(self.last_step, other.last_step)
        self.visits += other.visits
        self.cosine += other.cosine
        self.kept += other.kept
        self.stride += other.stride

    def row(self) -> dict[str, Any]:
        return {
            "first_step": self.first_step,
            "last_step": self.last_step,
            "visits": self.visits,
            "mean_cosine": self.cosine / self.visits,
            "kept_share": self.kept / self.visits,
            "mean_stride": self.stride / self.visits,
        }


@dataclass
class _Moments:
    """Running means and (co)variances of pairs, without the loss of digits of plain sums (Welford)."""

    count: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.count += 1
        before_x, before_y = x - self.x, y - self.y
        self.x += before_x / self.count
        self.y += before_y / self.count
        self.xx += before_x * (x - self.x)
        self.yy += before_y * (y - self.y)
        self.xy += before_x * (y - self.y)

    @property
    def correlation(self) -> float | None:
        return self.xy / math.sqrt(self.xx * self.yy) if self.xx > 0 and self.yy > 0 else None


@dataclass
class ModalityVisits:
    """One modality's visits, summed up.

    Attributes:
        visits: how many.
        kept: of how many the variant was kept.
        without_number: visits left out, because a loss or the cosine was not finite, or the perplexity too large for a float.
        points: a sample of (rise in perplexity, cosine), of all visits while they are few enough.
        bins: per bin of the rise, visits and the sum of their cosines.
        windows: over the steps, in order.
    """

    visits: int = 0
    kept: int = 0
    without_number: int = 0
    points: list[tuple[float, float]] = field(default_factory=list)
    bins: dict[int, list[float]] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    moments: _Moments = field(default_factory=_Moments)


@dataclass(frozen=True)
class Visits:
    """A log of visits, summed up: what both figures are drawn from."""

    path: str
    modalities: dict[str, ModalityVisits]

    def against_perplexity(self) -> dict[str, Any]:
        """The numbers of Figure 3.

        Returns:
            Per modality `visits`, `pearson_nats` (the cosine's correlation with the rise of the loss, that is of the logarithm
            of the perplexity, over all visits), `spearman` (the rank correlation of cosine and rise, over the sample),
            `sample` (its size), `trend` (per bin of the rise its ends, visits and their mean cosine) and `points`. A
            correlation is None where either side does not vary.
        """
        return {name: _against_perplexity(visits) for name, visits in self.modalities.items()}

    def over_steps(self) -> dict[str, Any]:
        """The numbers of Figure 7: per modality `visits`, `kept_share` and `windows` of consecutive steps."""
        return {
            name: {
                "visits": visits.visits,
                "kept_share": visits.kept / visits.visits,
                "windows": [window.row() for window in visits.windows],
            }
            for name, visits in self.modalities.items()
            if visits.visits
        }


def read_visits(path: str | Path, *, windows: int = 100, points: int = 5000, seed: int = 0) -> Visits:
    """Sum a log of visits up.

    Args:
        path: `visits.jsonl`, or the run's folder that holds it. A torn last line, as a running or killed run leaves it, is
            left out.
        windows: the most windows that the steps are divided into, at least 1.
        points: the most visits kept as points, per modality, at least 2.
        seed: of their draw.

    Returns:
        The sums; memory does not grow with the file.

    Raises:
        ValueError: naming file and line, if there are no visits in it, or it is not a log of AimKP's.
        OSError: if there is no such file.

    Example:
        >>> visits = read_visits("out/visits.jsonl")
        >>> visits.over_steps()["image"]["windows"][0]["kept_share"]
        0.96
    """
    if windows < 1 or points < 2:
        raise ValueError(f"windows={windows} and points={points}: give at least 1 and 2")
    path = Path(path)
    if path.is_dir():
        path = path / "visits.jsonl"
    found: dict[str, ModalityVisits] = {}
    courses: dict[str, _Course] = {}
    generator = random.Random(seed)
    for visit in _lines(path):
        name = visit["modality"]
        of_modality = found.setdefault(name, ModalityVisits())
        course = courses.setdefault(name, _Course(windows))
        full, masked, cosine = visit["full_loss"], visit["masked_loss"], visit["cosine"]
        rise = None if full is None or masked is None else _rise(full, masked)
        if cosine is None or rise is None:
            of_modality.without_number += 1
            continue
        of_modality.visits += 1
        of_modality.kept += visit["kept"]
        of_modality.moments.add(masked - full, cosine)
        sums = of_modality.bins.setdefault(_bin(rise), [0, 0.0])
        sums[0] += 1
        sums[1] += cosine
        course.add(visit)
        # Reservoir sampling: every visit is as likely to stay.
        if len(of_modality.points) < points:
            of_modality.points.append((rise, cosine))
        elif (place := generator.randrange(of_modality.visits)) < points:
            of_modality.points[place] = (rise, cosine)
    if not any(visits.visits for visits in found.values()):
        raise ValueError(
            f"{path} holds no visits that can be drawn. While the warm-up lasts nothing is masked: train on (log_visits=True), "
            "or look at another run's file."
        )
    for name, visits in found.items():
        visits.windows = courses[name].windows()
    return Visits(str(path), {name: found[name] for name in sorted(found, reverse=True) if found[name].visits})


class _Course:
    """Windows of steps; each time they become too many, neighbours are joined."""

    def __init__(self, most: int):
        self.most, self.width = most, 1
        self._windows: dict[int, Window] = {}

    def add(self, visit: Mapping[str, Any]) -> None:
        step = visit["step"]
        window = Window(step, step, 1, visit["cosine"], int(visit["kept"]), visit["stride"])
        self._put(window)
        while len(self._windows) > self.most:
            self.width *= 2
            narrow = list(self._windows.values())
            self._windows = {}
            for window in narrow:
                self._put(window)

    def _put(self, window: Window) -> None:
        number = (window.first_step - 1) // self.width
        if number in self._windows:
            self._windows[number].absorb(window)
        else:
            self._windows[number] = window

    def windows(self) -> list[Window]:
        return [window for _, window in sorted(self._windows.items())]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for where, visit in read_json_lines(path, skip_torn=True):  # the run may still be writing it
        lacking = [name for name in COLUMNS if name not in visit] if isinstance(visit, dict) else list(COLUMNS)
        if lacking:
            raise ValueError(
                f"{where} has no {', '.join(lacking)}: this is not the visits.jsonl that AimKPTrainer writes "
                "with log_visits=True"
            )
        yield visit


def _rise(full_loss: float, masked_loss: float) -> float | None:
    """By how much masking raises the perplexity; None if that is beyond a float."""
    try:
        return math.exp(masked_loss) - math.exp(full_loss)
    except OverflowError:
        return None


def _bin(rise: float) -> int:
    if abs(rise) < _SMALLEST_RISE:
        return 0
    return int(math.copysign(1 + math.floor(_BINS_PER_DECADE * math.log10(abs(rise) / _SMALLEST_RISE)), rise))


def _ends(number: int) -> tuple[float, float]:
    if number == 0:
        return -_SMALLEST_RISE, _SMALLEST_RISE
    near, far = (_SMALLEST_RISE * 10 ** (edge / _BINS_PER_DECADE) for edge in (abs(number) - 1, abs(number)))
    return (near, far) if number > 0 else (-far, -near)


def _against_perplexity(visits: ModalityVisits) -> dict[str, Any]:
    return {
        "visits": visits.visits,
        "without_number": visits.without_number,
        "pearson_nats": visits.moments.correlation,
        "spearman": _spearman(visits.points),
        "sample": len(visits.points),
        "trend": [
            {"from": _ends(number)[0], "to": _ends(number)[1], "visits": int(count), "mean_cosine": total / count}
            for number, (count, total) in sorted(visits.bins.items())
        ],
        "points": visits.points,
    }


def _spearman(points: list[tuple[float, float]]) -> float | None:
    moments = _Moments()
    for pair in zip(*map(_ranks, zip(*points, strict=True)), strict=True):
        moments.add(*pair)
    return moments.correlation


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1 on; equals share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places].tolist()


def draw_against_perplexity(visits: Visits, path: str | Path) -> dict[str, Any]:
    """Draw Figure 3 and write its numbers beside it, as JSON.

    Args:
        visits: what `read_visits` returned.
        path: `.png`, `.svg` or `.pdf`; `path` with the suffix `.json` holds the numbers. Both are replaced together.

    Returns:
        The numbers: [`Visits.against_perplexity`].
    """
    numbers = visits.against_perplexity()
    figure = _figure(path, width=4.2 * len(numbers))
    for axes, (name, of_modality) in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers.items(), strict=True):
        axes.scatter(
            *zip(*of_modality["points"], strict=True), s=6, c=_COLOURS.get(name), alpha=0.3, linewidths=0, rasterized=True
        )
        # A mean of a handful of visits is no trend.
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
        visits: what `read_visits` returned.
        path: as for `draw_against_perplexity`.

    Returns:
        The numbers: [`Visits.over_steps`].
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
        raise ValueError(f"{path}: a figure's name ends in one of {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, path: str | Path, numbers: dict[str, Any], visits: Visits) -> None:
    path = Path(path)
    with atomic_files(path.with_suffix(".json"), path) as (json_file, figure_file):
        write_json(json_file, {"visits": visits.path, "modalities": numbers})
        figure.savefig(figure_file, format=path.suffix[1:].lower(), dpi=200)
