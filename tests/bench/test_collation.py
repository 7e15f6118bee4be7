"""The suite `collation`: a row per image size and number of workers; times are never asserted."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dynkp.bench import collation, run
from dynkp.bench.measure import Setting
from dynkp.data.posts import validate_posts
from dynkp.data.sources import load_posts


def test_rows_and_cells() -> None:
    rows = list(collation.run(Setting(torch.device("cpu"), threads=1, repeats=1, quick=True)))
    assert [(row["width"], row["workers"]) for row in rows] == [(width, n) for width in (None, 64) for n in (0, 1, 2)]
    for row in rows:
        assert row["posts_per_s"] > 0 and row["main_cpu_ms"] > 0 and row["clock"] == "wall time" and row["quick"]
        assert (row["kib_per_image"] > 0) == (row["width"] is not None)
        assert len(collation.cells(row)) == len(collation.HEADINGS)
        assert run._provenance(row)


def test_drawn_posts_are_sound(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(20)]
    file, kib = collation.write_posts(tmp_path, texts, (640, 480))
    posts, report = validate_posts(load_posts(file, image_dir=tmp_path))
    assert len(posts) == 20 and not report.findings and report.without_image == 0
    with Image.open(tmp_path / "3.jpg") as image:
        assert image.size == (640, 480)
    # What photographs take at this size: 50 to 150 KiB.
    assert 50 < kib < 150
    assert len(posts[0]["rationale"].split()) == 157
