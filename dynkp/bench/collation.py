"""The suite `collation`: the cost of making batches, and how much of it the training process pays.

Given   random posts in a JSON Lines file, their images as JPEGs of one size on the disk.
Gives   one row per image size and number of data loader workers: posts per second, and the training process's CPU time.
Holds   batches are made as in training: `load_posts`, a `DataLoader`, `PairedTargetCollator` with a processor of LLaVA-1.5's
        shape (336 pixels, 576 image tokens); a pass begins with no worker running and ends with the last batch.

Images are smoothed noise, about 0.25 bytes per pixel, as photographs are in JPEG.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from dynkp.batches.collators import PairedTargetCollator
from dynkp.bench.measure import Setting, environment
from dynkp.data.sources import load_posts
from dynkp.files.json_lines import write_json_lines
from dynkp.synthetic.tiny_model import build_tiny_vlm

HEADINGS = ("images", "workers", "posts/s", "ms per post of the training process's CPU", "KiB per image")
# Width and height in pixels; None for posts without an image.
SIZES: tuple[tuple[int, int] | None, ...] = (None, (336, 336), (640, 480), (1280, 960), (2560, 1920))
WORKERS = (0, 1, 2)
POSTS, BATCH = 256, 8
# Different images per size, which the posts share: drawing one takes longer than reading it.
_IMAGES = 16


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure every image size with every number of workers.

    Args:
        setting: `repeats` counts timed passes over the posts, which an untimed one precedes; the device is not used.

    Yields:
        Rows with `posts_per_s` and `main_cpu_ms` (per post): medians over the passes. Wall time, whatever the setting.
    """
    posts, sizes = (32, (None, (64, 48))) if setting.quick else (POSTS, SIZES)
    texts = [_words(random.Random(post), 27) for post in range(posts)]
    _, processor = build_tiny_vlm(texts, image_size=336, patch_size=14)
    collator = PairedTargetCollator(processor)
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="dynkp-bench-") as folder:
            file, kib = write_posts(Path(folder), texts, size)
            dataset = load_posts(file, image_dir=folder)
            for workers in WORKERS:
                passes = [_pass(dataset, collator, workers) for _ in range(setting.repeats + 1)][1:]
                yield {
                    "suite": "collation",
                    "width": size and size[0],
                    "height": size and size[1],
                    "workers": workers,
                    "posts": posts,
                    "batch": BATCH,
                    "posts_per_s": posts / statistics.median(seconds for seconds, _ in passes),
                    "main_cpu_ms": 1000 * statistics.median(cpu for _, cpu in passes) / posts,
                    "kib_per_image": kib,
                    "quick": setting.quick,
                    **environment(setting),
                    "device": "cpu",
                    "clock": "wall time",
                }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row for the printed table, under `HEADINGS`."""
    image = "none" if row["width"] is None else f"{row['width']} x {row['height']}"
    numbers = f"{row['posts_per_s']:.0f}", f"{row['main_cpu_ms']:.2f}", f"{row['kib_per_image']:.0f}"
    return image, str(row["workers"]), *numbers


def write_posts(folder: Path, texts: list[str], size: tuple[int, int] | None) -> tuple[Path, float]:
    """Write posts with these texts, a rationale of 157 words each and, if a size is given, an image each.

    Args:
        folder: Folder for the file and the images.
        texts: Texts of the posts.
        size: Width and height of the images in pixels; None for posts without an image.

    Returns:
        The file, and the mean KiB of an image.
    """
    images = []
    for number in range(_IMAGES if size else 0):
        assert size is not None
        coarse = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        images.append(folder / f"{number}.jpg")
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(images[-1], quality=90)
    rows = [
        {
            "id": str(number),
            "text": text,
            "keyphrases": text.split()[:2],
            "rationale": _words(random.Random(-number), 157),
            **({"image": images[number % len(images)].name} if images else {}),
        }
        for number, text in enumerate(texts)
    ]
    file = folder / "posts.jsonl"
    write_json_lines(file, rows)
    return file, statistics.mean(image.stat().st_size for image in images) / 1024 if images else 0.0


def _pass(dataset: Any, collator: PairedTargetCollator, workers: int) -> tuple[float, float]:
    """Make all batches once; return the seconds it took, and this process's CPU seconds."""
    loader = DataLoader(dataset, batch_size=BATCH, collate_fn=collator, num_workers=workers)
    began, cpu = time.perf_counter(), time.process_time()
    seen = sum(len(batch["id"]) for batch in loader)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert seen == len(dataset)
    return seconds, cpu


def _words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("bcdfghklmnprstvwaeiou", k=draw.randint(2, 9))) for _ in range(count))
