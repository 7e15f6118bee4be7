"""`dynkp plot` and the numbers behind AimKP's Figures 3 and 7.

Holds: means, shares, windows and correlations of a small log are those computed by hand; the statistics of a long log need no
more memory, also across chunks; a real run's log gives both figures; a file that is not a log of AimKP's is an error.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynkp import cli
from dynkp.report.plots import read_visits
from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.aimkp_trainer import AimKPTrainer
from tests.support.trainers import trainer_of


def visit(step: int, modality: str, cosine: float | None, rise_nats: float | None, **columns: Any) -> dict[str, Any]:
    masked = None if rise_nats is None else 1.0 + rise_nats
    defaults = {"id": f"post-{step}", "epoch": 1.5, "step": step, "modality": modality, "stride": 2, "cosine": cosine}
    return {**defaults, "kept": False, "full_loss": 1.0, "masked_loss": masked, **columns}


def write(folder: Path, visits: list[dict[str, Any]], end: str = "") -> Path:
    file = folder / "visits.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in visits) + end, encoding="utf-8")
    return file


SMALL = [
    visit(5, "text", 0.9, 0.0, kept=True),
    visit(5, "image", 1.0, 0.1, kept=True),
    visit(6, "text", 0.5, 0.5, kept=True, stride=4),
    visit(6, "image", 0.8, 0.1, kept=True),
    visit(7, "text", -0.2, 1.0, stride=8),
    visit(7, "text", None, 1.0),
    visit(7, "text", 0.3, None),
    visit(7, "text", 0.3, 5000.0),
]


def test_numbers_of_figure_3_by_hand(tmp_path: Path) -> None:
    text = read_visits(write(tmp_path, SMALL)).against_perplexity()["text"]
    assert text["visits"] == 3 and text["without_number"] == 3 and text["sample"] == 3
    rises = [0.0, math.e**1.5 - math.e, math.e**2 - math.e]  # 0, 1.763, 4.671
    assert text["points"] == [(pytest.approx(rise), cosine) for rise, cosine in zip(rises, (0.9, 0.5, -0.2), strict=True)]
    assert text["spearman"] == pytest.approx(-1.0)
    # Deviations of the rise in nats: -0.5, 0, 0.5; of the cosine: 0.5, 0.1, -0.6.
    assert text["pearson_nats"] == pytest.approx(-0.55 / math.sqrt(0.5 * 0.62))
    assert [(row["visits"], row["mean_cosine"]) for row in text["trend"]] == [(1, 0.9), (1, 0.5), (1, -0.2)]
    for row, rise in zip(text["trend"], rises, strict=True):
        assert row["from"] <= rise < row["to"]


def test_equal_values_share_their_rank_and_constants_have_no_correlation(tmp_path: Path) -> None:
    pairs = [(0.9, 0.1), (0.5, 0.1), (0.5, 0.2), (0.1, 0.3)]
    visits = [visit(5, "text", *pair) for pair in pairs] + [visit(5, "image", 0.5, rise) for rise in (0.1, 0.2)]
    numbers = read_visits(write(tmp_path, visits)).against_perplexity()
    # Ranks of the cosine: 4, 2.5, 2.5, 1; of the rise: 1.5, 1.5, 3, 4.
    assert numbers["text"]["spearman"] == pytest.approx(-3.75 / 4.5)
    assert numbers["image"]["spearman"] is None and numbers["image"]["pearson_nats"] is None


def test_a_fall_in_perplexity_has_bins_of_its_own(tmp_path: Path) -> None:
    visits = [visit(5, "text", 0.1, nats) for nats in (-2.0, -0.5, -0.001, 0.001, 0.5)]
    trend = read_visits(write(tmp_path, visits)).against_perplexity()["text"]["trend"]
    assert [row["visits"] for row in trend] == [1, 1, 2, 1]
    assert all(row["from"] < row["to"] for row in trend)
    assert all(before["to"] <= after["from"] for before, after in pairwise(trend))


def test_numbers_of_figure_7_by_hand(tmp_path: Path) -> None:
    file = write(tmp_path, SMALL)
    numbers = read_visits(tmp_path).over_steps()  # the folder does as well
    assert numbers == read_visits(file).over_steps()
    assert list(numbers) == ["text", "image"]
    assert [window["first_step"] for window in numbers["text"]["windows"]] == [5, 6, 7]
    assert numbers["text"]["kept_share"] == pytest.approx(2 / 3) and numbers["image"]["kept_share"] == 1.0
    wide = read_visits(file, windows=2).over_steps()["text"]["windows"]  # steps 5 and 6, step 7
    assert wide == [
        {"first_step": 5, "last_step": 6, "visits": 2, "mean_cosine": 0.7, "kept_share": 1.0, "mean_stride": 3.0},
        {"first_step": 7, "last_step": 7, "visits": 1, "mean_cosine": -0.2, "kept_share": 0.0, "mean_stride": 8.0},
    ]


def long_log(folder: Path, count: int) -> Path:
    return write(folder, [visit(1 + n // 4, "text", math.sin(n), n % 7 / 7, kept=n % 3 > 0) for n in range(count)])


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (4_000, 40_000):
        file = long_log(tmp_path, count)
        tracemalloc.start()
        visits = read_visits(file, points=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        [text] = visits.over_steps().values()
        assert text["visits"] == count and text["kept_share"] == pytest.approx(sum(n % 3 > 0 for n in range(count)) / count)
        assert sum(window["visits"] for window in text["windows"]) == count and 50 < len(text["windows"]) <= 100
        assert text["windows"][0]["first_step"] == 1 and text["windows"][-1]["last_step"] == count // 4
        figure = visits.against_perplexity()["text"]
        assert figure["sample"] == 500 and sum(row["visits"] for row in figure["trend"]) == count
        assert figure == read_visits(file, points=500).against_perplexity()["text"]  # the draw is the same each time
        drawn = sum(cosine for _, cosine in figure["points"]) / 500
        assert abs(drawn) < 0.15  # of all of it, not of its beginning or end
    assert peaks[1] < 1.2 * peaks[0]


def test_a_run_gives_both_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"warmup_epochs": 0, "max_steps": 4, "log_visits": True}
    trainer = trainer_of("llava", tmp_path / "out", classes=(AimKPTrainer, AimKPConfig), **options)
    trainer.train()
    names = {"three": tmp_path / "cosine.png", "seven": tmp_path / "figures" / "steps.svg"}
    arguments = ["--visits", str(tmp_path / "out"), "--figure3", str(names["three"]), "--figure7", str(names["seven"])]
    assert cli.main(["plot", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "Spearman" in printed and "share kept" in printed
    with Image.open(names["three"]) as figure:
        assert figure.format == "PNG" and figure.width > 1000 and len(figure.convert("RGB").getcolors(1 << 20)) > 10
    assert "<svg" in names["seven"].read_text() and "optimizer step" in names["seven"].read_text()
    logged = [json.loads(line) for line in (tmp_path / "out" / "visits.jsonl").read_text().splitlines()]
    numbers = json.loads((tmp_path / "figures" / "steps.json").read_text())["modalities"]
    points = json.loads((tmp_path / "cosine.json").read_text())["modalities"]
    for name in ("text", "image"):
        rows = [row for row in logged if row["modality"] == name]
        assert rows and numbers[name]["visits"] == len(rows) == len(points[name]["points"])
        assert numbers[name]["kept_share"] == pytest.approx(sum(row["kept"] for row in rows) / len(rows))
        assert {window["first_step"] for window in numbers[name]["windows"]} == {row["step"] for row in rows}


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    file = write(tmp_path, SMALL, end='{"id": "post-8", "st')
    assert read_visits(file).over_steps() == read_visits(write(tmp_path, SMALL)).over_steps()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no visits"),
        (json.dumps(visit(1, "text", None, 1.0)) + "\n", "no visits"),
        ('{"id": "a", "step": 1, "chosen": "direct"}\n', "line 1 has no modality, stride, cosine"),
        ("[1]\n", "line 1 has no step"),
        (json.dumps(visit(1, "text", 0.5, 1.0)) + "\nid,step\n", "line 2: not valid JSON"),
    ],
)
def test_a_file_that_is_not_a_log_is_an_error(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "visits.jsonl"
    file.write_text(content, encoding="utf-8")
    assert cli.main(["plot", "--visits", str(file), "--figure7", str(tmp_path / "steps.png")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "steps.png").exists()


def test_missing_files_and_other_suffixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", "--visits", str(tmp_path), "--figure7", "steps.png"]) == 2
    assert "visits.jsonl" in capsys.readouterr().err
    file = write(tmp_path, SMALL)
    assert cli.main(["plot", "--visits", str(file), "--figure3", str(tmp_path / "figure.jpg")]) == 2
    assert ".png, .svg, .pdf" in capsys.readouterr().err
    for arguments in ([], ["--figure3", "a.png", "--figure7", "a.svg"], ["--figure7", "a.png", "--windows", "0"]):
        with pytest.raises(SystemExit):
            cli.main(["plot", "--visits", str(file), *arguments])


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert cli.main(["plot", "--visits", str(write(tmp_path, SMALL)), "--figure7", str(tmp_path / "steps.png")]) == 2
    assert "dynkp[plots]" in capsys.readouterr().err
